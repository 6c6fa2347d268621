"""Compile the Triton kernels for a GPU that may be absent.

PYTHONPATH=. python tests/compile_kernels.py [CAPABILITY]
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zipping import kernels

FLOATS = {"cumulative_before", "minus_center", "limit", "score", "cumulative", "new_cumulative"}
FLOATS |= {"grad_new_cumulative", "grad_score", "grad_cumulative_before"}
TYPES = dict.fromkeys(FLOATS, "*fp32") | {"token": "*i64", "new_token": "*i64", "halts": "*u8", "scale": "fp32"}
TYPES |= dict.fromkeys(("cu_seqlens", "new_cu_seqlens", "dest_offset", "counts"), "*i32")
TYPES |= dict.fromkeys(("width", "length", "count"), "i32")
CONSTANTS = {"PREFIX": 1, "BLOCK": 256, "CHANNELS": 128, "ROWS": kernels.ROWS}


def compile_for(capability: int) -> None:
    for kernel in (kernels._halting_kernel, kernels._compact_kernel, kernels._halting_backward_kernel):
        for dtype in ("*fp32", "*fp16", "*bf16"):  # dtype of the rows
            for last in (False, True):
                constants = CONSTANTS | {"LAST": last, "EARLY_EXIT": not last}
                constants = {name: constants[name] for name in kernel.arg_names if name in constants}
                signature = {n: "constexpr" if n in constants else TYPES.get(n, dtype) for n in kernel.arg_names}
                found = triton.compile(
                    ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
                )
                assert "cubin" in found.asm
                print(kernel.__name__, dtype, f"last {last}:", found.metadata.shared, "bytes of shared memory")


if __name__ == "__main__":
    compile_for(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
