"""The directory of a run: config.yaml says whose it is, metrics.jsonl what happened, checkpoints/ where to go on."""

import difflib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from ressl.config import Config
from ressl.config_file import ConfigError, load_config, save_config

# keys, and beginnings of keys, that may differ between a run and its continuation: training depends on none of them, or
# by no more than how numbers are rounded
FREE = (
    "data.max_bad", "data.placement", "data.prefetch", "data.source.budget_gb", "data.source.cache",
    "data.source.memory", "data.source.val", "data.source.workers", "evaluate.", "method.loss_impl", "run.checkpoint.",
    "run.compile", "run.cuda_graphs", "run.device", "run.hang_timeout", "run.knn_every", "run.log_every", "run.out_dir",
    "run.skip_limit", "run.tensorboard", "views.impl",
)  # fmt: skip
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk


class RunDirError(ValueError):
    """A directory that this run may not write to. The message names it and says what to do."""


def config_path(out_dir: Path) -> Path:
    return out_dir / "config.yaml"


def checkpoints_path(out_dir: Path) -> Path:
    return out_dir / "checkpoints"


def metrics_path(out_dir: Path) -> Path:
    return out_dir / "metrics.jsonl"


def bad_images_path(out_dir: Path) -> Path:
    return out_dir / "bad_images.jsonl"


def check_run_dir(cfg: Config, allowed: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Raises RunDirError if `cfg.run.out_dir` cannot be this run's. Changes nothing on the disk.

    `allowed` are keys, or sections, that may differ from what is there; returns those that do, with both values. Raises
    ConfigError where one of them does not exist.
    """
    known = _flat(cfg.model_dump(mode="json"))
    for key in allowed:
        if not any(_within(name, key) for name in known):
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"--allow-change {key}: no such key{f'; did you mean {close[0]}?' if close else ''}")
    out_dir = cfg.run.out_dir
    if not out_dir.exists():
        parent = next(p for p in out_dir.absolute().parents if p.exists())
        if not parent.is_dir():
            raise RunDirError(f"run.out_dir={out_dir} cannot be made: {parent} is a file")
        return {}
    if not out_dir.is_dir():
        raise RunDirError(f"run.out_dir={out_dir} is a file: choose another")
    if not config_path(out_dir).exists():
        if any(path.name != LOCK for path in out_dir.iterdir()):
            raise RunDirError(f"run.out_dir={out_dir} is not empty and holds no run: choose another")
        return {}
    try:
        there = load_config(config_path(out_dir))
    except ConfigError as error:
        raise RunDirError(f"run.out_dir={out_dir} holds a run of another version: choose another\n{error}") from None
    differing = differences(there, cfg)
    refused = {key: pair for key, pair in differing.items() if not any(_within(key, name) for name in allowed)}
    started = checkpoints_path(out_dir).exists() or metrics_path(out_dir).exists()
    if refused and started:
        raise RunDirError(
            f"run.out_dir={out_dir} holds a run of another configuration: choose another, remove it, or go on with a "
            f"change by --allow-change KEY\n{side_by_side(refused)}"
        )
    return differing if started else {}


def make_run_dir(cfg: Config, allowed: Sequence[str] = ()) -> TextIO:
    """Makes the directory, writes the resolved config into it, and locks it until the returned file is closed. Where
    `allowed` keys differ from the run that is there, its config stays until `accept_changes`."""
    changed = check_run_dir(cfg, allowed)
    out_dir = cfg.run.out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = lock(out_dir / LOCK)
        if not changed:
            save_config(cfg, config_path(out_dir))
    except OSError as error:
        if error.errno in FULL:
            raise OSError(error.errno, error.strerror, str(out_dir)) from None
        raise RunDirError(f"run.out_dir={out_dir} cannot be made or written: {error.strerror}") from None
    return held


def accept_changes(cfg: Config, allowed: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The run has been gone on with: what differs, and was `allowed`, is its config now, and stands in its log of
    changes. Returns it, with both values."""
    changed = check_run_dir(cfg, allowed)
    if changed:
        changes = {key: {"from": old, "to": new} for key, (old, new) in changed.items()}
        append_line(cfg.run.out_dir / "changes.jsonl", {"changed": changes})
        save_config(cfg, config_path(cfg.run.out_dir))
    return changed


def again_command(out_dir: Path, *, several_nodes: bool, change: str = "") -> str:
    """What to type to go on with a run, with a `change` of its config."""
    behind = f" {change}" if change else ""
    if several_nodes:  # `resume` knows of one
        return f"its `pretrain` command{behind} on each machine"
    return f"python launch.py resume {quote(str(out_dir))}{behind}"


def side_by_side(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Two columns: what is there, what is here."""
    rows = [("", "there", "here"), *((key, str(old), str(new)) for key, (old, new) in differing.items())]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {key:<{widths[0]}}  {old:<{widths[1]}}  {new}" for key, old, new in rows)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def check_not_in_use(out_dir: Path) -> None:
    """Raises RunDirError if another process holds the lock of the run now. A moment later one may: see `lock`."""
    with suppress(OSError), (out_dir / LOCK).open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(out_dir, held) from None


def _in_use(out_dir: Path, held: TextIO) -> RunDirError:
    held.seek(0)
    return RunDirError(f"{out_dir} is in use by {held.read().strip() or 'another process'}")


def lock(path: Path) -> TextIO:
    """Holds `path`, made if it is not there, until the returned file is closed. Raises RunDirError if another does."""
    held = path.open("a+")
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # it may be that someone only looks: see check_not_in_use
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = _in_use(path.parent, held)
        held.close()
        raise problem from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        text = f"{path.parent} cannot be locked on this file system: see that no other run writes there"
        print(f"ressl: warning: {text}", file=sys.stderr)
    held.truncate(0)
    held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    held.flush()
    return held


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds the record as a line of JSON, whole or not at all. Raises OSError where the disk refuses."""
    line = (json.dumps(record) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file, before)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file of such lines, without what is none; nothing where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def keep_metrics_until(out_dir: Path, step: int) -> None:
    """Drops a torn last line and the records of steps after `step`: a run that goes on from there writes them again."""
    _keep(metrics_path(out_dir), [r for r in lines_of(metrics_path(out_dir)) if _step_of(r) <= step])
    _keep(bad_images_path(out_dir), lines_of(bad_images_path(out_dir)))


def _keep(path: Path, records: list[dict[str, Any]]) -> None:
    if path.exists():
        part = path.with_name(path.name + ".part")
        try:
            with part.open("w") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(part)) from None
        part.replace(path)


def _step_of(record: dict[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ and change what is computed, with both values."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    keys = [*a, *(key for key in b if key not in a)]
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k) and not k.startswith(FREE)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, branch in tree.items() for key, value in _flat(branch, f"{prefix}{name}.").items()}
