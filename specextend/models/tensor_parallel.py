"""A target too large for one device: tensor parallelism over the processes that torchrun starts (docs/scale.md).

transformers shards an unmodified model; each process ("rank") has some of the heads and of the neurons. This module
owns what that leaves to do: the process group, caches for the local heads, the attention row as a mean over all ranks'
heads, and the check that ranks agree. Hidden states and logits are the same on every rank, the draft and the noise of
sampling are replicated, so every rank takes the same decisions without being told; only rank 0 speaks.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from specextend.errors import ConfigError, DeviceError, ModelError
from specextend.modeling.blocks import OnBlock
from specextend.modeling.cache import cache_shape
from specextend.modeling.target import Target
from specextend.models.checkpoints import load_causal_lm
from specextend.trees.tree import DraftTree

PATIENCE = timedelta(hours=2)  # of a rank that waits, while another loads weights or rank 0 prepares data


@dataclass(frozen=True)
class Ranks:
    """The processes that share a target, seen from one of them.

    Args:
        check: whether trees and logits are compared in every round, for debugging.
    """

    rank: int
    count: int
    device: torch.device
    check: bool = False

    @property
    def make_target(self) -> Callable[..., Target]:
        """What stands in for `Target`."""
        return partial(CheckedTarget if self.check else ShardedTarget, ranks=self)

    def load(self, directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """This rank's share of a model; its `config` gives the heads of the share, for caches made after it.

        Its linear layers hold plain tensors: unwrapping a DTensor in every call would cost more than a small product.
        """
        sharding = DistributedConfig(tp_size=self.count, tp_plan=self.plan(directory, config))
        model = load_causal_lm(directory, config, dtype=dtype, device=self.device, sharding=sharding)
        for module in model.modules():
            if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
                module.weight = nn.Parameter(module.weight.to_local(), requires_grad=False)
        model.config = self.local(config)
        return model

    def plan(self, name: object, config: PreTrainedConfig) -> dict[str, str]:
        """How transformers is to shard the model: its own plan, embedding and readout whole where they do not split.

        Raises:
            ModelError: heads or neurons are no multiple of the ranks.
        """
        sizes = {
            "attention heads": config.num_attention_heads,
            "KV heads": cache_shape(config)[1],
            "neurons per layer": config.intermediate_size,
        }
        odd = [f"{size} {what}" for what, size in sizes.items() if size % self.count]
        if odd:
            fitting = [n for n in range(1, self.count) if not any(size % n for size in sizes.values())]
            raise ModelError(
                f"{name} has {' and '.join(odd)}, which {self.count} ranks cannot share evenly; "
                f"run with --nproc_per_node {' or '.join(map(str, fitting))}"
            )
        plan = {f"model.{layers}": style for layers, style in config.base_model_tp_plan.items()}
        if config.vocab_size % self.count:
            return {layers: style for layers, style in plan.items() if layers != "model.embed_tokens"}
        return plan | {"lm_head": "colwise_gather_output"}

    def local(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """`config` with the heads that one rank has."""
        _, kv_heads, head_dim = cache_shape(config)
        share = copy.deepcopy(config)
        share.num_attention_heads = config.num_attention_heads // self.count
        share.num_key_value_heads, share.head_dim = kv_heads // self.count, head_dim
        return share

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the ranks' tensors, the same on all of them; writes over `tensor`."""
        dist.all_reduce(tensor)
        return tensor.div_(self.count)

    def require_equal(self, what: str, *tensors: Tensor) -> None:
        """AssertionError on every rank if the bytes of `tensors` differ between ranks."""
        mine = torch.stack([_hash(tensor) for tensor in tensors])
        most = torch.cat((mine, -mine))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        same = torch.equal(most[: len(mine)], -most[len(mine) :])
        assert same, f"ranks disagree on the {what}: their drafts or generators are not the same"


def _hash(tensor: Tensor) -> Tensor:
    """A number [] that depends on every byte and its place; int64, wrapping."""
    content = tensor.contiguous().flatten().view(torch.uint8).long()
    places = torch.arange(1, len(content) + 1, device=tensor.device)
    return ((content + 1) * (places * 0x9E3779B1 % 0x7FFFFFFF)).sum()


class ShardedTarget(Target):
    """The target of one rank: its cache and its queries are those of the local heads."""

    def __init__(self, *parts: Any, ranks: Ranks, **options: Any):
        super().__init__(*parts, **options)
        self._ranks = ranks

    def attention_row(self) -> Tensor:
        """Last-layer attention [N] of the newest committed token, mean over the heads of all ranks, float32."""
        return self._ranks.mean(super().attention_row())


class CheckedTarget(ShardedTarget):
    """One that stops as soon as ranks part."""

    def prefill(self, prompt: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None) -> Tensor:
        self._ranks.require_equal("prompt", prompt)
        logits = super().prefill(prompt, extra_slots, known, on_block)
        self._ranks.require_equal("prompt's logits", logits)
        return logits

    def verify(self, tree: DraftTree) -> Tensor:
        self._ranks.require_equal("draft tree", tree.tokens, tree.parents)
        logits = super().verify(tree)
        self._ranks.require_equal("logits", logits)
        return logits


def join(device: str = "auto", *, check: bool = False) -> Ranks:
    """Meet the other processes of this torchrun, once; all but rank 0 fall silent.

    Args:
        device: "auto" or "cuda" is the GPU of this process's local rank, "cpu" has the ranks share the cores.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"--tensor_parallel needs a process per device; run: torchrun --nproc_per_node 2 {Path(sys.argv[0]).name} …"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("--tensor_parallel needs accelerate, which transformers shards with; pip install accelerate")
    local = int(os.environ["LOCAL_RANK"])
    place = _place(device, local)
    if not dist.is_initialized():
        cuda = place.type == "cuda"
        if cuda:
            torch.cuda.set_device(place)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, device_id=place if cuda else None, timeout=PATIENCE)
    if not speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return Ranks(dist.get_rank(), dist.get_world_size(), place, check)


def speaks() -> bool:
    """Whether this process prints and writes: it is alone, or the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def leave() -> None:
    """Part from the other processes, after work that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _place(device: str, local: int) -> torch.device:
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"device is {device!r} with --tensor_parallel, where each rank has its own GPU; use cuda or cpu"
        )
    gpus = torch.cuda.device_count()
    if device == "cpu" or device == "auto" and not gpus:
        return torch.device("cpu")
    if local >= gpus:
        raise DeviceError(f"rank {local} of this host has no GPU: there are {gpus}; run with --nproc_per_node {gpus}")
    return torch.device("cuda", local)
