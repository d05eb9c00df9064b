"""Two gloo processes against one: who sees which image, and what comes out."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "ranks_script.py"
LAUNCH = "from tools.processes import run_processes; import sys; run_processes(sys.argv[2:], int(sys.argv[1]))"
# sync: the only policy under which one process and two compute the same; 72 images leave 8 out of each epoch
OVERRIDES = ["encoder.batchnorm={name: sync}", "optim.epochs=2", "optim.lr=0.01"]


def run_script(config: Path, out: Path, processes: int, *overrides: str) -> list[dict]:
    out.mkdir()
    command = [str(SCRIPT), str(config), str(out), *overrides]
    prefix = [sys.executable, "-c", LAUNCH, str(processes)] if processes > 1 else [sys.executable]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    subprocess.run([*prefix, *command], check=True, timeout=240, env=environment)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def tiny(write_tiny_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_script(tiny, tmp_path_factory.mktemp("ranks") / "two", 2, *OVERRIDES)


@pytest.fixture(scope="module")
def one(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_script(tiny, tmp_path_factory.mktemp("ranks") / "one", 1, *OVERRIDES)[0]


def test_two_processes_found_each_other(one: dict, two: list[dict]) -> None:
    assert [rank["world_size"] for rank in two] == [2, 2] and one["world_size"] == 1


def test_over_an_epoch_no_image_comes_twice_and_the_remainder_is_left_out(two: list[dict]) -> None:
    for epoch in range(2):
        seen = torch.cat([rank["index"][32 * epoch : 32 * (epoch + 1)] for rank in two])
        assert len(seen) == len(seen.unique()) == 64  # of 72 images, in batches of 16


def test_together_the_ranks_see_the_order_of_one_process(one: dict, two: list[dict]) -> None:
    steps = [torch.cat(parts) for parts in zip(*(rank["index"].split(8) for rank in two), strict=True)]
    assert torch.equal(torch.cat(steps), one["index"])


def test_the_same_image_gets_the_same_views(one: dict, two: list[dict]) -> None:
    for epoch in range(2):
        rows = {int(index): row for row, index in enumerate(one["index"].tolist()) if row // 64 == epoch}
        for rank in two:
            part = slice(32 * epoch, 32 * (epoch + 1))
            same = [rows[index] for index in rank["index"][part].tolist()]
            for view in ("weak", "strong"):
                torch.testing.assert_close(rank[view][part], one[view][same], rtol=0, atol=1e-5)


def test_the_queue_is_the_same_on_both_ranks_and_on_one_process(one: dict, two: list[dict]) -> None:
    assert torch.equal(two[0]["queue"], two[1]["queue"]) and torch.equal(two[0]["cursor"], two[1]["cursor"])
    assert torch.equal(two[0]["cursor"], one["cursor"]) and int(one["cursor"]) == 2 * 64 % 40
    torch.testing.assert_close(two[0]["queue"], one["queue"], rtol=0, atol=2e-5)


def test_both_ranks_hold_the_same_weights_and_so_does_one_process(one: dict, two: list[dict]) -> None:
    for name, value in one["student"].items():
        assert torch.equal(two[0]["student"][name], two[1]["student"][name]), name
        if "tracked" not in name:
            torch.testing.assert_close(two[0]["student"][name], value, rtol=0, atol=2e-5)


def test_an_exchange_deals_rows_to_the_other_rank_and_twice_gives_them_back(two: list[dict]) -> None:
    first = torch.tensor([0.0, 1, 2, 3, 100, 101, 102, 103])
    second = torch.tensor([4.0, 5, 6, 7, 104, 105, 106, 107])
    for rank, expected in zip(two, (first, second), strict=True):
        assert torch.equal(rank["exchanged"].flatten(), expected)
        assert torch.equal(rank["images"], expected.view(-1, 1, 1, 1).expand(-1, 3, 2, 2))


def test_rows_of_unequal_number_are_gathered_in_rank_order(two: list[dict]) -> None:
    for rank in two:
        assert rank["ragged"].tolist() == [[0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("policy", ["{name: shuffle}", "{name: split, groups: 2}"])
def test_every_batch_norm_policy_trains_on_two_processes(policy: str, tiny: Path, tmp_path: Path) -> None:
    ranks = run_script(tiny, tmp_path / "out", 2, f"encoder.batchnorm={policy}", "optim.epochs=1")
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"]) and ranks[0]["queue"].isfinite().all()


def test_micro_batches_and_ranks_push_the_same_images_in_the_same_order(one: dict, tiny: Path, tmp_path: Path) -> None:
    """Two ranks of two micro-batches. Sync batch norm sees other groups, so only the order is compared."""
    ranks = run_script(tiny, tmp_path / "out", 2, *OVERRIDES, "optim.accumulate=2")
    steps = [torch.cat(parts) for parts in zip(*(rank["index"].split(8) for rank in ranks), strict=True)]
    assert torch.equal(torch.cat(steps), one["index"])
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"])
