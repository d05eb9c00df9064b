"""Files in directories, wherever they lie: on a disk, in tar files, in a zip. What they mean: see layouts.py."""

import stat
from array import array
from bisect import bisect_left, bisect_right
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from pipelines.images import (
    HIDDEN,
    IMAGE_SUFFIXES,
    NO_SUFFIX,
    BadImage,
    class_directories,
    images_under,
    in_parts,
    read_file,
)
from ressl.batch import DataError
from tools.image_sets.members import REPLACED, UNREADABLE, MemberFiles, Members, join, stamp_of
from tools.image_sets.tar_members import is_tar, list_tar
from tools.image_sets.words import split_in, split_of
from tools.image_sets.zip_members import is_zip, list_zip

MAX_TEXT = 1 << 28  # bytes of a file that is read as text
NOT_OURS = ("__MACOSX",)  # a directory that a Mac puts into its zip files, full of hidden files


@dataclass(frozen=True, slots=True)
class Listing:
    """The N images under a directory, sorted by name, directory by directory."""

    names: tuple[str, ...]  # (N,) relative to the directory, with `/`
    read: Callable[[int], bytes]  # the whole file; raises BadImage
    stamp: Callable[[int], tuple[int, int]]  # bytes and mtime (ns) of what holds it; (-1, -1) where that is gone
    ignored: dict[str, int]  # what else was there, as in pipelines.images


@dataclass(frozen=True, slots=True)
class Tree:
    """Directories are named relative to the top, with `/`; "" is the top. Hidden ones are not there."""

    kind: str  # "image folder", "tar file", ...
    place: str
    directories: Callable[[str], tuple[str, ...]]  # names of those directly in one, sorted; () if it is not there
    images: Callable[[str], Listing]  # those in a directory, at any depth
    images_in: Callable[[str], Listing]  # those directly in it
    text: Callable[[str], str | None]  # a whole file, None where there is none; raises DataError
    identity: str = ""  # of the archives: see ImageSet


def beside(directory: str, name: str) -> str:
    """The path of `name` in a directory of a tree."""
    return f"{directory}/{name}" if directory else name


# --- on a disk -------------------------------------------------------------------------------------------------------


def directory_tree(root: Path) -> Tree:
    """Nothing is listed before it is asked for, nor twice, and no file is opened or stat-ed; links are followed, loops
    are not."""
    directories = cache(partial(_disk_directories, root))
    images_in = cache(partial(_list_directory, root, deep=False))
    deep = cache(partial(_list_directory, root, deep=True))
    return Tree(
        kind="image folder",
        place=str(root),
        directories=directories,
        images=lambda directory: deep(directory) if directories(directory) else images_in(directory),
        images_in=images_in,
        text=partial(_text_file, root),
    )


def _disk_directories(root: Path, directory: str) -> tuple[str, ...]:
    try:
        return class_directories(root / directory) if (root / directory).is_dir() else ()
    except OSError as error:
        raise DataError(f"{root / directory}: cannot be listed: {error.strerror}") from None


def _list_directory(root: Path, directory: str, deep: bool) -> Listing:
    base, ignored = root / directory, Counter[str]()
    try:
        names = tuple(sorted(images_under(base, "", ignored, deep), key=in_parts))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    return Listing(
        names=names,
        read=lambda i: read_file(f"{base}/{names[i]}"),
        stamp=lambda i: stamp_of(f"{base}/{names[i]}"),
        ignored=dict(sorted(ignored.items())),
    )


def _text_file(root: Path, name: str) -> str | None:
    try:
        there = (root / name).exists()
    except OSError:
        there = True  # and read_text tells why it cannot be read
    return read_text(root / name) if there else None


def read_text(path: Path) -> str:
    """A file of text as `decode_text` reads it. Raises DataError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening, as that would wait for whoever writes to a FIFO
            raise DataError(f"{path}: not a regular file; give a file of text")
        if status.st_size > MAX_TEXT:
            raise DataError(f"{path}: {status.st_size:,} bytes, over the limit of {MAX_TEXT:,} for a file of text")
        return decode_text(str(path), path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def decode_text(file: str, data: bytes) -> str:
    """UTF-8, line feeds as they come, other bytes as surrogates, as in names of files; or UTF-16 behind its byte order
    mark. Raises DataError."""
    try:
        if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return data.decode("utf-16")
    except UnicodeDecodeError:
        raise DataError(f"{file}: damaged text in UTF-16; save it again, in UTF-8") from None
    if b"\0" in data:
        raise DataError(f"{file}: no text in UTF-8, as there are zero bytes in it; save it again, in UTF-8")
    return data.decode("utf-8-sig", "surrogateescape")


# --- in archives -----------------------------------------------------------------------------------------------------


def list_archive(path: Path) -> Members | None:
    """The members of a tar or zip file, told by how it begins; None for any other file. Raises DataError."""
    if is_zip(path):
        return list_zip(path)
    return list_tar(path) if is_tar(path) else None


def merge_archives(archives: dict[Path, Members]) -> Members:
    """The members of several archives under one top.

    One that is named after a split becomes a directory of that name, one without directories a directory named after
    it; the directories of all others come together. So `train.zip` and `val.zip` are two splits, and so are `my_train`
    and `my_validation` where every archive has such a word in its name; a tar file for each class are classes; and a
    set that was packed in parts is whole again. Raises DataError where only some have such a word.
    """
    words = {path: split_in(path.stem) for path in archives}
    parts = []
    for path, members in archives.items():
        flat = not any("/" in name for name in members.names)
        top = words[path] if all(words.values()) else split_of(path.stem) or (path.stem if flat else "")
        if words[path] and not top:
            other = next(path for path, word in words.items() if not word)
            raise DataError(
                f"{path}: by its name the split {words[path]}, but {other.name} beside it is named after none; give "
                "one of them, or move the others elsewhere"
            )
        if top:
            names = tuple(f"{top}/{name}" for name in members.names)
            directories = (top, *(f"{top}/{name}" for name in members.directories))
            members = replace(members, names=names, directories=directories)
        parts.append(members)
    return join(parts)


def identity_of(members: Members) -> str:
    """Name, bytes and mtime (ns) of each archive."""
    each = dict(zip(members.archives, members.stamps, strict=True))
    return "; ".join(f"{path.name} {size} {mtime}" for path, (size, mtime) in each.items())


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The N members of a tree in its order."""

    names: tuple[str, ...]  # (N,)
    numbers: np.ndarray  # (N,) int64, their places in `files.members`
    kinds: bytes  # (N,)
    files: MemberFiles


def member_tree(kind: str, place: Path, members: Members) -> Tree:
    """Where two members have one name the later one counts, as if the archive had been unpacked.

    Raises DataError for an image that is in two archives under one name.
    """
    order = sorted(range(len(members.names)), key=list(map(in_parts, members.names)).__getitem__)
    names = tuple(map(members.names.__getitem__, order))
    numbers = np.array(order, np.int64)
    kinds = members.kind[numbers]
    twice = [i for i in range(len(names) - 1) if names[i] == names[i + 1]]
    kinds[twice] = REPLACED
    for i in twice:
        first, second = (members.archives[members.archive[numbers[at]]] for at in (i, i + 1))
        if first != second and names[i].lower().endswith(IMAGE_SUFFIXES) and "/." not in f"/{names[i]}":
            raise DataError(
                f"{first}: {names[i]} is in {second.name} too, so they are no parts of one set; give one of them, or "
                "unpack each into a directory of its own"
            )
    files = MemberFiles(replace(members, names=()))  # these here are the ones that count
    found = _Sorted(names, numbers, kinds.tobytes(), files)
    return Tree(
        kind=kind,
        place=str(place),
        directories=partial(_member_directories, found),
        images=partial(_list_members, found, deep=True),
        images_in=partial(_list_members, found, deep=False),
        text=partial(_member_text, found),
        identity=identity_of(members),
    )


def _span(names: tuple[str, ...], directory: str, low: int = 0) -> tuple[int, int]:
    """Where the names under a directory begin and end."""
    if not directory:
        return 0, len(names)
    start = in_parts(directory)
    low = bisect_left(names, start + "\0", low, key=in_parts)
    return low, bisect_left(names, start + "\1", low, key=in_parts)


def _member_directories(found: _Sorted, directory: str) -> tuple[str, ...]:
    prefix = directory + "/" if directory else ""
    at, end = _span(found.names, directory)
    names = set()
    while at < end:
        name, slash, _ = found.names[at][len(prefix) :].partition("/")
        if slash:
            names.add(name)
            _, at = _span(found.names, prefix + name, at)
        else:
            at += 1
    listed = (name[len(prefix) :] for name in found.files.members.directories if name.startswith(prefix))
    names.update(name.partition("/")[0] for name in listed if name)
    return tuple(sorted(name for name in names if name[0] != "." and name not in NOT_OURS))


def _list_members(found: _Sorted, directory: str, deep: bool) -> Listing:
    cut = len(directory) + 1 if directory else 0
    names: list[str] = []
    chosen = array("q")
    ignored = Counter[str]()
    for i in range(*_span(found.names, directory)):
        name = found.names[i][cut:]
        parent, slash, last = name.rpartition("/")
        if slash and (not deep or name[0] == "." or "/." in parent or name.startswith(NOT_OURS)):
            continue
        dot = last.rfind(".")
        suffix = last[dot:].lower() if dot > 0 else ""
        if last.startswith("."):
            ignored[HIDDEN] += 1
        elif suffix not in IMAGE_SUFFIXES:
            ignored[suffix or NO_SUFFIX] += 1
        elif found.kinds[i] in UNREADABLE:
            ignored[UNREADABLE[found.kinds[i]]] += 1
        else:
            names.append(name)
            chosen.append(i)
    members = found.files.members
    numbers = found.numbers[np.array(chosen, np.int64)]
    return Listing(
        names=tuple(names),
        read=lambda i: found.files.read(int(numbers[i])),
        stamp=lambda i: stamp_of(members.archives[members.archive[numbers[i]]]),
        ignored=dict(sorted(ignored.items())),
    )


def _member_text(found: _Sorted, name: str) -> str | None:
    i = bisect_right(found.names, in_parts(name), key=in_parts) - 1  # the last of several
    if i < 0 or found.names[i] != name or found.kinds[i] in UNREADABLE:
        return None
    member = int(found.numbers[i])
    file = f"{found.files.members.archives[found.files.members.archive[member]]}: {name}"
    try:
        return decode_text(file, found.files.read(member))
    except BadImage as bad:
        raise DataError(f"{file}: {bad}") from None
