"""EAGLE checkpoints on disk: which head they hold, and every weight of it put where it belongs, or one clear line.

Layouts read: EAGLE-1 (`fc`, `layers.0`), EAGLE-3 (`midlayer`, or `layers.0`, with `d2t` and `t2d`) and the
speculators library's EAGLE-3, whose config nests the block's under `transformer_layer_config`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from eagle.heads import Eagle1Head, Eagle3Head, Head
from specextend.errors import ModelError
from specextend.modeling.packed import pack_linears
from specextend.models.checkpoints import (
    LOADING_ERRORS,
    check_finite,
    check_floating,
    one_line,
    quiet_transformers,
    read_json,
    weight_files,
)

KINDS = ("eagle1", "eagle3")
NAMES = {"eagle1": "EAGLE-1", "eagle3": "EAGLE-3"}
SHARED = {"eagle1": ("embed_tokens.", "lm_head."), "eagle3": ("embed_tokens.",)}  # the target's, if not stored
IGNORED = ("rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq")  # buffers of older files


def load_head(directory: Path, target: PreTrainedModel, kind: str | None = None) -> Head:
    """The head in `directory` for `target`: on its device, in its dtype, in eval mode.

    Args:
        kind: "eagle1" or "eagle3" if only that will do; None takes what is there.
    """
    state = read_weights(directory)
    found = kind_of(directory, state)
    if kind and kind != found:
        raise ModelError(
            f"{directory} holds an {NAMES[found]} head (it has {_telling_key(state, found)}), but {NAMES[kind]} was "
            f"asked for; ask for {found}",
            setting="head",
        )
    raw = read_json(directory / "config.json")
    config = read_head_config(directory, raw)
    _check_sizes(directory, config, target)
    head = (_eagle1 if found == "eagle1" else _eagle3)(directory, raw, config, state, target)
    _fill(directory, head, state, SHARED[found])
    for name, shared in (("embed_tokens", target.get_input_embeddings()), ("lm_head", target.get_output_embeddings())):
        if getattr(head, name).weight.is_meta:
            setattr(head, name, shared)
    head.rotary_emb = type(head.rotary_emb)(config)  # its frequencies are computed, not loaded
    head = head.to(target.device, target.dtype).requires_grad_(False).eval()
    check_finite(directory, dict(head.named_parameters()))
    pack_linears(head)
    return head


def save_head(head: Head, directory: Path) -> None:
    """Write config and weights in bfloat16, in the published layout, without what the target has anyway."""
    kind = "eagle3" if isinstance(head, Eagle3Head) else "eagle1"
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in head.state_dict().items()
        if not name.startswith(SHARED[kind])
    }
    config = {name: value for name, value in head.config.to_diff_dict().items() if not name.startswith("_")}
    if kind == "eagle1":
        config["bias"] = head.fc.bias is not None
    else:
        state = {name.replace("layers.0.", "midlayer."): weight for name, weight in state.items()}
        config["eagle_aux_hidden_state_layer_ids"] = list(head.entering)
        if head.target_ids is not None:
            config["draft_vocab_size"] = len(head.target_ids)
            state |= vocabulary_maps(head.target_ids, head.config.vocab_size)
    save_file(state, directory / "model.safetensors")
    head.config.__class__.from_dict(config).to_json_file(directory / "config.json", use_diff=True)


def vocabulary_maps(target_ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` [V_draft] int64 offsets and `t2d` [V] bool of a draft vocabulary, ascending target ids [V_draft]."""
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[target_ids.cpu()] = True
    return {"d2t": target_ids.cpu() - torch.arange(len(target_ids)), "t2d": known}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, `.safetensors` or `.bin` (read as weights only: no code runs)."""
    files = weight_files(directory)
    try:
        state: dict[str, Tensor] = {}
        for file in files:
            safe = file.suffix == ".safetensors"
            state |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        check_floating(directory, {name: str(weight.dtype) for name, weight in state.items()})
    except LOADING_ERRORS as error:
        raise ModelError(
            f"the weights in {directory} cannot be read ({one_line(error)}); download them again"
        ) from error
    if not state:
        raise ModelError(f"{directory} has no weights (model.safetensors or pytorch_model.bin); download them")
    state = {name.replace("midlayer.", "layers.0."): weight for name, weight in state.items()}
    return {name: weight for name, weight in state.items() if name not in IGNORED}


def holds_head(directory: Path) -> bool:
    """Whether the checkpoint there is an EAGLE head's; tells by the names of its weights."""
    for file in weight_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names = set(weights.keys())
        else:
            names = torch.load(file, map_location="cpu", weights_only=True, mmap=True).keys()
        if "fc.weight" in names:
            return True
    return False


def kind_of(directory: Path, state: dict[str, Tensor]) -> str:
    """Which head the weights are: only EAGLE-3 norms the state it reads."""
    if "layers.0.hidden_norm.weight" in state:
        return "eagle3"
    if "fc.weight" in state and "layers.0.self_attn.q_proj.weight" in state:
        return "eagle1"
    raise ModelError(
        f"{directory} holds no EAGLE head: expected fc.weight with layers.0.* (EAGLE-1) or midlayer.* (EAGLE-3), found "
        f"{', '.join(sorted(state)[:3])}, …; give the head's own checkpoint"
    )


def read_head_config(directory: Path, raw: dict) -> LlamaConfig:
    """The block's Llama config; rope base 10000 where it names none, whatever the target's."""
    nested = raw.get("transformer_layer_config", raw)
    known = {key: nested[key] for key in nested if key not in ("model_type", "torch_dtype")}
    try:
        with quiet_transformers():
            config = LlamaConfig.from_dict({**known, "num_hidden_layers": 1})
    except LOADING_ERRORS as error:
        raise ModelError(f"{directory}/config.json is not a valid head config ({one_line(error)})") from error
    config._attn_implementation = "specextend"
    return config


def _eagle1(directory: Path, raw: dict, config: LlamaConfig, state: dict, target: PreTrainedModel) -> Eagle1Head:
    with torch.device("meta"):
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        return Eagle1Head(config, embedding, lm_head, bias="fc.bias" in state)


def _eagle3(directory: Path, raw: dict, config: LlamaConfig, state: dict, target: PreTrainedModel) -> Eagle3Head:
    layers = target.config.num_hidden_layers
    entering = _feature_layers(raw) or [2, layers // 2, layers - 3]
    if not all(0 <= layer <= layers for layer in entering):
        raise ModelError(f"{directory} reads the target's layers {entering}, but the target has {layers}")
    target_ids = _target_ids(directory, state, target.config.vocab_size)
    with torch.device("meta"):
        head = Eagle3Head(
            config,
            nn.Embedding(config.vocab_size, config.hidden_size),
            entering,
            target_ids,
            norm_before_residual=raw.get("norm_before_residual", False),
        )
    head.target_ids = target_ids
    return head


def _feature_layers(raw: dict) -> list[int] | None:
    """Layers whose input is a feature, where the config names them (vLLM, speculators)."""
    nested = raw.get("eagle_config") or {}
    return raw.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")


def _target_ids(directory: Path, state: dict[str, Tensor], vocab_size: int) -> Tensor | None:
    """Target id of every draft id, out of `d2t` and checked against `t2d`; both are taken out of `state`."""
    offsets, known = state.pop("d2t", None), state.pop("t2d", None)
    if offsets is None:
        return None
    target_ids = offsets.long() + torch.arange(len(offsets))
    if int(target_ids.min()) < 0 or int(target_ids.max()) >= vocab_size:
        raise ModelError(
            f"{directory}: d2t names target ids {int(target_ids.min())} to {int(target_ids.max())}, but the target has "
            f"{vocab_size} tokens; this head was made for another target"
        )
    if known is not None and not (
        len(known) == vocab_size and bool(known.bool()[target_ids].all()) and int(known.sum()) == len(target_ids)
    ):
        raise ModelError(
            f"{directory}: t2d ({len(known)} tokens, {int(known.sum())} of them drafted) and d2t ({len(target_ids)}) "
            f"do not belong together, or not to a target of {vocab_size} tokens"
        )
    return target_ids


def _check_sizes(directory: Path, config: LlamaConfig, target: PreTrainedModel) -> None:
    for name, what in (("hidden_size", "hidden size"), ("vocab_size", "vocabulary")):
        found, wanted = getattr(config, name), getattr(target.config, name)
        if found != wanted:
            raise ModelError(
                f"{directory} is a head for a target of {what} {found}, but this target's is {wanted}; "
                "choose the head that was trained for this target"
            )


def _fill(directory: Path, head: Head, state: dict[str, Tensor], shared: tuple[str, ...]) -> None:
    """Put every tensor in its place: none missing, none left over, all of the right shape."""
    wanted = head.state_dict()
    optional = {name for name in wanted if name.startswith(shared)}
    faults = {
        "missing": sorted(wanted.keys() - state.keys() - optional),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of the wrong shape": [
            f"{name} {list(state[name].shape)} instead of {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & state.keys())
            if state[name].shape != wanted[name].shape
        ],
    }
    found = [f"{len(names)} weights are {fault} ({', '.join(names[:3])})" for fault, names in faults.items() if names]
    if found:
        raise ModelError(f"{directory}: {'; '.join(found)}; the head does not fit its config or this target")
    head.load_state_dict(state, strict=False, assign=True)


def _telling_key(state: dict[str, Tensor], kind: str) -> str:
    return "layers.0.hidden_norm.weight" if kind == "eagle3" else f"fc.weight {list(state['fc.weight'].shape)}"
