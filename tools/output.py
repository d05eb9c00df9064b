"""Files that appear under their name only when they are whole."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ressl.batch import DataError


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """A new, empty, seekable file `<path>.part` that becomes `path` when the block ends.

    On any exception, Ctrl-C included, the .part file is removed and an older file at `path` stays as it was. Raises
    DataError where the file cannot be made or another process is writing it; OSError (disk full) comes through.
    """
    part = path.with_name(path.name + ".part")
    file = _open_alone(part)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):  # what could not be flushed has been reported above
            file.close()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _open_alone(part: Path) -> BinaryIO:
    """Opens and empties `part`, which a killed process may have left; its lock shows one that is still alive."""
    try:
        part.touch()
        file = part.open("r+b")
    except OSError as error:
        raise DataError(f"{part}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), part.stat()):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        file.close()
        raise DataError(f"{part}: another process is writing this file; wait for it or choose another place") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    return file
