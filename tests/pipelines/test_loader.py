"""What the stream adds to source and views: sizes that grow, the choice between definition and twin, and what ranks
compare."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import build_loaders
from pipelines.loader import ViewStream, hashed
from pipelines.sampler import Blocks, Sampler, Shards, mix64
from ressl.batch import DataError, Digest, disagreement
from ressl.config import Config, ProgressiveSizes

CPU = torch.device("cpu")


def config(out: Path, **views) -> Config:
    strong = {"size": 20, "jitter_prob": 0.8, "grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
    return Config.model_validate(
        {
            "data": {"source": {"name": "synthetic", "images": 24, "height": 30, "width": 40, "classes": 3}},
            "views": {"weak": {"size": 24}, "strong": [strong, {"size": 11}], **views},
            "encoder": {"name": "resnet_small"},
            "method": {"name": "ressl"},
            "optim": {"name": "sgd", "epochs": 9, "batch_size": 4, "lr": 0.1},
            "evaluate": {"size": 16},
            "run": {"out_dir": out, "device": "cpu"},
        }
    )


def stream(cfg: Config, dtype: torch.dtype = torch.float32) -> ViewStream:
    built = build_loaders(cfg, device=CPU, dtype=dtype).train
    assert isinstance(built, ViewStream)
    return built


def views(batch) -> list[torch.Tensor]:
    return [*batch.weak, *batch.strong]


# --- progressive sizes -----------------------------------------------------------------------------------------------


def test_sizes_grow_linearly_in_steps_and_end_at_the_full_one():
    sizes = ProgressiveSizes(start=0.6, until=10, multiple=32)
    assert [sizes.size(224, epoch) for epoch in (0, 2, 5, 8, 9, 10, 199)] == [128, 160, 192, 192, 224, 224, 224]
    assert [sizes.size(96, epoch) for epoch in (0, 5, 10)] == [64, 64, 96]
    assert ProgressiveSizes(start=0.1, until=4, multiple=32).size(28, 0) == 28  # never above the full size


def test_no_size_ever_shrinks():
    for start in (0.1, 0.5, 1.0):
        for full in (28, 96, 224):
            sizes = [ProgressiveSizes(start=start, until=20, multiple=8).size(full, epoch) for epoch in range(25)]
            assert sizes == sorted(sizes) and sizes[-1] == full and min(sizes) >= min(8, full)


def test_the_views_of_an_epoch_have_its_sizes_and_the_same_numbers_as_ever(tmp_path):
    plain = stream(config(tmp_path))
    growing = stream(config(tmp_path, progressive={"start": 0.5, "until": 4, "multiple": 4}))
    for epoch, sizes in ((0, [12, 12, 4]), (2, [20, 16, 8]), (4, [24, 20, 11]), (8, [24, 20, 11])):
        for frames in growing.frames(epoch):
            assert [view.shape[2:] for view in views(growing.cut(frames, epoch))] == [(size, size) for size in sizes]
            for ours, theirs in zip(growing.params(frames, epoch), plain.params(frames, epoch), strict=True):
                assert torch.equal(ours.box, theirs.box) and torch.equal(ours.jitter, theirs.jitter)


# --- the definition and its twin -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the twin runs in Triton's interpreter only without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_implementations_give_the_same_batches(tmp_path, dtype):
    definition, twin = (stream(config(tmp_path, impl=impl), dtype) for impl in ("torch", "triton"))
    for a, b in zip(definition.epoch(3), twin.epoch(3), strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(views(a), views(b), strict=True):
            assert x.dtype == y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert (x.float() - y.float()).abs().max() < (1e-4 if dtype == torch.float32 else 0.02)
        break  # the interpreter is slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_twin_is_refused_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(DataError, match=r"views\.impl=triton needs a GPU: views\.impl=auto"):
        stream(config(tmp_path, impl="triton"))
    stream(config(tmp_path, impl="auto"))


@pytest.mark.gpu
def test_on_a_gpu_the_twin_is_taken_by_itself_and_gives_what_the_definition_gives(tmp_path):
    device = torch.device("cuda")
    auto, torch_only = (build_loaders(config(tmp_path, impl=impl), device=device).train for impl in ("auto", "torch"))
    for a, b in zip(auto.epoch(3), torch_only.epoch(3), strict=True):
        for x, y in zip(views(a), views(b), strict=True):
            assert x.is_cuda and (x - y).abs().max() < 1e-3


# --- what ranks compare before an epoch ------------------------------------------------------------------------------

SETTINGS = {"num_images": 101, "batch_size": 24, "seed": 3}
EPOCH, START = 2, 1  # 3 of 4 steps are left
TABLES = {"index": 5 * np.arange(101), "labels": np.arange(101) % 3, "classes": ("a", "b", "c")}


def rank(number: int, world_size: int, *, tables: dict | None = None, **settings) -> ViewStream:
    """The stream of one rank over a source that has no more than tables."""
    sampler = Sampler(rank=number, world_size=world_size, **(SETTINGS | settings))
    cfg = config(Path("unused"))
    return ViewStream(SimpleNamespace(**(tables or TABLES)), sampler, cfg.views, cfg.data, CPU, torch.float32)


def digests(streams: Sequence[ViewStream], epoch: int = EPOCH, start_step: int = START) -> list[Digest]:
    return [stream.digest(epoch, start_step) for stream in streams]


@pytest.mark.parametrize("order", [None, Blocks(block=4, window=3), Shards(12)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_that_share_out_an_epoch_agree(world_size, order):
    """And any number of them agrees with a single one: `common` and `whole` are of the order, whoever reads it."""
    ranks = [rank(number, world_size, order=order) for number in range(world_size)]
    one = rank(0, 1, order=order)
    for start in range(one.steps_per_epoch + 1):
        found, (alone,) = digests(ranks, start_step=start), digests([one], start_step=start)
        assert disagreement(found) is None
        assert {(d.common, d.whole) for d in found} == {(alone.common, alone.own)}
        for stream, digest in zip(ranks, found, strict=True):
            assert all(0 <= value < 2**63 for value in (digest.common, digest.own, digest.whole))
            seen = [int(i) for batch in stream.sampler.epoch(EPOCH, start) for i in batch]
            entries = mix64(TABLES["index"][seen].astype(np.uint64)).tolist()
            assert digest.own == sum(entries) % 2**63  # of what the rank is fed with
    assert (found[0].own, found[0].whole) == (0, 0)  # nothing is left at the end


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"num_images": 100},
        {"batch_size": 12},
        {"accumulate": 2},
        {"order": Blocks(block=4, window=3)},
        {"tables": TABLES | {"labels": (np.arange(101) + 1) % 3}},
        {"tables": TABLES | {"index": 5 * np.arange(101)[::-1]}},
        {"tables": TABLES | {"classes": ("a", "b", "d")}},
    ],
    ids=lambda other: next(iter(other.get("tables", other))),
)
def test_a_rank_that_reads_something_else_is_named(other):
    well = [rank(number, 3) for number in range(3)]
    for odd in range(3):
        streams = [rank(n, 3, **other) if n == odd else stream for n, stream in enumerate(well)]
        rest = " and ".join(str(n) for n in range(3) if n != odd)
        assert disagreement(digests(streams)) == (
            f"rank {odd} reads other data than ranks {rest}, or has another seed, batch size or step to start from: "
            "give every process the same files and the same config"
        )


def test_a_rank_that_is_elsewhere_in_the_run_is_named():
    first, second = (rank(number, 2) for number in range(2))
    for elsewhere in (second.digest(EPOCH + 1, START), second.digest(EPOCH, START + 1)):
        problem = disagreement([first.digest(EPOCH, START), elsewhere]) or ""
        assert problem.startswith("rank 1 reads other data than rank 0, or has another seed, batch size or step to ")


def test_the_fingerprint_is_of_the_data_alone():
    prints = {rank(0, 1).fingerprint, rank(1, 2, seed=9, batch_size=4).fingerprint}
    assert len(prints) == 1
    for changed in ({"labels": TABLES["labels"][::-1]}, {"index": np.arange(101)}, {"classes": ("a", "b")}):
        assert rank(0, 1, tables=TABLES | changed).fingerprint not in prints


def test_the_fingerprint_never_changes():
    """Checkpoints hold it. The type of an array is no part of it."""
    assert rank(0, 1).fingerprint == 5469579342251201384
    narrow = TABLES | {"labels": TABLES["labels"].astype(np.int32)}
    assert rank(0, 1, tables=narrow).fingerprint == rank(0, 1).fingerprint


def test_a_hash_tells_apart_what_reads_the_same_when_joined():
    parts = [
        ("ab",),
        ("a", "b"),
        ("b", "a"),
        (12,),
        (1, 2),
        ("12",),
        (np.array([1, 2]),),
        (np.array([1]), np.array([2])),
    ]
    assert len({hashed(*some) for some in parts}) == len(parts)


@pytest.mark.parametrize(
    ("taken", "names"),
    [
        ([(0, 4), (0, 4), (2, 4), (3, 4)], "ranks 0 and 1 see the same images"),
        ([(0, 1)] * 4, "ranks 0, 1, 2 and 3 see the same images"),  # each believes that it is alone
        ([(0, 2), (1, 2), (0, 2), (1, 2)], "ranks 0 and 2 see the same images"),
        ([(0, 3), (1, 3)], "the ranks do not share out the images"),  # a third part is missing
        ([(0, 2), (1, 2), (2, 3)], "the ranks do not share out the images"),  # a third of the images comes twice
    ],
)
def test_ranks_that_see_images_twice_or_not_at_all_are_told(taken, names):
    problem = disagreement(digests([rank(number, world_size) for number, world_size in taken]))
    assert problem == (
        f"{names}, and each image must come once: every process needs a rank of its own and the number of all ranks"
    )


def test_a_single_image_that_two_ranks_swap_for_another_is_noticed():
    """Each has as many as it should."""
    found = digests([rank(number, 4) for number in range(4)])
    entries = mix64(TABLES["index"].astype(np.uint64)).tolist()
    seen = next(rank(2, 4).sampler.epoch(EPOCH, START))
    twice = replace(found[2], own=(found[2].own - entries[seen[0]] + entries[seen[1]]) % 2**63)
    assert disagreement([*found[:2], twice, found[3]]) is not None


def test_of_ranks_that_are_all_different_the_first_is_taken_for_the_others_measure():
    assert (disagreement([Digest(n, 0, 0) for n in range(3)]) or "").startswith(
        "ranks 1 and 2 read other data than rank 0,"
    )
    many = [Digest(int(n == 11), 0, 0) for n in range(64)]
    assert (disagreement(many) or "").startswith(
        "rank 11 reads other data than ranks 0, 1, 2, 3, 4, 5, 6, 7 and 55 more,"
    )


def test_a_run_over_a_real_source_agrees_too(tmp_path):
    ranks = [
        build_loaders(config(tmp_path), device=CPU, rank=number, world_size=2).train.digest(0) for number in range(2)
    ]
    assert disagreement(ranks) is None and ranks[0].own != ranks[1].own
