import pytest

from tools.profiling.figures import (
    Spread,
    above,
    above_words,
    achieved,
    advice_gain,
    hours_text,
    images_per_s,
    machine_line,
    memory_ceiling,
    percent,
    percent_of,
    rate_text,
    rates,
    real_over_synthetic,
    utilisation,
    wait_share,
    whole_step,
)
from tools.profiling.record import Ceilings, Runs, Stage


def test_ratios_are_taken_within_a_round(made_profile):
    profile = made_profile(runs=Runs(real=(2.0, 40.0), synthetic=(1.0, 10.0), loader=(), wait=(0.5, 20.0)))
    assert real_over_synthetic(profile) == Spread(0.375, 0.25, 0.5)
    assert wait_share(profile) == Spread(0.375, 0.25, 0.5)


def test_rates_count_the_images_of_all_ranks(made_profile):
    found = images_per_s(made_profile(world_size=4, images=50), (0.5, 1.0, 2.0))
    assert found == Spread(200.0, 100.0, 400.0)


def test_utilisation_is_the_flops_of_all_stages_over_what_the_machine_does_in_a_step(made_profile):
    assert utilisation(made_profile()) == pytest.approx((1e9 + 1e9 + 1e7 + 2e9) / 0.125 / 1e11)
    assert utilisation(made_profile(stages=())) is None


def test_without_a_real_step_the_synthetic_one_is_the_measure(made_profile):
    only = Runs(real=(), synthetic=(0.1, 0.3, 0.2), loader=(), wait=())
    assert whole_step(made_profile(runs=only)) == 0.2
    nothing = made_profile(runs=Runs(real=(), synthetic=(), loader=(), wait=()))
    assert whole_step(nothing) is None
    assert (real_over_synthetic(nothing), wait_share(nothing), utilisation(nothing)) == (None, None, None)


def test_a_duration_of_zero_gives_no_rate():
    assert rates(10, (0.0, 2.0)) == (5.0,)
    assert achieved(10.0, (0.0,)) is None
    assert achieved(None, (1.0,)) is None


def test_a_copy_is_held_against_the_link_and_a_read_against_nothing():
    ceilings = Ceilings(matmul_flops=1.0, copy_bytes=2.0, host_to_device_bytes=3.0)
    stages = [Stage(name=name, lane="loader", seconds=()) for name in ("copy", "read", "all-reduce", "views")]
    assert [memory_ceiling(stage, ceilings) for stage in stages] == [3.0, None, None, 2.0]


def test_what_is_faster_than_the_measured_rates_is_named(made_profile):
    assert above(made_profile()) == [] and above_words(made_profile()) is None
    slow = made_profile(ceilings=Ceilings(matmul_flops=4.1e10, copy_bytes=5.5e9))
    assert above(slow) == ["views", "teacher", "backward", "optimizer", "ema"]
    found = above_words(made_profile(ceilings=Ceilings(matmul_flops=3e10, copy_bytes=1e12)))
    assert found.startswith("Above 100 %, so above the measured rate: teacher, student, backward, MFU;")


def test_a_share_of_a_rate_is_known_where_both_are():
    assert [percent_of(*pair) for pair in ((1.5, 1.0), (1.0, None), (None, 1.0), (0.0, 1.0))] == [150, None, None, None]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 %"), (0.0004, "<0.1 %"), (0.0123, "1.2 %"), (0.0996, "10 %"), (1.5, "150 %")]
)
def test_shares_are_written_as_precisely_as_they_are_known(value: float, text: str):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("hours", "text"), [(0, "0 s"), (0.01, "36.0 s"), (0.5, "30.0 min"), (4.216, "4.22 h"), (240, "10.0 days")]
)
def test_hours_are_written_in_the_unit_people_think_in(hours: float, text: str):
    assert hours_text(hours) == text


def test_rates_stay_short():
    assert [rate_text(value) for value in (0.5, 12.3456, 45678.9, 2.5e6)] == ["0.5", "12.3", "45,679", "2.50 M"]


def test_a_gain_says_from_where_to_where_at_most():
    now = Spread(800.0, 780.0, 820.0)
    bound = "at most 1,000 images/s instead of 800 (1.25x): a bound, not measured"
    assert advice_gain(1000.0, now) == bound
    assert advice_gain(1000.0, None) == "at most 1,000 images/s: a bound, not measured"
    assert "images/s" not in advice_gain(None, now)


def test_the_machine_is_one_line_that_says_nothing_twice(made_profile):
    assert machine_line(made_profile()) == "cpu, Some CPU, 2 cores, 8 GB, torch 2.15.0"
    assert machine_line(made_profile(machine={"device": "X", "cpu": "X"})) == "X"
    assert machine_line(made_profile(machine={})) == ""
    assert machine_line(made_profile(machine={"cores": 8, "threads": 2})) == "8 cores, torch threads: 2"
