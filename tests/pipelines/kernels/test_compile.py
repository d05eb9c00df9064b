"""The interpreter takes what no GPU would: so all kernels are compiled too."""

import os
import subprocess
import sys
from pathlib import Path

# Triton's compiler needs no GPU, only someone to tell for which one: this driver does, and drops what it is to launch.
COMPILE = """
import sys, types
import numpy as np, torch, triton
from triton.backends.compiler import GPUTarget

compiled = []

class Driver:
    utils = types.SimpleNamespace(
        load_binary=lambda name, binary, shared, device: compiled.append(name) or (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)

triton.runtime.driver.set_active(Driver())
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
print(*sorted(compiled))
"""


def test_all_kernels_compile_for_a_gpu(repo: Path, tmp_path: Path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=repo, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    crop, colour = ["crop_kernel"] * 2, ["colour_kernel"] * 2
    assert done.stdout.split() == ["_draw_kernel", "blur_columns_kernel", "blur_rows_kernel", *colour, *crop]
