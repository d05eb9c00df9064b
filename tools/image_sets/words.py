"""The words by which splits, labels and files of images are known, the same in every layout. Case does not count."""

import re
from collections.abc import Sequence

from ressl.batch import DataError

SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val") | dict.fromkeys(("test", "testing"), "test")
"""What a split may be called, and its name here."""

LABELS = ("label", "labels", "fine_label", "cls", "class", "class_name", "class_id", "category", "target", "y")
"""Columns that hold a label; the first that is there counts."""

LABEL_KEYS = ("label", "cls")
"""The same in a .json beside an image: fewer, as it may describe the image in many ways."""

PATHS = ("path", "filepath", "file", "filename", "file_name", "image", "img", "image_id", "imageid", "name", "id")
"""Columns that hold the path of an image, the surest first."""


def split_of(name: str) -> str:
    """The split that a whole name stands for; empty for none."""
    return SPLITS.get(name.lower(), "")


def split_in(name: str) -> str:
    """`val` for imagenet1k-validation-07: the split of the words in a name; empty for none, and for several."""
    found = {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def by_split(place: str, names: Sequence[str]) -> dict[str, str]:
    """Split -> which of the `names` stands for it, in the order train, val, test; other names are left out.

    Where all of several names have words for different splits, as train2017 and val2017 have, these count too. Raises
    DataError where two stand for one.
    """
    words = [split_in(name) for name in names]
    splits = words if all(words) and len(set(words)) == len(words) > 1 else [split_of(name) for name in names]
    found: dict[str, str] = {}
    for split, name in zip(splits, names, strict=True):
        if split in found:
            raise DataError(f"{place}: {found[split]} and {name} both name the split {split}; leave one of them there")
        if split:
            found[split] = name
    return {split: found[split] for split in ("train", "val", "test") if split in found}
