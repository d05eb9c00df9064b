"""Workers that die, fail or stand still are noticed at once, with the image, and none outlives the crew."""

import errno
import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.images import BadImage
from ressl.batch import DataError
from tools.crew import Crew, Encode, Encodings, Measure, Measured, News, WorkerDied, Write, Written
from tools.encode import Options
from tools.image_sets.image_set import ImageSet
from tools.rows import PLACE

RAW = Options("tensor")
SIDE = 8  # pixels; an image has 192 bytes


def image(i: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), i, np.uint8)


def image_set(read: Callable[[int], np.ndarray] = image, count: int = 40) -> ImageSet:
    return ImageSet(np.arange(count) % 3, ("a", "b", "c"), lambda i: f"a/{i}.png", read, lambda i: (192, i))


def special(number: int, does: Callable[[], object]) -> ImageSet:
    """Reading image `number` does something else."""

    def read(i: int) -> np.ndarray:
        if i == number:
            does()
        return image(i)

    return image_set(read)


def next_news(crew: Crew, seconds: float = 10) -> list[tuple[int, News]]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if news := crew.receive(timeout=0.1):
            return news
    raise AssertionError(f"no news in {seconds} s")


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- work ------------------------------------------------------------------------------------------------------------


def test_a_chunk_is_encoded_told_and_written_where_it_is_said(tmp_path):
    def read(i: int) -> np.ndarray:
        if i == 2:
            raise BadImage("empty file")
        return image(i)

    with Crew({"train": image_set(), "val": image_set(read)}, RAW, 2) as crew:
        crew.send(1, Encode("val", 7, [4, 2, 3]))
        ((worker, news),) = next_news(crew)
        assert (worker, news.split, news.chunk) == (1, "val", 7)
        assert news.rows["index"].tolist() == [4, 3]
        assert news.rows["label"].tolist() == [1, 0]
        assert news.rows["length"].tolist() == [192, 192]
        assert [(one.index, one.name, one.reason, one.stamp) for one in news.skipped] == [
            (2, "a/2.png", "empty file", (192, 2))
        ]
        files = {0: tmp_path / "zero", 5: tmp_path / "five"}
        crew.send(1, Write("val", 7, files, np.array([(5, 1000), (0, 3)], PLACE)))
        assert next_news(crew) == [(1, Written("val", 7))]
    assert (tmp_path / "five").read_bytes() == bytes(1000) + bytes([4]) * 192
    assert (tmp_path / "zero").read_bytes() == bytes(3) + bytes([3]) * 192


def test_chunks_are_held_until_their_places_come_in_whatever_order(tmp_path):
    with Crew({"train": image_set()}, RAW, 1) as crew:
        for chunk in range(3):
            crew.send(0, Encode("train", chunk, [10 * chunk]))
        told = [news.chunk for _ in range(3) for _, news in next_news(crew) if isinstance(news, Encodings)]
        for chunk in (2, 0, 1):
            crew.send(0, Write("train", chunk, {0: tmp_path / "out"}, np.array([(0, 192 * chunk)], PLACE)))
        done = [news.chunk for _ in range(3) for _, news in next_news(crew) if isinstance(news, Written)]
    assert (told, done) == ([0, 1, 2], [2, 0, 1])
    assert (tmp_path / "out").read_bytes() == b"".join(bytes([10 * chunk]) * 192 for chunk in range(3))


def test_images_that_are_measured_are_not_kept(tmp_path):
    with Crew({"train": image_set()}, RAW, 1) as crew:
        crew.send(0, Measure("train", [1, 2, 3]))
        ((_, news),) = next_news(crew)
        assert isinstance(news, Measured)
        assert [sample.stored for sample in news.samples] == [192] * 3
        assert crew.whereabouts() == ""


def test_the_first_image_of_a_worker_which_takes_longer_is_not_measured():
    began: list[int] = []

    def read(i: int) -> np.ndarray:
        if not began:  # in each worker
            began.append(i)
            time.sleep(0.3)
        return image(i)

    with Crew({"train": image_set(read)}, RAW, 2) as crew:
        for worker in (0, 1):
            crew.send(worker, Measure("train", [3, 4]))
            ((_, news),) = next_news(crew)
            assert max(sample.seconds for sample in news.samples) < 0.2


def test_a_worker_uses_one_thread_of_torch():
    def read(_: int) -> np.ndarray:
        return np.full((SIDE, SIDE, 3), torch.get_num_threads(), np.uint8)

    def digest(images: ImageSet) -> int:
        with Crew({"train": images}, RAW, 1) as crew:
            crew.send(0, Encode("train", 0, [1]))
            return int(next_news(crew)[0][1].rows["crc32"][0])

    assert digest(image_set(read)) == digest(image_set(lambda _: image(1)))


# --- death -----------------------------------------------------------------------------------------------------------


def crash() -> None:
    faulthandler.disable()  # it would print pages
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("death", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by SIGKILL \(out of memory\?\) at a/7\.png"),
        (crash, r"was killed by SIGSEGV at a/7\.png"),
        (lambda: os._exit(3), r"ended at a/7\.png"),
    ],
    ids=["killed", "crashed", "left"],
)
@pytest.mark.parametrize(
    "task",
    [Encode("train", 0, [5, 6, 7, 8]), Measure("train", [6, 7]), Measure("train", [7, 6])],
    ids=["encode", "measure", "measure first"],
)
def test_the_image_that_a_worker_died_at_is_named(death, how, task):
    with Crew({"val": image_set(), "train": special(7, death)}, RAW, 2) as crew:
        crew.send(1, task)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=f"worker 1 of the conversion {how}$"):
            next_news(crew)
        assert time.monotonic() - began < 5


def test_a_worker_that_died_between_two_images_names_none():
    with Crew({"train": image_set()}, RAW, 2) as crew:
        os.kill(crew.workers.processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"worker 0 of the conversion was killed by SIGKILL \(out of memory\?\)$"):
            next_news(crew)


def test_a_dead_worker_is_noticed_by_whoever_sends_to_it():
    with Crew({"train": image_set()}, RAW, 1) as crew:
        os.kill(crew.workers.processes[0].pid, signal.SIGKILL)
        crew.workers.processes[0].join()
        with pytest.raises(WorkerDied, match="worker 0 of the conversion was killed by SIGKILL"):
            crew.send(0, Encode("train", 0, [1]))


# --- failure ---------------------------------------------------------------------------------------------------------


def fail(error: BaseException) -> Callable[[], None]:
    def does() -> None:
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("x.zip: gone; get it again"), DataError, r"^x\.zip: gone; get it again$"),
        (OSError(errno.EIO, "Input/output error", "x.zip"), OSError, r"Input/output error: 'x\.zip'"),
        (MemoryError(), DataError, "not enough memory for the images in work; use fewer --workers"),
        (ZeroDivisionError("a bug"), RuntimeError, r"(?s)a worker failed:\nTraceback .* in read\n.*a bug"),
    ],
    ids=["of the data", "of the system", "of memory", "a bug"],
)
def test_what_a_worker_cannot_do_is_raised_where_the_crew_is(error, kind, message):
    with Crew({"train": special(7, fail(error))}, RAW, 2) as crew:
        crew.send(1, Encode("train", 0, [7]))
        with pytest.raises(kind, match=message):
            next_news(crew)


def test_why_a_worker_ended_is_told_to_whoever_sends_to_it():
    """And not only that it ended: it may have said why before anyone listened."""
    with Crew({"train": special(7, fail(DataError("the reason")))}, RAW, 1) as crew:
        crew.send(0, Encode("train", 0, [1]))
        crew.send(0, Encode("train", 1, [7]))
        crew.workers.processes[0].join(timeout=10)
        with pytest.raises(DataError, match="the reason"):
            crew.send(0, Encode("train", 2, [2]))


def test_a_full_disk_is_told_with_its_number(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        crew = Crew({"train": image_set()}, RAW, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with crew:
        crew.send(0, Encode("train", 0, [1, 2, 3]))
        next_news(crew)
        places = np.array([(0, 0), (0, 192), (0, 384)], PLACE)
        crew.send(0, Write("train", 0, {0: tmp_path / "out"}, places))
        with pytest.raises(OSError, match="File too large") as raised:
            next_news(crew)
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "out").stat().st_size == 500


# --- standing still, and the end -------------------------------------------------------------------------------------


def test_where_the_workers_are_is_known_and_all_end_with_the_crew():
    event = multiprocessing.get_context("fork").Event()
    with Crew({"val": image_set(), "train": special(7, event.wait)}, RAW, 3) as crew:
        for worker, indices in ((0, [1, 7]), (2, [7])):
            crew.send(worker, Encode("train", worker, indices))
        wait_until(lambda: crew.whereabouts() == "a/7.png, a/7.png")
        pids = [process.pid for process in crew.workers.processes]
        began = time.monotonic()
    assert time.monotonic() - began < 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ctrl_c_is_left_to_the_parent():
    event = multiprocessing.get_context("fork").Event()
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Crew({"train": special(7, event.wait)}, RAW, 2) as crew:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == masked
        crew.send(0, Encode("train", 0, [7]))
        wait_until(lambda: crew.whereabouts() == "a/7.png")
        for process in crew.workers.processes:
            os.kill(process.pid, signal.SIGINT)
        event.set()
        ((worker, news),) = next_news(crew)
        assert (worker, news.rows["index"].tolist()) == (0, [7])


def test_a_crew_that_cannot_be_made_whole_leaves_no_worker(monkeypatch):
    """As where the system has no process left."""
    forks = []
    real = os.fork

    def fork() -> int:
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        forks.append(real())
        return forks[-1]

    monkeypatch.setattr(os, "fork", fork)
    expected = "convert: worker 2 cannot be started: resource temporarily unavailable; use fewer --workers"
    with pytest.raises(WorkerDied, match=expected):
        Crew({"train": image_set()}, RAW, 3)
    assert len(forks) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in forks)


def test_a_worker_ends_with_its_parent_even_amid_an_image():
    event = multiprocessing.get_context("fork").Event()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    parent = os.fork()
    if not parent:
        try:
            crew = Crew({"train": special(7, event.wait)}, RAW, 1)
            crew.send(0, Encode("train", 0, [7]))
            wait_until(lambda: crew.whereabouts() == "a/7.png")
            theirs.send(crew.workers.processes[0].pid)
            time.sleep(60)
        finally:
            os._exit(1)
    assert ours.poll(10)
    worker = ours.recv()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    process = Path(f"/proc/{worker}")
    try:  # nobody may be there to take note of its end
        wait_until(lambda: not process.exists() or "State:\tZ" in (process / "status").read_text(), 1)
    finally:
        if process.exists():
            os.kill(worker, signal.SIGKILL)
