"""Two profiles side by side, and whether the second is a step back: `profile --compare A.json B.json`.

Three figures decide: the time of a real step, the time of a synthetic one and, where both take equally many images a
step, the peak of memory. They are what a run costs. Stages, the loader alone and the waiting are shown and marked, but
decide nothing: a slower stage that hides behind others costs nothing, one that does not shows in the steps, and a dozen
judges would cry wolf a dozen times as often. Nothing is decided of fewer than three rounds, and nothing of steps where
the machine was not the same: its own rates differ, or what others took of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from ressl.config_file import ConfigError
from tools.estimate import size_text
from tools.profiling.figures import Spread, digits, percent, scale_of, span, spread
from tools.profiling.record import Profile, Seconds, read_profile
from tools.profiling.report import print_sheet
from tools.profiling.tables import Sheet
from tools.verify_report import printed

ROUNDS = 3  # fewer say nothing of the spread
NAMED = 12  # keys of the config that are told apart by name
Mark = Literal["more", "less", ""]


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of both profiles, a value for each round; empty where it was not measured. Less is better."""

    name: str
    before: Seconds
    after: Seconds
    decides: bool = False
    memory: bool = False

    def ratio(self) -> Spread | None:
        """B over A: of the medians, and the least and the most that the rounds allow."""
        a, b = spread(self.before), spread(self.after)
        if a is None or b is None or a.low <= 0:
            return None
        return Spread(b.median / a.median, b.low / a.high, b.high / a.low)

    def mark(self, tolerance: float) -> Mark:
        """Whether B takes more or less than A: by over `tolerance`, and outside of both spreads."""
        ratio = self.ratio()
        if ratio is None:
            return ""
        if ratio.median > 1 + tolerance and _apart(self.before, self.after):
            return "more"
        return "less" if ratio.median < 1 / (1 + tolerance) and _apart(self.after, self.before) else ""


def _apart(low: Seconds, high: Seconds) -> bool:
    """Whether every round of `high` was above those of `low`. The slowest of `low` is put aside where there are five or
    more: machines have hiccups, and one of them would hide any step back."""
    return min(high) > sorted(low)[-2 if len(low) >= 5 else -1]


def compare(a: Path, b: Path, *, tolerance: float, console: Console) -> bool:
    """Prints the ratios B over A. False where a real step, a synthetic step or memory takes over `tolerance` (0.1: a
    tenth) more in B than in A, and no round of B was as fast as those of A (all but the slowest, of five or more). True
    where that cannot be told, and why: of few rounds, or of steps that a machine took which itself differed by over
    `tolerance`.

    Raises DataError where a file is no profile, and ConfigError where the two cannot be compared: one of a CPU and one
    of a GPU, whose stages and memory are other things by the same names; or no kind of step that both measured.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"--tolerance {tolerance}: expected a share of 0 or more, such as 0.1")
    one, other = read_profile(a), read_profile(b)
    if one.device != other.device:
        where = f"{a} was measured on {one.device}, {b} on {other.device}"
        raise ConfigError(f"{where}: these do not compare; profile both on one of them")
    rows = pairs(one, other)
    if not any(row.decides and not row.memory and row.ratio() for row in rows):
        raise ConfigError(f"{a} and {b} have no kind of whole step in common; profile again")
    for name, path, profile in (("A", a, one), ("B", b, other)):
        commit = f", commit {profile.commit[:12]}" if profile.commit else ""
        _say(console, f"{name}: {path}: {profile.title}, {profile.date}{commit}")
    for line in differences(one, other):
        _say(console, line, "yellow")
    console.print()
    few, unlike = few_rounds(one, other), unlike_machines(one, other, tolerance)
    left = [row.name for row in rows if row.decides and (few or (unlike and not row.memory))]
    rows = [replace(row, decides=row.decides and row.name not in left) for row in rows]
    print_sheet(_sheet(rows, tolerance, "an image" if one.images != other.images else "a step"), console)
    if left:
        why = few or f"the machine was not the same: {', '.join(unlike)}; profile both again, when it is quiet"
        _say(console, f"Not decided: {', '.join(left)}, as {why}.", "bold yellow")
    return _conclude(rows, tolerance, console)


def few_rounds(one: Profile, other: Profile) -> str:
    """Why nothing can be decided; empty where there are rounds enough."""
    steps = [seconds for profile in (one, other) for seconds in (profile.runs.real, profile.runs.synthetic)]
    rounds = min((len(seconds) for seconds in steps if seconds), default=0)
    few = "one round" if rounds == 1 else f"{rounds} rounds"
    return f"one of them has {few}, of the {ROUNDS} it takes; give more --seconds" if rounds < ROUNDS else ""


def unlike_machines(one: Profile, other: Profile, tolerance: float) -> list[str]:
    """In what the machine itself differed by over `tolerance`: its rates, B over A, and the share of its processor time
    that other processes used. The compute rate is that of a precision, so it is held against one of the same."""
    a, b = one.ceilings, other.ceilings
    rates = {"copy rate": (a.copy_bytes, b.copy_bytes), "upload rate": (a.host_to_device_bytes, b.host_to_device_bytes)}
    if one.precision == other.precision:
        rates["compute rate"] = (a.matmul_flops, b.matmul_flops)
    found = []
    for name, (before, after) in rates.items():
        if before and after and not 1 / (1 + tolerance) <= after / before <= 1 + tolerance:
            found.append(f"its {name} was {digits(after / before)} times that of A")
    if one.others is not None and other.others is not None and abs(other.others - one.others) > tolerance:
        found.append(f"others used {percent(one.others)} of it in A, {percent(other.others)} in B")
    return found


def pairs(one: Profile, other: Profile) -> list[Pair]:
    """What is compared: seconds a step of one rank, or an image where the steps are of different sizes; bytes."""
    equal = one.images == other.images

    def pair(name: str, before: Seconds, after: Seconds, decides: bool = False) -> Pair:
        return Pair(
            name, _over(before, 1 if equal else one.images), _over(after, 1 if equal else other.images), decides
        )

    stages = [{stage.name: stage.seconds for stage in profile.stages} for profile in (one, other)]
    names = dict.fromkeys([*stages[0], *stages[1]])
    return [
        pair("real step", one.runs.real, other.runs.real, decides=True),
        pair("synthetic step", one.runs.synthetic, other.runs.synthetic, decides=True),
        Pair("memory peak", (one.memory_peak,), (other.memory_peak,), decides=equal, memory=True),
        pair("loader alone", one.runs.loader, other.runs.loader),
        pair("waiting for data", one.runs.wait, other.runs.wait),
        *(pair(name, stages[0].get(name, ()), stages[1].get(name, ())) for name in names),
    ]


def _over(seconds: Seconds, count: int) -> Seconds:
    return tuple(value / count for value in seconds)


def differences(one: Profile, other: Profile) -> list[str]:
    """What else than the code may have changed the figures, a line each."""
    facts = {
        "machine": _changes(one.machine, other.machine),
        "precision": _changes({"": one.precision}, {"": other.precision}),
        "processes": _changes({"": one.world_size}, {"": other.world_size}),
        "images a step": _changes({"": one.images}, {"": other.images}),
        "config": _changes(_flat(one.config), _flat(other.config)),
    }
    lines = [f"different {name}: {'; '.join(_short(changes))}" for name, changes in facts.items() if changes]
    if one.images != other.images:
        lines.append("steps of different sizes: times are given by the image")
    return lines


def _short(changes: list[str]) -> list[str]:
    more = len(changes) - NAMED
    return [*changes[:NAMED], f"and {more} more"] if more > 0 else changes


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`key A / B` for what is not the same. Where a run writes its files has nothing to do with its speed."""
    keys = [key for key in dict.fromkeys([*one, *other]) if key != "run.out_dir"]
    found = [(key, one.get(key, "none"), other.get(key, "none")) for key in keys]
    return [f"{key} {before} / {after}".strip() for key, before, after in found if before != after]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their full key."""
    match value:
        case dict():
            items = value.items()
        case list() if any(isinstance(item, dict) for item in value):
            items = {str(number): item for number, item in enumerate(value)}.items()
        case _:
            return {path: value}
    return {leaf: found for key, item in items for leaf, found in _flat(item, f"{path}.{key}".strip(".")).items()}


def _sheet(rows: list[Pair], tolerance: float, of: str) -> Sheet:
    times = [value for row in rows if not row.memory for value in (*row.before, *row.after)]
    scale, unit = scale_of(max(times)) if of == "a step" else (1e6, "us")
    said = []
    for row in rows:
        ratio = row.ratio()
        ratios = (digits(ratio.median), "" if row.memory else span(ratio)) if ratio else ("", "")
        cells = [_cell(spread(values), scale, row.memory) for values in (row.before, row.after)]
        said.append((row.name, *cells, *ratios, _remark(row, tolerance)))
    return Sheet(("", f"A, {unit} {of}", "B", "B / A", "range", ""), tuple(said), spare=(4,))


def _cell(found: Spread | None, scale: float, memory: bool) -> str:
    if found is None:
        return "-"
    return size_text(found.median) if memory else digits(scale * found.median)


def _remark(row: Pair, tolerance: float) -> str:
    missing = [name for name, values in (("A", row.before), ("B", row.after)) if not values]
    if missing:
        return f"not in {' and '.join(missing)}"
    match row.mark(tolerance):
        case "more":
            return ("more" if row.memory else "slower") + "!" * row.decides
        case "less":
            return "less" if row.memory else "faster"
        case _:
            return ""


def _conclude(rows: list[Pair], tolerance: float, console: Console) -> bool:
    worse = [row for row in rows if row.mark(tolerance) == "more"]
    back = [row for row in worse if row.decides]
    decided = [row.name for row in rows if row.decides and row.ratio()]
    if decided and not back:
        within = f"within {percent(tolerance)}, or within the spread"
        _say(console, f"No step back: {', '.join(decided)} {within}.", "green")
    for row in back:
        ratio = row.ratio()
        assert ratio
        fewer = "" if row.memory else f": {percent(1 - 1 / ratio.median)} fewer images/s"
        _say(console, f"A step back: {row.name}, {digits(ratio.median)} times what it was{fewer}.", "bold red")
    hidden = [row.name for row in worse if not row.decides]
    if hidden:
        _say(console, f"Slower, but not deciding: {', '.join(hidden)}.")
    return not back


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(printed(line), style=style))
