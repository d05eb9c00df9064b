"""The verbs as a person types them, and what they answer to a person's mistakes."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

import launch
from ressl.config_file import load_config
from ressl.run_dir import checkpoints_path, make_run_dir

REPO = Path(__file__).resolve().parents[1]
Launch = Callable[..., tuple[int, str, str]]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir) if "loss" in record]


# --- what works ------------------------------------------------------------------------------------------------------


def test_pretrain_then_evaluate(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    code, out, err = ressl("pretrain", tiny_config, "run.knn_every=1", "run.tensorboard=true")
    assert (code, err) == (0, "") and "epoch 2/2" in out and "after epoch 2: knn" in out
    assert len(losses(tmp_path / "run")) == 8 and records(tmp_path / "run")[-1]["knn"] > 0.9  # four flat colours
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))

    code, out, err = ressl("evaluate", tmp_path / "run", "--network", "teacher")
    assert (code, err) == (0, "") and "knn" in out and "linear, best epoch" in out
    found = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert (found["network"], found["step"], found["evaluate"]["knn"]["k"]) == ("teacher", 8, 5) and found["knn"] > 0.9


def test_the_same_seed_gives_equal_bits_and_another_does_not(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert ressl("pretrain", tiny_config, f"run.out_dir={tmp_path / name}", f"run.seed={seed}")[0] == 0
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert len(a) == 8 and a == b
    assert all(x != y for x, y in zip(a, c, strict=True))


def test_a_dry_run_shows_the_run_and_writes_nothing(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    code, out, err = ressl("pretrain", tiny_config, "--dry-run", "--processes", 2, "optim.lr=0.125")
    assert (code, err) == (0, "")
    for shown in ("lr: 0.125", "72 in ", "16 = 2 processes x 8 images", "8 = 2 epochs x 4; 8 images left out", "MiB"):
        assert shown in out
    assert not (tmp_path / "run").exists()


def test_views_draws_a_picture(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    code, out, _ = ressl("views", tiny_config, "--out", tmp_path / "deep" / "views.png", "--images", 3)
    assert code == 0 and "wrote" in out
    assert (tmp_path / "deep" / "views.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_train_from_the_command_line(tiny_config: Path, tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "pretrain", tiny_config, "--processes", 2, "run.knn_every=2")
    assert code == 0, err
    assert "epoch 2/2" in out and out.count("after epoch 2: knn") == 1
    assert len(losses(tmp_path / "run")) == 8


def test_a_failure_of_two_processes_is_told_once(tiny_config: Path, tmp_path: Path) -> None:
    code, _, err = command(tmp_path, "pretrain", tiny_config, "--processes", 2, "optim.batch_size=15")
    assert code == 2
    assert err.count("ressl: error: optim.batch_size=15 does not split over 2 processes") == 1
    assert "Traceback" not in err


def test_an_image_that_one_rank_cannot_read_is_told_once(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data / "folder" / "train", tmp_path / "images")
    (tmp_path / "images" / "colour1" / "001.png").write_bytes(b"")
    source = f"data.source={{name: folder, train: {tmp_path / 'images'}}}"
    changes = [source, "data.on_corrupt=fail", "optim.batch_size=72"]
    code, _, err = command(tmp_path, "pretrain", tiny_config, "--processes", 2, *changes)
    assert code == 2 and "Traceback" not in err, err
    assert err.count("001.png: empty file") == 1


def test_a_dry_run_under_a_launcher_writes_nothing_either(
    ressl: Launch, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29999")
    assert ressl("pretrain", tiny_config, "--dry-run")[0] == 0
    assert not (tmp_path / "run").exists()


def test_convert_does_not_write_into_the_images(ressl: Launch, tiny_data: Path) -> None:
    folder = tiny_data / "folder" / "train"
    code, _, err = ressl("convert", folder, folder / "out", "--to", "tensor")
    assert code == 2 and "would be taken for a class of images" in err and not (folder / "out").exists()


def command(directory: Path, *arguments: object) -> tuple[int, str, str]:
    """`launch.py ARGUMENTS` in a process of its own, forked off so that this one's imports are there: the exit code,
    and what it and the processes that it starts have written to stdout and stderr, which are files in `directory`."""
    paths = directory / "stdout", directory / "stderr"
    pid = os.fork()
    if not pid:
        code = 99
        signal.alarm(240)  # rather than to wait for ever
        try:
            for number, path in enumerate(paths, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            sys.argv = [str(REPO / "launch.py"), *map(str, arguments)]
            os.environ["COLUMNS"] = "200"
            code = launch.main()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, *(path.read_text() for path in paths)


# --- what a person can get wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["optim.epocs=3"], 2, "optim.epocs: unknown key; did you mean 'epochs'?"),
        (["optim.epochs=many"], 2, 'optim.epochs: expected a valid integer, got "many"'),
        (["views.weak.crop_scale=[0, 1]"], 2, "views.weak.crop_scale: need 0 < low <= high <= 1"),
        (["data.source.train=nowhere.safetensors"], 2, "nowhere.safetensors: "),
        (["data.source={name: folder, train: nowhere}"], 2, "nowhere: no such directory"),
        (["data.source={name: folder, train: empty}"], 2, "empty: no images found"),
        (["data.source={name: folder, train: texts}"], 2, "texts: no images found"),
        (["data.source={name: ffcv, train: nowhere.beton}"], 2, "nowhere.beton: "),
        (["data.source={name: ffcv, train: text.beton}"], 2, "text.beton: "),
        (["optim.batch_size=100"], 2, "72 images are fewer than one batch of optim.batch_size=100"),
        (["encoder.batchnorm={name: split, groups: 5}"], 2, "16 images do not split into encoder.batchnorm.groups=5"),
        (["run.out_dir=text.beton"], 2, "run.out_dir=text.beton is a file"),
        (["run.out_dir=text.beton/run"], 2, "run.out_dir=text.beton/run cannot be made: "),
        (["run.out_dir=texts"], 2, "run.out_dir=texts is not empty and holds no run"),
        (["optim.lr=&a [*a]"], 2, "optim.lr: '&a [*a]' is not a YAML value"),
        (["data.mean={2020-01-01: 3}"], 2, "data.mean: expected a valid array"),
        (['run.out_dir="a\\0b"'], 2, "run.out_dir: expected a path without NUL bytes"),
        ([f"run.out_dir={'x' * 300}"], 2, "File name too long"),
        (["method.queue_size=10000000000000"], 2, "method.queue_size: expected less than or equal to"),
        (["optim.=3"], 2, "optim.=3: an override is written section.key=value"),
        (["optim.batch_size=1"], 2, "batch norm needs at least 2 images together"),
        (["--processes", "2", "run.device=cuda"], 2, "run.device=cuda contradicts --processes"),
        (["data.source={name: folder, train: nested, val: nowhere}", "--dry-run"], 2, "nowhere: no such directory"),
        (["run.device=cuda"], 4, "run.device=cuda, but torch sees no GPU here"),
        (["--gpus", "8", "run.device=auto"], 4, "--gpus 8, but torch sees 0 GPUs here"),
        (["--gpus", "1", "--processes", "2"], 2, "--gpus and --processes exclude each other"),
        (["--dry-run", "--processes", "200"], 2, "optim.batch_size=16 does not split over 200 processes"),
        (["--procceses", "2"], 2, "No such option"),
    ],
)
def test_a_mistake_ends_in_one_message(
    arguments: list[str], code: int, message: str, ressl: Launch, tiny_config: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    (tmp_path / "text.beton").write_text("no data set" * 10)
    for number in range(20):
        path = tmp_path / "nested" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    before = sorted(tmp_path.rglob("*"))
    found, out, err = ressl("pretrain", tiny_config, *arguments)
    assert (found, "Traceback" in err) == (code, False) and message in err, err
    left = {path.name for path in set(tmp_path.rglob("*")) - set(before)}
    assert left == set()


def test_more_processes_than_images_are_refused(ressl: Launch, tiny_config: Path) -> None:
    code, _, err = ressl("pretrain", tiny_config, "--dry-run", "--processes", 144, "optim.batch_size=144")
    assert code == 2 and "72 images are fewer than one batch of optim.batch_size=144 (144 processes x 1)" in err


def test_a_run_of_another_configuration_is_not_touched(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ways = ["run.log_every=3", "run.cuda_graphs=true", "method.loss_impl=chunked"]  # of computing the same
    code, _, err = ressl("pretrain", tiny_config, "optim.epochs=1", "optim.lr=0.01", *ways)
    assert code == 2 and "holds a run of another configuration" in err
    rows = [line.split() for line in err.splitlines()]
    assert ["there", "here"] in rows and ["optim.lr", "0.06", "0.01"] in rows
    assert not any(way.split("=")[0] in err for way in ways)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_encoder_is_refused(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    saved["encoder"]["width"] = 8
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    code, _, err = ressl("evaluate", tmp_path / "run")
    assert code == 3 and "made with another encoder or method than the config's: student.backbone." in err
    assert " there and " in err and " tensors differ)" in err and "size mismatch" not in err
    saved["encoder"] |= {"width": 4, "blocks": 2}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    code, _, err = ressl("evaluate", tmp_path / "run")
    assert code == 3 and " is not there (" in err


def test_evaluating_what_is_no_run_or_has_no_checkpoint(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    code, _, err = ressl("evaluate", tmp_path / "nowhere")
    assert code == 2 and "nowhere: no run here" in err
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    shutil.rmtree(checkpoints_path(tmp_path / "run"))
    code, _, err = ressl("evaluate", tmp_path / "run")
    assert code == 3 and "checkpoints: no checkpoint here" in err


def test_evaluating_without_labels_says_so(ressl: Launch, tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tiny_data / "folder" / "train").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    source = f"data.source={{name: folder, train: {flat}, val: {flat}}}"
    assert ressl("pretrain", tiny_config, source, "optim.epochs=1")[0] == 0
    code, _, err = ressl("evaluate", tmp_path / "run")
    assert code == 2 and "the images have no labels" in err


def test_a_run_that_never_started_does_not_block_its_directory(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(tiny_config.read_text())
    assert ressl("pretrain", tiny_config, "optim.epochs=1", "optim.lr=0.01")[0] == 0


def test_a_directory_in_use_is_refused(ressl: Launch, tiny_config: Path) -> None:
    with make_run_dir(load_config(tiny_config)):
        code, out, err = ressl("pretrain", tiny_config)
    assert code == 2 and f"run is in use by process {os.getpid()} on " in err and "decoding" not in out


def test_paths_with_brackets_come_out_as_they_are(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "a[/b]c [red]"
    code, shown, _ = ressl("pretrain", tiny_config, "optim.epochs=1", f"run.out_dir={out}")
    assert code == 0 and str(out) in shown
    code, shown, _ = ressl("evaluate", out, "--no-linear")
    assert code == 0 and "a[/b]c [red]" in shown


def test_half_a_launcher_in_the_environment_is_refused(
    ressl: Launch, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    code, _, err = ressl("pretrain", tiny_config)
    assert code == 4 and "the environment has RANK but not LOCAL_RANK" in err


def test_what_may_not_be_meant_is_said(ressl: Launch, tiny_config: Path) -> None:
    changes = ["method.teacher_temperature=0.2", "encoder.batchnorm={name: shuffle}", "optim.epochs=1"]
    code, out, _ = ressl("pretrain", tiny_config, *changes)
    assert code == 0 and "note: teacher_temperature 0.2 >= 0.1" in out and "nothing to shuffle on one process" in out


def test_an_evaluation_of_nothing_is_refused(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    code, _, err = ressl("evaluate", tmp_path / "run", "--no-knn", "--no-linear")
    assert code == 2 and "leave nothing to do" in err


def test_steps_that_are_not_finite_are_left_out_aloud_and_too_many_stop_the_run(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    code, out, _ = ressl("pretrain", tiny_config, "optim.lr=1e30", "optim.epochs=1", f"run.out_dir={tmp_path / 'a'}")
    assert code == 0 and "warning: left out by step 4, as not finite: 3 steps" in out
    code, _, err = ressl("pretrain", tiny_config, "optim.lr=1e30", "run.skip_limit=2")
    assert code == 5 and "ressl: error: the loss or the embeddings of step 4 were not finite; images " in err
    advice = "optim.lr=5e+29 --allow-change optim.lr"
    assert "Left out: it and 2 others" in err and f"Nothing was saved: begin again with {advice}" in err
    assert "Traceback" not in err
    code, _, err = ressl("pretrain", tiny_config, "run.skip_limit=2", *advice.split())  # which is not refused
    assert code == 5 and "of step 4 were not finite" in err


@pytest.mark.parametrize("on_corrupt", ["replace", "fail"])
def test_a_corrupt_file_is_replaced_aloud_or_fatal(
    on_corrupt: str, ressl: Launch, tiny_config: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for path in (tiny_data / "folder" / "train").rglob("*.png"):
        copy = folder / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / "colour1" / "001.png").write_bytes(b"<html>not found</html>")
    arguments = [f"data.source={{name: folder, train: {folder}}}", f"data.on_corrupt={on_corrupt}"]
    code, out, err = ressl("pretrain", tiny_config, *arguments, "optim.batch_size=72")
    if on_corrupt == "fail":
        assert code == 2 and "001.png: not an image" in err
    else:
        assert code == 0 and out.count("001.png: not an image") == 2  # once each epoch
        assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 2


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["quickstart", "convert", "verify", "views", "pretrain", "evaluate", "doctor"])
def test_every_verb_explains_itself(verb: str, ressl: Launch) -> None:
    code, out, _ = ressl(verb, "--help")
    assert code == 0 and "Usage:" in out and f" {verb} " in out and len(out.splitlines()) > 5


def test_a_profile_is_compared_with_itself_and_with_nothing_else(ressl: Launch, repo: Path, tmp_path: Path) -> None:
    kept = repo / "docs" / "results" / "profile-quickstart-cpu-2026-11-22.json"
    code, out, _ = ressl("profile", "--compare", kept, kept)
    assert code == 0 and "No step back" in out
    (tmp_path / "other.json").write_text("{}")
    code, _, err = ressl("profile", "--compare", kept, tmp_path / "other.json")
    assert code == 2 and "other.json: not a profile of `launch.py profile`" in err
    code, _, err = ressl("profile", "--compare", kept, tmp_path / "none.json")
    assert code == 2 and "none.json: No such file" in err


def test_a_profile_of_nothing_or_of_data_that_is_not_there_is_refused(ressl: Launch, tiny_config: Path) -> None:
    code, _, err = ressl("profile")
    assert code == 2 and "expected a CONFIG, or --compare A.json B.json" in err
    code, _, err = ressl("profile", tiny_config, "data.source.train=nowhere.safetensors")
    assert code == 2 and "nowhere.safetensors" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", 2], "--nodes 2 needs --gpus or --processes"),
        (["--nodes", 2, "--processes", 1], "needs --rendezvous HOST:PORT"),
        (["--nodes", 2, "--processes", 1, "--rendezvous", "here"], "expected HOST:PORT"),
        (["--nodes", 2, "--processes", 1, "--rendezvous", "here:1", "--node-rank", 2], "--node-rank 2"),
    ],
)
def test_several_machines_that_cannot_be_are_refused(
    options: list, message: str, ressl: Launch, tiny_config: Path
) -> None:
    code, _, err = ressl("pretrain", tiny_config, *options)
    assert code == 2 and message in err
