"""The first run: real images, an FFCV file, a picture of the views, a small ResNet trained and evaluated."""

import json
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import torch
from rich.console import Console
from rich.table import Table

from ressl.batch import DataError
from ressl.config import Config
from ressl.config_file import load_config
from ressl.run_dir import LOCK, lock, make_run_dir
from tools.convert import convert, overlap
from tools.image_sets import FASHION_MNIST, detect

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MARK = ".quickstart"  # in every directory that a quickstart made, and may replace
GPU_EPOCHS = 30


class Evaluate(Protocol):
    def __call__(self, cfg: Config, console: Console, *, untrained: bool) -> dict[str, float]: ...


def quickstart(
    out: Path,
    images: Path | None,
    epochs: int,
    console: Console,
    *,
    train: Callable[[Config, Console], float],
    evaluate: Evaluate,
    views: Callable[[Config, Path], None],
) -> None:
    """Leaves `out` with data/, views.png, config.yaml, metrics.jsonl, checkpoints/ and summary.json.

    A directory that an earlier quickstart made is replaced; any other one that is not empty is refused.
    """
    started = time.perf_counter()
    source, cfg = _prepare(out, images, epochs)
    with lock(out / MARK):
        console.rule("1/4  images")
        if cfg.data.source.name != "ffcv":
            console.print("FFCV is not installed (`launch.py doctor` says how): the images stay in memory instead")
        to: Literal["ffcv", "tensor"] = "ffcv" if cfg.data.source.name == "ffcv" else "tensor"
        manifest = convert(source, out / "data", to, console=console)

        console.rule("2/4  views: what teacher and student see")
        views(cfg, out / "views.png")
        console.print(f"wrote {out / 'views.png'}", soft_wrap=True)

        console.rule("3/4  the encoder before training")
        before = evaluate(cfg, console, untrained=True)
        console.print(_percent(before))

        console.rule("4/4  pretraining without labels, then the encoder again")
        images_per_s = train(cfg, console)
        after = evaluate(cfg, console, untrained=False)
        console.print(_percent(after))

        summary = _summary(
            cfg, manifest.splits["train"].count, images_per_s, before, after, time.perf_counter() - started
        )
        part = out / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.replace(out / "summary.json")
        console.print(_table(summary, cfg.data.source.name, out))


def _prepare(out: Path, images: Path | None, epochs: int) -> tuple[str, Config]:
    """Finds every mistake before an older quickstart in `out` is cleared away."""
    source = str(images or (FASHION_MNIST if FASHION_MNIST.is_dir() else "torchvision:FashionMNIST"))
    cfg = _config(out, find_spec("ffcv") is not None, epochs or (GPU_EPOCHS if torch.cuda.is_available() else 0))
    missing = sorted({"train", "val"} - detect(source).sets.keys())
    if missing:
        raise DataError(f"{source}: has no images for {missing[0]}; a quickstart needs train/ and val/ (or test/)")
    if Path(source).is_dir() and overlap(Path(source), out):
        raise DataError(f"{source} and {out}: one lies in the other, and a quickstart replaces --out: choose another")
    _clear(out)
    make_run_dir(cfg).close()
    return source, cfg


def _summary(
    cfg: Config, images: int, images_per_s: float, before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, float]:
    return {
        "images": images,
        "epochs": cfg.optim.epochs,
        "images_per_s": round(images_per_s, 1),
        "knn_before": round(before["knn"], 4),
        "knn_after": round(after["knn"], 4),
        "linear_before": round(before["linear"], 4),
        "linear_after": round(after["linear"], 4),
        "seconds": round(seconds, 1),
    }


def _config(out: Path, ffcv: bool, epochs: int) -> Config:
    name, suffix = ("ffcv", "beton") if ffcv else ("resident", "safetensors")
    train, val = (json.dumps(str(out / "data" / f"{split}.{suffix}")) for split in ("train", "val"))
    overrides = [f"run.out_dir={json.dumps(str(out))}", f"data.source={{name: {name}, train: {train}, val: {val}}}"]
    return load_config(CONFIG, overrides + ([f"optim.epochs={epochs}"] if epochs else []))


def _clear(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} is no directory of its own: choose another --out")
    if not out.exists():
        return
    if any(out.iterdir()) and not (out / MARK).exists():
        raise DataError(f"{out} is not empty and was not made by a quickstart: choose another --out")
    with lock(out / MARK), lock(out / LOCK):  # nobody is writing to it
        shutil.rmtree(out)


def _percent(found: dict[str, float]) -> str:
    return f"kNN {100 * found['knn']:.2f} %   linear {100 * found['linear']:.2f} %"


def _table(summary: dict[str, float], source: str, out: Path) -> Table:
    table = Table(title=f"quickstart: {out / 'summary.json'}", title_justify="left")
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="right" if column else "left")
    for key, title in (("knn", "kNN top-1"), ("linear", "linear top-1")):
        before, after = 100 * summary[f"{key}_before"], 100 * summary[f"{key}_after"]
        table.add_row(title, f"{before:.2f} %", f"{after:.2f} %", f"{after - before:+.2f} points")
    table.add_section()
    table.add_row("images", "", f"{summary['images']:,}", f"through {source}")
    table.add_row("epochs", "", str(summary["epochs"]), "")
    table.add_row("training", "", f"{summary['images_per_s']:,.0f}", "images/s")
    table.add_row("all together", "", f"{summary['seconds']:,.0f}", "seconds")
    return table
