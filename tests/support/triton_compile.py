"""Compiles the kernels in Triton that functions launch for GPUs that need not be there: `python -m tests.support.triton_compile`.

The interpreter takes programs that the compiler refuses. Launches are recorded with tensors on the CPU and compiled for compute
capability 8.0 and 9.0, down to machine code; what is printed is a line for each with its registers and spills.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CAPABILITIES = (80, 90)
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def compile_launches(run: Callable[[], object], capabilities: tuple[int, ...] = CAPABILITIES) -> list[str]:
    """Returns a line for each kernel that `run` launches: its name, capability, registers and bytes of spills."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {name: more.pop(name) for name in ("num_warps", "num_stages") if name in more}
        launches.append((self, named | more, options))

    launch, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = launch
    return [_compiled(*launched, capability) for launched in launches for capability in capabilities]


def _compiled(kernel: Any, named: dict[str, Any], options: dict[str, Any], capability: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # Triton makes a constant of 1
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    found = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return f"{kernel.__name__} sm_{capability}: {registers} registers, {stack} bytes of spills"


def one_pass() -> None:
    """Launches what makes records, as for V = 131,072 and K = 64, and on a grid of another kind in half precision."""
    from softcache.labels.sparsify.one_pass import draw, draw_by_priority, read_rows
    from softcache.labels.tail import DEFAULT_TEMPERATURES

    targets = torch.zeros(2, dtype=torch.int64)
    logits = torch.zeros(2, 131072)
    read = read_rows(logits, 64, DEFAULT_TEMPERATURES, targets)
    draw_by_priority(logits, read, targets, 1.0, 33)
    draw(logits, read, torch.zeros(2, 5, dtype=torch.float64), 1.0)
    read_rows(torch.zeros(2, 4096, dtype=torch.bfloat16), 10, (1.0, 3.0, 5.0))


def losses() -> None:
    """Launches what turns logits into gradients: both parts at T = 2 in float32, one at T = 1 with a softcap in bfloat16."""
    from softcache.losses.fused.gpu import RowSums

    logits, some = torch.zeros(2, 32000), torch.zeros(2)
    targets = torch.zeros(2, dtype=torch.int64)
    RowSums(logits, 2.0, at_one=True).share_out(logits, some, some, targets, some, None)
    RowSums(logits, None, at_one=True).share_out(logits.bfloat16(), some, None, targets, some, 30.0)


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for run in (one_pass, losses):
        for line in compile_launches(run, tuple(map(int, sys.argv[1:])) or CAPABILITIES):
            print(line, flush=True)


if __name__ == "__main__":
    main()
