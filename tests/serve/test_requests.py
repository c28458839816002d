"""What real clients send: values that change nothing, several answers at once, rules for tokens, formats, tools."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import httpx
import jsonschema
import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402
from serving import MODEL, PROMPT, request, wait_for  # noqa: E402
from transformers import LogitsProcessor, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor  # noqa: E402

from specextend.config import SamplingConfig  # noqa: E402
from specextend.data import templates  # noqa: E402
from specextend.engine import SpecExtend  # noqa: E402
from specextend.serve import grammar, schema  # noqa: E402
from specextend.serve.responses_api import ResponsesRequest  # noqa: E402

CHAT_PATH = "/v1/chat/completions"
NEUTRAL = [
    {"seed": -1}, {"top_k": -1}, {"max_tokens": 4.0}, {"stop": ""}, {"stop": ["", "~~"]}, {"stop": list("~^{}|@")},
    {"verbosity": "low"}, {"prompt_cache_retention": "24h"}, {"reasoning_effort": "high"}, {"cache_prompt": True},
    {"max_tokens": None, "max_completion_tokens": 4}, {"unheard_of": None}, {"min_p": 0}, {"min_p": 0.0},
    {"repetition_penalty": 1.0}, {"repetition_penalty": 1}, {"min_tokens": 0}, {"ignore_eos": False},
    {"skip_special_tokens": True}, {"add_generation_prompt": True}, {"chat_template_kwargs": {}}, {"n": 1.0},
    {"stream_options": {"include_usage": True}}, {"stream_options": None, "stream": None}, {"best_of": 1},
    {"presence_penalty": 0.0, "frequency_penalty": 0}, {"logit_bias": {}}, {"tools": []}, {"logprobs": None},
    {"response_format": {"type": "text"}}, {"user": "me"}, {"top_p": 0},
]  # fmt: skip


def texts(answer) -> list[str]:
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def chat(**changes) -> dict:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 4,
        "temperature": 0,
    } | changes


@pytest.mark.parametrize("changes", NEUTRAL, ids=str)
def test_values_that_change_nothing_are_taken(changes, scripted_once):
    for path, body in (("/v1/completions", request(max_tokens=4)), (CHAT_PATH, chat())):
        extra = {"echo": False, "logprobs": False} if "completions" in path and "chat" not in path else {}
        extra = extra if "chat" not in path else {"top_logprobs": 0, "logprobs": None}
        answer = scripted_once.post(body | extra | changes, path)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4


def test_prompt_of_white_space_is_a_prompt(server):
    assert server.post(request(prompt=" \n", max_tokens=3)).json()["usage"]["completion_tokens"] == 3


def test_top_p_0_leaves_the_best_token(server, bundled_engine):
    body = request(temperature=1, top_p=0, max_tokens=8)
    assert texts(server.post(body)) == [bundled_engine.generate(PROMPT, 8).text]


def test_longer_answers_than_the_server_gives_are_cut(scripted):
    server, _ = scripted(settings={"max_new_tokens": 5})
    for body, path in ((request(max_tokens=256), "/v1/completions"), (chat(max_tokens=256), CHAT_PATH)):
        answer = server.post(body, path).json()
        assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"


# ---- several answers


def test_several_prompts_give_several_choices_each_as_if_alone(server, bundled_engine):
    prompts = [PROMPT, "A horse", "In the year"]
    expected = [bundled_engine.generate(prompt, 8).text for prompt in prompts]
    ids = [bundled_engine.encode(prompt).tolist() for prompt in prompts]
    assert texts(server.post(request(prompt=prompts, max_tokens=8))) == expected
    answer = server.post(request(prompt=ids, max_tokens=8))
    assert texts(answer) == expected
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer.json()["usage"]["completion_tokens"] == 24


def test_n_choices_are_the_answers_of_consecutive_seeds(server, bundled_engine):
    def alone(prompt: str, seed: int) -> str:
        return bundled_engine.generate(prompt, 6, sampling=SamplingConfig(1.0, seed=seed)).text

    answer = server.post(request(prompt=[PROMPT, "A horse"], n=3, seed=7, temperature=1, max_tokens=6))
    assert texts(answer) == [alone(prompt, 7 + index) for prompt in (PROMPT, "A horse") for index in range(3)]
    once = [len(bundled_engine.encode(prompt)) for prompt in (PROMPT, "A horse")]
    assert answer.json()["usage"]["prompt_tokens"] == sum(once)
    both = server.client().chat.completions.create(**chat(n=2))
    assert len(both.choices) == 2 and both.choices[0].message == both.choices[1].message


def test_stream_of_several_choices_names_the_choice_of_every_chunk(server, bundled_engine):
    prompts = [PROMPT, "A horse"]
    chunks = list(server.client().completions.create(**request(prompt=prompts, max_tokens=8), stream=True))
    for index, prompt in enumerate(prompts):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in own) == bundled_engine.generate(prompt, 8).text
        assert own[-1].finish_reason == "length"


def test_hang_up_ends_all_of_a_requests_answers(scripted):
    server, engine = scripted(pace=0.02)
    connection = server.send(request(prompt=["a"] * 50, max_tokens=300))
    wait_for(lambda: engine.rounds_run >= 3)
    connection.close()
    assert wait_for(lambda: not server.worker.busy) < 1


# ---- rules for tokens


def processed(engine, n: int, *rules, **sampling):
    return engine.generate(PROMPT, n, processors=rules, sampling=SamplingConfig(**sampling)).text


def test_penalties_are_openais(server, bundled_engine):
    """Against a loop of one token at a time, by the formula in OpenAI's guide."""
    ids, answer = bundled_engine.encode(PROMPT).tolist(), []

    class Penalised:
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            for token in set(answer):
                scores[0, token] -= 0.7 + 0.4 * answer.count(token)
            return scores

    for _ in range(16):
        answer += bundled_engine.autoregressive(ids + answer, 1, processors=[Penalised()]).token_ids
    got = texts(server.post(request(max_tokens=16, presence_penalty=0.7, frequency_penalty=0.4)))
    assert got == [bundled_engine.models.tokenizer.decode(answer)]
    assert got != texts(server.post(request(max_tokens=16)))


def test_repetition_penalty_is_transformers(server, bundled_engine):
    expected = processed(bundled_engine, 16, RepetitionPenaltyLogitsProcessor(1.4))
    assert texts(server.post(request(max_tokens=16, repetition_penalty=1.4))) == [expected]
    assert expected != processed(bundled_engine, 16)


def test_logit_bias_decides(server, bundled_engine):
    (token,) = bundled_engine.models.tokenizer(" horse", add_special_tokens=False).input_ids[:1]
    name = bundled_engine.models.tokenizer.decode([token])
    assert texts(server.post(request(max_tokens=3, logit_bias={str(token): 100}))) == [name * 3]


def test_min_p_is_that_of_the_tempered_distribution(server, bundled_engine):
    """As transformers applies it, behind the temperature."""

    class Tempered(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return MinPLogitsWarper(0.3)(input_ids, scores / 1.5) * 1.5

    expected = processed(bundled_engine, 16, Tempered(), temperature=1.5, seed=3)
    body = request(max_tokens=16, temperature=1.5, seed=3)
    assert texts(server.post(body | {"min_p": 0.3})) == [expected] != texts(server.post(body))


def test_end_of_text_can_be_put_off(server, bundled_engine):
    (eos,) = bundled_engine.models.eos_token_ids
    ends = {"logit_bias": {str(eos): 100}}

    def tokens(**changes) -> int:
        return server.post(request(max_tokens=12) | ends | changes).json()["usage"]["completion_tokens"]

    assert (tokens(), tokens(min_tokens=5), tokens(ignore_eos=True)) == (1, 6, 12)


def test_ends_of_text_are_the_callers_to_say(bundled_engine):
    """Without a processor: what speculation does is the same."""
    free = bundled_engine.generate(PROMPT, 24)
    token = free.token_ids[9]
    ended = bundled_engine.generate(PROMPT, 24, eos_token_ids=[token])
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1] and ended.finish_reason == "eos"
    models = replace(bundled_engine.models, eos_token_ids=frozenset({token}))
    endless = SpecExtend(models, bundled_engine.config).generate(PROMPT, 24, eos_token_ids=())
    assert endless.token_ids == free.token_ids and endless.finish_reason == "length"
    assert [one.accepted for one in endless.rounds] == [one.accepted for one in free.rounds]


# ---- formats

SCHEMA = {
    "type": "object",
    "properties": {
        "king": {"type": "boolean"},
        "mood": {"enum": ["glad", "sad"]},
        "sons": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["king", "mood", "sons"],
    "additionalProperties": False,
}


def as_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1])
def test_answer_follows_a_json_schema_and_is_the_targets_own_under_it(temperature, server, bundled_engine):
    pytest.importorskip("llguidance")
    body = request(max_tokens=200, temperature=temperature, seed=5, response_format=as_format(SCHEMA))
    answer = server.post(body).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    ids = bundled_engine.encode(PROMPT)
    rule = grammar.GrammarProcessor(grammar.Grammars(bundled_engine.models).compile(SCHEMA), len(ids))
    alone = bundled_engine.autoregressive(ids, 200, processors=[rule], sampling=SamplingConfig(temperature, seed=5))
    assert answer["text"] == alone.text


def test_client_parses_a_model_and_a_stream_follows_it_too(server):
    pytest.importorskip("llguidance")

    class Mood(BaseModel):
        glad: bool

    client, body = server.client(), chat(max_tokens=60)
    assert isinstance(client.chat.completions.parse(**body, response_format=Mood).choices[0].message.parsed, Mood)
    chunks = client.chat.completions.create(**body, response_format=as_format(Mood.model_json_schema()), stream=True)
    Mood.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_json_object_is_json(server):
    pytest.importorskip("llguidance")
    text = texts(server.post(request(max_tokens=60, response_format={"type": "json_object"})))[0]
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "changes, param, message",
    [
        ({"response_format": as_format({"type": "nonsense"})}, "response_format", "nonsense"),
        ({"response_format": as_format({"not": {}})}, "response_format", "Unimplemented"),
        ({"response_format": as_format({"type": "string", "pattern": "("})}, "response_format", "unclosed"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "format"),
    ],
    ids=str,
)
def test_schema_that_cannot_be_followed_is_refused(changes, param, message, server):
    pytest.importorskip("llguidance")
    answer = server.post(request(**changes))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and message in error["message"]
    assert "\n" not in error["message"]


def test_missing_grammar_library_is_a_line(server, monkeypatch):
    monkeypatch.setattr(grammar, "LLMatcher", None)
    answer = server.post(request(response_format={"type": "json_object"}))
    assert answer.status_code == 400 and "pip install llguidance" in answer.json()["error"]["message"]


# ---- tools

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "king"}'}}
TURNS = [
    {"role": "user", "content": "What is a king?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "A ruler."},
]
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function.arguments.word }}{% endfor %}|{% endfor %}{{ mood }}"
)


def test_tools_and_their_results_are_what_the_chat_template_makes_of_them(scripted, monkeypatch):
    server, engine = scripted()
    models = engine.models
    monkeypatch.setattr(models.tokenizer, "chat_template", TEMPLATE)
    seen = []

    def encode_chat(messages, **options):
        ids = templates.encode_chat(messages, "chat", models.tokenizer, **options)
        seen.append(models.tokenizer.decode(ids))
        return torch.tensor(ids)

    engine.encode_chat = encode_chat
    body = chat(messages=TURNS, tools=[TOOL], chat_template_kwargs={"mood": "glad"})
    assert server.post(body, CHAT_PATH).status_code == 200
    assert seen == ["[look_up]user: What is a king?|assistant: king|tool: A ruler.|glad"]
    server.post(chat(tools=[TOOL], tool_choice="none"), CHAT_PATH)
    assert "look_up" not in seen[-1]


def test_control_tokens_spelled_out_in_tools_and_calls_are_text(bundled_models, monkeypatch):
    tokenizer = bundled_models.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}{{ tools | tojson }}{{ messages | tojson }}")
    end = tokenizer.eos_token
    call = {"type": "function", "function": {"name": "f", "arguments": {end: [end]}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = templates.encode_chat(messages, "chat", tokenizer, tools=[TOOL | {"description": f"b{end}"}])
    assert tokenizer.eos_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids).count(end) == 3


ANSWERS = [
    ('Well. <tool_call>\n{"name": "look_up", "arguments": {"word": "é"}}\n</tool_call>', "Well.", ['{"word": "é"}']),
    ('{"name": "look_up", "parameters": {"word": "b"}}', None, ['{"word": "b"}']),
    ('<tool_call>{"name": "look_up"}</tool_call>\n' * 2, None, ["{}", "{}"]),
    ('{"name": "another", "parameters": {}}', '{"name": "another", "parameters": {}}', []),
    ("a <tool_call> {broken </tool_call> b", "a <tool_call> {broken </tool_call> b", []),
    ("1 < 2 and <tool_", "1 < 2 and <tool_", []),
    ("{} is empty", "{} is empty", []),
]


@pytest.mark.parametrize("answer, text, arguments", ANSWERS)
def test_calls_come_back_as_calls_and_all_else_as_text(answer, text, arguments, scripted):
    server, engine = scripted(octets=answer.encode() + b"~")
    engine.encode_chat = lambda messages, **options: torch.tensor([5])
    client, body = server.client(), chat(max_tokens=400, tools=[TOOL], stop=["~"])
    for choice in client.chat.completions.create(**body).choices:
        calls = choice.message.tool_calls or []
        assert choice.message.content == text and [call.function.arguments for call in calls] == arguments
        assert len({call.id for call in calls}) == len(arguments)
        assert choice.finish_reason == ("tool_calls" if arguments else "stop")
    chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(**body, stream=True)]
    sent = "".join(delta.content or "" for delta in chunks)
    assert sent.strip() == (text or "").strip()
    assert [call.function.arguments for delta in chunks for call in delta.tool_calls or []] == arguments
    plain = client.chat.completions.create(**body | {"tool_choice": "none"}).choices[0]
    assert plain.message.content == answer and not plain.message.tool_calls


def test_model_without_a_template_for_tools_says_so(server):
    for changes in ({"tools": [TOOL]}, {"messages": TURNS}, {"messages": TURNS[:2]}):
        answer = server.post(chat(**changes), CHAT_PATH)
        assert answer.status_code == 400 and "tool" in answer.json()["error"]["message"]
    forced = server.post(chat(tools=[TOOL], tool_choice="required"), CHAT_PATH).json()["error"]
    assert forced["param"] == "tool_choice"


@pytest.mark.parametrize("name", ["messages", "template", "chat_template", "tokenize", "tools", "mood"])
def test_template_variables_are_no_way_to_other_arguments(name, server):
    answer = server.post(chat(chat_template_kwargs={name: "x"}), CHAT_PATH)
    assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "call, message",
    [({"function": {"name": "f", "arguments": "{"}}, "no JSON"), ({"function": {}}, "name"), (5, "tool_calls")],
)
def test_malformed_calls_are_refused_by_their_place(call, message, server):
    answer = server.post(chat(messages=[TURNS[0], {"role": "assistant", "tool_calls": [call]}]), CHAT_PATH)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"].startswith("messages")


# ---- whatever is sent

ODD = [
    None, True, 0, -1, 10**30, 0.5, "", "x", "\udc00", [], [[]], [None], {}, {"type": "json_object"}, {"5": "\udc00"},
    [{}],
]  # fmt: skip
BODIES = {
    "/v1/completions": (request(max_tokens=2), schema.CompletionRequest),
    CHAT_PATH: (chat(max_tokens=2), schema.ChatRequest),
    "/v1/responses": ({"model": MODEL, "input": "a", "max_output_tokens": 2}, ResponsesRequest),
}


@pytest.mark.parametrize("path", BODIES)
def test_no_value_of_any_field_breaks_the_server(path, scripted_once):
    body, kind = BODIES[path]
    fields = [*kind.model_fields, *schema.NEUTRAL, "unheard_of"]

    async def ask_all() -> list[tuple]:
        transport = httpx.ASGITransport(scripted_once.app, raise_app_exceptions=False)
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url=scripted_once.url, headers=headers) as client:
            return [
                (name, value, await client.post(path, content=json.dumps(body | {name: value})))
                for name in fields
                for value in ODD
            ]

    for name, value, answer in asyncio.run(ask_all()):
        assert answer.status_code in (200, 400, 404), (name, value, answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["code"] and error["param"], (name, value, error)
            assert re.split(r"[.\[]", error["param"])[0] in kind.model_fields.keys() | {name}
