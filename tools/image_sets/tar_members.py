"""Lists tar files (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU) without an object for each member.

The standard library's reader takes several times as long, and ends silently at a damaged header; ImageNet has 1.28
million of them.
"""

import os
import stat
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from ressl.batch import DataError
from tools.image_sets.members import BROKEN_LINK, DEVICE, LINK, PLAIN, SPARSE, Members, clean_name

BLOCK = 512  # bytes; everything starts at a multiple of it
ZEROS = bytes(BLOCK)
END_MARK = 2 * BLOCK  # bytes of zeros
ANY_PADDING = 1 << 16  # bytes of zeros behind the end mark that need no reason
RECORDS = tuple(BLOCK << i for i in range(16))  # bytes, up to 16 MiB: to a multiple of one of them tapes are padded
MAX_HEADER = 1 << 20  # bytes of a long name or of pax records
FILE, DIRECTORY, GNU_DIRECTORY, HARD_LINK = b"0\x007", b"5", b"D", b"1"
WITHOUT_DATA = b"123456"  # types whose size counts no data behind the header
KINDS = {HARD_LINK: BROKEN_LINK, b"2": LINK, b"3": DEVICE, b"4": DEVICE, b"6": DEVICE, b"S": SPARSE}
AGAIN = "get it again"


@dataclass(slots=True)
class _Found:
    names: list[str] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    directories: list[str] = field(default_factory=list)
    links: dict[int, str] = field(default_factory=dict)  # which members are hard links, and to what


@dataclass(slots=True)
class _Next:
    """What extended headers say of the member behind them."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    sparse: bool = False


def list_tar(path: Path, limit: int | None = None) -> Members:
    """All members but directories, in the order of the archive; the first `limit` of them where it is given.

    A hard link is another name for the data of the member before it that it names. Raises DataError, with the archive
    and the byte, where it is damaged, cut off, or goes on behind its end mark.
    """
    with _open_tar(path) as file:
        status = os.fstat(file.fileno())
        found = _scan(file.fileno(), str(path), (0, status.st_size), inner=False, limit=limit)
    return _table(path, (status.st_size, status.st_mtime_ns), found)


def list_inner_tar(outer: Members, member: int, rename: Callable[[str], str]) -> Members:
    """The members of a tar file that is itself a plain member of a tar file, under new names."""
    path, start = outer.archives[outer.archive[member]], int(outer.offset[member])
    where = f"{path}: {outer.names[member]}"
    with _open_tar(path) as file:
        found = _scan(file.fileno(), where, (start, start + int(outer.size[member])), inner=True, limit=None)
    found.names = [rename(name) for name in found.names]
    found.directories = [rename(name) for name in found.directories]
    return _table(path, outer.stamps[outer.archive[member]], found)


def is_tar(path: Path) -> bool:
    """Whether a regular file begins like a tar file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            header = file.read(BLOCK)
    except OSError:
        return False
    return len(header) == BLOCK and (header == ZEROS or _is_header(header))


def _open_tar(path: Path) -> FileIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening, as that would wait for whoever writes to a FIFO
            raise DataError(f"{path}: not a regular file; give a tar file")
        return FileIO(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _table(path: Path, stamp: tuple[int, int], found: _Found) -> Members:
    sizes, count = np.array(found.sizes, np.int64), len(found.names)
    return Members(
        archives=(path,),
        stamps=(stamp,),
        names=tuple(found.names),
        archive=np.zeros(count, np.int32),
        offset=np.array(found.offsets, np.int64),
        stored=sizes,
        size=sizes,
        kind=np.frombuffer(bytes(found.kinds), np.int8),
        crc=np.zeros(count, np.uint32),
        directories=tuple(found.directories),
    )


def _scan(descriptor: int, where: str, span: tuple[int, int], *, inner: bool, limit: int | None) -> _Found:
    """`span`: first byte and end of the tar file. An `inner` one may do without an end mark: its size is known."""
    at, end = span
    found, ahead, is_ahead = _Found(), _Next(), False
    while limit is None or len(found.names) < limit:
        header = os.pread(descriptor, min(BLOCK, end - at), at) if at < end else b""
        if header == ZEROS or (inner and at == end):
            _check_padding(descriptor, where, span, at)
            break
        if len(header) < BLOCK:
            raise DataError(
                f"{where}: ends at byte {end:,} without tar's end mark, as a file does that was cut off; {AGAIN}, or "
                "add 1,024 zero bytes if it is whole"
            )
        kind, size = header[156:157], _number(header[124:136])
        if size < 0 or not _is_header(header):
            raise DataError(f"{where}: no header of a member at byte {at:,}, where one belongs: damaged; {AGAIN}")
        if ahead.size is not None and kind not in b"xXgLK":
            size = ahead.size
        data, at = at + BLOCK, _behind(at + BLOCK, 0 if kind in WITHOUT_DATA else size)
        if kind == b"S":
            at += _sparse_headers(descriptor, header, data)
        if at > end + (-end % BLOCK if inner else 0):
            raise DataError(
                f"{where}: its member at byte {data - BLOCK:,} should go on to byte {at:,}, but it ends at byte "
                f"{end:,}: cut off or damaged; {AGAIN}"
            )
        if kind in b"xXLKg":
            if kind != b"g":
                _read_ahead(ahead, kind, _small_part(descriptor, data, size, where))
                is_ahead = True
            continue
        _add(found, header, ahead, kind, data, size)
        if is_ahead:
            ahead, is_ahead = _Next(), False
    _follow_links(found)
    return found


def _add(found: _Found, header: bytes, ahead: _Next, kind: bytes, data: int, size: int) -> None:
    raw = ahead.name or _name(header)
    name = clean_name(raw.decode("utf-8", "surrogateescape"))
    if kind in (DIRECTORY, GNU_DIRECTORY) or (kind in FILE and raw.endswith(b"/")):
        found.directories.append(name.rstrip("/"))
        return
    if kind == HARD_LINK:
        target = ahead.link or header[157:257].split(b"\0", 1)[0]
        found.links[len(found.names)] = clean_name(target.decode("utf-8", "surrogateescape"))
    found.names.append(name)
    found.kinds.append(SPARSE if ahead.sparse else KINDS.get(kind, PLAIN if kind in FILE else DEVICE))
    found.offsets.append(data)
    found.sizes.append(size)


def _follow_links(found: _Found) -> None:
    """tar writes a file that has several names once, and then its further names."""
    if not found.links:
        return
    before: dict[str, int] = {}
    for i, name in enumerate(found.names):
        target = before.get(found.links[i], -1) if i in found.links else -1
        if target >= 0:
            for column in (found.kinds, found.offsets, found.sizes):
                column[i] = column[target]
        before[name] = i


def _check_padding(descriptor: int, where: str, span: tuple[int, int], at: int) -> None:
    """What follows an end mark at byte `at` has to be zeros, and no more of them than a writer adds.

    A download to which its whole size was given before it was finished has zeros where data are missing. What is longer
    than any padding is not read.
    """
    start, end = span
    rest = end - at
    whole = rest <= ANY_PADDING or any(rest <= n + END_MARK and (end - start) % n == 0 for n in RECORDS)
    padding = os.pread(descriptor, rest, at) if whole else b""
    if padding.count(0) < len(padding) or not whole:
        behind = len(padding) - len(padding.lstrip(b"\0"))
        found = f"something else at byte {at + behind:,}" if whole else f"{rest:,} bytes more"
        raise DataError(
            f"{where}: {found}, behind tar's end mark at byte {at:,}: two archives in one file, or a download that is "
            f"not finished; {AGAIN}, or cut it off at byte {at + END_MARK:,} if it is whole up to there"
        )


def _is_header(header: bytes) -> bool:
    """By its checksum: the sum of its bytes, the field itself taken for blanks. Some old writers sum signed bytes."""
    field = header[148:156]
    noted = _number(field)
    # Adler-32's low half is 1 + the sum, modulo 65,521, in a twentieth of the time that sum() takes
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * 32
    if (noted - total) % 65521 == 0:
        return True
    signed = sum(byte - 256 * (byte > 127) for byte in header) - sum(field) + 8 * 32
    return noted == signed


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set; -1 for what is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _behind(start: int, size: int) -> int:
    return start + size + (-size % BLOCK)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _sparse_headers(descriptor: int, header: bytes, at: int) -> int:
    """Bytes of the maps that follow the header of a GNU sparse member; each says whether there is another."""
    length, more = 0, header[482]
    while more:
        block = os.pread(descriptor, BLOCK, at + length)
        length += BLOCK
        more = len(block) == BLOCK and block[504]
    return length


def _small_part(descriptor: int, at: int, size: int, where: str) -> bytes:
    if size > MAX_HEADER:
        raise DataError(f"{where}: an extended header of {size:,} bytes at byte {at - BLOCK:,}: damaged; {AGAIN}")
    return os.pread(descriptor, size, at)


def _read_ahead(ahead: _Next, kind: bytes, data: bytes) -> None:
    """GNU's long names, or pax records: `LENGTH KEY=VALUE` and a line feed, the length counting all of it."""
    if kind == b"L":
        ahead.name = data.split(b"\0", 1)[0]
        return
    if kind == b"K":
        ahead.link = data.split(b"\0", 1)[0]
        return
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not 0 < length <= len(data):
            return  # the records behind it are lost; the member's own header still tells its place
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        data = data[length:]
        if key == b"path":
            ahead.name = value
        elif key == b"linkpath":
            ahead.link = value
        elif key == b"size" and value.isdigit():
            ahead.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            ahead.sparse = True
