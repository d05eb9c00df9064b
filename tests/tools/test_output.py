"""Converted files get their names together or not at all, and nothing that is not ours is removed for them."""

import errno
import fcntl
import io
import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.manifest import read_manifest
from pipelines.shards import read_index
from ressl.batch import DataError
from tools import output
from tools.convert import DiskFull, convert

FORMATS = {"tensor": ".safetensors", "ffcv": ".beton", "webdataset": ""}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training and a validation split of three images in two classes."""
    for i in range(6):
        path = tmp_path / "src" / ("train", "val")[i // 3] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return tmp_path / "src"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- all or none -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["tensor", "webdataset"])
@pytest.mark.parametrize("again", [True, False], ids=["over older files", "new"])
def test_a_disk_that_fails_at_any_moment_leaves_all_as_it_was(folder, tmp_path, console, monkeypatch, to, again):
    out = tmp_path / "out"
    if again:
        convert(str(folder), out, to, max_side=8, console=console)
    before = contents(out)
    calls, fails_at = 0, 0
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def failing(name):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")
            return real[name](*arguments, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    while True:
        calls, fails_at = 0, fails_at + 1
        try:
            convert(str(folder), out, to, overwrite=True, console=console)
            break  # the rename that decides is done
        except DiskFull:
            assert contents(out) == before
            assert out.exists() == again
    assert fails_at > (8 if again else 6)  # files and their directory, then the renames
    manifest = read_manifest(out)
    assert all(record.options["max_side"] is None for record in manifest.splits.values())
    names = {"manifest.json", *(f"{split}{FORMATS[to]}" for split in ("train", "val"))}
    assert {path.name for path in out.iterdir()} == names


def write_pair(root: Path, text: bytes) -> None:
    """Publishes a directory of shards, a file, and a last file, with the same contents."""
    with ExitStack() as stack:
        last = stack.enter_context(output.part_file(root / "manifest.json"))
        directory = stack.enter_context(output.part_directory(root / "val"))
        file = stack.enter_context(output.part_file(root / "train.beton"))
        (directory / "index.npz").write_bytes(text)
        for one in (file, last):
            one.write(text)
        output.publish([directory, file], last)


def interrupt_at(count: int):
    """Ctrl-C when line `count` of what `publish` runs is reached."""
    inside = {
        code.co_name
        for code in (
            vars(output)[name].__code__ for name in ("publish", "_settle", "_remove", "_sync", "_sync_directories")
        )
    }
    seen = 0

    def trace(frame, event, _argument):
        nonlocal seen
        if frame.f_code.co_filename != output.__file__ or frame.f_code.co_name not in inside:
            return None
        if event == "line":
            seen += 1
            if seen == count:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("again", [True, False], ids=["over older files", "new"])
def test_ctrl_c_at_any_line_leaves_all_old_or_all_new_and_nothing_else(tmp_path, again):
    outcomes = []
    for count in range(1, 1000):
        root = tmp_path / str(count)
        root.mkdir()
        if again:
            write_pair(root, b"old")
        before = sys.gettrace()
        sys.settrace(interrupt_at(count))
        try:
            write_pair(root, b"new")
            outcomes.append("uninterrupted")
        except KeyboardInterrupt:
            found = contents(root)
            outcomes.append(next(iter(found.values())).decode() if found else "none")
            names = {"manifest.json", "train.beton", "val/index.npz"}
            assert set(found) == (names if found else set()), count
            assert set(found.values()) <= {outcomes[-1].encode()}, count
            assert {path.name for path in root.iterdir()} == {name.split("/")[0] for name in found}, count
        finally:
            sys.settrace(before)
        if outcomes[-1] == "uninterrupted":
            break
    assert outcomes[-1] == "uninterrupted"
    assert set(outcomes[:-1]) == ({"old", "new"} if again else {"none", "new"})
    assert outcomes == sorted(outcomes, key=("none", "old", "new", "uninterrupted").index)  # one moment decides


def test_what_a_process_killed_amid_the_renames_left_is_cleared(tmp_path):
    write_pair(tmp_path, b"old")
    for name in ("train.beton", "val"):
        (tmp_path / name).rename(tmp_path / f"{name}.part.old")
    (tmp_path / "val.part").mkdir()
    (tmp_path / "val.part" / "index.npz").write_bytes(b"half")
    write_pair(tmp_path, b"new")
    assert contents(tmp_path) == dict.fromkeys(("manifest.json", "train.beton", "val/index.npz"), b"new")
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_process_left_is_cleared_and_a_live_one_is_respected(tmp_path):
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "shard-00000.tar").write_bytes(b"half")
    with output.part_directory(tmp_path / "out") as directory:
        assert list(directory.iterdir()) == []
        (directory / "shard-00000.tar").write_bytes(b"new")
        with (
            pytest.raises(DataError, match="another process is writing it"),
            output.part_directory(tmp_path / "out"),
        ):
            pass
        assert contents(tmp_path) == {"out.part/shard-00000.tar": b"new"}
    assert list(tmp_path.iterdir()) == []
    with (
        output.part_file(tmp_path / "file"),
        pytest.raises(DataError, match="another process is writing it"),
        output.part_file(tmp_path / "file"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_stands_where_a_file_shall_be_or_a_file_where_a_directory(folder, tmp_path, console):
    """Found out before anything is written, with and without --overwrite."""
    for to, suffix in FORMATS.items():
        out = tmp_path / to
        out.mkdir()
        (out / f"train{suffix}").touch() if to == "webdataset" else (out / f"train{suffix}").mkdir()
        kind = "directory" if to == "webdataset" else "regular file"
        for overwrite in (True, False):
            with pytest.raises(DataError, match=rf"train{suffix}: exists already and is no {kind}.*choose another"):
                convert(str(folder), out, to, overwrite=overwrite, console=console)
        assert [path.name for path in out.iterdir()] == [f"train{suffix}"]


# --- nothing that is not ours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "shard-0.tar", "shard-00000.tar.gz", "shard-00001.idx/x"])
@pytest.mark.parametrize("place", ["train", "train.part", "train.part.old"])
def test_a_foreign_file_is_never_removed_and_is_named(folder, tmp_path, console, name, place):
    out = tmp_path / "out"
    convert(str(folder), out, "webdataset", console=console)
    (out / place / name).parent.mkdir(parents=True, exist_ok=True)
    (out / place / name).write_text("mine")
    (out / place / "index.npz").touch()
    before = contents(out)
    with pytest.raises(DataError, match=rf"{place}: holds '{name.split('/')[0]}'.*did not write.*move it away"):
        convert(str(folder), out, "webdataset", overwrite=True, console=console)
    assert contents(out) == before
    with closing(os.fdopen(os.open(out / "manifest.json", os.O_RDONLY))) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the refusal has let go of all


def test_what_is_put_into_a_directory_while_it_is_replaced_is_kept(tmp_path):
    write_pair(tmp_path, b"old")
    with output.part_file(tmp_path / "manifest.json") as last, output.part_directory(tmp_path / "val") as directory:
        (directory / "index.npz").write_bytes(b"new")
        (tmp_path / "val" / "notes.txt").write_text("mine")
        output.publish([directory], last)
    assert contents(tmp_path)["val/index.npz"] == b"new"
    assert contents(tmp_path)["val.part.old/notes.txt"] == b"mine"


def test_the_split_in_another_format_stays_and_is_named(folder, tmp_path, console):
    out = tmp_path / "out"
    convert(str(folder), out, "tensor", console=console)
    before = contents(out)
    with pytest.raises(DataError, match=r"its train is train\.safetensors already; .*--overwrite"):
        convert(str(folder), out, "ffcv", split="train", console=console)
    convert(str(folder), out, "ffcv", split="train", overwrite=True, console=console)
    assert {name: contents(out)[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert {name: record.file for name, record in read_manifest(out).splits.items()} == {
        "train": "train.beton",
        "val": "val.safetensors",
    }
    said = console.file.getvalue().splitlines()[-1]
    assert said.startswith(f"train.safetensors stays in {out}, but manifest.json lists it no more")
    convert(str(folder), out, "ffcv", split="train", overwrite=True, console=console)
    assert "stays" not in console.file.getvalue().splitlines()[-1]  # it has been said


# --- where a path leads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(FORMATS))
def test_data_stays_where_links_point(folder, tmp_path, console, to):
    out, disk = tmp_path / "out", tmp_path / "disk"
    convert(str(folder), disk / "data", to, max_side=8, console=console)
    names = ["manifest.json", *(f"{split}{FORMATS[to]}" for split in ("train", "val"))]
    out.mkdir()
    for name in names:
        (disk / "data" / name).rename(disk / f"my-{name}")
        (out / name).symlink_to(disk / f"my-{name}")
    (tmp_path / "link").symlink_to(out)
    for side in (8, None):  # twice: the first one must not replace a link
        convert(str(folder), tmp_path / "link", to, max_side=side, overwrite=True, console=console)
        assert sorted(path.name for path in out.iterdir() if path.is_symlink()) == sorted(names)
        assert sorted(path.name for path in disk.iterdir() if path.name != "data") == sorted(f"my-{n}" for n in names)
    records = read_manifest(out).splits
    assert [records[split].file for split in ("train", "val")] == names[1:]
    assert records["train"].options["max_side"] is None
    if to == "webdataset":
        assert read_index(out / "train").size.max() == 12


def test_a_destination_inside_the_source_is_refused_however_it_is_written(folder, tmp_path, console, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for src, dst in (("~/src", "~/src/out"), (str(folder), "~/src/out"), ("~/src", str(folder / "a" / "out"))):
        with pytest.raises(DataError, match="lies inside .* choose another place"):
            convert(src, Path(dst), "tensor", console=console)
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
