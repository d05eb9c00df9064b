import io
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from pipelines.images import BadImage
from ressl.batch import DataError
from tools.image_sets import detect

WNIDS = ("n01440764", "n01443537", "n02123045", "n07753592")
IDS = {"n01440764": 3, "n01443537": 1, "n02123045": 4, "n07753592": 2}  # as in the true kit: not in the order of wnids
ABOVE = ("n00001740", "n02084071")  # synsets with others below them: no classes
TRUTH = (2, 1, 4, 3, 3, 1)  # numbers of the six images of val
VAL_CLASSES = tuple({number: name for name, number in IDS.items()}[number] for number in TRUTH)
KIT = "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def train_files():
    """Class -> its images: a different number in each class, none in the third."""
    return {
        wnid: {f"{wnid}_{10 + i * 7}.JPEG": f"{wnid} {i}".encode() * 50 for i in range(count)}
        for wnid, count in zip(WNIDS, (3, 1, 0, 2), strict=True)
    }


def val_files():
    return {f"ILSVRC2012_val_{i + 1:08}.JPEG": f"val {i + 1}".encode() for i in range(len(TRUTH))}


def meta_bytes(ids=IDS):
    """The kit's structure: a column of structs, those of the classes first, in the order of their numbers."""
    names = [*sorted(ids, key=ids.__getitem__), *ABOVE]
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synsets = np.zeros((len(names), 1), [(field, object) for field in fields])
    for i, name in enumerate(names):
        children = np.arange(1, 3, dtype=np.uint16)[None] if name in ABOVE else np.zeros((1, 0), np.uint16)
        synsets[i, 0] = (
            np.uint16(i + 1), name, f"word {i}, other word", "words about it", np.uint8(children.size), children,
            np.uint8(0 if name in ids else 1), np.uint16(1300 if name in ids else 0),
        )  # fmt: skip
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


def ground_truth():
    return "".join(f"{number}\n" for number in TRUTH).encode()


def write_kit(place, packed=True):
    files = {f"{KIT}/{META}": meta_bytes(), f"{KIT}/{GROUND_TRUTH}": ground_truth(), f"{KIT}/readme.txt": b"words"}
    with tarfile.open(place / f"{KIT}.tar.gz", "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if not packed:
        with tarfile.open(place / f"{KIT}.tar.gz") as tar:
            tar.extractall(place, filter="data")
        (place / f"{KIT}.tar.gz").unlink()


@pytest.fixture
def downloads(tmp_path):
    """The official archives with their kit."""
    place = tmp_path / "downloads"
    place.mkdir()
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in reversed(train_files().items())}
    (place / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    (place / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val_files()))
    write_kit(place)
    return place


def summary(images):
    """Name -> class and bytes."""
    labels = [images.classes[label] if label >= 0 else None for label in images.labels.tolist()]
    return {images.name(i): (label, images.read(i)) for i, label in enumerate(labels)}


def expected_val():
    return {name: (wnid, data) for (name, data), wnid in zip(val_files().items(), VAL_CLASSES, strict=True)}


def test_both_archives_are_read_as_they_are(downloads):
    origin = detect(str(downloads))
    assert origin.description == (
        f"ImageNet's archives in {downloads}: train from ILSVRC2012_img_train.tar (4 inner archives), val from "
        "ILSVRC2012_img_val.tar with the devkit's labels"
    )
    train, val = (origin.sets[split]() for split in ("train", "val"))
    assert train.classes == val.classes == WNIDS
    assert summary(train) == {
        f"{wnid}/{name}": (wnid, data) for wnid, files in train_files().items() for name, data in files.items()
    }
    assert summary(val) == expected_val()
    assert val.notes == ()
    assert train.notes == (
        "listed 6 files in 4 inner archives",
        "classes without images, which keep their numbers: n02123045",
    )


def test_the_sets_are_those_of_class_directories(downloads, tmp_path):
    folder = tmp_path / "folder"
    for wnid, files in train_files().items():
        (folder / "train" / wnid).mkdir(parents=True)
        for name, data in files.items():
            (folder / "train" / wnid / name).write_bytes(data)
    for (name, data), wnid in zip(val_files().items(), VAL_CLASSES, strict=True):
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnid / name).write_bytes(data)
    ours, theirs = detect(str(downloads)).sets, detect(str(folder)).sets
    train, other = ours["train"](), theirs["train"]()
    assert [train.name(i) for i in range(6)] == [other.name(i) for i in range(6)]
    assert train.labels.tolist() == other.labels.tolist()
    assert train.classes == other.classes
    val, other = ours["val"](), theirs["val"]()
    assert val.classes == other.classes
    by_name = {other.name(i).split("/")[1]: int(other.labels[i]) for i in range(len(TRUTH))}
    assert {val.name(i): int(val.labels[i]) for i in range(len(TRUTH))} == by_name


def test_an_archive_can_be_given_itself(downloads):
    train = detect(str(downloads / "ILSVRC2012_img_train.tar"))
    assert list(train.sets) == ["train"]
    assert train.description == (
        f"ImageNet's archive in {downloads}: train from ILSVRC2012_img_train.tar (4 inner archives)"
    )
    assert train.sets["train"]().classes == WNIDS
    val = detect(str(downloads / "ILSVRC2012_img_val.tar"))
    assert list(val.sets) == ["val"]
    assert val.sets["val"]().classes == WNIDS
    (downloads / "ILSVRC2012_img_val.tar").rename(downloads / "renamed.tar")
    assert summary(detect(str(downloads / "renamed.tar")).sets["val"]()) == expected_val()


def test_the_kit_may_be_unpacked(downloads):
    (downloads / f"{KIT}.tar.gz").unlink()
    write_kit(downloads, packed=False)
    assert summary(detect(str(downloads)).sets["val"]()) == expected_val()


def test_a_class_that_train_lacks_keeps_its_number(downloads):
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in train_files().items() if wnid != WNIDS[0]}
    (downloads / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    train = detect(str(downloads)).sets["train"]()
    assert train.classes == WNIDS
    assert train.labels.tolist() == [1, 3, 3]


KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{i + 1:08},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n"
    for i, wnid in reversed(list(enumerate(VAL_CLASSES)))
)


def test_kaggles_list_will_do(downloads):
    (downloads / f"{KIT}.tar.gz").unlink()
    (downloads / "LOC_val_solution.csv").write_text(KAGGLE)
    origin = detect(str(downloads))
    assert origin.description.endswith("val from ILSVRC2012_img_val.tar with the labels of LOC_val_solution.csv")
    val = origin.sets["val"]()
    assert summary(val) == expected_val()
    assert val.classes == WNIDS


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_a_list_of_labels_comes_before_the_kit(downloads, tmp_path, alone, as_numbers):
    names = list(val_files())
    wnids = WNIDS[::-1] + WNIDS[:2]
    lines = [f"{name} {WNIDS.index(wnid) if as_numbers else wnid}" for name, wnid in zip(names, wnids, strict=True)]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    source = downloads / "ILSVRC2012_img_val.tar" if alone else downloads
    val = detect(str(source), tmp_path / "val.txt").sets["val"]()
    assert val.labels.tolist() == [3, 2, 1, 0, 0, 1]
    assert val.classes == (("0", "1", "2", "3") if alone and as_numbers else WNIDS)


def test_the_kits_own_numbers_in_a_list_are_not_taken_for_ours(downloads, tmp_path):
    (tmp_path / "val.txt").write_text("\n".join(f"{name} {i}" for name, i in zip(val_files(), TRUTH, strict=True)))
    with pytest.raises(DataError, match=r"val\.txt: numbers as labels have to be from 0 to 3, .*write the ids"):
        detect(str(downloads), tmp_path / "val.txt")


def test_a_list_of_labels_is_not_for_train(downloads, tmp_path):
    with pytest.raises(DataError, match=r"val\.txt: a list of labels is for ILSVRC2012_img_val\.tar, which is not in"):
        detect(str(downloads / "ILSVRC2012_img_train.tar"), tmp_path / "val.txt")


def test_val_without_labels_says_which_file_to_put_where(downloads):
    (downloads / f"{KIT}.tar.gz").unlink()
    for source, alone in ((downloads, True), (downloads / "ILSVRC2012_img_val.tar", False)):
        with pytest.raises(DataError) as caught:
            detect(str(source))
        message = str(caught.value)
        assert message.startswith(
            f"{downloads}/ILSVRC2012_img_val.tar: the labels of its images are missing: put {KIT}"
        )
        assert f"into {downloads}" in message
        assert ("to convert train alone" in message) == alone


def test_test_has_no_labels(downloads):
    files = {f"test/ILSVRC2012_test_{i:08}.JPEG": b"test" for i in range(1, 4)}
    (downloads / "ILSVRC2012_img_test_v10102019.tar").write_bytes(tar_bytes(files))
    origin = detect(str(downloads))
    assert list(origin.sets) == ["train", "val", "test"]
    test = origin.sets["test"]()
    assert summary(test) == dict.fromkeys(files, (None, b"test"))
    assert test.classes == WNIDS
    alone = detect(str(downloads / "ILSVRC2012_img_test_v10102019.tar"))
    assert list(alone.sets) == ["test"]
    assert alone.sets["test"]().labels.tolist() == [-1] * 3


def test_an_image_that_val_lacks_stays_and_cannot_be_read(downloads):
    files = val_files()
    del files["ILSVRC2012_val_00000002.JPEG"]
    (downloads / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))
    val = detect(str(downloads)).sets["val"]()
    assert len(val.labels) == len(TRUTH)
    with pytest.raises(BadImage, match="no such file"):
        val.read(1)
    assert val.read(2) == b"val 3"


@pytest.mark.parametrize(
    ("truth", "meta", "message"),
    [
        (b"1\n9\n", None, "9 is no number of a synset"),
        (b"1\nx\n", None, "is no number of a synset"),
        (None, b"no such thing", r"data/meta\.mat is damaged"),
    ],
)
def test_a_damaged_kit_is_refused(downloads, truth, meta, message):
    (downloads / f"{KIT}.tar.gz").unlink()
    (downloads / KIT / "data").mkdir(parents=True)
    (downloads / KIT / META).write_bytes(meta or meta_bytes())
    (downloads / KIT / GROUND_TRUTH).write_bytes(truth or ground_truth())
    with pytest.raises(DataError, match=message):
        detect(str(downloads))
    (downloads / KIT / META).unlink()
    with pytest.raises(DataError, match=r"meta\.mat: no such file; unpack the development kit again"):
        detect(str(downloads))


def test_a_kit_that_is_cut_off_is_refused(downloads):
    kit = downloads / f"{KIT}.tar.gz"
    data = kit.read_bytes()
    kit.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"{kit}: damaged"):
        detect(str(downloads))
    with tarfile.open(kit, "w:gz"):
        pass
    with pytest.raises(DataError, match=r"no data/.*ground_truth\.txt and no data/meta\.mat in it"):
        detect(str(downloads))


def test_archives_that_are_cut_off_are_refused(downloads):
    train = downloads / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"train\.tar: .*byte 5,000: cut off or damaged; get it again"):
        detect(str(downloads))
    at = whole.find(b"n01440764_17.JPEG")
    train.write_bytes(whole[:at] + b"m" + whole[at + 1 :])
    with pytest.raises(DataError, match=rf"train\.tar: n01440764\.tar: no header of a member at byte {at:,}"):
        detect(str(downloads)).sets["train"]()


def test_without_scipy_its_name_is_told(downloads, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"scipy is needed to read data/meta\.mat; install scipy"):
        detect(str(downloads))


def test_an_archive_that_changes_has_another_identity(downloads):
    before = detect(str(downloads)).sets["val"]().identity
    assert before.startswith("ILSVRC2012_img_val.tar ")
    files = val_files() | {"ILSVRC2012_val_00000006.JPEG": b"other" * 9999}
    (downloads / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))
    val = detect(str(downloads)).sets["val"]()
    assert val.identity != before


@pytest.mark.parametrize("kaggle", [False, True])
def test_a_ground_truth_that_is_shorter_than_val_is_refused(downloads, kaggle):
    if kaggle:
        (downloads / f"{KIT}.tar.gz").unlink()
        (downloads / "LOC_val_solution.csv").write_text(KAGGLE)
    files = val_files() | {"ILSVRC2012_val_00000007.JPEG": b"more"}
    (downloads / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(files))
    with pytest.raises(DataError, match=r"6 labels for the 7 images in .*ILSVRC2012_img_val\.tar; get it again"):
        detect(str(downloads)).sets["val"]()


def test_a_users_list_may_name_some_images_of_val(downloads, tmp_path):
    (tmp_path / "val.txt").write_text(f"ILSVRC2012_val_00000002.JPEG {WNIDS[3]}\n")
    val = detect(str(downloads), tmp_path / "val.txt").sets["val"]()
    assert summary(val) == {"ILSVRC2012_val_00000002.JPEG": (WNIDS[3], b"val 2")}
    assert "5 images that" in val.notes[0]


@pytest.mark.parametrize("top", ["", "val/"])
def test_val_that_was_sorted_into_classes_is_a_tree_of_classes(tmp_path, top):
    files = {f"{top}{wnid}/{name}": data for (name, (wnid, data)) in expected_val().items()}
    (tmp_path / "sorted.tar").write_bytes(tar_bytes(files))
    images = next(iter(detect(str(tmp_path / "sorted.tar")).sets.values()))()
    assert {name.split("/")[-1]: value for name, value in summary(images).items()} == expected_val()


def test_shards_with_the_names_of_val_need_no_kit(tmp_path):
    parts = {}
    for number, (name, data) in enumerate(val_files().items()):
        parts |= {name: data, name.replace("JPEG", "cls"): str(number).encode()}
    (tmp_path / "val-000.tar").write_bytes(tar_bytes(parts))
    assert detect(str(tmp_path / "val-000.tar")).sets["train"]().labels.tolist() == list(range(len(TRUTH)))


def test_kaggles_zip_is_read_as_it_is(tmp_path):
    top = "ILSVRC/Data/CLS-LOC"
    with zipfile.ZipFile(tmp_path / "imagenet.zip", "w") as file:
        for wnid, files in train_files().items():
            file.writestr(f"{top}/train/{wnid}/", b"")
            for name, data in files.items():
                file.writestr(f"{top}/train/{wnid}/{name}", data)
        for name, data in val_files().items():
            file.writestr(f"{top}/val/{name}", data)
        file.writestr(f"{top}/test/ILSVRC2012_test_00000001.JPEG", b"")
        file.writestr("ILSVRC/ImageSets/CLS-LOC/val.txt", b"")
        file.writestr("LOC_val_solution.csv", KAGGLE)
    origin = detect(str(tmp_path / "imagenet.zip"))
    assert origin.description.startswith("ImageNet as Kaggle packs it, in zip file")
    train, val = (origin.sets[split]() for split in ("train", "val"))
    assert train.classes == val.classes == WNIDS
    assert train.labels.tolist() == [0, 0, 0, 1, 3, 3]
    assert summary(origin.sets["test"]()) == {"ILSVRC2012_test_00000001.JPEG": (None, b"")}
    assert summary(val) == expected_val()
