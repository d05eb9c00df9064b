"""How a verb ends: a person's mistake, the machine's limits and a run's own troubles each in one message and a code."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from ressl.batch import DataError
from ressl.checkpoint import CheckpointError, NonFiniteWeights, SaveError
from ressl.config_file import ConfigError
from ressl.evals.features import NonFiniteFeatures
from ressl.guard import NonFiniteRun
from ressl.pretrain import RanksDiffer
from ressl.run_dir import RunDirError
from ressl.runtime import MachineError
from ressl.stop import Stopped
from tools.convert import DiskFull
from tools.early import AT_ONCE, HANG, STOPPED
from tools.forked import WorkerDied
from tools.processes import ProcessesFailed, another_failed, first_to_fail, tell_stopped

SMALLER = "lower optim.batch_size or method.queue_size, or raise optim.accumulate"


def exit_code(verb: Callable[[], object]) -> int:
    """Runs `verb` and returns its exit code: 2 for a mistake in what was asked, 3 for a checkpoint that cannot be
    used, 4 for what the machine lacks, 5 for numbers that are not finite, 75 for a run that was asked to stop and has
    saved. What no one foresaw keeps its traceback."""
    try:
        return int(verb() or 0)  # type: ignore[call-overload]
    except ProcessesFailed as failed:  # the process that failed has said why
        return failed.exit_code
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be what was lost
                print(f"ressl: {stopped}", file=sys.stderr, flush=True)
        return 0 if tell_stopped() else STOPPED
    except (ConfigError, DataError, RunDirError, RanksDiffer) as error:
        return _fail(error, 2)
    except CheckpointError as error:
        return _fail(error, 3)
    except (MachineError, DiskFull, WorkerDied, SaveError) as error:
        return _fail(error, 4)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 4 if full else 2)
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        return _fail(f"{reason}; {SMALLER}", 4)
    except (NonFiniteRun, NonFiniteFeatures, NonFiniteWeights) as error:
        return _fail(error, 5)
    except RuntimeError as error:
        if another_failed():  # and this process lost touch with it
            return 1
        if "DefaultCPUAllocator" not in str(error):
            raise
        return _fail(f"out of memory; {SMALLER}", 4)
    except SystemExit as stop:  # typer has said what there is to say, except after Ctrl-C
        return _fail("stopped", AT_ONCE) if stop.code == AT_ONCE else int(stop.code or 0)


def end_hanging(message: str) -> None:
    """Ends this process, which hangs, at once: no part of it can be waited for."""
    _fail(message, HANG)
    sys.stderr.flush()
    os._exit(HANG)


def _fail(error: object, code: int) -> int:
    if first_to_fail(code):
        with suppress(OSError):
            print(f"ressl: error: {error}", file=sys.stderr, flush=True)
    return code
