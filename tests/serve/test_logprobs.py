"""Log-probabilities are the target's own: against transformers' forward pass, whole, streamed and of the prompt."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from serving import PROMPT, request  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import specextend  # noqa: E402
from specextend.decoding.scoring import score  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    """ids -> log-probabilities [N - 1, V] of what follows each."""
    model = AutoModelForCausalLM.from_pretrained(specextend.PRESETS["bundled"].target, dtype=torch.float32)

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    return logprobs


def own(table: torch.Tensor, ids: list[int]) -> list[float]:
    return table[torch.arange(len(table)), ids[1:]].tolist()


def test_scores_of_a_given_text_are_those_of_a_forward_pass(bundled_engine, reference):
    ids = bundled_engine.encode(PROMPT * 40)  # more than a block
    table = reference(ids.tolist())
    scores = score(bundled_engine.models, ids, 3)
    assert scores[0].logprob is None and [one.token for one in scores] == ids.tolist()
    assert [one.logprob for one in scores[1:]] == pytest.approx(own(table, ids.tolist()), abs=1e-3)
    assert [[token for token, _ in one.top] for one in scores[1:]] == table.topk(3).indices.tolist()


@pytest.mark.parametrize("changes", [{}, {"temperature": 1, "seed": 3, "presence_penalty": 1.5}], ids=str)
def test_answer_tells_the_targets_probabilities_before_temperature_and_penalties(
    changes, server, bundled_engine, reference
):
    body = request(max_tokens=12, logprobs=2) | changes
    choice = server.client().completions.create(**body).choices[0]
    assert choice.text == server.post(body | {"logprobs": None}).json()["choices"][0]["text"], "undisturbed"
    logprobs, tokenizer = choice.logprobs, bundled_engine.models.tokenizer
    assert "".join(logprobs.tokens) == choice.text and len(logprobs.tokens) == 12
    ids = bundled_engine.encode(PROMPT).tolist()
    answer = tokenizer(choice.text, add_special_tokens=False).input_ids
    if len(answer) == 12:  # what was written is what would be read
        table = reference(ids + answer)[len(ids) - 1 :]
        expected = table[torch.arange(12), answer].tolist()
        assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 2 <= len(top) <= 3 and top[token] == value and max(top.values()) <= 0
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_stream_tells_what_the_whole_tells(server):
    body = request(max_tokens=12, logprobs=1)
    whole = server.client().completions.create(**body).choices[0].logprobs
    chunks = list(server.client().completions.create(**body, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert sum((getattr(part, name) for part in parts), []) == getattr(whole, name)


def test_chat_tells_tokens_their_bytes_and_alternatives(server):
    body = {"model": "bundled", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0}
    client = server.client()
    choice = client.chat.completions.create(**body, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content and len(content) == 6
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the best"
    plain = client.chat.completions.create(**body, logprobs=True).choices[0].logprobs.content
    assert [entry.logprob for entry in plain] == [entry.logprob for entry in content]
    assert plain[0].top_logprobs == []
    with pytest.raises(openai.BadRequestError, match="needs logprobs"):
        client.chat.completions.create(**body, top_logprobs=2)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_likelihood_of_a_continuation_as_lm_eval_asks_for_it(new_tokens, server, bundled_engine, reference):
    """Prompts as ids, echoed; per prompt the sum over the continuation, and whether it is the greedy one."""
    context = bundled_engine.encode(PROMPT).tolist()
    greedy = bundled_engine.generate(PROMPT, 5).token_ids
    other = bundled_engine.encode(" horses and men").tolist()
    prompts = [context + greedy, context + other]
    body = request(prompt=prompts, max_tokens=new_tokens, logprobs=1, echo=True, seed=1234)
    answer = server.post(body).json()
    assert answer["usage"]["completion_tokens"] == 2 * new_tokens
    for index, (ids, is_greedy) in enumerate(zip(prompts, (True, False), strict=True)):
        choice = answer["choices"][index]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + new_tokens and logprobs["token_logprobs"][0] is None
        where = slice(len(context), len(ids))
        expected = own(reference(ids), ids)[len(context) - 1 :]
        assert logprobs["token_logprobs"][where] == pytest.approx(expected, abs=1e-3)
        pairs = zip(logprobs["token_logprobs"][where], logprobs["top_logprobs"][where], strict=True)
        assert all(value == max(top.values()) for value, top in pairs) == is_greedy
        assert choice["text"].startswith(bundled_engine.models.tokenizer.decode(ids))


def test_echo_stands_before_the_answer(server):
    answer = server.post(request(max_tokens=4)).json()["choices"][0]["text"]
    assert server.post(request(max_tokens=4, echo=True)).json()["choices"][0]["text"] == PROMPT + answer
    chunks = server.client().completions.create(**request(max_tokens=4), echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + answer
    assert server.post(request(max_tokens=0, echo=True)).json()["choices"][0]["finish_reason"] == "length"


def test_tokenizer_tells_of_itself(server, bundled_engine):
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and info["chat_template"] is None
    tokens = server.post({"prompt": PROMPT, "add_special_tokens": False}, "/tokenize").json()["tokens"]
    assert tokens == bundled_engine.encode(PROMPT).tolist()[-len(tokens) :]
    assert server.post({"tokens": tokens}, "/detokenize").json() == {"prompt": PROMPT}
    assert server.post({"tokens": [8192]}, "/detokenize").json()["error"]["param"] == "tokens"
    assert server.post({"prompt": 5}, "/tokenize").json()["error"]["param"] == "prompt"
