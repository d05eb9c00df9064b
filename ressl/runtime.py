"""Where this process runs: the only file that imports accelerate. Device, precision, DDP, collectives, trackers."""

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType
from torch import Tensor, nn

from ressl.collectives import Collectives, alone
from ressl.config import RunConfig
from ressl.watchdog import START


class MachineError(RuntimeError):
    """The machine cannot do what was asked, through no fault of the config. The message says what is missing."""


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher (ours, or torchrun) made this process a rank of a run. Raises MachineError if only half."""
    there = [name for name in RANK_VARIABLES if name in os.environ]
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(there) and len(there) < len(RANK_VARIABLES):
        missing = ", ".join(sorted(set(RANK_VARIABLES) - set(there)))
        raise MachineError(f"the environment has {', '.join(there)} but not {missing}: unset them, or set all")
    return "RANK" in there


class Runtime:
    """The same code path serves one process and many, CPU and GPU."""

    def __init__(self, cfg: RunConfig) -> None:
        cpu = preferred_device(cfg).type == "cpu"
        if cpu and cfg.device == "cuda":
            raise MachineError(
                "run.device=cuda, but torch sees no GPU here: see `python launch.py doctor`, or give run.device=auto"
            )
        if cpu and cfg.precision == "fp16":
            raise MachineError("run.precision=fp16 needs a GPU: choose fp32 or bf16")
        if not launched():
            AcceleratorState._reset_state(True)  # else a second run in a process would get the device of the first
        # broadcast_buffers=False: batch norm's statistics belong to each rank, and the queues agree without a broadcast
        hook = DDPCommunicationHookType.BF16 if cfg.gradient_compression == "bf16" else DDPCommunicationHookType.NO
        self._ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook)
        # ranks wait for each other longer than the watchdog does, which knows more of why
        self._patience = timedelta(seconds=(START + 1) * cfg.hang_timeout) if cfg.hang_timeout else timedelta(days=365)
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=cfg.precision if cfg.precision in ("bf16", "fp16") else "no",
            kwargs_handlers=[self._ddp, *([InitProcessGroupKwargs(timeout=self._patience)] if launched() else [])],
            log_with="tensorboard" if cfg.tensorboard else None,
            project_dir=str(cfg.out_dir) if cfg.tensorboard else None,
        )
        device = self._accelerator.device  # of one process it has no number, and threads may have another default
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.local_ranks: int = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))  # on this machine
        self.is_main: bool = self._accelerator.is_main_process
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision, torch.float32)
        # the similarities of the loss are matrix products: they stay float32 in every precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        # torch refuses to tell one word for cuDNN, as compilers ask for it, where the two differ
        word = "ieee" if cfg.precision == "fp32" else "tf32"
        torch.backends.cudnn.conv.fp32_precision = word  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn.fp32_precision = word  # type: ignore[attr-defined]
        # under a launcher, accelerate can fall back to one process for each rank, which would train W separate models
        expected = int(os.environ["WORLD_SIZE"]) if launched() else 1
        if self.world_size != expected:
            raise MachineError(f"{expected} processes were started, but {self.world_size} found each other")
        if cpu:
            _keep_freed_memory()
        self.collectives = _collectives(self.world_size) if self.world_size > 1 else alone()

    def replicate(self, module: nn.Module, *, accumulate: int = 1) -> nn.Module:
        """Moves `module` to the device; calls run under autocast and, with several ranks, average the gradients, which
        travel once in `accumulate` backward passes."""
        # the order of the gradients is learned once, not each step; torch excludes that where some are not sent
        self._ddp.static_graph = accumulate == 1
        with warnings.catch_warnings():
            # its successor would also overwrite the buffers of each rank when it starts
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return self._accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[None]:
        """As it is around the calls of a replica, for who calls its module in pieces."""
        return self._accelerator.autocast()

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer, unscaling fp16 gradients and leaving out steps that overflowed."""
        return self._accelerator.prepare_optimizer(optimizer, device_placement=False)

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are scaled, as in fp16."""
        return self._accelerator.scaler is not None

    def scaler_state(self) -> dict[str, Any]:
        """Of the scale of the loss, empty where there is none."""
        return self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)

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

    def votes(self) -> "Votes":
        return Votes(self.world_size, self._patience)

    def wait_for_everyone(self) -> None:
        self._accelerator.wait_for_everyone()

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """Opens the trackers for `track` and closes them at the end, and with them the group of processes. After an
        error the process ends anyway, and must not wait for ranks that know nothing of it."""
        self._accelerator.init_trackers("tensorboard")
        yield
        self._accelerator.end_training()

    def track(self, step: int, values: dict[str, float]) -> None:
        self._accelerator.log(values, step=step)


class Votes:
    """What any rank wishes, known to all of them at the same step. Nobody waits: a wish is heard one step later, when
    the others have cast theirs too. Travels between the hosts; the device has no part in it."""

    def __init__(self, world_size: int, patience: timedelta) -> None:
        self.delay = 1 if world_size > 1 else 0  # steps until a wish is heard
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))
        self._posted: tuple[dist.Work, Tensor] | None = None

    def cast(self, *wishes: bool) -> tuple[bool, ...]:
        """On every rank after the same step: what any rank wished the last time. One process hears itself at once."""
        if self._group is None:
            return wishes
        heard = self.hear(len(wishes))
        votes = torch.tensor(wishes, dtype=torch.uint8)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._posted = work, votes
        return heard

    def hear(self, count: int) -> tuple[bool, ...]:
        """The outcome of the last `cast`, which then is dealt with; nothing where there is none."""
        if self._posted is None:
            return (False,) * count
        work, votes = self._posted
        self._posted = None
        work.wait()
        return tuple(bool(vote) for vote in votes.tolist())


def preferred_device(cfg: RunConfig) -> torch.device:
    """Where a run of this config computes on this machine."""
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


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


class _Mean(torch.autograd.Function):
    """The mean over the ranks. Every rank's loss depends on the mean that all see, so the gradient is a mean too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        total = x.clone()
        dist.all_reduce(total)
        return total / world_size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total)
        return total / ctx.world_size, None


def _collectives(world_size: int) -> Collectives:
    # torch 2.14 calls it by another name, and warns of the old one
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        all_gather(out, rows.detach().contiguous())
        return out

    def mean(x: Tensor) -> Tensor:
        return _Mean.apply(x, world_size)

    def exchange(rows: Tensor) -> Tensor:
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
