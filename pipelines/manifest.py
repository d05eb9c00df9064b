"""manifest.json beside converted data: what each file holds, where it came from and what had to be left out. And the
checksum of its tables that the index beside a file keeps."""

import hashlib
import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ressl.batch import DataError

NAME = "manifest.json"
FORMAT = "ressl-manifest-2"
INDEX = ".index.npz"  # behind the name of a .beton or tensor file: its index, see tools/index_file.py


@dataclass(frozen=True, slots=True)
class SplitRecord:
    file: str  # name, in the directory of the manifest
    count: int  # images in the file
    classes: tuple[str, ...]  # label i is classes[i]
    skipped: tuple[dict[str, Any], ...]  # images left out: {"index": int, "name": str, "reason": str}
    changes: dict[str, int]  # what was done to odd images, by the rule -> how many; see tools/encode.py
    bytes: int  # of the file, or of all files of the directory
    index: str  # file with the checksum and the name of each image, relative to the manifest; see tools/index_file.py
    index_sha256: str  # of that file, hexadecimal
    options: dict[str, Any]
    source: dict[str, Any]  # "description", and what `verify` needs to find it again: "place", "labels", "split"


@dataclass(frozen=True, slots=True)
class Manifest:
    splits: dict[str, SplitRecord] = field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in `directory`, or None where there is none. Raises DataError for one that cannot be understood."""
    path = Path(directory) / NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening, as that would wait for whoever writes to a FIFO
            raise DataError(f"{path}: not a regular file; remove it or convert again")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise DataError(f"{path}: format {raw['format']!r}, expected {FORMAT!r}; convert into another directory")
        return Manifest({name: _record(record) for name, record in raw["splits"].items()})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: not a manifest written by `convert`; remove it or convert again") from None


def manifest_text(manifest: Manifest) -> str:
    """Pure ASCII, sorted keys: the same contents give the same bytes. `sha256`, of the splits, is for `verify`."""
    splits = {
        name: {part.name: getattr(record, part.name) for part in fields(SplitRecord)}
        for name, record in manifest.splits.items()
    }
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode("ascii")).hexdigest()
    return json.dumps({"format": FORMAT, "sha256": digest, "splits": splits}, indent=1, sort_keys=True) + "\n"


def classes_of(path: Path) -> tuple[str, ...]:
    """Class names of the data file at `path` from the manifest beside it; () where none lists the file."""
    path = Path(path)
    if path.name in ("", ".."):  # `.` and `..` have no name to look for
        path = path.resolve()
    manifest = read_manifest(path.parent)
    records = manifest.splits.values() if manifest else ()
    return next((record.classes for record in records if record.file == path.name), ())


def check_tables(path: Path, parts: Iterable[bytes]) -> None:
    """Raises DataError unless `parts`, all of a .beton or tensor file but its images, are what its index knows. Where
    there is no index beside it, nothing can be told."""
    known = _tables_sha256(path.with_name(path.name + INDEX))
    digest = hashlib.sha256()
    for part in parts if known is not None else ():
        digest.update(part)
    if known is not None and digest.hexdigest() != known:
        raise DataError(
            f"{path}: its tables are not those that {path.name}{INDEX} knows: damaged, or one of both is of another "
            "conversion; convert or copy both again"
        )


def _tables_sha256(index: Path) -> str | None:
    try:
        if not stat.S_ISREG(index.stat().st_mode):
            raise DataError(f"{index}: not a regular file; copy it or convert again")
        with index.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return str(file["tables_sha256"].item().decode("ascii"))
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror or 'damaged'}; copy it or convert again") from None
    except Exception:  # zipfile and numpy raise a dozen types for damaged data, in words that help nobody
        raise DataError(f"{index}: damaged; copy it or convert again") from None


def _record(raw: dict[str, Any]) -> SplitRecord:
    record = SplitRecord(**{**raw, "classes": tuple(raw["classes"]), "skipped": tuple(raw["skipped"])})
    texts = (record.file, record.index, record.index_sha256, *record.classes)
    if type(record.count) is not int or type(raw["classes"]) is not list:  # True is an int too
        raise TypeError
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return record
