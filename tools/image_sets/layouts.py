"""What a tree of images means: class directories, splits, TinyImageNet, a list of labels.

The same in a directory, a tar file and a zip.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.images import IMAGE_SUFFIXES, NO_CLASS, NO_SUFFIX, BadImage, describe_ignored, in_parts
from ressl.batch import DataError
from tools.image_sets.image_set import ImageSet, Origin
from tools.image_sets.label_list import LabelList, find_listed, number_labels, parse_label_list
from tools.image_sets.tree import Listing, Tree, beside, read_text
from tools.image_sets.words import by_split, split_in, split_of

MAX_WRAPPERS = 4  # directories around everything, each the only one in another
WNIDS = "wnids.txt"  # of TinyImageNet: its classes
ANNOTATIONS = "val_annotations.txt"  # of TinyImageNet: file, class and box of each image of val


def lay_out(tree: Tree) -> Origin:
    """TinyImageNet; directories of splits, train/ and val/ under any of their names, of class directories or flat; or
    one set, of class directories or flat.

    Where there is no val/, test/ is the split `val`. A directory that holds everything is entered. Raises DataError
    where a directory of a split lies beside others that are none, as these could be classes.
    """
    top = _enter(tree)
    directories = tree.directories(top)
    place = f"{tree.kind} {tree.place}" + f", inside {top}/" * bool(top)
    if "train" in directories and tree.text(beside(top, WNIDS)) is not None:
        return _lay_out_tiny_imagenet(tree, top, directories, place)
    named = by_split(f"{tree.place}/{top}".rstrip("/"), directories)
    if not named:
        count = f"{len(directories):,} class director{'ies' if len(directories) > 1 else 'y'}"
        found = f"{place}, {count if directories else 'no class directories'}"
        return Origin(found, {"train": partial(class_set, tree, top)})
    if "val" not in named and "test" in named:
        named["val"] = named.pop("test")
    used = {split: named[split] for split in ("train", "val") if split in named}
    others = [name for name in directories if name not in used.values()]
    if others and len(used) == 1 and any(not split_of(name) for name in others):
        (name,) = used.values()
        raise DataError(
            f"{tree.place}: {name}/ is named like a split, but what is beside it is not: {_first(others)}; for this "
            f"split alone {_give(tree, beside(top, name))}; if all are classes, move all into a directory named train"
        )
    entered = {split: _enter_split(tree, beside(top, name)) for split, name in used.items()}
    sets: dict[str, Callable[[], ImageSet]] = {split: partial(class_set, tree, base) for split, base in entered.items()}
    if len(entered) == 2:
        sets["val"] = partial(_class_set_as_in, tree, entered["val"], entered["train"])
    unused = f"; not used: {', '.join(others[:5])}" if others else ""
    listed = ", ".join(f"{split} from {name}/" for split, name in used.items())
    return Origin(f"{place}, {listed}{unused}", sets)


def lay_out_listed(tree: Tree, labels: Path) -> Origin:
    """The images that a list of labels names. Raises DataError."""
    return Origin(f"{tree.kind} {tree.place}, labels from {labels}", {"train": partial(_load_listed, tree, labels)})


# --- a set -----------------------------------------------------------------------------------------------------------


def class_set(tree: Tree, base: str, known: tuple[str, ...] | None = None, whose: str = "") -> ImageSet:
    """Each directory in `base` is a class, numbered by name, or as in `known`, the classes of `whose`.

    An empty one keeps its number. Its images are taken at any depth. Images beside class directories have no class and
    are left out; where no directory holds images, those directly in `base` are taken, with label -1. Raises DataError.
    """
    listing, classes = tree.images(base), tree.directories(base)
    place = beside(tree.place, base) if base else tree.place
    if not listing.names:
        looked_for = " ".join(IMAGE_SUFFIXES)
        found = f"only {describe_ignored(listing.ignored)}" if listing.ignored else "there are no files at all"
        raise DataError(f"{place}: no images found (looked for {looked_for}): {found}")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(name.partition("/")[0], -1) if "/" in name else -1 for name in listing.names])
    keep, ignored = np.arange(len(labels)), dict(listing.ignored)
    if (labels < 0).all():
        return _set_of(tree, listing, keep, labels, known or (), _ignored_notes(ignored))
    if (labels < 0).any():
        ignored[NO_CLASS] = int((labels < 0).sum())
        keep, labels = np.flatnonzero(labels >= 0), labels[labels >= 0]
    if known is not None:
        unknown = sorted(set(classes) - set(known))
        if unknown:
            raise DataError(
                f"{place}: classes that {whose} does not have: {_first(unknown)}; make the directories match"
            )
        number = {name: i for i, name in enumerate(known)}
        labels = np.array([number[name] for name in classes], np.int64)[labels]
    counts = np.bincount(labels, minlength=len(known or classes))
    empty = [name for name, count in zip(known or classes, counts, strict=True) if count == 0]
    notes = _ignored_notes(ignored)
    if empty:
        notes = (*notes, f"classes without images, which keep their numbers: {_first(empty)}")
    if known is None and np.count_nonzero(counts) == 1:
        notes = (*notes, *_one_class_notes(tree, base, classes[int(counts.argmax())]))
    return _set_of(tree, listing, keep, labels, known or classes, notes)


def unlabelled_set(tree: Tree, base: str, classes: tuple[str, ...]) -> ImageSet:
    """All images in `base`, at any depth, with label -1."""
    listing = tree.images(base)
    labels = np.full(len(listing.names), -1, np.int64)
    return _set_of(tree, listing, np.arange(len(labels)), labels, classes, _ignored_notes(listing.ignored))


def listed_set(
    tree: Tree, listing: Listing, listed: LabelList, labels: np.ndarray, classes: tuple[str, ...]
) -> ImageSet:
    """The images of a list in the order of their names, under their `labels`.

    One that is not there stays in the set and cannot be read. Raises DataError where none is there.
    """
    found = find_listed(listing, listed, tree.place)
    if (found < 0).all():
        holds = f"an image there is {listing.names[0]}" if listing.names else "there are no images"
        raise DataError(
            f"{listed.file}: none of the {len(found):,} files that it lists is an image in {tree.place}; the first is "
            f"{listed.paths[0]}, and {holds}; write the paths as they are there, in the first column, or in one that a "
            "header `path,label` names"
        )
    there = found[found >= 0]
    if len(np.unique(there)) < len(there):
        first = np.flatnonzero((found >= 0) & (np.bincount(there)[found] > 1))[:2]
        both = " and ".join(listed.paths[i] for i in first)
        raise DataError(f"{listed.file}: lists images twice under different paths, such as {both}; remove one of them")
    names = [listing.names[at] if at >= 0 else path for at, path in zip(found.tolist(), listed.paths, strict=True)]
    order = np.array(sorted(range(len(names)), key=list(map(in_parts, names)).__getitem__), np.int64)
    names = list(map(names.__getitem__, order.tolist()))
    rest = len(listing.names) - len(there)
    notes = (*listed.notes, f"{rest:,} images that {listed.file} does not list are left out") if rest else listed.notes
    missing = int((found < 0).sum())
    if missing:
        notes = (*notes, f"{missing:,} files that {listed.file} lists are not there")
    found = found[order]

    def read(i: int) -> bytes:
        if found[i] >= 0:
            return listing.read(int(found[i]))
        dot = names[i].rfind(".")
        suffix = names[i][dot:].lower() if dot > 0 else NO_SUFFIX
        raise BadImage(
            "no such file" if suffix in (*IMAGE_SUFFIXES, NO_SUFFIX) else f"not an image by its name: {suffix}"
        )

    return ImageSet(
        labels=labels[order],
        classes=classes,
        name=lambda i: names[i],
        read=read,
        stamp=lambda i: listing.stamp(int(found[i])) if found[i] >= 0 else (-1, -1),
        identity=tree.identity,
        notes=notes,
    )


def _set_of(
    tree: Tree, listing: Listing, keep: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], notes: tuple[str, ...]
) -> ImageSet:
    return ImageSet(
        labels=labels.astype(np.int64),
        classes=classes,
        name=lambda i: listing.names[keep[i]],
        read=lambda i: listing.read(int(keep[i])),
        stamp=lambda i: listing.stamp(int(keep[i])),
        identity=tree.identity,
        notes=notes,
    )


def _one_class_notes(tree: Tree, base: str, name: str) -> tuple[str, ...]:
    inside, note = beside(base, name), f"all images are in one class, {name}"
    if any(tree.images(beside(inside, deeper)).names for deeper in tree.directories(inside)):
        return (f"{note}: if its sub-directories are the classes, {_give(tree, inside)}",)
    return (note,) if len(tree.directories(base)) > 1 else ()


def _give(tree: Tree, directory: str) -> str:
    return f"unpack it and give {directory}" if tree.identity else f"give {tree.place}/{directory}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _ignored_notes(ignored: dict[str, int]) -> tuple[str, ...]:
    return (f"ignored {describe_ignored(ignored)}",) if ignored else ()


def _class_set_as_in(tree: Tree, base: str, reference: str) -> ImageSet:
    return class_set(tree, base, tree.directories(reference) or None, beside(tree.place, reference))


def _load_listed(tree: Tree, path: Path) -> ImageSet:
    listing = tree.images("")

    def knows(path: str) -> bool:
        return any(path in (name, name.rpartition(".")[0]) for name in listing.names)

    listed = parse_label_list(str(path), read_text(path), knows)
    labels, classes, notes = number_labels(listed.labels)
    images = listed_set(tree, listing, listed, labels, classes)
    return replace(images, notes=(*notes, *images.notes))


# --- directories around others ---------------------------------------------------------------------------------------


def _enter(tree: Tree) -> str:
    """The directory that holds everything: the only one in the one above, with directories in it, and no image beside
    or directly in it."""
    here = ""
    for _ in range(MAX_WRAPPERS):
        inside = tree.directories(here)
        if len(inside) != 1 or split_of(inside[0]):
            break
        below = beside(here, inside[0])
        if not tree.directories(below) or tree.images_in(here).names or tree.images_in(below).names:
            break
        here = below
    return here


def _enter_split(tree: Tree, base: str) -> str:
    """`train/train/` for `train/`, as where the archive train.zip holds train/, or my_train.zip my_train/."""
    inside = tree.directories(base)
    split = split_in(base.rpartition("/")[2])
    if len(inside) != 1 or split_in(inside[0]) != split or tree.images_in(base).names:
        return base
    below = beside(base, inside[0])
    return below if split_of(inside[0]) or tree.directories(below) else base


# --- TinyImageNet ----------------------------------------------------------------------------------------------------


def _lay_out_tiny_imagenet(tree: Tree, top: str, directories: tuple[str, ...], place: str) -> Origin:
    """As it is published: train/CLASS/images/, val/images/ with val_annotations.txt, test/images/ without labels.

    Classes are numbered by their WordNet id, as where the images lie in a directory for each.
    """
    wnids = tuple(sorted((tree.text(beside(top, WNIDS)) or "").split()))
    sets = {"train": partial(class_set, tree, beside(top, "train"), wnids, WNIDS)}
    words = ["train"]
    annotations = tree.text(beside(top, f"val/{ANNOTATIONS}"))
    if annotations is not None and "images" in tree.directories(beside(top, "val")):
        sets["val"] = partial(_load_annotated, tree, beside(top, "val"), annotations, wnids)
        words.append(f"val with {ANNOTATIONS}")
    elif "val" in directories:
        sets["val"] = partial(class_set, tree, beside(top, "val"), wnids, WNIDS)
        words.append("val from its class directories")
    if "test" in directories:
        sets["test"] = partial(unlabelled_set, tree, beside(top, "test"), wnids)
        words.append("test without labels")
    return Origin(f"TinyImageNet in {place}: {', '.join(words)}", dict(sets))


def _load_annotated(tree: Tree, val: str, annotations: str, wnids: tuple[str, ...]) -> ImageSet:
    rows = [line.split("\t") for line in annotations.splitlines() if line.strip()]
    number = {name: i for i, name in enumerate(wnids)}
    file = beside(tree.place, f"{val}/{ANNOTATIONS}")
    for row in rows:
        if len(row) < 2 or row[1] not in number:
            raise DataError(f"{file}: expected a file and a class of {WNIDS}, got {' '.join(row)[:60]!r}; get it again")
    listed = LabelList(file, tuple(row[0] for row in rows), tuple(row[1] for row in rows))
    if not rows:
        raise DataError(f"{file}: empty; get it again")
    labels = np.array([number[row[1]] for row in rows], np.int64)
    return listed_set(tree, tree.images(f"{val}/images"), listed, labels, wnids)
