"""The queue of past teacher embeddings that both networks are compared with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureQueue(nn.Module):
    """A ring of the last K embeddings. `push` after backward: the loss's backward pass still reads `keys`.

    The cursor lives on the device and is advanced there, so the host never waits for it and a CUDA graph can capture
    `push`. Both are buffers: a checkpoint carries them.
    """

    keys: Tensor  # (K, D) float32 or bfloat16, rows of unit length
    cursor: Tensor  # () int64, the row that is overwritten next: the oldest

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, skip: Tensor | None = None) -> None:
        """Overwrites the oldest rows with `keys` (G, D) in their order, in the queue's type. Of more than K rows,
        the last K stay. Where `skip`, () bool on the device, is true, nothing changes."""
        size = self.keys.shape[0]
        left_out = max(0, len(keys) - size)
        place = (self.cursor + torch.arange(left_out, len(keys), device=self.keys.device)) % size
        rows = keys[left_out:].to(self.keys.dtype)
        self.keys.index_copy_(0, place, rows if skip is None else torch.where(skip, self.keys[place], rows))
        self.cursor.add_(len(keys) if skip is None else torch.where(skip, 0, len(keys))).remainder_(size)
