import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import bench_convert
from tools.bench_convert import FEW, Cost, copy_images, decode_all, in_child, run
from tools.bench_convert_report import GOALS, markdown, per_image, ratios, sheets
from tools.loader_arms import ArmFailed


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 JPEG files of 80 x 64 pixels in two classes, and one that is none."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(12):
        path = root / f"class{number % 2}" / f"{number:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = noise.integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(coarse).resize((80, 64)).save(path, "JPEG", quality=90)
    (root / "class0" / "bad.jpg").write_text("no image")
    return root


def cost(seconds: float, cpu_s: float = 0.0, sync_s: float = 0.0, size: int = 0) -> dict:
    return {"seconds": seconds, "sync_s": sync_s, "cpu_s": cpu_s, "bytes": size}


def by_hand(**arms: list[dict]) -> dict:
    """A record of runs on 1,000 images, after ones on 200 that took 0.5 s of either kind."""
    return {
        "date": "2026-01-01", "machine": {"cpu": "a | b"}, "others_share": 0.25, "order": [],
        "options": {"rounds": 3, "workers": 2},
        "data": {"images": 1000, "few": 200, "distinct": 600, "bad": 1, "bytes": 5_000_000},
        "arms": {
            name.replace("_", "-"): [{"few": cost(0.5, 0.5), "all": one} for one in costs]
            for name, costs in arms.items()
        },
        "left_out": {"ffcv": "ffcv is not installed"},
    }  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_arm_that_can_run_is_in_the_tables(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "train")
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    options = ["--rounds", "1", "--images", str(2 * FEW), "--workers", "2"]
    assert bench_convert.main([str(tmp_path / "photos.tar"), *places, *options]) == 0
    (path,) = (tmp_path / "out").glob("convert-cpu-*.json")
    record = json.loads(path.read_text())
    assert set(record["arms"]) | set(record["left_out"]) == set(bench_convert.ARMS)
    assert all(reason.endswith("is not installed") for reason in record["left_out"].values()), record["left_out"]
    assert record["data"]["images"] == 2 * FEW and (record["data"]["distinct"], record["data"]["bad"]) == (12, 1)
    for arm, rounds in record["arms"].items():
        (turn,) = rounds
        assert turn["all"]["seconds"] > 0 and turn["all"]["cpu_s"] > 0, arm
        assert (turn["all"]["bytes"] > turn["few"]["bytes"] > 0) == (arm != "decode"), arm
        assert (turn["all"]["sync_s"] > 0) == (arm in ("tar", "ffcv")), arm
    assert path.with_suffix(".md").read_text() == markdown(record)
    (prepared,) = (tmp_path / "work").iterdir()
    assert not list(prepared.glob("convert-*")), "what was written for the benchmark is still there"


def test_ours_has_its_turn_beside_theirs_and_the_order_changes() -> None:
    orders = [bench_convert.order_of(number) for number in range(6)]
    assert all(sorted(order) == sorted(bench_convert.ARMS) for order in orders)
    for theirs, ours in bench_convert.PAIRS.items():
        assert {order.index(ours) - order.index(theirs) for order in orders[::2]} == {1}
        assert {order.index(ours) - order.index(theirs) for order in orders[1::2]} == {-1}
    assert len({tuple(order) for order in orders[::2]}) > 1


def test_images_are_copied_again_and_again_and_bad_ones_left_out(photos: Path, tmp_path: Path) -> None:
    assert copy_images(photos, tmp_path / "all", tmp_path / "few", 2 * FEW) == (12, 1)
    copies = [path for path in (tmp_path / "all").rglob("*") if path.is_file()]
    assert len(copies) == 2 * FEW and not any(path.is_symlink() for path in copies)
    assert len({path.read_bytes() for path in copies}) == 12
    few = {path.relative_to(tmp_path / "few") for path in (tmp_path / "few").rglob("*") if path.is_file()}
    assert len(few) == FEW and few < {path.relative_to(tmp_path / "all") for path in copies}


@pytest.mark.parametrize("arm", ["ours-header", "ours-decode"])
def test_ours_keeps_the_files_as_tar_does(arm: str, photos: Path, tmp_path: Path) -> None:
    shown = {path.read_bytes() for path in photos.rglob("*.JPEG")}
    copy_images(photos, tmp_path / "all", tmp_path / "few", 2 * FEW)
    found = run(arm, tmp_path / "few", tmp_path / "out", 2)
    (shard,) = (tmp_path / "out").rglob("*.tar")
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".jpg")]
        stored = [file.read() for file in files if file is not None]
    assert len(stored) == FEW and set(stored) == shown
    assert found.bytes > sum(map(len, stored)) and found.sync_s == 0


def test_a_file_that_is_written_is_synced_apart(photos: Path, tmp_path: Path) -> None:
    found = run("tar", photos, tmp_path / "out.tar", 1)
    assert found.bytes == (tmp_path / "out.tar").stat().st_size and found.sync_s > 0
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert sum(name.endswith(".JPEG") for name in tar.getnames()) == 12


def test_cpu_time_counts_the_processes_that_decode(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    before = time.process_time()
    found = run("decode", tmp_path, tmp_path / "out", 2)
    assert found.cpu_s - (time.process_time() - before) > 0.03


def test_a_decoding_worker_that_fails_is_noticed(photos: Path) -> None:
    with pytest.raises(RuntimeError, match="a worker failed"):
        decode_all(photos, 2)


# --- a process for each turn -----------------------------------------------------------------------------------------


def test_what_a_process_returns_comes_back(tmp_path: Path) -> None:
    assert in_child(lambda: Cost(1.0, 2.0, 3.0, os.getpid()), tmp_path / "log").bytes != os.getpid()


def test_an_arm_that_fails_hangs_or_dies_is_told_with_its_reason(tmp_path: Path) -> None:
    def fails() -> Cost:
        raise ValueError("no\nluck")

    with pytest.raises(ArmFailed, match="ValueError: no luck"):
        in_child(fails, tmp_path / "log")
    with pytest.raises(ArmFailed, match="its process ended"):
        in_child(lambda: os._exit(3), tmp_path / "log")
    with pytest.raises(ArmFailed, match="no answer for 0 s"):
        in_child(lambda: time.sleep(60), tmp_path / "log", patience=0.2)  # type: ignore[arg-type, return-value]


def test_what_an_arm_started_ends_with_it(tmp_path: Path) -> None:
    def starts() -> Cost:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        return Cost(0, 0, 0, 0)

    in_child(starts, tmp_path / "log")
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    deadline = time.monotonic() + 5
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or "State:\tZ" in status.read_text()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_figures_are_what_images_add_and_ratios_are_within_a_round() -> None:
    record = by_hand(
        ours_header=[cost(2.1), cost(1.3), cost(1.3)],
        tar=[cost(1.3, sync_s=0.8), cost(1.3, sync_s=0.8), cost(0.9, sync_s=0.8)],
    )
    assert per_image(record, "ours-header", "seconds") == pytest.approx([0.002, 0.001, 0.001])
    assert ratios(record, GOALS[0]) == pytest.approx([2, 1, 2])
    assert ratios(record, GOALS[1]) == pytest.approx([1, 0.5, 2 / 3])
    *_, goals = sheets(record)
    assert [row[2:5] for row in goals.rows] == [
        ("2.00 (1.00 to 2.00)", "1.5", "NO"), ("0.667 (0.500 to 1.00)", "1.5", "yes"),
    ]  # fmt: skip


def test_the_hours_are_those_of_imagenet_on_sixteen_cores() -> None:
    record = by_hand(ours_ffcv=[cost(1.0, cpu_s=0.5 + 800 * 0.0025, size=800_000)] * 3)
    ((label, clock, synced, cpu, rate, size, besides, hours),) = sheets(record)[0].rows
    assert label == "ours: .beton" and synced == "-" and cpu.startswith("2.50 (") and clock.startswith("0.625 (")
    assert (rate, size, besides) == ("1,600", "1.0", "0.38")
    assert hours == f"{1_281_167 * 0.0025 / 16 / 3600:.2f}"


def test_the_text_says_what_was_measured_and_what_was_not() -> None:
    text = markdown(by_hand(tar=[cost(1.0)] * 3))
    for words in ("1,000 images (copies of 600), 5 KB each", "1 that cannot be read were left out", "25% of its CPU"):
        assert words in text
    assert "Left out: ffcv: ffcv is not installed." in text and "cpu a | b" in text
    assert "| tar cf |" in text and "ours, shards" not in text and "\n\n\n" not in text


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "4"], "--rounds 4: expected an odd number"),
        (["--rounds", "-1"], "--rounds -1: expected an odd number"),
        (["--images", str(2 * FEW - 1)], f"--images {2 * FEW - 1}: expected at least {2 * FEW}"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--out", "/dev/null/there"], "--out /dev/null/there: the directory cannot be made"),
        (["--work", "/dev/null/there"], "/dev/null/there: not a directory"),
    ],
)
def test_a_mistake_ends_in_one_line(
    options: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert bench_convert.main([str(photos), *places, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_of_images_that_cannot_be_read_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("no image")
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert bench_convert.main([str(tmp_path / "images"), *places]) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_make_says_what_to_give_when_no_images_are_given(repo: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "IMAGES"}
    command = ["make", "--no-print-directory", "bench-convert"]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "IMAGES=FOLDER" in done.stdout
