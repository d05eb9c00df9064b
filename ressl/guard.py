"""The guard: a step whose loss, embeddings or gradient are not finite changes nothing, and the host learns of it later.

Whether to leave a step out is decided on the device and known to all ranks alike, so the host never waits for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ressl.batchnorm import flat_statistics_
from ressl.collectives import Collectives


class NonFiniteRun(RuntimeError):
    """More steps were not finite than `run.skip_limit` allows. The message names the last of them and its images."""


class Guard:
    """Counts the steps that were left out, and remembers the last of them. All of it stays on the device.

    `rows` is the number G of images of a step over all ranks, `own` of them on this rank. What the forward pass
    changes, batch norm's running statistics, is kept before it by `keep` and put back after it by `put_back_`.
    """

    def __init__(self, device: torch.device, *, rows: int, own: int) -> None:
        self.statistics: Tensor | None = None  # (values,), of which those of the layers are views
        self.kept: Tensor | None = None
        number = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = number.clone()  # steps left out in the whole run
        self.looked = number.clone()  # steps looked at since this process began
        self.last = number - 1  # what `looked` was at the last step left out
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)  # the images of it whose numbers were not finite
        self.index = torch.zeros(own, dtype=torch.int64, device=device)  # and all of this rank's images of it

    def look(self, gradients: Sequence[Tensor], carry: Sequence[Tensor], index: Tensor) -> Tensor:
        """Whether to leave the step out, () bool, the same on every rank.

        `gradients` are already the mean over the ranks, `carry` each (G, ...) of all ranks, `index` (own,) of this one.
        """
        found = torch.zeros((), dtype=torch.float32, device=self.rows.device)
        if gradients:
            # one pass over all of them; the scale is 1, so they stay what they are
            torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), found, torch.ones_like(found))
        finite = [part.isfinite().flatten(1).all(dim=1) for part in carry]
        rows = ~torch.stack(finite).all(dim=0)
        skip = (found > 0) | rows.any()
        self.looked += 1
        self.skipped += skip
        self.last.copy_(torch.where(skip, self.looked, self.last))
        self.rows.copy_(torch.where(skip, rows, self.rows))
        self.index.copy_(torch.where(skip, index, self.index))
        return skip

    def watch_statistics_(self, module: nn.Module) -> None:
        """Of all layers of `module`; to be called when no one moves its buffers any more."""
        self.statistics = flat_statistics_(module)
        self.kept = None if self.statistics is None else self.statistics.clone()

    def keep(self) -> None:
        """Remembers the statistics."""
        if self.kept is not None and self.statistics is not None:
            self.kept.copy_(self.statistics)

    def put_back_(self, skip: Tensor) -> None:
        """Makes the statistics what they were, where `skip`, () bool."""
        if self.kept is not None and self.statistics is not None:
            self.statistics.copy_(torch.where(skip, self.kept, self.statistics))

    @property
    def left_out(self) -> Tensor:
        """Whether the last step was, () bool."""
        return self.last == self.looked

    def average_statistics_(self, collectives: Collectives) -> None:
        """Replaces the statistics of each rank by their mean over the ranks. Training does not read them; evaluations
        and checkpoints then are the same whichever rank makes them."""
        if self.statistics is not None and collectives.world_size > 1:
            self.statistics.copy_(collectives.mean(self.statistics))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped.copy_(state["skipped"])

    def describe(self, start_step: int, collectives: Collectives) -> str:
        """The last step left out: its number, ranks and images. Waits for the device; called on all ranks together.

        `start_step` is the number of steps that were behind when this process began.
        """
        step = start_step + int(self.last)
        rows = self.rows.nonzero().flatten().tolist()
        images = collectives.gather(self.index).tolist()
        share = len(images) // collectives.world_size
        if not rows:
            return f"the gradient of step {step:,} was not finite; its images: {_listed(images)}"
        ranks = sorted({row // share for row in rows})
        where = f" on rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}" if collectives.world_size > 1 else ""
        broken = _listed([images[row] for row in rows])
        return f"the loss or the embeddings of step {step:,} were not finite{where}; images {broken}"


def spoiled(carry: Sequence[Tensor], loss: Tensor) -> tuple[Tensor, ...]:
    """The carry of a micro-batch, made NaN where its loss is not finite: so all ranks learn of it with the carry."""
    good = loss.detach().isfinite()
    return tuple(torch.where(good, part, torch.nan) if part.is_floating_point() else part for part in carry)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:16])
    return f"{shown} and {len(numbers) - 16:,} more" if len(numbers) > 16 else shown
