"""The plots of a profile's page, as SVG text.

Each function takes the profile and a width in px, and returns one SVG with a title and a description, or None where
there is nothing to draw. Colours and letters come from the page's style sheet (style.py).
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.profiling.figures import (
    Spread,
    achieved,
    digits,
    flops_scale,
    percent,
    rate_text,
    rates,
    scale_of,
    spread,
    whole_step,
)
from tools.profiling.record import Point, Profile
from tools.profiling.style import COLOURS, OTHER
from tools.verify_report import printed

LETTER = 7.0  # px that a letter takes at most, on average
LANE, ROW = 40, 22  # px
Area = tuple[float, float, float, float]  # left, top, right, bottom
Place = tuple[float, float]
Dot = tuple[str, float, float, int]  # name, centre, radius


def escape(text: str) -> str:
    """For HTML and for XML, where letters that steer a terminal are not allowed either."""
    return html.escape(printed(text))


def colour(name: str) -> str:
    """For a `style`: of a stage, of waiting, or of any other name; whole frames look like what they mostly are."""
    others = {"wait": "var(--warn)", "frames": COLOURS["decode"]}
    return next((value for stage, value in (*COLOURS.items(), *others.items()) if stage == name), OTHER)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _svg(name: str, size: tuple[float, float], title: str, words: str, body: Iterable[str]) -> str:
    width, height = size
    key = f"{name}-{width:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-labelledby="{key}-title {key}-words"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-words">{escape(words)}</desc>{"".join(body)}</svg>'
    )


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _path(points: Sequence[tuple[float, float]], css: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{css}"/>'


def _box(x: float, y: float, size: tuple[float, float], fill: str, words: str) -> str:
    """At least a pixel wide, so that what is short is still seen."""
    width, height = max(size[0], 1), size[1]
    rect = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" style="fill:{fill}">'
    return f"{rect}<title>{escape(words)}</title></rect>"


def ticks(high: float, count: int) -> list[float]:
    """About `count` round numbers from 0 to at most `high`, which is above 0."""
    rough = high / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
    return [number * step for number in range(int(high / step * 1.000001) + 1)]


# --- what happens when -----------------------------------------------------------------------------------------------


def timeline(profile: Profile, width: float) -> str | None:
    """One step in pieces, each launched alone: what the loader and the device do meanwhile."""
    spans = profile.timeline
    end = max((span.end for span in spans), default=0)
    if end <= 0:
        return None
    scale, unit = scale_of(end)
    left = 56
    per_second = (width - left - 14) / end
    lanes = [lane for lane in ("loader", "device") if any(span.lane == lane for span in spans)]
    height = len(lanes) * (LANE + 6)
    body = []
    for tick in ticks(end * scale, int(width / 110)):
        x = left + tick / scale * per_second
        body.append(_line(x, 0, x, height, "grid"))
        body.append(_text(x, height + 14, f"{tick:,.6g}" + f" {unit}" * (tick == 0), "soft", "middle"))
    for row, lane in enumerate(lanes):
        y = row * (LANE + 6)
        body.append(_text(0, y + LANE / 2 + 4, lane))
        body.append(f'<rect x="{left}" y="{y}" width="{end * per_second:.1f}" height="{LANE}" class="lane"/>')
        for span in (span for span in spans if span.lane == lane and span.end >= span.start):
            x, length = left + span.start * per_second, (span.end - span.start) * per_second
            words = f"{span.name}: {digits(scale * (span.end - span.start))} {unit}, from {digits(scale * span.start)}"
            body.append(_box(x, y, (length, LANE), colour(span.name), words))
            if length > LETTER * len(span.name) + 8:
                css = "inside" if span.name != "wait" else "inverse"
                body.append(_text(x + length / 2, y + LANE / 2 + 4, span.name, css, "middle"))
    words = "; ".join(f"{span.lane}: {span.name} {digits(scale * (span.end - span.start))} {unit}" for span in spans)
    return _svg("timeline", (width, height + 20), "One step, piece by piece", words, body)


def lengths(profile: Profile) -> dict[str, str]:
    """Of each name in the timeline, how long it takes in all: what a legend says."""
    scale, unit = scale_of(max((span.end for span in profile.timeline), default=0))
    found: dict[str, float] = {}
    for span in profile.timeline:
        found[span.name] = found.get(span.name, 0) + max(0, span.end - span.start)
    return {name: f"{digits(scale * seconds)} {unit}" for name, seconds in found.items()}


# --- what takes how long ---------------------------------------------------------------------------------------------


def bars(profile: Profile, width: float) -> str | None:
    """A bar for each stage and each kind of whole step; whiskers from the fastest round to the slowest."""
    runs = profile.runs
    whole = {"real step": runs.real, "of it, waiting": runs.wait, "synthetic step": runs.synthetic}
    whole |= {"launching it": runs.launch, "loader alone": runs.loader}
    groups: dict[str, list[tuple[str, Spread, str]]] = {"loader, beside the step": [], "device, in order": []}
    for stage in profile.stages:
        time = spread(stage.seconds)
        if time:
            rows = groups["loader, beside the step" if stage.lane == "loader" else "device, in order"]
            rows.append((stage.name, time, colour(stage.name)))
    groups["whole steps"] = [
        (name, time, colour("wait" if "wait" in name else name))
        for name, seconds in whole.items()
        if (time := spread(seconds))
    ]
    longest = max((time.high for rows in groups.values() for _, time, _ in rows), default=0)
    if longest <= 0 or not any(rows for heading, rows in groups.items() if heading != "whole steps"):
        return None
    scale, unit = scale_of(longest)
    step = whole_step(profile)
    left, right = 92, 128
    per_second = (width - left - right) / longest
    body, said, y = [], [], 0.0
    for heading, rows in groups.items():
        if rows:
            y += 16
            body.append(_text(0, y, heading, "soft"))
            y += 6
        for name, time, fill in rows:
            share = f"{percent(time.median / step):>8}" if step else ""
            words = f"{name}: {digits(scale * time.median)} {unit}"
            full = f"{words}, {digits(scale * time.low)} to {digits(scale * time.high)} over the rounds"
            said.append(words)
            body.append(_text(0, y + 14, name))
            body.append(_box(left, y + 3, (time.median * per_second, ROW - 8), fill, full))
            body += _whisker(left + time.low * per_second, left + time.high * per_second, y + ROW / 2 - 1)
            body.append(_text(width - 54, y + 14, words.split(": ")[1], "", "end"))
            body.append(_text(width, y + 14, share, "soft", "end"))
            y += ROW
    return _svg("bars", (width, y + 4), "Time of each stage and of whole steps", "; ".join(said), body)


def _whisker(low: float, high: float, y: float) -> list[str]:
    if high - low < 1:
        return []
    return [_line(low, y, high, y, "mark"), *(_line(x, y - 4, x, y + 4, "mark") for x in (low, high))]


# --- how far from the machine's limits -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Log:
    """Maps low to high, both above 0, onto start to end in px, by their logarithms."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 of each where there are few."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 3 else (1,)
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def on_the_roof(profile: Profile) -> list[tuple[str, float, float]]:
    """Name, flops a byte and flops a second of every stage whose flops, bytes and time are known."""
    found: list[tuple[str, float, float]] = []
    for stage in profile.stages:
        rate = achieved(stage.flops, stage.seconds)
        if stage.flops and stage.bytes and rate:
            found.append((stage.name, stage.flops / stage.bytes, rate))
    return found


def roofline(profile: Profile, width: float) -> str | None:
    """Achieved flops a second against flops a byte (Williams et al. 2009), under the rates measured on this machine."""
    peak, copy, found = profile.ceilings.matmul_flops, profile.ceilings.copy_bytes, on_the_roof(profile)
    if not found or peak <= 0 or copy <= 0:
        return None
    scale, unit = flops_scale(profile)
    height = round(width * (0.8 if width > 400 else 1))
    across = [peak / copy, *(point[1] for point in found)]
    up = [peak, *(point[2] for point in found)]
    x = _Log(min(across) / 5, max(across) * 5, 52, width - 8)
    y = _Log(min(up) / 6, max(up) * 2.5, height - 40, 22)
    body = [_text(0, 12, f"{unit} achieved", "soft"), _text(width - 8, height - 4, "flops a byte", "soft", "end")]
    for value in x.ticks():
        body.append(_line(x.at(value), y.start, x.at(value), y.end, "grid"))
        body.append(_text(x.at(value), y.start + 16, f"{value:,.6g}", "soft", "middle"))
    for value in y.ticks():
        body.append(_line(x.start, y.at(value), x.end, y.at(value), "grid"))
        body.append(_text(x.start - 6, y.at(value) + 4, f"{value * scale:,.6g}", "soft", "end"))
    foot = max(x.low, y.low / copy)
    roof = [(foot, foot * copy), (peak / copy, peak), (x.high, peak)]
    body.append(_path([(x.at(one), y.at(other)) for one, other in roof], "roof"))
    start, ridge = (x.at(foot), y.at(foot * copy)), (x.at(peak / copy), y.at(peak))
    dots = _rings([(name, x.at(intensity), y.at(rate)) for name, intensity, rate in found])
    said = [f"{name}: {digits(scale * rate)} {unit} at {digits(flops)} flops a byte" for name, flops, rate in found]
    for (name, cx, cy, radius), full in reversed(list(zip(dots, said, strict=True))):  # the largest below
        body.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" class="spot" style="fill:{colour(name)}">')
        body.append(f"<title>{escape(full)}</title></circle>")
    slope, along = _along(start, ridge, f"copy {digits(copy / 1e9)} GB/s")
    body.append(slope)
    full_areas = [*along, *_under(start, ridge), (ridge[0], ridge[1] - 1, x.end, ridge[1] + 1)]
    body += _labels(
        dots, (f"compute {digits(scale * peak)} {unit}", ridge[1]), full_areas, (x.start, y.end, x.end, y.start)
    )
    return _svg("roofline", (width, height), "Stages and the rates measured on this machine", "; ".join(said), body)


def _rings(dots: Sequence[tuple[str, float, float]]) -> list[Dot]:
    """What lies upon an earlier one is larger, so that a ring of it is seen."""
    found: list[Dot] = []
    for name, x, y in dots:
        below = [radius for _, x2, y2, radius in found if math.hypot(x - x2, y - y2) < 8]
        found.append((name, x, y, max(below, default=2) + 3))
    return found


def _under(start: Place, end: Place) -> list[Area]:
    """What the line from `start` to `end` covers."""
    count = max(1, int(math.dist(start, end) / 6))
    at = [
        (start[0] + (end[0] - start[0]) * n / count, start[1] + (end[1] - start[1]) * n / count) for n in range(count)
    ]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in at]


def _along(start: Place, end: Place, words: str) -> tuple[str, list[Area]]:
    """Words above the line from `start` to `end`, and what they cover."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    turned = f"translate({start[0]:.1f} {start[1]:.1f}) rotate({math.degrees(angle):.1f})"
    areas = []
    for number in range(len(words)):
        far = 12 + LETTER * (number + 0.5)
        x = start[0] + far * math.cos(angle) + 10 * math.sin(angle)
        y = start[1] + far * math.sin(angle) - 10 * math.cos(angle)
        areas.append((x - 6, y - 6, x + 6, y + 6))
    return f'<g transform="{turned}">{_text(12, -6, words, "halo")}</g>', areas


def _area(place: Place, words: str) -> Area:
    """Of words that begin at `place`."""
    return (place[0], place[1] - 11, place[0] + LETTER * len(words), place[1] + 3)


def _free(places: Sequence[Place], words: str, full: Sequence[Area], inside: Area) -> Place:
    """The first at which the words cover nothing and stay inside; else the first."""
    left, top, right, bottom = inside
    for place in places:
        x1, y1, x2, y2 = _area(place, words)
        if x1 < left or y1 < top or x2 > right or y2 > bottom:
            continue
        if not any(x1 < area[2] and area[0] < x2 and y1 < area[3] and area[1] < y2 for area in full):
            return place
    return places[0]


def _labels(dots: Sequence[Dot], roof: tuple[str, float], full: Sequence[Area], inside: Area) -> list[str]:
    """The roof's name along it, and those of the dots around them, each where it covers nothing of `full`, no dot and
    no other name; a thin line leads to one that is further away."""
    words, level = roof
    taken: list[Area] = [*full, *((x - far, y - far, x + far, y + far) for _, x, y, far in dots)]
    ends = [inside[2] - LETTER * len(words) - back for back in (0, 60, 120, 180)]
    place = _free([(x, level + dy) for dy in (-6, 15, -20) for x in ends], words, taken, inside)
    taken.append(_area(place, words))
    body = [_text(*place, words, "halo")]
    for name, x, y, far in dots:
        half = LETTER * len(name) / 2
        beside = [(x + sign * (far + 4 + half) - half, y + 4 + dy) for dy in (0, 12, -12) for sign in (1, -1)]
        around = [(x - half + dx, y + dy) for dy in (far + 12, -far - 4) for dx in (0, half, -half)]
        away = [(x - half + dx, y + 4 + dy) for dy in (32, -32, 48, -48, 64, -64) for dx in (0, 40, -40, 80, -80)]
        place = _free([*beside, *around, *away], name, taken, inside)
        taken.append(_area(place, name))
        if place in away:
            starts, ends_at = (y + far, place[1] - 11) if place[1] > y else (y - far, place[1] + 3)
            body.append(_line(x, starts, place[0] + half, ends_at, "leader"))
        body.append(_text(*place, name, "halo"))
    return body


# --- curves ----------------------------------------------------------------------------------------------------------


def loader_curve(profile: Profile, width: float) -> str | None:
    """Images/s of the loader by its threads, and the rate that one rank's step would need."""
    needed = spread(rates(profile.images, profile.runs.synthetic))
    need = (needed.median, f"the step takes {rate_text(needed.median)} images/s") if needed else None
    return _curve("loader", "Loader by decoding threads", "threads", profile.loader_scaling, width, need=need)


def process_curve(profile: Profile, width: float) -> str | None:
    """Images/s of whole steps by processes, and on GPUs what they would be if none cost anything."""
    title, ideal = "Whole steps by processes", profile.device == "cuda"
    return _curve("processes", title, "processes", profile.scaling, width, ideal=ideal)


def _curve(
    name: str,
    title: str,
    what: str,
    points: Sequence[Point],
    width: float,
    *,
    need: tuple[float, str] | None = None,
    ideal: bool = True,
) -> str | None:
    """Nothing is drawn of fewer than two points. Ideal, a dotted line, is the first point's rate, times the count."""
    rows = [(p.count, rate) for p in points if p.count > 0 and (rate := spread(p.images_per_s))]
    found = sorted(((count, rate) for count, rate in rows if rate.median > 0), key=lambda row: row[0])
    if len({count for count, _ in found}) < 2:
        return None
    height = round(width * (0.5 if width > 400 else 0.75))
    (fewest, first), most = found[0], found[-1][0]
    highest = max(rate.high for _, rate in found)
    ends = (highest, ideal * min(first.median / fewest * most, 1.5 * highest), need[0] if need else 0)
    top = 1.1 * max(ends)
    x = _Log(fewest, most, 78, width - 34)
    bottom, up = height - 36, (height - 36 - 20) / top
    body = [_text(0, 12, "images/s", "soft"), _text(width, height - 2, what, "soft", "end")]
    for tick in ticks(top, 5):
        body.append(_line(56, bottom - tick * up, width - 8, bottom - tick * up, "grid"))
        body.append(_text(50, bottom - tick * up + 4, rate_text(tick) if tick else "0", "soft", "end"))
    if ideal:
        counts = [fewest * (most / fewest) ** (number / 40) for number in range(41)]
        line = [(x.at(count), bottom - first.median / fewest * count * up) for count in counts]
        body.append(_path([point for point in line if point[1] >= 20], "ideal"))
    if need:
        body.append(_line(56, bottom - need[0] * up, width - 8, bottom - need[0] * up, "need"))
        body.append(_text(60, bottom - need[0] * up - 6, need[1], "warm halo"))
    body.append(_path([(x.at(count), bottom - rate.median * up) for count, rate in found], "curve"))
    said = []
    for count, rate in found:
        at, level = x.at(count), bottom - rate.median * up
        words = f"{count:,} {what}: {rate_text(rate.median)} images/s"
        full = f"{words}, {rate_text(rate.low)} to {rate_text(rate.high)} over the rounds"
        said.append(words)
        body.append(_line(at, bottom - rate.low * up, at, bottom - rate.high * up, "mark"))
        body.append(
            f'<circle cx="{at:.1f}" cy="{level:.1f}" r="4.5" class="dot"><title>{escape(full)}</title></circle>'
        )
        body.append(_text(at, bottom + 16, f"{count:,}", "soft", "middle"))
        body.append(_text(at, level - 10, rate_text(rate.median), "halo", "middle"))
    return _svg(name, (width, height), title, "; ".join(said), body)
