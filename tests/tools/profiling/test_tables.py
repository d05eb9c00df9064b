from tools.profiling.record import Ceilings, Point, Runs
from tools.profiling.tables import Sheet, run_sheet, scaling_sheet, stage_sheet, stage_words, totals


def test_stages_stand_below_their_lane(made_profile):
    names = [row[0] for row in stage_sheet(made_profile()).rows]
    assert names[:4] == ["loader", "decode", "copy", "device"]
    assert all(len(row) == len(stage_sheet(made_profile()).columns) for row in stage_sheet(made_profile()).rows[1:3])


def test_columns_that_no_stage_can_fill_are_left_out(made_profile):
    stages = tuple(stage.model_copy(update={"flops": None}) for stage in made_profile().stages)
    assert stage_sheet(made_profile(stages=stages)).columns == ("stage", "ms", "range", "share", "images/s", "GB/s")
    assert stage_sheet(made_profile(stages=stages[:1])).columns[-1] == "images/s"


def test_whole_steps_show_what_the_host_and_the_device_do_in_one(made_profile):
    runs = Runs(real=(0.1, 0.2), synthetic=(), loader=(), wait=(), launch=(0.05,), busy=0.04)
    rows = {row[0]: row[1:] for row in run_sheet(made_profile(runs=runs)).rows}
    assert rows["real: the config's data"] == ("150", "100 to 200", "750", "500 to 1,000")
    assert rows["loader alone"][0] == "-"
    assert rows["launching a synthetic step"][0] == "50.0"
    assert rows["the device computing in it"][0] == "40.0"
    assert len(run_sheet(made_profile()).rows) == 3


def test_a_curve_is_compared_with_its_first_point_that_was_measured():
    points = (
        Point(count=1, images_per_s=()),
        Point(count=2, images_per_s=(90.0, 110.0)),
        Point(count=8, images_per_s=(200.0,)),
    )
    assert scaling_sheet("threads", points).rows == (
        ("2", "100", "90.0 to 110", "1.00x", "100 %"),
        ("8", "200", "200", "2.00x", "50 %"),
    )


def test_processes_that_share_cores_have_no_ideal():
    points = tuple(Point(count=n, images_per_s=(125.0 * n,)) for n in (1, 2))
    sheet = scaling_sheet("processes", points, ideal=False)
    assert sheet.columns == ("processes", "images/s", "range", "over the first")
    assert sheet.rows[1] == ("2", "250", "250", "2.00x")


def test_a_sheet_without_some_columns_keeps_its_headings():
    sheet = Sheet(("a", "b", "c"), (("heading",), ("1", "2", "3")), spare=(1,))
    assert sheet.without([1]) == Sheet(("a", "c"), (("heading",), ("1", "3")))


def test_shares_of_a_rate_are_shown_from_one_percent_on_and_above_a_hundred_explained(made_profile):
    ceilings = Ceilings(matmul_flops=4e10, copy_bytes=1.2e12)
    rows = {row[0]: row[1:] for row in stage_sheet(made_profile(ceilings=ceilings)).rows}
    assert rows["teacher"][-2:] == ("50.0 (125 %)", "5.00")
    assert any("Above 100 %" in line and "teacher" in line for line in stage_words(made_profile(ceilings=ceilings)))
    assert not any("Above 100 %" in line for line in stage_words(made_profile()))


def test_what_others_used_is_told_where_it_was_measured(made_profile):
    assert dict(totals(made_profile(others=0.12)))["used by others"] == "12 % of the machine's cores"
    assert "used by others" not in dict(totals(made_profile()))


def test_totals_name_the_link_to_a_gpu_and_whose_memory_it_is(made_profile):
    ceilings = Ceilings(matmul_flops=7e14, copy_bytes=4e12, host_to_device_bytes=5e10)
    found = dict(totals(made_profile(device="cuda", ceilings=ceilings)))
    assert found["compute rate"] == "700 TFLOP/s, the best of matrix products and 3x3 convolutions"
    assert found["copy rate"] == "4,000 GB/s, 50.0 GB/s from host to device"
    assert found["memory peak"] == "1.0 GB of the GPU's allocator"
    assert found["whole training"] == "2.08 min: 1,000 steps, no evaluations"
