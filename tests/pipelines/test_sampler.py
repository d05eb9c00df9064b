"""Who gets which image: permutations, ranks, steps, resumption."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sampler import Blocks, Sampler, Shards, blocked_permutation, mix64, permutation, shard
from ressl.batch import DataError


def joined(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch]


def steps(sampler: Sampler, epoch: int, start: int = 0) -> list[list[int]]:
    """Images of this rank, one list for each optimizer step."""
    batches = [batch.tolist() for batch in sampler.epoch(epoch, start)]
    n = sampler.accumulate
    return [sum(batches[i : i + n], []) for i in range(0, len(batches), n)]


def test_mix64_gives_the_published_sequence_of_splitmix64():
    golden, seed = 0x9E3779B97F4A7C15, 1234567
    states = np.array([(seed + i * golden) % 2**64 for i in range(5)], np.uint64)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(states).tolist() == published


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000, 65537])
def test_a_permutation_holds_every_image_once(count):
    assert np.array_equal(np.sort(permutation(count, seed=5, epoch=3)), np.arange(count))


def test_permutations_never_change():
    assert permutation(12, seed=0, epoch=0).tolist() == [2, 6, 5, 3, 0, 4, 11, 7, 1, 10, 8, 9]
    assert permutation(12, seed=2**31 - 1, epoch=199).tolist() == [4, 11, 1, 2, 0, 5, 10, 7, 3, 8, 6, 9]
    assert permutation(1_281_167, seed=7, epoch=11)[:5].tolist() == [1173335, 1192095, 161722, 876626, 1180186]


def test_permutations_differ_by_seed_and_epoch():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(12) for epoch in range(12)}
    assert len(orders) == 144


def test_every_place_gets_every_image_equally_often():
    count, epochs = 8, 4000
    table = np.zeros((count, count))
    for epoch in range(epochs):
        table[np.arange(count), permutation(count, seed=1, epoch=epoch)] += 1
    expected = epochs / count
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together():
    order = permutation(100_000, seed=0, epoch=0)
    assert (np.abs(np.diff(order)) == 1).sum() < 2 + 4 * np.sqrt(2)  # Poisson with a mean of 2


@pytest.mark.parametrize(("images", "batch"), [(24, 24), (25, 24), (47, 24), (48, 24), (1000, 24)])
def test_exactly_the_rest_of_the_permutation_is_left_out(images, batch):
    sampler = Sampler(images, batch, seed=3)
    seen = joined(sampler.epoch(4))
    assert sampler.steps_per_epoch == images // batch
    assert len(seen) == images - images % batch
    assert seen == permutation(images, 3, 4)[: len(seen)].tolist()


def test_other_images_are_left_out_in_other_epochs():
    sampler = Sampler(29, 24, seed=0)
    left_out = {frozenset(range(29)) - set(joined(sampler.epoch(epoch))) for epoch in range(10)}
    assert len(left_out) > 5


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_together_give_the_order_of_one_rank(world_size, accumulate):
    one = steps(Sampler(200, 72, seed=1), 5)
    ranks = [steps(Sampler(200, 72, 1, rank, world_size, accumulate), 5) for rank in range(world_size)]
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == one
    assert all(len(part) == 72 // world_size for rank in ranks for part in rank)


def test_a_step_comes_as_micro_batches_of_equal_size():
    batches = list(Sampler(100, 48, seed=0, rank=1, world_size=2, accumulate=4).epoch(0))
    assert [len(batch) for batch in batches] == [6] * 8
    assert all(batch.dtype == np.int64 for batch in batches)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", range(6))
def test_an_epoch_can_be_taken_up_at_any_step(start, accumulate):
    sampler = Sampler(64, 12, seed=9, rank=1, world_size=3, accumulate=accumulate)
    assert steps(sampler, 2, start) == steps(sampler, 2)[start:]


def test_an_epoch_is_the_same_each_time_it_is_asked_for():
    sampler = Sampler(64, 12, seed=9)
    assert joined(sampler.epoch(3)) == joined(Sampler(64, 12, seed=9).epoch(3)) == joined(sampler.epoch(3))


def test_a_batch_that_does_not_split_is_refused_with_what_would():
    with pytest.raises(DataError) as refused:
        Sampler(1000, 100, seed=0, world_size=8, accumulate=3)
    assert str(refused.value) == (
        "optim.batch_size=100 does not split over 8 processes x optim.accumulate=3: choose a multiple of 24"
    )


def test_fewer_images_than_one_batch_are_refused():
    with pytest.raises(DataError) as refused:
        Sampler(1023, 1024, seed=0, world_size=8)
    assert str(refused.value) == (
        "1,023 images are fewer than one batch of optim.batch_size=1,024 (8 processes x 128): lower optim.batch_size"
    )


@pytest.mark.parametrize(("count", "world_size"), list(itertools.product([0, 1, 7, 8, 1000], [1, 2, 3, 8])))
def test_shards_cover_everything_once_in_order_and_evenly(count, world_size):
    parts = [shard(count, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


# --- orders for data that is read or held in parts -------------------------------------------------------------------

ORDERS = [None, Blocks(block=4, window=3), Blocks(block=7, window=1), Blocks(block=1, window=50), Shards(4), Shards(8)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [48, 101, 107])
def test_any_order_gives_no_image_twice_and_leaves_out_exactly_the_rest(order, count):
    seen = joined(Sampler(count, 16, 3, order=order).epoch(2))
    assert len(seen) == len(set(seen)) == count - count % 16
    assert set(seen) <= set(range(count))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_order_is_the_same_for_any_number_of_ranks(order, world_size):
    if isinstance(order, Shards) and order.count % world_size:
        pytest.skip("more ranks than shards")
    one = steps(Sampler(101, 16, 3, order=order), epoch=1)
    ranks = [steps(Sampler(101, 16, 3, rank, world_size, order=order), epoch=1) for rank in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_differs_by_epoch_and_seed_and_can_be_taken_up_anywhere(order):
    orders = {tuple(joined(Sampler(48, 16, seed, order=order).epoch(epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    sampler = Sampler(101, 16, 3, order=order)
    assert steps(sampler, 1, start=4) == steps(sampler, 1)[4:]


def test_blocks_keep_neighbours_together():
    order = blocked_permutation(1000, 5, 2, block=10, window=4)
    assert sorted(order.tolist()) == list(range(1000))
    for run in order.reshape(-1, 40):
        assert len(set(run // 10)) == 4  # whole blocks
        assert np.abs(np.diff(run)).min() >= 1 and (np.diff(run) == 1).mean() < 0.2  # and mixed
    blocks = [run[0] // 10 for run in order.reshape(-1, 40)]
    assert blocks != sorted(blocks)


def test_a_last_block_that_is_not_full_takes_part():
    order = blocked_permutation(23, 0, 0, block=5, window=2)
    assert sorted(order.tolist()) == list(range(23))


def test_every_place_gets_every_image_of_blocks_equally_often():
    count, epochs = 8, 4000
    table = np.zeros((count, count))
    for epoch in range(epochs):
        table[np.arange(count), blocked_permutation(count, 1, epoch, block=2, window=2)] += 1
    expected = epochs / count
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)  # two of a block come together: not independent


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_is_only_asked_for_images_of_its_own_shards(world_size):
    for rank in range(world_size):
        own = set(shard(101, rank, world_size).tolist())
        assert set(joined(Sampler(101, 16, 3, rank, world_size, order=Shards(4)).epoch(0))) <= own


def test_images_of_different_shards_meet_as_seldom_as_any_two():
    sampler, met, epochs = Sampler(800, 16, 3, order=Shards(8)), 0, 40
    for epoch in range(epochs):
        for step in steps(sampler, epoch):
            met += sum((i + 100) % 800 in step for i in step)
    expected = epochs * 800 * 2 / 100  # of the 2 that a step takes of 100
    assert abs(met - expected) < 6 * expected**0.5


@pytest.mark.parametrize("count", [1000, 1003])
def test_blocks_bound_what_is_in_memory(count):
    order = blocked_permutation(count, 5, 2, block=10, window=4)
    assert max(len(set(order[i : i + 40] // 10)) for i in range(count - 40)) <= 2 * 4 + 2


def test_every_step_takes_as_many_images_of_each_shard():
    for step in steps(Sampler(100, 16, 3, order=Shards(4)), epoch=0):
        assert [sum(i // 25 == s for i in step) for s in range(4)] == [4] * 4


@pytest.mark.parametrize(("count", "world_size"), [(4, 3), (3, 1), (2, 4)])
def test_shards_that_do_not_go_up_in_ranks_and_batch_are_refused(count, world_size):
    with pytest.raises(DataError, match=rf"data\.source\.shards={count} must be a multiple of the {world_size} proc"):
        Sampler(100, 16 if world_size != 3 else 48, 0, 0, world_size, order=Shards(count))


# --- whatever the numbers --------------------------------------------------------------------------------------------


@st.composite
def epochs(draw) -> tuple[Sampler, int, int, int, int]:
    """The sampler of a single rank, an epoch, a number of ranks, a step they stop at, and how many ranks go on."""
    before, after, accumulate = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    parts = math.lcm(before, after)
    batch = parts * accumulate * draw(st.integers(1, max(1, 60 // parts // accumulate)))
    shards = [Shards(count) for count in range(parts, batch + 1, parts) if batch % count == 0]
    blocks = st.builds(Blocks, block=st.integers(1, 40), window=st.integers(1, 10))
    one = Sampler(
        num_images=batch * draw(st.integers(2, 5)) + draw(st.integers(0, batch - 1)),
        batch_size=batch,
        seed=draw(st.integers(0, 2**31 - 1)),
        accumulate=accumulate,
        order=draw(st.one_of(st.none(), blocks, st.sampled_from(shards))),
    )
    return one, draw(st.integers(0, 10_000)), before, draw(st.integers(0, one.steps_per_epoch)), after


@given(case=epochs())
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_any_ranks_share_out_one_order_and_go_on_where_any_others_stopped(case):
    one, epoch, before, stop, after = case
    order = steps(one, epoch)
    seen = sum(order, [])
    assert len(seen) == len(set(seen)) == one.num_images - one.num_images % one.batch_size  # the rest is declared
    assert set(seen) <= set(range(one.num_images))

    def of_ranks(world_size: int, start: int) -> list[list[int]]:
        ranks = [steps(replace(one, rank=rank, world_size=world_size), epoch, start) for rank in range(world_size)]
        return [sum(parts, []) for parts in zip(*ranks, strict=True)]

    first = of_ranks(before, 0)
    assert first == order
    assert first[:stop] + of_ranks(after, stop) == order
