import zipfile

import numpy as np
import pytest

from pipelines.images import MAX_BYTES, BadImage
from ressl.batch import DataError
from tools.image_sets.members import MemberFiles
from tools.image_sets.zip_members import is_zip, list_zip


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def contents(members):
    files = MemberFiles(members)
    return {name: files.read(i) for i, name in enumerate(members.names)}


FILES = {"a.jpg": b"abc" * 1000, "d/b.jpg": b"", "é/ü.png": bytes(range(256)), "c.jpg": b"c"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_members_come_back(tmp_path, method):
    assert contents(list_zip(write_zip(tmp_path / "a.zip", FILES, method))) == FILES


def test_64_bit_tables_and_members_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # so that the library writes what large files need
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in FILES.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert b"PK\6\6" in (tmp_path / "a.zip").read_bytes()
    assert contents(list_zip(tmp_path / "a.zip")) == FILES


def test_bytes_before_the_zip_and_a_comment_behind_it_do_no_harm(tmp_path):
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip", FILES), "a") as file:
        file.comment = b"words of thanks" * 50
    plain = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(b"PK\3\4 an unpacker" * 7 + plain)
    assert contents(list_zip(tmp_path / "a.zip")) == contents(list_zip(tmp_path / "b.zip")) == FILES


def test_names_of_other_systems_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("one/x.jpg", "tw0/y.jpg", "../../z.jpg", "/w.jpg", "empty/", "./cats/"):
            file.writestr(name, b"")
    data = (tmp_path / "a.zip").read_bytes().replace(b"one/x", b"one\\x").replace(b"tw0/y", b"tw\x94/y")
    (tmp_path / "a.zip").write_bytes(data)
    members = list_zip(tmp_path / "a.zip")
    assert members.names == ("one/x.jpg", "twö/y.jpg", "z.jpg", "w.jpg")
    assert members.directories == ("empty", "cats")


def test_a_link_is_told_from_a_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, "a.jpg")
        file.writestr("a.jpg", b"a")
    assert len(set(list_zip(tmp_path / "a.zip").kind.tolist())) == 2


def patched(tmp_path, place, value, files=FILES):
    """A zip whose first entry has another value in the table of contents, `place` bytes after its start."""
    data = bytearray(write_zip(tmp_path / "a.zip", files).read_bytes())
    at = data.find(b"PK\1\2") + place
    data[at : at + len(value)] = value
    (tmp_path / "a.zip").write_bytes(data)
    return MemberFiles(list_zip(tmp_path / "a.zip"))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, b"\1\0", "encrypted"),
        (10, b"\x0e\0", "another method than deflate"),
        (16, b"\0\0\0\0", "its checksum differs"),
        (20, b"\5\0\0\0", r"damaged in the archive: \d+ bytes, but 3,000 are listed"),
        (24, b"\1\0\0\0", "2 bytes, but 1 are listed"),
        (24, (MAX_BYTES + 1).to_bytes(4, "little"), "over the limit of 1 GiB a file"),
        (42, b"\3\0\0\0", "does not begin where the table of contents says"),
    ],
)
def test_a_member_that_cannot_be_read_is_a_bad_image_and_the_others_are_read(tmp_path, place, value, reason):
    files = patched(tmp_path, place, value)
    with pytest.raises(BadImage, match=reason):
        files.read(0)
    assert files.read(2) == FILES["é/ü.png"]


def test_a_bomb_is_not_unpacked(tmp_path):
    files = patched(tmp_path, 24, (100).to_bytes(4, "little"), {"a.jpg": bytes(50_000_000)})
    with pytest.raises(BadImage, match="101 bytes, but 100 are listed"):
        files.read(0)


def test_damaged_data_is_a_bad_image(tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", FILES).read_bytes())
    data[35:45] = b"\xff" * 10
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BadImage, match="its deflated data cannot be read"):
        MemberFiles(list_zip(tmp_path / "a.zip")).read(0)


def test_a_zip_that_is_cut_off_anywhere_is_refused_with_its_byte(tmp_path):
    data = write_zip(tmp_path / "a.zip", FILES).read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"cut\.zip: .*byte {length:,}.*get it again"):
            list_zip(cut)


def test_any_flipped_bytes_give_a_list_or_a_data_error(tmp_path):
    data = write_zip(tmp_path / "a.zip", FILES).read_bytes()
    draw = np.random.default_rng(0)
    table = data.find(b"PK\1\2")
    for _ in range(500):
        damaged = bytearray(data)
        for at in draw.integers(table, len(data), 2):
            damaged[at] = int(draw.integers(0, 256))
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            files = MemberFiles(list_zip(tmp_path / "b.zip"))
        except DataError as error:
            assert "b.zip" in str(error)
            continue
        for i in range(len(files.members.offset)):
            try:
                assert len(files.read(i)) <= 3000
            except BadImage as bad:
                assert "\n" not in str(bad)


def test_one_part_of_several_is_refused(tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", FILES).read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 4 : end + 8] = b"\1\0\1\0"
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match="one part of a zip file in several; join them"):
        list_zip(tmp_path / "a.zip")


def test_what_is_no_zip_file_is_told_from_one(tmp_path):
    (tmp_path / "text").write_text("text")
    assert is_zip(write_zip(tmp_path / "a", FILES))
    assert is_zip(write_zip(tmp_path / "empty", {}))
    assert not is_zip(tmp_path / "text")
    assert not is_zip(tmp_path / "missing")
    with pytest.raises(DataError, match="no table of contents"):
        list_zip(tmp_path / "text")
