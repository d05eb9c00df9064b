import gc
import json
from pathlib import Path

import pytest
import torch

from ressl.config import Config
from ressl.config_file import load_config
from ressl.method import ReSSL
from ressl.runtime import Runtime
from tools import bench_step
from tools.bench_step import ARMS, Floor, Unfit, bench_batch, floor_step, noise, plain_views, port, release, take_turn
from tools.bench_step_report import markdown, ratios, sheets
from tools.eager_port import EagerPort

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = "run.precision=bf16"


def read(path: Path, *overrides: str) -> tuple[Config, Runtime]:
    cfg = load_config(path, overrides)
    return cfg, Runtime(cfg.run)


def by_hand(device: str = "cuda", **milliseconds: list[float]) -> dict:
    """A record of one batch of 32 images, whose arms took so long in each round."""
    arms = {
        name.replace("_", "-"): {"seconds": [one / 1000 for one in found], "peak_bytes": 2 * 10**9}
        for name, found in milliseconds.items()
    }
    run = {"precision": "bf16", "compile": True, "cuda_graphs": False}
    return {
        "date": "2026-01-01", "machine": {"cpu": "a | b"},
        "config": {"name": "recipe", "set": [BF16], "all": {"run": run, "method": {"loss_impl": "auto"}}},
        "options": {
            "rounds": 2, "steps": 3, "device": device, "convolutions": "tf32", "cudnn_benchmark": False, "threads": 4,
        },
        "batches": [
            {"images": 32, "order": [], "others_share": 0.25, "arms": arms},
            {"images": 64, "order": [], "others_share": 0.0, "arms": {}},
        ],
        "left_out": {"batch 64": "out of memory"},
    }  # fmt: skip


# --- from end to end -------------------------------------------------------------------------------------------------


def test_it_times_all_arms_at_each_size_and_writes_tables(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The overrides may stand anywhere, and 40 rows of the queue take batches of 8 but not of 16."""
    reason = "their queue takes whole batches: 16 does not divide 40"
    options = ["--batches", "8,16", "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out")]
    assert bench_step.main([str(tiny_config), *options, BF16, "optim.accumulate=2"]) == 0
    assert f"port-fp32, batch 16: {reason}" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown(record)
    eight, sixteen = record["batches"]
    assert list(eight["arms"]) == list(ARMS) and list(sixteen["arms"]) == ["ours", "floor"]
    assert [sorted(order) for order in eight["order"]] == [sorted(ARMS)] * 2
    for arm in (*eight["arms"].values(), *sixteen["arms"].values()):
        assert len(arm["seconds"]) == 2 and min(arm["seconds"]) > 0 and arm["peak_bytes"] is None
    assert record["left_out"] == {f"port-{name}, batch 16": reason for name in ("amp", "fp32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--steps", "-1"], "--steps -1: expected at least 1"),
        (["--batches", "8,x"], "--batches 8,x: expected numbers of images, as in 32,256"),
        (["--batches", ""], "expected numbers of images"),
        (["--batches", f"{10**11}"], f"nothing could be timed: batch {10**11}: out of memory"),
        (["--out", "/dev/null/there"], "--out /dev/null/there: the directory cannot be made"),
        (["optim.lr=x"], "optim.lr: expected a valid number"),
        (["encoder.batchnorm={name: split, groups: 3}"], "8 images do not split into encoder.batchnorm.groups=3"),
    ],
)
def test_a_mistake_ends_in_one_message(
    options: list[str], message: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = bench_step.main([str(tiny_config), "--batches", "8", "--out", str(tmp_path / "out"), *options])
    assert code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_ranks_of_a_launcher_are_refused(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert bench_step.main([str(tiny_config)]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_without_a_config_there_is_one_for_the_device(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    for config, overrides, batches in bench_step.DEFAULTS.values():
        cfg = load_config(Path(config), overrides)
        assert all(cfg.method.queue_size % images == 0 for images in batches)
    arguments = bench_step.parse(["--batches", "8", "optim.accumulate=4", "--out", str(repo)])
    cfg = bench_step.check(arguments)
    assert arguments.overrides[-1] == "optim.accumulate=4" and arguments.batches == [8]
    assert cfg.optim.accumulate == 1


# --- what is timed ---------------------------------------------------------------------------------------------------


def test_the_floor_trains_the_student_and_touches_nothing_else(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config)
    torch.manual_seed(0)
    step = floor_step(cfg, runtime)
    before = {name: value.clone() for name, value in step.method.state_dict().items()}
    assert not any("queue" in name for name in before)
    step(iter([noise(cfg, runtime.device, runtime.dtype, 8)]), lr=0.1, momentum=0.5)
    after = step.method.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    weights = {name for name, _ in step.method.named_parameters()}
    assert {name for name in weights if name.startswith("student")} <= changed
    assert not {name for name in weights if name.startswith("teacher")} & changed
    assert any(name.startswith("teacher") and name.endswith("running_mean") for name in changed)


def test_views_have_the_sizes_of_the_config_and_the_type_of_training(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config, "views.strong=[{size: 16}, {size: 12}]", BF16)
    batch = noise(cfg, runtime.device, runtime.dtype, 4)
    assert [tuple(view.shape) for view in (*batch.weak, *batch.strong)] == [
        (4, 3, 16, 16), (4, 3, 16, 16), (4, 3, 12, 12),
    ]  # fmt: skip
    for view in (*batch.weak, *batch.strong):
        assert view.dtype == torch.bfloat16 and view.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(batch.weak[0], batch.strong[0])


@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
def test_each_port_has_its_memory_format(autocast: torch.dtype | None, tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config)
    student = port(cfg, runtime, 8, autocast).student
    weights = [one for one in student.parameters() if one.ndim == 4 and one.shape[2] > 1]
    wanted = torch.channels_last if autocast else torch.contiguous_format
    assert weights and all(one.is_contiguous(memory_format=wanted) for one in weights)


def test_there_is_no_port_with_another_optimizer(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config, "optim={name: lars, epochs: 2, batch_size: 16, lr: 0.1, warmup_epochs: 0}")
    with pytest.raises(Unfit, match="optim.name=lars: the authors train with SGD"):
        port(cfg, runtime, 8, None)


def test_views_for_the_port_in_float32_are_the_same_but_contiguous(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config, BF16)
    batch = noise(cfg, runtime.device, runtime.dtype, 4)
    plain = plain_views(batch)
    for view, ours in zip((*plain.weak, *plain.strong), (*batch.weak, *batch.strong), strict=True):
        assert view.dtype == torch.float32 and view.is_contiguous() and torch.equal(view, ours.float())


def test_the_first_step_of_a_turn_is_not_counted() -> None:
    calls: list[int] = []
    arm = bench_step.Arm(lambda: calls.append(1), None, [])
    take_turn(arm, 3, torch.device("cpu"))
    assert len(calls) == 4 and len(arm.seconds) == 1


def test_without_autocast_there_is_no_port_of_it_and_nothing_stays_behind(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config)
    release()
    before = networks()
    left_out: dict[str, str] = {}
    found = bench_batch(cfg, runtime, 8, 1, 1, left_out, lambda text: None)
    assert list(found["arms"]) == ["ours", "floor", "port-fp32"]
    assert left_out == {"port-amp, batch 8": "run.precision=fp32 has no autocast"}
    release()
    assert networks() <= before


def networks() -> int:
    return sum(type(one) in (ReSSL, Floor, EagerPort) for one in gc.get_objects())


def test_what_memory_cannot_hold_is_said(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config)
    left_out: dict[str, str] = {}
    found = bench_batch(cfg, runtime, 10**11, 1, 1, left_out, lambda text: None)  # more than there are addresses
    assert found["arms"] == {} and left_out == {f"batch {10**11}": "out of memory"}


# --- tables ----------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round_and_held_against_the_goals() -> None:
    record = by_hand(ours=[10.0, 20.0], floor=[8.0, 19.0], port_amp=[20.0, 30.0], port_fp32=[40.0, 60.0])
    assert ratios(record["batches"][0], "ours", "floor") == pytest.approx([1.25, 20 / 19])
    costs, over, goals = sheets(record)
    assert costs.rows[0] == ("32", "ours", "15.0 (10.0 to 20.0)", "2,133", "2.00") and len(costs.rows) == 4
    assert over.rows == [("32", "1.15 (1.05 to 1.25)", "1.75 (1.50 to 2.00)", "3.50 (3.00 to 4.00)")]
    assert [row[1:] for row in goals.rows] == [
        ("15.1% (5.3% to 25.0%)", "at most 10%", "66%"),
        ("1.75 (1.50 to 2.00)", "at least 1.5", "117%, reached"),
    ]


def test_a_step_as_fast_as_the_floor_reaches_all_of_the_goal() -> None:
    record = by_hand(ours=[10.0], floor=[10.0])
    goals = sheets(record)[-1].rows
    assert goals[0][1:] == ("0.0% (0.0% to 0.0%)", "at most 10%", "all of it")
    assert goals[1][1:] == ("not measured in this run", "at least 1.5", "-")


def test_the_text_tells_only_of_what_was_run() -> None:
    text = markdown(by_hand("cpu", ours=[10.0, 20.0], floor=[8.0, 19.0]))
    assert "recipe, with run.precision=bf16: run.precision=bf16, run.compile=true, run.cuda_graphs=false" in text
    assert "2 rounds" in text and "up to 25% of the machine's CPU time" in text
    assert "Left out: batch 64: out of memory." in text and text.count("not measured on this device") == 2
    assert "- ours:" in text and "- the floor:" in text and "- port" not in text and "tf32" not in text
    on_gpu = markdown(by_hand("cuda", ours=[10.0], port_amp=[8.0]))
    assert "- port, AMP:" in on_gpu and "tf32" in on_gpu
    tables = [line for line in on_gpu.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5, 6}


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["false", "true"])
def test_on_a_gpu_every_arm_tells_its_memory(graphs: str, tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config, BF16, "run.device=cuda", f"run.cuda_graphs={graphs}")
    left_out: dict[str, str] = {}
    found = bench_batch(cfg, runtime, 8, 1, 2, left_out, lambda text: None)
    assert list(found["arms"]) == list(ARMS) and left_out == {}
    assert all(arm["peak_bytes"] > 0 and arm["seconds"][0] > 0 for arm in found["arms"].values())


@pytest.mark.gpu
def test_on_a_gpu_a_batch_that_does_not_fit_is_left_out(tiny_config: Path) -> None:
    cfg, runtime = read(tiny_config, "run.device=cuda")
    left_out: dict[str, str] = {}
    found = bench_batch(cfg, runtime, 10**9, 1, 1, left_out, lambda text: None)
    assert found["arms"] == {} and left_out == {f"batch {10**9}": "out of memory"}
