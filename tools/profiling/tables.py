"""The tables of a profile, as text: its report prints them, its page sets them."""

from collections.abc import Collection
from dataclasses import dataclass

from tools.estimate import size_text
from tools.profiling.figures import (
    Spread,
    above_words,
    achieved,
    digits,
    flops_scale,
    hours_text,
    images_per_s,
    memory_ceiling,
    percent,
    percent_of,
    rate_text,
    real_over_synthetic,
    scale_of,
    span,
    spread,
    utilisation,
    wait_share,
    whole_step,
)
from tools.profiling.record import Point, Profile, Stage

CAPTION = "Share: of a whole step. In brackets: of this machine's compute and copy rates, from 1 % on."
COMPUTE = "the best of matrix products and 3x3 convolutions"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A row of one cell is a heading for those below it. The first column holds names, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    spare: tuple[int, ...] = ()  # columns that may be left out where there is no room, the first of them first

    def without(self, left_out: Collection[int]) -> "Sheet":
        """The columns of these numbers left out."""

        def kept(cells: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(cell for number, cell in enumerate(cells) if number not in left_out)

        return Sheet(kept(self.columns), tuple(map(kept, self.rows)))


def stage_sheet(profile: Profile) -> Sheet:
    """Each stage alone: the time of a step's work, its share of the step, what it achieves, and in brackets how much
    that is of what the machine reaches at all."""
    scale, unit = scale_of(max((max(stage.seconds, default=0) for stage in profile.stages), default=0))
    flops, moved = any(stage.flops for stage in profile.stages), any(stage.bytes for stage in profile.stages)
    columns = ["stage", unit, "range", "share", "images/s", *[flops_scale(profile)[1]] * flops, *["GB/s"] * moved]
    rows: list[tuple[str, ...]] = []
    lane = None
    for stage in profile.stages:
        if stage.lane != lane:
            lane = stage.lane
            rows.append((lane,))
        row = _time_cells(profile, stage, scale)
        if flops:
            rate = achieved(stage.flops, stage.seconds)
            row += (_of(rate, flops_scale(profile)[0], profile.ceilings.matmul_flops),)
        if moved:
            row += (_of(achieved(stage.bytes, stage.seconds), 1e-9, memory_ceiling(stage, profile.ceilings)),)
        rows.append(row)
    return Sheet(tuple(columns), tuple(rows), spare=(4, 2))


def stage_words(profile: Profile) -> list[str]:
    """What stands below the stages: how to read them, what exceeds a measured rate, and the notes."""
    notes = [f"{stage.name}: {stage.note}" for stage in profile.stages if stage.note]
    return [CAPTION, *filter(None, [above_words(profile)]), *notes]


def _time_cells(profile: Profile, stage: Stage, scale: float) -> tuple[str, ...]:
    time, step, rate = spread(stage.seconds), whole_step(profile), images_per_s(profile, stage.seconds)
    if time is None:
        return (stage.name, "-", "", "", "")
    share = percent(time.median / step) if step else "-"
    return (stage.name, digits(scale * time.median), span(time, scale), share, rate_text(rate.median) if rate else "-")


def _of(rate: float | None, scale: float, ceiling: float | None) -> str:
    share = percent_of(rate, ceiling)
    return (digits(scale * rate) if rate else "") + (f" ({share} %)" if share else "")


def run_sheet(profile: Profile) -> Sheet:
    """Whole steps."""
    runs = {
        "real: the config's data": profile.runs.real,
        "synthetic: frames lie ready": profile.runs.synthetic,
        "loader alone": profile.runs.loader,
    }
    if profile.runs.launch:
        runs["launching a synthetic step"] = profile.runs.launch
    if profile.runs.busy is not None:
        runs["the device computing in it"] = (profile.runs.busy,)
    scale, unit = scale_of(max((max(seconds) for seconds in runs.values() if seconds), default=0))
    rows = []
    for name, seconds in runs.items():
        time, rate = spread(seconds), images_per_s(profile, seconds)
        if time and rate:
            rows.append((name, digits(scale * time.median), span(time, scale), rate_text(rate.median), span(rate)))
        else:
            rows.append((name, "-", "", "-", ""))
    return Sheet(("whole step", unit, "range", "images/s", "range"), tuple(rows), spare=(4, 2))


def scaling_sheet(what: str, points: tuple[Point, ...], *, ideal: bool = True) -> Sheet:
    """A curve by `what`, compared with its first point. `ideal`: whether all of them could be that much faster;
    processes on a CPU cannot, as they share its cores."""
    found = [(point.count, rate) for point in points if (rate := spread(point.images_per_s)) and rate.median > 0]
    rows = [
        (
            f"{count:,}",
            rate_text(rate.median),
            span(rate),
            f"{digits(rate.median / found[0][1].median)}x",
            percent(rate.median / found[0][1].median * found[0][0] / count) if count else "-",
        )
        for count, rate in found
    ]
    sheet = Sheet((what, "images/s", "range", "over the first", "of ideal"), tuple(rows), spare=(2,))
    return sheet if ideal else sheet.without([4])


def totals(profile: Profile) -> list[tuple[str, str]]:
    """Figures of the whole run, each with its name."""

    def shown(found: Spread | None) -> str:
        if found is None:
            return "not measured"
        middle, low, high = percent(found.median), percent(found.low), percent(found.high)
        return middle if low == high else f"{middle} ({low} to {high})"

    used, where = utilisation(profile), "the GPU's allocator" if profile.device == "cuda" else "the process"
    scale, unit = flops_scale(profile)
    others = [] if profile.others is None else [("used by others", f"{percent(profile.others)} of the machine's cores")]
    return [
        ("real / synthetic", shown(real_over_synthetic(profile))),
        ("waiting for data", shown(wait_share(profile))),
        ("MFU", f"{percent(used)} of the compute rate" if used else "not measured"),
        ("compute rate", f"{digits(scale * profile.ceilings.matmul_flops)} {unit}, {COMPUTE}"),
        ("copy rate", f"{digits(profile.ceilings.copy_bytes / 1e9)} GB/s, {_host_copy(profile)}"),
        ("memory peak", f"{size_text(profile.memory_peak)} of {where}"),
        ("whole training", f"{hours_text(profile.predicted_hours)}: {profile.total_steps:,} steps, no evaluations"),
        *others,
    ]


def _host_copy(profile: Profile) -> str:
    rate = profile.ceilings.host_to_device_bytes
    return f"{digits(rate / 1e9)} GB/s from host to device" if rate else "read and written"
