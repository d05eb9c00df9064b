"""Lists of labels: text files with a path and a label on each line."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.images import IMAGE_SUFFIXES
from ressl.batch import DataError
from tools.image_sets.members import clean_name
from tools.image_sets.tree import Listing
from tools.image_sets.words import LABELS, PATHS

BOXES = "predictionstring"  # Kaggle's ImageNet: a class and a box, again and again
UNKNOWN = "-1"  # for a label
TOLD = 5  # problems that are told in full


@dataclass(frozen=True, slots=True)
class LabelList:
    """N paths, each once, in the order of the file."""

    file: str  # for messages
    paths: tuple[str, ...]  # (N,) as `clean_name` leaves them
    labels: tuple[str, ...]  # (N,) as they are written
    notes: tuple[str, ...] = ()  # what the user should know


def parse_label_list(file: str, text: str, knows: Callable[[str], bool]) -> LabelList:
    """Reads lines of a path and a label, separated by tabs, commas, semicolons, or blanks, with or without a header.

    A header is a first line with words for both, such as `path,label`, which also tell the columns; or one whose path
    is no name of an image and is not known, while the second line's has or is, and whose label is no other line's.
    Where no header tells, the first two columns count, of which one holds the images. Raises DataError, which tells
    all problems at once.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: holds no labels; each line should have a path and a label")
    rows, problems = _split(lines)
    found = _columns([row for _, row in rows], knows)
    width, columns, boxes = found.width, (found.path, found.label), found.boxes
    paths: dict[str, int] = {}
    labels: list[str] = []
    for number, row in rows[found.header :]:
        fields = [field.strip() for field in row]
        if len(fields) != width or not all(fields[column] for column in columns):
            problems.append((number, f"expected a path and a label in {width} columns, got {','.join(row)[:60]!r}"))
            continue
        name, label = clean_name(fields[columns[0]]), fields[columns[1]]
        if name in paths:
            problems.append((number, f"{name} is there already, on line {paths[name]}"))
            continue
        paths[name] = number
        labels.append(label.split()[0] if boxes else label)
    if problems:
        raise DataError(f"{file}: {tell([f'line {number}: {problem}' for number, problem in sorted(problems)])}")
    if not labels:
        raise DataError(f"{file}: holds no labels behind its header; each line should have a path and a label")
    guessed = [row for _, row in rows[: found.guessed]]
    notes = tuple(f"{file}: its first line is taken for a header: {','.join(row)}" for row in guessed)
    return LabelList(file, tuple(paths), tuple(labels), notes)


def number_labels(labels: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """(N,) int64 numbers, the names of the classes, and notes for the user.

    Integers from 0 on without a gap are kept. All else are names, numbered in their order. -1 means unknown.
    """
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        numbers = np.array([int(label) for label in labels], np.int64)
        known = np.unique(numbers[numbers != -1]).tolist()
        classes = tuple(map(str, known))
        if known == list(range(len(known))):
            return numbers, classes, ()
        note = (
            f"labels from {known[0]} to {known[-1]}, not all from 0 on: they are numbered anew, and stay as class names"
        )
        anew = np.searchsorted(known, numbers)
        return np.where(numbers == -1, -1, anew), classes, (note,)
    classes = tuple(sorted(set(labels) - {UNKNOWN}))
    number = {name: i for i, name in enumerate(classes)} | {UNKNOWN: -1}
    return np.array([number[label] for label in labels], np.int64), classes, ()


def find_listed(listing: Listing, listed: LabelList, place: str) -> np.ndarray:
    """(N,) int64, where the listing has each path of the list; -1 where it has not.

    A path counts from the top, or from the directory that holds everything; or it is absolute, in `place`. One without
    a suffix of an image may leave out that of the file. Raises DataError where two files are what is left.
    """
    place_of = {name: i for i, name in enumerate(listing.names)}
    stems: dict[str, int] = {}
    several: dict[int, int] = {}  # of two files with one stem, the later one -> the earlier
    if not all(path.lower().endswith(IMAGE_SUFFIXES) for path in listed.paths):
        for i, name in enumerate(listing.names):
            stem = name.rpartition(".")[0]
            if stem in stems:
                several[i] = stems[stem]
            stems[stem] = i
    tops = {name.partition("/")[0] for name in (*listing.names[:1], *listing.names[-1:])}
    top = tops.pop() + "/" if len(tops) == 1 else ""  # as names are sorted, the one of all
    absolute = clean_name(str(Path(place).absolute())) + "/"
    found = np.full(len(listed.paths), -1, np.int64)
    for i, path in enumerate(listed.paths):
        for name in (path, top + path, path.removeprefix(absolute)):
            at = place_of.get(name, stems.get(name, -1))
            if at in several and name not in place_of:
                both = f"{listing.names[several[at]]} and {listing.names[at]}"
                raise DataError(f"{listed.file}: {path} may be {both}; write the suffixes too")
            if at >= 0:
                found[i] = at
                break
    return found


def tell(problems: Sequence[str]) -> str:
    """The first of them, and how many there are."""
    more = f"; and {len(problems) - TOLD:,} more" * (len(problems) > TOLD)
    return "; ".join(problems[:TOLD]) + more


def _split(lines: list[tuple[int, str]]) -> tuple[list[tuple[int, list[str]]], list[tuple[int, str]]]:
    """Rows and problems, each with the number of its line. The first line tells what separates the columns."""
    first = lines[0][1]
    separator = "\t" if "\t" in first else next((mark for mark in first if mark in ",;"), None)
    rows: list[tuple[int, list[str]]] = []
    problems: list[tuple[int, str]] = []
    for number, line in lines:
        if separator is None:
            row = line.rsplit(None, 1)
            if len(row) == 2 and _is_image(line.split(None, 1)[0]) and not _is_image(row[0]):
                problems.append((number, f"several words behind {line.split()[0]}; separate the columns by commas"))
            else:
                rows.append((number, row))
        elif '"' not in line:
            rows.append((number, line.split(separator)))
        else:
            try:
                rows.append((number, next(csv.reader([line], delimiter=separator))))
            except csv.Error as error:
                problems.append((number, str(error)))
    return rows, problems


@dataclass(frozen=True, slots=True)
class _Columns:
    width: int
    path: int
    label: int
    header: bool = False  # whether the first row is one
    guessed: bool = False  # the header, by no word
    boxes: bool = False  # behind each label


def _columns(rows: list[list[str]], knows: Callable[[str], bool]) -> _Columns:
    if not rows:
        return _Columns(2, 0, 1)
    images = [[_is_image(cell) or knows(clean_name(cell.strip())) for cell in row] for row in rows[:2]]
    first, second = images[0], images[1] if len(images) > 1 else []
    words = [word.strip().lower() for word in rows[0]]
    label = next((words.index(word) for word in (*LABELS, BOXES) if word in words), None)
    if label is not None:
        paths = [words.index(word) for word in PATHS if word in words]
        # of columns such as id and filename the one with the images, whatever it is called
        paths = [i for i in (*paths, *range(len(words))) if i != label and second[i : i + 1] == [True]] or paths
        if paths and (words[paths[0]] in PATHS or not first[paths[0]]):
            return _Columns(len(words), paths[0], label, header=True, boxes=words[label] == BOXES)
    if all(row == [False, True] for row in images):
        return _Columns(2, 1, 0)
    others = {row[1].strip().lower() for row in rows[1:] if len(row) > 1}
    guessed = not first[0] and second[:1] == [True] and words[1:2] != [] and words[1] not in others
    return _Columns(max(len(words), 2), 0, 1, header=guessed, guessed=guessed)


def _is_image(name: str) -> bool:
    return name.strip().lower().endswith(IMAGE_SUFFIXES)
