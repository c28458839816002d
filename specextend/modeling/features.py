"""Hidden states of the target that a draft reads, taken out of the target's own forward pass (EAGLE drafts)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


class FeatureTap:
    """Collects hidden states while the target runs inside it (`with tap:`), until they are taken.

    Args:
        entering: layers whose input (the residual stream) is read, concatenated in this order; a number of layers
            L is what enters the final norm. None: what leaves the final norm.
    """

    def __init__(self, model: PreTrainedModel, entering: Sequence[int] | None):
        decoder = model.get_decoder()
        self.entering = entering
        self._norm = decoder.norm
        self._modules = None if entering is None else [[*decoder.layers, decoder.norm][layer] for layer in entering]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._runs: list[Tensor] = []
        self._parts: list[Tensor] = []

    def __enter__(self) -> None:
        if self._modules is None:
            self._handles = [self._norm.register_forward_hook(lambda module, inputs, output: self._keep(output))]
        else:
            self._handles = [
                module.register_forward_pre_hook(lambda module, inputs: self._keep(inputs[0]))
                for module in self._modules
            ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._parts:
            self._runs.append(torch.cat(self._parts, dim=-1))
            self._parts = []

    def collect(self, parts: Sequence[Tensor]) -> None:
        """Take hidden states [T, H] of a run that no module saw: what the hooks would have kept of it."""
        self._runs.append(torch.cat(parts, dim=-1))

    def clear(self) -> None:
        """Forget what nobody took."""
        self._runs = []

    def take(self) -> Tensor:
        """Features [T, F] of all tokens run since the last `take`, in order; they are forgotten here."""
        features = self._runs[0] if len(self._runs) == 1 else torch.cat(self._runs)
        self._runs = []
        return features

    def _keep(self, hidden: Tensor) -> None:
        self._parts.append(hidden[0])
