"""Two ranks of which one hangs, dies, meets a number that is not finite, or sees other images than it should."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ressl import checkpoint
from ressl.run_dir import checkpoints_path, lines_of, metrics_path

LIMIT = 4  # seconds after which a rank counts as hanging


@pytest.fixture(scope="module")
def tiny(write_tiny_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("config"))


class Run:
    """A run with a fault on rank 1, its exit codes and what it said."""

    def __init__(
        self, forked_ranks, config: Path, directory: Path, what: str, steps: list[int], *overrides: str
    ) -> None:
        self.out, log = directory / "run", directory / "log"
        fault, began = {"what": what, "rank": 1, "steps": steps}, time.monotonic()
        given = [f"run.out_dir={self.out}", f"run.hang_timeout={LIMIT}", "run.checkpoint.steps=2", *overrides]
        pids = forked_ranks.start(config, *given, log=log, fault=fault)
        self.codes = forked_ranks.wait(pids[:1]) + forked_ranks.wait(pids[1:], seconds=5 if what == "freeze" else 60)
        self.seconds, self.said = time.monotonic() - began, log.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("ressl: error: ")]


# --- hangs -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_waits_for_data_for_too_long_is_named_and_all_leave_their_stacks(
    tiny: Path, forked_ranks, tmp_path: Path
) -> None:
    run = Run(forked_ranks, tiny, tmp_path, "sleep", [3])
    assert run.codes == [6, 6], run.said
    (error,) = run.errors
    assert "rank 1 hung for" in error and "after step 3, waiting for data; the stacks of all ranks are in" in error
    stacks = [(run.out / "watch" / f"stacks-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "at step since step 3" in stacks[0] and "at data since step 3" in stacks[1] and "in _strike" in stacks[1]
    assert run.seconds < LIMIT + 40


def test_a_rank_that_is_stopped_is_named(tiny: Path, forked_ranks, tmp_path: Path) -> None:
    run = Run(forked_ranks, tiny, tmp_path, "freeze", [3])
    assert run.codes == [6, None], run.said  # the launcher would have killed it
    (error,) = run.errors
    assert "rank 1 has given no sign of life for" in error and "it is stopped, or its machine is lost" in error


@pytest.mark.parametrize(("what", "code"), [("exit", 9), ("raise", 1)])
def test_when_a_rank_dies_the_other_ends_too(what: str, code: int, tiny: Path, forked_ranks, tmp_path: Path) -> None:
    run = Run(forked_ranks, tiny, tmp_path, what, [3])
    assert run.codes[1] == code and run.codes[0] not in (0, None) and run.seconds < 60, run.said
    found = checkpoint.newest(checkpoints_path(run.out))
    assert found is not None and found[1].about.step == 2


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_wherever_it_comes_from_on_one_rank_the_step_changes_nothing_on_any(
    tiny: Path, forked_ranks, tmp_path: Path
) -> None:
    places, log = ["strong view", "weak view", "teacher", "queue", "gradient"], tmp_path / "log"
    pids = forked_ranks.start(tiny, f"run.out_dir={tmp_path}", log=log, spoiled=places)
    assert forked_ranks.wait(pids) == [0, 0], log.read_text()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {place: [[], number] for number, place in enumerate(places, 1)}


def test_a_few_steps_that_are_not_finite_are_left_out_on_both_ranks(tiny: Path, forked_ranks, tmp_path: Path) -> None:
    run = Run(forked_ranks, tiny, tmp_path, "nan", [1, 4])
    assert run.codes == [0, 0], run.said
    found = lines_of(metrics_path(run.out))
    assert [record["loss"] is None for record in found] == [step in (1, 4) for step in range(8)]
    assert [record.get("skipped") for record in found] == [None, 1, 1, 1, 2, 2, 2, 2]
    last = checkpoint.newest(checkpoints_path(run.out))
    assert last is not None and last[1].about.step == 8 and int(last[1].training["guard"]["skipped"]) == 2
    assert int(last[1].model["queue.cursor"]) == 6 * 16 % 40  # two steps have not pushed their embeddings


def test_of_weights_that_lead_to_no_number_nothing_is_saved_unless_the_run_is_to_end(
    tiny: Path, forked_ranks, tmp_path: Path
) -> None:
    """They are finite, but would take the places of good ones."""
    run = Run(forked_ranks, tiny, tmp_path, "nan", [2, 3, 4, 5, 6, 7], "run.checkpoint.steps=1")
    assert run.codes == [0, 0], run.said
    assert [path.name for path in checkpoint.found(checkpoints_path(run.out))] == [
        checkpoint.name_of(step) for step in (8, 2, 1)
    ]


def test_too_many_end_the_run_with_step_rank_images_and_the_last_good_checkpoint(
    tiny: Path, forked_ranks, tmp_path: Path
) -> None:
    run = Run(forked_ranks, tiny, tmp_path, "nan", [3, 4, 5, 6, 7], "run.skip_limit=2")
    assert run.codes[0] == 5 and run.codes[1] == 5, run.said
    (error,) = run.errors
    assert "of step 6 were not finite on rank 1; images " in error and "Left out: it and 2 others, more than" in error
    again = f"to go on: python launch.py resume {run.out} optim.lr=0.03 --allow-change optim.lr"
    assert "more than run.skip_limit=2 allows" in error and error.endswith(again)
    last = checkpoint.newest(checkpoints_path(run.out))
    assert last is not None and f"The last good checkpoint is {last[0]};" in error and last[2] == []
    assert last[1].about.step == 2  # none was saved after a step that was left out
    assert all(value.isfinite().all() for value in last[1].model.values())
    named = error.split("images ")[1].split(".")[0].split(", ")
    assert len(named) == 8 and all(0 <= int(name) < 72 for name in named)


# --- ranks that do not see one order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"), [("other seed", "rank 1 reads other data than rank 0"), ("other part", "the same images")]
)  # fmt: skip
def test_ranks_that_see_other_images_than_they_should_refuse_to_begin(
    what: str, words: str, tiny: Path, forked_ranks, tmp_path: Path
) -> None:
    run = Run(forked_ranks, tiny, tmp_path, what, [])
    assert run.codes == [2, 2], run.said
    (error,) = run.errors
    assert words in error and "Traceback" not in run.said


def test_where_each_rank_is_can_be_read_while_it_runs(tiny: Path, forked_ranks, tmp_path: Path) -> None:
    out, slow = tmp_path / "run", {"what": "slow", "rank": 1, "steps": list(range(8))}
    pids = forked_ranks.start(
        tiny, f"run.out_dir={out}", "run.hang_timeout=1.5", log=tmp_path / "log", fault=slow
    )  # fmt: skip
    beats: dict[int, dict] = {}
    deadline = time.monotonic() + 60
    while len(beats) < 2 and time.monotonic() < deadline:
        for rank in (0, 1):
            path = out / "watch" / f"rank{rank}.json"
            if path.exists():
                try:
                    beats[rank] = json.loads(path.read_text())
                except OSError:  # it ends
                    continue
        time.sleep(0.01)
    assert forked_ranks.wait(pids) == [0, 0], (tmp_path / "log").read_text()
    assert {rank: beat["rank"] for rank, beat in beats.items()} == {0: 0, 1: 1}
    assert not (out / "watch").exists() and not os.path.lexists(out / "checkpoints" / ".part")
