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
    def push(self, keys: Tensor) -> None:
        """Overwrites the oldest rows with `keys` (G, D) in their order, in the queue's type. Of more than K rows,
        the last K stay."""
        size = self.keys.shape[0]
        skipped = max(0, len(keys) - size)
        place = torch.arange(skipped, len(keys), device=self.keys.device)
        self.keys.index_copy_(0, (self.cursor + place) % size, keys[skipped:].to(self.keys.dtype))
        self.cursor.add_(len(keys)).remainder_(size)
