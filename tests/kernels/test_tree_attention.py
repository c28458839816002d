"""The Triton kernels against float64, through Triton's interpreter where there is no GPU (see conftest)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from specextend.kernels.tree_attention import Launch, Workspace, pack_mask, tree_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
if DEVICE.type == "cuda":  # the interpreter multiplies the bit patterns of bfloat16
    TOLERANCE[torch.bfloat16] = 1.6e-2


def random_tree(slots: int, seed: int) -> torch.Tensor:
    """Ancestor mask [slots, slots] of a random tree."""
    generator = torch.Generator().manual_seed(seed)
    ancestors = torch.eye(slots, dtype=torch.bool)
    for node in range(1, slots):
        parent = int(torch.randint(0, node, (1,), generator=generator))
        ancestors[node] |= ancestors[parent]
    return ancestors


def exact(query, keys, values, length, mask, scaling):
    """(output, lse) in float64: T queries see `length` keys and, of those behind, what `mask` [T, K] says."""
    groups, end = query.shape[0] // keys.shape[0], length + mask.shape[1]
    k, v = (part[:, :end].double().repeat_interleave(groups, 0) for part in (keys, values))
    visible = torch.cat((torch.ones(mask.shape[0], length, dtype=torch.bool), mask.cpu()), 1).to(query.device)
    scores = (query.double() @ k.mT * scaling).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def compare(heads, kv_heads, dim, mask, length, dtype, launch, seed=0):
    torch.manual_seed(seed)
    queries, slots = mask.shape
    capacity = length + slots + 7
    query = torch.randn(heads, queries, dim, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, kv_heads, capacity, dim, device=DEVICE, dtype=dtype)
    keys[:, length + slots :] = float("nan")  # what lies beyond must not be read into any result
    values[:, length + slots :] = float("nan")
    output, lse = tree_attention(
        query, keys, values, torch.tensor([length], dtype=torch.int32, device=DEVICE), pack_mask(mask.to(DEVICE)),
        dim**-0.5, slots=slots, launch=launch,
    )  # fmt: skip
    wanted, wanted_lse = exact(query, keys, values, length, mask, dim**-0.5)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2)])
def test_tree_attention_is_exact_softmax_attention(heads, kv_heads, dim, dtype):
    compare(heads, kv_heads, dim, random_tree(9, 0), 150, dtype, Launch(splits=3, keys=32))


@pytest.mark.parametrize("slots", [1, 2, 31, 32, 33, 64, 65, 128])
def test_any_number_of_slots(slots):
    compare(2, 1, 64, random_tree(slots, slots), 70, torch.float32, Launch(splits=2, keys=32))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("splits", [1, 4, 5])
def test_any_prefix_even_none_and_splits_without_a_key(length, splits):
    compare(2, 2, 64, random_tree(5, 1), length, torch.float32, Launch(splits=splits, keys=16))


def test_a_level_of_the_draft_sees_its_ancestors_among_more_slots_than_queries():
    mask = torch.rand(6, 75, generator=torch.Generator().manual_seed(0)) < 0.2
    compare(4, 4, 64, mask, 40, torch.float32, Launch(splits=2, keys=32))


def test_rows_beyond_one_tile_are_spread_over_programs():
    compare(8, 1, 64, random_tree(40, 3), 90, torch.float32, Launch(splits=2, keys=32))  # 320 rows


def test_one_workspace_serves_prompt_after_prompt():
    launch, workspace = Launch(splits=4, keys=16), Workspace(2, 5, 64, 4, DEVICE)
    mask = random_tree(5, 0)
    for length in (200, 3):  # what the longer one left in the workspace must not show
        torch.manual_seed(length)
        query = torch.randn(2, 5, 64, device=DEVICE)
        keys, values = torch.randn(2, 2, 300, 64, device=DEVICE)
        output, _ = tree_attention(
            query, keys, values, torch.tensor(length, dtype=torch.int32, device=DEVICE), pack_mask(mask.to(DEVICE)),
            0.125, slots=5, launch=launch, workspace=workspace,
        )  # fmt: skip
        wanted, _ = exact(query, keys, values, length, mask, 0.125)
        torch.testing.assert_close(output.double(), wanted, atol=2e-5, rtol=2e-5)


def test_mask_bits_are_where_the_kernel_looks_for_them():
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, [0, 31, 32, 69]] = True
    words = pack_mask(mask)
    assert words.shape == (2, 3) and words.dtype == torch.int32 and not words[1].any()
    found = [(int(words[0, j // 32]) >> (j % 32)) & 1 for j in range(70)]
    assert [j for j, bit in enumerate(found) if bit] == [0, 31, 32, 69]
