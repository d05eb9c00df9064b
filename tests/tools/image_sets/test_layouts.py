import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.images import BadImage, scan_folder
from ressl.batch import DataError
from tools.image_sets import detect


def write_tar(path, files):
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name.endswith("/"):
                member.type, member.size = tarfile.DIRTYPE, 0
            file.addfile(member, io.BytesIO(data))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)


def write_directory(path, files):
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)


WRITERS = {"src": write_directory, "src.tar": write_tar, "src.zip": write_zip}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Writes files, whose content is their name, to one kind of source, and gives its path."""

    def run(*names, **texts):
        files = {name: name.encode() for name in names} | {name: text.encode() for name, text in texts.items()}
        WRITERS[request.param](tmp_path / request.param, files)
        return str(tmp_path / request.param)

    return run


def summary(images):
    """Name -> class; and reading gives what is under the name."""
    result = {}
    for i, label in enumerate(images.labels.tolist()):
        assert images.read(i).decode().endswith(images.name(i))
        assert images.stamp(i)[0] > 0
        result[images.name(i)] = images.classes[label] if label >= 0 else None
    return result


def test_class_directories_are_classes_numbered_by_name(write):
    source = write("b/1.jpg", "b/deep/2.png", "a c/3.jpg", "a/4.jpg", "empty/", "beside.jpg", "b/x.gif", ".h/5.jpg")
    origin = detect(source)
    images = origin.sets["train"]()
    assert images.classes == ("a", "a c", "b", "empty")
    assert summary(images) == {"a/4.jpg": "a", "a c/3.jpg": "a c", "b/1.jpg": "b", "b/deep/2.png": "b"}
    assert list(summary(images)) == ["a/4.jpg", "a c/3.jpg", "b/1.jpg", "b/deep/2.png"]
    assert images.notes == (
        "ignored 2 other files (1 (outside the class directories), 1 .gif)",
        "classes without images, which keep their numbers: empty",
    )
    assert list(origin.sets) == ["train"]
    assert origin.description.endswith("4 class directories")
    assert images.labels.dtype == np.int64
    assert images.chunk == 64


def test_a_directory_is_listed_as_the_folder_source_lists_it(tmp_path):
    names = [
        "b/1.jpg",
        "b/deep/2.png",
        "a c/3.jpg",
        "a/4.jpg",
        "e/._x.png",
        "beside.jpg",
        "b/x.gif",
        ".h/5.jpg",
        "a.b/6.tif",
    ]
    write_directory(tmp_path / "src", dict.fromkeys(names, b"x"))
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src" / "a")
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "src" / "b")
    images, folder = detect(str(tmp_path / "src")).sets["train"](), scan_folder(tmp_path / "src")
    assert tuple(images.name(i) for i in range(len(images.labels))) == folder.paths
    assert images.labels.tolist() == folder.labels.tolist()
    assert images.classes == folder.classes


def test_flat_images_have_no_labels(write):
    images = detect(write("2.jpg", "1.png", "notes.txt")).sets["train"]()
    assert summary(images) == {"1.png": None, "2.jpg": None}
    assert (images.labels.tolist(), images.classes) == ([-1, -1], ())


def test_a_set_without_images_is_refused(write):
    source = write("a/1.gif", "b/", "c.txt")
    with pytest.raises(
        DataError, match=r"no images found \(looked for \.jpg .*\): only 2 other files \(1 \.gif, 1 \.txt\)"
    ):
        detect(source).sets["train"]()


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_splits_share_the_class_numbers_of_train(write, name):
    origin = detect(write("train/cat/1.jpg", "train/dog/2.jpg", "train/owl/3.jpg", f"{name}/owl/4.jpg", "more/5.jpg"))
    assert origin.description.endswith(f", train from train/, val from {name}/; not used: more")
    train, val = (origin.sets[split]() for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog", "owl")
    assert summary(train) == {"cat/1.jpg": "cat", "dog/2.jpg": "dog", "owl/3.jpg": "owl"}
    assert summary(val) == {"owl/4.jpg": "owl"}


def test_classes_that_train_does_not_have_are_refused(write):
    origin = detect(write("train/cat/1.jpg", "val/cat/2.jpg", "val/yak/3.jpg"))
    with pytest.raises(DataError, match=r"/val: classes that .*/train does not have: yak; make the directories match"):
        origin.sets["val"]()


@pytest.mark.parametrize("top", ["set/", "down/loads/set/"])
def test_a_directory_around_everything_is_entered(write, top):
    origin = detect(write(f"{top}train/cat/1.jpg", f"{top}val/cat/2.jpg", f"{top}readme.txt"))
    assert f", inside {top}, train from train/, val from val/" in origin.description
    assert summary(origin.sets["val"]()) == {"cat/2.jpg": "cat"}


def test_a_directory_around_class_directories_is_entered(write):
    assert summary(detect(write("set/cat/1.jpg", "set/dog/2.jpg")).sets["train"]()) == {
        "cat/1.jpg": "cat",
        "dog/2.jpg": "dog",
    }


def test_one_class_is_not_entered(write):
    assert summary(detect(write("cat/1.jpg", "cat/2.jpg")).sets["train"]()) == {"cat/1.jpg": "cat", "cat/2.jpg": "cat"}


@pytest.mark.parametrize("inside", ["cat/1.jpg", "2.jpg"])
def test_all_images_in_one_class_are_told(write, inside):
    source = write(f"train/images/{inside}", f"train/images/x{inside}", "train/annotations/1.xml")
    note = "all images are in one class, images"
    if "/" in inside:
        place = "unpack it and give " if Path(source).suffix else f"give {source}/"
        note += f": if its sub-directories are the classes, {place}train/images"
    assert detect(source).sets["train"]().notes[-1] == note


def test_archives_beside_directories_are_named(tmp_path):
    write_directory(tmp_path / "src", {"logs/plot.png": b"1"})
    write_tar(tmp_path / "src" / "train.tar", {"a/1.jpg": b"1"})
    assert detect(str(tmp_path / "src")).description == (
        f"image folder (not used: train.tar) {tmp_path}/src, 1 class directory"
    )


def test_images_of_an_archive_that_are_damaged_are_bad_images(tmp_path):
    write_zip(tmp_path / "src.zip", {"a/1.jpg": b"stored" * 100, "a/2.jpg": b"b"})
    data = bytearray((tmp_path / "src.zip").read_bytes())
    data[40:44] = bytes(4)
    (tmp_path / "src.zip").write_bytes(data)
    images = detect(str(tmp_path / "src.zip")).sets["train"]()
    with pytest.raises(BadImage, match="damaged in the (zip file|archive)"):
        images.read(0)
    assert images.read(1) == b"b"


# --- TinyImageNet ----------------------------------------------------------------------------------------------------

TINY = (
    "train/n02/images/n02_0.JPEG",
    "train/n01/images/n01_0.JPEG",
    "train/n01/images/n01_1.JPEG",
    "test/images/t_0.JPEG",
)
TINY_VAL = ("val/images/val_0.JPEG", "val/images/val_1.JPEG")


@pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
def test_tiny_imagenet_is_read_as_it_is_published(write, top):
    texts = {
        "wnids.txt": "n02\nn01\nn03\n",
        "words.txt": "n01\tone\nn02\ttwo",
        "train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t62\t62\n",
        "val/val_annotations.txt": "val_1.JPEG\tn01\t0\t32\t44\t62\nval_0.JPEG\tn02\t1\t1\t9\t9\n",
    }
    source = write(*(top + name for name in (*TINY, *TINY_VAL)), **{top + name: text for name, text in texts.items()})
    origin = detect(source)
    assert origin.description.startswith("TinyImageNet in ")
    assert origin.description.endswith(": train, val with val_annotations.txt, test without labels")
    train, val, test = (origin.sets[split]() for split in ("train", "val", "test"))
    assert train.classes == val.classes == test.classes == ("n01", "n02", "n03")
    assert summary(train) == {
        "n01/images/n01_0.JPEG": "n01", "n01/images/n01_1.JPEG": "n01", "n02/images/n02_0.JPEG": "n02",
    }  # fmt: skip
    assert train.notes[-1] == "classes without images, which keep their numbers: n03"
    assert summary(val) == {"val_0.JPEG": "n02", "val_1.JPEG": "n01"}
    assert summary(test) == {"images/t_0.JPEG": None}


def test_tiny_imagenet_whose_val_was_sorted_into_classes_is_read(write):
    origin = detect(write(*TINY, "val/n02/val_0.JPEG", **{"wnids.txt": "n02\nn01"}))
    assert summary(origin.sets["val"]()) == {"n02/val_0.JPEG": "n02"}


@pytest.mark.parametrize(
    ("text", "message"), [("val_0.JPEG\tn09\n", "got 'val_0.JPEG n09'"), ("", "empty"), ("x", "'x'")]
)
def test_damaged_annotations_are_refused(write, text, message):
    origin = detect(write(*TINY, *TINY_VAL, **{"wnids.txt": "n02\nn01", "val/val_annotations.txt": text}))
    with pytest.raises(DataError, match=rf"val/val_annotations\.txt: .*{message}"):
        origin.sets["val"]()


# --- a list of labels ------------------------------------------------------------------------------------------------


def listed(source, tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    origin = detect(source, tmp_path / "labels.csv")
    assert origin.description.endswith("src" + Path(source).suffix + f", labels from {tmp_path / 'labels.csv'}")
    return origin.sets["train"]()


@pytest.mark.parametrize("top", ["", "top/"])
def test_a_list_gives_labels_to_images_anywhere(write, tmp_path, top):
    source = write(f"{top}1.jpg", f"{top}sub/2.jpg", f"{top}sub/3.jpg", f"{top}sub/x.txt")
    images = listed(source, tmp_path, "path,label\nsub/2.jpg,dog\n1.jpg,cat\nsub/gone.jpg,dog\n")
    names = [images.name(i) for i in range(3)]
    assert sorted(names) == names
    labels = dict(zip(names, images.labels.tolist(), strict=True))
    assert labels == {f"{top}1.jpg": 0, f"{top}sub/2.jpg": 1, "sub/gone.jpg": 1}
    assert images.classes == ("cat", "dog")
    here, gone = names.index(f"{top}sub/2.jpg"), names.index("sub/gone.jpg")
    assert images.read(here).decode() == f"{top}sub/2.jpg"
    with pytest.raises(BadImage, match="no such file"):
        images.read(gone)
    assert images.stamp(gone) == (-1, -1)
    assert images.stamp(here)[0] > 0
    assert images.notes == (
        f"1 images that {tmp_path / 'labels.csv'} does not list are left out",
        f"1 files that {tmp_path / 'labels.csv'} lists are not there",
    )


def test_integers_without_a_gap_are_kept_and_others_numbered_anew(write, tmp_path):
    source = write("1.jpg", "2.jpg", "x.gif")
    assert listed(source, tmp_path, "1.jpg 1\n2.jpg 0\n").labels.tolist() == [1, 0]
    images = listed(source, tmp_path, "1.jpg 12\n2.jpg 3\nx.gif 3")
    assert (images.labels.tolist(), images.classes) == ([1, 0, 0], ("3", "12"))
    assert "numbered anew" in images.notes[0]
    with pytest.raises(BadImage, match=r"not an image by its name: \.gif"):
        images.read(2)


def test_a_list_of_other_files_is_refused(write, tmp_path):
    source = write("1.jpg", "2.jpg")
    with pytest.raises(DataError, match=r"labels\.csv: none of the 2 files .* the first is 1/a\.jpg"):
        listed(source, tmp_path, "1/a.jpg,1\n1/b.jpg,0\n")
    with pytest.raises(DataError, match=r"labels\.csv: line 2: 1\.jpg is there already, on line 1"):
        listed(source, tmp_path, "1.jpg,1\n1.jpg,0\n")


def test_one_image_under_two_paths_is_refused(write, tmp_path):
    with pytest.raises(DataError, match=r"lists images twice under different paths, such as top/1\.jpg and 1; remove"):
        listed(write("top/1.jpg", "top/2.jpg"), tmp_path, "top/2.jpg a\ntop/1.jpg a\ngone.jpg a\n1 a\n")


def test_absolute_paths_in_a_list_are_found(tmp_path):
    write_directory(tmp_path / "src", {"a b/1.jpg": b"1"})
    images = listed(str(tmp_path / "src"), tmp_path, f"{tmp_path}/src/a b/1.jpg,cat\n")
    assert images.read(0) == b"1"


# --- detect ----------------------------------------------------------------------------------------------------------


def test_archives_beside_each_other_are_one_set(tmp_path):
    (tmp_path / "src").mkdir()
    write_zip(tmp_path / "src" / "train.zip", {"train/cat/1.jpg": b"1", "train/dog/2.jpg": b"2"})
    write_zip(tmp_path / "src" / "val.zip", {"dog/3.jpg": b"3"})
    origin = detect(str(tmp_path / "src"))
    words = f"2 archives (train.zip, val.zip) in {tmp_path / 'src'}"
    assert origin.description == f"{words}, train from train/, val from val/"
    train, val = (origin.sets[split]() for split in ("train", "val"))
    assert (train.labels.tolist(), val.labels.tolist(), val.classes) == ([0, 1], [1], ("cat", "dog"))
    assert val.read(0) == b"3"


def test_one_archive_in_a_directory_is_read_and_a_compressed_one_beside_it_named(tmp_path):
    (tmp_path / "src").mkdir()
    write_tar(tmp_path / "src" / "images.tar", {"cat/1.jpg": b"1", "dog/2.jpg": b"2"})
    assert detect(str(tmp_path / "src")).description == f"tar file {tmp_path}/src/images.tar, 2 class directories"
    tarfile.open(tmp_path / "src" / "more.tar.gz", "w:gz").close()
    words = f"1 archive (images.tar; not used: more.tar.gz) in {tmp_path}/src, 2 class directories"
    assert detect(str(tmp_path / "src")).description == words


def test_an_archive_for_each_class_makes_classes(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("n02", "n01", "n03"):
        write_tar(tmp_path / "src" / f"{name}.tar", {f"{name}_{i}.JPEG": name.encode() for i in range(name != "n03")})
    images = detect(str(tmp_path / "src")).sets["train"]()
    assert images.classes == ("n01", "n02", "n03")
    assert [images.read(i) for i in range(2)] == [b"n01", b"n02"]


@pytest.mark.parametrize(
    ("mode", "words"), [("w:gz", "gzip.*gunzip --keep"), ("w:xz", "xz.*unxz"), ("w:bz2", "bzip2.*bunzip2")]
)
def test_compressed_archives_are_to_be_decompressed_first(tmp_path, mode, words):
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / f"images.tar.{mode[2:]}"
    tarfile.open(path, mode).close()
    for source in (path, path.parent):
        with pytest.raises(DataError, match=rf"{path}: compressed as a whole \({words}.*a \.tar is read as it is"):
            detect(str(source))


def test_sources_that_nobody_understands_are_refused(tmp_path):
    (tmp_path / "text").write_text("text")
    (tmp_path / "text.tar").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    for source, message in {
        tmp_path / "text": "text: not understood; looked for a directory of images .*ImageNet's archives, WebDataset",
        tmp_path / "missing": "missing: no such directory or file; give the folder or the archive",
        tmp_path / "text" / "below": "cannot be read: Not a directory",
        tmp_path / "fifo": "fifo: neither a directory nor a regular file",
        "~nosuchuser/data": "~nosuchuser/data: no such user; give another place",
        "zero\0byte": "cannot be read",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
        tmp_path / "text.tar": "not understood",
    }.items():
        with pytest.raises(DataError, match=message):
            detect(str(source))
    with pytest.raises(DataError, match="torchvision:MNIST: has labels of its own; leave out .*labels.csv"):
        detect("torchvision:MNIST", tmp_path / "labels.csv")
    write_directory(tmp_path / "src", {"1.jpg": b"1"})
    with pytest.raises(DataError, match="no such user"):
        detect(str(tmp_path / "src"), Path("~nosuchuser/labels"))


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    write_directory(tmp_path / "src", {"a/1.jpg": b"1"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(detect("~/src").sets["train"]().labels) == 1


def test_archives_that_are_cut_off_are_refused(tmp_path):
    for name, writer in WRITERS.items():
        if name != "src":
            writer(tmp_path / name, {"a/1.jpg": b"1" * 2000, "b/2.jpg": b"2" * 2000})
            data = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(data[: len(data) // 2])
            with pytest.raises(DataError, match=rf"{name}: .*byte [\d,]+.*get it again"):
                detect(str(tmp_path / name))
