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

PATH_WORDS = ("path", "file", "filename", "file_name", "filepath", "image", "image_id", "imageid", "img", "name", "id")
LABEL_WORDS = ("label", "labels", "class", "class_name", "class_id", "category", "target", "predictionstring", "y")
BOXES = "predictionstring"  # Kaggle's ImageNet: a class and a box, again and again
TOLD = 5  # problems that are told in full


@dataclass(frozen=True, slots=True)
class LabelList:
    """N paths, each once, in the order of the file."""

    file: str  # for messages
    paths: tuple[str, ...]  # (N,) as `clean_name` leaves them
    labels: tuple[str, ...]  # (N,) as they are written


def parse_label_list(file: str, text: str, knows: Callable[[str], bool]) -> LabelList:
    """Reads lines of a path and a label, separated by commas, tabs, or blanks, with or without a header.

    A header is a first line with words for both, such as `path,label`, which also tell the columns; or one whose path
    has no suffix of an image and is not known, while the second line's has or is. Where no header tells, the first two
    columns count. Raises DataError, which tells all problems at once.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: holds no labels; each line should have a path and a label")
    rows, problems = _split(lines)
    width, columns, is_header, boxes = _columns([row for _, row in rows[:2]], knows)
    paths: dict[str, int] = {}
    labels: list[str] = []
    for number, row in rows[is_header:]:
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
    return LabelList(file, tuple(paths), tuple(labels))


def number_labels(labels: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """(N,) int64 numbers, the names of the classes, and notes for the user.

    Integers from 0 on without a gap are kept, -1 among them too: it means unknown. All else are names, numbered in
    their order.
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
    classes = tuple(sorted(set(labels)))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[label] for label in labels], np.int64), classes, ()


def find_listed(listing: Listing, listed: LabelList, place: str) -> np.ndarray:
    """(N,) int64, where the listing has each path of the list; -1 where it has not.

    A path counts from the top, or from the directory that holds everything; or it is absolute, in `place`. One without
    a suffix of an image may leave out that of the file.
    """
    place_of = {name: i for i, name in enumerate(listing.names)}
    stems: dict[str, int] = {}
    if not all(path.lower().endswith(IMAGE_SUFFIXES) for path in listed.paths):
        stems = {name.rpartition(".")[0]: i for i, name in enumerate(listing.names)}
    tops = {name.partition("/")[0] for name in (*listing.names[:1], *listing.names[-1:])}
    top = tops.pop() + "/" if len(tops) == 1 else ""  # as names are sorted, the one of all
    absolute = clean_name(str(Path(place).absolute())) + "/"
    found = np.full(len(listed.paths), -1, np.int64)
    for i, path in enumerate(listed.paths):
        for name in (path, top + path, path.removeprefix(absolute)):
            at = place_of.get(name, stems.get(name, -1))
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
    separator = "\t" if "\t" in first else "," if "," in first else None
    rows: list[tuple[int, list[str]]] = []
    problems: list[tuple[int, str]] = []
    for number, line in lines:
        if separator is None:
            rows.append((number, line.rsplit(None, 1)))
        elif '"' not in line:
            rows.append((number, line.split(separator)))
        else:
            try:
                rows.append((number, next(csv.reader([line], delimiter=separator))))
            except csv.Error as error:
                problems.append((number, str(error)))
    return rows, problems


def _columns(rows: list[list[str]], knows: Callable[[str], bool]) -> tuple[int, tuple[int, int], bool, bool]:
    """How many columns there are, which hold path and label, whether the first row is a header, and whether its labels
    have boxes behind them."""
    if not rows:
        return 2, (0, 1), False, False
    words = [word.strip().lower() for word in rows[0]]
    path = next((i for i, word in enumerate(words) if word in PATH_WORDS), None)
    label = next((i for i, word in enumerate(words) if word in LABEL_WORDS), None)
    if path is not None and label is not None:
        return len(words), (path, label), True, words[label] == BOXES
    firsts = [clean_name(row[0].strip()) for row in rows]
    images = [name.lower().endswith(IMAGE_SUFFIXES) or knows(name) for name in firsts]
    return max(len(words), 2), (0, 1), images == [False, True], False
