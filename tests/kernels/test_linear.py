"""The fused products against plain PyTorch in float64, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")

from specextend.kernels import elementwise  # noqa: E402
from specextend.kernels import linear as kernels  # noqa: E402
from specextend.kernels.elementwise import KeyValue, Norm, Placement  # noqa: E402
from specextend.kernels.linear import Launch, Workspace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if DEVICE.type == "cuda":
    TOLERANCE[torch.bfloat16] = 3e-2
LAUNCHES = [Launch(cols=16, depth=32, splits=1), Launch(cols=16, depth=16, splits=3)]


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def normed(x, norm):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt() * norm.weight.double() if norm else x


def close(found, wanted, dtype):
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture(params=[False, True], ids=["raw", "normed"])
def norm_of(request):
    def make(size, dtype):
        return Norm(random(size, dtype=dtype), 1e-5) if request.param else None

    return make


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=["whole", "split"])
@pytest.mark.parametrize("rows", [1, 17])
def test_linear(rows, launch, dtype):
    torch.manual_seed(rows)
    x, weight, residual = (
        random(rows, 72, dtype=dtype),
        random(75, 72, dtype=dtype, scale=0.1),
        random(rows, 75, dtype=dtype),
    )
    workspace = Workspace(DEVICE, 1 << 15, 64)
    wanted = x.double() @ weight.double().T
    for _ in range(2):  # the second finds the workspace as the first left it
        close(kernels.linear(x, weight, workspace, launch=launch), wanted, dtype)
    found = kernels.linear(x, weight, workspace, launch=launch, residual=residual)
    close(found, wanted + residual.double(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=["whole", "split"])
@pytest.mark.parametrize("rows", [1, 5])
def test_swiglu(rows, launch, dtype, norm_of):
    torch.manual_seed(0)
    norm = norm_of(72, dtype)
    x, weight = random(rows, 72, dtype=dtype), random(2 * 41, 72, dtype=dtype, scale=0.1)
    gate, up = (normed(x, norm) @ weight.double().T).chunk(2, -1)
    close(kernels.swiglu(x, weight, Workspace(DEVICE, 1 << 14, 64), norm=norm, launch=launch), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("splits", [0, 1, 2], ids=["elementwise", "whole", "split"])
@pytest.mark.parametrize("keeps_full", [False, True], ids=["one cache", "two caches"])
@pytest.mark.parametrize("placed", ["row", "level", "tree", "single"])
def test_rotary(placed, keeps_full, splits, dtype, norm_of):
    torch.manual_seed(1)
    heads, kv_heads, dim, rows, size = 4, 2, 32, 1 if placed == "single" else 6, 50
    norm = norm_of(48, dtype)
    if not splits and (keeps_full or norm):
        pytest.skip("the prefill's kernel neither norms nor writes twice")
    x, weight = random(rows, 48, dtype=dtype), random((heads + 2 * kv_heads) * dim, 48, dtype=dtype, scale=0.15)
    angle = torch.arange(size)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim / 2))
    cos, sin = angle.cos().repeat(1, 2).to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
    sin = torch.cat((-sin, sin), -1)  # as `Rope.tables` has it
    cache, full = (
        KeyValue(*random(2, kv_heads, size, dim, dtype=dtype), torch.tensor(n, device=DEVICE)) for n in (9, 23)
    )
    before = [part.clone() for part in (cache.keys, cache.values, full.keys, full.values)]
    depth = torch.tensor([0, 1, 1, 2, 2, 3], device=DEVICE)
    where, positions = {
        "row": (Placement(cos, sin, cache.length), 9 + torch.arange(rows)),
        "level": (Placement(cos, sin, cache.length, shift=2, step=0, offset=7), torch.full((rows,), 11)),
        "tree": (Placement(cos, sin, cache.length, depth=depth), 9 + depth.cpu()),
        "single": (Placement(cos, sin, cache.length, depth=depth[3:]), torch.tensor([11])),
    }[placed]
    if splits:
        launch = Launch(cols=dim // 2 // splits, depth=16, splits=splits)  # whole halves of a head, then parts
        query = kernels.rotary(
            x, weight, Workspace(DEVICE, 1 << 15, 64), where, cache, norm=norm, full=full if keeps_full else None,
            launch=launch,
        )  # fmt: skip
    else:
        query = elementwise.place(x @ weight.T, where, cache)

    def turned(states):  # [rows, h, dim], as rotate-half does
        c, s = (part.double()[positions][:, None] for part in (cos.cpu(), sin.cpu()))
        low, high = states.cpu().chunk(2, -1)
        return (states.cpu() * c + torch.cat((high, low), -1) * s).transpose(0, 1).to(DEVICE)

    projected = (normed(x, norm) @ weight.double().T).view(rows, -1, dim)
    q, k, v = projected.split((heads, kv_heads, kv_heads), 1)
    close(query, turned(q), dtype)
    at = slice(9 + where.offset, 9 + where.offset + rows)
    wanted = [part.double() for part in before]
    wanted[0][:, at], wanted[1][:, at] = turned(k), v.transpose(0, 1)
    if keeps_full:
        wanted[2][:, 23 : 23 + rows], wanted[3][:, 23 : 23 + rows] = k.transpose(0, 1), v.transpose(0, 1)
    for found, part in zip((cache.keys, cache.values, full.keys, full.values), wanted, strict=True):
        close(found, part, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm_is_that_of_transformers(rows, dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(72, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(72, dtype=dtype)
    x = random(rows, 72, dtype=dtype, scale=3.0)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(
        elementwise.rms_norm(x, Norm(norm.weight, 1e-5)), norm(x), atol=4 * epsilon, rtol=4 * epsilon
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gate(dtype):
    torch.manual_seed(0)
    x = random(3, 2 * 1100, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    close(elementwise.gate(x), F.silu(gate) * up, dtype)


def test_a_dead_launch_writes_nothing_and_leaves_the_workspace_as_it_was():
    torch.manual_seed(0)
    x, weight, workspace = random(5, 64), random(6 * 32, 64), Workspace(DEVICE, 1 << 15, 64)
    cache = KeyValue(*random(2, 2, 20, 32), torch.tensor(3, device=DEVICE))
    where = Placement(random(20, 32), random(20, 32), cache.length)
    launch, state = Launch(cols=16, depth=16, splits=3), torch.zeros(2, device=DEVICE)
    before, parts = cache.keys.clone(), workspace.parts.normal_().clone()
    kernels.rotary(x, weight, workspace, where, cache, active=state, launch=launch)
    assert torch.equal(cache.keys, before) and torch.equal(workspace.parts, parts) and not workspace.arrived.any()
    kernels.rotary(x, weight, workspace, where, cache, active=state + 1, launch=launch)
    assert not torch.equal(cache.keys, before)


@pytest.mark.parametrize("rows", [1, 16, 64, 128])
@pytest.mark.parametrize(
    ("kind", "columns", "half"),
    [(kernels.PLAIN, 4096, 0), (kernels.PLAIN, 32000, 0), (kernels.SWIGLU, 22016, 0), (kernels.ROTARY, 12288, 64)],
)
def test_launches_chosen_for_real_shapes_fit_the_shared_memory(rows, kind, columns, half):
    for dtype in (torch.float16, torch.float32):
        launch = kernels.launch_for(kind, torch.empty(rows, 64, dtype=dtype), columns, half)
        tile = (2 * launch.cols + max(16, rows)) * launch.depth * dtype.itemsize
        assert rows == 1 or tile * launch.stages <= 227 * 1024
