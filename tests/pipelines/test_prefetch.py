"""The thread that keeps frames in flight: order, errors, and that it always ends."""

import itertools
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from pipelines.frames import Frames, pack
from pipelines.prefetch import prefetch

CPU = torch.device("cpu")


def frame(number: int) -> Frames:
    image = np.full((2, 3, 3), number % 256, np.uint8)
    return pack([image], np.array([[2, 3]]), np.array([number]), np.array([-1]))


def numbers(stream) -> list[int]:
    return [int(frames.index) for frames in stream]


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


def wait_until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threads()
    yield
    assert threads() == before


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_all_frames_come_out_in_order(depth):
    assert numbers(prefetch(map(frame, range(20)), CPU, depth=depth)) == list(range(20))


def test_an_empty_stream_ends_at_once():
    assert numbers(prefetch(iter([]), CPU, depth=2)) == []


def test_the_stream_runs_in_another_thread():
    seen = []

    def stream():
        seen.append(threading.current_thread())
        yield frame(0)

    numbers(prefetch(stream(), CPU, depth=1))
    assert seen != [threading.current_thread()]


@pytest.mark.parametrize("error", [ValueError("image 3 is damaged"), KeyboardInterrupt(), MemoryError()])
def test_an_error_comes_out_after_the_frames_before_it(error):
    def stream():
        yield frame(0)
        yield frame(1)
        raise error

    got = []
    with pytest.raises(type(error)) as raised:
        for frames in prefetch(stream(), CPU, depth=2):
            got.append(int(frames.index))
    assert raised.value is error
    assert got == [0, 1]


def test_the_number_in_flight_is_bounded():
    started = []

    def stream():
        for number in itertools.count():
            started.append(number)
            yield frame(number)

    with closing(prefetch(stream(), CPU, depth=3)) as frames:
        next(frames)
        # the first is out, three wait in the queue, one more is in the thread's hand
        assert wait_until(lambda: len(started) == 5)
        time.sleep(0.1)
        assert len(started) == 5


def test_frames_are_made_ahead_of_the_consumer():
    second = threading.Event()

    def stream():
        yield frame(0)
        second.set()
        yield frame(1)

    with closing(prefetch(stream(), CPU, depth=1)) as frames:
        next(frames)
        assert second.wait(5)


def test_an_endless_stream_can_be_left_while_the_thread_waits_for_room():
    closed = threading.Event()

    def stream():
        try:
            for number in itertools.count():
                yield frame(number)
        finally:
            closed.set()

    before, held = threads(), stream()  # held here, so that only the thread can close it
    frames = prefetch(held, CPU, depth=2)
    next(frames)
    (thread,) = threads() - before
    time.sleep(0.05)  # by now the queue is full and the thread waits
    frames.close()
    assert closed.is_set()
    assert not thread.is_alive()


def test_a_slow_stream_can_be_left_while_it_works():
    def stream():
        for number in itertools.count():
            yield frame(number)
            time.sleep(0.2)

    frames = prefetch(stream(), CPU, depth=1)
    next(frames)
    frames.close()
    assert not any(thread.is_alive() for thread in threads())


def test_leaving_a_loop_by_break_ends_the_thread():
    before = threads()
    for frames in prefetch(map(frame, itertools.count()), CPU, depth=2):
        if int(frames.index) == 3:
            break
    assert wait_until(lambda: threads() == before)


def test_an_error_of_the_consumer_ends_the_thread():
    before = threads()
    with (
        pytest.raises(ZeroDivisionError),
        closing(prefetch(map(frame, itertools.count()), CPU, depth=2)) as stream,
    ):
        for frames in stream:
            1 // (int(frames.index) - 2)
    assert threads() == before


def test_leaving_at_the_moment_of_an_error_does_not_hang():
    def stream():
        yield frame(0)
        raise ValueError

    for _ in range(20):
        frames = prefetch(stream(), CPU, depth=1)
        next(frames)
        frames.close()


def test_a_stream_that_was_never_asked_starts_no_thread():
    before = threads()
    prefetch(map(frame, range(3)), CPU, depth=2).close()
    assert threads() == before


@pytest.mark.gpu
def test_frames_that_lie_on_the_gpu_already_pass_as_they_are():
    device = torch.device("cuda")
    moved = [frame(number).to(device) for number in range(3)]
    for before, after in zip(moved, prefetch(iter(moved), device, depth=2), strict=True):
        assert after.pixels.data_ptr() == before.pixels.data_ptr()


@pytest.mark.gpu
def test_frames_of_the_host_are_copied_to_the_gpu_whole():
    device = torch.device("cuda")
    for number, frames in enumerate(prefetch(map(frame, range(50)), device, depth=2)):
        assert frames.pixels.is_cuda
        assert frames.index.tolist() == [number]
        assert frames.pixels[:18].tolist() == [number] * 18


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_be_used_is_an_error_and_no_hang():
    with pytest.raises((RuntimeError, AssertionError)):
        next(prefetch(iter([frame(0)]), torch.device("cuda"), depth=1))


def test_an_error_while_closing_comes_out_and_does_not_hang():
    class Stream:
        def __iter__(self):
            return iter([frame(0)])

        def close(self):
            raise OSError("closing")

    with pytest.raises(OSError, match="closing"):
        list(prefetch(Stream(), CPU, depth=1))


LARGE = 64 << 20  # bytes


def large_frame(pixels: torch.Tensor) -> Frames:
    one = torch.zeros(1, dtype=torch.int64)
    size = torch.ones(1, 2, dtype=torch.int32)
    return Frames(pixels, one, size, size[:, 0], size, one, one, (1, 1))


@pytest.mark.gpu
def test_the_consumer_waits_for_what_the_stream_does_on_the_gpu():
    device = torch.device("cuda")

    def stream():
        for number in range(4):
            torch.cuda._sleep(10**8)  # of this stream: some tens of milliseconds
            yield large_frame(torch.full((LARGE,), number, dtype=torch.uint8, device=device))

    for number, frames in enumerate(prefetch(stream(), device, depth=2)):
        assert (frames.pixels.clone() == number).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_memory_is_not_used_again_before_a_slow_consumer_has_read_it(pinned):
    device = torch.device("cuda")

    def stream():
        for number in range(20):
            pixels = torch.empty(LARGE, dtype=torch.uint8, pin_memory=pinned)
            yield large_frame(pixels.fill_(number))

    sums = []
    for frames in prefetch(stream(), device, depth=2):
        torch.cuda._sleep(10**8)
        sums.append((frames.pixels[::4096].long().sum(), frames.pixels[-1].clone()))
        del frames
    for number, (total, last) in enumerate(sums):
        assert (int(total), int(last)) == (number * LARGE // 4096, number)


@pytest.mark.gpu
def test_memory_of_the_gpu_stays_as_it_is_over_many_epochs():
    device = torch.device("cuda")

    def epoch() -> None:
        pixels = torch.zeros(LARGE, dtype=torch.uint8)
        for frames in prefetch((large_frame(pixels) for _ in range(6)), device, depth=2):
            frames.pixels.sum()

    for _ in range(3):
        epoch()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(10):
        epoch()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= before + LARGE
