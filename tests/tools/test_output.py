"""A file has its name only when it is whole, and nothing that is not ours is removed or replaced for it."""

import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.manifest import read_manifest
from ressl.batch import DataError
from tools import output
from tools.convert import convert
from tools.output import atomic_output, refuse_foreign, remove_ours

FORMATS = {"tensor": ".safetensors", "ffcv": ".beton", "webdataset": ""}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


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


# --- one file --------------------------------------------------------------------------------------------------------


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    with atomic_output(tmp_path / "file") as file:
        file.write(b"0123456789")
        file.seek(3)
        file.write(b"X")
        assert [path.name for path in tmp_path.iterdir()] == ["file.part"]
    assert contents(tmp_path) == {"file": b"012X456789"}


def interrupt_at(count: int):
    """Ctrl-C when line `count` of what `atomic_output` runs is reached."""
    seen = 0

    def trace(frame, event, _argument):
        nonlocal seen
        if frame.f_code.co_filename != output.__file__ or frame.f_code.co_name != "atomic_output":
            return None
        if event == "line":
            seen += 1
            if seen == count:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("older", [b"old", None], ids=["over an older file", "new"])
def test_ctrl_c_before_the_rename_leaves_what_was_there(tmp_path, older):
    outcomes = []
    while "uninterrupted" not in outcomes:
        root = tmp_path / str(len(outcomes))
        root.mkdir()
        if older:
            (root / "file").write_bytes(older)
        before = sys.gettrace()
        sys.settrace(interrupt_at(len(outcomes) + 1))
        try:
            with atomic_output(root / "file") as file:
                file.write(b"new")
            outcomes.append("uninterrupted")
        except KeyboardInterrupt:
            outcomes.append(contents(root).get("file"))
            if outcomes[-1] == older:  # it may come amid the tidying itself, whose remains the next one empties
                assert set(contents(root)) <= {"file", "file.part"}
        finally:
            sys.settrace(before)
        assert contents(root).get("file") in (older, b"new")
        with atomic_output(root / "file") as file:
            file.write(b"next")
        assert contents(root) == {"file": b"next"}
    assert outcomes.count(older) >= 4
    assert b"new" in outcomes


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_what_was_there(tmp_path, monkeypatch, failing):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"), atomic_output(tmp_path / "file") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_what_a_killed_process_left_is_emptied_and_a_live_one_is_respected(tmp_path):
    (tmp_path / "file.part").write_bytes(b"what a killed process left")
    with atomic_output(tmp_path / "file") as file:
        assert contents(tmp_path) == {"file.part": b""}
        with (
            pytest.raises(DataError, match=r"file\.part: another process is writing it; wait for it"),
            atomic_output(tmp_path / "file"),
        ):
            pass
        file.write(b"new")
    assert contents(tmp_path) == {"file": b"new"}


def test_a_file_that_cannot_be_made_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match=r"missing/file\.part: cannot be written: No such file or directory"),
        atomic_output(tmp_path / "missing" / "file"),
    ):
        pass


# --- a directory of shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["notes.txt", "shard-0.tar", "shard-00000.tar.gz", "shard-00001.idx/x", "SHARD-00000.tar"]
)
def test_what_is_no_shard_file_is_refused_and_kept(tmp_path, name):
    for ours in ("shard-00000.tar", "shard-00000.idx", "shard-123456.tar", "index.npz"):
        (tmp_path / ours).touch()
    refuse_foreign(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=f"holds '{name.split('/')[0]}', which `convert` did not write.*move it away"):
        refuse_foreign(tmp_path)
    remove_ours(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}
    (tmp_path / name).unlink()
    remove_ours(tmp_path)
    assert tmp_path.exists() == ("/" in name)


def test_a_link_to_a_shard_is_not_ours(tmp_path):
    (tmp_path / "tar").write_text("mine")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00000.tar").symlink_to(tmp_path / "tar")
    with pytest.raises(DataError, match=r"holds 'shard-00000\.tar'"):
        refuse_foreign(tmp_path / "shards")
    remove_ours(tmp_path / "shards")
    assert (tmp_path / "shards" / "shard-00000.tar").read_text() == "mine"


# --- what is where a conversion writes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "suffix"), FORMATS.items())
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_where_a_file_shall_be_is_found_out_first(folder, tmp_path, console, to, suffix, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"val{suffix}").touch() if to == "webdataset" else (out / f"val{suffix}").mkdir()
    kind = "directory" if to == "webdataset" else "regular file"
    with pytest.raises(DataError, match=rf"val{suffix}: exists already and is no {kind}.*choose another place"):
        convert(str(folder), out, to, overwrite=overwrite, console=console)
    assert [path.name for path in out.iterdir()] == [f"val{suffix}"]


@pytest.mark.parametrize("name", ["notes.txt", "shard-00000.tar.gz", "shard-00001.idx/x"])
def test_a_foreign_file_among_shards_is_named_and_nothing_is_replaced(folder, tmp_path, console, name):
    out = tmp_path / "out"
    convert(str(folder), out, "webdataset", console=console)
    (out / "train" / name).parent.mkdir(exist_ok=True)
    (out / "train" / name).write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match=rf"train: holds '{name.split('/')[0]}'.*did not write.*move it away"):
        convert(str(folder), out, "webdataset", overwrite=True, console=console)
    assert contents(out) == before


def test_a_directory_that_is_not_of_shards_is_not_replaced(folder, tmp_path, console):
    (tmp_path / "out" / "val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val: exists already and holds no index\.npz, so it is not replaced"):
        convert(str(folder), tmp_path / "out", "webdataset", overwrite=True, console=console)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["val"]


@pytest.mark.parametrize("place", ["notes.txt", "photos/1.jpg"])
def test_what_else_is_in_the_destination_stays(folder, tmp_path, console, place):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    for overwrite in (False, True):
        convert(str(folder), tmp_path / "out", "ffcv", overwrite=overwrite, console=console)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("to", "suffix"), FORMATS.items())
def test_a_link_where_a_file_shall_be_is_not_replaced(folder, tmp_path, console, to, suffix):
    convert(str(folder), tmp_path / "disk", to, max_side=8, console=console)
    before = contents(tmp_path / "disk")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"val{suffix}").symlink_to(tmp_path / "disk" / f"val{suffix}")
    with pytest.raises(DataError, match=rf"val{suffix}: is a link, which would be replaced; remove it"):
        convert(str(folder), tmp_path / "out", to, overwrite=True, console=console)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"val{suffix}"]
    assert contents(tmp_path / "disk") == before


def test_a_destination_that_is_a_link_is_followed(folder, tmp_path, console):
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    convert(str(folder), tmp_path / "link", "tensor", console=console)
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "disk" / "data").splits.keys() == {"train", "val"}


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
    said = console.file.getvalue()
    assert f"train.safetensors stays in {out}, but manifest.json lists it no more" in said
    convert(str(folder), out, "ffcv", split="train", overwrite=True, console=console)
    assert "stays" not in console.file.getvalue().removeprefix(said)  # it has been said


def test_a_destination_inside_the_source_is_refused_however_it_is_written(folder, tmp_path, console, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(folder / "train")
    for src, dst in (
        ("~/src", "~/src/out"),
        (str(folder), "~/src/out"),
        ("~/src", str(folder / "a" / "out")),
        ("~/src", str(tmp_path / "link" / "out")),
    ):
        with pytest.raises(DataError, match="lies inside, .* choose another place"):
            convert(src, Path(dst), "tensor", console=console)
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
