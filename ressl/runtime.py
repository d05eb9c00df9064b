"""Where this process runs: the only file that imports accelerate. Device, precision, DDP, collectives, trackers."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ressl.collectives import Collectives, alone
from ressl.config import RunConfig


class MachineError(RuntimeError):
    """The machine cannot do what was asked, through no fault of the config. The message says what is missing."""


class Runtime:
    """The same code path serves one process and many, CPU and GPU."""

    def __init__(self, cfg: RunConfig, *, expected_world_size: int = 1) -> None:
        cpu = cfg.device == "cpu" or not torch.cuda.is_available()
        if cpu and cfg.device == "cuda":
            raise MachineError("run.device=cuda, but torch sees no GPU here: see `python launch.py doctor`")
        if cpu and cfg.precision == "fp16":
            raise MachineError("run.precision=fp16 needs a GPU: choose fp32 or bf16")
        # broadcast_buffers=False: batch norm's statistics belong to each rank, and the queues agree without a broadcast
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if cfg.precision == "fp32" else cfg.precision,
            kwargs_handlers=[ddp],
            log_with="tensorboard" if cfg.tensorboard else None,
            project_dir=str(cfg.out_dir) if cfg.tensorboard else None,
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
        # under a launcher, accelerate can fall back to one process for each rank, which would train W separate models
        if self.world_size != expected_world_size:
            raise MachineError(f"{expected_world_size} processes were started, but {self.world_size} found each other")
        if cpu:
            _keep_freed_memory()
        self.collectives = _collectives(self.world_size) if self.world_size > 1 else alone()

    def replicate(self, module: nn.Module) -> nn.Module:
        """Moves `module` to the device; calls run under autocast and, with several ranks, average the gradients."""
        return self._accelerator.prepare_model(module)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer, unscaling fp16 gradients and leaving out steps that overflowed."""
        return self._accelerator.prepare_optimizer(optimizer, device_placement=False)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def micro_step(self, replica: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients travel only with the last one of a step."""
        return nullcontext() if last else self._accelerator.no_sync(replica)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n, ...) of each rank, n differing -> all of them in rank order, on every rank."""
        if self.world_size == 1:
            return rows
        counts = self.collectives.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.collectives.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def wait_for_everyone(self) -> None:
        self._accelerator.wait_for_everyone()

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """Opens the trackers for `track` and closes them at the end."""
        self._accelerator.init_trackers("tensorboard")
        try:
            yield
        finally:
            self._accelerator.end_training()

    def track(self, step: int, values: dict[str, float]) -> None:
        self._accelerator.log(values, step=step)


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one.

    By default large tensors go back to the kernel when freed, and every step pays the page faults of all its
    activations anew: about a third of the time of a small network's step on two cores (docs/LOG.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of <malloc.h>
    mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 64 << 20)


def _collectives(world_size: int) -> Collectives:
    def gather(rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.detach().contiguous())
        return out

    def mean(x: Tensor) -> Tensor:
        return dist_nn.all_reduce(x) / world_size

    def exchange(rows: Tensor) -> Tensor:
        if len(rows) % world_size:
            raise MachineError(
                f"{len(rows)} images of a rank do not split over {world_size} ranks for batchnorm: shuffle"
            )
        memory_format = torch.channels_last if rows.ndim == 4 else torch.contiguous_format
        sent = rows.detach().contiguous(memory_format=memory_format)
        # rows lie one after another in either layout, so the exchange can see them as plain bytes in a row
        flat = sent.permute(0, 2, 3, 1).flatten(1) if rows.ndim == 4 else sent.flatten(1)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        if rows.ndim == 4:
            b, c, h, w = rows.shape
            return received.view(b, h, w, c).permute(0, 3, 1, 2)
        return received.view_as(rows)

    return Collectives(world_size=world_size, gather=gather, mean=mean, exchange=exchange)
