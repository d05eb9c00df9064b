"""What is evaluated of a run, and what is kept and shown of it."""

from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from ressl import checkpoint
from ressl.between import best_evaluation
from ressl.checkpoint import Checkpoint, CheckpointError
from ressl.config import EvaluateConfig
from ressl.recorder import warn
from ressl.run_dir import append_line, checkpoints_path

Which = Literal["last", "best"]


def chosen_checkpoint(run_dir: Path, which: Which, console: Console) -> tuple[Path, Checkpoint]:
    """Raises CheckpointError where there is none, or none can be used."""
    directory = checkpoints_path(run_dir)
    match which:
        case "last":
            found = checkpoint.newest(directory, partial(warn, console))
            if found is None:
                raise CheckpointError(f"{directory}: no checkpoint here")
            return found[0], found[1]
        case "best":
            best = best_evaluation(run_dir)
            if best is None:
                raise CheckpointError(f"{run_dir}: no evaluation of a checkpoint that is there: see run.knn_every")
            path = directory / checkpoint.name_of(best[0])
            return path, checkpoint.read(path)


def record_evaluation(
    run_dir: Path,
    network: str,
    step: int | None,
    found: dict[str, float],
    cfg: EvaluateConfig,
    seconds: float,
    console: Console,
) -> None:
    """Prints the accuracies, and appends them to the run's evaluations.jsonl. `step` is that of the checkpoint; None:
    untrained."""
    table = Table()
    for column in ("evaluation", "top-1"):
        table.add_column(column)
    for key, value in found.items():
        table.add_row({"linear_best": "linear, best epoch on the test images"}.get(key, key), f"{100 * value:.2f} %")
    when = "untrained" if step is None else f"after step {step:,}"
    console.print(f"{run_dir}, {network} {when}", soft_wrap=True)
    console.print(table)
    record = {
        "network": network,
        "step": step or 0,
        **found,
        "seconds": round(seconds, 1),
        "evaluate": cfg.model_dump(mode="json"),
    }
    append_line(run_dir / "evaluations.jsonl", record)
