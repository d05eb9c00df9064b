"""Keeps the next frames in flight: a thread reads and decodes, a side stream copies to the GPU."""

import queue
import threading
from collections.abc import Generator, Iterator
from functools import cache

import torch

from pipelines.frames import Frames


def prefetch(stream: Iterator[Frames], device: torch.device, *, depth: int) -> Generator[Frames]:
    """The frames of `stream` on `device`, up to `depth` of them prepared ahead.

    The consumer's CUDA stream waits for the copy; the host does not. Errors of `stream` come out here. Leaving early
    closes `stream` and ends the thread.
    """
    ready: queue.Queue[tuple[Frames, torch.cuda.Event | None] | BaseException | None] = queue.Queue(maxsize=depth)
    left = threading.Event()
    thread = threading.Thread(target=_fill, args=(stream, device, ready, left), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            frames, copied = item
            if copied is not None:
                torch.cuda.current_stream(device).wait_event(copied)
                for tensor in frames.tensors():
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield frames
    finally:
        left.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            _take_all(ready)
            thread.join(timeout=0.05)


def _fill(stream: Iterator[Frames], device: torch.device, ready: queue.Queue, left: threading.Event) -> None:
    """The thread. Whatever happens, the last thing it puts is None or an error."""
    end: BaseException | None = None
    try:
        side = _side_stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(side):  # which does nothing for None; what the stream does on the GPU is in order too
            for frames in stream:
                ready.put((frames, None) if side is None else _copy(frames, device, side))
                if left.is_set():
                    break
    except BaseException as error:  # not swallowed: the consumer raises it
        end = error
    finally:
        try:
            close = getattr(stream, "close", None)  # a generator frees what it holds in the thread that runs it
            if close is not None:
                close()
        except BaseException as error:
            end = end or error
        finally:
            ready.put(end)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: memory that was freed on one stream is not used again on another, so a stream
    for each epoch would keep a few batches for ever."""
    return torch.cuda.Stream(device, priority=-1)  # a pool of its own: see ressl/graphs.py


def _copy(frames: Frames, device: torch.device, side: torch.cuda.Stream) -> tuple[Frames, torch.cuda.Event]:
    moved = frames if frames.pixels.is_cuda else frames.pin_memory().to(device, non_blocking=True)
    event = torch.cuda.Event()
    event.record(side)
    return moved, event


def _take_all(ready: queue.Queue) -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
