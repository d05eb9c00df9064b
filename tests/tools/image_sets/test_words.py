import io
import tarfile
import zipfile

import pytest

from ressl.batch import DataError
from tools.image_sets import detect
from tools.image_sets.words import by_split, split_in, split_of


def write_zip(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)


def write_tar(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            file.addfile(member, io.BytesIO(name.encode()))


def write_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.mark.parametrize(
    ("name", "whole", "within"),
    [
        ("train", "train", "train"), ("Training", "train", "train"), ("VALIDATION", "val", "val"),
        ("dev", "val", "val"), ("test", "test", "test"), ("imagenet1k-validation-07", "", "val"),
        ("train2017", "", "train"), ("trainer", "", ""), ("retrain", "", ""), ("train-val", "", ""),
        ("train_training", "", "train"), ("", "", ""),
    ],
)  # fmt: skip
def test_a_split_is_known_by_a_whole_name_or_by_the_words_in_it(name, whole, within):
    assert (split_of(name), split_in(name)) == (whole, within)


def test_two_names_for_one_split_are_refused():
    assert by_split("src", ("cat", "Val", "train")) == {"train": "train", "val": "Val"}
    assert by_split("src", ("a_test", "a_train")) == {"train": "a_train", "test": "a_test"}
    assert (
        by_split("src", ("bullet_train", "freight_train"))
        == by_split("src", ("bullet_train", "test_tube_x", "y"))
        == {}
    )
    with pytest.raises(DataError, match="src: val and validation both name the split val; leave one of them there"):
        by_split("src", ("train", "val", "validation"))


@pytest.mark.parametrize("val", ["validation", "Val", "valid", "dev", "test"])
@pytest.mark.parametrize("layout", ["folders", "archives", "named archives", "shards", "named shards"])
def test_every_layout_knows_the_same_words(tmp_path, layout, val):
    for train, owls in (("Training", 0), (val, 1)):
        match layout:
            case "folders":
                write_files(tmp_path, f"{train}/cat/{owls}.jpg", f"{train}/owl/{owls}.jpg")
            case "archives":
                write_zip(tmp_path / f"{train}.zip", "cat/0.jpg", "owl/0.jpg")
            case "named archives":
                write_zip(tmp_path / f"ds_{train}.zip", f"ds_{train}/cat/0.jpg", f"ds_{train}/owl/0.jpg")
            case "shards":
                write_tar(tmp_path / train / "00.tar", "0.jpg", "0.cls", "1.jpg", "1.cls")
            case "named shards":
                write_tar(tmp_path / f"x-{train}-0.tar", "0.jpg", "0.cls", "1.jpg", "1.cls")
    sets = detect(str(tmp_path)).sets
    assert list(sets) == ["train", "test" if "shards" in layout and val == "test" else "val"]
    if "shards" not in layout:
        assert [load().labels.tolist() for load in sets.values()] == [[0, 1], [0, 1]]
        assert [load().classes for load in sets.values()] == [("cat", "owl"), ("cat", "owl")]


def test_a_directory_named_like_a_split_is_no_class(tmp_path):
    write_files(tmp_path / "src", "Train/a/0.jpg", "extra/b/0.jpg", "more/c/0.jpg")
    with pytest.raises(DataError) as caught:
        detect(str(tmp_path / "src"))
    assert str(caught.value) == (
        f"{tmp_path}/src: Train/ is named like a split, but what is beside it is not: extra, more; for this split "
        f"alone give {tmp_path}/src/Train; if all are classes, move all into a directory named train"
    )
    (tmp_path / "src").rename(tmp_path / "train")
    write_files(tmp_path / "train", "Train/0.jpg")
    assert detect(str(tmp_path)).sets["train"]().classes == ("Train", "extra", "more")


def test_a_split_alone_keeps_its_name(tmp_path):
    write_files(tmp_path, "validation/a/0.jpg", "validation/b/0.jpg")
    origin = detect(str(tmp_path))
    assert list(origin.sets) == ["val"]
    assert origin.sets["val"]().classes == ("a", "b")


def test_an_archive_named_like_a_split_beside_others_is_refused(tmp_path):
    write_zip(tmp_path / "train.zip", "cat/0.jpg")
    write_zip(tmp_path / "more.zip", "cat/1.jpg", "dog/1.jpg")
    with pytest.raises(
        DataError, match="train/ is named like a split, but what is beside it is not: cat, dog; .*unpack"
    ):
        detect(str(tmp_path))
    (tmp_path / "train.zip").rename(tmp_path / "my_train.zip")
    with pytest.raises(DataError, match=r"my_train\.zip: by its name the split train, but more\.zip beside it"):
        detect(str(tmp_path))


def test_directories_of_shards_that_are_no_splits_are_named(tmp_path):
    for name in ("train", "extra"):
        write_tar(tmp_path / name / "0.tar", "0.jpg", "0.cls")
    assert detect(str(tmp_path)).description.endswith("train from train/0.tar; not used: extra")
