"""Twins of the user's models: modules of their own over the same weights, which the engine may change at will.

A draft tree is verified in one pass, so a twin sees rows that plain `generate` never shows a model. Only what computes
each token from itself and its ancestors gives the same answer there; what cannot be known to is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from specextend.errors import ModelError
from specextend.modeling.attention import NAME
from specextend.modeling.packed import pack_linears
from specextend.models.checkpoints import ARCHITECTURES, ROPE_TYPES, one_line

METHODS = ("forward", "_call_impl", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")
ATTENTION = ("eager", "sdpa", "flash_attention_", "flex_attention", NAME)  # beginnings; all compute the same
INTERNAL = ("torch.nn.modules.", "transformers.")
QUANTIZED = ("torch.ao.", "torchao.", "bitsandbytes.")


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with our attention, in eval mode: modules and parameters of its own over the same memory.

    What joins or packs weights does so to the twin, in a copy: a later change of the model's does not reach it.
    """
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    try:
        twin = copy.deepcopy(model, weights).eval()
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({one_line(error)}); load it anew") from error
    for module in twin.modules():
        vars(module).pop("forward", None)  # compiled, of the original
        module._forward_hooks.clear()
    twin.set_attn_implementation(NAME)
    pack_linears(twin)
    return twin


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether only what transformers itself builds is in it, as the kernels of captured rounds expect."""
    ours = all(type(module).__module__.startswith(INTERNAL) for module in model.modules())
    act = type(ACT2FN[model.config.hidden_act])
    return ours and all(type(layer.mlp.act_fn) is act for layer in model.get_decoder().layers)


def check_model(model: PreTrainedModel, which: str) -> None:
    """ModelError for a model that our engine does not compute, or not surely as plain `generate` does."""
    fault = next(_faults(model), None)
    if fault:
        raise ModelError(f"{which} {fault}")


def _faults(model: PreTrainedModel) -> Iterator[str]:
    """What is wrong with it and the way out, each in one line."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        yield f"is a {type(model).__name__}; supported are {', '.join(ARCHITECTURES.values())}"
    yield from _unknown_weights(model)
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        yield f"has rope type {config.rope_parameters['rope_type']!r}; supported are {', '.join(ROPE_TYPES)}"
    yield from _changed_code(model)
    if not str(config._attn_implementation).startswith(ATTENTION):
        yield f"attends by {config._attn_implementation!r}; choose model.set_attn_implementation('sdpa')"
    rotary = model.get_decoder().rotary_emb
    if getattr(rotary, "rope_type", None) == "dynamic":  # the one rotary embedding that a twin computes by itself
        fresh = type(rotary)(config).original_inv_freq
        if not torch.equal(rotary.original_inv_freq.cpu(), fresh):
            yield "has dynamic rope of other frequencies than its config says; use plain generate"
    for name, module in model.named_modules():
        dropout = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0)
        if module.training and dropout:
            yield f"is in training mode with dropout ({name}); call model.eval()"


def _unknown_weights(model: PreTrainedModel) -> Iterator[str]:
    kinds = {type(module) for module in model.modules()}
    quantized = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    if quantized or any(kind.__module__.startswith(QUANTIZED) for kind in kinds):
        yield "is quantized; load it in fp32, fp16 or bf16"
    for name, weight in model.named_parameters():
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            yield f"is quantized or sharded ({name} is a {type(weight).__name__}); load it in fp32, fp16 or bf16"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            yield f"is quantized ({name} is {weight.dtype}); load it in fp32, fp16 or bf16"
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        yield f"is spread over {', '.join(devices)}; load it on one device"


def _changed_code(model: PreTrainedModel) -> Iterator[str]:
    """Hooks, methods replaced in an instance, classes of other origin where attention is computed."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        yield "is under a global forward hook, which would see draft trees; remove it, or use plain generate"
    for name, module in model.named_modules():
        name = name or type(model).__name__
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(map(_is_harmless, hooks)):
            yield f"has a forward hook on {name}, which would see draft trees; remove it, or use plain generate"
        for method in METHODS:
            if method in vars(module) and not _is_own(module, method):
                yield f"has {name}.{method} replaced, which would not see draft trees; undo it, or use plain generate"
    family = getattr(transformers, ARCHITECTURES[model.config.model_type]).__module__
    decoder = model.get_decoder()
    layers = [part for layer in decoder.layers for part in (layer, layer.self_attn)]
    for module in (model, decoder, decoder.rotary_emb, *layers):
        if not type(module).forward.__module__.startswith((family, "specextend.")):
            yield f"has a {type(module).__name__} with a forward of its own; use plain generate"
    places, count = [layer.self_attn.layer_idx for layer in decoder.layers], model.config.num_hidden_layers
    if places != list(range(count)):
        yield f"has layers {places}; its config says {count}, each once and in order: mend one, or use plain generate"


def _is_harmless(hook: object) -> bool:
    """The one that gradient checkpointing sets: it asks for gradients, of which there are none here."""
    return getattr(hook, "__name__", "") == "make_inputs_require_grads" and hook.__module__.startswith("transformers.")


def _is_own(module: nn.Module, method: str) -> bool:
    """Whether the instance's attribute does what its class's method would: the same one, bound or compiled."""
    value = vars(module)[method]
    value = getattr(value, "_torchdynamo_orig_callable", value)
    return getattr(value, "__self__", None) is module and value.__func__ is getattr(type(module), method)
