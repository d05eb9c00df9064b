"""Files inside archives: one table for tar and zip, from which any of them can be read at any time."""

import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from pipelines.images import MAX_BYTES, BadImage
from ressl.batch import DataError

PLAIN, STORED, DEFLATED, ENCRYPTED, UNKNOWN_METHOD, LINK, SPARSE, DEVICE, REPLACED, BROKEN_LINK = range(10)
"""What a member is: PLAIN in a tar file, the next four in a zip; of the last five none is read. A BROKEN_LINK is a hard
link to what is not before it in the tar file: it stands for a file, and is listed as one."""
UNREADABLE = {
    LINK: "(link)",
    SPARSE: "(sparse)",
    DEVICE: "(device)",
    REPLACED: "(replaced later in the archive)",
}
MAX_OPEN = 256  # archives that stay open; a process may have 1,024 files on most systems
LOCAL_HEADER = 30  # bytes, before a zip member's name: its lengths count here, not those of the table of contents


@dataclass(frozen=True, slots=True)
class Members:
    """N members of some archives. Arrays and one tuple of text, as a million objects would take a GiB."""

    archives: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]  # bytes and mtime (ns) of each archive as it was listed
    names: tuple[str, ...]  # (N,) as `clean_name` leaves them; nothing is ever written under them
    archive: np.ndarray  # (N,) int32, which archive holds the member
    offset: np.ndarray  # (N,) int64, of its first byte; in a zip, of its local header
    stored: np.ndarray  # (N,) int64, bytes in the archive
    size: np.ndarray  # (N,) int64, bytes of the file
    kind: np.ndarray  # (N,) int8, PLAIN ... BROKEN_LINK
    crc: np.ndarray  # (N,) uint32, of the file, as zlib defines it; 0 in a tar file, which has none
    directories: tuple[str, ...]  # that are listed by themselves, and so may be empty


def join(parts: Sequence[Members]) -> Members:
    """The members of all of them, one after another."""
    stamps = {path: stamp for part in parts for path, stamp in zip(part.archives, part.stamps, strict=True)}
    number = {path: i for i, path in enumerate(stamps)}
    archive = [np.array([number[path] for path in part.archives], np.int32)[part.archive] for part in parts]
    return Members(
        archives=tuple(stamps),
        stamps=tuple(stamps.values()),
        names=tuple(name for part in parts for name in part.names),
        archive=np.concatenate(archive),
        offset=np.concatenate([part.offset for part in parts]),
        stored=np.concatenate([part.stored for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        kind=np.concatenate([part.kind for part in parts]),
        crc=np.concatenate([part.crc for part in parts]),
        directories=tuple(name for part in parts for name in part.directories),
    )


def clean_name(name: str) -> str:
    """Without a leading `/` or `./`, and without `..`: a label, in the form in which directories list theirs."""
    if name.startswith(("/", ".")) or "//" in name or "/." in name:
        return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
    return name


def stamp_of(path: Path | str) -> tuple[int, int]:
    """Bytes and mtime (ns); (-1, -1) where it is gone."""
    try:
        status = os.stat(path)  # noqa: PTH116  # making a Path takes longer than the call
    except OSError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


class MemberFiles:
    """Reads members, from any number of threads and forked processes at once: by pread, which moves no offset.

    Without a lock, as a fork could catch one that another thread holds.
    """

    def __init__(self, members: Members, max_open: int = MAX_OPEN) -> None:
        self.members, self.max_open = members, max_open
        self.files: dict[int, FileIO] = {}  # those that stay open, until this object goes
        weakref.finalize(self, _close_all, self.files)

    def read(self, member: int) -> bytes:
        """The whole file. Raises BadImage, and DataError for an archive that is gone or no more the one that was
        listed: each of its members would be another one."""
        kind, size = int(self.members.kind[member]), int(self.members.size[member])
        if kind == ENCRYPTED:
            raise BadImage("encrypted in the zip file; images without a password are read")
        if kind == UNKNOWN_METHOD:
            raise BadImage("compressed in the zip file by another method than deflate; pack or unpack it again")
        if kind == BROKEN_LINK:
            raise BadImage("a hard link to a file that is not before it in the tar file; pack it again")
        if size > MAX_BYTES:
            raise BadImage(f"{size / 2**30:.1f} GiB, over the limit of {MAX_BYTES / 2**30:.0f} GiB a file")
        try:
            data = self._stored_bytes(member, kind)
        except OSError as error:
            raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
        if kind == DEFLATED:
            data = _inflate(data, size)
        if len(data) != size:
            raise BadImage(f"damaged in the archive: {len(data):,} bytes, but {size:,} are listed")
        if kind != PLAIN and zlib.crc32(data) != int(self.members.crc[member]):
            raise BadImage("damaged in the zip file: its checksum differs")
        return data

    def _stored_bytes(self, member: int, kind: int) -> bytes:
        number = int(self.members.archive[member])
        offset, length = int(self.members.offset[member]), int(self.members.stored[member])
        if length > MAX_BYTES:
            raise BadImage("damaged in the archive: more bytes are stored than the limit of a file")
        file = self.files.get(number) or self._open(number)
        try:
            if kind != PLAIN:
                header = os.pread(file.fileno(), LOCAL_HEADER, offset)
                if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                    raise BadImage("damaged in the zip file: it does not begin where the table of contents says")
                offset += LOCAL_HEADER + sum(np.frombuffer(header, "<u2", 2, offset=26).tolist())
            return os.pread(file.fileno(), length, offset)
        finally:
            if number not in self.files:
                file.close()

    def _open(self, number: int) -> FileIO:
        path = self.members.archives[number]
        try:
            file = FileIO(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more: {error.strerror}; start again") from None
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != self.members.stamps[number]:
            file.close()
            raise DataError(f"{path}: changed since it was listed; start again")
        if len(self.files) >= self.max_open:
            return file
        kept = self.files.setdefault(number, file)  # another thread's, where that was quicker
        if kept is not file:
            file.close()
        return kept


def _close_all(files: dict[int, FileIO]) -> None:
    for file in files.values():
        file.close()


def _inflate(data: bytes, size: int) -> bytes:
    """Never makes more than one byte above `size`, whatever the data say."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return decoder.decompress(data, size + 1)
    except zlib.error:
        raise BadImage("damaged in the zip file: its deflated data cannot be read") from None
