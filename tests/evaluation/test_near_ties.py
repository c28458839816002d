"""How close the choice was where two answers part."""

import pytest
import torch

from specextend.config import SamplingConfig
from specextend.decoding.sampling import Sampler, filtered
from specextend.evaluation.near_ties import gap_between

SAMPLINGS = [SamplingConfig(), SamplingConfig(temperature=0.7, seed=5)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("place", [0, 1, 6])
def test_the_gap_is_that_of_the_targets_scores_at_the_place_where_answers_part(
    sampling, place, make_model, make_engine, hf_twin
):
    engine = make_engine(make_model("gqa"))
    twin = hf_twin(engine.models.target)
    prompt = torch.arange(20) % 90
    answer = engine.autoregressive(prompt, 9, sampling=sampling).token_ids
    scores = twin(torch.tensor([[*prompt.tolist(), *answer[:place]]])).logits[0, -1:]
    if sampling.temperature:
        noise = Sampler(sampling, 1).noise(place, place + 1, scores)
        scores = filtered(scores, sampling) + noise
    assert int(scores.argmax()) == answer[place]
    wrong = (answer[place] + 1) % 90
    other = [*answer[:place], wrong, 3]
    gap = gap_between(engine.models, prompt, answer, other, sampling)
    assert gap == pytest.approx(float(scores[0, answer[place]] - scores[0, wrong]), rel=1e-4)
    assert gap_between(engine.models, prompt, answer, answer, sampling) is None
    assert gap_between(engine.models, prompt, answer, answer[:4], sampling) is None
    assert engine.autoregressive(prompt, 9, sampling=sampling).token_ids == answer  # nothing is disturbed
