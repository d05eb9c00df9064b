"""Lists zip files (PKWARE's APPNOTE, 4.3) without an object for each member, from the table at their end."""

import os
import stat
import struct
from array import array
from io import FileIO
from pathlib import Path

import numpy as np

from ressl.batch import DataError
from tools.image_sets.members import DEFLATED, ENCRYPTED, LINK, STORED, UNKNOWN_METHOD, Members, clean_name

ENTRY = struct.Struct("<4s6H3L5H2L")  # of the table of contents: 46 bytes before name, extra fields and comment
END = struct.Struct("<4s4H2LH")  # end of the table of contents, before a comment
LOCATOR = struct.Struct("<4sLQL")  # right before it, where the numbers need 64 bits
END_64 = struct.Struct("<4sQ2H2L4Q")
MAX_COMMENT = 0xFFFF
METHODS = {0: STORED, 8: DEFLATED}
AGAIN = "get it again"


def is_zip(path: Path) -> bool:
    """Whether a regular file begins like a zip file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(4) in (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
    except OSError:
        return False


def list_zip(path: Path) -> Members:
    """All members but directories, in the order of the table. Raises DataError where it is damaged or cut off."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file; give a zip file")
        with FileIO(path) as file:
            status = os.fstat(file.fileno())
            start, length, prefix = _find_table(path, file.fileno(), status.st_size)
            table = os.pread(file.fileno(), length, start)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return _read_table(path, (status.st_size, status.st_mtime_ns), table, start, prefix)


def _find_table(path: Path, descriptor: int, size: int) -> tuple[int, int, int]:
    """First byte and length of the table, and how many bytes are before what offsets count from."""
    tail_start = max(0, size - END.size - MAX_COMMENT)
    tail = os.pread(descriptor, size - tail_start, tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + END.size > len(tail):
        raise DataError(
            f"{path}: has no table of contents before its end at byte {size:,}: cut off or damaged; {AGAIN}"
        )
    _, disk, first_disk, _, _, length, offset, _ = END.unpack_from(tail, at)
    end = tail_start + at
    locator = os.pread(descriptor, LOCATOR.size, end - LOCATOR.size) if end >= LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        end -= LOCATOR.size + END_64.size
        record = os.pread(descriptor, END_64.size, end) if end >= 0 else b""
        if not record.startswith(b"PK\6\6") or len(record) < END_64.size:
            raise DataError(f"{path}: damaged at byte {max(end, 0):,}, before the end of its table; {AGAIN}")
        _, _, _, _, disk, first_disk, _, _, length, offset = END_64.unpack(record)
    if disk or first_disk:
        raise DataError(f"{path}: one part of a zip file in several; join them, as with `zip -s 0`")
    start = end - length
    if start < offset:
        raise DataError(
            f"{path}: its table of contents should begin at byte {offset:,}, before byte {start:,}; {AGAIN}"
        )
    return start, length, start - offset


def _read_table(path: Path, stamp: tuple[int, int], table: bytes, start: int, prefix: int) -> Members:
    names: list[str] = []
    directories: list[str] = []
    kinds, crcs = bytearray(), array("I")
    offsets, stored, sizes = array("q"), array("q"), array("q")
    at = 0
    while at < len(table):  # and not by the number of entries, which small counters of some writers cannot hold
        head = table[at : at + ENTRY.size]
        if len(head) < ENTRY.size or not head.startswith(b"PK\1\2"):
            raise DataError(f"{path}: its table of contents is damaged at byte {start + at:,}; {AGAIN}")
        _, made_by, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, external, offset = ENTRY.unpack(head)
        after_name = at + ENTRY.size + lengths[0]
        raw, extra = table[at + ENTRY.size : after_name], table[after_name : after_name + lengths[1]]
        at += ENTRY.size + sum(lengths)
        if 0xFFFFFFFF in (size, packed, offset):
            size, packed, offset = _wide(extra, (size, packed, offset))
        if disk not in (0, 0xFFFF) or at > len(table) or prefix + offset >= start:
            raise DataError(f"{path}: its table of contents is damaged before byte {start + at:,}; {AGAIN}")
        written = _text(raw, flags).replace("\\", "/")
        name = clean_name(written)
        if written.endswith("/") or not name:
            directories.append(name.rstrip("/"))
            continue
        is_link = made_by >> 8 == 3 and stat.S_ISLNK(external >> 16)  # 3: Unix
        names.append(name)
        kinds.append(LINK if is_link else ENCRYPTED if flags & 1 else METHODS.get(method, UNKNOWN_METHOD))
        crcs.append(crc)
        offsets.append(prefix + offset)
        stored.append(packed)
        sizes.append(size)
    return Members(
        archives=(path,),
        stamps=(stamp,),
        names=tuple(names),
        archive=np.zeros(len(names), np.int32),
        offset=np.array(offsets, np.int64),
        stored=np.array(stored, np.int64),
        size=np.array(sizes, np.int64),
        kind=np.frombuffer(bytes(kinds), np.int8),
        crc=np.array(crcs, np.uint32),
        directories=tuple(directories),
    )


def _wide(extra: bytes, fields: tuple[int, int, int]) -> tuple[int, ...]:
    """Size, stored bytes and offset: those that are all ones stand, in this order, in the extra field 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            numbers = iter(struct.unpack_from(f"<{min(len(wide) // 8, 3)}Q", wide))
            # one that is missing stays 4 GiB: above what any image may have
            return tuple(next(numbers, field) if field == 0xFFFFFFFF else field for field in fields)
        at += 4 + length
    return fields


def _text(raw: bytes, flags: int) -> str:
    """Bit 11 says UTF-8. Where it is not set many tools write UTF-8 all the same, the others code page 437."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if flags & 0x800 else raw.decode("cp437")
