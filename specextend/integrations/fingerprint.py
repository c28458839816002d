"""What a model computes with, as a value: equal while nothing changed, whoever changed it and however.

Version counters miss writes to `.data`, and pointers miss every write in place; so the contents are read. An attribute
that cannot be read makes a fingerprint equal to no other.

Per call on a CPU, one core busy with others' work: 50 ms for the bundled pair (70 MB), 0.5 to 0.9 s for a model of 1 GB
in fp32; walking through its modules is 5 ms of that.
"""

from __future__ import annotations

import functools
import pickle
import secrets
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# of a module: nothing that decides what it computes in eval mode, or what `twin.check_model` has judged
UNREAD = {
    "training", "forward", "prepare_inputs_for_generation", "generation_config", "warnings_issued", "_compiled_call",
    "_compiled_call_impl", "_last_compile_config", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks",
    "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}  # fmt: skip
UNREADABLE = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, pickle.PicklingError)
LANES = {"cpu": 24 << 10, "cuda": 1 << 20}  # 8 bytes each, summed at once: on a CPU in its cache, by one thread alone,
# since threads that wait for one another at every part take ten times as long where others want the cores too


def fingerprint(model: nn.Module) -> tuple:
    """Every module, attribute, parameter and buffer of `model`: values, and for tensors where they lie too."""
    reader = _Reader()
    reader.read(model)
    return tuple(reader.tokens), tuple(torch.cat(reader.sums).tolist()) if reader.sums else ()


class _Reader:
    """Walks through values, writing down what they are; what was met before is a number."""

    def __init__(self):
        self.tokens: list[object] = []
        self.sums: list[Tensor] = []
        self._met: dict[int, tuple[int, object]] = {}  # the value too: an id is its own only while it lives

    def read(self, value: object) -> None:
        if type(value) in ATOMS:
            self.tokens.append((type(value), repr(value)))
        elif id(value) in self._met:
            self.tokens.append(self._met[id(value)][0])
        else:
            self._met[id(value)] = len(self._met), value
            self._read_new(value)

    def _read_new(self, value: object) -> None:
        self.tokens.append(type(value))
        if isinstance(value, Tensor):
            self._read_tensor(value)
        elif isinstance(value, nn.Module):
            self._read_all({name: part for name, part in vars(value).items() if name not in UNREAD})
        elif isinstance(value, dict):
            self._read_all(value)
        elif isinstance(value, list | tuple):
            self.tokens.append(len(value))
            for part in value:
                self.read(part)
        elif isinstance(value, set | frozenset) and all(type(part) in ATOMS for part in value):
            self.tokens.append(frozenset(map(repr, value)))
        elif isinstance(value, type):
            self.tokens.append(value)
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            self.tokens.append(value.__code__)
            self._read_all({"defaults": value.__defaults__, "named": value.__kwdefaults__, "closure": cells})
        elif isinstance(value, types.MethodType):
            self._read_all({"of": value.__self__, "does": value.__func__})
        elif isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
            self.tokens.append(value)
        else:
            self._read_state(value)

    def _read_state(self, value: object) -> None:
        """What a deep copy would take of it; an object() of its own, equal to nothing, where there is no such thing."""
        try:
            kind, arguments, *state = value.__reduce_ex__(2)
        except UNREADABLE:
            self.tokens.append(object())
        else:
            self.read((kind, arguments, [list(part) if isinstance(part, Iterator) else part for part in state]))

    def _read_all(self, parts: dict) -> None:
        self.tokens.append(len(parts))
        for name, part in parts.items():
            self.read(name)
            self.read(part)

    def _read_tensor(self, tensor: Tensor) -> None:
        strided = tensor.layout == torch.strided
        place = (tensor.data_ptr(), tensor.stride()) if strided else ()
        self.tokens.append((place, tensor.dtype, tuple(tensor.shape), tensor.device))
        self.sums.append(_content(tensor if strided else tensor.to_dense()).flatten().cpu())


def _content(tensor: Tensor) -> Tensor:
    """Sums [C, 2] of all bytes under secret odd factors by place, per part of `LANES`; int64, wrapping.

    A change hides from the first sum only if it is confined to the upper halves of lanes, or by an accident of
    2^-32; the second sum reads the upper halves alone.
    """
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    if content.numel() % 8 or content.storage_offset() % 8:
        content = torch.cat((content, content.new_zeros(-content.numel() % 8)))
    factors = _factors(tensor.device)
    room = torch.empty_like(factors[0])
    parts = content.view(torch.int64).split(len(room))
    sums = torch.empty(len(parts), 2, dtype=torch.int64, device=tensor.device)
    for part, (whole, upper) in zip(parts, sums, strict=True):
        here = room[: len(part)]
        torch.sum(torch.mul(part, factors[0, : len(part)], out=here), 0, out=whole)
        torch.bitwise_right_shift(part, 32, out=here)
        torch.sum(here.mul_(factors[1, : len(part)]), 0, out=upper)
    return sums


@functools.cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(secrets.randbits(63))  # torch's own stays where the user left it
    return (
        torch.randint(-(2**63), 2**63 - 1, (2, LANES.get(device.type, LANES["cpu"])), generator=generator)
        .bitwise_or_(1)
        .to(device)
    )
