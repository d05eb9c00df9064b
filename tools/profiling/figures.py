"""The numbers that follow from a profile, and how they are written: shared by its report, its page, its comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tools.profiling.record import Binding, Ceilings, Profile, Seconds, Stage

BINDS: dict[Binding, str] = {
    "read": "reading the files",
    "decode": "decoding, or gathering",
    "copy": "copying to the device",
    "views": "cutting the views",
    "step": "the training step",
    "all-reduce": "the all-reduce",
    "host": "launching from Python",
}
ON_A_CPU = "Measured on a CPU: what binds here, and by how much, says little about a GPU."
MACHINE = ("device", "cpu", "cores", "threads", "memory", "driver", "torch")  # of `machine`: what fits into one line


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one value a round."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """None where nothing was measured."""
    return Spread(median(values), min(values), max(values)) if values else None


def rates(work: float, seconds: Seconds) -> tuple[float, ...]:
    """Of so much work (images, flops, bytes): how much of it a second, one value a round."""
    return tuple(work / value for value in seconds if value > 0)


def _paired(one: Seconds, other: Seconds) -> Spread | None:
    """One over the other within a round: what slows a whole round down falls out."""
    return spread([a / b for a, b in zip(one, other, strict=False) if b > 0])


def images_per_s(profile: Profile, seconds: Seconds) -> Spread | None:
    """Over all ranks, which take equal steps together."""
    return spread(rates(profile.images * profile.world_size, seconds))


def real_over_synthetic(profile: Profile) -> Spread | None:
    """Speed with the user's data over the speed with data that lie ready, a ratio for each round."""
    return _paired(profile.runs.synthetic, profile.runs.real)


def wait_share(profile: Profile) -> Spread | None:
    """Of a real step, the share in which the loop waited for its data."""
    return _paired(profile.runs.wait, profile.runs.real)


def whole_step(profile: Profile) -> float | None:
    """Seconds, median: of a real step, or of a synthetic one where no real one was measured."""
    step = spread(profile.runs.real or profile.runs.synthetic)
    return step.median if step else None


def utilisation(profile: Profile) -> float | None:
    """Model flops utilisation (Chowdhery et al. 2022, PaLM, appendix B), with the rate of products or convolutions that
    was measured here in the place of a data sheet's: flops that a step needs, over those that its time would allow."""
    flops = sum(stage.flops or 0 for stage in profile.stages)
    seconds = whole_step(profile)
    return flops / seconds / profile.ceilings.matmul_flops if flops and seconds else None


def memory_ceiling(stage: Stage, ceilings: Ceilings) -> float | None:
    """Bytes a second that the stage cannot exceed; None where nothing measured bounds it."""
    match stage.name:
        case "read" | "decode" | "all-reduce":  # discs, caches and links between ranks
            return None
        case "copy":
            return ceilings.host_to_device_bytes
        case _:
            return ceilings.copy_bytes


def percent_of(rate: float | None, ceiling: float | None) -> int | None:
    """Whole percents; None where one of them is not known. May be above 100: see `above`."""
    return round(100 * rate / ceiling) if rate and ceiling else None


def above(profile: Profile) -> list[str]:
    """Names of what is faster than the rate measured of the machine, the whole model's flops (MFU) among them."""
    found = []
    for stage in profile.stages:
        flops, moved = achieved(stage.flops, stage.seconds), achieved(stage.bytes, stage.seconds)
        shares = (
            percent_of(flops, profile.ceilings.matmul_flops),
            percent_of(moved, memory_ceiling(stage, profile.ceilings)),
        )
        found += [stage.name] * any((share or 0) > 100 for share in shares)
    return found + ["MFU"] * (round(100 * (utilisation(profile) or 0)) > 100)


def above_words(profile: Profile) -> str | None:
    """Why a share of a rate may exceed 100 %; None where none does."""
    names = above(profile)
    why = "that rate is of other shapes and moments, not a limit"
    return f"Above 100 %, so above the measured rate: {', '.join(names)}; {why}." if names else None


def achieved(work: float | None, seconds: Seconds) -> float | None:
    """Flops or bytes a second; None where the work or the time is not known."""
    rate = spread(rates(work, seconds)) if work else None
    return rate.median if rate else None


# --- as text ---------------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three digits or more, with separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(value: float) -> str:
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.0f} %" if value >= 0.0995 or value <= 0 else f"{100 * value:.1f} %"


def span(found: Spread, scale: float = 1) -> str:
    """The range, or the one number that both its ends are, as of a single round."""
    low, high = digits(scale * found.low), digits(scale * found.high)
    return low if low == high else f"{low} to {high}"


def rate_text(per_second: float) -> str:
    """Images a second, short: a queue may take millions."""
    return digits(per_second) if per_second < 1e6 else f"{digits(per_second / 1e6)} M"


def scale_of(longest: float) -> tuple[float, str]:
    """What seconds are multiplied by, and the unit that gives, for a table whose longest entry is `longest` seconds."""
    return (1, "s") if longest >= 10 else (1000, "ms")


def flops_scale(profile: Profile) -> tuple[float, str]:
    """The same for flops a second, by what the machine reaches."""
    return (1e-12, "TFLOP/s") if profile.ceilings.matmul_flops >= 1e13 else (1e-9, "GFLOP/s")


def hours_text(hours: float) -> str:
    if hours < 1 / 60:
        return f"{digits(3600 * hours)} s"
    if hours < 1:
        return f"{digits(60 * hours)} min"
    return f"{digits(hours)} h" if hours < 72 else f"{digits(hours / 24)} days"


def machine_line(profile: Profile) -> str:
    found = {key: str(profile.machine[key]) for key in MACHINE if key in profile.machine}
    words = {"cores": "{} cores", "threads": "torch threads: {}", "driver": "driver {}", "torch": "torch {}"}
    return ", ".join(dict.fromkeys(words.get(key, "{}").format(value) for key, value in found.items()))


def setting_line(profile: Profile) -> str:
    processes = "1 process" if profile.world_size == 1 else f"{profile.world_size} processes"
    each = "" if profile.world_size == 1 else " of each"
    return f"{profile.device}, {profile.precision}, {processes}, {profile.images:,} images a step{each}"


def advice_gain(bound: float | None, now: Spread | None) -> str:
    """What a line of advice brings, as far as it can be told."""
    if bound is None:
        return "what it brings shows only when it is tried"
    times = f" instead of {rate_text(now.median)} ({digits(bound / now.median)}x)" if now else ""
    return f"at most {rate_text(bound)} images/s{times}: a bound, not measured"
