"""The interpreter takes what no GPU would: so all kernels are compiled too."""

from collections.abc import Callable

COMPILE = """
import numpy as np, torch, triton
from pipelines.frames import pack
from pipelines.kernels.draws import draw_views
from pipelines.kernels.views import cut_views
from ressl.config import ViewConfig

frames = pack([np.zeros((8, 9, 3), np.uint8)] * 2, np.array([[8, 9]] * 2), np.arange(2), np.arange(2))
steps = dict(jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.1)
cfgs = [ViewConfig(size=28), ViewConfig(size=28, **steps), ViewConfig(size=28, **(steps | {"blur_prob": 0.0}))]
params = draw_views(cfgs, frames.original, frames.index, seed=0, epoch=0, first_view=0)
for p in params:
    p.order[:] = torch.arange(4)
cut_views(frames, params, cfgs, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), dtype=torch.bfloat16)
print(*sorted(name for name, _ in compiled))
"""


def test_all_kernels_compile_for_a_gpu(compile_for_a_gpu: Callable[[str], list[str]]):
    found = compile_for_a_gpu(COMPILE)
    crop, colour = ["crop_kernel"] * 2, ["colour_kernel"] * 2
    assert found == ["_draw_kernel", "blur_columns_kernel", "blur_rows_kernel", *colour, *crop]
