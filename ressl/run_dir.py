"""The directory of a run: config.yaml says whose it is, metrics.jsonl what happened, checkpoint.pt where to go on."""

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

from ressl.config import Config
from ressl.config_file import ConfigError, load_config, save_config

# keys, and beginnings of keys, that may differ between a run and its continuation: training depends on none of them, or
# by no more than how numbers are rounded
FREE = (
    "data.placement", "data.prefetch", "data.source.budget_gb", "data.source.cache", "data.source.memory",
    "data.source.val", "data.source.workers", "evaluate.", "method.loss_impl", "run.checkpoint_every", "run.compile",
    "run.cuda_graphs", "run.device", "run.knn_every", "run.log_every", "run.out_dir", "run.tensorboard", "views.impl",
)  # fmt: skip
LOCK = ".lock"


class RunDirError(ValueError):
    """A directory that this run may not write to. The message names it and says what to do."""


def config_path(out_dir: Path) -> Path:
    return out_dir / "config.yaml"


def checkpoint_path(out_dir: Path) -> Path:
    return out_dir / "checkpoint.pt"


def metrics_path(out_dir: Path) -> Path:
    return out_dir / "metrics.jsonl"


def bad_images_path(out_dir: Path) -> Path:
    return out_dir / "bad_images.jsonl"


def check_run_dir(cfg: Config) -> None:
    """Raises RunDirError if `cfg.run.out_dir` cannot be this run's. Changes nothing on the disk."""
    out_dir = cfg.run.out_dir
    if not out_dir.exists():
        parent = next(p for p in out_dir.absolute().parents if p.exists())
        if not parent.is_dir():
            raise RunDirError(f"run.out_dir={out_dir} cannot be made: {parent} is a file")
        return
    if not out_dir.is_dir():
        raise RunDirError(f"run.out_dir={out_dir} is a file: choose another")
    if not config_path(out_dir).exists():
        if any(path.name != LOCK for path in out_dir.iterdir()):
            raise RunDirError(f"run.out_dir={out_dir} is not empty and holds no run: choose another")
        return
    try:
        there = load_config(config_path(out_dir))
    except ConfigError as error:
        raise RunDirError(f"run.out_dir={out_dir} holds a run of another version: choose another\n{error}") from None
    differing = differences(there, cfg)
    started = checkpoint_path(out_dir).exists() or metrics_path(out_dir).exists()
    if differing and started:
        raise RunDirError(
            f"run.out_dir={out_dir} holds a run of another configuration: choose another, or remove it\n"
            + "\n".join(f"  {key}: {old} there, {new} here" for key, (old, new) in differing.items())
        )


def make_run_dir(cfg: Config) -> TextIO:
    """Makes the directory, writes the resolved config into it, and locks it until the returned file is closed."""
    check_run_dir(cfg)
    out_dir = cfg.run.out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = lock(out_dir / LOCK)
        save_config(cfg, config_path(out_dir))
    except OSError as error:
        raise RunDirError(f"run.out_dir={out_dir} cannot be made or written: {error.strerror}") from None
    return held


def lock(path: Path) -> TextIO:
    """Holds `path`, made if it is not there, until the returned file is closed. Raises RunDirError if another does."""
    held = path.open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise RunDirError(f"{path.parent} is in use by another process") from None
    return held


def keep_metrics_until(out_dir: Path, step: int) -> None:
    """Drops a torn last line and the records of steps after `step`: a run that goes on from there writes them again."""
    path = metrics_path(out_dir)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ and change what is computed, with both values."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    keys = [*a, *(key for key in b if key not in a)]
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k) and not k.startswith(FREE)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, branch in tree.items() for key, value in _flat(branch, f"{prefix}{name}.").items()}
