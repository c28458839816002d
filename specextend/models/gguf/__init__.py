"""GGUF files (llama.cpp's format) as checkpoints: the file, the model in it, its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from specextend.errors import ModelError
from specextend.models.gguf import model, tokenizer
from specextend.models.gguf.file import SUFFIX, GgufFile


def is_gguf(path: str | Path) -> bool:
    """By its name alone, so that a missing file is called what it is."""
    return str(path).lower().endswith(SUFFIX)


def existing(name: str) -> Path:
    """The file of this name; ModelError if there is none."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({error.strerror}); check its permissions") from error
    raise ModelError(f"the GGUF file {name!r} does not exist; give the path of one")


def read_config(path: Path) -> PreTrainedConfig:
    with _one_line(path):
        return model.read_config(GgufFile(path))


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    with _one_line(path):
        return tokenizer.read_tokenizer(GgufFile(path))


def read_weights(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights, unpacked, under transformers' names."""
    return dict(model.read_weights(GgufFile(path), config, dtype))


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What a damaged file makes of its values' types and sizes is our error, too."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); download it again") from error


def read_generation_config(path: Path) -> GenerationConfig:
    """Every id that ends a text; the temperature if the file advises one."""
    file = GgufFile(path)
    advised = {"temperature": file.metadata.get("general.sampling.temp"), "do_sample": True}
    return GenerationConfig(
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=tokenizer.stop_ids(file),
        **(advised if advised["temperature"] else {}),
    )
