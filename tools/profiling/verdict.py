"""What binds a run, and which lines of its config would change that: drawn from what was measured, and from no clock.

A step and its loader pass beside each other, so the slower of the two sets the pace. What binds is looked for in this
order: the loader, if the step waits for it; the views; gradients on their way; launching; else it is the step itself.
"""

from statistics import median

from ressl.config import Config
from tools.profiling.advice import WAITING, Facts, advise, percent
from tools.profiling.record import Binding, Measured, StageName, Verdict

EXPOSED = 0.15  # share of a step that gradients may be on their way with nothing beside it
IDLE = 0.3  # share of a step that a GPU may have nothing to do before launching is to blame
READING = 0.5  # share of decoding from which it is the reading
CALL_S = 1e-5  # of Python, for each image that is read alone: the sources' own readers do without
STEP_STAGES: tuple[StageName, ...] = ("teacher", "student", "loss", "backward", "optimizer", "ema", "queue")
WORDS: dict[Binding, str] = {
    "read": "Reading the stored images binds",
    "decode": "Decoding binds",
    "copy": "Copying images to the device binds",
    "views": "Cutting the views binds",
    "all-reduce": "Sending gradients between the processes binds",
    "host": "Launching binds: the GPU waits for Python",
    "step": "The step itself binds",
}


PARTS: dict[StageName, str] = {
    "teacher": "the teacher's forward pass",
    "student": "the student's forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "ema": "moving the teacher",
    "queue": "the queue",
}


def judge(cfg: Config, measured: Measured) -> Verdict:
    facts = collect(measured)
    binding = find_binding(facts)
    return Verdict(binding=binding, sentence=_sentence(facts, binding), advice=advise(cfg, facts, binding))


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


def find_binding(facts: Facts) -> Binding:
    stages, step = facts.stages, facts.synthetic
    if facts.wait > WAITING * facts.real and facts.loader > step:
        decode = stages.get("decode", 0.0)
        if stages.get("copy", 0.0) > decode:
            return "copy"
        read = stages.get("read", 0.0) - CALL_S * facts.measured.images
        return "read" if read > READING * decode else "decode"
    if stages["views"] > max(stages[name] for name in STEP_STAGES if name in stages):
        return "views"
    if exposed(facts) > EXPOSED * step:
        return "all-reduce"
    busy = facts.measured.runs.busy
    if busy is not None and busy < (1 - IDLE) * step:
        return "host"
    return "step"


def exposed(facts: Facts) -> float:
    """Seconds of a step in which gradients travel and nothing else is done: what it takes beyond its other parts, at
    most all of the sending."""
    others = sum(facts.stages.get(name, 0.0) for name in ("views", *STEP_STAGES))
    return min(facts.stages.get("all-reduce", 0.0), max(0.0, facts.synthetic - others))


def _sentence(facts: Facts, binding: Binding) -> str:
    pace, alone = f"the run makes {_rate(facts, facts.real)}", f"the step alone {_rate(facts, facts.synthetic)}"
    waiting = f"it waits for images {percent(facts.wait / facts.real)} of the time"
    largest = max((name for name in STEP_STAGES if name in facts.stages), key=lambda name: facts.stages[name])
    part = f"{PARTS[largest]} ({percent(facts.share(largest))})"
    match binding:
        case "read" | "decode" | "copy":
            why = f"{pace}, the loader alone {_rate(facts, facts.loader)}, {alone}; {waiting}"
        case "views":
            why = f"{pace}, and {percent(facts.share('views'))} of the step goes into its views; next is {part}"
        case "all-reduce":
            why = f"{pace}, and for {percent(exposed(facts) / facts.synthetic)} of the step nothing is done beside it"
        case "host":
            idle = 1 - (facts.measured.runs.busy or 0.0) / facts.synthetic
            why = f"{pace}, and the GPU has nothing to do {percent(idle)} of the time"
        case "step":
            why = f"{pace}, {alone}; its largest part is {part}, and {waiting}"
    return f"{WORDS[binding]}: {why}."


def _rate(facts: Facts, seconds: float) -> str:
    rate = facts.images / seconds
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"
