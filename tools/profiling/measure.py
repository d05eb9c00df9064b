"""Measures one rank's run: all that a profile holds but its verdict and what other numbers of processes reach."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, process_time
from typing import get_args

import torch
from rich.console import Console

from pipelines.free_memory import free_memory
from ressl import graphs
from ressl.config import Config
from tools.machine import machine_cpu_seconds
from tools.profiling.advice import LOADER
from tools.profiling.alternatives import measure_alternatives, rounds_for
from tools.profiling.arms import Arm, make_arms, real_steps, synthetic_steps
from tools.profiling.ceilings import Reached, look, look_again
from tools.profiling.clock import forget_peak, peak_memory
from tools.profiling.floors import frame_bytes, least_bytes, loss_taken, needed_flops
from tools.profiling.opened import OpenRun, open_run
from tools.profiling.progress import Phases
from tools.profiling.record import Measured, Point, Runs, Span, Stage, StageName
from tools.profiling.stored import reads_files
from tools.profiling.threads import measure_threads
from tools.profiling.timeline import TRACED, busy_seconds, typical_step, write_trace

MOST_ROUNDS, MOST_STEPS = 7, 50
CHEAP_S = 2.0  # a step below this leaves time to fill what is prepared ahead in every round
SHARES = {"ceilings": 0.04, "rounds": 0.5, "timeline": 0.06, "threads": 0.15, "alternatives": 0.12}
"""Of the whole time, at most; the rest goes to opening, warming up and ending."""
LATER = ("timeline", "threads", "alternatives")
ALTERNATIVES_S = 20.0
EXPENSIVE = 0.03  # a step that takes more than this share of the time is not tried out before it is measured
FEW_ROUNDS = 3  # fewer say little of the spread
LATE = 1.25  # times the time that was allowed, from which it is said beforehand
READERS = 4  # arms that read images: each takes its own
FROM_MEMORY = 0.5  # share of the bytes from which it is said that they did not come from storage
ARMS = ("real", "synthetic", "loader")
Times = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    steps: int  # of each arm in a round
    fill: int
    seconds: float  # that the rounds are expected to take


@dataclass(slots=True)
class Rounds:
    """What came of them: one value of each name a round."""

    reached: Reached
    times: Times = field(default_factory=dict)
    peak: int = 0  # bytes
    others: float = 0.0  # share of the machine's processor time that other processes used


def measure(cfg: Config, console: Console, *, seconds: float, until: float, trace: Path | None) -> Measured:
    """Called on every rank of a run; rank 0's is meant to be kept. Of about `seconds` in all there is time `until` (of
    time.monotonic), but a few steps of each kind are taken in any case. `trace` is where to leave a trace. Raises what
    `pretrain` would."""
    run = open_run(cfg, console)
    with Phases(console, enabled=run.runtime.is_main) as phases:
        phases.tell("measuring what the machine can do", until - monotonic())
        reached = look(run.device, cfg.run.precision, seconds=SHARES["ceilings"] / 2 * seconds)
        run.runtime.wait_for_everyone()
        phases.tell("warming up", until - monotonic())
        plan, warm_up = _plan(run, seconds, until)
        _tell_if_late(run, console, plan, seconds, until)
        rounds = _take_rounds(run, plan, phases, reached, seconds, until)
        decode_s, step_s = median(rounds.times["decode"]), _agreed(run, median(rounds.times["synthetic"]))
        time = {name: SHARES[name] * min(seconds, _agreed(run, until - monotonic()) / _later(1)) for name in LATER}
        phases.tell("looking at one step", sum(time.values()))
        busy = busy_seconds(run) if run.device.type == "cuda" else None
        count = max(1, min(7, int(time["timeline"] / step_s)))
        timeline = typical_step(run, steps=count, fill=plan.fill if count > 1 else 0)
        phases.tell("counting threads", time["threads"] + time["alternatives"])
        curve = measure_threads(run, decode_s, seconds=time["threads"]) if run.runtime.is_main else ()
        run.runtime.wait_for_everyone()
        speedups: dict[str, tuple[float, ...]] = {}
        if tried := rounds_for(run, step_s, min(ALTERNATIVES_S, time["alternatives"])):
            phases.tell("trying another precision", time["alternatives"])
            speedups = measure_alternatives(run, tried, step_s)
        if trace:
            phases.tell("writing a trace", 10)
            write_trace(run, trace) if run.runtime.is_main else real_steps(run, 0, TRACED)
    run.take_step.release()
    return _found(run, plan, rounds, warm_up=warm_up, busy=busy, timeline=timeline, curve=curve, speedups=speedups)


def _found(
    run: OpenRun,
    plan: Plan,
    rounds: Rounds,
    *,
    warm_up: int,
    busy: float | None,
    timeline: tuple[Span, ...],
    curve: tuple[Point, ...],
    speedups: dict[str, tuple[float, ...]],
) -> Measured:
    sizes = run.held.size.double()
    return Measured(
        device="cuda" if run.device.type == "cuda" else "cpu",
        world_size=run.runtime.world_size,
        images=run.images,
        cores=run.cores,
        threads=torch.get_num_threads(),
        others=rounds.others,
        warm_up=warm_up,
        stages=_stages(run, rounds.times),
        runs=Runs(
            real=tuple(rounds.times["real"]),
            synthetic=tuple(rounds.times["synthetic"]),
            loader=tuple(rounds.times["loader"]),
            wait=tuple(rounds.times["wait"]),
            launch=tuple(rounds.times.get("launch", ())),
            busy=busy,
        ),
        ceilings=rounds.reached.ceilings(),
        memory_peak=rounds.peak,
        loader_scaling=curve,
        timeline=timeline,
        total_steps=run.total_steps,
        side=round(float(sizes.amax(dim=1).mean())),
        set_bytes=3 * float(sizes.prod(dim=1).mean()) * len(run.stream.source.labels),
        free_bytes=_free_bytes(run),
        speedups=speedups,
        notes=tuple(_notes(run, plan, rounds.times)),
    )


def steps_alone(cfg: Config, console: Console, *, until: float) -> tuple[float, ...]:
    """Images/s over all ranks of whole real steps, one value a round: a point of the curve over processes. There is
    time `until` (of time.monotonic), but a few rounds are taken in any case."""
    run = open_run(cfg, console)
    _warm_up_steps(run)
    started = perf_counter()
    real_steps(run, 1, 1)
    step_s = _agreed(run, (perf_counter() - started) / 2)
    left = _agreed(run, until - monotonic())
    fill = run.cfg.data.prefetch + 1 if step_s < CHEAP_S else 1
    rounds = max(FEW_ROUNDS, min(MOST_ROUNDS, int(left / (2 * fill * step_s))))
    steps = max(1, min(MOST_STEPS, int(left / rounds / step_s) - fill))
    rates = tuple(cfg.optim.batch_size / real_steps(run, fill, steps)["real"] for _ in range(rounds))
    run.take_step.release()
    return rates


# --- rounds ----------------------------------------------------------------------------------------------------------


def _warm_up_steps(run: OpenRun) -> int:
    """Whole steps until they are as they will be: what is compiled or captured is then."""
    steps = graphs.WARM_UP + 2 if run.cfg.run.cuda_graphs and run.device.type == "cuda" else 1
    synthetic_steps(run, steps)
    return steps


def _plan(run: OpenRun, seconds: float, until: float) -> tuple[Plan, int]:
    """How many rounds of how many steps there is time for, the same on all ranks; and the steps taken to find out."""
    started = perf_counter()
    warm_up = _warm_up_steps(run)
    step_s, extra, fill = (perf_counter() - started) / warm_up, 0.0, 1
    if _agreed(run, step_s) < EXPENSIVE * seconds:
        warm_up += 2 * 4  # in two passes: pieces, synthetic, and real with the one that fills
        arms = make_arms(run, fill=1)
        for _ in range(2):  # the first is slow in ways that are gone after it
            before, found = perf_counter(), dict[str, float]()
            for arm in arms:
                found |= arm.run(1)
        one = sum(value for name, value in found.items() if name in ARMS or name in get_args(StageName))
        fill = run.cfg.data.prefetch + 1 if found["synthetic"] < CHEAP_S else 1
        extra = max(0.0, perf_counter() - before - one) + (fill - 1) * (found["real"] + found["loader"])
    else:
        one, extra = 3 * step_s, step_s
    time = min(SHARES["rounds"] * seconds, until - monotonic() - _later(seconds))
    rounds = max(1, min(MOST_ROUNDS, int(time / (one + extra))))
    if FEW_ROUNDS * (one + extra) < seconds:  # worth being late for
        rounds = max(FEW_ROUNDS, rounds)
    steps = max(1, min(MOST_STEPS, int((time / rounds - extra) / one)))
    rounds, steps, fill = (round(_agreed(run, float(value))) for value in (rounds, steps, fill))
    return Plan(rounds, steps, fill, rounds * (extra + steps * one)), warm_up


def _later(seconds: float) -> float:
    """Of `seconds`, what is kept for all that comes after the rounds."""
    return seconds * sum(SHARES[name] for name in LATER)


def _tell_if_late(run: OpenRun, console: Console, plan: Plan, seconds: float, until: float) -> None:
    left = plan.seconds - (until - monotonic())
    if run.runtime.is_main and left > (LATE - 1) * seconds:
        text = f"the steps are long: about {plan.seconds:.0f} s to come, more than --seconds allows"
        console.print(text, soft_wrap=True)


def _agreed(run: OpenRun, value: float) -> float:
    """Rank 0's, on all ranks."""
    return float(run.runtime.gather_rows(torch.tensor([value], dtype=torch.float64, device=run.device))[0])


def _take_rounds(run: OpenRun, plan: Plan, phases: Phases, reached: Reached, seconds: float, until: float) -> Rounds:
    """Arms take turns within a round, so that whatever else the machine does falls on all alike. Where rounds take
    longer than they were expected to, there are fewer."""
    arms, rounds = make_arms(run, fill=plan.fill), Rounds(reached)
    started, machine, own = perf_counter(), machine_cpu_seconds(), process_time()
    for number in range(plan.rounds):
        took = (perf_counter() - started) / number if number else plan.seconds / plan.rounds
        if number >= FEW_ROUNDS and _agreed(run, monotonic() + took) > until - _later(seconds):
            break
        text = "measuring the parts of a step, round by round"
        phases.tell(text, took * (plan.rounds - number) + _later(seconds))
        for arm in arms:
            run.runtime.wait_for_everyone()
            _add(rounds, run, arm, plan.steps)
        run.runtime.wait_for_everyone()
        share = SHARES["ceilings"] / 2 * seconds / plan.rounds
        rounds.reached = look_again(rounds.reached, run.device, run.cfg.run.precision, seconds=share)
    spent = torch.tensor([process_time() - own], dtype=torch.float64, device=run.device)
    others = machine_cpu_seconds() - machine - float(run.runtime.gather_rows(spent).sum())
    rounds.others = max(0.0, others) / (perf_counter() - started) / (os.cpu_count() or 1)
    return rounds


def _add(rounds: Rounds, run: OpenRun, arm: Arm, steps: int) -> None:
    if arm.name == "real":
        forget_peak(run.device)
    for name, value in arm.run(steps).items():
        rounds.times.setdefault(name, []).append(value)
    if arm.name == "real":
        rounds.peak = max(rounds.peak, peak_memory(run.device))


# --- what goes with the times ----------------------------------------------------------------------------------------


def _stages(run: OpenRun, times: Times) -> tuple[Stage, ...]:
    micro = run.cfg.optim.accumulate
    flops = needed_flops(run.cfg, run.images, on_gpu=run.device.type == "cuda")
    nbytes = least_bytes(
        run.cfg,
        run.method,
        run.held,
        images=run.images,
        world_size=run.runtime.world_size,
        dtype=run.runtime.dtype,
    )
    nbytes["copy"] = micro * frame_bytes(run.held)
    if "read bytes" in times:
        nbytes["read"] = median(times["read bytes"])
    return tuple(
        Stage(
            name=name,
            lane="loader" if name in LOADER else "device",
            seconds=tuple(times[name]),
            flops=flops.get(name),
            bytes=nbytes.get(name),
            note=_note(run, name),
        )
        for name in get_args(StageName)
        if name in times
    )


def _note(run: OpenRun, name: StageName) -> str:
    source = run.stream.source
    match name:
        case "read":
            return "the stored bytes of the images, not decoded; less what calls take that read nothing"
        case "decode" if reads_files(source):
            return f"with reading; threads: {source.workers}"
        case "decode":
            return "gathering: nothing is decoded"
        case "all-reduce":
            return "behind the backward pass, once all ranks are there; the run does both at once"
        case "queue" if run.runtime.world_size > 1:
            return "with the gathering of the embeddings of all ranks"
        case "loss" if loss_taken(run.cfg, run.images, on_gpu=run.device.type == "cuda") != "torch":
            return "with its gradient, which is made in the same pass"
        case "student" | "teacher" | "backward" if run.cfg.run.cuda_graphs:
            return "launched piece by piece: the run replays a graph"
    return ""


def _free_bytes(run: OpenRun) -> float:
    if run.device.type == "cuda":
        return float(torch.cuda.mem_get_info(run.device)[0])
    return free_memory()[0] / run.runtime.world_size


def _notes(run: OpenRun, plan: Plan, times: Times) -> list[str]:
    found, rounds = [], len(times["real"])
    if rounds < FEW_ROUNDS:
        count, step_s = "one round" if rounds == 1 else f"{rounds} rounds", median(times["synthetic"])
        found.append(f"a step takes {step_s:.2g} s, so there was time for only {count}: see --seconds")
    if run.cfg.views.progressive:
        found.append("views were measured at their full size: the first epochs, with smaller ones, are faster")
    if "stored bytes" in times:
        stored, read = sum(times["stored bytes"]), sum(times["read bytes"])
        if stored < (1 - FROM_MEMORY) * read:
            found.append(
                f"{100 * (1 - stored / read):.0f} % of the bytes that were read lay in memory: a set that does not fit "
                "there is read from storage, and slower"
            )
    taken = READERS * rounds * (plan.steps + plan.fill)
    if reads_files(run.stream.source) and run.stream.steps_per_epoch < taken:
        found.append("the set is small: its images came more than once, and from memory")
    return found
