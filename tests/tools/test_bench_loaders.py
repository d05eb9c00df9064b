import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from ressl.config import FolderSource
from tools import bench_loaders
from tools.bench_data import converted, evenly, prepare
from tools.bench_device import decode_rates, measure_device, milliseconds, time_step, time_views
from tools.loader_arms import (
    Arm,
    ArmFailed,
    Job,
    Way,
    all_arms,
    build,
    read_cpu,
    recipe,
    start,
    stop,
    take_turn,
    turn,
)
from tools.loader_report import cpu_ms, markdown, notes, rates, sheets

ASKED = ("torchvision-2", "ours-resident-2")  # each is a process; others run here


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 JPEG files of 80 x 64 pixels in two classes, in train/."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(12):
        path = root / "train" / f"class{number % 2}" / f"{number:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = noise.integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(coarse).resize((80, 64)).save(path, "JPEG", quality=90)
    return root


@pytest.fixture(scope="module")
def results(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with what the benchmark wrote about them."""
    work = tmp_path_factory.mktemp("work")
    options = ["--rounds", "2", "--batch", "4", "--seconds", "0", "--workers", "1", "--arms", ",".join(ASKED)]
    options += ["--images-per-round", "12"]
    code = bench_loaders.main([str(photos), "--work", str(work / "work"), "--out", str(work / "out"), *options])
    assert code == 0
    return work / "out"


@pytest.fixture(scope="module")
def record(results: Path) -> dict:
    (path,) = results.glob("*.json")
    return json.loads(path.read_text())


def by_hand(**cpu_s: list[float]) -> dict:
    """A record whose arms `way__views` took so many CPU-seconds for 10 images and 2 s by the clock, in each round."""
    arms = {}
    for name, seconds in cpu_s.items():
        way, views = name.split("__")
        rounds = [{"images": 10, "epochs": 1, "wall_s": 2.0, "cpu_s": one} for one in seconds]
        kind = "torchvision" if way == "torchvision" else "frames"
        arms[name] = {"way": way, "label": f"by {way}", "kind": kind, "views": int(views), "rounds": rounds}
    return {
        "date": "2026-01-01", "machine": {"cpu": "a | b"}, "arms": arms, "order": [], "device": None,
        "others_share": 0.25,
        "options": {"rounds": 2, "batch": 5, "workers": 2, "seconds": 1.0, "device": "cpu"},
        "data": {"images": 10, "of": 20, "bytes": 1_000_000}, "left_out": {"other-2": "other is not installed"},
    }  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_arm_that_can_run_gives_images_and_costs_time(record: dict) -> None:
    assert set(record["arms"]) | set(record["left_out"]) == set(ASKED)
    assert all(reason.endswith("is not installed") for reason in record["left_out"].values()), record["left_out"]
    assert {"torchvision-2", "ours-resident-2"} <= set(record["arms"])
    for name, arm in record["arms"].items():
        assert len(arm["rounds"]) == 2, name
        assert all(value > 0 for value in cpu_ms(arm)) and all(value > 0 for value in rates(arm)), name
    assert [one["images"] for one in record["arms"]["ours-resident-2"]["rounds"]] == [12, 12]


@pytest.mark.slow
def test_each_round_has_every_arm_once(record: dict) -> None:
    assert [sorted(order) for order in record["order"]] == [sorted(record["arms"])] * 2


def test_the_order_changes_from_round_to_round_and_not_from_run_to_run() -> None:
    names = [arm.name for arm in all_arms()]
    orders = [bench_loaders.shuffled(names, number) for number in range(4)]
    assert len({tuple(order) for order in orders}) == 4 and all(sorted(order) == sorted(names) for order in orders)
    assert orders == [bench_loaders.shuffled(names, number) for number in range(4)]


# Each of two children burns CPU time; the first has ended when its turn is over, the other lives on.
TURNS = """
import subprocess, sys
from tools.loader_arms import take_turn, read_cpu

burn = "import time\\nwhile time.process_time() < 0.6: pass\\nprint(flush=True)\\n"
children, before = [], read_cpu()
for ending in ("", "time.sleep(60)"):
    def work(epoch):
        children.append(subprocess.Popen([sys.executable, "-c", burn + ending], stdout=subprocess.PIPE))
        children[-1].stdout.readline()
        if not ending:
            children[-1].wait()
        return 1
    done, before = take_turn(work, 0, 0.0, before)
    print(done.cpu_s)
children[1].kill()
"""


def test_cpu_time_counts_the_children_of_an_arm_that_ended_and_that_live(repo: Path) -> None:
    """In a session of its own, as an arm is."""
    command = [sys.executable, "-c", TURNS]
    done = subprocess.run(command, cwd=repo, start_new_session=True, capture_output=True, text=True, check=True)
    ended, alive = map(float, done.stdout.split())
    assert 0.6 <= ended < 1.6 and 0.6 <= alive < 1.6


def test_a_turn_pays_for_what_was_prepared_before_it() -> None:
    before = read_cpu()
    first = before.own
    while read_cpu().own < first + 0.2:
        pass
    done, after = take_turn(lambda epoch: 5, 0, 0.0, before)
    assert done.images == 5 and done.epochs == 1 and done.wall_s < 0.1
    assert done.cpu_s >= 0.2 and after.own >= before.own + 0.2


def test_a_turn_takes_whole_epochs_of_their_own_until_its_time_is_over() -> None:
    epochs: list[int] = []

    def work(epoch: int) -> int:
        epochs.append(epoch)
        torch.randn(100_000)
        return 3

    done, _ = take_turn(work, 7, 0.05, read_cpu())
    assert done.epochs > 1 and done.images == 3 * done.epochs and done.wall_s >= 0.05
    assert epochs == list(range(7, 7 + done.epochs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dali-cpu-2", "ours-dali-2", "ours-ffcv400-2", "ffcv-per-view-1", "ours-views-2"])
def test_an_arm_passes_all_images(name: str, photos: Path, tmp_path: Path) -> None:
    way = arm(name).way
    pytest.importorskip(way.needs or "torch")
    path = converted(prepare(photos, tmp_path / "work", 12), way.data, 1, Console(quiet=True))
    threads = torch.get_num_threads()
    try:
        images = build(arm(name), path, JOB)(1)
    finally:
        torch.set_num_threads(threads)  # importing ffcv leaves one
    assert images == (JOB.batch if way.kind == "views" else 12)


@pytest.mark.parametrize("kind", ["frames", "whole"])
def test_our_arms_pass_all_images_with_six_views(kind: Literal["frames", "whole"], photos: Path) -> None:
    six = Arm(Way("ours", "ours", kind, "files", "folder"), 6)
    assert build(six, photos / "train", JOB)(1) == 12
    views = recipe(FolderSource(name="folder", train=photos), views=six.views, batch=4).views
    assert [view.size for view in (views.weak, *views.strong)] == [224, 224, 192, 160, 128, 96]


def test_more_arms_than_memory_holds_are_refused() -> None:
    bench_loaders.check_memory(10, 8.0)
    with pytest.raises(DataError, match="10 arms need about 6 GB of memory, and 1.5 GB are free: name fewer"):
        bench_loaders.check_memory(10, 1.5)


# --- arms that fail --------------------------------------------------------------------------------------------------


def arm(name: str) -> Arm:
    return next(arm for arm in all_arms() if arm.name == name)


JOB = Job(batch=4, images=12, workers=1, device="cpu", seconds=0.0)


def test_an_arm_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match="nowhere: no such directory"):
        start(arm("ours-folder-2"), tmp_path / "nowhere", JOB, tmp_path / "log")


def test_an_arm_that_dies_is_noticed_and_its_process_is_gone(photos: Path, tmp_path: Path) -> None:
    running = start(arm("ours-folder-2"), photos / "train", JOB, tmp_path / "log")
    try:
        assert turn(running, 1).images == 12
        pid = running.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ArmFailed, match="ended"):
            turn(running, 2)
    finally:
        stop([running])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_arm_that_falls_silent_is_given_up(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match="no answer for 0 s"):
        start(arm("ours-folder-2"), photos / "train", JOB, tmp_path / "log", patience=0.01)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tables_say_what_the_json_says(record: dict, results: Path) -> None:
    (path,) = results.glob("*.md")
    text = path.read_text()
    assert text == markdown(record)
    for name, one in record["arms"].items():
        assert one["label"] in text or one["kind"] == "views", name
    assert record["machine"]["torch"] in text and "12 of 12 images" in text


def test_ratios_are_taken_within_a_round() -> None:
    record = by_hand(torchvision__2=[1.0, 4.0], ours__2=[0.1, 0.2], ours__6=[0.1, 0.3])
    two, six, growth = sheets(record)
    assert two.title == "2 views"
    assert two.rows[0] == (
        "by torchvision", "250 (100 to 400)", "1.00 (1.00 to 1.00)", "5.00 (5.00 to 5.00)",
    )  # fmt: skip
    assert two.rows[1] == ("by ours", "15.0 (10.0 to 20.0)", "15.0 (10.0 to 20.0)", "5.00 (5.00 to 5.00)")
    assert six.rows == [("by ours", "20.0 (10.0 to 30.0)", "-", "5.00 (5.00 to 5.00)")]  # no baseline of six views
    assert growth.rows == [("by ours", "1.25x (1.00 to 1.50)")]


def test_the_text_tells_only_of_what_was_run() -> None:
    words = "\n".join(notes(by_hand(ours__2=[1.0, 1.0])))
    assert "10 of 20 images, 100 KB each" in words and "2 rounds" in words and "25% of its CPU time" in words
    assert "other-2: other is not installed" in words
    assert "FFCV" not in words and "torchvision:" not in words and "GPU" not in words
    text = markdown(by_hand(ours__2=[1.0, 1.0]))
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in tables}) == 1


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_tar_and_its_folder_give_the_same_files(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, ".")
    from_tar = prepare(tmp_path / "photos.tar", tmp_path / "work", 5)
    from_folder = prepare(photos, tmp_path / "work", 5)
    assert (from_tar.images, from_tar.of, from_tar.bytes) == (from_folder.images, from_folder.of, from_folder.bytes)
    assert (from_tar.images, from_tar.of) == (5, 12)
    contents = [
        {path.relative_to(one.root).as_posix(): path.read_bytes() for path in one.root.rglob("*.JPEG")}
        for one in (from_tar, from_folder)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 5
    mark = from_tar.root / "mark"
    mark.touch()
    assert prepare(tmp_path / "photos.tar", tmp_path / "work", 5) == from_tar and mark.exists()
    assert prepare(tmp_path / "photos.tar", tmp_path / "work", 6).root != from_tar.root


def test_images_are_taken_from_all_over() -> None:
    assert evenly(list("abcdefghij"), 3) == ["a", "d", "g"]
    assert evenly(list("abc"), 9) == ["a", "b", "c"]


def test_a_damaged_tar_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, ".")
        last = max(member.offset_data for member in tar.getmembers())
    data = (tmp_path / "photos.tar").read_bytes()
    (tmp_path / "photos.tar").write_bytes(data[: last + 100])
    with pytest.raises(DataError, match="photos.tar"):
        prepare(tmp_path / "photos.tar", tmp_path / "work", 100)
    assert list((tmp_path / "work").iterdir()) == []


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--arms", "ours-folder-2,magic"], "--arms magic: no such arm; there are torchvision-1,"),
        (["--arms", ","], "--arms: names none"),
        (["--seconds", "-1"], "--seconds -1.0: expected from 0 to 600"),
        (["--batch", "13"], "12 images are fewer than --batch 13: lower it"),
        (["--out", "/dev/null/there"], "--out /dev/null/there: the directory cannot be made: Not a directory"),
        (["--work", "/dev/null/there"], "/dev/null/there: not a directory"),
    ],
)
def test_a_mistake_ends_in_one_line(
    options: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--arms", "ours-folder-2"]
    assert bench_loaders.main([str(photos), *places, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "not a tar", "a tar without images"])
def test_images_that_are_none_end_in_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    match kind:
        case "an empty folder":
            images.mkdir()
        case "not a tar":
            images.write_text("no archive")
        case "a tar without images":
            with tarfile.open(images, "w") as tar:
                tar.add(__file__, "train/a.py")
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    code = bench_loaders.main([str(images), *places, "--arms", "ours-folder-2"])
    error = capsys.readouterr().err
    assert code == 2 and str(images) in error and error.count("\n") == 1


def test_make_says_what_to_give_when_no_images_are_given(repo: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "IMAGES"}
    command = ["make", "--no-print-directory", "bench-loaders"]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "IMAGES=FOLDER" in done.stdout


# --- the device ------------------------------------------------------------------------------------------------------


def test_views_and_a_step_are_timed_on_any_device_and_get_a_table() -> None:
    device = torch.device("cpu")
    views = time_views(device, ("torch",), batch=2, frame=(40, 50), repeats=1)
    assert [(row["impl"], row["views"], row["ms"] > 0) for row in views] == [("torch", 2, True), ("torch", 6, True)]
    step = time_step(device, batch=2, size=32, repeats=1)
    assert step > 0
    record = by_hand(ours__2=[1.0, 1.0])
    decode = [{"hw_decoder_load": 0.65, "images_s": 1234.0}]
    record["device"] = {
        "batch": 2, "frame": [40, 50], "step_ms": step, "views": views, "decode": decode, "copy_gb_s": 12.3,
    }  # fmt: skip
    of_views, of_rates = sheets(record)[-2:]
    assert of_views.rows[1][-1] == f"{views[1]['ms'] / step:.1%}"
    assert of_rates.rows == [
        ("our DALI source, JPEG files, 65% on the JPEG engines", "1,234 images/s"),
        ("copy from page-locked memory", "12.3 GB/s"),
    ]  # fmt: skip


def test_decoding_is_timed_over_more_batches_than_there_are_images(photos: Path) -> None:
    pytest.importorskip("nvidia.dali")
    device = torch.device("cpu")
    (found,) = decode_rates(photos / "train", device, batch=8, workers=1, batches=5, loads=(0.5,))
    assert found["hw_decoder_load"] == 0.5 and found["images_s"] > 0


def test_calls_to_warm_up_are_not_counted() -> None:
    calls: list[int] = []
    assert len(milliseconds(lambda: calls.append(1), torch.device("cpu"), repeats=4)) == 4
    assert len(calls) == 7


@pytest.mark.gpu
def test_a_gpu_is_measured(photos: Path) -> None:
    pytest.importorskip("nvidia.dali")
    found = measure_device(photos / "train", torch.device("cuda"), workers=2, repeats=2)
    assert found["step_ms"] > 0 and found["copy_gb_s"] > 0
    assert len(found["views"]) == 4 and all(row["ms"] > 0 for row in found["views"])
    assert all(row["images_s"] > 0 for row in found["decode"])
