"""Hugging Face's `generate` with eager attention, in our harness: the baseline that needs no code of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from specextend.decoding.output import Output, Round
from specextend.decoding.sampling import Chooser
from specextend.modeling.packed import PackedLinear
from specextend.modeling.rope import DynamicRope

_ROOT = torch.zeros(1, dtype=torch.long)


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` as transformers runs it: eager attention, plain linear layers; shares every weight it can."""
    weights = {id(weight): weight for weight in model.parameters()}
    unpacked = {id(layer): layer.unpacked() for layer in model.modules() if isinstance(layer, PackedLinear)}
    twin = copy.deepcopy(model, weights | unpacked)
    twin.set_attn_implementation("eager")
    twin.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return twin


@torch.inference_mode()
def hugging_face(model: PreTrainedModel, choose: Chooser, prompt: Tensor, output: Output) -> Iterator[Round | None]:
    """Extend `prompt` [N] by `model.generate`; its rounds are told at its end, since it yields nothing before."""
    rotary = model.get_decoder().rotary_emb
    if isinstance(rotary, DynamicRope):
        rotary.prompt_length = len(prompt)
    listener = _Listener(choose, output)
    model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=output.max_new_tokens,
        logits_processor=[listener],
        stopping_criteria=[listener.is_done],
    )
    yield None
    yield from output.rounds


class _Listener(LogitsProcessor):
    """Chooses each token as our loops do, and notes it and its time as a round."""

    def __init__(self, choose: Chooser, output: Output):
        self._choose, self._output = choose, output
        self._clock = ExitStack()
        self._clock.enter_context(output.prefill_stage("target"))
        self.is_done = _Done(output)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] that leave `generate` no other token."""
        token = self._choose(scores, self._output.new_tokens, _ROOT)
        self._clock.close()
        if self._output.new_tokens:
            self._output.append(0, [int(token)])
        else:
            self._output.begin(token[0])
        self._clock.enter_context(self._output.stage("verify"))
        return torch.full_like(scores, float("-inf")).scatter(1, token[None], 0.0)


class _Done(StoppingCriteria):
    def __init__(self, output: Output):
        self._output = output

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((1,), self._output.finished, device=input_ids.device)
