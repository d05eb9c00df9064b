import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ressl.batch import DataError
from ressl.config_file import ConfigError
from tools.profiling.compare import compare
from tools.profiling.record import Profile, Runs


@pytest.fixture
def compared(tmp_path: Path, made_profile) -> Callable[..., tuple[bool, str]]:
    """Compares two profiles, the first made as the fixture does unless given; returns the verdict and what was said."""

    def run(after: Profile, before: Profile | None = None, tolerance: float = 0.1) -> tuple[bool, str]:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, profile in zip(paths, (before or made_profile(), after), strict=True):
            path.write_text(profile.model_dump_json())
        console = Console(file=io.StringIO(), width=200)
        good = compare(*paths, tolerance=tolerance, console=console)
        return good, console.file.getvalue()

    return run


def times(profile: Profile, factor: float, *names: str) -> Profile:
    """With these runs or stages so many times as long."""
    runs = {name: tuple(factor * s for s in getattr(profile.runs, name)) for name in Runs.model_fields if name in names}
    stages = [
        stage.model_copy(update={"seconds": tuple(factor * s for s in stage.seconds)}) if stage.name in names else stage
        for stage in profile.stages
    ]
    update = {"runs": profile.runs.model_copy(update=runs), "stages": tuple(stages)}
    return profile.model_copy(update=update)


def with_real(profile: Profile, *seconds: float) -> Profile:
    return profile.model_copy(update={"runs": profile.runs.model_copy(update={"real": seconds})})


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_equal_profiles_pass(compared, made_profile):
    good, text = compared(made_profile())
    assert good
    assert "different" not in text and "slower" not in text.lower()
    assert line_of(text, "teacher").split()[1:4] == ["20.0", "20.0", "1.00"]


@pytest.mark.parametrize("run", ["real", "synthetic"])
def test_steps_that_take_30_percent_more_fail(compared, made_profile, run: str):
    good, text = compared(times(made_profile(), 1.3, run))
    assert not good
    assert f"A step back: {run} step, 1.30 times what it was: 23 % fewer images/s" in text
    assert "slower!" in line_of(text, f"{run} step")


def test_steps_within_the_tolerance_pass(compared, made_profile):
    assert compared(times(made_profile(), 1.08, "real", "synthetic"))[0]
    assert not compared(times(made_profile(), 1.08, "real", "synthetic"), tolerance=0.05)[0]


def test_what_got_faster_is_said_and_passes(compared, made_profile):
    good, text = compared(times(made_profile(), 0.5, "real"))
    assert good
    assert "faster" in line_of(text, "real step")


def test_noise_is_no_step_back(compared, made_profile):
    noisy = with_real(made_profile(), 0.10, 0.18, 0.13, 0.15)
    good, text = compared(with_real(made_profile(), 0.12, 0.19, 0.17, 0.16), noisy)
    assert good
    assert "slower" not in line_of(text, "real step")


def test_one_hiccup_hides_no_step_back(compared, made_profile):
    hiccup = with_real(made_profile(), 0.1, 0.1, 0.11, 0.1, 0.9)
    assert not compared(with_real(made_profile(), 0.2, 0.2, 0.21, 0.2, 0.2), hiccup)[0]


def test_more_memory_fails(compared, made_profile):
    good, text = compared(made_profile(memory_peak=1_200_000_000))
    assert not good
    assert "A step back: memory peak, 1.20 times what it was." in text


def test_slower_stages_are_named_and_decide_nothing(compared, made_profile):
    good, text = compared(times(made_profile(), 2, "views", "loader", "wait"))
    assert good
    assert "Slower, but not deciding: loader alone, waiting for data, views." in text


def test_a_stage_that_one_of_them_lacks_is_said(compared, made_profile):
    stages = made_profile().stages
    _, text = compared(made_profile(stages=stages[1:]), made_profile(stages=stages[:-1]))
    assert "not in B" in line_of(text, "decode")
    assert "not in A" in line_of(text, "queue")


def test_other_circumstances_are_told_first(compared, made_profile):
    machine = made_profile().machine | {"cores": 16}
    config = {"data": {"source": {"name": "folder", "workers": 8}}, "run": {"out_dir": "elsewhere"}}
    _, text = compared(made_profile(machine=machine, precision="bf16", world_size=2, config=config))
    head = text[: text.index("real step")]
    for words in ("machine: cores 2 / 16", "precision: fp32 / bf16", "processes: 1 / 2", "data.source.workers 1 / 8"):
        assert f"different {words}" in head or words in head
    assert "out_dir" not in text


def test_many_changes_of_the_config_are_counted(compared, made_profile):
    one, other = ({"run": {f"key{number}": value for number in range(30)}} for value in (1, 2))
    assert "and 18 more" in compared(made_profile(config=other), made_profile(config=one))[1]


def test_steps_of_different_sizes_are_compared_by_the_image(compared, made_profile):
    double = times(made_profile(images=200, memory_peak=2 * 10**9), 2, "real", "synthetic")
    good, text = compared(double)
    assert good  # memory grows with the batch: it is shown, and decides nothing
    assert "given by the image" in text
    assert line_of(text, "real step").split()[2:5] == ["1,250", "1,250", "1.00"]  # us
    assert not compared(times(double, 1.3, "real"))[0]


@pytest.mark.parametrize(("rounds", "words"), [(1, "one round"), (2, "2 rounds")])
def test_few_rounds_decide_nothing(compared, made_profile, rounds: int, words: str):
    few = with_real(made_profile(memory_peak=2 * 10**9), *(0.25,) * rounds)
    good, text = compared(few)
    assert good
    assert f"Not decided: real step, synthetic step, memory peak, as one of them has {words}" in text
    assert "--seconds" in text and "step back" not in text and "!" not in text
    assert "Slower, but not deciding: real step, memory peak." in text


def with_rates(profile: Profile, **rates: float) -> Profile:
    return profile.model_copy(update={"ceilings": profile.ceilings.model_copy(update=rates)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda profile: with_rates(profile, matmul_flops=0.8e11), "its compute rate was 0.8 times that of A"),
        (lambda profile: with_rates(profile, copy_bytes=1.5e10), "its copy rate was 1.50 times that of A"),
        (lambda profile: profile.model_copy(update={"others": 0.4}), "others used 5.0 % of it in A, 40 % in B"),
    ],
)
def test_steps_of_an_unlike_machine_decide_nothing(compared, made_profile, change, words: str):
    before = made_profile(others=0.05)
    slower = change(times(before, 1.3, "real"))
    good, text = compared(slower, before)
    assert good
    why = f"the machine was not the same: {words}; profile both again"
    assert f"Not decided: real step, synthetic step, as {why}" in text.replace("\n", " ")
    assert "slower" in line_of(text, "real step") and "slower!" not in text
    good, text = compared(slower.model_copy(update={"memory_peak": 2 * 10**9}), before)
    assert not good  # neither speed nor load of the machine changes what a step keeps
    assert "A step back: memory peak" in text


def test_a_machine_that_differs_within_the_tolerance_is_the_same(compared, made_profile):
    before = made_profile(others=0.05)
    after = with_rates(times(before, 1.3, "real"), copy_bytes=1.08e10).model_copy(update={"others": 0.12})
    assert not compared(after, before)[0]
    assert "Not decided" in compared(after, before, tolerance=0.05)[1]


def test_rates_of_another_precision_say_nothing_of_the_machine(compared, made_profile):
    bf16 = with_rates(made_profile(precision="bf16"), matmul_flops=4e11)
    assert not compared(times(bf16, 1.3, "real"))[0]


def test_loads_that_one_of_them_did_not_count_are_not_compared(compared, made_profile):
    assert not compared(times(made_profile(others=0.9), 1.3, "real"))[0]


def test_a_cpu_is_not_compared_with_a_gpu(compared, made_profile):
    with pytest.raises(ConfigError, match="a.json was measured on cpu, .*b.json on cuda"):
        compared(made_profile(device="cuda"))


def test_without_a_common_kind_of_step_nothing_is_decided(compared, made_profile):
    nothing = Runs(real=(), synthetic=(), loader=(), wait=())
    with pytest.raises(ConfigError, match="no kind of whole step in common"):
        compared(made_profile(runs=nothing))


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_is_a_share(compared, made_profile, tolerance: float):
    with pytest.raises(ConfigError, match="--tolerance"):
        compared(made_profile(), tolerance=tolerance)


def test_other_files_are_named(made_profile, tmp_path: Path):
    (tmp_path / "good.json").write_text(made_profile().model_dump_json())
    (tmp_path / "bad.json").write_text('{"format": 1}')
    (tmp_path / "empty.json").write_text(made_profile().model_dump_json().replace('"images":100', '"images":0'))
    for bad in ("bad.json", "empty.json", "missing.json"):
        with pytest.raises(DataError, match=bad):
            compare(tmp_path / "good.json", tmp_path / bad, tolerance=0.1, console=Console(quiet=True))
