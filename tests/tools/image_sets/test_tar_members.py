import io
import os
import tarfile

import numpy as np
import pytest

from pipelines.images import BadImage
from ressl.batch import DataError
from tools.image_sets.members import BROKEN_LINK, DEVICE, LINK, PLAIN, SPARSE, MemberFiles, join
from tools.image_sets.tar_members import is_tar, list_inner_tar, list_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path, files, tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(members):
    files = MemberFiles(members)
    return {name: files.read(i) for i, name in enumerate(members.names)}


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_every_format_lists_what_the_standard_library_lists(tmp_path, tar_format):
    draw = np.random.default_rng(0)
    names = ["a.jpg", "d/b.jpg", "é/ü.png", "x" * 99 + "/" + "y" * 96 + ".jpg"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "name.jpg"]
    files = {name: draw.bytes(int(draw.integers(0, 3000))) for name in names}
    path = write_tar(tmp_path / "a.tar", files, tar_format)
    assert contents(list_tar(path)) == files
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    members = list_tar(path)
    assert list(zip(members.names, members.offset.tolist(), members.size.tolist(), strict=True)) == expected


def test_directories_links_and_devices_are_told_apart(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [
            ("d", tarfile.DIRTYPE), ("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE),
            ("fifo.jpg", tarfile.FIFOTYPE), ("null.jpg", tarfile.CHRTYPE), ("file.jpg", tarfile.REGTYPE),
            ("old.jpg", tarfile.AREGTYPE),
        ]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "file.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member)
    members = list_tar(tmp_path / "a.tar")
    assert members.directories == ("d",)
    assert dict(zip(members.names, members.kind.tolist(), strict=True)) == {
        "soft.jpg": LINK, "hard.jpg": BROKEN_LINK, "fifo.jpg": DEVICE, "null.jpg": DEVICE, "file.jpg": PLAIN,
        "old.jpg": PLAIN,
    }  # fmt: skip


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_a_hard_link_is_another_name_for_what_is_before_it(tmp_path, tar_format):
    long = "long/" * (40 if tar_format != tarfile.USTAR_FORMAT else 10) + "a.jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for name, data in (("./b.jpg", b"old"), (long, b"a" * 700), ("./b.jpg", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (("1.jpg", long), ("2.jpg", "1.jpg"), ("3.jpg", "./b.jpg"), ("4.jpg", "gone.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    members = list_tar(tmp_path / "a.tar")
    files, place = MemberFiles(members), {name: i for i, name in enumerate(members.names)}
    assert [files.read(place[f"{i}.jpg"]) for i in (1, 2, 3)] == [b"a" * 700, b"a" * 700, b"b"]
    with pytest.raises(BadImage, match="a hard link to a file that is not before it in the tar file"):
        files.read(place["4.jpg"])


def test_a_file_whose_name_ends_in_a_slash_is_a_directory_as_in_the_oldest_archives(tmp_path):
    header = bytearray(tarfile.TarInfo("cats").tobuf(tarfile.USTAR_FORMAT))
    header[:8] = b"./cats/\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    assert (list_tar(tmp_path / "a.tar").directories, list_tar(tmp_path / "a.tar").names) == (("cats",), ())


def test_what_follows_the_end_mark_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 700}).read_bytes()
    end = whole.rstrip(b"\0").rfind(b"a") + 1
    mark = end + -end % 512
    preallocated = whole[:mark] + bytes(99_999)
    for data, message in [
        (whole + whole, f"something else at byte {len(whole):,}, behind tar's end mark at byte {mark:,}: two archives"),
        (whole[: mark + 512] + whole, "something else at byte"),
        (preallocated, "bytes more, behind tar's end mark at byte .*a download that is not finished; get it again"),
        (preallocated + whole, "bytes more, behind tar's end mark"),
        (bytes(1_000_448), "1,000,448 bytes more, behind tar's end mark at byte 0"),
    ]:
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(DataError, match=rf"b\.tar: .*{message}"):
            list_tar(tmp_path / "b.tar")
    outer = list_tar(write_tar(tmp_path / "outer.tar", {"x.tar": whole + whole}))
    with pytest.raises(DataError, match=r"outer\.tar: x\.tar: something else at byte"):
        list_inner_tar(outer, 0, str)


@pytest.mark.parametrize("blocks", [2, 20, 63, 128, 2048, 32768])
def test_zeros_up_to_a_tapes_record_are_padding(tmp_path, blocks):
    data = write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 700}).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512 + 1024)
    (tmp_path / "a.tar").write_bytes(data)
    os.truncate(tmp_path / "a.tar", len(data) + -len(data) % (512 * blocks))
    assert list_tar(tmp_path / "a.tar").names == ("a.jpg",)


def test_a_hole_of_hundreds_of_gigabytes_is_found_without_reading_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"a"})
    os.truncate(path, 138_000_000_000)
    with pytest.raises(DataError, match=r"137,999,99\d,\d\d\d bytes more, behind tar's end mark at byte 1,024"):
        list_tar(path)


def gnu_sparse(data, more):
    """A GNU sparse member with `more` further maps behind its header, as tar --sparse writes it."""
    member = tarfile.TarInfo("sparse.jpg")
    member.type, member.size = b"S", len(data)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[482] = more > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    maps = b"".join(bytes(504) + bytes([i + 1 < more]) + bytes(7) for i in range(more))
    return bytes(header) + maps + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_sparse_members_are_passed_over(tmp_path, more):
    after = write_tar(tmp_path / "after.tar", {"b.jpg": b"b"}).read_bytes()
    (tmp_path / "a.tar").write_bytes(gnu_sparse(b"x" * 700, more) + after)
    members = list_tar(tmp_path / "a.tar")
    assert members.names == ("sparse.jpg", "b.jpg")
    assert members.kind.tolist() == [SPARSE, PLAIN]
    assert MemberFiles(members).read(1) == b"b"


def test_a_pax_sparse_member_is_known_by_its_records(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("GNUSparseFile.0/s.jpg")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("b.jpg"))
    assert list_tar(tmp_path / "a.tar").kind.tolist() == [SPARSE, PLAIN]


def test_names_cannot_leave_the_tree(tmp_path):
    names = ["./a.jpg", "/etc/b.jpg", "../../c.jpg", "d/../../e.jpg", "f//g.jpg", "h/./i.jpg", "..j/k.jpg", "l/.m.jpg"]
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    assert list_tar(path).names == (
        "a.jpg", "etc/b.jpg", "c.jpg", "d/e.jpg", "f/g.jpg", "h/i.jpg", "..j/k.jpg", "l/.m.jpg",
    )  # fmt: skip


def test_an_archive_that_is_cut_off_anywhere_is_refused_with_its_byte(tmp_path):
    data = write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 10}).read_bytes()
    end = 2 * 512 + 1024 + 512  # of the last member; zeros follow
    assert data[end - 512 :].startswith(b"b" * 10 + bytes(502) + bytes(1024))
    cut = tmp_path / "cut.tar"
    for length in range(100, end + 512, 100):
        cut.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"cut\.tar: .*byte {length:,}.*get it again"):
            list_tar(cut)
    cut.write_bytes(data[: end + 512])
    assert list_tar(cut).names == ("a.jpg", "b.jpg")


def test_a_damaged_header_is_refused_with_its_byte_and_does_not_end_the_list(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 10}).read_bytes())
    for place in (0, 124, 148, 300):
        damaged = bytearray(data)
        damaged[1536 + place] ^= 0x40
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar: no header of a member at byte 1,536"):
            list_tar(tmp_path / "a.tar")


def test_any_flipped_bytes_give_a_list_or_a_data_error(tmp_path):
    files = {"a.jpg": b"a" * 600, "long/" * 40 + "b.jpg": b"b", "c.jpg": b"c" * 10}
    data = write_tar(tmp_path / "a.tar", files, tarfile.PAX_FORMAT).read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        block = int(draw.integers(0, len(data) // 512 - 16)) * 512
        for at in draw.integers(0, 512, 4):
            damaged[block + at] = int(draw.integers(0, 256))
        header = damaged[block : block + 512]  # with a checksum that fits, so that the fields behind it are looked at
        header[148:156] = b" " * 8
        damaged[block + 148 : block + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "b.tar").write_bytes(damaged)
        try:
            members = list_tar(tmp_path / "b.tar")
        except DataError as error:
            assert "b.tar" in str(error)
        else:
            assert (members.offset + members.size <= len(data)).all()


def test_sums_of_signed_bytes_are_accepted_as_old_writers_made_them(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"é.jpg": b"a"}).read_bytes())
    field = bytes(data[148:156])
    signed = sum(byte - 256 * (byte > 127) for byte in data[:512]) - sum(field) + 8 * 32
    data[148:156] = b"%06o\0 " % signed
    (tmp_path / "a.tar").write_bytes(data)
    assert list_tar(tmp_path / "a.tar").names == ("é.jpg",)


def test_a_size_in_base_256_is_understood(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"a.jpg": b"abc"}).read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert contents(list_tar(tmp_path / "a.tar")) == {"a.jpg": b"abc"}


def test_inner_archives_are_read_in_place(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b"}).read_bytes()
    outer = list_tar(write_tar(tmp_path / "outer.tar", {"x.tar": inner[: 3 * 512 + 1024], "y.tar": inner}))
    for member in (0, 1):  # the first ends behind its last member, without an end mark
        assert contents(list_inner_tar(outer, member, "c/{}".format)) == {"c/a.jpg": b"a" * 600, "c/b.jpg": b"b"}
    cut = list_tar(write_tar(tmp_path / "cut.tar", {"x.tar": inner[:1000]}))
    with pytest.raises(DataError, match=r"cut\.tar: x\.tar: .*ends at byte 1,512"):
        list_inner_tar(cut, 0, str)


def test_the_list_may_stop_early(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" for i in range(9)})
    assert list_tar(path, limit=2).names == ("0.jpg", "1.jpg")


def test_an_archive_that_changes_after_it_was_listed_is_not_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"a"})
    files = MemberFiles(list_tar(path))
    write_tar(path, {"b.jpg": b"b" * 20000})
    with pytest.raises(DataError, match="changed since it was listed"):
        files.read(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more: No such file"):
        files.read(0)


def test_more_archives_than_may_stay_open_are_read(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": bytes([i])}) for i in range(5)]
    files = MemberFiles(join([list_tar(path) for path in paths]), max_open=2)
    assert [files.read(i) for i in (0, 1, 2, 3, 4, 0, 4)] == [bytes([i]) for i in (0, 1, 2, 3, 4, 0, 4)]
    assert len(files.files) == 2


def test_forked_processes_read_at_once_and_get_their_own_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 5000 for i in range(50)})
    files = MemberFiles(list_tar(path))
    files.read(0)  # so that the file is open before the fork
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            right = all(files.read(i) == bytes([i]) * 5000 for _ in range(20) for i in range(child, 50, 4))
            os._exit(0 if right else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4


def test_what_is_no_tar_file_is_told_from_one(tmp_path):
    (tmp_path / "text").write_bytes(b"text " * 200)
    os.mkfifo(tmp_path / "fifo")
    assert is_tar(write_tar(tmp_path / "a", {"a.jpg": b"a"}))
    assert is_tar(write_tar(tmp_path / "empty", {}))
    assert not any(is_tar(tmp_path / name) for name in ("text", "fifo", "missing"))
    with pytest.raises(DataError, match="fifo: not a regular file"):
        list_tar(tmp_path / "fifo")
    with pytest.raises(DataError, match="missing: cannot be read: No such file"):
        list_tar(tmp_path / "missing")
