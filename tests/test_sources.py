"""A run from every source of images, as a person starts it: they train alike, on the same images in the same order."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import launch
from tools.convert import convert
from tools.processes import run_processes

Pretrain = Callable[..., tuple[int, str, str]]

SOURCES = {
    "folder": "{name: folder, train: DATA/png}",
    "ffcv": "{name: ffcv, train: DATA/ffcv/train.beton}",
    "dali": "{name: dali, train: DATA/png}",
    "dali shards": "{name: dali, train: DATA/webdataset/train}",
    "resident file": "{name: resident, train: DATA/tensor/train.safetensors}",
    "resident folder": "{name: resident, train: DATA/png}",
    "resident on the host": "{name: resident, train: DATA/ffcv/train.beton, memory: host}",
}


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    (root / "png").symlink_to(tiny_data / "folder" / "train")
    for to in ("ffcv", "webdataset", "tensor"):
        mode = {"mode": "raw"} if to == "ffcv" else {}
        convert(str(root / "png"), root / to, to, console=Console(file=io.StringIO()), **mode)
    return root


@pytest.fixture
def pretrain(
    data: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pretrain:
    def run(source: str, *overrides: str) -> tuple[int, str, str]:
        pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}.get(source.split()[1].strip(","), "torch"))
        chosen = f"data.source={source.replace('DATA', str(data))}"
        monkeypatch.setattr(sys, "argv", ["launch.py", "pretrain", str(tiny_config), chosen, *overrides])
        capsys.readouterr()
        code = launch.main()
        return code, *capsys.readouterr()

    return run


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_lossless_images_give_the_same_losses_from_every_source(pretrain, tmp_path, name):
    for where, source in (("ours", SOURCES[name]), ("folder", SOURCES["folder"])):
        code, _, err = pretrain(source, f"run.out_dir={tmp_path / where}")
        assert (code, err) == (0, ""), err
    assert len(losses(tmp_path / "ours")) == 8
    assert losses(tmp_path / "ours") == losses(tmp_path / "folder")


def test_noise_can_be_trained_on(pretrain, tmp_path):
    code, out, err = pretrain("{name: synthetic, images: 64, height: 20, width: 24, classes: 3}")
    assert (code, err) == (0, "") and "epoch 2/2" in out
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    "options",
    [
        ["data.shuffle=blocks", "data.block=8", "data.window=3"],
        ["views.strong=[{size: 16, randaugment: [2, 10]}]"],
        ["views.progressive={start: 0.5, until: 1, multiple: 4}"],
        ["views.impl=torch", "data.placement=none", "data.prefetch=4"],
    ],
    ids=str,
)
def test_options_of_data_and_views_train(pretrain, tmp_path, options):
    assert pretrain(SOURCES["folder"], f"run.out_dir={tmp_path / 'plain'}")[0] == 0
    code, _, err = pretrain(SOURCES["folder"], *options)
    assert (code, err) == (0, "")
    assert (losses(tmp_path / "run") == losses(tmp_path / "plain")) == (options[0] == "views.impl=torch")


def test_decoding_before_the_first_step_is_shown_and_replaced_images_are_recorded(pretrain, data, tmp_path):
    shutil.copytree(data / "png", tmp_path / "images")
    (tmp_path / "images" / "colour1" / "001.png").write_bytes(b"")
    code, out, _ = pretrain(f"{{name: resident, train: {tmp_path / 'images'}}}", "run.device=cpu")
    assert code == 0 and "decoding train" in out and "72/72" in out
    (record,) = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert "001.png: empty file; replaced by" in json.loads(record)["message"]


def test_what_does_not_fit_into_memory_is_refused_in_one_line_with_the_arithmetic(pretrain):
    code, _, err = pretrain("{name: resident, train: DATA/ffcv/train.beton, budget_gb: 0.00005}")
    assert code == 2 and err.count("\n") == 1
    assert "72 images x 768 bytes (RGB) = 55.3 KB, over data.source.budget_gb=5e-05" in err


def test_a_wrong_batch_is_refused_before_anything_is_decoded(pretrain):
    code, out, err = pretrain(SOURCES["resident folder"], "optim.batch_size=1000")
    assert code == 2 and "72 images are fewer than one batch" in err and "decoding" not in out


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        (
            "{name: resident, train: DATA/png, shards: 5}",
            [],
            r"shards=5 must be a multiple of the 1 processes",
        ),
        ("{name: resident, train: DATA/png, shards: 2}", ["--processes", "4"], "shards=2 must be a multiple of the 4"),
        ("{name: folder, train: DATA/png, val: DATA/other}", [], "other has 3 classes, .* 4; not in both: colour3"),
        ("{name: folder, train: DATA/png}", ["optim.batch_size=1000"], "72 images are fewer than one batch"),
        ("{name: folder, train: DATA/png}", ["views.impl=triton"], "views.impl=triton needs a GPU"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(pretrain, data, monkeypatch, source, overrides, said):
    if "impl" in str(overrides):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.delenv("TRITON_INTERPRET")
    if "other" in source and not (data / "other").exists():
        shutil.copytree(data / "png", data / "other")
        shutil.rmtree(data / "other" / "colour3")
    processes = "--processes" in overrides
    for dry in [["--dry-run"], *([[]] if not processes else [])]:
        code, _, err = pretrain(source, *overrides, *dry)
        assert code == 2 and re.search(said, err) and err.count("\n") == 1, err


def test_two_processes_hold_half_of_a_sharded_set_each_and_train_as_one_does(pretrain, data, tiny_config, tmp_path):
    source, batchnorm = "{name: resident, train: DATA/png, shards: 4}", "encoder.batchnorm={name: sync}"
    outs = [f"run.out_dir={tmp_path / name}" for name in "12"]
    assert pretrain(source, batchnorm, outs[0])[0] == 0
    chosen = f"data.source={source.replace('DATA', str(data))}"
    words = [str(launch.__file__), "pretrain", str(tiny_config), chosen, batchnorm, outs[1]]
    run_processes([*words, "--processes", "2"], 2)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 8
    assert all(abs(a - b) < 1e-4 for a, b in zip(one, two, strict=True))
