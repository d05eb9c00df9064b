"""The index beside a .beton or tensor file: read back as it was written, and never believed when it is damaged."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ressl.batch import DataError
from tools.index_file import FORMAT, join_names, read_index_file, write_index_file

NAMES = ["a/1.jpg", "a/é.jpg", "", "b/日本.png"]
CRC = np.array([1, 2**32 - 1, 0, 7], np.uint32)
DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def path(tmp_path) -> Path:
    write_index_file(tmp_path / "a.beton.index.npz", CRC, NAMES, DIGEST)
    return tmp_path / "a.beton.index.npz"


def test_what_is_written_is_read_back(path):
    index = read_index_file(path)
    assert index.crc32.tolist() == CRC.tolist()
    assert [index.name(i) for i in range(len(NAMES))] == NAMES
    assert index.tables_sha256 == DIGEST


def test_the_same_contents_give_the_same_bytes(path, tmp_path):
    write_index_file(tmp_path / "other.npz", CRC.astype(np.int64), iter(NAMES), DIGEST)
    assert (tmp_path / "other.npz").read_bytes() == path.read_bytes()


def test_names_are_joined_in_utf8_and_what_is_none_is_replaced(tmp_path):
    joined, ends = join_names(["é", "bad\udcff"])
    assert (joined.tobytes(), ends.tolist()) == ("ébad?".encode(), [2, 6])
    joined, ends = join_names([])
    assert (len(joined), len(ends)) == (0, 0)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("format", np.array(b"ressl-index-9"), f"not an index of the format {FORMAT.decode()}"),
        ("format", np.array([FORMAT, FORMAT]), "not an index of the format"),
        ("crc32", None, "damaged; copy it"),
        ("crc32", CRC.astype(np.int64), "other types or shapes"),
        ("crc32", CRC[:3], "other types or shapes"),
        ("crc32", np.array(3, np.uint32), "other types or shapes"),
        ("crc32", np.array([print] * 4, object), "damaged; copy it"),
        ("names", np.zeros((2, 2), np.uint8), "other types or shapes"),
        ("name_end", np.array([7, 3, 3, 29]), "impossible lengths"),
        ("name_end", np.array([-1, 3, 3, 3]), "impossible lengths"),
        ("tables_sha256", np.array(b"short"), "other types or shapes"),
        ("tables_sha256", np.array(3), "other types or shapes"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(path, part, value, message):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | {part: value}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=rf"a\.beton\.index\.npz: .*{message}.*again"):
        read_index_file(path)


def test_what_is_no_index_is_refused(path):
    whole, array = path.read_bytes(), io.BytesIO()
    np.save(array, np.arange(9))
    for data in (b"", b"text", array.getvalue(), b"\x80\x04K\x01."):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a zip file"):
            read_index_file(path)
    for data in (b"PK", whole[:-1], whole[: len(whole) // 2], whole.replace(b"NUMPY", b"DUMMY")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged; copy it or convert again"):
            read_index_file(path)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("format", "crc32", "names", "name_end", "tables_sha256"):
            file.writestr(name, b"no array")
    with pytest.raises(DataError, match=r"index\.npz: "):
        read_index_file(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_index_file(path)
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        read_index_file(path)


def test_flipped_bytes_never_crash(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            read_index_file(path)
        except DataError as error:
            assert "\n" not in str(error)
