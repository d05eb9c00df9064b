"""How a verb ends: a person's mistake, the machine's limits and a run's own troubles each in one message and a code."""

import errno
import sys
from collections.abc import Callable

import torch

from ressl.batch import DataError
from ressl.checkpoint import CheckpointError, NonFiniteWeights, SaveError
from ressl.config_file import ConfigError
from ressl.evals.features import NonFiniteFeatures
from ressl.recorder import NonFiniteLoss
from ressl.run_dir import RunDirError
from ressl.runtime import MachineError
from tools.convert import DiskFull
from tools.forked import WorkerDied
from tools.processes import ProcessesFailed, another_failed, first_to_fail

STOPPED = 130  # after Ctrl-C
SMALLER = "lower optim.batch_size or method.queue_size, or raise optim.accumulate"


def exit_code(verb: Callable[[], object]) -> int:
    """Runs `verb` and returns its exit code: 2 for a mistake in what was asked, 3 for a checkpoint that cannot be
    used, 4 for what the machine lacks, 5 for numbers that are not finite. What no one foresaw keeps its traceback."""
    try:
        return int(verb() or 0)  # type: ignore[call-overload]
    except ProcessesFailed as failed:  # the process that failed has said why
        return failed.exit_code
    except (ConfigError, DataError, RunDirError) as error:
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
    except (NonFiniteLoss, NonFiniteFeatures, NonFiniteWeights) as error:
        return _fail(error, 5)
    except RuntimeError as error:
        if another_failed():  # and this process lost touch with it
            return 1
        if "DefaultCPUAllocator" not in str(error):
            raise
        return _fail(f"out of memory; {SMALLER}", 4)
    except SystemExit as stop:  # typer has said what there is to say, except after Ctrl-C
        return _fail("stopped", STOPPED) if stop.code == STOPPED else int(stop.code or 0)


def _fail(error: object, code: int) -> int:
    if first_to_fail(code):
        print(f"ressl: error: {error}", file=sys.stderr)
    return code
