import io
import os
import tarfile
import zipfile

import pytest

from pipelines.images import BadImage
from ressl.batch import DataError
from tools.image_sets.members import stamp_of
from tools.image_sets.tree import Tree, directory_tree, list_archive, member_tree, merge_archives, read_text

FILES = {
    "a/1.jpg": b"1", "a/deep/er/2.PNG": b"2", "a b/3.webp": b"3", "a.jpg": b"beside", "z.gif": b"", "words.txt": b"w",
    "a/._1.jpg": b"", ".hidden/4.jpg": b"4", "a/.cache/5.jpg": b"5", "README": b"",
}  # fmt: skip


def write(kind, root, files):
    """The same files in a directory, a tar file or a zip, as a tree."""
    if kind == "directory":
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return directory_tree(root)
    path = root / f"files.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
    else:
        with tarfile.open(path, "w") as file:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return member_tree(kind, path, list_archive(path))


@pytest.fixture(params=["directory", "tar", "zip"])
def kind(request):
    return request.param


@pytest.fixture
def tree(kind, tmp_path) -> Tree:
    return write(kind, tmp_path, FILES)


def test_images_are_listed_by_suffix_in_the_order_of_directories(tree):
    listing = tree.images("")
    assert listing.names == ("a/1.jpg", "a/deep/er/2.PNG", "a b/3.webp", "a.jpg")
    assert [listing.read(i) for i in range(4)] == [b"1", b"2", b"3", b"beside"]
    assert listing.ignored == {"(hidden)": 1, "(no suffix)": 1, ".gif": 1, ".txt": 1}


def test_a_directory_in_it_is_listed_by_itself(tree):
    listing = tree.images("a")
    assert listing.names == ("1.jpg", "deep/er/2.PNG")
    assert [listing.read(i) for i in range(2)] == [b"1", b"2"]
    assert listing.ignored == {"(hidden)": 1}
    assert tree.images_in("a").names == ("1.jpg",)
    assert tree.images_in("").names == ("a.jpg",)
    assert tree.images_in("").ignored == {"(no suffix)": 1, ".gif": 1, ".txt": 1}


def test_directories_are_named_without_hidden_ones(tree):
    assert tree.directories("") == ("a", "a b")
    assert tree.directories("a") == ("deep",)
    assert tree.directories("a/deep/er") == tree.directories("no/such") == ()


def test_a_text_is_read_whole_and_may_be_missing(tree):
    assert tree.text("words.txt") == "w"
    assert tree.text("others.txt") is None


def test_the_stamp_is_that_of_what_holds_the_image(kind, tree, tmp_path):
    holder = tmp_path / ("a/1.jpg" if kind == "directory" else f"files.{kind}")
    listing = tree.images("")
    status = holder.stat()
    assert listing.stamp(0) == stamp_of(holder) == (status.st_size, status.st_mtime_ns)
    assert tree.identity == ("" if kind == "directory" else f"files.{kind} {status.st_size} {status.st_mtime_ns}")
    holder.unlink()
    assert listing.stamp(0) == (-1, -1)


def test_an_image_that_goes_away_is_a_bad_image(tmp_path):
    listing = write("directory", tmp_path, FILES).images("")
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(BadImage, match="no such file"):
        listing.read(0)
    os.mkfifo(tmp_path / "a" / "1.jpg")
    with pytest.raises(BadImage, match="FIFO"):
        listing.read(0)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_empty_directory_in_an_archive_is_there(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name in ("./top", "./top/empty"):
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("top/empty/", b"")
    tree = member_tree(kind, path, list_archive(path))
    assert tree.directories("") == ("top",)
    assert tree.directories("top") == ("empty",)
    assert tree.images("").names == ()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_with_one_name_the_later_one_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in [
            ("a.jpg", b"old"),
            ("b.jpg", b"b"),
            ("./a.jpg", b"new"),
            ("w.txt", b"old"),
            ("w.txt", b"new"),
        ]:
            file.writestr(name, data)
    tree = member_tree("zip", tmp_path / "a.zip", list_archive(tmp_path / "a.zip"))
    listing = tree.images("")
    assert listing.names == ("a.jpg", "b.jpg")
    assert listing.read(0) == b"new"
    assert listing.ignored["(replaced later in the archive)"] == 1
    assert tree.text("w.txt") == "new"


def test_links_in_an_archive_are_counted_and_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, type_ in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type_, "a.jpg"
            tar.addfile(member)
    listing = member_tree("tar", tmp_path / "a.tar", list_archive(tmp_path / "a.tar")).images("")
    assert listing.names == ("a.jpg",)
    assert listing.ignored == {"(device)": 1, "(link)": 1}


def test_what_a_mac_adds_to_a_zip_is_not_there(tmp_path):
    tree = write("zip", tmp_path, {"a/1.jpg": b"1", "__MACOSX/a/._1.jpg": b"", "__MACOSX/a/2.jpg": b""})
    assert tree.directories("") == ("a",)
    assert tree.images("").names == ("a/1.jpg",)
    assert tree.images("").ignored == {}


def test_archives_come_together_by_what_they_hold(tmp_path):
    (tmp_path / "parts").mkdir()
    for name, files in {
        "n1.tar": {"1.jpg": b"1"}, "train.tar": {"train/a/2.jpg": b"2"}, "part-1.zip": {"a/3.jpg": b"3"},
        "part-2.zip": {"a/4.jpg": b"4", "b/5.jpg": b"5"},
    }.items():  # fmt: skip
        kind = name.rpartition(".")[2]
        write(kind, tmp_path, files)
        (tmp_path / f"files.{kind}").rename(tmp_path / "parts" / name)
    paths = sorted((tmp_path / "parts").iterdir())
    tree = member_tree("archives", tmp_path / "parts", merge_archives({path: list_archive(path) for path in paths}))
    listing = tree.images("")
    assert listing.names == ("a/3.jpg", "a/4.jpg", "b/5.jpg", "n1/1.jpg", "train/train/a/2.jpg")
    assert [listing.read(i) for i in range(5)] == [b"3", b"4", b"5", b"1", b"2"]
    assert tree.identity.count(";") == 3


def test_an_image_that_two_archives_have_under_one_name_is_refused(tmp_path):
    for name, extra in (("part1", "x.txt"), ("part2", "a/1.jpg")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as file:
            for member in ("a/0.jpg", "a/readme.txt", "a/.0.jpg", extra):
                file.writestr(member, name)
    archives = merge_archives({path: list_archive(path) for path in sorted(tmp_path.iterdir())})
    with pytest.raises(DataError, match=r"part1\.zip: a/0\.jpg is in part2\.zip too, so they are no parts of one set"):
        member_tree("archives", tmp_path, archives)


def test_files_beside_images_may_be_in_two_archives(tmp_path):
    for name in ("1", "2"):
        with zipfile.ZipFile(tmp_path / f"part{name}.zip", "w") as file:
            for member in (f"a/{name}.jpg", "a/readme.txt", "a/._1.jpg"):
                file.writestr(member, name)
    archives = merge_archives({path: list_archive(path) for path in sorted(tmp_path.iterdir())})
    tree = member_tree("archives", tmp_path, archives)
    assert tree.images("").names == ("a/1.jpg", "a/2.jpg")
    assert tree.text("a/readme.txt") == "2"


def test_a_directory_is_listed_once(tmp_path):
    tree = write("directory", tmp_path, {"1.jpg": b"1", "x.gif": b""})
    first = tree.images_in("")
    (tmp_path / "2.jpg").write_bytes(b"2")
    assert tree.images_in("") is tree.images("") is first
    assert directory_tree(tmp_path).images("").names == ("1.jpg", "2.jpg")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_in_unicode_are_read(tmp_path, encoding):
    (tmp_path / "w.txt").write_bytes("é.jpg\t1\n".encode(encoding))
    assert read_text(tmp_path / "w.txt") == "é.jpg\t1\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.jpg".encode("utf-16-le"), "zero bytes in it; save it again, in UTF-8"),
        (b"\xff\xfea", "damaged text in UTF-16"),
    ],
)
def test_texts_in_other_encodings_are_refused(tmp_path, data, message):
    (tmp_path / "w.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"w\.txt: .*{message}"):
        read_text(tmp_path / "w.txt")


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="fifo: not a regular file"):
        read_text(tmp_path / "fifo")
    with pytest.raises(DataError, match="missing: cannot be read: no such file"):
        read_text(tmp_path / "missing")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("w.txt", b"words")
    data = (tmp_path / "a.zip").read_bytes().replace(b"words", b"swrod")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip: w\.txt: .*its checksum differs"):
        member_tree("zip", tmp_path / "a.zip", list_archive(tmp_path / "a.zip")).text("w.txt")
