"""A draft's first weights, cut out of its target: fewer tokens of distillation for the same agreement.

The residual stream is projected on the principal directions of the target's embedding; each draft layer takes one
target layer's heads and neurons that write most. What an induction head needs (a layer that looks at the previous
token, a later one that looks for the current one) is then there from the start.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


@torch.no_grad()
def start_from_target(draft: LlamaForCausalLM, target: LlamaForCausalLM, source_layers: list[int]) -> None:
    """Overwrite the weights of `draft` by a projection of `target`; draft layer i comes from `source_layers[i]`."""
    embedding = target.model.embed_tokens.weight.float()
    basis = torch.linalg.svd(embedding, full_matrices=False).Vh[: draft.config.hidden_size].T  # [hidden_t, hidden_d]
    draft.model.embed_tokens.weight.copy_(embedding @ basis)
    draft.model.norm.weight.fill_(target.model.norm.weight.float().square().mean().sqrt())
    for layer, source in zip(draft.model.layers, source_layers, strict=True):
        _project_attention(layer, target.model.layers[source], basis)
        _project_mlp(layer, target.model.layers[source], basis)


def _project_attention(layer: torch.nn.Module, source: torch.nn.Module, basis: Tensor) -> None:
    """The heads whose outputs weigh most; RMSNorm's weight goes into the matrices behind it."""
    attention, dim = source.self_attn, source.self_attn.head_dim
    out = attention.o_proj.weight.unflatten(1, (-1, dim))  # [hidden_t, heads, D]
    heads = out.norm(dim=(0, 2)).topk(layer.self_attn.o_proj.in_features // dim).indices.sort().values
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight * source.input_layernorm.weight
        getattr(layer.self_attn, name).weight.copy_(weight.unflatten(0, (-1, dim))[heads].flatten(0, 1) @ basis)
    layer.self_attn.o_proj.weight.copy_(basis.T @ out[:, heads].flatten(1))


def _project_mlp(layer: torch.nn.Module, source: torch.nn.Module, basis: Tensor) -> None:
    """The neurons with the largest product of in- and output weights."""
    mlp = source.mlp
    size = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1)
    neurons = size.topk(layer.mlp.down_proj.in_features).indices
    for name in ("gate_proj", "up_proj"):
        weight = getattr(mlp, name).weight[neurons] * source.post_attention_layernorm.weight
        getattr(layer.mlp, name).weight.copy_(weight @ basis)
    layer.mlp.down_proj.weight.copy_(basis.T @ mlp.down_proj.weight[:, neurons])
