"""The words by which splits, labels and files of images are known, the same in every layout. Case does not count."""

import re
from collections.abc import Iterable

from ressl.batch import DataError

SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val") | dict.fromkeys(("test", "testing"), "test")
"""What a split may be called, and its name here."""

LABELS = ("label", "labels", "fine_label", "cls", "class", "class_name", "class_id", "category", "target", "y")
"""Columns and keys that hold a label; the first that is there counts."""

PATHS = ("path", "filepath", "file", "filename", "file_name", "image", "img", "image_id", "imageid", "name", "id")
"""Columns that hold the path of an image, the surest first."""


def split_of(name: str) -> str:
    """The split that a whole name stands for; empty for none."""
    return SPLITS.get(name.lower(), "")


def split_in(name: str) -> str:
    """`val` for imagenet1k-validation-07: the split of the words in a name; empty for none, and for several."""
    found = {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def by_split(place: str, names: Iterable[str]) -> dict[str, str]:
    """Split -> which of the `names` stands for it, in the order train, val, test; other names are left out.

    Raises DataError where two stand for one.
    """
    found: dict[str, str] = {}
    for name in names:
        split = split_of(name)
        if split in found:
            raise DataError(f"{place}: {found[split]} and {name} both name the split {split}; leave one of them there")
        if split:
            found[split] = name
    return {split: found[split] for split in ("train", "val", "test") if split in found}
