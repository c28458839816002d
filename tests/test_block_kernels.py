"""What stands between the products of a block, against transformers' own modules, in the same dtype."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton")

from specextend.kernels import blocks  # noqa: E402
from specextend.kernels.blocks import KeyValue, Placement  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def close(found, wanted):
    """Equal up to one rounding of the dtype."""
    epsilon = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, wanted, atol=2 * epsilon, rtol=2 * epsilon)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(rows, dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(72, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(72, dtype=dtype)
    x = random(rows, 72, dtype=dtype, scale=3.0)
    close(blocks.rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    gate_up = random(3, 2 * 1100, dtype=dtype, scale=2.0)
    gate, up = gate_up.chunk(2, -1)
    close(blocks.swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keeps_full", [False, True], ids=["one cache", "two caches"])
@pytest.mark.parametrize("placed", ["row", "level", "tree"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3)])
def test_place(heads, kv_heads, placed, keeps_full, dtype):
    torch.manual_seed(1)
    dim, rows, size = 32, 6, 50
    qkv = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = torch.arange(size)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim / 2))
    cos, sin = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
    cache, full = (
        KeyValue(*random(2, kv_heads, size, dim, dtype=dtype), torch.tensor(n, device=DEVICE)) for n in (9, 23)
    )
    wanted = [part.clone() for part in (cache.keys, cache.values, full.keys, full.values)]
    depth = torch.tensor([0, 1, 1, 2, 2, 3], dtype=torch.int32, device=DEVICE)
    where, positions = {
        "row": (Placement(cos, sin, cache.length), 9 + torch.arange(rows)),
        "level": (Placement(cos, sin, cache.length, shift=2, step=0, offset=7), torch.full((rows,), 11)),
        "tree": (Placement(cos, sin, cache.length, depth=depth), 9 + depth.cpu()),
    }[placed]
    query = blocks.place(qkv, where, cache, full=full if keeps_full else None)

    q, k, v = qkv.view(rows, -1, dim).transpose(0, 1).split((heads, kv_heads, kv_heads))
    turns = (table[positions.to(DEVICE)].repeat(1, 2)[None] for table in (cos, sin))
    turned_q, turned_k = (part[0].to(dtype) for part in apply_rotary_pos_emb(q[None].float(), k[None].float(), *turns))
    close(query, turned_q)
    at, end = slice(9 + where.offset, 9 + where.offset + rows), slice(23, 23 + rows)
    wanted[0][:, at], wanted[1][:, at] = turned_k, v
    if keeps_full:
        wanted[2][:, end], wanted[3][:, end] = k, v
    for found, part in zip((cache.keys, cache.values, full.keys, full.values), wanted, strict=True):
        close(found, part)
