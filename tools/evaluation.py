"""What is kept and shown of an evaluation."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ressl.config import EvaluateConfig


def record_evaluation(
    run_dir: Path, network: str, found: dict[str, float], cfg: EvaluateConfig, seconds: float, console: Console
) -> None:
    """Prints the accuracies, and appends them to the run's evaluations.jsonl."""
    table = Table()
    for column in ("evaluation", "top-1"):
        table.add_column(column)
    for key, value in found.items():
        table.add_row({"linear_best": "linear, best epoch on the test images"}.get(key, key), f"{100 * value:.2f} %")
    console.print(f"{run_dir}, {network}", soft_wrap=True)
    console.print(table)
    record = {"network": network, **found, "seconds": round(seconds, 1), "evaluate": cfg.model_dump(mode="json")}
    with (run_dir / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
