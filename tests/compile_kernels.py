"""Compile the Triton kernels for a GPU that may be absent, and print their registers, spills and shared memory.

PYTHONPATH=. python tests/compile_kernels.py [CAPABILITY] [dynamic | planned]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zipping import kernels
from zipping.planned import kernels as planned
from zipping.planned import triton_kernels

FLOATS = {"cumulative_before", "minus_center", "limit", "score", "cumulative", "new_cumulative"}
FLOATS |= {"grad_new_cumulative", "grad_score", "grad_cumulative_before"}
FLOATS |= {"direction", "scale_and_limit", "features", "weighted", "grad_weighted"}  # of the planned mode
TYPES = dict.fromkeys(FLOATS, "*fp32") | {"token": "*i64", "new_token": "*i64", "halts": "*u8"}
TYPES |= dict.fromkeys(("scale", "eps"), "fp32")
TYPES |= dict.fromkeys(("cu_seqlens", "new_cu_seqlens", "dest_offset", "counts", "kept_count"), "*i32")
INTEGERS = ("width", "length", "count", "images", "parts", "capacity", "dummies")
TYPES |= dict.fromkeys(INTEGERS, "i32")
CONSTANTS = {"PREFIX": 1, "BLOCK": 256, "CHANNELS": 128, "ROWS": kernels.ROWS, "IMAGES": 512, "DUMMIES": 1024}
DTYPES = [("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]  # of rows, and of matrix products
CHANNEL_0 = {"direction": None}  # the gate reads channel 0
LAST, NOT_LAST = {"LAST": True, "EARLY_EXIT": False}, {"LAST": False, "EARLY_EXIT": True}
PLANNED_LAST = LAST | dict.fromkeys(("cumulative", "dest_offset", "counts"))
HALT, FUSED = dict.fromkeys(("branch", "gamma", "features")), dict.fromkeys(("prefix", "weighted"))  # absent arguments
NO_NORM = dict.fromkeys(("normed", "weight", "bias"))
PLANNED = {  # constants of each variant of a kernel; None is an absent argument
    triton_kernels.decide_kernel: [
        last | absent | gate
        for last in (PLANNED_LAST, NOT_LAST)
        for absent in (HALT, FUSED)
        for gate in (CHANNEL_0, {})
    ],
    triton_kernels.move_kernel: [HALT | NO_NORM, {}],
    triton_kernels.add_norm_kernel: [{}, {"branch": None, "gamma": None}],
    triton_kernels.halt_backward_kernel: [
        {},
        dict.fromkeys(("dest_offset", "new_cu_seqlens", "grad_new_rows", "grad_new_cumulative")),
    ],
}


def compile_kernel(kernel, capability: int, dtypes: tuple[str, str], variant: dict) -> None:
    """Compile one variant of a kernel. dtypes: of the rows, and of the branch and the norms."""
    sizes = CONSTANTS | variant
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    types = {"branch": f"*{dtypes[1]}", "normed": f"*{dtypes[1]}"} | TYPES
    types = {name: types.get(name, f"*{dtypes[0]}") for name in kernel.arg_names}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if (kind[0] == "*" and name != "direction") or name == "width"  # a direction begins at any multiple of 4 bytes
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm
    options = ", ".join(f"{name} {value}" for name, value in variant.items())
    print(f"{kernel.__name__}, {' and '.join(dtypes)}, {options}: {resources(compiled, capability)}", flush=True)


def resources(compiled, capability: int) -> str:
    """Return registers, spills and shared memory of a compiled kernel, as the assembler reports them."""
    target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", f"-arch={target}", "-o", "/dev/null", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.findall(r"\d+ bytes spill stores|Used \d+ registers", output)
    return ", ".join([*found, f"{compiled.metadata.shared} bytes of shared memory"])


def compile_dynamic(capability: int) -> None:
    for kernel in (kernels._halting_kernel, kernels._compact_kernel, kernels._halting_backward_kernel):
        for dtype in ("fp32", "fp16", "bf16"):
            for variant in (LAST | CHANNEL_0, NOT_LAST | CHANNEL_0, NOT_LAST):
                compile_kernel(kernel, capability, (dtype, dtype), variant)


def compile_planned(capability: int) -> None:
    for kernel, variants in PLANNED.items():
        specialized = {p.name for p in kernel.params if not p.do_not_specialize}
        assert specialized.isdisjoint(set(INTEGERS) - {"width"}), f"a new plan compiles {kernel.__name__} again"
        for dtypes in DTYPES:
            for variant in variants:
                has_norm = "weight" in kernel.arg_names and "weight" not in variant
                for width in (192, 384, 768) if has_norm else (192,):
                    rows, channels = planned._whole_rows(width) if has_norm else (planned.ROWS, planned.CHANNELS)
                    compile_kernel(kernel, capability, dtypes, {"ROWS": rows, "CHANNELS": channels} | variant)


MODES = {"dynamic": compile_dynamic, "planned": compile_planned}

if __name__ == "__main__":
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for mode in sys.argv[2:] or MODES:
        MODES[mode](capability)
