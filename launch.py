"""The front door and the map: builds every part from the config, introduces them to each other, starts the loop.

    python launch.py quickstart
    python launch.py pretrain configs/imagenet_resnet50_200ep_paper.yaml --gpus 8 optim.epochs=100

This is the only file that knows pipelines/, ressl/ and tools/ alike. `python launch.py VERB --help` explains each verb.
"""

import sys

from tools.early import begin

if __name__ == "__main__":
    begin(*sys.argv[1:2])

if __name__ == "__main__" and sys.argv[1:] == ["doctor"]:  # it must work where torch, imported below, does not
    from rich.console import Console

    from tools.doctor import run_doctor

    sys.exit(run_doctor(Console()))

import json
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from pipelines import build_loaders, check_data
from pipelines.loader import ViewStream, fused
from pipelines.placement import settle
from pipelines.sampler import check_split
from ressl.batch import Loaders
from ressl.checkpoint import Checkpoint
from ressl.config import Config
from ressl.config_file import ConfigError, load_config
from ressl.evals.protocol import evaluate as evaluate_backbone
from ressl.method import build_method
from ressl.pretrain import pretrain as train_run
from ressl.recorder import BadImages, warn
from ressl.run_dir import check_not_in_use, check_run_dir, checkpoints_path
from ressl.runtime import Runtime, launched, preferred_device
from ressl.snapshot import restore_method_
from tools.convert import convert as convert_data
from tools.decoding import shown_decoding
from tools.doctor import run_doctor
from tools.encode import Check, Format, Mode
from tools.ending import end_hanging, exit_code
from tools.evaluation import Which, chosen_checkpoint, record_evaluation
from tools.nodes import check_nodes
from tools.plan import make_plan, on_processes, print_plan, remarks
from tools.preview import draw_views
from tools.processes import another_failed, run_processes, tell_done
from tools.profiling.compare import compare as compare_profiles
from tools.profiling.report import print_profile, write_profile
from tools.profiling.run import profile as take_profile
from tools.quickstart import quickstart as run_quickstart
from tools.resuming import config_of, newest_manifest, processes_of
from tools.terminal import leave, plain_console, prepare_terminal, settle_streams
from tools.verify import verify as verify_data

HELP = """Relational self-supervised learning: prepare images, pretrain an encoder, evaluate it.

Every verb explains itself: python launch.py VERB --help. Start with: python launch.py quickstart"""
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=HELP,
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="values in place of the config's")
]
Gpus = Annotated[int, typer.Option(help="processes, one for each GPU of this machine", min=0)]
Processes = Annotated[int, typer.Option(help="processes on the CPU, joined by gloo", min=0)]
MaxRestarts = Annotated[
    int, typer.Option(help="times to start again after a process was lost or hung, or met a bug", min=0)
]
AllowChange = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="go on although this key of the config has another value now")
]
RunDir = Annotated[Path, typer.Argument(help="directory of a run, as run.out_dir")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file such as those in configs/")]


# --- training --------------------------------------------------------------------------------------------------------


def run(cfg: Config, console: Console, allowed: Sequence[str] = ()) -> float:
    """Trains one run in this process, which may be one of several, and returns its images per second."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)  # the same on every rank: it draws the initial weights and the initial queue
    bad_images = BadImages(cfg.run.out_dir, console, runtime.rank)
    return train_run(
        cfg,
        runtime,
        _open_loaders(cfg, runtime, console, bad_images),
        bad_images,
        console,
        remarks=remarks(cfg, runtime.world_size),
        allowed=allowed,
        end=end_hanging,
        lost=partial(another_failed, wait=False),
        done=tell_done,
    )


def _open_loaders(cfg: Config, runtime: Runtime, console: Console, bad_images: BadImages) -> Loaders:
    with shown_decoding(console, enabled=runtime.is_main) as progress:
        loaders = build_loaders(
            cfg, device=runtime.device, dtype=runtime.dtype, rank=runtime.rank, world_size=runtime.world_size,
            cores=settle(cfg.data.placement, runtime.device), report=bad_images.report,
            report_val=partial(bad_images.report, training=False), progress=progress,
        )  # fmt: skip
    assert isinstance(loaders.train, ViewStream)
    if runtime.is_main and fused(cfg.views.impl, runtime.device):
        console.print("compiling the kernels of the views, which takes some seconds the first time")
    loaders.train.warm_up()
    return loaders


def evaluate_run(
    cfg: Config,
    console: Console,
    saved: tuple[Path, Checkpoint] | None,
    *,
    network: Literal["student", "teacher"] = "student",
    knn: bool = True,
    linear: bool = True,
) -> dict[str, float]:
    """Evaluates the backbone of a checkpoint that was read from a path, or of the same seed before training."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    with shown_decoding(console) as progress:
        loaders = build_loaders(cfg, device=runtime.device, report=partial(warn, console), progress=progress)
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    if saved:
        restore_method_(method, saved[1], saved[0])
    encoder = method.student if network == "student" else method.teacher
    with console.status("") as status:
        return evaluate_backbone(
            encoder.get_submodule("backbone"),
            loaders.probes,
            cfg.evaluate,
            knn=knn,
            linear=linear,
            seed=cfg.run.seed,
            gather=runtime.gather_rows,
            progress=status.update,
        )


# --- verbs -----------------------------------------------------------------------------------------------------------


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="directory of the run, replaced if it exists")] = Path("runs/quickstart"),
    images: Annotated[Path | None, typer.Option(help="image folder or IDX directory instead of Fashion-MNIST")] = None,
    epochs: Annotated[int, typer.Option(help="0: 6, or 30 on a GPU", min=0)] = 0,
) -> None:
    """Trains ReSSL on real images in a few minutes, and shows what it learned.

    Takes Fashion-MNIST (70,000 images; the Debian package, or a download), writes it as an FFCV file, draws a picture
    of weak and strong views, pretrains a small ResNet, and evaluates it before and after.
    """

    def judge(cfg: Config, console: Console, *, untrained: bool) -> dict[str, float]:
        saved = None if untrained else chosen_checkpoint(cfg.run.out_dir, "last", console)
        return evaluate_run(cfg, console, saved)

    run_quickstart(out, images, epochs, plain_console(), train=run, evaluate=judge, views=draw_views)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="a folder, archive or directory of archives, or torchvision:NAME[:ROOT]")],
    dst: Annotated[Path, typer.Argument(help="directory for the result")],
    to: Annotated[Format, typer.Option(help="ffcv: .beton files; tensor: one file; webdataset: shards of image files")],
    mode: Annotated[Mode, typer.Option(help="ffcv: how images are stored; original: JPEG files as they are")] = "auto",
    jpg_share: Annotated[float, typer.Option(help="smart: share of images stored as JPEG, the rest raw")] = 0.5,
    quality: Annotated[int, typer.Option(help="JPEG quality, 1 to 100, of what is encoded anew")] = 90,
    max_side: Annotated[int | None, typer.Option(help="shrink larger images to this longer side, pixels")] = None,
    exif_rotate: Annotated[bool, typer.Option("--exif-rotate", help="turn images as their EXIF data says")] = False,
    check: Annotated[Check, typer.Option(help="of files stored as they are: decode all, or read headers")] = "decode",
    shard_mb: Annotated[int, typer.Option(help="webdataset: size of a shard, MB")] = 1000,
    labels: Annotated[Path | None, typer.Option(help="a list of `path label`, or CSV, instead of folders")] = None,
    split: Annotated[str | None, typer.Option(help="take only this split, or name the only one")] = None,
    max_skipped: Annotated[float, typer.Option(help="share of unreadable images above which it fails")] = 0.01,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="mix the classes, for data.shuffle: blocks")] = False,
    workers: Annotated[int, typer.Option(help="processes; 0: one for each core", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that exist")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted conversion left")] = False,
) -> None:
    """Turns images into the files that the sources `ffcv`, `resident` (tensor) and `dali` (webdataset) read.

    Tells the size, time and loss of quality to expect before it begins. Whatever interrupts it, the same command goes
    on where it was. What cannot be read is named, counted, left out and listed in manifest.json.
    """
    if not src.strip():
        raise ConfigError("convert: SRC is empty")
    convert_data(
        src, dst, to, mode=mode, jpg_share=jpg_share, quality=quality, max_side=max_side, exif_rotate=exif_rotate,
        check=check, shard_mb=shard_mb, labels=labels, split=split, max_skipped=max_skipped, shuffle=shuffle,
        workers=workers, overwrite=overwrite, restart=restart, console=Console(),
    )  # fmt: skip


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(help="a directory made by convert, or one file or directory in it")],
    deep: Annotated[bool, typer.Option("--deep", help="decode every image, and compare all with the source")] = False,
    source: Annotated[str | None, typer.Option(help="where the source is now, if it was moved")] = None,
    labels: Annotated[Path | None, typer.Option(help="where the list of labels is now")] = None,
    workers: Annotated[int, typer.Option(help="processes; 0: one for each core", min=0)] = 0,
) -> None:
    """Proves that converted data is whole: structure, counts, checksums of all images. Exits with 2 where it is not."""
    whole = verify_data(data, deep=deep, source=source, labels=labels, workers=workers, console=plain_console())
    raise typer.Exit(0 if whole else 2)


@app.command()
def views(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the picture, PNG")] = Path("views.png"),
    images: Annotated[int, typer.Option(help="columns of the picture", min=1, max=64)] = 8,
    epoch: Annotated[int, typer.Option(help="of which the first images are shown", min=0, max=2**31)] = 0,
    compare: Annotated[Path | None, typer.Option(metavar="CONFIG", help="show its source beside the other")] = None,
) -> None:
    """Draws what the networks see: each image with its weak view and its strong views, as the run would make them.

    Below each view are the numbers that were drawn for it. With --compare the same images come from the sources of both
    configs, cut with the same numbers, and the difference is drawn and measured.
    """
    if not out.name:
        raise ConfigError(f"--out {out}: expected the name of a file, such as views.png")
    other = load_config(compare, []) if compare else None
    draw_views(load_config(config, overrides or []), out, images=images, epoch=epoch, other=other)
    plain_console().print(f"wrote {out}", soft_wrap=True)


@app.command()
def profile(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="a YAML file such as those in configs/")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="directory for profile.json and profile.html")] = Path("runs/profile"),
    gpus: Gpus = 0,
    processes: Processes = 0,
    seconds: Annotated[float, typer.Option(help="how long it may take, about", min=10)] = 120,
    trace: Annotated[
        bool, typer.Option("--trace", help="write trace.json of some steps, for Chrome or Perfetto")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="compare two profiles, take none")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="--compare: how much slower B may be", min=0)] = 0.1,
) -> None:
    """Shows where the time of a run goes on this machine, what binds it, and which line of the config to change.

    Times every stage of a step alone, and the whole step on the run's own data and on frames that lie ready. Trains
    nothing. With --compare it ends with 1 where B is slower than A beyond the tolerance and the noise of both.
    """
    if compare:
        raise typer.Exit(0 if compare_profiles(*compare, tolerance=tolerance, console=plain_console()) else 1)
    if config is None:
        raise ConfigError("profile: expected a CONFIG, or --compare A.json B.json")
    cfg, console = on_processes(load_config(config, overrides or []), gpus, processes), plain_console()
    found = take_profile(
        cfg, console, title=config.stem, command=shlex.join(["python", *sys.argv]), processes=processes, gpus=gpus,
        out=out, seconds=seconds, trace=trace,
    )  # fmt: skip
    print_profile(found, console)
    console.print(*(f"wrote {path}" for path in write_profile(found, out)), sep="\n", soft_wrap=True)


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Gpus = 0,
    processes: Processes = 0,
    nodes: Annotated[int, typer.Option(help="machines; the same command is typed on each", min=1)] = 1,
    node_rank: Annotated[int, typer.Option(help="which of them this is, from 0", min=0)] = 0,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, where they meet")] = None,
    max_restarts: MaxRestarts = 0,
    allow_change: AllowChange = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what the run would be, and stop")] = False,
) -> None:
    """Trains an encoder. A directory that holds this run's checkpoint goes on after it.

    Without --gpus and --processes it trains in this process, on a GPU if there is one. A batch is optim.batch_size
    images over all processes, and so are the images of each step, their order and their views; what batch norm
    normalises together depends on the number of processes unless encoder.batchnorm is sync (--dry-run shows it).

    Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end with exit code 75; the same command then goes on.
    """
    cfg = on_processes(load_config(config, overrides or []), gpus, processes)
    check_nodes(nodes, node_rank, rendezvous, gpus or processes)
    ranks, console, allowed = gpus or processes or 1, plain_console(), allow_change or []
    world_size = nodes * ranks
    if not launched():  # what can be told before any process starts
        check_split(cfg.optim.batch_size, world_size, cfg.optim.accumulate)
        check_run_dir(cfg, allowed)
    if dry_run:
        images = check_data(cfg, preferred_device(cfg.run), world_size)
        print_plan(make_plan(cfg, images=images, world_size=world_size), cfg, console)
        for line in remarks(cfg, world_size):
            console.print(line, soft_wrap=True)
        return
    if launched():
        run(cfg, console, allowed)
        return
    if nodes == 1:  # a node that was lost may come back while the others still end
        check_not_in_use(cfg.run.out_dir)  # the first rank would find out too, but after all images are decoded
    if world_size > 1 or max_restarts:
        run_processes(
            sys.argv, ranks, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, settings=repr(cfg),
            max_restarts=max_restarts, run_dir=cfg.run.out_dir,
        )  # fmt: skip
    else:
        run(cfg, console, allowed)
    if node_rank == 0:
        console.print(f"wrote {checkpoints_path(cfg.run.out_dir)}; evaluate it with", soft_wrap=True)
        console.print(f"python launch.py evaluate {shlex.quote(str(cfg.run.out_dir))}", soft_wrap=True)


@app.command()
def resume(
    run_dir: RunDir,
    overrides: Overrides = None,
    gpus: Gpus = 0,
    processes: Processes = 0,
    max_restarts: MaxRestarts = 0,
    allow_change: AllowChange = None,
) -> None:
    """Goes on with a run from its last checkpoint, with as many processes as it had, unless told otherwise: with any
    number the images, their order and their views stay the same."""
    config = config_of(run_dir)
    given = [*(overrides or []), f"run.out_dir={json.dumps(str(run_dir))}"]
    about = newest_manifest(run_dir)
    if not (gpus or processes):
        given.insert(0, f"run.device={about.device}")
        gpus, processes = (0, 0) if launched() else processes_of(about, run_dir)
    pretrain(config, given, gpus, processes, max_restarts=max_restarts, allow_change=allow_change)


@app.command()
def evaluate(
    run_dir: RunDir,
    overrides: Overrides = None,
    network: Annotated[Literal["student", "teacher"], typer.Option(help="whose backbone")] = "student",
    knn: Annotated[bool, typer.Option(help="k nearest neighbours")] = True,
    linear: Annotated[bool, typer.Option(help="a linear classifier on frozen features")] = True,
    untrained: Annotated[bool, typer.Option("--untrained", help="the same encoder before its first step")] = False,
    which: Annotated[Which, typer.Option("--checkpoint", help="best: of those that run.knn_every asks for")] = "last",
) -> None:
    """Measures what a run's encoder has learned: kNN and linear top-1 accuracy, as the config's `evaluate` says."""
    config = config_of(run_dir)
    if launched():
        raise ConfigError("evaluate runs as one process: start it without torchrun")
    if not knn and not linear:
        raise ConfigError("--no-knn and --no-linear leave nothing to do")
    forced = [f"run.out_dir={json.dumps(str(run_dir))}", "run.precision=fp32"]
    cfg = load_config(config, [*(overrides or []), *forced])
    console, started = plain_console(), time.perf_counter()
    saved = None if untrained else chosen_checkpoint(run_dir, which, console)
    found = evaluate_run(cfg, console, saved, network=network, knn=knn, linear=linear)
    step = saved[1].about.step if saved else None
    record_evaluation(run_dir, network, step, found, cfg.evaluate, time.perf_counter() - started, console)


@app.command()
def doctor() -> None:
    """Shows what this machine has and lacks, with the line to type for each thing missing."""
    raise typer.Exit(run_doctor(Console()))


def main() -> int:
    """Runs the verb that was asked for. A person's mistake ends in one message and a code, never in a traceback."""
    prepare_terminal()
    return settle_streams(exit_code(app))


if __name__ == "__main__":
    leave(main())
