"""What `convert` reads of data sets as the Hugging Face hub gives them away and its library saves them.

Parquet files of a directory or of one configuration in it, and the Arrow files of `save_to_disk`. Which column holds
the images comes from the features that are noted with the data, or from the columns' names. pyarrow reads them.
"""

import json
import math
import os
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ressl.batch import DataError
from tools.image_sets.array_files import is_file, read_file
from tools.image_sets.features import Columns, byte_columns, choose_columns, image_column, noted_features
from tools.image_sets.image_set import ImageSet, Origin
from tools.image_sets.members import stamp_of
from tools.image_sets.table_rows import RowReader, Rows, inspect, is_parquet, read_column
from tools.image_sets.tree import directory_tree
from tools.image_sets.words import split_in, split_of

MAX_DIRECTORIES = 32  # in which configurations are looked for
MAX_CLASSES = 1_000_000
SHARD = re.compile(r"([A-Za-z0-9_.-]+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
CHUNK_BYTES = 32 << 20  # of images, about, in one task
MAPPED_CHUNK = 64  # images of a mapped file in one task
LARGE_GROUP = 512 << 20  # bytes

Splits = dict[str, tuple[Path, ...]]


def find_parquet(root: Path) -> Origin | None:
    """The data set in the directory `root`, or in the one Parquet file `root`.

    None where there is none, or where its first file is a list beside images: without a column of bytes, or without one
    that is noted or named as images where there are image files. Raises DataError where a file is missing or damaged,
    where there are several configurations, and where pyarrow is missing.
    """
    saved = _find_saved(root)
    found, config, unused = (saved, "", ()) if saved else _find_parquet_files(root)
    if not found:
        return None
    _require_pyarrow(root)
    if not saved and _is_list(root, next(iter(found.values()))[0], config):
        return None
    splits = _rename_splits(root, found)
    listed = ", ".join(f"{split} from {len(paths):,} file{'s' * (len(paths) != 1)}" for split, paths in splits.items())
    left = f"; not used: {', '.join(unused[:5])}" if unused else ""
    place = f"{root / config}" if config else f"{root}"
    kind = "Arrow" if saved else "Parquet"
    sets = {split: partial(_load_split, root, config, splits, split) for split in splits}
    return Origin(f"{kind} files in {place}: {listed}{left}", dict(sets))


def _is_list(root: Path, path: Path, config: str) -> bool:
    schema, _ = inspect(path)
    if not byte_columns(schema):
        return True
    known = image_column(schema, noted_features(schema, (root, path.parent), config))
    return not known and root.is_dir() and bool(directory_tree(root).images("").names)


def _require_pyarrow(root: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError(f"{root}: pyarrow is needed to read it; install it: pip install pyarrow") from None


# --- which files -----------------------------------------------------------------------------------------------------


def _find_saved(root: Path) -> Splits:
    """Of `save_to_disk`: the files of each split, or of `train` where there are no splits."""
    if is_file(root / "dataset_dict.json"):
        names = _read_json(root / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{root / 'dataset_dict.json'}: names no splits; save the data set again")
        for name in names:
            _check_split_name(root, name)
        return {name: _saved_files(root / name) for name in names}
    if is_file(root / "state.json") and is_file(root / "dataset_info.json"):
        return {"train": _saved_files(root)}
    return {}


def _saved_files(directory: Path) -> tuple[Path, ...]:
    files = _read_json(directory / "state.json").get("_data_files")
    named = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    names = [name for name in named if isinstance(name, str) and name and name == PurePosixPath(name).name]
    if not names or len(names) < len(named):
        raise DataError(f"{directory / 'state.json'}: names no files beside it; save the data set again")
    for name in names:
        if not is_file(directory / name):
            raise DataError(f"{directory / name}: no such file, but state.json names it; copy the data set again")
    return tuple(directory / name for name in names)


def _find_parquet_files(root: Path) -> tuple[Splits, str, tuple[str, ...]]:
    """The files of each split, the configuration's directory if there is one, and files of no split."""
    if root.suffix.lower() == ".parquet" and is_file(root):
        return {_split_of(root.name) or "train": (root,)}, "", ()
    by_config: dict[str, list[str]] = {}
    relatives, unseen = _list_parquet(root)
    for relative in relatives:
        parts = [part for part in PurePosixPath(relative).parts[:-1] if part != "data" and not split_in(part)]
        by_config.setdefault("/".join(parts), []).append(relative)
    left = (f"{unseen:,} further directories, which were not looked into",) if unseen else ()
    if len(by_config) > 1:
        configs = sorted(by_config)
        named = [name or "(the directory itself)" for name in configs]
        listed = ", ".join([*named[:10], *["..."] * (len(configs) > 10), *left])
        raise DataError(f"{root}: Parquet files of several configurations: {listed}; give one, as {root / configs[-1]}")
    if not by_config:
        return {}, "", ()
    ((config, chosen),) = by_config.items()
    splits: dict[str, list[str]] = {}
    for relative in chosen:
        splits.setdefault(_split_of(relative), []).append(relative)
    unnamed = splits.pop("", [])
    if not splits:
        splits, unnamed = {"train": unnamed}, []
    for names in splits.values():
        _check_complete(root, names)
    return {split: tuple(root / name for name in names) for split, names in splits.items()}, config, (*unnamed, *left)


def _list_parquet(root: Path) -> tuple[list[str], int]:
    """Sorted within each directory: those in `root`, one level down, and in directories of splits two levels down; and
    how many directories were not looked into, as those of images can be huge."""
    found, directories = _entries(root)
    for name in directories[:MAX_DIRECTORIES]:
        inner, deeper = _entries(root / name)
        found += [f"{name}/{file}" for file in inner]
        for split in (directory for directory in deeper if directory == "data" or split_in(directory)):
            found += [f"{name}/{split}/{file}" for file in _entries(root / name / split)[0]]
    return found, max(0, len(directories) - MAX_DIRECTORIES)


def _entries(directory: Path) -> tuple[list[str], list[str]]:
    """Parquet files and directories, sorted. `metadata.parquet` is a list of the image files beside it."""
    files, directories = [], []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.lower().endswith(".parquet"):
                    if entry.name != "metadata.parquet" and entry.name[0] not in "._" and entry.is_file():
                        files.append(entry.name)
                elif entry.name[0] != "." and _is_directory(entry):
                    directories.append(entry.name)
    except OSError:  # not a directory, or one that may not be listed: no data set of this kind
        return [], []
    return sorted(files), sorted(directories)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _split_of(relative: str) -> str:
    """By the words in the file's name, its name before `-00000-of-00001`, or the words in its directory; empty: by
    none."""
    path = PurePosixPath(relative.lower())
    shard = SHARD.fullmatch(path.stem)
    return split_in(path.stem) or (shard[1] if shard else split_in(path.parent.name))


def _check_complete(root: Path, relatives: list[str]) -> None:
    """That of `train-00000-of-00002.parquet` and its like all are there."""
    names: dict[tuple[str, str], set[int]] = {}
    for relative in relatives:
        path = PurePosixPath(relative)
        if shard := SHARD.fullmatch(path.stem):
            names.setdefault((f"{path.with_name(shard[1])}", shard[3]), set()).add(int(shard[2]))
    for (name, count), found in names.items():
        missing = sorted(set(range(int(count))) - found)
        if missing:
            example = f"{name}-{missing[0]:05}-of-{count}.parquet"
            raise DataError(f"{root}: {len(missing):,} of {int(count):,} files are missing, as {example}; get them")


def _rename_splits(root: Path, found: Splits) -> Splits:
    """To our names: train, val, which is their test if they have no other, and all others as they are."""
    splits: Splits = {}
    for name, paths in found.items():
        _check_split_name(root, name)
        ours = split_of(name) or name
        if ours in splits:
            raise DataError(f"{root}: {name} is the split {ours}, which is there under another name too; give one")
        splits[ours] = paths
    if "val" not in splits and "test" in splits:
        splits["val"] = splits.pop("test")
    order = ["train", "val", *sorted(splits.keys() - {"train", "val"})]
    return {name: splits[name] for name in order if name in splits}


def _check_split_name(root: Path, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DataError(f"{root}: a split named {name!r}; rename it to letters, digits, - and _")


def _read_json(path: Path) -> dict[str, Any]:
    data = read_file(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); get it again") from None
    return content if isinstance(content, dict) else {}


# --- one split -------------------------------------------------------------------------------------------------------


def _load_split(root: Path, config: str, splits: Splits, split: str) -> ImageSet:
    paths = splits[split]
    schemas, rows = zip(*map(inspect, paths), strict=True)
    columns = choose_columns(schemas[0], noted_features(schemas[0], (root, paths[0].parent), config), paths[0])
    for path, schema in zip(paths, schemas, strict=True):
        for column in filter(None, (columns.image, columns.label)):
            if column not in schema.names or schema.field(column).type != schemas[0].field(column).type:
                raise DataError(f"{path}: its column {column!r} is not as in {paths[0]}; get both again")
    groups = [group for found in rows for group in found if group.count]
    if not groups:
        raise DataError(f"{paths[0]}: no rows, nor in any other file for {split}; get them again")
    labels, classes = _load_labels(splits, split, columns, sum(group.count for group in groups))
    reader = RowReader(groups, columns.image)

    def name(i: int) -> str:
        group, row = reader.locate(i)
        file = group.path.name if group.path == root else group.path.relative_to(root)
        return f"{file}[{group.first + row}]"

    notes = [columns.note] if columns.note else []
    size = max(group.size for group in groups)
    if size > LARGE_GROUP:
        notes.append(f"its row groups take {size / 2**30:.1f} GiB, and each worker holds one: use few workers")
    stamps = [(path.name, *stamp_of(path)) for path in paths]
    return ImageSet(
        labels=labels,
        classes=classes,
        name=name,
        read=reader.read,
        stamp=lambda i: stamp_of(reader.locate(i)[0].path),
        identity=f"{zlib.crc32(repr(stamps).encode()):08x}",
        notes=tuple(notes),
        chunk=_chunk(groups),
        in_order=True,
    )


def _load_labels(splits: Splits, split: str, columns: Columns, total: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 and the classes. Where these are not noted, all splits together tell which there are."""
    if columns.label is None:
        return np.full(total, -1, np.int64), columns.names
    path = splits[split][0]
    labels = [label for file in splits[split] for label in read_column(file, columns.label)]
    others = [] if columns.names else [file for name in splits if name != split for file in splits[name]]
    labels = [_whole(label) for label in labels]
    elsewhere = {_whole(label) for file in others for label in read_column(file, columns.label)}
    known = {*labels, *elsewhere} - {None}
    if known and all(isinstance(label, str) for label in known):
        classes = tuple(sorted(known))
        numbers = {label: number for number, label in enumerate(classes)} | {None: -1}
        return np.array([numbers[label] for label in labels], np.int64), classes
    limit = len(columns.names) or MAX_CLASSES
    wrong = next((label for label in known if not isinstance(label, int) or not -1 <= label < limit), None)
    if wrong is not None:
        raise DataError(f"{path}: label {wrong!r} in column {columns.label!r}, expected numbers below {limit:,}")
    classes = columns.names or tuple(map(str, range(max(known, default=-1) + 1)))
    return np.array([-1 if label is None else label for label in labels], np.int64), classes


def _whole(label: Any) -> Any:
    """Numbers with a fraction of nothing, as columns with gaps have them, as integers; None for one that is missing."""
    if not isinstance(label, float):
        return int(label) if isinstance(label, bool) else label
    return None if math.isnan(label) else int(label) if label.is_integer() else label


def _chunk(groups: list[Rows]) -> int:
    """A whole part of the usual row group, or a few whole ones, so that hardly one is read for two tasks."""
    if not is_parquet(groups[0].path):
        return MAPPED_CHUNK
    ((rows, _),) = Counter(group.count for group in groups).most_common(1)
    image = sum(group.size for group in groups) / sum(group.count for group in groups)
    most = int(min(max(CHUNK_BYTES / max(image, 1), 1), 1024))
    return -(-rows // -(-rows // most)) if rows > most else rows * max(min(16, most) // rows, 1)
