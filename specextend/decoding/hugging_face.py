"""Hugging Face's `generate` with eager attention, in our harness: the baseline that needs no code of ours."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from specextend.decoding.output import Output, Round
from specextend.modeling.packed import PackedLinear
from specextend.modeling.rope import DynamicRope
from specextend.trees.tree import DraftTree


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` as transformers runs it: eager attention, plain linear layers; shares every weight it can."""
    weights = {id(weight): weight for weight in model.parameters()}
    unpacked = {id(layer): layer.unpacked() for layer in model.modules() if isinstance(layer, PackedLinear)}
    twin = copy.deepcopy(model, weights | unpacked)
    twin.set_attn_implementation("eager")
    twin.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return twin


class HuggingFace:
    """transformers' own `generate` in our harness; it decodes by a loop of its own and tells of it at its end."""

    name = "eager"

    def __init__(self, model: PreTrainedModel):
        self._twin = plain_twin(model)

    @torch.inference_mode()
    def decode(self, output: Output) -> Iterator[Round | None]:
        """Extend the prompt of `output` by `model.generate`."""
        prompt, rotary = output.prompt, self._twin.get_decoder().rotary_emb
        if isinstance(rotary, DynamicRope):
            rotary.prompt_length = len(prompt)
        listener = _Listener(output)
        self._twin.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=output.max_new_tokens,
            logits_processor=[listener],
            stopping_criteria=[_Done(output)],
        )
        yield None
        yield from output.rounds


class _Listener(LogitsProcessor):
    """Chooses each token as our loop does, and notes it and its time as a round."""

    def __init__(self, output: Output):
        self._output, self._root = output, DraftTree.root(output.prompt[-1])
        self._began = self._now()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] that leave `generate` no other token."""
        output = self._output
        token = output.choose(scores, self._root, output.new_tokens)
        seconds = self._now() - self._began
        if output.new_tokens:
            output.append(0, [int(token)], {"verify": seconds})
        else:
            output.prefill_seconds = {"target": seconds}
            output.begin(token[0])
        self._began = self._now()
        return torch.full_like(scores, float("-inf")).scatter(1, token[None], 0.0)

    def _now(self) -> float:
        if self._output.prompt.is_cuda:
            torch.cuda.synchronize(self._output.prompt.device)
        return time.perf_counter()


class _Done(StoppingCriteria):
    def __init__(self, output: Output):
        self._output = output

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((1,), self._output.finished, device=input_ids.device)
