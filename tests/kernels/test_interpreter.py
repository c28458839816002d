"""What the hastened interpreter still sees: types that promote, shapes that part, numbers too large, overflow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a compiler stands in the interpreter's place"),
]


@triton.jit
def _mixed(x, out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    values = tl.load(x + lane)
    tl.store(out + lane, values * 2 + lane / 4 - (lane >= 2).to(tl.int64))
    tl.store(out + SIZE + lane, tl.sum(values[:, None] * lane[None, :], 0) + 1e6)


@triton.jit
def _parted(out):
    tl.store(out + tl.arange(0, 4), tl.arange(0, 4) + tl.arange(0, 8))


@triton.jit
def _negative(out):
    tl.store(out + tl.arange(0, 4), tl.arange(0, 4).to(tl.uint32) + (-1))


@triton.jit
def _too_large(out):
    tl.store(out + tl.arange(0, 4), tl.arange(0, 4).to(tl.int8) + 300)


@triton.jit
def _overflowing(out):
    tl.store(out + tl.arange(0, 4), (tl.arange(0, 4) + 2147483647).to(tl.int64))


@triton.jit
def _two_pointers(out):
    tl.store(out, out + out)


def test_values_are_those_of_the_types_they_promote_to():
    x, out = torch.tensor([1, 2, 3, 2**40]), torch.zeros(8)
    _mixed[(1,)](x, out, SIZE=4)
    lane = torch.arange(4)
    torch.testing.assert_close(out[:4], (x * 2).float() + lane / 4 - (lane >= 2).long())
    torch.testing.assert_close(out[4:], (x[:, None] * lane).sum(0) + 1e6, check_dtype=False)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (_parted, "incompatible dimensions"),
        (_negative, "negative scalar"),
        (_too_large, "out of range"),
        (_overflowing, "overflow detected"),
        (_two_pointers, "cannot add pointers"),
    ],
)
def test_mistakes_are_refused(kernel, message):
    for _ in range(2):  # what is remembered from the first time does not hide the second
        with pytest.raises(Exception, match=message):
            kernel[(1,)](torch.zeros(8, dtype=torch.int64))
