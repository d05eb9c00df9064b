import shlex
from pathlib import Path

import pytest

from ressl.config import Config
from ressl.config_file import load_config
from tools.profiling.record import Binding, Ceilings, Measured, Point, Runs, Stage, StageName, Verdict
from tools.profiling.verdict import judge

MS: dict[StageName, float] = {
    "views": 5, "teacher": 20, "student": 30, "loss": 4, "backward": 50, "optimizer": 2, "ema": 1, "queue": 1,
}  # fmt: skip
FOLDER = "data.source={name: folder, train: images/of mine, val: images/val}"
FFCV = "data.source={name: ffcv, train: train.beton}"
DALI = "data.source={name: dali, train: images}"


def measured(
    stages: dict[StageName, float], *, loader: float = 1, wait: float = 0, synthetic: float = 0, real: float = 0, **rest
) -> Measured:
    """From milliseconds. Without `synthetic` it is the sum of its parts; without `real`, that and the wait."""
    synthetic = synthetic or sum(ms for name, ms in stages.items() if name not in ("read", "decode", "copy"))
    real = real or synthetic + wait
    runs = Runs(
        real=(real / 1000,) * 3,
        synthetic=(synthetic / 1000,) * 3,
        loader=(loader / 1000,) * 3,
        wait=(wait / 1000,) * 3,
        busy=rest.pop("busy", None),
    )
    known = {
        "device": "cpu", "world_size": 1, "images": 64, "cores": 8, "warm_up": 1, "memory_peak": 1, "timeline": (),
        "loader_scaling": (), "total_steps": 10, "side": 500, "set_bytes": 1e15, "free_bytes": 1e10, "speedups": {},
        "notes": (), "ceilings": Ceilings(matmul_flops=1e12, copy_bytes=1e10),
    }  # fmt: skip
    parts = tuple(
        Stage(name=name, lane="loader" if name in ("read", "decode", "copy") else "device", seconds=(ms / 1000,) * 3)
        for name, ms in stages.items()
    )
    return Measured(stages=parts, runs=runs, **{**known, **rest})


@pytest.fixture
def config(tiny_config: Path):
    def load(*overrides: str) -> Config:
        return load_config(tiny_config, overrides)

    return load


@pytest.mark.parametrize(
    ("expected", "stages", "rest"),
    [
        ("step", MS, {}),
        ("step", MS, {"wait": 4, "loader": 200}),  # an average loader that is slow would make it wait
        ("decode", MS | {"read": 1, "decode": 50}, {"wait": 30, "loader": 60}),  # not at every step
        ("decode", MS | {"read": 1, "decode": 100}, {"wait": 2, "loader": 100, "real": 250}),  # takes the step's cores
        ("decode", MS | {"views": 60, "decode": 100}, {"loader": 100, "real": 250}),
        ("decode", MS | {"read": 10, "decode": 300}, {"wait": 190, "loader": 300}),
        ("read", MS | {"read": 290, "decode": 300}, {"wait": 190, "loader": 300}),
        ("copy", MS | {"read": 10, "decode": 100, "copy": 300}, {"wait": 190, "loader": 300, "device": "cuda"}),
        ("views", MS | {"views": 51}, {}),
        ("all-reduce", MS | {"all-reduce": 60}, {"synthetic": 170, "world_size": 8}),
        ("all-reduce", MS | {"views": 51, "all-reduce": 80}, {"synthetic": 239, "world_size": 8}),
        ("views", MS | {"views": 51, "all-reduce": 40}, {"synthetic": 199, "world_size": 8}),
        ("step", MS | {"all-reduce": 60}, {"synthetic": 115, "world_size": 8}),  # it passes beside the backward pass
        ("host", MS, {"device": "cuda", "busy": 0.05}),
        ("step", MS, {"device": "cuda", "busy": 0.11}),
        ("views", MS | {"views": 51}, {"device": "cuda", "busy": 0.05}),
    ],
)
def test_it_names_what_binds(expected: Binding, stages, rest, config) -> None:
    verdict = judge(config(FOLDER), measured(stages, **rest))
    assert verdict.binding == expected and verdict.sentence.endswith(".")


def lines(verdict: Verdict) -> list[str]:
    return [advice.line for advice in verdict.advice]


def test_slow_decoding_is_advised_against_with_what_was_measured(config) -> None:
    curve = (Point(count=1, images_per_s=(200, 210, 190)), Point(count=8, images_per_s=(1500, 1600, 1400)))
    slow = measured(MS | {"read": 1, "decode": 320}, wait=200, loader=320, loader_scaling=curve, set_bytes=1e9)
    verdict = judge(config(FOLDER, "data.source.workers=1"), slow)
    assert "200 images/s" in verdict.sentence and "566 images/s" in verdict.sentence and "64 %" in verdict.sentence
    threads, convert, keep = verdict.advice
    assert threads.line == "data.source.workers=0" and "1,500 images/s instead of 200" in threads.why
    assert threads.images_per_s == pytest.approx(64 / 0.113)  # the step alone binds next, below the 1,500 of 8 threads
    assert convert.line.startswith("python launch.py convert 'images/of mine' ") and "changes the images" in convert.why
    assert keep.line.startswith("'data.source={name: resident, ") and "images/val" in keep.line


def test_what_is_set_already_is_not_advised(config) -> None:
    curve = (Point(count=1, images_per_s=(200,)), Point(count=8, images_per_s=(2000,)))
    slow = measured(MS | {"read": 1, "decode": 320}, wait=200, loader=320, loader_scaling=curve)
    assert "data.source.workers=0" not in lines(judge(config(FOLDER), slow))
    gpu = {"device": "cuda", "speedups": {}}
    found = lines(judge(config("run.precision=bf16", "run.compile=true"), measured(MS, **gpu)))
    assert found == []
    assert lines(judge(config(), measured(MS, **gpu))) == ["run.precision=bf16", "run.compile=true"]


def test_what_a_cpu_cannot_do_is_not_advised_there(config) -> None:
    slow_views = MS | {"views": 400}
    on_gpu = judge(config("views.impl=torch"), measured(slow_views, device="cuda"))
    on_cpu = judge(config("views.impl=torch"), measured(slow_views, device="cpu"))
    assert "views.impl=triton" in lines(on_gpu) and "views.impl=triton" not in lines(on_cpu)
    assert lines(judge(config(), measured(MS))) == []


def test_another_precision_is_advised_only_where_it_was_faster(config) -> None:
    line = "run.precision=bf16"
    (advice,) = judge(config(), measured(MS, speedups={line: (2.0, 1.5, 2.5)})).advice
    assert advice.line == line and advice.images_per_s == pytest.approx(2 * 64 / 0.113)
    assert "2.00 times as fast (1.50 to 2.50 in 3 rounds)" in advice.why
    assert judge(config(), measured(MS, speedups={line: (0.9,)})).advice == ()


def test_what_the_step_saves_is_taken_from_the_step_with_the_data(config) -> None:
    """Which is 120 ms long here, and 113 without its data."""
    faster = measured(MS, real=120, speedups={"run.precision=bf16": (1.13,)})
    (advice,) = judge(config(), faster).advice
    assert advice.images_per_s == pytest.approx(64 / (0.120 - 0.013))


def test_what_would_bring_next_to_nothing_is_not_advised(config) -> None:
    found = measured(MS, loader=112, speedups={"run.precision=bf16": (2.0,)})  # the loader is hardly faster
    assert judge(config(FOLDER), found).advice == ()


def test_a_loader_that_sets_the_pace_bounds_what_a_faster_step_brings(config) -> None:
    (advice,) = judge(config(), measured(MS, loader=100, speedups={"run.precision=bf16": (2.0,)})).advice
    assert advice.images_per_s == pytest.approx(64 / 0.1)


def test_on_a_cpu_a_loader_that_takes_cores_from_the_step_is_told(config) -> None:
    found = judge(config(FOLDER), measured(MS | {"decode": 80}, real=190, wait=20, loader=80, set_bytes=1e9))
    assert found.binding == "decode" and "takes the step's cores" in found.sentence
    assert [advice.images_per_s for advice in found.advice] == [pytest.approx(64 / 0.113)] * 2
    assert lines(found)[0].startswith("python launch.py convert") and "name: resident" in lines(found)[1]


def test_a_loader_that_takes_next_to_nothing_is_not_blamed_for_a_slow_run(config) -> None:
    found = judge(config("data.source={name: synthetic}"), measured(MS | {"decode": 1}, loader=1, real=150))
    assert found.binding == "step" and found.sentence.endswith("loading takes next to nothing: measure once more.")


def test_a_loader_that_is_fast_enough_on_average_but_not_always_is_told_whatever_may_be_prepared_ahead(config) -> None:
    irregular = measured(MS | {"decode": 50}, wait=40, loader=60, device="cuda")
    for prefetch, advised in ((4, True), (8, False), (16, False)):
        found = judge(config(FFCV, f"data.prefetch={prefetch}"), irregular)
        assert found.binding == "decode" and "not at every step" in found.sentence
        assert ("data.prefetch=8" in lines(found)) == advised


def test_images_that_lie_in_memory_are_gathered_and_not_decoded(config) -> None:
    slow = measured(MS | {"decode": 300}, wait=190, loader=300, device="cuda", side=500, set_bytes=1e9)
    for source, first in (("memory: host", "data.source.memory=device"), ("pixels: yuv420", "data.source.pixels=rgb")):
        found = judge(config(f"data.source={{name: resident, train: images, {source}}}"), slow)
        assert found.sentence.startswith("Gathering images from memory binds") and lines(found)[0] == first
        assert "data.source.max_side=32" in lines(found)
    assert judge(config("data.source={name: synthetic}"), slow).sentence.startswith("Gathering")


def test_what_a_resident_set_is_made_of_stays_as_it_is(config) -> None:
    slow = measured(MS | {"decode": 300}, wait=190, loader=300, set_bytes=1e9, side=160)
    source = "data.source={name: folder, train: images, workers: 3, max_side: 160}"
    convert, keep = lines(judge(config(source), slow))
    assert keep == "'data.source={name: resident, train: \"images\", max_side: 160, workers: 3}'"
    assert convert == "python launch.py convert images DIRECTORY --to ffcv --max-side 160"


def test_small_images_are_not_made_smaller(config) -> None:
    slow = measured(MS | {"decode": 300}, wait=190, loader=300, side=64)
    assert judge(config(FFCV), slow).advice == ()
    (convert,) = judge(config("data.source={name: folder, train: images, max_side: null}"), slow).advice
    assert convert.line.endswith("--to ffcv") and "changes" not in convert.why
    views = "views={weak: {size: 224}, strong: [{size: 224}]}"
    slow = measured(MS | {"decode": 300}, wait=190, loader=300, side=500)
    assert lines(judge(config(FFCV, views), slow)) == [
        "python launch.py convert IMAGES DIRECTORY --to ffcv --max-side 448"
    ]


def test_another_loss_is_advised_only_where_it_would_be_another(config) -> None:
    slow = MS | {"loss": 60}
    assert lines(judge(config("method.loss_impl=torch"), measured(slow))) == []  # as auto takes for a queue this small
    (line,) = lines(judge(config("method.loss_impl=chunked"), measured(slow)))
    assert line == "method.loss_impl=auto"


def test_where_launching_binds_no_other_arithmetic_is_advised(config) -> None:
    bf16 = {"run.precision=bf16": (2.0,)}
    found = judge(config(), measured(MS, device="cuda", busy=0.02, speedups=bf16))
    assert found.binding == "host" and lines(found) == ["run.cuda_graphs=true", "run.compile=true"]


def test_neighbours_are_read_together_only_in_a_file_that_is_made_for_it(config) -> None:
    slow = measured(MS | {"read": 280, "decode": 300}, wait=190, loader=300)
    (mixed,) = judge(config(FFCV), slow).advice
    assert mixed.line.endswith("--to ffcv --shuffle") and "the order of the images is another" in mixed.why
    assert lines(judge(config(FFCV, "data.shuffle=blocks"), slow)) == ["data.source.cache=process"]


def test_threads_are_compared_with_threads(config) -> None:
    """The loader's own time holds its start, so that it is not held against a curve."""
    curve = (Point(count=1, images_per_s=(800,)), Point(count=8, images_per_s=(810,)))
    slow = measured(MS | {"decode": 320}, wait=200, loader=320, loader_scaling=curve)
    assert "data.source.workers=0" not in lines(judge(config(FOLDER, "data.source.workers=1"), slow))


ROOMY = {"set_bytes": 1e9, "side": 500}
CURVED = ROOMY | {"loader_scaling": (Point(count=1, images_per_s=(200,)), Point(count=8, images_per_s=(1500,)))}
CASES = [
    ([FOLDER, "data.source.workers=1"], MS | {"read": 1, "decode": 300}, {"wait": 190, "loader": 300, **CURVED}),
    ([FFCV], MS | {"read": 280, "decode": 300}, {"wait": 190, "loader": 300, **ROOMY}),
    ([FFCV, "data.shuffle=blocks"], MS | {"read": 280, "decode": 300}, {"wait": 190, "loader": 300, **ROOMY}),
    (
        ["data.source={name: resident, train: images, pixels: yuv420}"],
        MS | {"decode": 300},
        {"wait": 190, "loader": 300, "set_bytes": 1e10, "free_bytes": 1e11},
    ),
    ([FFCV], MS | {"read": 1, "decode": 300}, {"wait": 190, "loader": 300, "set_bytes": 1e10, "free_bytes": 1e11}),
    ([DALI], MS | {"read": 1, "decode": 300}, {"wait": 190, "loader": 300, "device": "cuda", **ROOMY}),
    (
        ["data.source={name: resident, train: images, memory: host}"],
        MS | {"decode": 1, "copy": 300},
        {"wait": 190, "loader": 300, "device": "cuda", **ROOMY},
    ),
    (["views.impl=torch", FOLDER], MS | {"views": 500}, {"device": "cuda"}),
    ([], MS | {"all-reduce": 60}, {"synthetic": 170, "world_size": 8}),
    ([], MS, {"device": "cuda", "busy": 0.02}),
    ([], MS, {"device": "cuda", "wait": 30, "loader": 60}),
    (["method.loss_impl=chunked"], MS | {"loss": 40}, {"device": "cuda"}),
]


@pytest.mark.parametrize(("overrides", "stages", "rest"), CASES)
def test_every_line_that_is_advised_can_be_typed_behind_the_config(
    overrides: list[str], stages, rest, config, tiny_config: Path
) -> None:
    before = config(*overrides)
    verdict = judge(before, measured(stages, **rest))
    assert verdict.advice
    for line in lines(verdict):
        words = shlex.split(line)
        if words[0] == "python":
            assert words[1:3] == ["launch.py", "convert"]
        else:
            assert load_config(tiny_config, [*overrides, *words]) != before


def test_every_piece_of_advice_was_looked_at_by_the_test_above(config) -> None:
    found = {
        line for overrides, stages, rest in CASES for line in lines(judge(config(*overrides), measured(stages, **rest)))
    }
    keys = {word.partition("=")[0] for line in found for word in shlex.split(line) if "=" in word}
    assert keys == {
        "data.source.cache", "data.source.pixels", "data.source.budget_gb", "data.source.workers",
        "data.source.hw_decoder_load", "data.source", "data.source.memory", "data.source.max_side", "data.prefetch",
        "views.impl", "run.gradient_compression", "run.cuda_graphs", "run.precision", "run.compile",
        "method.loss_impl", "method.queue_dtype",
    }  # fmt: skip
