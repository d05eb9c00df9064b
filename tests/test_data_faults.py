"""Data that are damaged before a run, or go bad while it runs: what a person sees, from `launch.py` on."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from pipelines.beton import FIELD, FIELDS, HEADER, metadata_dtype, open_beton
from pipelines.shards import read_index
from tools.convert import convert

Launch = Callable[..., tuple[int, str, str]]
ROWS = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@pytest.fixture(scope="module")
def converted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ffcv")
    root = tmp_path_factory.mktemp("converted")
    for to in ("ffcv", "webdataset"):
        mode = {"mode": "jpg"} if to == "ffcv" else {}
        convert(str(tiny_data / "folder" / "train"), root / to, to, console=Console(quiet=True), **mode)
    return root


@pytest.fixture
def data(converted: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """Copies that a test may change: ffcv/train.beton, webdataset/train and folder."""
    for name in ("ffcv", "webdataset"):
        shutil.copytree(converted / name, tmp_path / "data" / name)
    shutil.copytree(tiny_data / "folder" / "train", tmp_path / "data" / "folder")
    return tmp_path / "data"


def source(name: str, path: Path, **more: object) -> str:
    return "data.source=" + json.dumps({"name": name, "train": str(path), **more})


def error_of(err: str) -> str:
    """What is said of an error, which must be one line."""
    assert err.startswith("ressl: error: ") and err.count("\n") == 1, err
    return err.removeprefix("ressl: error: ").rstrip("\n")


# --- before the run --------------------------------------------------------------------------------------------------


def put(path: Path, start: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(new)


def put_header(path: Path, key: str, value: int) -> None:
    header = np.fromfile(path, HEADER, 1)
    header[key] = value
    put(path, 0, header.tobytes())


LABEL = ROWS + metadata_dtype(FIELDS).fields["label"][1]  # of the first image
BETON_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "short": (lambda path: os.truncate(path, path.stat().st_size - 1), "the file is truncated, extended or damaged"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "the file is truncated"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "the file is truncated, extended or damaged"),
    "killed writer": (lambda path: put_header(path, "alloc_table_ptr", 0), "its conversion was interrupted"),
    "another version": (lambda path: put_header(path, "version", 3), "version 3, expected 2; convert again"),
    "other fields": (lambda path: put(path, HEADER.itemsize + 1, b"picture"), "fields 'picture"),
    "no beton": (lambda path: path.write_text("text " * 99), "not a .beton file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty; convert again"),
    "another label": (lambda path: put(path, LABEL, (3).to_bytes(8, "little")), "its tables are not those that"),
}


@pytest.mark.parametrize("name", BETON_DAMAGE)
def test_a_damaged_beton_file_is_refused_before_the_run_begins(
    name: str, ressl: Launch, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    damage, reason = BETON_DAMAGE[name]
    path = data / "ffcv" / "train.beton"
    damage(path)
    for more in (["--dry-run"], []):
        code, _, err = ressl("pretrain", tiny_config, source("ffcv", path), *more)
        assert code == 2
        assert error_of(err).startswith(f"{path}: ") and reason in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- an image --------------------------------------------------------------------------------------------------------


def spoil(data: Path, kind: str) -> tuple[str, str]:
    """Damages the image 5 of a data set; what is to be trained on, and how the image is named."""
    match kind:
        case "ffcv":
            path = data / "ffcv" / "train.beton"
            beton = open_beton(path)
            put(path, int(beton.data_ptr[5]) + 2, bytes(int(beton.data_size[5]) - 4))
            return source("ffcv", path), f"{path}: image 5: its JPEG data is damaged"
        case "shards":
            index = read_index(data / "webdataset" / "train")
            put(index.root / index.shards[0], int(index.offset[5]), b"damaged")
            name = f"{index.root / index.shards[0]}: {index.name(5)}: not an image"
            return source("dali", data / "webdataset" / "train"), name
        case _:
            path = sorted((data / "folder").rglob("*.png"))[5]
            path.write_bytes(path.read_bytes()[:300])
            return source(kind, data / "folder"), f"{path}: cannot be decoded: "


KINDS = ["folder", "dali", "shards", "ffcv", "resident"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_ends_a_strict_run_in_one_line_with_its_name(
    kind: str, ressl: Launch, tiny_config: Path, data: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    chosen, named = spoil(data, kind)
    code, _, err = ressl("pretrain", tiny_config, chosen, "data.on_corrupt=fail", "optim.batch_size=72")
    assert code == 2
    assert error_of(err).startswith(named) and err.rstrip().endswith("(data.on_corrupt=replace goes on without it)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_replaced_and_kept_on_record(
    kind: str, ressl: Launch, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    chosen, named = spoil(data, kind)
    code, out, err = ressl("pretrain", tiny_config, chosen, "optim.epochs=1", "optim.batch_size=72")
    assert (code, err) == (0, "")
    (record,) = map(json.loads, (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines())
    assert record["message"].startswith(named) and "; replaced by " in record["message"]
    assert f"warning: {named}" in out


def test_too_many_bad_images_end_the_run(ressl: Launch, tiny_config: Path, data: Path, tmp_path: Path) -> None:
    paths = sorted((data / "folder").rglob("*.png"))
    for path in paths[:11]:
        path.write_bytes(b"")
    begun = ["pretrain", tiny_config, source("folder", data / "folder"), "optim.batch_size=8"]
    code, _, err = ressl(*begun)
    assert code == 2
    assert error_of(err) == (
        f"11 of 72 images could not be read, more than data.max_bad=0.01 allows; they are listed in "
        f"{tmp_path / 'run' / 'bad_images.jsonl'}"
    )
    assert ressl(*begun, "data.max_bad=0.2")[0] == 0  # in two epochs, each with others in their places
    paths[0].write_bytes(paths[20].read_bytes())
    assert ressl(*begun, f"run.out_dir={tmp_path / 'other'}")[0] == 0  # ten may always


def test_data_that_were_mended_are_not_refused_for_what_they_were(
    ressl: Launch, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    paths = sorted((data / "folder").rglob("*.png"))[:11]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"")
    begun = ["pretrain", tiny_config, source("resident", data / "folder"), "optim.batch_size=8"]  # decoded at once
    assert ressl(*begun)[0] == 2
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    assert ressl(*begun)[0] == 0


def test_bad_images_of_the_other_split_are_told_and_do_not_count(
    ressl: Launch, tiny_config: Path, tiny_data: Path, data: Path, tmp_path: Path
) -> None:
    val = shutil.copytree(tiny_data / "folder" / "val", tmp_path / "val")
    for path in sorted(val.rglob("*.png"))[:11]:
        path.write_bytes(b"")
    code, out, _ = ressl("pretrain", tiny_config, source("resident", data / "folder", val=str(val)))
    assert code == 0 and out.count("empty file; replaced by") >= 11


def test_too_many_bad_images_are_counted_over_all_ranks(
    forked_ranks, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    for path in sorted((data / "folder").rglob("*.png"))[:11]:
        path.write_bytes(b"")
    log = tmp_path / "log"  # a step sees all, a rank half of them
    given = [source("folder", data / "folder"), "optim.batch_size=72", "optim.epochs=20", f"run.out_dir={tmp_path}/run"]
    codes = forked_ranks.wait(forked_ranks.start(tiny_config, *given, log=log))
    assert set(codes) <= {1, 2} and 2 in codes, log.read_text()
    assert log.read_text().count("ressl: error: 11 of 72 images could not be read") == 1


# --- while the run goes on -------------------------------------------------------------------------------------------


@contextmanager
def after_the_first_step(run_dir: Path, fault: Callable[[], object]) -> Iterator[None]:
    def wait() -> None:
        end = time.monotonic() + 100
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.005)
        fault()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("kind", "place", "fault", "said"),
    [
        ("folder", "folder", shutil.rmtree, r": no such file; and none of 9 others tried in its place can be read"),
        ("dali", "folder", shutil.rmtree, r": no such file; and none of 9 others tried in its place can be read"),
        ("ffcv", "ffcv/train.beton", lambda path: os.truncate(path, 1 << 20), ": changed since the run began; start"),
        ("ffcv", "ffcv/train.beton", Path.unlink, ": gone since the run began"),
    ],
    ids=["folder", "dali", "ffcv cut", "ffcv removed"],
)
def test_a_run_whose_data_are_gone_ends_with_their_name(
    kind: str, place: str, fault: Callable[[Path], object], said: str, ressl: Launch, tiny_config: Path, data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("nvidia.dali" if kind == "dali" else kind if kind == "ffcv" else "torch")
    path = data / place
    with after_the_first_step(tmp_path / "run", lambda: fault(path)):
        code, _, err = ressl("pretrain", tiny_config, source(kind, path), "optim.epochs=100000")
    assert code == 2
    assert error_of(err).startswith(f"{path}") and said in err


# --- evaluations -----------------------------------------------------------------------------------------------------


def change_config(run_dir: Path, change: Callable[[dict], object]) -> None:
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    change(saved)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))


def test_features_that_are_not_finite_are_counted_and_give_no_accuracy(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    change_config(tmp_path / "run", lambda saved: saved["data"].update(std=[1e-38] * 3))  # images beyond float32
    code, out, err = ressl("evaluate", tmp_path / "run")
    assert code == 5 and "%" not in out
    assert re.fullmatch(r"NaN or infinity in the features of \d+ of \d+ images", error_of(err))
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_an_evaluation_on_other_classes_is_refused(
    ressl: Launch, tiny_config: Path, tiny_data: Path, tmp_path: Path
) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    shutil.copytree(tiny_data / "folder", tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val" / "colour3")
    places = {split: str(tmp_path / "images" / split) for split in ("train", "val")}
    change_config(tmp_path / "run", lambda saved: saved["data"].update(source={"name": "folder", **places}))
    code, _, err = ressl("evaluate", tmp_path / "run")
    assert code == 2
    assert error_of(err) == f"{places['val']} has 3 classes, {places['train']} 4; not in both: colour3"
