"""What binds a run, and which lines of its config would change that: drawn from what was measured, and from no clock.

A step and its loader pass beside each other, so the slower of the two sets the pace. What binds is looked for in this
order: the loader, if the step waits for it, or is slower with it than without; then the largest of the views, of
gradients that travel with nothing beside them, and of the parts of the step itself, if it is not the launching of them.
"""

from ressl.config import Config, ResidentSource, SyntheticSource
from tools.profiling.advice import EXPOSED, Facts, advise, collect, percent
from tools.profiling.record import Binding, Measured, StageName, Verdict

IDLE = 0.3  # share of a step that a GPU may have nothing to do before launching is to blame
READING = 0.5  # share of decoding from which it is the reading
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
    return Verdict(binding=binding, sentence=_sentence(cfg, facts, binding), advice=advise(cfg, facts, binding))


def find_binding(facts: Facts) -> Binding:
    stages, step, busy = facts.stages, facts.synthetic, facts.measured.runs.busy
    if facts.behind or facts.slowed:
        decode = stages.get("decode", 0.0)
        if stages.get("copy", 0.0) > decode:
            return "copy"
        return "read" if stages.get("read", 0.0) > READING * decode else "decode"
    own = max(stages[name] for name in STEP_STAGES if name in stages)
    parts: dict[Binding, float] = {"step": own, "views": stages["views"]}
    if facts.exposed > EXPOSED * step:
        parts["all-reduce"] = facts.exposed
    largest = max(parts, key=lambda name: parts[name])
    return "host" if largest == "step" and busy is not None and busy < (1 - IDLE) * step else largest


def _sentence(cfg: Config, facts: Facts, binding: Binding) -> str:
    pace, alone = f"the run makes {_rate(facts, facts.real)}", f"the step alone {_rate(facts, facts.synthetic)}"
    waiting = f"it waits for images {percent(facts.wait / facts.real)} of the time"
    largest = max((name for name in STEP_STAGES if name in facts.stages), key=lambda name: facts.stages[name])
    part = f"{PARTS[largest]} ({percent(facts.share(largest))})"
    words = WORDS[binding]
    match binding:
        case "read" | "decode" | "copy":
            if binding == "decode" and isinstance(cfg.data.source, ResidentSource | SyntheticSource):
                words = "Gathering images from memory binds"
            why = f"{pace}, the loader alone {_rate(facts, facts.loader)}, {alone}; {waiting}{_beside(facts)}"
        case "views":
            why = f"{pace}, and {percent(facts.share('views'))} of the step goes into its views; next is {part}"
        case "all-reduce":
            why = f"{pace}, and for {percent(facts.exposed / facts.synthetic)} of the step nothing is done beside it"
        case "host":
            idle = 1 - (facts.measured.runs.busy or 0.0) / facts.synthetic
            why = f"{pace}, and the GPU has nothing to do {percent(idle)} of the time"
        case "step":
            why = f"{pace}, {alone}; its largest part is {part}, and {waiting}"
    if facts.disturbed:
        why += "; the step was slower in the run than alone, though loading takes next to nothing: measure once more"
    return f"{words}: {why}."


def _beside(facts: Facts) -> str:
    """How a loader that is fast enough by itself slows the step."""
    if facts.behind:
        return ""
    if facts.irregular:
        return ": the loader is fast enough on average, but not at every step"
    if facts.measured.device == "cpu":
        return ": the loader is fast enough, but takes the step's cores from it"
    return ": the loader is fast enough, but slows the step beside it"


def _rate(facts: Facts, seconds: float) -> str:
    rate = facts.images / seconds
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"
