import random
import re
import xml.etree.ElementTree as ET

import pytest

from tools.profiling.plots import bars, escape, loader_curve, process_curve, roofline, ticks, timeline
from tools.profiling.record import Ceilings, Point, Profile, Runs, Span, Stage
from tools.profiling.style import COLOURS

PLOTS = (timeline, bars, roofline, loader_curve, process_curve)
SVG = "{http://www.w3.org/2000/svg}"


def odd(made_profile, seed: int) -> Profile:
    """Over many orders of magnitude, with holes."""
    draw = random.Random(seed)

    def size() -> float:
        return draw.choice([0.0, 10.0 ** draw.uniform(-7, 4), 10.0 ** draw.uniform(-4, 0)])

    def some() -> tuple[float, ...]:
        return tuple(size() for _ in range(draw.choice([0, 1, 3])))

    def maybe() -> float | None:
        return draw.choice([None, 0.0, 10.0 ** draw.uniform(0, 16)])

    def curve() -> tuple[Point, ...]:
        return tuple(Point(count=draw.choice([1, 2, 3, 64]), images_per_s=some()) for _ in range(draw.randint(0, 4)))

    stages = tuple(
        Stage(name=name, lane=draw.choice(["loader", "device"]), seconds=some(), flops=maybe(), bytes=maybe())
        for name in draw.sample(sorted(COLOURS), draw.randint(0, 12))
    )
    spans = []
    for _ in range(draw.randint(0, 9)):
        start = size()
        lane, name = draw.choice(["loader", "device"]), draw.choice(["teacher", "wait", "<b>&"])
        spans.append(Span(lane=lane, name=name, start=start, end=start + size()))
    return made_profile(
        stages=stages,
        runs=Runs(real=some(), synthetic=some(), loader=some(), wait=some(), launch=some()),
        ceilings=Ceilings(matmul_flops=10.0 ** draw.uniform(6, 16), copy_bytes=10.0 ** draw.uniform(6, 13)),
        loader_scaling=curve(),
        scaling=curve(),
        timeline=tuple(spans),
    )


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("width", [306, 506])
def test_whatever_is_drawn_is_well_formed_and_inside_of_its_frame(made_profile, plot, width: int):
    drawn = [svg for seed in range(150) if (svg := plot(odd(made_profile, seed), width))]
    assert len(drawn) > 20
    for svg in drawn:
        root = ET.fromstring(svg)
        height = float(root.get("viewBox").split()[3])
        assert [child.tag for child in root][:2] == [f"{SVG}title", f"{SVG}desc"]
        assert all(root[number].text for number in (0, 1))
        for name, text in ((key, value) for one in root for key, value in one.attrib.items()):
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]
            limit = width if name in ("x", "cx", "x1", "x2", "width") else height
            if name in ("x", "cx", "x1", "x2", "y", "cy", "y1", "y2", "width", "height", "r"):
                assert "nan" not in text and "inf" not in text
                assert -0.06 <= numbers[0] <= limit + 1.06, (name, text)


@pytest.mark.parametrize("plot", PLOTS)
def test_without_data_there_is_no_plot(made_profile, plot):
    nothing = Runs(real=(), synthetic=(), loader=(), wait=())
    empty = made_profile(stages=(), runs=nothing, loader_scaling=(), scaling=(), timeline=())
    assert plot(empty, 500) is None


def test_a_curve_of_one_point_is_not_drawn(made_profile):
    assert process_curve(made_profile(), 500) is None
    twice = (Point(count=2, images_per_s=(5.0,)), Point(count=2, images_per_s=(6.0,)))
    assert loader_curve(made_profile(loader_scaling=twice), 500) is None


def test_bars_are_as_long_as_their_stages_take(made_profile):
    boxes = ET.fromstring(bars(made_profile(), 500)).iter(f"{SVG}rect")
    length = {box[0].text.split(":")[0]: float(box.get("width")) for box in boxes}
    assert length["backward"] / length["teacher"] == pytest.approx(2.5, rel=0.01)
    assert length["real step"] / length["synthetic step"] == pytest.approx(1.25, rel=0.01)
    assert length["queue"] == 1  # too short for a pixel, and still there


def test_spans_lie_where_they_happened(made_profile):
    boxes = [box for box in ET.fromstring(timeline(made_profile(), 1000)).iter(f"{SVG}rect") if len(box)]
    place = {box[0].text.split(":")[0]: (float(box.get("x")), float(box.get("width"))) for box in boxes}
    assert place["teacher"][0] == pytest.approx(place["views"][0] + place["views"][1], abs=0.2)
    assert place["backward"][1] / place["teacher"][1] == pytest.approx(2.5, rel=0.01)


def test_a_stage_at_the_machines_limit_lies_on_the_roof(made_profile):
    full = Stage(name="teacher", lane="device", seconds=(0.01,), flops=1e9, bytes=1e7)
    half = Stage(name="student", lane="device", seconds=(0.02,), flops=1e9, bytes=1e7)
    only_flops = Stage(name="backward", lane="device", seconds=(0.02,), flops=1e9)
    root = ET.fromstring(roofline(made_profile(stages=(full, half, only_flops)), 500))
    dots = {dot[0].text.split(":")[0]: float(dot.get("cy")) for dot in root.iter(f"{SVG}circle")}
    ridge = root.find(f"{SVG}polyline").get("points").split()[1]
    assert set(dots) == {"teacher", "student"}  # of the third, the bytes are not known
    assert dots["teacher"] == pytest.approx(float(ridge.split(",")[1]), abs=0.2)
    assert dots["student"] > dots["teacher"]  # further down


def covered(root: ET.Element) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Words of a plot that are not turned, with what they cover at most: left, top, right, bottom."""
    found = []
    for text in root.findall(f"{SVG}text"):
        x, y, length = float(text.get("x")), float(text.get("y")), 7.0 * len(text.text)
        left = x - {"start": 0, "middle": length / 2, "end": length}[text.get("text-anchor")]
        found.append((text.text, (left, y - 10, left + length, y + 3)))
    return found


@pytest.mark.parametrize("width", [306, 506])
@pytest.mark.parametrize("flops", [3e10, 1e11, 1e12])
@pytest.mark.parametrize("ratio", [1.0, 1.05, 3.0])
def test_names_on_the_roofline_cover_neither_each_other_nor_a_dot(made_profile, width: int, flops: float, ratio: float):
    """Also where the stages are as fast as the machine, or nearly alike."""
    names = ("teacher", "student", "loss", "backward")
    stages = tuple(
        Stage(name=name, lane="device", seconds=(1e9 / 3e10 * ratio**number,), flops=1e9, bytes=1e8 / ratio**number)
        for number, name in enumerate(names)
    )
    ceilings = Ceilings(matmul_flops=flops, copy_bytes=5e10)
    root = ET.fromstring(roofline(made_profile(stages=stages, ceilings=ceilings), width))
    words = [area for text, area in covered(root) if text in names or text.startswith("compute")]
    dots = [tuple(float(dot.get(key)) for key in ("cx", "cy", "r")) for dot in root.iter(f"{SVG}circle")]
    assert len(words) == 5 and len(dots) == 4
    full = words + [(x - r, y - r, x + r, y + r) for x, y, r in dots]
    for number, (left, top, right, bottom) in enumerate(words):
        for one in full[number + 1 :]:
            assert left >= one[2] or one[0] >= right or top >= one[3] or one[1] >= bottom


def test_processes_on_a_cpu_have_no_ideal(made_profile):
    many = tuple(Point(count=n, images_per_s=(800.0 * n,)) for n in (1, 2))
    assert 'class="ideal"' not in process_curve(made_profile(scaling=many), 500)
    assert 'class="ideal"' in process_curve(made_profile(scaling=many, device="cuda"), 500)


def test_the_loaders_curve_shows_what_one_ranks_step_takes(made_profile):
    assert "the step takes 1,000 images/s" in loader_curve(made_profile(), 500)
    assert "the step takes 1,000 images/s" in loader_curve(made_profile(world_size=8), 500)
    alone = Runs(real=(), synthetic=(), loader=(), wait=())
    assert "the step takes" not in loader_curve(made_profile(runs=alone), 500)


@pytest.mark.parametrize("high", [3e-7, 0.9, 1, 9.99, 10, 12345, 7e11])
def test_ticks_are_few_round_and_not_above_the_end(high: float):
    found = ticks(high, 5)
    assert 3 <= len(found) <= 7
    assert found[0] == 0 and found[-1] <= high * 1.00001
    assert f"{found[1]:.0e}"[0] in "125"


def test_text_is_escaped_and_its_control_characters_are_not_kept():
    assert escape('<a href="x">&\'\x1b\0') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;\ufffd\ufffd"
