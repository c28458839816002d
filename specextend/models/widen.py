"""Small models widened to the shapes of large ones without changing what they compute.

Speed must be measured at the cost of 7B weights, and no 7B weights can be had on every machine. A Llama is copied into
a wider and deeper one so that the logits stay the same: the small model's dimensions are the first of the wide one's,
further dimensions stay zero, further heads and neurons write nothing, further layers write nothing. All other weights
are random, so the hardware does all the work. So real acceptance meets real latency, with no download; say so wherever
such a number is printed.

Two corrections keep the function exact. RMSNorm averages over all D dimensions of which d are live: its weight is
multiplied by sqrt(d / D), its epsilon by d / D. And the softmax scale is that of the larger head dimension: queries are
multiplied by the square root of the ratio. A rotary pair j of the small head goes where the wide head has its
frequency, at pair j * (wide head dim / small head dim).

One spare dimension carries a small constant through the residual stream, by which vocabulary rows that the small model
does not have get a logit far below all others. What it adds to the norms' averages is taken from epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specextend.errors import ModelError
from specextend.modeling import attention
from specextend.models.checkpoints import check_memory
from specextend.models.loading import LoadedModels, choose_dtype

UNUSED = -60_000.0  # lm_head weight of unused rows on the spare dimension; finite in float16
STD = 0.02  # of the random filler


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Weights of such a model, embedding and LM head apart."""
        attention_weights = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention_weights + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


SHAPES = {
    "vicuna_7b": Shape(4096, 32, 32, 32, 128, 11008, 32000),
    "llama31_8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "vicuna_68m": Shape(768, 2, 12, 12, 64, 3072, 32000),
    "llama32_1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
}


@dataclass(frozen=True)
class WidePair:
    """Published models whose shapes a small pair can take.

    Args:
        target, draft: names in `SHAPES`.
        draft_vocab: size of the vocabulary of the EAGLE-3 head published for it.
        dtype: of the published weights; what "auto" is on a GPU.
    """

    target: str
    draft: str
    draft_vocab: int
    dtype: torch.dtype


PAIRS = {
    "vicuna_7b": WidePair("vicuna_7b", "vicuna_68m", 32000, torch.float16),
    "llama31_8b": WidePair("llama31_8b", "llama32_1b", 32000, torch.bfloat16),
}


def widened(models: LoadedModels, shape: str, *, dtype: str = "auto") -> LoadedModels:
    """Models loaded in float32, target and small draft widened to those of `PAIRS[shape]`, under names that say so.

    The tokens of greedy decoding stay the same, and so does the acceptance; the cost is that of the large models.

    Raises:
        ModelError: a model does not fit into its shape. CapacityError: memory does not hold the wide ones.
    """
    pair = PAIRS[shape]
    own = pair.dtype if models.device.type != "cpu" else torch.float32
    chosen = own if dtype == "auto" else choose_dtype(dtype, models.target.config, models.device)
    needed = SHAPES[pair.target].parameters + (SHAPES[pair.draft].parameters if models.draft is not None else 0)
    check_memory(f"{models.name} widened to {shape}", needed * chosen.itemsize, chosen, models.device)

    def wide(model: PreTrainedModel, name: str, seed: int) -> PreTrainedModel:
        try:
            with torch.inference_mode():
                return widen(model, SHAPES[name], dtype=chosen, device=models.device, seed=seed)
        except ValueError as error:
            raise ModelError(f"{models.name} cannot be widened to {name}: {error}") from error

    small_draft = isinstance(models.draft, PreTrainedModel)
    return replace(
        models,
        name=f"{models.name} widened to {shape}",
        target=wide(models.target, pair.target, 0),
        draft=wide(models.draft, pair.draft, 1) if small_draft else models.draft,
        target_id=f"{models.target_id} widened to {pair.target}",
        draft_id=f"{models.draft_id} widened to {pair.draft}" if small_draft else models.draft_id,
        dtype=chosen,
        vocab_size=SHAPES[pair.target].vocab,
    )


def widen(
    model: PreTrainedModel, shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama of `shape` with the logits of `model` on its vocabulary, made on `device`.

    Raises:
        ValueError: the shape is too small, or its head dim no multiple of the model's.
    """
    small = model.config
    _check_fits(small, shape)
    wide = _empty(_wide_config(small, shape), dtype, device)
    _fill(wide, seed)
    live = live_layers(small.num_hidden_layers, shape.layers)
    spare, constant = small.hidden_size, spare_constant(small)

    embedding = wide.model.embed_tokens.weight
    embedding.zero_()
    _place(embedding, model.get_input_embeddings().weight)
    embedding[:, spare] = constant
    for index, layer in enumerate(wide.model.layers):
        if index in live:
            widen_layer(layer, model.model.layers[live.index(index)], small)
        else:
            silence(layer)
    widen_norm(wide.model.norm, model.model.norm)
    wide.model.norm.weight[spare] = 1.0
    widen_readout(wide.lm_head, model.get_output_embeddings().weight, spare)
    return wide


def live_layers(small: int, wide: int) -> list[int]:
    """Where the small model's layers go, evenly spread over the wide model's."""
    return [round(layer * (wide - 1) / max(1, small - 1)) for layer in range(small)]


def spare_constant(small: LlamaConfig) -> float:
    """What the spare dimension holds: its square takes half of what epsilon adds."""
    return (small.rms_norm_eps * small.hidden_size / 2) ** 0.5


def wide_epsilon(small: LlamaConfig, hidden: int) -> float:
    """Epsilon of a norm over `hidden` dimensions, the spare one's share taken off."""
    return small.rms_norm_eps * small.hidden_size / 2 / hidden


def widen_layer(wide: nn.Module, small: nn.Module, config: LlamaConfig) -> None:
    """Copy a transformer block with its norms into a wide block filled at random."""
    widen_norm(wide.input_layernorm, small.input_layernorm)
    widen_norm(wide.post_attention_layernorm, small.post_attention_layernorm)
    widen_attention(wide.self_attn, small.self_attn, config)
    widen_mlp(wide.mlp, small.mlp)


def widen_norm(wide: nn.Module, small: nn.Module) -> None:
    """The small norm's weights times sqrt(d / D); further dimensions, the spare one too, come out as zero."""
    live, total = len(small.weight), len(wide.weight)
    wide.weight.zero_()
    wide.weight[:live] = small.weight.to(wide.weight) * (live / total) ** 0.5


def widen_attention(wide: nn.Module, small: nn.Module, config: LlamaConfig, blocks: int = 1) -> None:
    """Copy the heads: KV head h to KV head h, its queries to the first of the wide group; others write nothing.

    Args:
        blocks: vectors of hidden size that the projections read side by side (EAGLE-3: two).
    """
    small_dim, wide_dim = small.head_dim, wide.head_dim
    ratio = wide_dim // small_dim
    pairs = ratio * torch.arange(small_dim // 2, device=wide.q_proj.weight.device)
    rotary = torch.cat((pairs, pairs + wide_dim // 2))  # rows of a wide head that hold the small head's
    queries_of = _query_heads(small, wide)
    q, k, v = (projection.weight.unflatten(0, (-1, wide_dim)) for projection in (wide.q_proj, wide.k_proj, wide.v_proj))
    small_q, small_k, small_v = (
        projection.weight.unflatten(0, (-1, small_dim)) for projection in (small.q_proj, small.k_proj, small.v_proj)
    )
    output, small_output = wide.o_proj.weight, small.o_proj.weight
    output.zero_()
    columns, small_columns = output.unflatten(1, (-1, wide_dim)), small_output.unflatten(1, (-1, small_dim))
    for head, place in enumerate(queries_of):
        q[place] = 0.0  # also where keys are random
        _place_rows(q[place], rotary, small_q[head] * ratio**0.5, blocks)
        columns[: len(small_output), place, :small_dim] = small_columns[:, head].to(output)
    for head in range(len(small_k)):
        _place_rows(k[head], rotary, small_k[head], blocks)
        _place_rows(v[head], torch.arange(small_dim, device=rotary.device), small_v[head], blocks)


def widen_mlp(wide: nn.Module, small: nn.Module) -> None:
    _place(wide.gate_proj.weight, small.gate_proj.weight)
    _place(wide.up_proj.weight, small.up_proj.weight)
    wide.down_proj.weight.zero_()
    _place(wide.down_proj.weight, small.down_proj.weight)


def widen_readout(wide: nn.Linear, small: Tensor, spare: int) -> None:
    """LM head whose rows beyond the small vocabulary read the spare dimension alone, and from it `UNUSED`."""
    wide.weight.zero_()
    _place(wide.weight, small)
    wide.weight[len(small) :, spare] = UNUSED


def silence(layer: nn.Module) -> None:
    """A block that runs and adds nothing."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def _query_heads(small: nn.Module, wide: nn.Module) -> list[int]:
    """Wide query head of every small query head, so that both use KV heads of the same index."""
    small_group, wide_group = small.num_key_value_groups, wide.num_key_value_groups
    heads = small.q_proj.out_features // small.head_dim
    return [head // small_group * wide_group + head % small_group for head in range(heads)]


def _place(wide: Tensor, small: Tensor) -> None:
    """Copy a matrix into the corner of a wider one; the rest stays."""
    wide[: small.shape[0], : small.shape[1]] = small.to(wide)


def _place_rows(wide: Tensor, rows: Tensor, small: Tensor, blocks: int) -> None:
    """Copy `small` [n, blocks * d] into `rows` [n] of `wide` [N, blocks * D], block by block."""
    for wide_block, small_block in zip(wide.chunk(blocks, 1), small.chunk(blocks, 1), strict=True):
        wide_block[rows, : small_block.shape[1]] = small_block.to(wide_block)


def _check_fits(small: LlamaConfig, shape: Shape) -> None:
    head_dim = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
    group = small.num_attention_heads // small.num_key_value_heads
    wanted = {
        "hidden": (shape.hidden, small.hidden_size + 1),  # one to spare
        "layers": (shape.layers, small.num_hidden_layers),
        "kv_heads": (shape.kv_heads, small.num_key_value_heads),
        "heads per KV head": (shape.heads // shape.kv_heads, group),
        "ffn": (shape.ffn, small.intermediate_size),
        "vocab": (shape.vocab, small.vocab_size),
    }
    if small.model_type != "llama" or small.attention_bias or small.mlp_bias or small.hidden_act != "silu":
        raise ValueError(f"only a plain Llama can be widened, not a {small.model_type} with these layers")
    short = [f"{name} {there} of {needed}" for name, (there, needed) in wanted.items() if there < needed]
    if short or shape.head_dim % head_dim:
        short += [f"head dim {shape.head_dim} for {head_dim}"] * bool(shape.head_dim % head_dim)
        raise ValueError(f"the model does not fit into the shape: {', '.join(short)}")


def _wide_config(small: LlamaConfig, shape: Shape) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        rms_norm_eps=wide_epsilon(small, shape.hidden),
        max_position_embeddings=small.max_position_embeddings,
        rope_parameters=dict(small.rope_parameters),
        tie_word_embeddings=False,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
    )
    config._attn_implementation = attention.NAME
    return config


def _empty(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model without initial values, its rotary tables computed."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


def _fill(model: nn.Module, seed: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, STD, generator=generator)
        else:
            weight.fill_(1.0)
