"""Parts of a sum added up and normed, against its definition; through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from specextend.kernels.elementwise import Norm  # noqa: E402
from specextend.kernels.reduce import Signals, add_and_norm, add_and_norm_ref  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 64), (2, 5, 96), (4, 3, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_and_residual_are_added_and_normed(count, rows, columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    made = [torch.randn(rows, columns, generator=generator).to(dtype).to(DEVICE) for _ in range(count + 1)]
    *parts, residual = made
    norm = Norm(torch.rand(columns, generator=generator).to(dtype).to(DEVICE), 1e-5)
    wanted_residual = residual.clone()
    wanted = add_and_norm_ref(parts, wanted_residual, norm)
    addresses = torch.tensor([part.data_ptr() for part in parts], device=DEVICE)
    found = add_and_norm(addresses, residual, norm)
    assert torch.equal(residual, wanted_residual)  # every rank must come to the same sum, to the bit
    torch.testing.assert_close(found, wanted, atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=2e-3)


def test_rows_tell_every_rank_how_many_sums_they_began_and_wait_for_as_many():
    ranks, rows, rank = 3, 4, 1
    flags = [torch.zeros(ranks, 6, dtype=torch.int32, device=DEVICE) for _ in range(ranks)]
    flags[rank][[0, 2]] = 2  # the peers are two sums ahead: nobody waits
    counts = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    signals = Signals(torch.tensor([flag.data_ptr() for flag in flags], device=DEVICE), counts, rank)
    parts = [torch.randn(rows, 32, device=DEVICE) for _ in range(ranks)]
    addresses, norm = torch.tensor([part.data_ptr() for part in parts], device=DEVICE), Norm(parts[0][0], 1e-5)
    for number, count in ((1, rows), (2, 2)):
        residual = torch.randn(count, 32, device=DEVICE)
        wanted = add_and_norm_ref([part[:count] for part in parts], residual.clone(), norm)
        torch.testing.assert_close(add_and_norm(addresses, residual, norm, signals), wanted)
        for flag in flags:
            assert flag[rank, :count].tolist() == [number] * count and not flag[rank, rows:].any()
    assert counts.tolist() == [2, 2, 1, 1, 0, 0]
