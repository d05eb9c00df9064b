"""`convert` and `verify` as a person types them: what they print, and with which code they end."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launch
from tools.early import AT_ONCE

REPO = Path(__file__).resolve().parents[1]
Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def images(tiny_data: Path, tmp_path: Path) -> Path:
    """The folders train/ and val/, which a test may change."""
    return Path(shutil.copytree(tiny_data / "folder", tmp_path / "images"))


def test_convert_shows_what_it_reads_what_to_expect_and_what_came_of_it(ressl: Launch, images: Path) -> None:
    code, out, err = ressl("convert", "images", "out", "--to", "ffcv", "--mode", "jpg")
    assert (code, err) == (0, "")
    shown = ["source: image folder images, train from train/", "72 images, 4 classes", "expected, from 112 images"]
    shown += ["PSNR", "SSIM", "free there", "72/72", "train.beton", "python launch.py verify"]
    assert [text for text in shown if text not in out] == []


def test_verify_ends_with_0_where_all_is_whole_and_with_2_where_it_is_not(ressl: Launch, images: Path) -> None:
    for to in ("ffcv", "tensor", "webdataset"):
        assert ressl("convert", "images", to, "--to", to)[0] == 0
        code, out, err = ressl("verify", to, "--deep")
        assert (code, err) == (0, "")
        assert "problem" not in out and "not checked" not in out
    shard = images.parent / "webdataset" / "train" / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    code, out, err = ressl("verify", "webdataset")
    assert (code, err) == (2, "")
    assert "shard-00000.tar" in out and "colour0/000.png" in out and "CRC-32" in out


def test_a_source_that_was_moved_is_found_where_it_is_said_to_be(ressl: Launch, images: Path) -> None:
    assert ressl("convert", "images", "out", "--to", "tensor")[0] == 0
    images.rename(images.parent / "moved")
    code, out, _ = ressl("verify", "out", "--deep")
    assert code == 0
    assert "--source says where it is now" in out
    assert ressl("verify", "out", "--deep", "--source", "moved")[0] == 0
    (images.parent / "moved" / "train" / "colour1" / "001.png").write_bytes(b"another file")
    code, out, _ = ressl("verify", "out", "--deep", "--source", "moved")
    assert code == 2
    assert "colour1/001.png" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "", "out", "--to", "ffcv"], "SRC is empty"),
        (["convert", "missing", "out", "--to", "ffcv"], "missing: no such directory or file"),
        (["convert", "~nosuchuser/x", "out", "--to", "ffcv"], "~nosuchuser/x: no such user"),
        (["convert", "images", "~nosuchuser/x", "--to", "ffcv"], "~nosuchuser/x: no such user"),
        (["convert", "images", "images/train", "--to", "ffcv"], "lies inside, images"),
        (["convert", "images", "images", "--to", "ffcv"], "images is, or lies inside, images"),
        (["convert", "images", "/", "--to", "ffcv"], "choose another place"),
        (
            ["convert", "images", "out", "--to", "tensor", "--mode", "jpg"],
            "--mode jpg: changes nothing with --to tensor",
        ),
        (["convert", "images", "out", "--to", "ffcv", "--labels", "none.csv"], "none.csv"),
        (["convert", "images", "out", "--to", "ffcv", "--quality", "0", "--jpg-share", "2"], "--quality 0"),
        (["verify", "missing"], "missing: no such file or directory"),
        (["verify", "images"], "holds neither manifest.json nor index.npz"),
        (["verify", "~nosuchuser"], "no such user"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(ressl: Launch, images: Path, arguments: list[str], message: str) -> None:
    code, _, err = ressl(*arguments)
    assert code == 2
    assert err.startswith("ressl: error: ") and message in err and err.count("\n") == 1


def test_what_was_interrupted_goes_on_with_the_same_command_only(ressl: Launch, images: Path) -> None:
    """Ctrl-C, as a terminal sends it: to the whole group of processes."""
    for i in range(200):
        os.link(images / "train" / "colour0" / "000.png", images / "train" / "colour0" / f"copy{i}.png")
    command = ["convert", "images", "out", "--to", "webdataset", "--split", "train"]
    journal = images.parent / "out" / "convert.part" / ".journal"
    ignoring = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import launch; "
    slow = "import tools.encode, tools.crew, time; before = tools.crew.encode; "
    slow += "tools.crew.encode = lambda *a: (time.sleep(0.01), before(*a))[1]; "
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring + slow + f"sys.argv = {['launch.py', *command]!r}; sys.exit(launch.main())"],
        cwd=images.parent, env={**os.environ, "PYTHONPATH": str(REPO)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == AT_ONCE, printed
    assert "the same command goes on after them" in printed and "Traceback" not in printed
    code, _, err = ressl(*command, "--max-side", "8")
    assert code == 2
    assert "--max-side was None, is 8" in err and "--restart" in err
    code, out, _ = ressl(*command)
    assert code == 0
    assert "goes on after" in out
    assert ressl("verify", "out", "--deep")[0] == 0


def test_a_terminal_that_lacks_letters_is_no_obstacle(
    ressl: Launch, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "train" / "colour0").rename(images / "train" / "f\u00e4rg")
    (images / "train" / "f\u00e4rg" / "000.png").write_text("text")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", file)
        patched.setattr(sys, "argv", ["launch.py", "convert", "train", "\u00fct", "--to", "ffcv", "--max-skipped", "1"])
        patched.setenv("COLUMNS", "200")
        patched.chdir(images)
        assert launch.main() == 0
    file.flush()
    printed = file.buffer.getvalue().decode("ascii")
    assert "skipped f?rg/000.png: not an image" in printed
    assert "wrote " in printed and "/?t; prove it whole with" in printed
    assert ressl("verify", images / "\u00fct")[0] == 0


def test_ctrl_c_amid_the_imports_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, REPO / "launch.py", "doctor", "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "numpy" not in maps.read_text() and "libtorch" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert printed == b""
    assert process.returncode == -signal.SIGINT
