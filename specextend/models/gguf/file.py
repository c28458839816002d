"""A GGUF file: its metadata, and its tensors as PyTorch reads them.

The header is read here, with every length checked against the file's end, so that a file that is cut off or damaged
is one clear line; unpacking quantized blocks is left to the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specextend.errors import ModelError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is packed.

    Args:
        shape: as PyTorch orders it (GGUF names the innermost first).
        type: of the `gguf` package's `GGMLQuantizationType`.
    """

    name: str
    shape: tuple[int, ...]
    type: Any
    start: int
    bytes: int


class GgufFile:
    """A file read as far as its tensors, whose data stay on disk until asked for.

    Attributes:
        metadata: key -> value: numbers, strings, booleans and lists of them.
        tensors: name -> where it lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kinds = _gguf_package()
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ModelError(f"{path} is empty; download it again") from error
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._read_header()
        except (KeyError, OverflowError, RecursionError, UnicodeDecodeError, ValueError) as error:
            raise self._broken(f"its header is damaged near byte {self._at:,}") from error

    def __getitem__(self, key: str) -> Any:
        if key not in self.metadata:
            raise ModelError(f"{self.path} lacks {key!r}, without which it is no language model; give another file")
        return self.metadata[key]

    def weight(self, name: str) -> Tensor:
        """A tensor, unpacked to float32."""
        stored = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, stored.bytes, stored.start)
        rows = raw.reshape(*stored.shape[:-1], -1)
        try:
            values = rows.view(np.float32) if stored.type.name == "F32" else self._kinds.dequantize(rows, stored.type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: {name} is packed as {stored.type.name}, which the package gguf does not unpack; give a "
                "file of type F32, F16, BF16, Q8_0, Q4_0 or Q4_1"
            ) from error
        return torch.from_numpy(np.array(values, np.float32).reshape(stored.shape))

    def _read_header(self) -> None:
        if self._take(4) != MAGIC:
            raise ModelError(
                f"{self.path} is no GGUF file (it does not begin with {MAGIC.decode()}); download it again"
            )
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{self.path} is of GGUF version {version}; versions {VERSIONS} of little endian are read")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        stored = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment}")
        begin = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in stored:
            block, size = self._kinds.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(f"{name} is not made of whole blocks")
            one = StoredTensor(name, shape, kind, begin + offset, math.prod(shape) // block * size)
            if one.start + one.bytes > len(self._data):
                raise self._broken(f"it ends inside {name}")
            self.tensors[name] = one

    def _tensor(self) -> tuple[str, tuple[int, ...], Any, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        if not all(shape):
            raise ValueError(f"{name} is empty")
        return name, shape, self._kinds.GGMLQuantizationType(self._scalar("I")), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in SCALARS:
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * struct.calcsize(SCALARS[kind]))))
        return [self._value(kind) for _ in range(count)]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode()

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise self._broken("it ends inside its header")
        self._at += count
        return self._data[self._at - count : self._at]

    def _broken(self, how: str) -> ModelError:
        return ModelError(f"{self.path} is cut off or damaged: {how} ({len(self._data):,} bytes); download it again")


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("GGUF files need the package gguf; run: pip install gguf") from error
    return gguf
