"""The tables and the text of the step's benchmark, computed from its record alone."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console

from tools.loader_report import Sheet, print_sheets, spread

Record = dict[str, Any]  # as bench_step.py writes it to JSON
LABELS = {"ours": "ours", "floor": "the floor", "port-amp": "port, AMP", "port-fp32": "port, float32"}
MEANS = {
    "ours": "ours: the step as a run of the config takes it, with the optimizer, the queue and the teacher's move.",
    "floor": "the floor: forward and backward pass of the student, optimizer, forward pass of the teacher, as ours "
    "makes them (precision, compiled blocks, graph), with the mean of the student's embeddings for a loss. Nothing "
    "else.",
    "port-amp": "port, AMP: a plain eager port of the authors' step (two copies of the queue, all similarities and "
    "their log-softmax in memory, the teacher moved parameter by parameter, the batch in random order for the teacher, "
    "the place in the queue and the loss read by the host, SGD as torch runs it by itself), all of it under autocast, "
    "weights and views channels_last.",
    "port-fp32": "port, float32: the same without autocast, weights and views contiguous.",
}
NOT_HERE = "not measured on this device"


@dataclass(frozen=True, slots=True)
class Goal:
    """For a GPU: at `images` a step, `over` / `under` at least or at most `limit`."""

    text: str
    over: str
    under: str
    images: int
    limit: float
    at_most: bool


GOALS = (
    Goal("ours beside the floor: time of everything else", "ours", "floor", 32, 1.10, True),
    Goal("ours beside the port, AMP: times as fast", "port-amp", "ours", 32, 1.50, False),
)


def ratios(batch: Record, over: str, under: str) -> list[float]:
    """Time of one arm over that of another, within each round; none where one is missing."""
    if over not in batch["arms"] or under not in batch["arms"]:
        return []
    pairs = zip(batch["arms"][over]["seconds"], batch["arms"][under]["seconds"], strict=True)
    return [one / other for one, other in pairs]


def sheets(record: Record) -> list[Sheet]:
    return [_costs(record), _ratios(record), _goals(record)]


def _costs(record: Record) -> Sheet:
    rows = []
    for batch in record["batches"]:
        for name, arm in batch["arms"].items():
            seconds, peak = arm["seconds"], arm["peak_bytes"]
            rows.append(
                (
                    str(batch["images"]),
                    LABELS[name],
                    spread([1000 * one for one in seconds]),
                    f"{batch['images'] / median(seconds):,.0f}",
                    "-" if peak is None else f"{peak / 1e9:.2f}",
                )
            )
    return Sheet("A step", ("images", "", "ms", "images/s", "GB at the peak"), rows)


def _ratios(record: Record) -> Sheet:
    pairs = (("ours", "floor"), ("port-amp", "ours"), ("port-fp32", "ours"))
    rows = [
        (str(batch["images"]), *(spread(found) if (found := ratios(batch, *pair)) else "-" for pair in pairs))
        for batch in record["batches"]
        if batch["arms"]
    ]
    columns = ("images", *(f"{LABELS[over]} / {LABELS[under]}" for over, under in pairs))
    return Sheet("Time over time, within a round", columns, rows)


def _goals(record: Record) -> Sheet:
    rows = [(f"{goal.text}, {goal.images} images", *_judged(record, goal)) for goal in GOALS]
    return Sheet("Goals, which are for a GPU", ("goal", "measured", "to reach", "share reached"), rows)


def _judged(record: Record, goal: Goal) -> tuple[str, str, str]:
    """Measured, to reach, share of it: of the time above the floor, or of the speed-up."""
    found = [ratio for one in record["batches"] if one["images"] == goal.images for ratio in _of(one, goal)]
    limit = f"at most {goal.limit - 1:.0%}" if goal.at_most else f"at least {goal.limit:g}"
    if record["options"]["device"] != "cuda":
        return NOT_HERE, limit, "-"
    if not found:
        return "not measured in this run", limit, "-"
    if not goal.at_most:
        reached = median(found) / goal.limit
        return spread(found), limit, _share(reached)
    low, middle, high = (f"{one - 1:.1%}" for one in (min(found), median(found), max(found)))
    above = median(found) - 1
    return f"{middle} ({low} to {high})", limit, _share((goal.limit - 1) / above) if above > 0 else "all of it"


def _share(reached: float) -> str:
    return f"{reached:.0%}" if reached < 1 else f"{reached:.0%}, reached"


def _of(batch: Record, goal: Goal) -> list[float]:
    return ratios(batch, goal.over, goal.under)


def notes(record: Record) -> list[str]:
    """How it was measured, in sentences."""
    options, run = record["options"], record["config"]["all"]["run"]
    method = record["config"]["all"]["method"]
    on_gpu = options["device"] == "cuda"
    chosen = " ".join(record["config"]["set"])
    words = [
        f"The encoder, the sizes of the views and the settings are those of {record['config']['name']}"
        + (f", with {chosen}" if chosen else "")
        + f": run.precision={run['precision']}, run.compile={_yaml(run['compile'])}, run.cuda_graphs="
        f"{_yaml(run['cuda_graphs'])}, method.loss_impl={method['loss_impl']}. One process, one device, one "
        "micro-batch a step. Views are noise on the device, in the type that training takes, channels_last.",
        f"{options['rounds']} rounds; in each, every arm has one turn, in a new random order: a step that is not "
        f"counted, then {options['steps']} that are. Before them each arm is warmed up and has a turn that is not "
        "counted. Numbers are the median over the rounds and, in brackets, the range; ratios are taken within a round. "
        f"All arms are in one process with {options['threads']} threads of torch and share its allocator's settings. "
        f"Other processes used up to {max(one['others_share'] for one in record['batches']):.0%} of the machine's CPU "
        "time meanwhile.",
    ]
    present = {name for batch in record["batches"] for name in batch["arms"]}
    words += [f"- {text}" for name, text in MEANS.items() if name in present]
    if on_gpu:
        words.append(
            f"Convolutions in float32 are computed in {options['convolutions']}, and cuDNN "
            f"{'tries its algorithms out' if options['cudnn_benchmark'] else 'chooses its algorithms by rule'}, in all "
            "arms. The peak is what torch "
            "allocated for the arm from its building through its warm-up, the views not counted."
        )
    else:
        words.append("Memory is not told on a CPU, where the arms cannot be told apart.")
    words += [f"Left out: {name}: {reason}." for name, reason in record["left_out"].items()]
    return words


def _yaml(value: bool) -> str:
    return str(value).lower()


def print_report(record: Record, console: Console) -> None:
    print_sheets(sheets(record), record["left_out"], console)


def markdown(record: Record) -> str:
    where = "GPU" if record["options"]["device"] == "cuda" else "CPU"
    machine = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [f"# What a training step costs, {record['config']['name']}, {where}, {record['date']}"]
    for text in (*notes(record), f"Machine: {machine}."):
        lines += [text] if text.startswith("- ") and lines[-1].startswith("- ") else ["", text]
    for sheet in sheets(record):
        lines += ["", f"## {sheet.title}", "", _line(sheet.columns), _line(("---",) * len(sheet.columns))]
        lines += map(_line, sheet.rows)
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
