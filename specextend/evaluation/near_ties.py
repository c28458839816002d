"""How close the choice was where an answer parts from autoregressive decoding's.

In half precision a verification and a single step round differently, and where two tokens are nearly equal the target
may choose either. A gap of a rounding step or two says that this is what happened; a large one would be a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specextend.config import SamplingConfig
from specextend.decoding.sampling import Sampler, filtered
from specextend.evaluation.records import first_difference
from specextend.modeling.attention import attention
from specextend.modeling.cache import KVCache
from specextend.models.loading import LoadedModels
from specextend.trees.tree import DraftTree

BLOCK, STEP = 8192, 128  # tokens of the prompt, and of the answer, that are read at once


@torch.inference_mode()
def gap_between(
    models: LoadedModels, prompt: Tensor, one: Sequence[int], other: Sequence[int], sampling: SamplingConfig
) -> float | None:
    """How far apart the target scores the tokens with which two answers to `prompt` [N] part, in logits.

    Sampled, logits are over the temperature and hold the noise of their position, as they do where tokens are chosen.
    None where one answer is the beginning of the other.
    """
    place = first_difference(one, other)
    if place is None or place >= min(len(one), len(other)):
        return None
    known = torch.tensor(list(one[:place]), dtype=prompt.dtype, device=prompt.device)
    with models.lock():
        cache, how = KVCache(models.target.config, models.dtype, models.device), attention(hybrid=True)
        target = models.make_target(models.target, cache, how, how, BLOCK)
        logits = target.prefill(prompt, len(known))
        for block in known.split(STEP) if len(known) else ():
            logits = target.verify(DraftTree.chain(block))[-1:]
            target.commit(torch.arange(len(block), device=block.device))
    if sampling.temperature:
        noise = Sampler(sampling, 1).noise(place, place + 1, logits)
        scores = (filtered(logits, sampling) + noise)[0]
    else:
        scores = logits[0].float()
    return float((scores[one[place]] - scores[other[place]]).abs())
