"""Lines of the config that should make a run faster, and what they should bring.

No rate here was measured in a run with the line: each is a bound, that of the real step less what the line may save, or
of whatever binds next. Lines that are set already, such as the device cannot do, and those that bring too little, are
not given; nor are those that would make another run of it, but for what is said beside them.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ressl.config import Config, DaliSource, FfcvSource, FolderSource, ResidentSource, SyntheticSource
from tools.profiling.alternatives import BF16
from tools.profiling.floors import loss_taken
from tools.profiling.record import Advice, Binding, Measured, StageName

SMALLER = 400  # pixels of the longer side that --max-side is advised for
LOADER: tuple[StageName, ...] = ("read", "decode", "copy")
ROOM = 0.5  # share of the free memory that a resident set may take
WORTH = 1.05  # times as fast as the run is now, below which a line is not given
SHARED = 1.15  # times as long as without a loader, from which a step suffers from the one beside it
WAITING = 0.05  # share of a real step that may be spent waiting before anything is said of it
EXPOSED = 0.15  # share of a step that gradients may be on their way with nothing beside it
TELLING = 0.1  # share of the step from which a part of it is worth a line
MOST_PREFETCH = 8
PLENTY = 7e9  # bytes of a resident set from which it needs a budget of its own
CHOICE = "a choice that changes the images"


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

    @property
    def waits(self) -> bool:
        return self.wait > WAITING * self.real

    @property
    def behind(self) -> bool:
        """Whether the step waits for a loader that is slower than it."""
        return self.waits and self.loader > self.synthetic

    @property
    def slowed(self) -> bool:
        """Whether the step takes longer beside its loader than on frames that lie ready, and the loader has the work to
        explain it."""
        return self.real > SHARED * self.synthetic and self.loader > TELLING * self.synthetic

    @property
    def disturbed(self) -> bool:
        """Whether the step takes longer for reasons that are not in it, nor in its loader."""
        return self.real > SHARED * self.synthetic and not self.slowed and not self.behind

    @property
    def irregular(self) -> bool:
        """Whether a loader that is fast enough on average is late now and then, which is what slows the step."""
        return self.waits and not self.behind and self.wait > (self.real - self.synthetic) / 2

    @property
    def exposed(self) -> float:
        """Seconds of a step in which gradients travel and nothing else is done: what it takes beyond its other parts,
        at most all of the sending."""
        others = sum(value for name, value in self.stages.items() if name not in (*LOADER, "all-reduce"))
        return min(self.stages.get("all-reduce", 0.0), max(0.0, self.synthetic - others))

    def share(self, name: StageName) -> float:
        """Of the parts of a step that pass one after another."""
        return self.stages[name] / sum(value for stage, value in self.stages.items() if stage not in LOADER)


def collect(measured: Measured) -> Facts:
    """The medians of what was measured."""
    runs = measured.runs
    return Facts(
        measured=measured,
        real=median(runs.real),
        synthetic=median(runs.synthetic),
        loader=median(runs.loader),
        wait=median(runs.wait),
        stages={stage.name: median(stage.seconds) for stage in measured.stages},
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def advise(cfg: Config, facts: Facts, binding: Binding) -> tuple[Advice, ...]:
    """The most telling first."""
    found: tuple[Advice, ...]
    match binding:
        case "read":
            found = (*_ahead(cfg, facts), *_read_less(cfg, facts), *_keep(cfg, facts))
        case "decode":
            less = (*_decode_less(cfg, facts), *_gather_less(cfg, facts), *_keep(cfg, facts))
            found = (*_more_threads(cfg, facts), *_ahead(cfg, facts), *less)
        case "copy":
            found = (*_ahead(cfg, facts), *_copy_less(cfg, facts), *_keep(cfg, facts))
        case "views":
            found = (*_cut_faster(cfg, facts), *_send_less(cfg, facts))
        case "all-reduce":
            found = (*_send_less(cfg, facts), *_coarser(cfg, facts))
        case "host":
            found = tuple(_launch_less(cfg, facts))
        case "step":
            step = (*_coarser(cfg, facts), *_faster_loss(cfg, facts), *_fuse(cfg, facts))
            found = (*_ahead(cfg, facts), *step, *_send_less(cfg, facts))
    now = facts.images / facts.real
    return tuple(one for one in found if one.images_per_s is None or one.images_per_s > WORTH * now)


def _bound(facts: Facts, line: str, why: str) -> Advice:
    """Of a line that takes the loader's burden away: the step alone binds next."""
    return Advice(line=line, why=why, images_per_s=facts.images / facts.synthetic)


# --- the loader ------------------------------------------------------------------------------------------------------


def _more_threads(cfg: Config, facts: Facts) -> Iterator[Advice]:
    """Where the step waits; one that shares its cores with the loader has none to give."""
    source, curve = cfg.data.source, {p.count: median(p.images_per_s) for p in facts.measured.loader_scaling}
    if isinstance(source, SyntheticSource | ResidentSource) or not curve or not facts.behind:
        return
    present, most = source.workers or facts.measured.cores, max(curve)
    if present < most and curve[most] > WORTH * curve.get(present, float("inf")):
        each = " of each process" if facts.measured.world_size > 1 else ""
        rates = f"gave {curve[most]:,.0f} images/s instead of {curve[present]:,.0f}"
        why = f"{present} of {most} cores{each} decode; with all of them decoding alone {rates}"
        step = max(facts.synthetic, facts.loader * curve[present] / curve[most])
        yield Advice(line="data.source.workers=0", why=why, images_per_s=facts.images / step)


def _ahead(cfg: Config, facts: Facts) -> Iterator[Advice]:
    more = min(MOST_PREFETCH, 2 * cfg.data.prefetch)
    if facts.irregular and more > cfg.data.prefetch:
        yield _bound(facts, f"data.prefetch={more}", "the loader is fast enough on average, but not at every step")


def _decode_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, DaliSource) and facts.measured.device == "cuda" and source.hw_decoder_load < 1:
        yield _bound(facts, "data.source.hw_decoder_load=1.0", "the JPEG engines take what the cores decode now")
    if isinstance(source, FolderSource | DaliSource) and not _is_shards(source):
        yield _bound(facts, *_convert(cfg, facts, source.train, "FFCV's decoder takes a part of the work"))
    elif isinstance(source, FfcvSource) and facts.measured.side > _smaller(cfg):
        yield _bound(facts, *_convert(cfg, facts, Path("IMAGES"), "convert the original images again, smaller"))


def _gather_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    """Of images that lie in memory, decoded."""
    source, room = cfg.data.source, ROOM * facts.measured.free_bytes
    if not isinstance(source, ResidentSource):
        return
    if source.memory == "host" and facts.measured.device == "cuda" and facts.measured.set_bytes < room:
        yield _bound(facts, "data.source.memory=device", "the images fit beside the run: the GPU gathers them")
    if source.pixels == "yuv420" and facts.measured.set_bytes < room:
        yield _bound(facts, _with_budget("data.source.pixels=rgb", facts), "nothing is converted when it is gathered")
    side = 2 * max(view.size for view in (cfg.views.weak, *cfg.views.strong))
    if facts.measured.side > 1.5 * side and not source.train.is_file():
        why = f"smaller than the {facts.measured.side} pixels of now: fewer bytes to gather; {CHOICE}"
        yield _bound(facts, f"data.source.max_side={side}", why)


def _read_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, FfcvSource):
        if source.cache == "os" and cfg.data.shuffle == "blocks":
            why = "pages are read ahead, and neighbours together, where the file does not fit into memory"
            yield _bound(facts, "data.source.cache=process", why)
        elif cfg.data.shuffle == "global":
            line = "python launch.py convert IMAGES DIRECTORY --to ffcv --shuffle"
            why = (
                "with the classes mixed in the file, data.shuffle=blocks and data.source.cache=process read neighbours "
                "together; the order of the images is another then"
            )
            yield _bound(facts, line, why)
    elif isinstance(source, FolderSource) or (isinstance(source, DaliSource) and not _is_shards(source)):
        yield _bound(facts, *_convert(cfg, facts, source.train, "one file is opened once"))


def _copy_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    source = cfg.data.source
    if isinstance(source, ResidentSource):
        if source.memory == "host" and facts.measured.set_bytes < ROOM * facts.measured.free_bytes:
            yield _bound(facts, "data.source.memory=device", "the images fit beside the run: nothing is copied")
    elif isinstance(source, FolderSource | DaliSource) and facts.measured.side > _smaller(cfg):
        why = f"smaller than the {facts.measured.side} pixels of now: fewer bytes to copy; {CHOICE}"
        yield _bound(facts, f"data.source.max_side={_smaller(cfg)}", why)
    elif isinstance(source, FfcvSource) and facts.measured.side > _smaller(cfg):
        yield _bound(facts, *_convert(cfg, facts, Path("IMAGES"), "convert the original images again, smaller"))


def _keep(cfg: Config, facts: Facts) -> Iterator[Advice]:
    """Decoding once, where all images fit into the memory."""
    source, need = cfg.data.source, facts.measured.set_bytes
    if isinstance(source, SyntheticSource | ResidentSource) or need > ROOM * facts.measured.free_bytes:
        return
    fields = [f"train: {json.dumps(str(source.train))}"]
    if source.val:
        fields.append(f"val: {json.dumps(str(source.val))}")
    if isinstance(source, FolderSource | DaliSource):
        fields.append(f"max_side: {source.max_side or 'null'}")
    if source.workers:
        fields.append(f"workers: {source.workers}")
    if need >= PLENTY:
        fields.append(f"budget_gb: {_budget(need)}")
    line = shlex.quote(f"data.source={{name: resident, {', '.join(fields)}}}")
    yield _bound(facts, line, f"all images take {need / 1e9:,.1f} GB decoded: they are kept, and decoded once")


def _with_budget(line: str, facts: Facts) -> str:
    need = facts.measured.set_bytes
    return line if need < PLENTY else f"{line} data.source.budget_gb={_budget(need)}"


def _budget(need: float) -> str:
    return f"{1.2 * need / 1e9:.0f}"


def _is_shards(source: FolderSource | DaliSource) -> bool:
    return (source.train / "index.npz").exists()


def _smaller(cfg: Config) -> int:
    """Pixels of the longer side that images may have without the views losing much: views keep half of that."""
    return max(SMALLER, 2 * max(view.size for view in (cfg.views.weak, *cfg.views.strong)))


def _convert(cfg: Config, facts: Facts, images: Path, why: str) -> tuple[str, str]:
    """The line, and why. The files keep the size that the run decodes to, but for larger images."""
    line, kept, side = f"python launch.py convert {shlex.quote(str(images))} DIRECTORY --to ffcv", None, _smaller(cfg)
    if isinstance(cfg.data.source, FolderSource | DaliSource):
        kept = cfg.data.source.max_side
    if facts.measured.side <= side:
        return (f"{line} --max-side {kept}" if kept else line), why
    return f"{line} --max-side {side}", f"{why}; {facts.measured.side} pixels become at most {side}: {CHOICE}"


# --- the step --------------------------------------------------------------------------------------------------------


def _without(facts: Facts, saved: float, line: str, why: str) -> Advice:
    """Of a line that saves at most so many seconds of the step: the loader binds next."""
    step = max(facts.real - saved, facts.loader)
    return Advice(line=line, why=why, images_per_s=facts.images / step)


def _cut_faster(cfg: Config, facts: Facts) -> Iterator[Advice]:
    views, source = facts.stages["views"], cfg.data.source
    if facts.measured.device == "cuda" and cfg.views.impl == "torch":
        yield _without(facts, views, "views.impl=triton", "the same views, cut by fused kernels")
    largest = max(view.size for view in (cfg.views.weak, *cfg.views.strong))
    side = 2 * largest
    if facts.measured.side <= 1.5 * side:
        return
    why = f"views of {largest} pixels are cut from images of {facts.measured.side}; smaller ones lose detail: {CHOICE}"
    if isinstance(source, FolderSource | DaliSource) or (isinstance(source, ResidentSource) and source.train.is_dir()):
        yield _without(facts, views, f"data.source.max_side={side}", why)
    elif not isinstance(source, SyntheticSource):
        line = f"python launch.py convert IMAGES DIRECTORY --to ffcv --max-side {side}"
        yield _without(facts, views, line, why)


def _send_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    if cfg.run.gradient_compression == "none" and facts.exposed > EXPOSED * facts.synthetic:
        why = "gradients travel in half the bytes, rounded to bfloat16"
        saved = min(facts.exposed, facts.stages["all-reduce"] / 2)
        yield _without(facts, saved, "run.gradient_compression=bf16", why)


def _launch_less(cfg: Config, facts: Facts) -> Iterator[Advice]:
    saved = facts.synthetic - (facts.measured.runs.busy or facts.synthetic)
    if not cfg.run.cuda_graphs:
        yield _without(
            facts, saved, "run.cuda_graphs=true", "the whole step is replayed: nothing is launched one by one"
        )
    yield from _fuse(cfg, facts)


def _coarser(cfg: Config, facts: Facts) -> Iterator[Advice]:
    tried = facts.measured.speedups.get(BF16)
    if tried:
        times = median(tried)
        if times > WORTH:
            seen = f"({min(tried):.2f} to {max(tried):.2f} in {len(tried)} rounds)"
            why = f"the step alone was {times:.2f} times as fast {seen}; networks in bfloat16, the loss in float32"
            yield _without(facts, facts.synthetic * (1 - 1 / times), BF16, why)
    elif facts.measured.device == "cuda" and cfg.run.precision in ("fp32", "tf32"):
        yield Advice(line=BF16, why="networks in bfloat16, the loss in float32", images_per_s=None)


def _faster_loss(cfg: Config, facts: Facts) -> Iterator[Advice]:
    loss, images, on_gpu = facts.stages["loss"], facts.measured.images, facts.measured.device == "cuda"
    if facts.share("loss") < TELLING:
        return
    auto = loss_taken(cfg, images, on_gpu=on_gpu, impl="auto")
    if auto != loss_taken(cfg, images, on_gpu=on_gpu):
        why = f"the loss takes {percent(facts.share('loss'))} of the step; auto takes {auto} here"
        yield _without(facts, loss, "method.loss_impl=auto", why)
    if on_gpu and cfg.method.queue_dtype == "float32":
        why = "the queue is read in half the bytes; similarities are off by up to 0.002"
        yield _without(facts, loss / 2, "method.queue_dtype=bfloat16", why)


def _fuse(cfg: Config, facts: Facts) -> Iterator[Advice]:
    if facts.measured.device == "cuda" and not cfg.run.compile:
        why = "fewer, larger kernels; takes a minute or more at the start"
        yield Advice(line="run.compile=true", why=why, images_per_s=None)
