"""What the journal says of the past is true, whatever moment the process that wrote it died at."""

import base64
import json
import os
import resource
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ressl.batch import DataError
from tools import journal
from tools.encode import Skipped
from tools.journal import JOURNAL, OLD, PART, Chunk, Past, WorkDirectory
from tools.rows import ROW

HEADER = {"options": {"to": "ffcv"}, "splits": {"val": 1, "train": 2, "unlabeled": 3}}  # in an order of its own


def chunk(number: int, images: int = 3) -> Chunk:
    rows = np.zeros(images, ROW)
    rows["index"] = np.arange(images) + 4 * number
    rows["crc32"] = np.random.default_rng(number).integers(1 << 32, size=images)
    skipped = (Skipped(4 * number + 3, f"a/ü{number}.jpg", "it\nis \x00 bad", (-1, -1)),)
    return Chunk(rows, skipped if number % 2 else ())


def same(one: Past, other: Past) -> bool:
    return (one.header, one.sealed, list(one.chunks)) == (other.header, other.sealed, list(other.chunks)) and all(
        len(mine) == len(theirs)
        and all(np.array_equal(a.rows, b.rows) and a.skipped == b.skipped for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(one.chunks.values(), other.chunks.values(), strict=True)
    )


def read(dst: Path) -> Past:
    with closing(WorkDirectory(dst)) as work:
        return work.read()


def write_past(dst: Path) -> list[Past]:
    """A journal of a header, five chunks of two splits and a seal; what it said after each line."""
    told = [Past()]
    with closing(WorkDirectory(dst)) as work:
        work.begin(HEADER)
        told.append(work.read())
        for number, split in enumerate(("val", "train", "val", "train", "train")):
            work.commit([(split, len(told[-1].chunks.get(split, ())), chunk(number))], [])
            work.settle()
            told.append(work.read())
        (work.path / "manifest.json").touch()
        (work.path / "a.beton").touch()
        work.seal(["manifest.json", "a.beton"])
        told.append(work.read())
    return told


# --- what was written is read ----------------------------------------------------------------------------------------


def test_what_was_noted_is_read_back_in_its_order(tmp_path):
    write_past(tmp_path)
    past = read(tmp_path)
    assert past.header == HEADER
    assert list(past.header["splits"]) == ["val", "train", "unlabeled"]
    assert list(past.sealed) == ["manifest.json", "a.beton"]
    expected = Past(HEADER, {"val": [chunk(0), chunk(2)], "train": [chunk(1), chunk(3), chunk(4)]}, past.sealed)
    assert same(past, expected)


def test_a_journal_cut_anywhere_says_what_was_true_before_and_can_be_written_on(tmp_path):
    told = write_past(tmp_path)
    path = tmp_path / PART / JOURNAL
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    assert len(ends) == len(told) == 8
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends) - 1
        with closing(WorkDirectory(tmp_path)) as work:
            assert same(work.read(), told[lines]), cut
            assert path.stat().st_size == ends[lines]
            if cut % 50 == 0:
                work.commit([("more", 0, chunk(9))], [])
                work.settle()
                assert same(Past(chunks={"more": work.read().chunks["more"]}), Past(chunks={"more": [chunk(9)]})), cut


def test_a_byte_that_changes_anywhere_takes_away_what_follows_and_adds_nothing(tmp_path):
    told = write_past(tmp_path)
    path = tmp_path / PART / JOURNAL
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        line = whole[:position].count(b"\n")
        assert same(read(tmp_path), told[line]), position


@pytest.mark.parametrize("text", [b"[1, 2]", b"text", b'{"a": 1', b"\xff"])
def test_a_line_that_is_no_record_ends_the_past(tmp_path, text):
    told = write_past(tmp_path)
    path = tmp_path / PART / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((*lines[:3], b"%08x %s\n" % (zlib.crc32(text), text), *lines[3:])))
    assert same(read(tmp_path), told[3])


@pytest.mark.parametrize(
    "change",
    [{"rows": base64.b64encode(zlib.compress(bytes(100))).decode()}, {"skipped": [[1, "a"]]}],
    ids=["rows", "skipped"],
)
def test_a_journal_of_another_version_is_refused_and_kept(tmp_path, change):
    write_past(tmp_path)
    path = tmp_path / PART / JOURNAL
    record = json.loads(path.read_bytes().splitlines()[2].split(b" ", 1)[1])
    text = json.dumps(record | {"chunk": 3} | change).encode()
    with path.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"convert\.part: begun by another version of this program; remove it to begin"):
        read(tmp_path)
    assert path.read_bytes() == before


def test_what_was_noted_twice_counts_once(tmp_path):
    with closing(WorkDirectory(tmp_path)) as work:
        work.begin(HEADER)
        work.commit([("train", 0, chunk(0)), ("train", 1, chunk(1)), ("val", 0, chunk(5))], [])
        work.commit([("train", 1, chunk(1)), ("train", 2, chunk(2))], [])
        work.settle()
    assert same(read(tmp_path), Past(HEADER, {"train": [chunk(0), chunk(1), chunk(2)], "val": [chunk(5)]}))


def test_a_journal_with_a_gap_is_refused_and_kept(tmp_path):
    with closing(WorkDirectory(tmp_path)) as work:
        work.begin(HEADER)
        work.commit([("train", 0, chunk(0)), ("train", 2, chunk(2))], [])
        work.settle()
    before = (tmp_path / PART / JOURNAL).read_bytes()
    with pytest.raises(DataError, match=r"convert\.part: its journal lacks a line; remove it to begin anew"):
        read(tmp_path)
    assert (tmp_path / PART / JOURNAL).read_bytes() == before


@pytest.mark.parametrize("number", [0, 1, 3])
def test_chunks_that_are_taken_back_are_gone_and_others_take_their_place(tmp_path, number):
    with closing(WorkDirectory(tmp_path)) as work:
        work.begin(HEADER)
        work.commit([("val", 0, chunk(7)), *(("train", i, chunk(i)) for i in range(3))], [])
        work.settle()
        work.forget("train", number)
        left = [chunk(i) for i in range(number)]
        assert same(work.read(), Past(HEADER, {"val": [chunk(7)], "train": left}))
        work.commit([("train", number, chunk(9))], [])
        work.settle()
    assert same(read(tmp_path), Past(HEADER, {"val": [chunk(7)], "train": [*left, chunk(9)]}))


# --- what is noted is on the disk ------------------------------------------------------------------------------------


def test_data_is_on_the_disk_before_it_is_noted_and_noted_before_it_counts(tmp_path, monkeypatch):
    calls = []

    def call(name, real, handle, *rest):
        calls.append((name, Path(f"/proc/self/fd/{handle}").readlink().name, threading.current_thread().name))
        return real(handle, *rest)

    for name in ("fsync", "fdatasync", "write"):
        monkeypatch.setattr(os, name, partial(call, name, getattr(os, name)))
    with closing(WorkDirectory(tmp_path)) as work:
        (work.path / "data").touch()
        work.commit([("train", 0, chunk(0))], [work.path / "data"])
        work.settle()
    assert [call[:2] for call in calls] == [("fsync", "data"), ("write", JOURNAL), ("fdatasync", JOURNAL)]
    assert {call[2] for call in calls} == {"journal_0"}  # the parent goes on meanwhile


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond it: a full disk without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_line_that_a_full_disk_tears_is_taken_back_and_none_comes_behind_it(tmp_path, room):
    with closing(WorkDirectory(tmp_path)) as work:
        work.begin(HEADER)
        work.commit([("train", 0, chunk(0))], [])
        work.settle()
        size = (work.path / JOURNAL).stat().st_size
        with file_size_limit(size + room):
            work.commit([("train", 1, chunk(1))], [])
            with pytest.raises(OSError, match="File too large"):
                work.settle()
        for _ in range(2):  # there is room again, but a chunk is missing
            with pytest.raises(OSError, match="File too large"):
                work.commit([("train", 2, chunk(2))], [])
        assert (work.path / JOURNAL).stat().st_size == size
    with closing(WorkDirectory(tmp_path)) as work:
        work.commit([("train", 1, chunk(1))], [])
        work.settle()
        assert same(work.read(), Past(HEADER, {"train": [chunk(0), chunk(1)]}))


# --- whose directory it is -------------------------------------------------------------------------------------------


def test_a_directory_that_another_process_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.1)
    with closing(WorkDirectory(tmp_path)) as work:
        work.begin(HEADER)
        with pytest.raises(DataError, match="another process is converting into it; wait for it or choose another"):
            WorkDirectory(tmp_path)
        assert work.read().header == HEADER
    assert read(tmp_path).header == HEADER


def test_one_that_lets_go_soon_is_waited_for(tmp_path):
    work = WorkDirectory(tmp_path)
    timer = threading.Timer(0.2, work.close)
    timer.start()
    assert same(read(tmp_path), Past())
    timer.join()


def test_one_that_finishes_meanwhile_leaves_nothing_to_go_on_with(tmp_path):
    work = WorkDirectory(tmp_path)

    def finish() -> None:
        work.discard()
        work.close()

    timer = threading.Timer(0.2, finish)
    timer.start()
    with pytest.raises(DataError, match="another process is converting into it"):
        WorkDirectory(tmp_path)
    timer.join()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_somebody_else_is_refused(tmp_path):
    (tmp_path / PART).mkdir()
    (tmp_path / PART / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"convert\.part: holds 'notes\.txt', which `convert` did not write; move it"):
        WorkDirectory(tmp_path)
    assert [path.name for path in (tmp_path / PART).iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "notes", "train/notes.txt", "photos/1.jpg", "train.beton.bak", ".old/mine/x", ".hidden"]
)
def test_a_foreign_file_is_not_removed_with_ours(tmp_path, name):
    with closing(WorkDirectory(tmp_path / "new")) as work:
        work.begin(HEADER)
        (work.path / name).parent.mkdir(parents=True, exist_ok=True)
        (work.path / name).write_text("mine")
        for ours in ("train.beton", "train.beton.index.npz", "v-1_x.safetensors", "manifest.json", "val/index.npz"):
            (work.path / ours).parent.mkdir(exist_ok=True)
            (work.path / ours).touch()
        work.clear()
        left = {path.relative_to(work.path).as_posix() for path in work.path.rglob("*") if path.is_file()}
        assert left == {JOURNAL, name}
        assert same(work.read(), Past())
        work.discard()
        assert [path.read_text() for path in work.path.rglob("*") if path.is_file()] == ["mine"]


def test_discarding_removes_the_directories_that_were_made_and_no_others(tmp_path):
    (tmp_path / "a").mkdir()
    with closing(WorkDirectory(tmp_path / "a" / "b" / "c")) as work:
        work.begin(HEADER)
        work.discard()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_link_in_place_of_the_directory_is_refused(tmp_path):
    """It may lead to another disk, from which nothing can be renamed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PART).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"convert\.part: is a link, out of which files could not be renamed"):
        WorkDirectory(tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_place_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/out: cannot be written: Not a directory; choose another place"):
        WorkDirectory(tmp_path / "file" / "out")


# --- names -----------------------------------------------------------------------------------------------------------


def fill(work: WorkDirectory, text: str) -> list[str]:
    (work.path / "val").mkdir()
    for name in ("train.beton", "val/index.npz", "val/shard-00000.tar", "manifest.json"):
        (work.path / name).write_text(text)
    return ["train.beton", "val", "manifest.json"]


def test_outputs_replace_older_ones_and_the_directory_is_gone(tmp_path):
    for text in ("old", "new"):
        with closing(WorkDirectory(tmp_path)) as work:
            work.publish(work.seal(fill(work, text)))
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(("train.beton", "val/index.npz", "val/shard-00000.tar", "manifest.json"), "new")
    assert not (tmp_path / PART).exists()


def test_what_somebody_puts_into_a_directory_while_it_is_replaced_is_kept(tmp_path):
    with closing(WorkDirectory(tmp_path)) as work:
        work.publish(work.seal(fill(work, "old")))
    with closing(WorkDirectory(tmp_path)) as work:
        (tmp_path / "val" / "notes.txt").write_text("mine")
        work.publish(work.seal(fill(work, "new")))
    assert [path.name for path in (tmp_path / PART).rglob("*")] == [OLD, "val", "notes.txt"]
    assert (tmp_path / "val" / "index.npz").read_text() == "new"


def test_an_output_that_somebody_replaced_after_it_got_its_name_is_told(tmp_path):
    with closing(WorkDirectory(tmp_path)) as work:
        sealed = work.seal(fill(work, "new"))
    (tmp_path / PART / "train.beton").rename(tmp_path / "train.beton")  # and there it was killed
    (tmp_path / "other").write_text("other")
    (tmp_path / "other").rename(tmp_path / "train.beton")
    with (
        closing(WorkDirectory(tmp_path)) as work,
        pytest.raises(
            DataError, match=r"train\.beton: removed or replaced while it was converted; remove .*convert\.part"
        ),
    ):
        work.publish(work.read().sealed)
    assert (tmp_path / "train.beton").read_text() == "other"
    (tmp_path / "train.beton").unlink()
    with closing(WorkDirectory(tmp_path)) as work, pytest.raises(DataError, match="removed or replaced"):
        work.publish(sealed)
