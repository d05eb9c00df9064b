"""ImageNet (ILSVRC 2012) as it is downloaded: the official archives, never unpacked, and Kaggle's tree.

Classes are numbered by their WordNet id, as where each has a directory, and not by the numbers of the development kit
(Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575, and the kit's readme).
"""

import importlib.util
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.images import BadImage, read_file
from ressl.batch import DataError
from tools.image_sets.array_files import is_file
from tools.image_sets.image_set import ImageSet, Origin
from tools.image_sets.label_list import UNKNOWN, LabelList, number_labels, parse_label_list, tell
from tools.image_sets.layouts import class_set, listed_set, unlabelled_set
from tools.image_sets.members import PLAIN, Members, clean_name, join
from tools.image_sets.tar_members import is_tar, list_inner_tar, list_tar
from tools.image_sets.tree import Tree, beside, member_tree, read_text

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
TESTS = ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar")
KIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"  # in the kit: a number for each image of val, in order
META = "data/meta.mat"  # in the kit: the synsets and their numbers
KAGGLE = "LOC_val_solution.csv"
KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TEST_IMAGE = re.compile(r"ILSVRC2012_test_(\d{8})\.JPEG")
CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
WNID = re.compile(r"n\d{8}")
PEEKED = 8  # members of a tar file that tell whether it is one of ours
LISTERS = 8  # threads that list inner archives: they wait for the disk more than for each other
MAX_PART = 1 << 28  # bytes of a file of the kit


@dataclass(frozen=True, slots=True)
class _Truth:
    """The labels of val, and where they come from."""

    words: str  # for the description
    listed: LabelList  # its labels are names of classes, or UNKNOWN
    classes: tuple[str, ...]  # all that it knows, in their order
    whole: bool = True  # whether all images of val have to be in it


def find_imagenet(root: Path, labels: Path | None) -> Origin | None:
    """The official archives in a directory, or one of them; None where there is none.

    Raises DataError where one is damaged, and where val has no labels: it says which file to put where.
    """
    if root.is_dir():
        there = {name: root / name for name in (TRAIN, VAL, *TESTS) if is_file(root / name)}
        train, val = there.get(TRAIN), there.get(VAL)
        test = next((there[name] for name in TESTS if name in there), None)
        place = f"ImageNet's archives in {root}"
    else:
        role = _role(root)
        train, val, test = (root if role == one else None for one in ("train", "val", "test"))
        place = f"ImageNet's archive in {root.parent}" if role else ""
    if not (train or val or test):
        return None
    if labels is not None and val is None:
        raise DataError(f"{labels}: a list of labels is for {VAL}, which is not in {place}; leave it out")
    inner = _inner_archives(train) if train else {}
    truth = _find_truth(val, labels, tuple(inner)) if val else None
    known = truth.classes if truth else ()
    classes = tuple(sorted({*inner, *known})) if inner else known
    sets: dict[str, Callable[[], ImageSet]] = {}
    words = []
    if train:
        sets["train"] = partial(_load_train, train, classes)
        words.append(f"train from {train.name} ({len(inner):,} inner archives)")
    if val and truth:
        sets["val"] = partial(_load_val, val, truth, classes)
        words.append(f"val from {val.name} with {truth.words}")
    if test:
        sets["test"] = partial(_load_test, test, classes)
        words.append(f"test from {test.name}, without labels")
    return Origin(f"{place}: {', '.join(words)}", sets)


def find_kaggle(tree: Tree) -> Origin | None:
    """ImageNet as Kaggle packs it: class directories for train, flat images and a list for val."""
    splits = tree.directories(KAGGLE_IMAGES)
    if "train" not in splits or "val" not in splits or tree.text(KAGGLE) is None:
        return None
    train, val, test = (beside(KAGGLE_IMAGES, split) for split in ("train", "val", "test"))
    classes = tree.directories(train)
    sets = {"train": partial(class_set, tree, train), "val": partial(_load_kaggle_val, tree, val, classes)}
    words = f"train from {train}/, val from {val}/ with {KAGGLE}"
    if "test" in splits:
        sets["test"] = partial(unlabelled_set, tree, test, classes)
        words += f", test from {test}/, without labels"
    return Origin(f"ImageNet as Kaggle packs it, in {tree.kind} {tree.place}: {words}", dict(sets))


def _role(path: Path) -> str | None:
    """train, val or test, by the first members of a tar file; None for any other file.

    Images of val that lie in directories of classes, or have labels beside them, are no archive of ImageNet's own.
    """
    if not is_tar(path):
        return None
    if path.name == TRAIN:
        return "train"
    names = [PurePosixPath(name) for name in list_tar(path, limit=PEEKED).names]
    if not names:
        return None
    sorted_out = any(WNID.fullmatch(part) for name in names for part in name.parts[:-1])
    if not sorted_out and all(name.suffix not in (".cls", ".json") for name in names):
        for role, image in (("val", VAL_IMAGE), ("test", TEST_IMAGE)):
            if image.fullmatch(names[0].name):
                return role
    return "train" if CLASS_ARCHIVE.fullmatch(names[0].name) else None


# --- the archives ----------------------------------------------------------------------------------------------------


def _inner_archives(train: Path) -> dict[str, int]:
    """Class -> its place in the outer archive, sorted."""
    outer = list_tar(train)
    inner = {
        PurePosixPath(name).stem: i
        for i, name in enumerate(outer.names)
        if name.lower().endswith(".tar") and outer.kind[i] == PLAIN
    }
    if not inner:
        raise DataError(f"{train}: no inner archives, one for each class, as ImageNet's has; get it again")
    return dict(sorted(inner.items()))


def _load_train(train: Path, classes: tuple[str, ...]) -> ImageSet:
    outer, inner = list_tar(train), _inner_archives(train)
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        parts = list(pool.map(lambda item: _list_class(outer, *item), inner.items()))
    members = join(parts)
    images = class_set(member_tree("tar file", train, members), "", classes)
    others = len(outer.names) - len(inner)
    ignored = (f"ignored {others:,} members that are no archives",) if others else ()
    note = f"listed {len(members.names):,} files in {len(inner):,} inner archives"
    return replace(images, notes=(note, *ignored, *images.notes))


def _list_class(outer: Members, name: str, member: int) -> Members:
    members = list_inner_tar(outer, member, lambda image: f"{name}/{image}")
    return replace(members, directories=(name, *members.directories))


def _load_val(val: Path, truth: _Truth, classes: tuple[str, ...]) -> ImageSet:
    tree = member_tree("tar file", val, list_tar(val))
    return _val_set(tree, "", truth.listed, classes, truth.whole)


def _val_set(tree: Tree, directory: str, listed: LabelList, classes: tuple[str, ...], whole: bool) -> ImageSet:
    listing = tree.images(directory)
    if whole and len(listing.names) > len(listed.paths):
        raise DataError(
            f"{listed.file}: {len(listed.paths):,} labels for the {len(listing.names):,} images in "
            f"{beside(tree.place, directory) if directory else tree.place}; get it again"
        )
    return listed_set(tree, listing, listed, _numbers(listed, classes), classes)


def _numbers(listed: LabelList, classes: tuple[str, ...]) -> np.ndarray:
    """(N,) int64, for labels that are names of classes."""
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(listed.labels) - set(number) - {UNKNOWN})
    if unknown:
        raise DataError(f"{listed.file}: classes that train does not have: {tell(unknown)}; make them match")
    return np.array([number.get(label, -1) for label in listed.labels], np.int64)


def _load_test(test: Path, classes: tuple[str, ...]) -> ImageSet:
    return unlabelled_set(member_tree("tar file", test, list_tar(test)), "", classes)


def _load_kaggle_val(tree: Tree, val: str, classes: tuple[str, ...]) -> ImageSet:
    listed = parse_label_list(f"{tree.place}/{KAGGLE}", tree.text(KAGGLE) or "", _is_val_image)
    return _val_set(tree, val, listed, classes, whole=True)


def _is_val_image(name: str) -> bool:
    return VAL_IMAGE.fullmatch(name) is not None or VAL_IMAGE.fullmatch(f"{name}.JPEG") is not None


# --- the labels of val -----------------------------------------------------------------------------------------------


def _find_truth(val: Path, labels: Path | None, train_classes: tuple[str, ...]) -> _Truth:
    """The user's list, or what lies beside val: the development kit, packed or not, or Kaggle's list."""
    if labels is not None:
        return _given_truth(labels, train_classes)
    for name in (f"{KIT}.tar.gz", f"{KIT}.tgz", f"{KIT}.tar"):
        if (packed := val.parent / name).is_file():
            return _kit_truth(packed, *_read_packed_kit(packed))
    kit = val.parent / KIT
    if kit.is_dir():
        return _kit_truth(kit, *(_read_part(kit / part) for part in (GROUND_TRUTH, META)))
    if (kaggle := val.parent / KAGGLE).is_file():
        return replace(_given_truth(kaggle, train_classes), words=f"the labels of {KAGGLE}", whole=True)
    alone = "" if not train_classes else f"; or give {val.parent / TRAIN} to convert train alone"
    raise DataError(
        f"{val}: the labels of its images are missing: put {KIT}.tar.gz, the development kit from the same place, or "
        f"Kaggle's {KAGGLE}, into {val.parent}; or name a list of labels with --labels{alone}"
    )


def _given_truth(path: Path, train_classes: tuple[str, ...]) -> _Truth:
    listed = parse_label_list(str(path), read_text(path), _is_val_image)
    numbers, classes, _ = number_labels(listed.labels)
    if train_classes and all(re.fullmatch(r"-?\d+", label) for label in listed.labels):
        if any(not -1 <= int(label) < len(train_classes) for label in listed.labels):
            raise DataError(
                f"{path}: numbers as labels have to be from 0 to {len(train_classes) - 1:,}, those of train's classes "
                "in the order of their WordNet ids; write the ids themselves, or leave the list out where there is a "
                "development kit"
            )
        numbers, classes = np.array([int(label) for label in listed.labels]), train_classes
    names = tuple(classes[number] if number >= 0 else UNKNOWN for number in numbers.tolist())
    return _Truth(f"the labels of {path}", replace(listed, labels=names), classes, whole=False)


def _kit_truth(kit: Path, ground_truth: bytes, meta: bytes) -> _Truth:
    synsets = _read_synsets(kit, meta)
    try:
        labels = tuple(synsets[int(line)] for line in ground_truth.split())
    except (ValueError, KeyError) as error:
        raise DataError(f"{kit}: {GROUND_TRUTH}: {error} is no number of a synset in {META}; get it again") from None
    names = tuple(f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, len(labels) + 1))
    return _Truth(
        "the devkit's labels", LabelList(f"{kit}: {GROUND_TRUTH}", names, labels), tuple(sorted(synsets.values()))
    )


def _read_synsets(kit: Path, meta: bytes) -> dict[int, str]:
    """Number -> WordNet id of the synsets that are classes: those without others below them."""
    try:
        scipy_io = importlib.import_module("scipy.io")  # slow to import, and needed by nothing else here
    except ImportError:
        raise DataError(f"{kit}: scipy is needed to read {META}; install scipy") from None
    try:
        synsets = np.atleast_1d(scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except Exception:  # its parser raises whatever it runs into
        raise DataError(f"{kit}: {META} is damaged or no list of synsets; get it again") from None


def _read_packed_kit(packed: Path) -> tuple[bytes, bytes]:
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(packed) as kit:
            for member in kit:
                for part in (GROUND_TRUTH, META):
                    wanted = clean_name(member.name).endswith(part) and member.size <= MAX_PART
                    if wanted and (file := kit.extractfile(member)) is not None:
                        parts[part] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{packed}: damaged ({' '.join(str(error).split())}); get it again") from None
    missing = [part for part in (GROUND_TRUTH, META) if part not in parts]
    if missing:
        raise DataError(f"{packed}: no {' and no '.join(missing)} in it; get it again")
    return parts[GROUND_TRUTH], parts[META]


def _read_part(path: Path) -> bytes:
    try:
        return read_file(path)
    except BadImage as bad:
        raise DataError(f"{path}: {bad}; unpack the development kit again") from None
