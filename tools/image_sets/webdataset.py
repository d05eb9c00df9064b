"""WebDataset shards, of others and of our own: tar files in which the parts of a sample follow one another.

A sample's key is its path up to the first dot of the last component; what follows is the name of the part, as in
https://github.com/webdataset/webdataset.
"""

import json
import re
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.images import IMAGE_SUFFIXES, NO_SUFFIX, class_directories, describe_ignored
from pipelines.manifest import NAME as MANIFEST
from pipelines.manifest import classes_of
from pipelines.shards import INDEX
from ressl.batch import DataError
from tools.image_sets.image_set import ImageSet, Origin
from tools.image_sets.label_list import tell
from tools.image_sets.members import UNREADABLE, MemberFiles, Members, join, stamp_of
from tools.image_sets.tar_members import is_tar, list_tar
from tools.image_sets.tree import identity_of
from tools.image_sets.words import LABEL_KEYS, by_split, split_in

IMAGE_PARTS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LABEL_PARTS = ("cls", "json")  # the first that is there counts
MAX_LABEL = 1_000_000  # classes: without a manifest each number up to the highest gets a name
PEEKED = 64  # members of the first shard that tell what it is
LISTERS = 8  # threads that list shards: they wait for the disk more than for each other
NUMBERED = re.compile(r".*[-_.]\d{3,}|\d{4,}")  # a shard's name without .tar; not that of a class
COUNTED = re.compile(r".*[-_.]\d+")  # which may be either


def find_webdataset(root: Path) -> Origin | None:
    """The shards that `root` is, or holds, or holds in a directory for each split, as `convert` writes them.

    None where there are none. Raises DataError, also where shards of splits lie beside others.
    """
    direct = _tars(root) if root.is_dir() else (root,) if is_tar(root) else ()
    below, unused = ({}, []) if direct else _in_directories(root)
    first = direct or next(iter(below.values()), ())
    if not first or not _are_shards(first):
        return None
    splits = below or ({"train": direct} if direct == (root,) else _by_name(root, direct))
    words = [f"{split} from {_words(root, shards)}" for split, shards in splits.items()]
    left = f"; not used: {', '.join(unused[:5])}" if unused else ""
    return Origin(
        f"WebDataset shards in {root}: {', '.join(words)}{left}",
        {split: partial(_load, root, shards) for split, shards in splits.items()},
    )


Shards = dict[str, tuple[Path, ...]]  # split -> its shards, in the order of their names


def _in_directories(root: Path) -> tuple[Shards, list[str]]:
    """Those in directories named after splits, and the other directories that hold tar files."""
    if not root.is_dir():
        return {}, []
    directories = class_directories(root)
    named = by_split(str(root), directories)
    found = {split: tars for split, name in named.items() if (tars := _tars(root / name))}
    others = [name for name in directories if name not in named.values()] if found else []
    return found, [name for name in others if _tars(root / name)]


def _by_name(root: Path, shards: tuple[Path, ...]) -> Shards:
    """By the words in their names; all for train where none has one. Raises DataError where only some have."""
    named = {path: split_in(path.stem) for path in shards}
    without = [path.name for path in shards if not named[path]]
    if len(without) == len(shards):
        return {"train": shards}
    if without:
        raise DataError(
            f"{root}: {len(without):,} of {len(shards):,} shards are named after no split, as {without[0]}, and others "
            "are; move each split into a directory of its own, and give the one that is wanted"
        )
    found = {split: tuple(path for path in shards if named[path] == split) for split in ("train", "val", "test")}
    return {split: tars for split, tars in found.items() if tars}


def _tars(directory: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted(p for p in directory.glob("*.tar") if p.name[0] != "." and p.is_file()))
    except OSError as error:
        raise DataError(f"{directory}: cannot be listed: {error.strerror}") from None


def _words(root: Path, shards: tuple[Path, ...]) -> str:
    if len(shards) == 1:
        return shards[0].relative_to(root).as_posix() if shards[0] != root else root.name
    return f"{len(shards):,} shards, {shards[0].relative_to(root).as_posix()} ... {shards[-1].name}"


def _are_shards(paths: tuple[Path, ...]) -> bool:
    """Whether in the first one labels lie beside images under the same key; or all are numbered, with images on top.

    A .json in a directory may be anything: it counts where it holds a label. Raises DataError where small numbers do
    not tell shards without labels from classes.
    """
    members = list_tar(paths[0], limit=PEEKED)
    parts: dict[str, dict[str, int]] = {}
    for i, name in enumerate(members.names):
        key, part = _split_name(name)
        parts.setdefault(key, {})[part] = i
    flat = not any("/" in name for name in members.names)
    with_images = [found for found in parts.values() if set(found) & set(IMAGE_PARTS)]
    if any("cls" in found for found in with_images):
        return True
    first = next((found["json"] for found in with_images if "json" in found), None)
    if first is None and flat and with_images:
        return _are_numbered(paths)
    if first is None or flat:
        return flat and bool(with_images)
    try:
        return _label(MemberFiles(members).read(first), "json") >= 0
    except ValueError:  # BadImage too
        return False


def _are_numbered(paths: tuple[Path, ...]) -> bool:
    if all(NUMBERED.fullmatch(path.stem) for path in paths):
        return True
    if len(paths) > 1 and all(COUNTED.fullmatch(path.stem) for path in paths):
        first, last, stem = paths[0], paths[-1], paths[0].stem.rstrip("0123456789")
        raise DataError(
            f"{first.parent}: {first.name} ... {last.name} hold images without labels, and may be classes or shards of "
            f"one set: for shards number them as {stem}00000.tar; for classes unpack each into a directory of its own"
        )
    return False


def _split_name(name: str) -> tuple[str, str]:
    """Key and part."""
    directory, slash, last = name.rpartition("/")
    stem, _, part = last.partition(".")
    return directory + slash + stem, part.lower()


def _load(root: Path, shards: tuple[Path, ...]) -> ImageSet:
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        members = join(list(pool.map(list_tar, shards)))
    images, label_at, alone, ignored = _group(members)
    place = root if len(shards) > 1 else shards[0]
    if not len(images):
        found = f"only {describe_ignored(ignored)}" if ignored else "there are no files at all"
        raise DataError(f"{place}: no images found (looked for {' '.join(IMAGE_SUFFIXES)}): {found}")
    _check_adjacent(members, images[label_at < 0], alone)
    files = MemberFiles(members)
    labels = _read_labels(files, label_at)
    directory = shards[0].parent
    classes = classes_of(directory) if (directory / INDEX).is_file() else ()
    highest = int(labels.max())
    if classes and highest >= len(classes):
        raise DataError(f"{place}: label {highest}, but {directory.parent / MANIFEST} names {len(classes)} classes")

    notes = (f"ignored {describe_ignored(ignored)}",) if ignored else ()
    if highest < 0 and len(shards) > 1:
        notes = (*notes, "no labels in them: if each is a class, unpack each into a directory of its own")

    def name(i: int) -> str:
        return f"{members.archives[members.archive[images[i]]].name}/{members.names[images[i]]}"

    return ImageSet(
        labels=labels,
        classes=classes or tuple(map(str, range(highest + 1))),
        name=name,
        read=lambda i: files.read(int(images[i])),
        stamp=lambda i: stamp_of(members.archives[members.archive[images[i]]]),
        identity=identity_of(members),
        notes=notes,
    )


def _group(members: Members) -> tuple[np.ndarray, np.ndarray, list[int], dict[str, int]]:
    """(N,) int64 the member of each sample's image, (N,) int64 that of its label or -1, the labels that follow no image
    and precede none, and the members left out."""
    images, labels, alone, ignored = array("q"), array("q"), list[int](), Counter[str]()
    archive, kinds = members.archive.tolist(), members.kind.tolist()
    before: tuple[str, int] = ("", -1)
    sample: dict[str, int] = {}

    def close() -> None:
        image = next((sample[part] for part in sample if part in IMAGE_PARTS), None)
        label = next((sample[part] for part in LABEL_PARTS if part in sample), -1)
        if image is not None:
            images.append(image)
            labels.append(label)
        elif label >= 0:
            alone.append(label)
        for part, member in sample.items():
            if member != image and (image is None or part not in LABEL_PARTS):
                ignored[f".{part}" if part else NO_SUFFIX] += 1

    for i, name in enumerate(members.names):
        if kinds[i] in UNREADABLE:
            ignored[UNREADABLE[kinds[i]]] += 1
            continue
        key, part = _split_name(name)
        if (key, archive[i]) != before or part in sample:
            close()
            before, sample = (key, archive[i]), {}
        sample[part] = i
    close()
    return np.array(images, np.int64), np.array(labels, np.int64), alone, dict(sorted(ignored.items()))


def _check_adjacent(members: Members, unlabelled: np.ndarray, alone: list[int]) -> None:
    """Raises DataError where the label of an image lies elsewhere, and would be lost."""
    keys = {_split_name(members.names[i])[0] for i in unlabelled.tolist()} if alone else set()
    for i in alone:
        if _split_name(members.names[i])[0] in keys:
            raise DataError(
                f"{members.archives[members.archive[i]]}: {members.names[i]} is not right beside its image, where the "
                "parts of a sample have to be; write the shards again, sorted by name"
            )


def _read_labels(files: MemberFiles, label_at: np.ndarray) -> np.ndarray:
    """(N,) int64. Raises DataError, which tells all problems at once."""
    labels = np.full(len(label_at), -1, np.int64)
    problems = []
    for i, member in enumerate(label_at.tolist()):
        if member < 0:
            continue
        name = files.members.names[member]
        try:
            labels[i] = _label(files.read(member), name.rpartition(".")[2].lower())
        except ValueError as error:
            problems.append(f"{files.members.archives[files.members.archive[member]].name}/{name}: {error}")
    if problems:
        raise DataError(f"{files.members.archives[0].parent}: labels that cannot be read: {tell(problems)}")
    return labels


def _label(data: bytes, part: str) -> int:
    """-1 where a .json has none. Raises ValueError."""
    text = data.decode("utf-8", "replace").strip()
    value: object = text
    if part == "json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        found = [value[key] for key in LABEL_KEYS if key in value] if isinstance(value, dict) else []
        value = -1 if not found or found[0] is None else found[0]
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < MAX_LABEL:
        raise ValueError(f"expected a whole number from -1 to {MAX_LABEL - 1:,} as label, got {str(value)[:40]!r}")
    return value
