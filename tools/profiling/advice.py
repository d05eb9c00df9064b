"""Lines of the config that should make a run faster, and what they should bring.

A rate that was not measured is a bound: that of whatever binds next. Lines that are set already, and such as the device
cannot do, are not given; nor are those that would make another run of it, but for what is said beside them.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ressl.config import Config, DaliSource, FfcvSource, FolderSource, ResidentSource, SyntheticSource
from tools.profiling.alternatives import BF16
from tools.profiling.record import Advice, Binding, Measured, StageName

SMALLER = 400  # pixels of the longer side that --max-side is advised for
LOADER: tuple[StageName, ...] = ("read", "decode", "copy")
ROOM = 0.5  # share of the free memory that a resident set may take
WORTH = 1.05  # times as fast, below which a line is not given
SHARED = 1.15  # times as long as without a loader, from which a step on a CPU lacks the cores that decode
WAITING = 0.05  # share of a real step that may be spent waiting before anything is said of it
TELLING = 0.1  # share of the step from which a part of it is worth a line
MOST_PREFETCH = 8


@dataclass(frozen=True, slots=True)
class Facts:
    """Medians: seconds of a step."""

    measured: Measured
    real: float
    synthetic: float
    loader: float
    wait: float
    stages: dict[StageName, float]

    @property
    def images(self) -> int:
        """Of a step over all ranks."""
        return self.measured.images * self.measured.world_size

    def rate(self, step: float) -> float:
        """Images/s over all ranks of a run whose step, without loading, takes `step`."""
        return self.images / max(step, self.loader)

    def share(self, name: StageName) -> float:
        """Of the parts of a step that pass one after another."""
        return self.stages[name] / sum(value for stage, value in self.stages.items() if stage not in LOADER)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def advise(cfg: Config, facts: Facts, binding: Binding) -> tuple[Advice, ...]:
    """The most telling first."""
    match binding:
        case "read":
            found = (*_read_less(cfg, facts), *_keep(cfg, facts))
        case "decode":
            found = (*_more_threads(cfg, facts), *_decode_less(cfg, facts), *_keep(cfg, facts))
        case "copy":
            found = (*_copy_less(cfg, facts), *_keep(cfg, facts))
        case "views":
            found = tuple(_cut_faster(cfg, facts))
        case "all-reduce":
            found = tuple(_send_less(cfg, facts))
        case "host":
            found = (*_launch_less(cfg, facts), *_coarser(cfg, facts))
        case "step":
            found = (*_beside(cfg, facts), *_coarser(cfg, facts), *_faster_loss(cfg, facts), *_fuse(cfg, facts))
    return found


def _bound(facts: Facts, line: str, why: str) -> Advice:
    """Of a line that takes the loader's burden away: the step alone binds next."""
    return Advice(line=line, why=why, images_per_s=facts.images / facts.synthetic, measured=False)


# --- the loader ------------------------------------------------------------------------------------------------------


def _more_threads(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source, curve = cfg.data.source, {p.count: median(p.images_per_s) for p in facts.measured.loader_scaling}
    if isinstance(source, SyntheticSource | ResidentSource) or not curve:
        return
    present, most = source.workers or facts.measured.cores, max(curve)
    rate = curve[most] * facts.measured.world_size
    if present < most and rate > WORTH * facts.images / facts.loader:
        why = f"{present} of {most} cores decode; with all of them the loader alone gave {rate:,.0f} images/s"
        yield Advice(
            line="data.source.workers=0", why=why, images_per_s=min(rate, facts.images / facts.synthetic), measured=True
        )


def _decode_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, DaliSource) and facts.measured.device == "cuda" and source.hw_decoder_load < 1:
        yield _bound(facts, "data.source.hw_decoder_load=1.0", "the JPEG engines take what the cores decode now")
    if isinstance(source, FolderSource | DaliSource) and not _is_shards(source):
        yield _bound(facts, _convert(source.train), "FFCV's decoder on smaller files takes a fraction of the work")
    elif isinstance(source, FfcvSource) and facts.measured.side > SMALLER:
        why = f"images are {facts.measured.side} pixels long on average; convert the original ones again, smaller"
        yield _bound(facts, _convert(Path("IMAGES")), why)


def _read_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, FfcvSource):
        if source.cache == "os":
            why = "pages are read ahead, and neighbours together, where the file does not fit into memory"
            yield _bound(facts, "data.source.cache=process data.shuffle=blocks", why)
    elif isinstance(source, FolderSource) or (isinstance(source, DaliSource) and not _is_shards(source)):
        yield _bound(facts, _convert(source.train), "one file, smaller images: fewer and shorter reads")


def _copy_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, ResidentSource):
        if source.memory == "host" and facts.measured.set_bytes < ROOM * facts.measured.free_bytes:
            yield _bound(facts, "data.source.memory=device", "the images fit beside the run: nothing is copied")
    elif not isinstance(source, SyntheticSource) and facts.measured.side > SMALLER:
        yield _bound(facts, _convert(Path("IMAGES")), f"images are {facts.measured.side} pixels long on average")


def _keep(cfg: Config, facts: Facts) -> Iterator[Advice]:
    """Decoding once, where all images fit into the memory."""
    source, need = cfg.data.source, facts.measured.set_bytes
    if isinstance(source, SyntheticSource | ResidentSource) or need > ROOM * facts.measured.free_bytes:
        return
    places = f"train: {json.dumps(str(source.train))}"
    if source.val:
        places += f", val: {json.dumps(str(source.val))}"
    budget = "" if need < 7e9 else f", budget_gb: {1.2 * need / 1e9:.0f}"
    line = shlex.quote(f"data.source={{name: resident, {places}{budget}}}")
    yield _bound(facts, line, f"all images take {need / 1e9:,.1f} GB decoded: they are kept, and decoded once")


def _beside(cfg: Config, facts: Facts) -> Iterator[Advice]:
    """Where the loader alone is fast enough, and the step slower with it than without."""
    more = min(MOST_PREFETCH, 2 * cfg.data.prefetch)
    lacking = facts.real > SHARED * facts.synthetic and facts.stages.get("decode", 0.0) > TELLING * facts.synthetic
    if facts.measured.device == "cpu" and lacking:
        yield from _keep(cfg, facts)  # decoding takes the cores from the step
    elif facts.wait > WAITING * facts.real and more > cfg.data.prefetch:
        yield _bound(facts, f"data.prefetch={more}", "the loader is fast enough on average, but not at every step")


def _is_shards(source: FolderSource | DaliSource) -> bool:
    return (source.train / "index.npz").exists()


def _convert(images: Path) -> str:
    return f"python launch.py convert {shlex.quote(str(images))} DIRECTORY --to ffcv --max-side {SMALLER}"


# --- the step --------------------------------------------------------------------------------------------------------


def _without(facts: Facts, saved: float, line: str, why: str) -> Advice:
    """Of a line that saves at most so many seconds of the step."""
    return Advice(line=line, why=why, images_per_s=facts.rate(max(facts.synthetic - saved, 1e-9)), measured=False)


def _cut_faster(cfg: Config, facts: Facts) -> Iterator[Advice]:
    views, source = facts.stages["views"], cfg.data.source
    if facts.measured.device == "cuda" and cfg.views.impl == "torch":
        yield _without(facts, views, "views.impl=triton", "the same views, cut by fused kernels")
    largest = max(view.size for view in (cfg.views.weak, *cfg.views.strong))
    side = 2 * largest
    if facts.measured.side <= 1.5 * side:
        return
    why = f"views of {largest} pixels are cut from images of {facts.measured.side}: they change a little"
    if isinstance(source, FolderSource | DaliSource) or (isinstance(source, ResidentSource) and source.train.is_dir()):
        yield _without(facts, views, f"data.source.max_side={side}", why)
    elif not isinstance(source, SyntheticSource):
        line = f"python launch.py convert IMAGES DIRECTORY --to ffcv --max-side {side}"
        yield _without(facts, views, line, why)


def _send_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    if cfg.run.gradient_compression == "none":
        why = "gradients travel in half the bytes, rounded to bfloat16"
        yield _without(facts, facts.stages["all-reduce"] / 2, "run.gradient_compression=bf16", why)


def _launch_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    saved = facts.synthetic - (facts.measured.runs.busy or facts.synthetic)
    if not cfg.run.cuda_graphs:
        yield _without(
            facts, saved, "run.cuda_graphs=true", "the whole step is replayed: nothing is launched one by one"
        )
    yield from _fuse(cfg, facts)


def _coarser(cfg: Config, facts: Facts) -> Iterator[Advice]:
    tried = facts.measured.speedups.get(BF16)
    if tried is not None:
        if tried > WORTH:
            why = f"the step alone was {tried:.2f} times as fast; networks in bfloat16, the loss in float32"
            rate = facts.rate(facts.synthetic / tried)
            yield Advice(line=BF16, why=why, images_per_s=rate, measured=True)
    elif facts.measured.device == "cuda" and cfg.run.precision in ("fp32", "tf32"):
        yield Advice(line=BF16, why="networks in bfloat16, the loss in float32", images_per_s=None, measured=False)


def _faster_loss(cfg: Config, facts: Facts) -> Iterator[Advice]:
    loss = facts.stages["loss"]
    if facts.share("loss") < TELLING:
        return
    if cfg.method.loss_impl != "auto":
        why = f"the loss takes {percent(facts.share('loss'))} of the step; auto takes what suits the device"
        yield _without(facts, loss, "method.loss_impl=auto", why)
    if facts.measured.device == "cuda" and cfg.method.queue_dtype == "float32":
        why = "the queue is read in half the bytes; similarities are off by up to 0.002"
        yield _without(facts, loss / 2, "method.queue_dtype=bfloat16", why)


def _fuse(cfg: Config, facts: Facts) -> Iterator[Advice]:
    if facts.measured.device == "cuda" and not cfg.run.compile:
        why = "fewer, larger kernels; takes a minute or more at the start"
        yield Advice(line="run.compile=true", why=why, images_per_s=None, measured=False)
