"""The interpreter takes what no GPU would: so the kernels are compiled too, in the tiles of each precision."""

import os
import subprocess
import sys
from pathlib import Path

# Triton's compiler needs no GPU, only someone to tell for which one: this driver does, and drops what it is to launch.
COMPILE = """
import re, subprocess, sys, tempfile, types
import torch, triton
from triton.backends.compiler import GPUTarget

compiled = []

class Driver:
    utils = types.SimpleNamespace(
        load_binary=lambda name, binary, shared, device: compiled.append((name, binary)) or (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)

triton.runtime.driver.set_active(Driver())
from ressl.kernels.relational_loss import loss_and_gradient

def compile_for(case):
    dim, precision, dtype = case
    rows = torch.zeros(64, dim)
    temperature = 0.01 if dim == 128 else 0.04  # with and without a running maximum
    loss_and_gradient(rows, rows, rows.to(dtype), 0.1, temperature, precision=precision, gradient=True)

def spilt(kernel):
    # what does not fit into registers lies on the stack
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel[1])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return kernel[0] + ":" + re.search(r"STACK:(\\d+)", said)[1]

short, long = torch.bfloat16, torch.float32
cases = [(dim, precision, long) for dim in (512, 128, 64) for precision in ("float32", "tf32", "bf16")]
for case in [*cases, (512, "bf16", short)]:
    compile_for(case)
print(*map(spilt, compiled))
"""


def test_all_kernels_compile_for_a_gpu_and_nothing_spills(repo: Path, tmp_path: Path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=repo, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found.count("attend_kernel:0") == 10
    assert set(found) == {"attend_kernel:0", "combine_kernel:0"}
