"""Rows of Parquet and Arrow files, read by pyarrow: the labels all at once, the images one by one.

pyarrow is imported where it is used, as it is slow to import and most sources do not need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipelines.headers import read_regular
from pipelines.images import BadImage, read_image
from ressl.batch import DataError

POINTER = b"version https://git-lfs"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are read at once: a row group of a Parquet file, or all of an Arrow file, which is mapped."""

    path: Path
    group: int  # in the Parquet file; -1: an Arrow file
    first: int  # row of the file
    count: int
    size: int  # bytes of all columns, unpacked; 0 in an Arrow file


def inspect(path: Path) -> tuple[Any, list[Rows]]:
    """The schema (a pyarrow.Schema), and which rows are read at once. Raises DataError."""
    import pyarrow.parquet

    with _reading(path):
        with path.open("rb") as head:
            if head.read(len(POINTER)) == POINTER:
                raise DataError(f"{path}: a pointer of Git LFS, not the data; fetch the data with `git lfs pull`")
        if not is_parquet(path):
            table = _map_arrow(path)
            return table.schema, [Rows(path, -1, 0, table.num_rows, 0)]
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            firsts = np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
            return file.schema_arrow, [
                Rows(path, i, firsts[i], group.num_rows, group.total_byte_size) for i, group in enumerate(groups)
            ]


def read_column(path: Path, column: str) -> list[Any]:
    """One value for each row; none at all where there is no such column. Raises DataError."""
    import pyarrow.parquet

    with _reading(path):
        if not is_parquet(path):
            table = _map_arrow(path)
            return table.column(column).to_pylist() if column in table.column_names else []
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                return []
            return file.read(columns=[column], use_threads=False).column(column).to_pylist()


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


class RowReader:
    """Reads images by their number.

    No file stays open, so a forked process shares nothing that could be moved. The last rows are kept, and replaced
    as a whole, so that two threads at worst read them twice. pyarrow's own threads, which a fork would lose, stay off.
    """

    def __init__(self, groups: Sequence[Rows], column: str) -> None:
        self.groups, self.column = groups, column
        self.ends = np.cumsum([group.count for group in groups])
        self.kept: tuple[Rows | None, Any] = (None, None)

    def locate(self, i: int) -> tuple[Rows, int]:
        """The rows that image i is among, and its number there."""
        at = int(np.searchsorted(self.ends, i, side="right"))
        return self.groups[at], i - int(self.ends[at]) + self.groups[at].count

    def read(self, i: int) -> bytes | np.ndarray:
        """The image's file. Raises BadImage."""
        group, row = self.locate(i)
        kept, values = self.kept
        try:
            if kept is not group:
                values = _read_rows(group, self.column)
                self.kept = (group, values)
            cell = values[row].as_py()
        except Exception as error:  # of pyarrow's kinds, or whatever damaged data leads to
            raise BadImage(f"its rows of the file cannot be read: {_reason(error)}") from None
        match cell:
            case bytes(data) | {"bytes": bytes(data)}:
                return data
            case {"path": str(path)}:
                return _read_beside(group.path.parent, path)
            case _:
                raise BadImage("no image in this row")


def _read_rows(group: Rows, column: str) -> Any:
    import pyarrow.parquet

    if group.group < 0:
        values = _map_arrow(group.path).column(column)
        values.validate(full=True)  # offsets that point elsewhere would end the process
        return values
    with pyarrow.parquet.ParquetFile(group.path, pre_buffer=False, page_checksum_verification=True) as file:
        return file.read_row_group(group.group, columns=[column], use_threads=False).column(column)


def _map_arrow(path: Path) -> Any:
    """A pyarrow.Table whose columns lie in the mapped file: the stream that `save_to_disk` writes, or an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        whole = source.read_at(6, 0) == b"ARROW1"
        if not whole and source.read_at(8, max(source.size() - 8, 0)) != END_OF_STREAM:
            raise ValueError("it is cut off")  # pyarrow takes the end of the file for that of the stream
        reader = pyarrow.ipc.open_file(source) if whole else pyarrow.ipc.open_stream(source)
        return reader.read_all()


def _read_beside(directory: Path, name: str) -> bytes | np.ndarray:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BadImage(f"only names its file, {name}, and that is not in the data set's directory")
    return read_regular(directory / relative) or read_image(directory / relative)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of pyarrow's kinds, or whatever damaged data leads to
        raise DataError(f"{path}: cannot be read: {_reason(error)}; get it again") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
