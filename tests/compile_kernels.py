"""Compiles the kernels as Vicuna-7B's shape launches them, for a GPU that need not be there; one JSON line per kernel.

The wrappers run over tensors without memory, and what they would launch is compiled instead. Run by
`test_kernels_compile.py` in a process of its own: the other tests' Triton interprets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from specextend.config import TreeConfig
from specextend.kernels import elementwise, linear, prefill_attention, reduce, scores, tree, tree_attention
from specextend.kernels.elementwise import KeyValue, Norm, Placement

OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
LAUNCH_OPTIONS = {"num_warps", "num_stages"}
NO_MEMORY = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=NO_MEMORY)


def launch_all(rows: int) -> None:
    """Every kernel of a round with `rows` tree slots, drafted with an EAGLE-3 vocabulary."""
    length, work = empty(dtype=torch.int64), linear.Workspace(NO_MEMORY)
    tables, norm = (empty(16384, 128), empty(16384, 128)), Norm(empty(4096), 1e-5)
    cache = KeyValue(empty(32, 16384, 128), empty(32, 16384, 128), length)
    where = Placement(*tables, length, depth=empty(rows, dtype=torch.int32))
    x, inner, active = empty(rows, 4096), empty(rows, 11008), empty(2, dtype=torch.float32)
    linear.rotary(x, empty(12288, 4096), work, where, cache, norm=norm)
    newest = Placement(*tables, length)
    linear.rotary(x[:11], empty(12288, 4096), work, newest, cache, norm=norm, full=cache)
    linear.swiglu(x, empty(22016, 4096), work, norm=norm)
    linear.linear(x, empty(4096, 4096), work, residual=x)
    linear.linear(inner, empty(4096, 11008), work, residual=x)
    linear.linear(x, empty(32000, 4096), work, active=active)
    launch = tree_attention.Launch(splits=4)
    words, query = empty(rows, -(-rows // 32), dtype=torch.int32), empty(32, rows, 128)
    tree_attention.tree_attention(
        query, cache.keys, cache.values, length, words, 0.1, slots=rows, launch=launch, active=active
    )
    scores.attention_row(query, empty(32, rows, dtype=torch.float32), length, cache.keys, length, 0.1)
    prompt = empty(1, 32, 8192, 128), empty(1, 8, 16384, 128), empty(1, 8, 16384, 128)
    prefill_attention.prefill_attention(*prompt, 0.1)
    addresses = empty(2, dtype=torch.int64)
    signals = reduce.Signals(addresses, empty(128, dtype=torch.int32), 1)
    for hidden in (4096, 8192):
        for how in (None, signals):
            reduce.add_and_norm(addresses, empty(rows, hidden), Norm(empty(hidden), 1e-5), how)
    elementwise.gate(empty(rows, 22016))
    elementwise.place(empty(rows, 12288), newest, cache)
    if rows > 1:
        buffers = tree.TreeBuffers(TreeConfig(nodes=rows - 1), 32000, NO_MEMORY)
        for level in range(2):
            buffers.add_level(empty(rows - 1 if level else 1, 32000), level, empty(32000, dtype=torch.int64))
        buffers.finish(length)
        buffers.accept(empty(rows, dtype=torch.int64), length)
        buffers.compact(empty(32, 32, 16384, 128), empty(32, 32, 16384, 128))


def recorded(calls: Callable[[], None]) -> dict[str, tuple[JITFunction, dict[str, Any]]]:
    """The kernels that `calls` would launch, each set of constants once, with their arguments by name."""
    found: dict[str, tuple[JITFunction, dict[str, Any]]] = {}

    def note(function: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(function.arg_names, args, strict=False)) | named
        constants = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        found[f"{function.__name__} {constants}"] = function, arguments

    JITFunction.run = note
    calls()
    return found


def compiled(function: JITFunction, arguments: dict[str, Any], capability: int):
    """The kernel for a compute capability, specialised as a launch would."""
    constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name], attributes[index,] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif name in constants or (isinstance(value, int) and value == 1):
            signature[name], values[index,] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    options = {name: value for name, value in arguments.items() if name in LAUNCH_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin: bytes) -> int:
    """What a thread spills to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def main(capability: int) -> None:
    for rows in (1, 64):
        for name, (function, arguments) in recorded(lambda rows=rows: launch_all(rows)).items():
            kernel = compiled(function, arguments, capability)
            figures = {"shared": kernel.metadata.shared, "stack": stack_bytes(kernel.asm["cubin"])}
            print(json.dumps({"rows": rows, "kernel": name} | figures), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
