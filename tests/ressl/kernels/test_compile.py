"""The interpreter takes what no GPU would: so the kernels are compiled too, in the tiles of each precision."""

from collections.abc import Callable

COMPILE = """
import re, subprocess, tempfile
import torch, triton
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


def test_all_kernels_compile_for_a_gpu_and_nothing_spills(compile_for_a_gpu: Callable[[str], list[str]]):
    found = compile_for_a_gpu(COMPILE)
    assert found.count("attend_kernel:0") == 10
    assert set(found) == {"attend_kernel:0", "combine_kernel:0"}
