"""The index beside a .beton or tensor file: name and checksum of every image, and one checksum of all the rest.

`<file>.index.npz` belongs to `<file>`; a directory of shards has its own index.npz, with the same and more. Training
does not read it: `verify` does, and whoever wants to know which file an image was.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.shards import ZIP
from ressl.batch import DataError

SUFFIX = ".index.npz"
FORMAT = b"ressl-index-1"
PARTS = ("format", "crc32", "names", "name_end", "tables_sha256")


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """Of N images, in the order of the file."""

    crc32: np.ndarray  # (N,) uint32, of each image's data as it is in the file, as zlib defines it
    names: np.ndarray  # (bytes,) uint8, the images' names in UTF-8, one after another
    name_end: np.ndarray  # (N,) int64, where each name ends
    tables_sha256: str  # hexadecimal, of what comes before the data and then what comes behind them

    def name(self, position: int) -> str:
        """Of the image in the data set that was converted."""
        start = int(self.name_end[position - 1]) if position else 0
        return self.names[start : int(self.name_end[position])].tobytes().decode("utf-8", "replace")


def write_index_file(path: Path, crc32: np.ndarray, names: Iterable[str], tables_sha256: str) -> None:
    joined, ends = join_names(names)
    np.savez(
        path,
        format=np.array(FORMAT),
        crc32=crc32.astype(np.uint32),
        names=joined,
        name_end=ends,
        tables_sha256=np.array(tables_sha256.encode("ascii")),
    )


def read_index_file(path: Path) -> ImageIndex:
    """Raises DataError for whatever is no such index, whole."""
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening, as that would wait for whoever writes to a FIFO
            raise DataError(f"{path}: not a regular file; copy it or convert again")
        with path.open("rb") as opened:
            if opened.read(len(ZIP)) != ZIP:  # numpy would take it for a pickle
                raise DataError(f"{path}: not a zip file, as an index is; copy it or convert again")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                for part in PARTS:
                    arrays[part] = np.asarray(file[part])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or 'damaged'}; copy it or convert again") from None
    except Exception:  # zipfile and numpy raise a dozen types for damaged data, in words that help nobody
        raise DataError(f"{path}: damaged; copy it or convert again") from None
    if arrays["format"].shape != () or arrays["format"].item() != FORMAT:
        raise DataError(f"{path}: not an index of the format {FORMAT.decode()}; convert again")
    crc32, names, ends, tables = (arrays[part] for part in PARTS[1:])
    kinds = (crc32.dtype, names.dtype, ends.dtype, tables.dtype) == (np.uint32, np.uint8, np.int64, np.dtype("S64"))
    if not kinds or (crc32.ndim, names.ndim, tables.ndim) != (1, 1, 0) or ends.shape != crc32.shape:
        raise DataError(f"{path}: damaged: its tables have other types or shapes; convert again")
    last = int(ends[-1]) if len(ends) else 0
    if last != len(names) or (np.diff(ends, prepend=0) < 0).any():
        raise DataError(f"{path}: damaged: names of impossible lengths; convert again")
    return ImageIndex(crc32, names, ends, tables.item().decode("ascii", "replace"))


def join_names(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes,) uint8, all names in UTF-8, and (N,) int64, where each ends."""
    encoded = [name.encode("utf-8", "replace") for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends
