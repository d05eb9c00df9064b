"""The collapse watch against its definitions, at its extremes, and on runs that go well and runs that do not."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from pipelines import build_loaders
from ressl.collapse import (
    collapse_measures,
    collapse_warning,
    covariance_of,
    embedding_std,
    newest_rows,
    relation_entropy,
)
from ressl.config_file import load_config
from ressl.queue import FeatureQueue
from ressl.runtime import Runtime
from ressl.step import build_step

TEMPERATURE = 0.04


def queue_of(keys: torch.Tensor, cursor: int = 0, dtype: torch.dtype = torch.float32) -> FeatureQueue:
    queue = FeatureQueue(*keys.shape, dtype=dtype)
    queue.keys.copy_(keys)
    queue.cursor.fill_(cursor)
    return queue


def drawn(count: int, dim: int, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Unit rows; those with a shift have much in common."""
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] += shift
    return F.normalize(rows, dim=1)


def measured(queue: FeatureQueue, rows: int = 1024, temperature: float = TEMPERATURE) -> dict[str, float]:
    measures = collapse_measures(queue, teacher_temperature=temperature, rows=rows)
    assert all(value.shape == () and value.dtype == torch.float32 for value in measures.values())
    return {name: float(value) for name, value in measures.items()}


def literal(queue: FeatureQueue, rows: int, temperature: float) -> dict[str, float]:
    """In float64, image by image, from the ring as a list from the newest to the oldest."""
    keys, cursor, size = queue.keys.double().numpy(), int(queue.cursor), len(queue.keys)
    places = [(cursor - 1 - age) % size for age in range(min(rows, size))]
    z = keys[places]
    share = np.linalg.svd(z - z.mean(axis=0), compute_uv=False) ** 2
    share = share[share > 1e-12 * share.sum()] / share.sum()
    entropies = []
    for place in places[:64]:
        similarity = np.delete(keys @ keys[place], place) / temperature
        relation = np.exp(similarity - similarity.max())
        relation /= relation.sum()
        entropies.append(-sum(p * math.log(p) for p in relation if p > 0))
    return {
        "embedding_std": z.std(axis=0).mean() * math.sqrt(z.shape[1]),
        "effective_rank": math.exp(-(share * np.log(share)).sum()),
        "relation_entropy": float(np.mean(entropies)) / math.log(size - 1),
    }


# --- the definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 5.0, 50.0])
@pytest.mark.parametrize(("size", "dim", "rows", "cursor"), [
    (300, 24, 100, 0), (300, 24, 100, 37), (300, 24, 100, 100), (40, 16, 1024, 7), (50, 64, 10, 3), (3, 2, 2, 1),
])  # fmt: skip
def test_measures_are_those_of_the_definitions(size: int, dim: int, rows: int, cursor: int, shift: float) -> None:
    """Rows that do not reach the ring's end, that go round it, that end at it; more than it has; fewer than 64."""
    queue = queue_of(drawn(size, dim, shift=shift), cursor)
    for temperature in (TEMPERATURE, 0.5):
        assert measured(queue, rows, temperature) == pytest.approx(
            literal(queue, rows, temperature), rel=2e-4, abs=1e-6
        )


@pytest.mark.parametrize("pushed", [3, 20, 31, 70])
def test_only_the_newest_embeddings_count_for_spread_and_rank(pushed: int) -> None:
    """Older ones are one point, newer ones are not; the cursor goes round."""
    queue = queue_of(drawn(1, 16).expand(50, 16), cursor=30)
    keys = drawn(pushed, 16, seed=1)
    queue.push(keys)
    alone = queue_of(keys[-50:])
    for name in ("embedding_std", "effective_rank"):
        assert measured(queue, rows=pushed)[name] == pytest.approx(measured(alone)[name], rel=1e-5)
    assert measured(queue, rows=50)["embedding_std"] <= measured(queue, rows=pushed)["embedding_std"] + 1e-6


def test_the_newest_rows_come_in_the_order_of_their_age() -> None:
    queue = FeatureQueue(5, 2)
    queue.push(drawn(7, 2))
    assert newest_rows(queue, 3).tolist() == [1, 0, 4]
    assert newest_rows(queue, 9).tolist() == [1, 0, 4, 3, 2]


def test_a_bfloat16_queue_is_measured_in_float32() -> None:
    keys = drawn(300, 24, shift=5.0).bfloat16()
    rounded = queue_of(keys, 10, dtype=torch.bfloat16)
    assert measured(rounded, 100) == measured(queue_of(keys.float(), 10), 100)
    assert measured(rounded, 100) == pytest.approx(literal(queue_of(keys.float(), 10), 100, TEMPERATURE), rel=2e-4)


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_point_has_no_spread_one_direction_and_relations_to_all_alike(dtype: torch.dtype) -> None:
    found = measured(queue_of(drawn(1, 32).expand(200, 32), 5, dtype))
    assert found == pytest.approx({"embedding_std": 0, "effective_rank": 1, "relation_entropy": 1}, abs=1e-5)


@pytest.mark.parametrize("opposite", [True, False])
def test_two_points_lie_on_a_line_and_each_is_related_to_its_half(opposite: bool) -> None:
    first, other = torch.eye(32)[:2]
    keys = torch.stack([first, -first if opposite else other]).repeat(101, 1)
    found = measured(queue_of(keys, 5))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert found["relation_entropy"] == pytest.approx(math.log(100) / math.log(201), abs=1e-5)
    # all spread is in one dimension of 32, or in two
    assert found["embedding_std"] == pytest.approx((1 if opposite else 2 * 0.5) / math.sqrt(32), abs=1e-5)


def test_evenly_spread_points_use_every_direction() -> None:
    found = measured(queue_of(torch.cat([torch.eye(32), -torch.eye(32)]).repeat(4, 1), 9))
    assert found["embedding_std"] == pytest.approx(1, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(32, rel=1e-4)


def test_where_one_other_image_alone_matters_relations_have_no_entropy() -> None:
    pairs = queue_of(torch.eye(32).repeat(2, 1))
    assert measured(pairs, temperature=0.01)["relation_entropy"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_queues_have_measures_too(size: int) -> None:
    found = measured(queue_of(drawn(size, 4)))
    assert found["relation_entropy"] == 0 and all(math.isfinite(value) for value in found.values())


def test_what_is_not_finite_is_measured_as_such_and_not_warned_of() -> None:
    keys = drawn(50, 8)
    keys[3, 2] = math.nan
    found = measured(queue_of(keys))
    assert all(math.isnan(value) for value in found.values())
    assert collapse_warning(found, 8) is None


# --- the host waits for nothing --------------------------------------------------------------------------------------


def test_the_host_reads_neither_the_cursor_nor_the_embeddings() -> None:
    """A fake tensor has no values: whoever asks for one is refused."""
    with FakeTensorMode():
        queue = FeatureQueue(50, 8)
        queue.push(torch.randn(7, 8))
        assert len(collapse_measures(queue, teacher_temperature=TEMPERATURE)) == 3
        with pytest.raises(DataDependentOutputException):
            int(queue.cursor)


@pytest.mark.gpu
def test_on_a_gpu_only_the_effective_rank_makes_the_host_wait() -> None:
    queue = FeatureQueue(300, 24).cuda()
    queue.push(drawn(70, 24).cuda())
    collapse_measures(queue, teacher_temperature=TEMPERATURE, rows=100)  # what is made once waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        newest = newest_rows(queue, 100)
        std = embedding_std(covariance_of(queue.keys[newest].float()))
        entropy = relation_entropy(queue.keys, newest[:64], temperature=TEMPERATURE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = measured(queue, 100)
    assert (float(std), float(entropy)) == (found["embedding_std"], found["relation_entropy"])
    assert found == pytest.approx(measured(queue.cpu(), 100), rel=1e-2)  # the products may be of tf32


# --- what is warned of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 128, 512])
@pytest.mark.parametrize("size", [40, 4096, 65536])
def test_random_embeddings_are_not_warned_of(size: int, dim: int) -> None:
    """The queue of a run that has just begun; the last temperature is far too high for any run."""
    queue = FeatureQueue(size, dim)
    for temperature in (0.02, TEMPERATURE, 0.1, 0.5):
        assert collapse_warning(measured(queue, temperature=temperature), dim) is None


def test_a_warning_names_the_measure_and_its_value() -> None:
    one_point = {"embedding_std": 0.0071, "effective_rank": 3.06, "relation_entropy": 0.99999}
    warning = collapse_warning(one_point, 16) or ""
    assert warning.startswith("training has collapsed: embedding_std is 0.0071 (1: spread evenly, 0: one point), ")
    assert "effective_rank 3.1 of 16" in warning and "\n" not in warning
    alike = {"embedding_std": 0.0353, "effective_rank": 1.6, "relation_entropy": 0.999986}
    warning = collapse_warning(alike, 16) or ""
    assert warning.startswith("training is about to collapse: relation_entropy is 0.999986 (1: ")
    assert "\n" not in warning
    assert collapse_warning({"embedding_std": 0.053, "effective_rank": 1.02, "relation_entropy": 0.9987}, 16) is None


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ([], None),
        (["method.queue_dtype=bfloat16"], None),
        (["optim.lr=5"], "embedding_std is 0.00"),
        (["method.teacher_temperature=0.09", "method.teacher_momentum=0", "optim.lr=0.5"], "embedding_std is 0.0"),
        (["method.teacher_temperature=1", "method.student_temperature=0.1"], "relation_entropy is 0.9999"),
    ],
)
def test_a_run_that_goes_well_is_never_warned_of_and_one_that_does_not_is(
    tiny_config: Path, one_thread: None, overrides: list[str], warned: str | None
) -> None:
    """40 steps: a run that goes well is at its narrowest at the 28th."""
    cfg = load_config(tiny_config, ["optim.epochs=10", *overrides])
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    loader, take_step = build_loaders(cfg, device=runtime.device).train, build_step(cfg, runtime)
    take_step.method.train()
    warnings = []
    for epoch in range(cfg.optim.epochs):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps_per_epoch):
            take_step(batches, lr=cfg.optim.lr, momentum=cfg.method.teacher_momentum)
            found = measured(take_step.method.queue, temperature=cfg.method.teacher_temperature)
            warnings.append(collapse_warning(found, cfg.method.embed_dim))
    if warned is None:
        assert warnings == [None] * 40
    else:
        assert warned in (warnings[-1] or "")
        assert warnings[0] is None
