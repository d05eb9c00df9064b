"""A profile as one HTML page that needs nothing else: to be kept, sent and printed."""

from collections.abc import Callable

import yaml

from tools.profiling.figures import (
    BINDS,
    ON_A_CPU,
    above_words,
    advice_gain,
    hours_text,
    images_per_s,
    machine_line,
    percent,
    rate_text,
    real_over_synthetic,
    setting_line,
    span,
    spread,
    utilisation,
    wait_share,
)
from tools.profiling.plots import (
    bars,
    colour,
    escape,
    lengths,
    loader_curve,
    on_the_roof,
    process_curve,
    roofline,
    timeline,
)
from tools.profiling.record import Advice, Profile
from tools.profiling.style import STYLE, WIDTHS
from tools.profiling.tables import Sheet, run_sheet, scaling_sheet, stage_sheet, stage_words, totals

STEP = "One step on the config's data, piece by piece"
Plot = Callable[[Profile, float], str | None]


def page(profile: Profile) -> str:
    """The page's text. It refers to no other file and to no address; every text of the profile's is escaped."""
    title = f"{profile.title}: where its time goes"
    parts = [
        _header(profile, title),
        _verdict(profile),
        _tiles(profile),
        _timeline(profile),
        *_plots(profile),
        _tables(profile),
        _origin(profile),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _header(profile: Profile, title: str) -> str:
    commit = f", commit {profile.commit[:12]}" if profile.commit else ""
    lines = [setting_line(profile), machine_line(profile), f"measured {profile.date}{commit}"]
    warning = f'<p class="warn">{escape(ON_A_CPU)}</p>' if profile.device == "cpu" else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in profile.notes)
    return f"<header><h1>{escape(title)}</h1><p>{'<br>'.join(map(escape, lines))}</p>{warning}{notes}</header>"


def _verdict(profile: Profile) -> str:
    verdict = profile.verdict
    advice = "".join(_advice(profile, item) for item in verdict.advice)
    return (
        f'<section class="verdict"><h2>Verdict: {escape(BINDS[verdict.binding])}</h2><p>{escape(verdict.sentence)}</p>'
        + (f"<ol>{advice}</ol>" if advice else "")
        + "</section>"
    )


def _advice(profile: Profile, advice: Advice) -> str:
    gain = advice_gain(advice.images_per_s, images_per_s(profile, profile.runs.real))
    return (
        f"<li><code>{escape(advice.line)}</code><span>{escape(advice.why)}</span>"
        f'<span class="gain">{escape(gain)}</span></li>'
    )


def _tiles(profile: Profile) -> str:
    rate, ratio, wait = (
        images_per_s(profile, profile.runs.real),
        real_over_synthetic(profile),
        wait_share(profile),
    )
    used = utilisation(profile)
    rounds = "in the only round" if len(profile.runs.real) == 1 else f"{span(rate)} over the rounds" if rate else ""
    tiles = [
        ("images/s in training", rate_text(rate.median) if rate else None, rounds),
        ("real over synthetic data", percent(ratio.median) if ratio else None, "100 %: loading costs nothing"),
        ("waiting for data", percent(wait.median) if wait else None, "of a step"),
        ("MFU", percent(used) if used else None, "of the compute rate measured here"),
        ("whole training", hours_text(profile.predicted_hours), f"{profile.total_steps:,} steps, no evaluations"),
    ]
    cells = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="big">{escape(value or "-")}</dd>'
        f'<dd class="small">{escape(words if value else "not measured")}</dd></div>'
        for name, value, words in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _section(heading: str, words: str, body: str, *, css: str = "") -> str:
    return f'<section class="{css}"><h2>{escape(heading)}</h2><p class="soft">{escape(words)}</p>{body}</section>'


def _drawn(plot: Plot, profile: Profile, place: str) -> str | None:
    """The plot for wide screens and the one for phones; the style sheet shows one of them."""
    found = [(name, plot(profile, WIDTHS[name])) for name in (place, "phone")]
    return "".join(svg.replace("<svg ", f'<svg class="{name}" ', 1) for name, svg in found if svg) or None


def _timeline(profile: Profile) -> str:
    drawn = _drawn(timeline, profile, "whole")
    if drawn is None:
        return ""
    legend = "".join(
        f'<li><span><i style="background:{colour(name)}"></i>{escape(f"{name} {text}")}</span></li>'
        for name, text in lengths(profile).items()
    )
    return _section(STEP, _step_words(profile), f'{drawn}<ul class="legend">{legend}</ul>')


def _step_words(profile: Profile) -> str:
    """What the pieces are, and what of the run they lack."""
    words = "The loader prepares the next images while the device computes; gaps in the device's lane are lost time."
    if any(span.name == "ranks" for span in profile.timeline):
        words += " Ranks: waiting until all of them are there."
    lacks = []
    if profile.world_size > 1 and all(span.name != "all-reduce" for span in profile.timeline):
        lacks.append("the exchange of gradients")
    settings = profile.config.get("run")
    if profile.device == "cuda" and isinstance(settings, dict) and settings.get("cuda_graphs"):
        lacks.append("the graph that the run replays")
    return f"{words} Taken without {' and '.join(lacks)}." if lacks else words


def _plots(profile: Profile) -> list[str]:
    """Side by side where there is room; of what cannot be drawn, a line says why."""
    kinds: list[tuple[str, str, Plot, str]] = [
        (
            "Time of each stage, alone",
            "Median over the rounds, range, and share of a real step.",
            bars,
            "no stage was measured alone",
        ),
        (
            "How near to the machine's rates",
            _roof_words(profile),
            roofline,
            "of no stage both flops and bytes are known",
        ),
        (
            "Loader by threads",
            "Of one rank. Dashed: what its step takes. Dotted: the first point, times the threads.",
            loader_curve,
            _few("threads", profile),
        ),
        (
            "Training by processes",
            f"Images/s over all. {_process_words(profile)}",
            process_curve,
            _few("processes", profile),
        ),
    ]
    shown = [(heading, words, _drawn(plot, profile, "half"), why) for heading, words, plot, why in kinds]
    drawn = [(heading, words, body) for heading, words, body, _ in shown if body]
    parts = [_section(heading, words, body, css="half") for heading, words, body in drawn]
    missing = [f"{heading}: {why}." for heading, _, body, why in shown if not body]
    if not profile.timeline:
        missing.append(f"{STEP}: not recorded.")
    place = "half brief" if len(parts) % 2 else ""  # beside the last plot, where there is room
    return parts + ([_section("Not drawn", " ".join(missing), "", css=place)] if missing else [])


def _process_words(profile: Profile) -> str:
    if profile.device == "cpu":
        return "They share the cores of one machine, so there is no ideal."
    return "Dotted: the first point, times the processes."


def _roof_words(profile: Profile) -> str:
    words = "The lines are the rates measured on this machine; what is far below both is bound by something else."
    shown = {name for name, _, _ in on_the_roof(profile)}
    unknown = [stage.name for stage in profile.stages if stage.lane == "device" and stage.name not in shown]
    hidden = f"Not shown, as their flops or bytes are not counted: {', '.join(unknown)}." if unknown else None
    return " ".join(filter(None, [words, above_words(profile), hidden]))


def _few(what: str, profile: Profile) -> str:
    points = profile.loader_scaling if what == "threads" else profile.scaling
    found = [(point.count, rate) for point in points if (rate := spread(point.images_per_s))]
    if not found:
        return "not measured"
    count, rate = found[0]
    return f"measured with {count:,} alone, {rate_text(rate.median)} images/s"


def _table(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    rows = []
    for name, *cells in sheet.rows:
        whole = "" if cells else f' colspan="{len(sheet.columns)}"'
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row"{whole}>{escape(name)}</th>{row}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _tables(profile: Profile) -> str:
    caption, *words = stage_words(profile)
    notes = "".join(f'<p class="soft">{escape(line)}</p>' for line in words)
    body = _table(stage_sheet(profile)) + notes + _table(run_sheet(profile))
    body += _table(scaling_sheet("decoding threads", profile.loader_scaling))
    if len(profile.scaling) > 1:
        body += _table(scaling_sheet("processes", profile.scaling, ideal=profile.device == "cuda"))
    return _section("All figures", f"Median and range over the rounds. {caption}", body + _pairs(totals(profile)))


def _pairs(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<div class="scroll" tabindex="0"><table class="pairs"><tbody>{cells}</tbody></table></div>'


def _origin(profile: Profile) -> str:
    rows = [
        ("command", profile.command),
        ("date", profile.date),
        ("commit", profile.commit or "not known"),
        ("warm-up", f"{profile.warm_up:,} steps before the first counted one"),
        *(("torch threads" if name == "threads" else name, str(value)) for name, value in profile.machine.items()),
    ]
    config = yaml.safe_dump(profile.config, sort_keys=False, width=100, allow_unicode=True)
    body = (
        _pairs(rows)
        + f"<details><summary>Config, every default included</summary><pre>{_lines(config)}</pre></details>"
    )
    return _section("How it was measured", "Machine, versions and settings.", body)


def _lines(text: str) -> str:
    return "\n".join(map(escape, text.splitlines()))
