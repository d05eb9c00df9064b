"""Files and shards that change while they are read: each source goes on without them, aloud, or stops with their name.

A fault comes after the source was opened, and before it has read what is spoiled.
"""

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.dali_source import DaliSource
from pipelines.folder_source import FolderSource
from pipelines.frames import Frames, stand_in
from pipelines.resident_source import ResidentSource
from pipelines.shards import read_index
from ressl.batch import DataError
from ressl.config import ResidentSource as Config
from tools.shard_writer import Member, write_shards

CPU = torch.device("cpu")
COUNT, BATCH = 24, 2
BATCHES = np.split(np.arange(COUNT), COUNT // BATCH)
KINDS = ["folder", "dali", "resident"]
SPOILED = (17, 22)  # far behind what is read ahead of the first batch
SHARD = 6  # images in each
IN_SHARD = range(12, 18)  # in shard 2


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    return file.getvalue()


def label_of(i: int) -> int:
    return 2 * i // COUNT


def path_of(root: Path, i: int) -> Path:
    return root / "ab"[label_of(i)] / f"{i:02}.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(COUNT):
        path = path_of(tmp_path / "images", i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / "images"


def write(root: Path, order: Iterable[int]) -> Path:
    """Four shards of six images each."""
    root.mkdir()
    sizes = {i: picture(i).shape[:2] for i in order}
    members = [Member(png(i), ".png", size, size, label_of(i), i, f"image {i}") for i, size in sizes.items()]
    write_shards(root, members, COUNT, shard_images=SHARD)
    return root


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pytest.importorskip("nvidia.dali")
    return write(tmp_path / "shards", range(COUNT))


def open_source(kind: str, path: Path, on_corrupt: str, report: Callable[[str], None]):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
        return DaliSource(
            path, device=CPU, workers=2, max_side=None, hw_decoder_load=0, on_corrupt=on_corrupt, report=report
        )
    return FolderSource(path, workers=2, max_side=None, on_corrupt=on_corrupt, report=report)


def epoch(
    kind: str,
    path: Path,
    fault: Callable[[], object],
    on_corrupt: str,
    report: Callable[[str], None] = print,
    order: list[np.ndarray] = BATCHES,
) -> list[Frames]:
    """All frames of an epoch that `fault` comes into: after its first batch, or as a resident set is decoded."""
    if kind != "resident":
        with closing(open_source(kind, path, on_corrupt, report).stream(order, salt=0)) as stream:
            frames = [next(stream)]
            fault()
            return frames + list(stream)

    def decoder():
        source = open_source("dali" if (path / "index.npz").exists() else "folder", path, on_corrupt, report)
        stream = source.stream
        source.stream = lambda batches, *, salt: (fault(), stream(batches, salt=salt))[1]
        return source

    return list(ResidentSource(path, Config(name="resident", train=path), CPU, decoder=decoder).stream(order, salt=0))


def indices(frames: list[Frames]) -> list[int]:
    """Those of the images as they came. Each must be whole and under its own label."""
    found = []
    for one in frames:
        for index, label, start, (height, width) in zip(
            one.index.tolist(), one.label.tolist(), one.offset.tolist(), one.size.tolist(), strict=True
        ):
            pixels = one.pixels[start : start + 3 * height * width].numpy()
            assert np.array_equal(pixels.reshape(height, width, 3), picture(index)) and label == label_of(index)
            found.append(index)
    return found


def with_others_for(spoiled: Iterable[int]) -> list[int]:
    """What an epoch gives in all sources where these images cannot be read."""
    spoiled, found = set(spoiled), list(range(COUNT))
    for i in spoiled:
        others = (stand_in(i, attempt, 0, COUNT) for attempt in range(9))
        found[i] = next(other for other in others if other not in spoiled)
    return found


# --- one file --------------------------------------------------------------------------------------------------------


def put(kind: str, path: Path) -> None:
    path.unlink()
    match kind:
        case "unreadable":  # as on a disk that fails: it can be opened
            path.symlink_to("/proc/self/mem")
        case "dangling":
            path.symlink_to("gone")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "emptied": (lambda path: path.write_bytes(b""), "empty file"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not an image"),
    "deleted": (Path.unlink, "no such file"),
    "unreadable": (lambda path: put("unreadable", path), "cannot be read: input/output error"),
    "directory": (lambda path: put("directory", path), "not a regular file (directory)"),
    "fifo": (lambda path: put("fifo", path), "not a regular file (FIFO)"),
    "dangling": (lambda path: put("dangling", path), "dangling link"),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_goes_bad_is_replaced_aloud_always_by_the_same_image(folder, kind, name):
    fault, reason = FILE_FAULTS[name]
    said: list[str] = []
    frames = epoch(kind, folder, lambda: [fault(path_of(folder, i)) for i in SPOILED], "replace", said.append)
    assert indices(frames) == with_others_for(SPOILED)
    for i in SPOILED:
        (about,) = [one for one in said if one.startswith(f"{path_of(folder, i)}: ")]
        assert reason in about and f"; replaced by {folder}" in about
    assert len(said) == len(SPOILED)


@pytest.mark.parametrize("name", FILE_FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_goes_bad_ends_the_run_with_its_name(folder, kind, name):
    fault, reason = FILE_FAULTS[name]
    before = set(threading.enumerate())
    with pytest.raises(DataError) as stopped:
        epoch(kind, folder, lambda: fault(path_of(folder, SPOILED[0])), "fail")
    message = str(stopped.value)
    assert message.startswith(f"{path_of(folder, SPOILED[0])}: ") and reason in message and "\n" not in message
    assert message.endswith("(data.on_corrupt=replace goes on without it)")
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_vanishes_ends_the_run_and_is_not_looked_for_for_ever(folder, kind):
    said: list[str] = []
    with pytest.raises(DataError, match=rf"{folder}/[ab]/\d\d\.png: no such file; and none of 9 others"):
        epoch(kind, folder, lambda: shutil.rmtree(folder), "replace", said.append)
    assert said == []


@pytest.mark.parametrize("kind", ["folder", "dali"])
def test_files_that_come_and_go_while_they_are_read_never_give_other_pixels(folder, kind):
    """Whatever moment a file is read at, it is itself, or another stands in for it and the report has its name."""
    paths, stop, said = [path_of(folder, i) for i in range(0, COUNT, 3)], threading.Event(), []

    def spoil() -> None:
        for number in cycle(range(len(paths) * 5)):
            path, whole = paths[number % len(paths)], png(3 * (number % len(paths)))
            match number % 5:
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(whole[: len(whole) // 2])
                case 2:
                    path.write_bytes(b"")
                case 3:
                    path.write_bytes(b"garbage" * 100)
                case 4:
                    put("directory", path)
                    stop.wait(0.0005)
                    path.rmdir()
            stop.wait(0.0005)
            path.write_bytes(whole)
            if stop.is_set():
                return

    source = open_source(kind, folder, "replace", said.append)
    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    try:
        replaced = 0
        for salt in range(1000):
            found = indices(list(source.stream(BATCHES, salt=salt)))
            replaced += sum(index != i for i, index in enumerate(found))
            if salt >= 30 and replaced >= 5:
                break
    finally:
        stop.set()
        spoiler.join()
    assert replaced >= 5
    names = {f"{path}" for path in paths}
    assert {one.split(": ")[0] for one in said} <= names
    assert indices(list(source.stream(BATCHES, salt=0))) == list(range(COUNT))


# --- shards ----------------------------------------------------------------------------------------------------------


def tar(root: Path) -> Path:
    return root / "shard-00002.tar"


def replaced(root: Path) -> None:
    """By one of the same size with the same images in another order, as by a second conversion."""
    order = [*range(12), *reversed(IN_SHARD), *range(18, COUNT)]
    tar(write(root.with_name("other"), order)).rename(tar(root))


SHARD_GONE = {"removed": lambda root: tar(root).unlink(), "directory": lambda root: put("directory", tar(root))}
SHARD_CHANGED = {
    "cut": lambda root: os.truncate(tar(root), 3000),
    "emptied": lambda root: os.truncate(tar(root), 0),
    "garbage": lambda root: tar(root).write_bytes(bytes(tar(root).stat().st_size)),
    "replaced": replaced,
}


@pytest.mark.parametrize("name", SHARD_GONE)
@pytest.mark.parametrize("kind", ["dali", "resident"])
def test_each_image_of_a_shard_that_is_gone_is_replaced_aloud(shards, kind, name):
    said: list[str] = []
    frames = epoch(kind, shards, lambda: SHARD_GONE[name](shards), "replace", said.append)
    assert indices(frames) == with_others_for(IN_SHARD)
    reason = {"removed": "no such file or directory", "directory": "is a directory"}[name]
    about = {i: f"{tar(shards)}: image {i}: cannot be read: {reason}; replaced by {shards}" for i in IN_SHARD}
    assert all(any(one.startswith(text) for one in said) for text in about.values())
    assert all(any(one.startswith(text.partition(";")[0]) for text in about.values()) for one in said)


@pytest.mark.parametrize("name", SHARD_GONE)
@pytest.mark.parametrize("kind", ["dali", "resident"])
def test_a_shard_that_is_gone_ends_the_run_with_its_name(shards, kind, name):
    with pytest.raises(DataError, match=rf"{tar(shards)}: image 1\d: cannot be read: .* \(data\.on_corrupt=replace "):
        epoch(kind, shards, lambda: SHARD_GONE[name](shards), "fail")


@pytest.mark.parametrize("on_corrupt", ["replace", "fail"])
@pytest.mark.parametrize("name", SHARD_CHANGED)
@pytest.mark.parametrize("kind", ["dali", "resident"])
def test_a_shard_that_is_another_one_ends_the_run_with_its_name(shards, kind, name, on_corrupt):
    said, before = [], set(threading.enumerate())
    with pytest.raises(DataError, match=rf"{tar(shards)}: changed since the run began; start it again"):
        epoch(kind, shards, lambda: SHARD_CHANGED[name](shards), on_corrupt, said.append)
    assert said == [] and set(threading.enumerate()) <= before


def test_shards_that_all_vanish_end_the_run_and_are_not_looked_for_for_ever(shards):
    said: list[str] = []
    message = rf"{shards}/shard-0000\d\.tar: image \d+: cannot be read: no such file or directory; and none of 9 others"
    with pytest.raises(DataError, match=message):
        epoch("resident", shards, lambda: shutil.rmtree(shards), "replace", said.append)
    assert said == []


def test_a_shard_that_was_opened_is_read_on_after_it_is_removed(shards):
    said: list[str] = []
    order = [np.arange(COUNT - BATCH, COUNT), *BATCHES[:-1]]  # one batch and what is read ahead open all but shard 2
    assert indices(epoch("dali", shards, lambda: (shards / "shard-00003.tar").unlink(), "replace", said.append,
                         [order[0], *order])) == [22, 23, 22, 23, *range(22)]  # fmt: skip
    assert said == []


@pytest.mark.parametrize("kind", ["dali", "resident"])
def test_shards_whose_bytes_are_others_than_the_index_s_are_named(shards, kind):
    """Of the same size, and there before the run: only the images tell."""
    tar(shards).write_bytes(bytes(tar(shards).stat().st_size))
    assert len(read_index(shards).label) == COUNT
    said: list[str] = []
    assert indices(epoch(kind, shards, lambda: None, "replace", said.append)) == with_others_for(IN_SHARD)
    assert {one.split(": not an image")[0] for one in said} == {f"{tar(shards)}: image {i}" for i in IN_SHARD}
    with pytest.raises(DataError, match=rf"{tar(shards)}: image 1\d: not an image"):
        epoch(kind, shards, lambda: None, "fail")


@pytest.mark.parametrize("kind", ["dali", "resident"])
def test_shards_whose_images_are_of_another_size_than_the_index_s_are_named(shards, kind):
    replaced(shards)
    said: list[str] = []
    assert indices(epoch(kind, shards, lambda: None, "replace", said.append)) == with_others_for(IN_SHARD)
    assert any("but index.npz says" in one for one in said)  # images that lie elsewhere are damaged in other ways too
    assert {one.split(": ")[1] for one in said} == {f"image {i}" for i in IN_SHARD}
    with pytest.raises(DataError, match=rf"{tar(shards)}: image 1\d: "):
        epoch(kind, shards, lambda: None, "fail")
