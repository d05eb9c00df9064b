"""Two gloo processes against one: who sees which image, and what comes out."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

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


def test_gathered_rows_come_in_rank_order_and_carry_no_gradient(two: list[dict]) -> None:
    for rank in two:
        assert rank["gathered"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, *range(100, 108)]
        assert not rank["gathered"].requires_grad


def test_a_mean_over_the_ranks_hands_back_the_mean_of_their_gradients(one: dict, two: list[dict]) -> None:
    """So that the mean over the ranks of the gradients is that of the mean of their losses."""
    assert one["mean"]["mean"].tolist() == [0, 1, 2] and one["mean"]["gradient"].tolist() == [1, 2, 3]
    for rank in two:
        assert rank["mean"]["mean"].tolist() == [5, 6, 7]
        assert rank["mean"]["gradient"].tolist() == [1.5, 3, 4.5]  # of weights once and twice [1, 2, 3]


# --- batch norm: each policy against plain layers, each of which sees one group of images ----------------------------


def companies(policy: str, ranks: int) -> list[list[tuple[int, int]]]:
    """The (rank, image) pairs that the policy normalises together."""
    images = [[(rank, image) for image in range(8)] for rank in range(ranks)]
    match policy:
        case "local" | "shuffle":
            return images
        case "sync":
            return [sum(images, [])]
        case "split":
            return [rank[first : first + 2] for rank in images for first in range(0, 8, 2)]
    raise AssertionError(policy)


def teacher_companies(policy: str, ranks: int) -> list[list[tuple[int, int]]]:
    match policy:
        case "shuffle":
            share = 8 // ranks
            return [
                [(rank, image) for rank in range(ranks) for image in range(share * part, share * (part + 1))]
                for part in range(ranks)
            ]
        case "split":  # of 4 groups of 2: the first images of the groups, then their second ones, cut anew
            dealt = [[(rank, 2 * group + place) for place in range(2) for group in range(4)] for rank in range(ranks)]
            return [rank[first : first + 2] for rank in dealt for first in range(0, 8, 2)]
    return companies(policy, ranks)


@pytest.mark.parametrize("policy", ["local", "sync", "split", "shuffle"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_policy_normalises_its_companies_as_plain_layers_would(
    policy: str, ranks: int, one: dict, two: list[dict]
) -> None:
    found = [rank["policies"][policy] for rank in ([one], two)[ranks - 1]]
    statistics: dict[int, list[nn.BatchNorm2d]] = {rank: [] for rank in range(ranks)}
    affine = {rank: torch.zeros(2, 3, dtype=torch.float64) for rank in range(ranks)}
    for company in companies(policy, ranks):
        layer = nn.BatchNorm2d(3).double()
        layer.load_state_dict({"weight": torch.tensor([0.5, 1, 2]), "bias": torch.tensor([-1.0, 0, 3])}, strict=False)
        images, coefficients = (
            torch.stack([found[r][key][i] for r, i in company]) for key in ("images", "coefficients")
        )
        out = layer(images.requires_grad_())
        (out * coefficients).sum().backward()
        for row, (rank, image) in enumerate(company):
            torch.testing.assert_close(found[rank]["out"][image], out[row].detach())
            torch.testing.assert_close(found[rank]["gradient"][image], images.grad[row])
        for rank in {rank for rank, _ in company}:
            statistics[rank].append(layer)
            affine[rank] += torch.stack([layer.weight.grad, layer.bias.grad])
    for rank, layers in statistics.items():
        mean, variance = (torch.stack([getattr(x, f"running_{w}") for x in layers]).mean(0) for w in ("mean", "var"))
        torch.testing.assert_close(found[rank]["mean"], mean)
        torch.testing.assert_close(found[rank]["variance"], variance)
    gradients = [torch.stack([rank["weight gradient"], rank["bias gradient"]]) for rank in found]
    if policy == "sync":  # each rank holds the part of its own images
        gradients = [torch.stack(gradients).sum(0)] * ranks
    for rank in range(ranks):
        torch.testing.assert_close(gradients[rank], affine[rank])


@pytest.mark.parametrize("policy", ["local", "sync", "split", "shuffle"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_teacher_normalises_the_images_that_were_dealt_out_and_gives_them_back_in_order(
    policy: str, ranks: int, one: dict, two: list[dict]
) -> None:
    found = [rank["policies"][policy] for rank in ([one], two)[ranks - 1]]
    statistics: list[list[nn.BatchNorm2d]] = [[] for _ in range(ranks)]
    dealt = teacher_companies(policy, ranks)
    for number, company in enumerate(dealt):
        layer = nn.BatchNorm2d(3).double()
        out = layer(torch.stack([found[rank]["images"][image] for rank, image in company])).detach()
        for row, (rank, image) in enumerate(company):
            torch.testing.assert_close(found[rank]["keys"][image], out[row])
        where = range(ranks) if policy == "sync" else [number * ranks // len(dealt)]
        for rank in where:
            statistics[rank].append(layer)
    for rank, layers in enumerate(statistics):
        mean, variance = (torch.stack([getattr(x, f"running_{w}") for x in layers]).mean(0) for w in ("mean", "var"))
        torch.testing.assert_close(found[rank]["teacher mean"], mean)
        torch.testing.assert_close(found[rank]["teacher variance"], variance)


def test_averaged_statistics_are_the_mean_over_the_ranks(two: list[dict]) -> None:
    ranks = [rank["policies"]["local"] for rank in two]
    for what in ("mean", "variance"):
        expected = (ranks[0][what] + ranks[1][what]) / 2
        assert not torch.equal(ranks[0][what], ranks[1][what])
        for rank in ranks:
            torch.testing.assert_close(rank[f"averaged {what}"], expected)


def test_the_settings_for_speed_train_on_two_processes(tiny: Path, tmp_path: Path) -> None:
    """The teacher's images dealt out, gradients in bf16, a step on held batches: the ranks stay one."""
    settings = ["encoder.batchnorm={name: shuffle}", "run.gradient_compression=bf16", "run.cuda_graphs=true"]
    ranks = run_script(tiny, tmp_path / "out", 2, *settings, "optim.epochs=1")
    for name, value in ranks[0]["student"].items():
        assert "running" in name or torch.equal(value, ranks[1]["student"][name]), name
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"]) and ranks[0]["queue"].isfinite().all()


def test_micro_batches_and_ranks_push_the_same_images_in_the_same_order(one: dict, tiny: Path, tmp_path: Path) -> None:
    """Two ranks of two micro-batches, under the split policy. Batch norm sees other groups, so only the order is
    compared."""
    policy = "encoder.batchnorm={name: split, groups: 2}"
    ranks = run_script(tiny, tmp_path / "out", 2, *OVERRIDES, "optim.accumulate=2", policy)
    steps = [torch.cat(parts) for parts in zip(*(rank["index"].split(8) for rank in ranks), strict=True)]
    assert torch.equal(torch.cat(steps), one["index"])
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"]) and ranks[0]["queue"].isfinite().all()
