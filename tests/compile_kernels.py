"""Compiles the kernels as real shapes launch them, for a GPU that need not be there; prints one JSON line per kernel.

Run by `test_kernels_compile.py` in a process of its own: the other tests' Triton interprets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specextend.kernels import linear, reduce, scores, tree, tree_attention
from specextend.kernels.linear import _launch

OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALF, FLOAT, INT, LONG = "*fp16", "*fp32", "*i32", "*i64"
SCALARS = {"epsilon": "fp32", "scale": "fp32", "threshold": "fp32", "floor": "fp32"}
UNALIGNED = {  # integers that a launch need not know to be multiples of 16
    "rows", "queries", "slots", "shift", "step", "offset", "level", "wide", "width", "nodes", "mask_row", "lse_head",
    "size", "candidates", "rank",
}  # fmt: skip


def kernels(rows: int):
    """(name, function, pointers that are not half precision, constants, warps, stages) in Vicuna-7B's shape."""
    block = max(16, triton.next_power_of_2(rows)) if rows > 1 else 1
    x = torch.empty(rows, 1, dtype=torch.float16)
    product = {
        "HEADS": 32, "KV_HEADS": 32, "FULL": False, "DEPTHS": True, "ROWS": block, "RESIDUAL": False, "SPLITS": 1,
    }  # fmt: skip
    pointers = dict.fromkeys(("parts", "squares"), FLOAT) | dict.fromkeys(("arrived", "depths"), INT)
    pointers |= dict.fromkeys(("length", "full_length"), LONG)
    launches = {
        "q/k/v": (linear.ROTARY, _launch(x, cols=64, depth=128, stages=4), {}),
        "gate/up": (linear.SWIGLU, _launch(x, cols=32, depth=64, stages=4), {}),
        "down": (linear.PLAIN, _launch(x, cols=32, depth=128, splits=2, stages=6), {"RESIDUAL": True}),
    }
    if rows == 1:
        launches = {"gate/up": (linear.SWIGLU, linear.Launch(8, 1024, stages=3), {})}
    for name, (kind, launch, more) in launches.items():
        shape = {"KIND": kind, "NORM": rows == 1, "COLS": launch.cols, "DEPTH": launch.depth, "SPLITS": launch.splits}
        yield f"{name}, {rows} rows", linear._kernel, pointers, product | shape | more, launch.warps, launch.stages
    split = {"GROUPS": 1, "SPLITS": 4, "ROWS": max(block, 16), "KEYS": 64, "DIM": 128}
    pointers = {"length": LONG, "mask": INT, "partial": FLOAT, "partial_lse": FLOAT}
    yield f"attention, {rows} rows", tree_attention._split, pointers, split, 4, 3
    if rows == 64:
        merge = {"SPLITS": 4, "PADDED": 4, "DIM": 128}
        yield "merge", tree_attention._merge, dict.fromkeys(("partial", "partial_lse", "lse"), FLOAT), merge, 1, 3
        row = {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "KEYS": scores.KEYS}
        yield "attention row", scores._row, {"lse": FLOAT, "newest": LONG, "length": LONG, "row": FLOAT}, row, 4, 3
        yield "norm", linear._norm, {}, {"SIZE": 4096}, 8, 3
        for size, warps in ((4096, 8), (8192, 16)):
            for signals in (False, True):
                pointers = {"parts": LONG, "flags": LONG, "counts": INT}
                shape = {"COUNT": 2, "SIZE": size, "SIGNALS": signals}
                yield f"sum and norm, {size}, {signals}", reduce._kernel, pointers, shape, warps, 3
        yield from trees()


def trees():
    """The tree's kernels for 63 nodes, ten levels and 32,000 tokens."""
    floats = dict.fromkeys(("above", "scores", "state", "child_scores"), FLOAT)
    children = {"NAMED": True, "KEPT": 64, "CHUNK": tree.CHUNK, "BITS": tree.BITS[torch.float16]}
    yield "children", tree._children, floats | {"names": LONG, "tokens": INT}, children, 16, 3
    ints = dict.fromkeys(("child_tokens", "parents", "words", "kept", "order", "used"), INT)
    longs = dict.fromkeys(("level_tokens", "below", "tokens", "root", "tree_tokens"), LONG)
    level = {"KEPT": 64, "WORDS": 20, "SIZE": 4096, "ALL": 1024, "LANES": 64}
    yield "level", tree._level, floats | ints | longs, level, 8, 3
    ints |= dict.fromkeys(("tree_parents", "tree_depth", "tree_used", "tree_words"), INT)
    yield "tree", tree._tree, floats | ints | longs, {"WORDS": 20, "TREE_WORDS": 2, "ALL": 1024, "SLOTS": 64}, 4, 3
    longs |= dict.fromkeys(("chosen", "path", "emitted", "count", "newest", "start", "length"), LONG)
    yield "accept", tree._accept, ints | longs, {"WORDS": 2, "SLOTS": 64}, 1, 3
    yield "compact", tree._compact, longs, {"PATH": 16, "DIM": 128}, 2, 3


INTEGERS = {
    "rows", "columns", "inner", "shift", "step", "offset", "queries", "slots", "heads", "size", "vocab", "stride",
    "width", "level", "wide", "nodes", "candidates", "key_head", "value_head", "cache_row", "full_key_head",
    "full_value_head", "query_head", "query_row", "key_row", "value_row", "mask_row", "lse_head", "layer_stride",
    "head_stride", "row_stride", "rank",
}  # fmt: skip


def compiled(function, pointers, constants, warps: int, stages: int, capability: int):
    """The kernel for a compute capability, with what the launcher knows of alignment."""
    types = {
        name: SCALARS.get(name) or ("i32" if name in INTEGERS else pointers.get(name, HALF))
        for name in function.arg_names
        if name not in constants
    }
    places = {name: (index,) for index, name in enumerate(function.arg_names)}
    aligned = [name for name, kind in types.items() if kind[0] == "*" or (kind == "i32" and name not in UNALIGNED)]
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin: bytes) -> int:
    """What a thread spills to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def main(capability: int) -> None:
    for rows in (1, 16, 64):
        for name, function, pointers, constants, warps, stages in kernels(rows):
            kernel = compiled(function, pointers, constants, warps, stages, capability)
            figures = {"shared": kernel.metadata.shared, "stack": stack_bytes(kernel.asm["cubin"])}
            print(json.dumps({"kernel": name} | figures), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
