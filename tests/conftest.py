"""What all tests share."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Processes that share the cores: threads that wait for others to be given one would make a step take ten times as long.
# Read by OpenMP when torch is imported, and by every process that a test starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

# Without a GPU, Triton's kernels run in its interpreter. Triton asks once, when first imported, and much of what we
# import may do that: so this stands before any import of ours.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import launch  # noqa: E402
from tools.convert import convert  # noqa: E402

REPO = Path(__file__).resolve().parents[1]


LONG = ("test_crash_equality.py", "test_convert_kill.py", "test_interrupted.py", "test_full_disk.py", "test_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end no process works long after the others. Then those of tools/, which fork a
    lot: that takes the longer, the more a process has imported before."""
    tools = REPO / "tests" / "tools"
    items.sort(key=lambda item: (item.path.name not in LONG, item.path.parent != tools))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(autouse=True, scope="session")
def _signals_as_on_a_terminal() -> None:
    """Also under nohup and in the background, where some are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _skip_gpu_tests_without_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than they gain on work this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Triton's compiler needs no GPU, only someone to tell for which one: this driver does, and drops what it is to launch.
DRIVER = """
import types
import triton
from triton.backends.compiler import GPUTarget

compiled = []

class Driver:
    utils = types.SimpleNamespace(
        load_binary=lambda name, binary, shared, device: compiled.append((name, binary)) or (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)

triton.runtime.driver.set_active(Driver())
"""


@pytest.fixture
def compile_for_a_gpu(tmp_path: Path) -> Callable[[str], list[str]]:
    """`compile_for_a_gpu(script)`: runs the script where kernels are compiled for sm_90 and none is launched, and gives
    the words that it prints. It finds the name and binary of each in `compiled`."""

    def run(script: str) -> list[str]:
        environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER + script], cwd=REPO, env=os.environ | environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60))

TINY = """
data:
  source: {{name: resident, train: {data}/train.safetensors, val: {data}/val.safetensors}}
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
views:
  weak: {{size: 16}}
  strong:
    - {{size: 16, jitter_prob: 0.8, blur_prob: 0.5, blur_sigma: [0.1, 1.0]}}
encoder: {{name: resnet_small, width: 4}}
method: {{name: ressl, hidden_dim: 32, embed_dim: 16, queue_size: 40, teacher_momentum: 0.9}}
optim: {{name: sgd, epochs: 2, batch_size: 16, lr: 0.06, warmup_epochs: 0}}
evaluate: {{size: 16, batch_size: 30, knn: {{k: 5}}, linear: {{epochs: 3, crops: centre}}}}
run: {{out_dir: {out}, device: cpu, log_every: 1}}
"""


def make_image_folder(root: Path, *, images: int = 72, size: int = 16, seed: int = 0) -> Path:
    """`images` PNG files in four classes: flat colours with noise, so that a view's mean colour tells its class."""
    noise = np.random.default_rng(seed).integers(-40, 40, (images, size, size, 3))
    for number in range(images):
        colour = number % len(COLOURS)
        path = root / f"colour{colour}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise[number] + np.array(COLOURS[colour])).clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with folder/{train,val} of 72 and 40 PNG images, and train and val as .safetensors beside it."""
    root = tmp_path_factory.mktemp("tiny")
    make_image_folder(root / "folder" / "train", images=72)
    make_image_folder(root / "folder" / "val", images=40, seed=1)
    convert(str(root / "folder"), root, "tensor", console=Console(quiet=True))
    return root


@pytest.fixture(scope="session")
def write_tiny_config(tiny_data: Path) -> Callable[[Path], Path]:
    """Writes tiny.yaml into a directory: a config that trains in seconds on a CPU. Its run goes to `run` there."""

    def write(directory: Path) -> Path:
        path = directory / "tiny.yaml"
        path.write_text(TINY.format(data=tiny_data, out=directory / "run"))
        return path

    return write


@pytest.fixture
def tiny_config(write_tiny_config: Callable[[Path], Path], tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path)


@pytest.fixture
def ressl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `launch.py ARGUMENTS` in this process, from tmp_path; returns the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code = launch.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of a size in bytes, or gives the one there is another size."""
    place = tmp_path / "disk"

    def resize(size: int) -> Path:
        how = ["-o", f"size={size}"] if not place.is_mount() else ["-o", f"remount,size={size}"]
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", *how, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mount is not permitted here")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


class ForkedRanks:
    """Runs of several ranks that start in a fraction of a second (forked_ranks.py)."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def _ask(self, **words: object) -> list:
        assert self.server.stdin and self.server.stdout
        print(json.dumps(words), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, config: Path, *overrides: str, log: Path, ranks: int = 2, **more: object) -> list[int]:
        """The process ids of the ranks. `more`: see forked_ranks.py."""
        given = {"config": str(config), "overrides": overrides, "ranks": ranks, "log": str(log), **more}
        return self._ask(start=given)

    def wait(self, pids: list[int], seconds: float = 120) -> list[int | None]:
        """Their exit codes; None for one that had to be killed."""
        return self._ask(wait=pids, seconds=seconds)


@pytest.fixture(scope="session")
def forked_ranks() -> Iterator[ForkedRanks]:
    command = [sys.executable, str(REPO / "tests" / "forked_ranks.py")]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield ForkedRanks(server)
        assert server.stdin
        server.stdin.close()


# --- odd images ------------------------------------------------------------------------------------------------------


def odd_picture(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def encoded_image(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png_of(colour_type, bits, pixels, sides=(64, 48)):
    """`pixels` are the rows as they are stored. Pillow writes no 16-bit colours, and would need 400 MB for 400 Mpx."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *sides, bits, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def with_sides(jpeg, height, width=None):
    """The same JPEG under a header that lies."""
    at = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", jpeg).end()
    old = struct.unpack(">HH", jpeg[at : at + 4])
    return jpeg[:at] + struct.pack(">HH", height or old[0], width or old[1]) + jpeg[at + 4 :]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


ODD_IMAGES = {  # the image's height and width, or the reason against it
    "good.jpg": (48, 64), "png named.jpg": (48, 64), "bmp named.jpg": (48, 64), "webp.webp": (48, 64),
    "tiff.tif": (48, 64), "progressive.jpg": (48, 64), "grey.jpg": (48, 64), "cmyk.jpg": (48, 64),
    "rgba.png": (48, 64), "palette.png": (48, 64), "16-bit grey.png": (48, 64), "16-bit rgb.png": (48, 64),
    "rotated.jpg": (48, 64), "one pixel.jpg": (1, 1), "thin.jpg": (3, 500), "garbage behind.jpg": (48, 64),
    "sp ace \u00fcn\u00efc\u00f8d\u00e9 \u6f22\u5b57.jpg": (48, 64), "other pixels.jpg": (48, 64),
    "broken.jpg": "broken data stream", "half.jpg": "truncated", "tail.jpg": "truncated",
    "head.jpg": "cannot be decoded", "no image.jpg": "cannot be decoded", "empty.jpg": "empty file",
    "gif named.jpg": "a GIF", "text.jpg": "not an image", "html.jpg": "not an image", "random.jpg": "not an image",
    "20000x20000.png": "20000 x 20000 is 400 Mpx, over the limit of 89 Mpx",
    "65500x65500.jpg": "65500 x 65500 is 4290 Mpx, over the limit", "doubled.jpg": "its data end before its pixels do",
    "unreadable.jpg": "permission denied", "directory.jpg": "directory", "dangling.jpg": "dangling link",
    "fifo.jpg": "FIFO",
}  # fmt: skip


def write_odd_files(root):
    image = Image.fromarray(odd_picture())
    turned = Image.Exif()
    turned[0x0112] = 6
    good, draw = encoded_image(image), np.random.default_rng(1)
    table, huffman, scan = (good.find(b"\xff" + marker) for marker in (b"\xdb", b"\xc4", b"\xda"))
    files = {
        "good.jpg": good, "sp ace \u00fcn\u00efc\u00f8d\u00e9 \u6f22\u5b57.jpg": good, "unreadable.jpg": good,
        "half.jpg": good[: (scan + len(good)) // 2], "tail.jpg": good[:-10], "head.jpg": good[:100], "empty.jpg": b"",
        "no image.jpg": b"\xff\xd8\xff\xd9", "garbage behind.jpg": good + draw.bytes(4096),
        "other pixels.jpg": flipped(good, table + 5), "broken.jpg": flipped(good, huffman + 5),
        "png named.jpg": encoded_image(image, "PNG"), "bmp named.jpg": encoded_image(image, "BMP"),
        "gif named.jpg": encoded_image(image, "GIF"), "webp.webp": encoded_image(image, "WEBP"),
        "tiff.tif": encoded_image(image, "TIFF"),
        "progressive.jpg": encoded_image(image, progressive=True), "grey.jpg": encoded_image(image.convert("L")),
        "cmyk.jpg": encoded_image(image.convert("CMYK")), "rgba.png": encoded_image(image.convert("RGBA"), "PNG"),
        "palette.png": encoded_image(image.convert("P"), "PNG"),
        "16-bit grey.png": png_of(0, 16, bytes(48 * (1 + 128))),
        "16-bit rgb.png": png_of(2, 16, bytes(48 * (1 + 384))), "rotated.jpg": encoded_image(image, exif=turned),
        "one pixel.jpg": encoded_image(Image.new("RGB", (1, 1))), "thin.jpg": encoded_image(image.resize((500, 3))),
        "20000x20000.png": png_of(0, 1, bytes(20_000 * 2501), sides=(20_000, 20_000)),
        "65500x65500.jpg": with_sides(good, 65500, 65500), "doubled.jpg": with_sides(good, 96),
        "text.jpg": b"this is not an image\n" * 50, "html.jpg": b"<html><body>404 not found</body></html>",
        "random.jpg": draw.bytes(5000),
    }  # fmt: skip
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "unreadable.jpg").chmod(0)
    (root / "directory.jpg").mkdir()
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    os.mkfifo(root / "fifo.jpg")


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int] | str]]:
    """A directory with a file of every kind that is odd or bad, and for each its height and width, or the reason
    against it. Root can read all of them: `unreadable.jpg` is refused to others only."""
    root = tmp_path_factory.mktemp("odd")
    write_odd_files(root)
    return root, ODD_IMAGES
