"""The prefill's attention against float64, through Triton's interpreter where there is no GPU (see conftest)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from specextend.kernels.prefill_attention import Launch, is_supported, prefill_attention  # noqa: E402
from specextend.modeling.attention import masked_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
if DEVICE.type == "cuda":  # the interpreter multiplies the bit patterns of bfloat16
    TOLERANCE[torch.bfloat16] = 1.6e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (4, 1, 16)])
@pytest.mark.parametrize(
    ("queries", "known"), [(1, 0), (40, 0), (33, 7), (70, 64), (32, 100)], ids=lambda tokens: str(tokens)
)
def test_each_query_sees_the_keys_up_to_its_own(queries, known, heads, kv_heads, dim, dtype):
    torch.manual_seed(queries)
    query = torch.randn(1, heads, queries, dim, dtype=dtype, device=DEVICE)
    cache = torch.randn(2, 1, kv_heads, known + queries + 5, dim, dtype=dtype, device=DEVICE)
    cache[:, :, :, known + queries :] = float("nan")  # what lies beyond must not be read into any result
    keys, values = cache[..., : known + queries, :]
    output, lse = prefill_attention(query, keys, values, dim**-0.5, launch=Launch(rows=32, keys=16, warps=4))
    visible = torch.ones(queries, known + queries, dtype=torch.bool, device=DEVICE).tril(known)
    repeated = (part.double().repeat_interleave(heads // kv_heads, 1) for part in (keys, values))
    wanted, wanted_lse = masked_attention(query.double(), *repeated, dim**-0.5, visible)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(output.double(), wanted, **tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse.double(), **tolerance)


def test_heads_of_odd_sizes_are_left_to_others():
    assert is_supported(torch.empty(1, 2, 3, 128)) and not is_supported(torch.empty(1, 2, 3, 96))
