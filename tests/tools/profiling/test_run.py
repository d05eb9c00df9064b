"""Profiles of tiny runs, end to end, and runs in which one part was made slow on purpose."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from ressl.config_file import ConfigError, load_config
from tools.profiling.opened import open_run, places
from tools.profiling.record import Profile, read_profile
from tools.profiling.run import TRACE, profile

STEP = {"views", "teacher", "student", "loss", "backward", "optimizer", "ema", "queue"}


def measure(config: Path, *overrides: str, out: Path, console: Console | None = None, **options) -> Profile:
    given = {"processes": 0, "gpus": 0, "seconds": 3.0, "trace": False, **options}
    cfg = load_config(config, overrides)
    return profile(cfg, console or Console(quiet=True), title="tiny", command="profile tiny.yaml", out=out, **given)


@pytest.fixture(scope="module", autouse=True)
def _on_one_thread() -> Iterator[None]:
    """Threads that wait for each other on cores that others use take a hundred times as long, now and then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(write_tiny_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile") / "of folder"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("said") / "lines"


@pytest.fixture(scope="module")
def folder(tiny: Path, tiny_data: Path, out: Path, said: Path) -> Profile:
    """Of image files, with micro-batches."""
    source = f"data.source={{name: folder, train: {tiny_data}/folder/train, val: {tiny_data}/folder/val, workers: 1}}"
    with said.open("w") as file:
        return measure(tiny, source, "optim.accumulate=2", out=out, trace=True, console=Console(file=file, width=200))


def test_it_measures_each_stage_and_whole_steps(folder: Profile) -> None:
    assert [stage.name for stage in folder.stages] == [
        "read", "decode", "views", "teacher", "student", "loss", "backward", "optimizer", "ema", "queue",
    ]  # fmt: skip
    rounds = {len(stage.seconds) for stage in folder.stages} | {len(folder.runs.real), len(folder.runs.wait)}
    assert len(rounds) == 1 and min(s for stage in folder.stages for s in stage.seconds) > 0
    assert folder.images == 16 and folder.world_size == 1 and folder.device == "cpu" and folder.total_steps == 8
    assert folder.predicted_hours == pytest.approx(8 * median(folder.runs.real) / 3600)
    assert all(0 <= wait < real for wait, real in zip(folder.runs.wait, folder.runs.real, strict=True))


def test_the_parts_of_a_step_sum_up_to_about_the_step(folder: Profile) -> None:
    parts = sum(min(stage.seconds) for stage in folder.stages if stage.lane == "device")
    assert 0.6 < parts / min(folder.runs.synthetic) < 1.5


def test_it_knows_what_the_parts_need(folder: Profile) -> None:
    stages = {stage.name: stage for stage in folder.stages}
    assert stages["student"].flops == stages["teacher"].flops > 16 * 2 * 3 * 4 * 9 * 16 * 16  # the first layer's alone
    assert 1.5 < stages["backward"].flops / stages["student"].flops < 2.5
    assert stages["loss"].flops == 2 * 2 * 16 * 40 * 16 and stages["loss"].bytes == 40 * 16 * 4
    assert stages["optimizer"].bytes / stages["ema"].bytes == pytest.approx(20 / 12)
    assert stages["backward"].bytes == 2 * stages["student"].bytes == 2 * stages["teacher"].bytes
    assert 16 * 100 < stages["read"].bytes < 16 * 2000  # PNG files of 16 x 16 pixels
    assert folder.ceilings.matmul_flops > 1e8 and folder.ceilings.copy_bytes > 1e7
    assert folder.memory_peak > 1e7


def test_threads_and_processes_are_counted(folder: Profile) -> None:
    counts = [point.count for point in folder.loader_scaling]
    assert counts and counts == sorted(set(counts)) and all(p.images_per_s for p in folder.loader_scaling)
    assert folder.machine["threads"] == 1 and folder.others is not None and 0 <= folder.others < 1
    (itself,) = folder.scaling
    assert itself.count == 1 and itself.images_per_s[0] == pytest.approx(16 / folder.runs.real[0])


def test_the_timeline_is_one_step(folder: Profile) -> None:
    device = [span for span in folder.timeline if span.lane == "device"]
    assert {"views", "student", "teacher", "backward"} <= {span.name for span in device} <= STEP | {"wait"}
    assert [span.name for span in device].count("backward") == 2  # micro-batches
    for lane in ("device", "loader"):
        spans = [span for span in folder.timeline if span.lane == lane]
        assert all(span.start < span.end for span in spans)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    assert 0.5 * device[-1].end < sum(span.end - span.start for span in device) <= device[-1].end * 1.001


def test_it_writes_a_trace_on_request_and_nothing_else(folder: Profile, out: Path, tiny: Path) -> None:
    assert [path.name for path in out.iterdir()] == [TRACE]
    assert '"traceEvents"' in (out / TRACE).read_text()
    assert not (tiny.parent / "run").exists()


def test_it_tells_what_it_is_at(folder: Profile, said: Path) -> None:
    lines = said.read_text().splitlines()
    assert any("round by round, about" in line and line.endswith("s left") for line in lines)
    assert "the set is small" in folder.notes[-1] and not any(note in line for note in folder.notes for line in lines)
    assert any("of the bytes that were read lay in memory" in note for note in folder.notes)  # they were just written


def test_a_profile_comes_back_from_its_file(folder: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(folder.model_dump_json())
    assert read_profile(path) == folder


def test_two_processes_are_measured_and_one_beside_them(tiny: Path, tmp_path: Path) -> None:
    found = measure(tiny, "encoder.batchnorm={name: shuffle}", out=tmp_path, processes=2, seconds=0.5)
    assert found.world_size == 2 and found.images == 8 and [point.count for point in found.scaling] == [1, 2]
    stages = {stage.name: stage for stage in found.stages}
    assert stages["all-reduce"].bytes == stages["ema"].bytes / 3 and stages["decode"].note.startswith("gathering")
    assert "gathering of the embeddings" in stages["queue"].note and len(found.scaling[0].images_per_s) >= 3
    assert "all-reduce" in {span.name for span in found.timeline}
    assert found.loader_scaling == () and "read" not in stages


def test_where_there_is_no_time_one_round_is_taken_and_said(tiny: Path, tmp_path: Path) -> None:
    found = measure(tiny, "views.progressive={start: 0.5, until: 1, multiple: 8}", out=tmp_path, seconds=0.01)
    assert len(found.runs.real) == 1 and all(len(stage.seconds) == 1 for stage in found.stages)
    assert any("there was time for only one round" in note for note in found.notes)
    assert any("at their full size" in note for note in found.notes)


def test_a_mistake_in_the_data_is_told_as_pretrain_tells_it(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such"):
        measure(tiny, f"data.source={{name: folder, train: {tmp_path}/nowhere}}", out=tmp_path)
    with pytest.raises(DataError, match="does not split over 3 processes"):
        measure(tiny, out=tmp_path, processes=3)


def test_a_directory_that_cannot_be_written_to_is_told_before_anything_is_measured(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataError, match="--out .*file: the directory cannot be made"):
        measure(tiny, out=tmp_path / "file", trace=True, console=console)
    with pytest.raises(DataError, match="--out /proc/self: .*choose another"):
        measure(tiny, out=Path("/proc/self"), console=console)
    assert console.file.getvalue() == ""


def test_under_a_launcher_it_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match="without torchrun"):
        measure(tiny, out=tmp_path / "profile")
    assert not (tmp_path / "profile").exists()


def test_feeds_go_through_the_images_before_any_comes_again(tiny: Path) -> None:
    run = open_run(load_config(tiny), Console(quiet=True))  # 4 steps an epoch
    taken = [np.concatenate(list(places(run, steps))).tolist() for steps in (1, 2, 3, 2)]
    first, second = sum(taken[:2], []) + taken[2][:16], taken[2][16:] + taken[3]
    assert len(set(first)) == len(set(second)) == 64 and first != second


# --- one part slow on purpose ----------------------------------------------------------------------------------------

SMALL = ["encoder={name: resnet_small, width: 1}", "method.hidden_dim=8", "method.embed_dim=8", "optim.batch_size=8"]


def test_slow_decoding_is_named(tiny: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3)).astype(np.uint8)
    for number in range(8):
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg", quality=95)
    source = f"data.source={{name: folder, train: {tmp_path}, workers: 1, max_side: 16}}"
    found = measure(tiny, *SMALL, source, out=tmp_path)
    assert found.verdict.binding == "decode"
    assert median(found.runs.wait) > 0.5 * median(found.runs.real)
    assert any(advice.line.startswith("'data.source={name: resident") for advice in found.verdict.advice)


def test_slow_views_are_named(tiny: Path, tmp_path: Path) -> None:
    view = "{size: 64, jitter_prob: 1.0, blur_prob: 1.0, randaugment: [4, 10]}"
    found = measure(tiny, *SMALL, f"views.strong=[{', '.join([view] * 4)}]", out=tmp_path)
    assert found.verdict.binding == "views"


def test_a_slow_step_is_named(tiny: Path, tmp_path: Path) -> None:
    found = measure(tiny, "encoder={name: resnet_small, width: 64}", "optim.batch_size=32", out=tmp_path)
    assert found.verdict.binding == "step" and "its largest part is" in found.verdict.sentence


@pytest.mark.gpu
def test_on_a_gpu_it_knows_copies_and_launches(tiny: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = f"data.source={{name: folder, train: {tiny_data}/folder/train}}"
    found = measure(tiny, source, "run.device=auto", "run.precision=bf16", out=tmp_path, trace=True, seconds=20.0)
    assert found.device == "cuda" and "copy" in {stage.name for stage in found.stages}
    assert found.runs.busy is not None and 0 < found.runs.busy < 1.2 * median(found.runs.synthetic)
    assert len(found.runs.launch) == len(found.runs.real) and (tmp_path / TRACE).exists()
    assert found.ceilings.host_to_device_bytes is not None and found.ceilings.host_to_device_bytes > 1e8
