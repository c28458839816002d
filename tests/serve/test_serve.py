"""The server, by the real `openai` client: the library's answers, whoever else asks, hangs up or sends nonsense."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from serving import MODEL, PROMPT, Scripted, Server, request, wait_for  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import specextend  # noqa: E402
from specextend.cli import flags  # noqa: E402
from specextend.config import SamplingConfig, SpecExtendConfig  # noqa: E402
from specextend.engine import SpecExtend  # noqa: E402
from specextend.errors import ConfigError, InputError  # noqa: E402
from specextend.modeling.prefixes import PrefixLimits  # noqa: E402
from specextend.serve import Settings  # noqa: E402
from specextend.serve import __main__ as serve_main  # noqa: E402
from specextend.serve.keys import read_keys  # noqa: E402
from specextend.serve.settings import check_host  # noqa: E402

ROOT = Path(__file__).parents[2]
CHAT = {"model": "bundled", "messages": [{"role": "user", "content": "Hi"}]}


# ---- the library's answers


def test_completion_is_the_librarys_answer_with_its_counts(server, bundled_engine):
    answer = server.client().completions.create(**request())
    expected = bundled_engine.generate(PROMPT, 24)
    assert answer.choices[0].text == expected.text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 24)
    assert (answer.object, answer.model) == ("text_completion", MODEL) and answer.id.startswith("cmpl-")
    ids = bundled_engine.encode(PROMPT).tolist()
    for prompt in (ids, [ids], [PROMPT]):
        assert server.client().completions.create(**request(prompt=prompt)).choices[0].text == expected.text


def test_chat_is_the_librarys_answer(server, bundled_engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a king?"}]},
    ]
    answer = server.client().chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=20, temperature=0.8, seed=4, n=1, presence_penalty=0
    )
    expected = bundled_engine.generate("Be brief.\n\nWhat is a king?", 20, sampling=SamplingConfig(0.8, seed=4))
    assert answer.choices[0].message.content == expected.text and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.usage.total_tokens == expected.prompt_tokens + 20


def test_streams_add_up_to_the_whole_and_end_with_reason_and_usage(server, bundled_engine):
    client, expected = server.client(), bundled_engine.generate(PROMPT, 24)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(**request(), **options))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert len(chunks) > 6 and len({chunk.id for chunk in chunks}) == 1

    messages = [{"role": "user", "content": PROMPT}]
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert all(chunk.usage is None for chunk in chunks)


def test_stop_strings_end_the_answer_and_stay_out_of_it(server, bundled_engine):
    text = bundled_engine.generate(PROMPT, 40).text
    stop = text[30:34]
    expected = text[: text.find(stop)]
    whole = server.client().completions.create(**request(max_tokens=40, stop=stop))
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "stop"
    chunks = list(server.client().completions.create(**request(max_tokens=40, stop=["~~", stop], stream=True)))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seed_decides_the_sample_and_none_draws_anew(server):
    def text(**options) -> str:
        return server.client().completions.create(**request(temperature=1, **options)).choices[0].text

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text() != text()


def test_three_doors_give_the_same_text(server, bundled_engine):
    """The library, transformers' generate and the server: greedy and sampled."""
    tokenizer = bundled_engine.models.tokenizer
    model = AutoModelForCausalLM.from_pretrained(specextend.PRESETS["bundled"].target, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for sampling in (SamplingConfig(), SamplingConfig(0.9, top_p=0.95, top_k=40, seed=11)):
        library = bundled_engine.generate(PROMPT, 32, sampling=sampling).text
        rules = {"do_sample": False}
        if sampling.temperature:
            rules = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
        ids = model.generate(
            **inputs, max_new_tokens=32, custom_generate=specextend.custom_generate, draft_model="bundled", **rules
        )
        drop_in = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        body = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        served = server.client().completions.create(
            **request(max_tokens=32) | body, extra_body={"top_k": sampling.top_k}
        )
        assert library == drop_in == served.choices[0].text


def test_32_clients_at_once_each_get_the_answer_given_alone(server, bundled_engine):
    text = (ROOT / "README.md").read_text()
    prompts = [text[40 * index : 40 * index + 60 + 20 * index] for index in range(32)]
    samplings = [SamplingConfig(0.8 * (index % 2), seed=index) for index in range(32)]

    async def ask(client, index: int) -> str:
        create, options = client.completions.create, {"seed": index, "temperature": 0.8 * (index % 2)}
        answer = await create(**request(prompt=prompts[index], max_tokens=8) | options, stream=index % 3 == 0)
        if index % 3:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def ask_all() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, index) for index in range(32)))

    alone = [
        bundled_engine.generate(*pair, sampling=rule).text
        for *pair, rule in zip(prompts, [8] * 32, samplings, strict=True)
    ]
    assert asyncio.run(ask_all()) == alone


def test_characters_split_over_rounds_arrive_whole(scripted):
    text = "aé🙂b🙂🙂é…z"
    for per_round in (1, 2, 3):
        server, _ = scripted(octets=text.encode(), per_round=per_round)
        chunks = list(server.client().completions.create(**request(max_tokens=100), stream=True))
        pieces = [chunk.choices[0].text for chunk in chunks]
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        assert sum(map(bool, pieces)) > 3


# ---- who waits, who goes


def hang_up_and_time(server: Server, engine: Scripted, connection: socket.socket) -> tuple[float, int]:
    """Seconds and rounds from hanging up until the engine is free."""
    before = engine.rounds_run
    connection.close()
    return wait_for(lambda: not server.worker.busy), engine.rounds_run - before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_client_that_hangs_up_frees_the_engine_within_a_round(stream, path, scripted):
    server, engine = scripted(pace=0.1)
    body = request(max_tokens=400, stream=stream)
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    connection = server.send(body, path)
    wait_for(lambda: engine.rounds_run >= 3)
    seconds, rounds = hang_up_and_time(server, engine, connection)
    assert rounds <= 1 and seconds < 0.5
    assert server.client().completions.create(**request(max_tokens=4)).choices[0].text == "xxxx"
    wait_for(lambda: server.metric("requests_total", status="200" if stream else "499") >= 1)


def test_client_that_hangs_up_while_it_waits_leaves_the_queue_at_once(scripted):
    server, engine = scripted(pace=0.05)
    running = server.send(request(max_tokens=200, stream=True))
    wait_for(lambda: server.worker.busy)
    waiting = [server.send(request(max_tokens=300, stream=stream)) for stream in (True, False)]
    wait_for(lambda: server.metric("queue_length") == 2)
    for connection in waiting:
        connection.close()
    assert wait_for(lambda: server.metric("queue_length") == 0) < 1
    assert server.worker.busy, "the one that ran was not disturbed"
    hang_up_and_time(server, engine, running)
    wait_for(lambda: server.metric("requests_total", status="499") == 2)


def test_real_engine_serves_the_next_after_many_hang_ups(server, bundled_engine):
    for stream in (True, False, True):
        connection = server.send(request(max_tokens=2000, stream=stream))
        wait_for(lambda: server.worker.busy)
        time.sleep(0.1)
        connection.close()
        assert wait_for(lambda: not server.worker.busy) < 3
    expected = bundled_engine.generate(PROMPT, 24).text
    assert server.client().completions.create(**request()).choices[0].text == expected


def blocks_of_one_token(models, read: list[int], pace: float = 0.03) -> SpecExtend:
    """An engine that reads a prompt token by token, slowly, and notes how far it is."""
    engine = SpecExtend(models, SpecExtendConfig.specextend(prefill_block=1), prefix_reuse=PrefixLimits(worth=4))
    generate = engine.generate

    def slow(*args, on_block, **options):
        def noted(part: str, tokens: int) -> None:
            read.append(tokens)
            time.sleep(pace)
            on_block(part, tokens)

        return generate(*args, on_block=noted, **options)

    engine.generate = slow
    return engine


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_hangs_up_during_the_prefill_frees_the_engine_at_the_next_block(
    stream, bundled_models, bundled_engine
):
    read: list[int] = []
    body = request(prompt=PROMPT * 20, max_tokens=3)
    with Server(blocks_of_one_token(bundled_models, read)) as server:
        connection = server.send(body | {"stream": stream})
        wait_for(lambda: len(read) >= 3)
        connection.close()
        assert wait_for(lambda: not server.worker.busy) < 2 and len(read) < 60
        wait_for(lambda: server.metric("requests_total", status="499") == 1)
        known, answer = len(read) - 1, server.post(body).json()
    assert answer["choices"][0]["text"] == bundled_engine.generate(body["prompt"], 3).text
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == known


def test_an_answer_has_its_time_with_waiting_and_prefill(bundled_models, scripted):
    read: list[int] = []
    with Server(blocks_of_one_token(bundled_models, read), request_timeout_s=0.3) as server:
        late = server.post(request(prompt=PROMPT * 20))
        assert late.status_code == 504 and late.json()["error"]["code"] == "request_timeout"
        wait_for(lambda: not server.worker.busy)
        assert len(read) < 60 and "after 0.3 s" in late.json()["error"]["message"]
    server, _ = scripted(pace=0.1, settings={"request_timeout_s": 0.5})
    running = server.send(request(max_tokens=300))
    wait_for(lambda: server.worker.busy)
    waiting = server.post(request(max_tokens=3))  # the one that runs ends first, by its own limit
    assert waiting.status_code in (200, 504)
    lines = server.post(request(max_tokens=300, stream=True)).text
    assert "xxx" in lines and '"code": "request_timeout"' in lines and "[DONE]" not in lines
    running.close()
    assert server.post(request(max_tokens=3)).status_code == 200


def test_full_queue_is_429_with_retry_after_and_takes_again_later(scripted):
    server, engine = scripted(settings={"max_waiting": 2}, pace=0.05)
    held = [server.send(request(max_tokens=300))]
    wait_for(lambda: server.worker.busy)
    held += [server.send(request(max_tokens=3)) for _ in range(2)]
    wait_for(lambda: server.metric("queue_length") == 2)
    with pytest.raises(openai.RateLimitError) as refused:
        server.client().completions.create(**request())
    assert refused.value.code == "queue_full" and int(refused.value.response.headers["retry-after"]) >= 1
    for connection in held:
        connection.close()
    wait_for(lambda: not server.worker.busy and server.metric("queue_length") == 0)
    assert server.client().completions.create(**request(max_tokens=3)).choices[0].text == "xxx"


def test_engine_that_fails_is_500_without_details_and_goes_on(scripted):
    server, engine = scripted()
    engine.fail = ZeroDivisionError("secret")
    with pytest.raises(openai.InternalServerError) as failed:
        server.client().completions.create(**request())
    assert "secret" not in str(failed.value) and failed.value.code == "internal_error"
    engine.fail = None
    assert server.client().completions.create(**request(max_tokens=2)).choices[0].text == "xx"


# ---- requests it refuses


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"model": "gpt-4"}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": [5, -1]}, "prompt"),
        ({"prompt": [8192]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 17000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"nonsense": 1}, "nonsense"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"logit_bias": {"8192": 3}}, "logit_bias"),
        ({"logit_bias": {"-1": 3}}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_do_is_refused_in_openais_words(changes, param, server):
    body = json.dumps(request(**changes))
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == (404 if "model" in changes else 400)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["code"] and param.split("[")[0] in error["message"] + param


def test_chat_refuses_what_is_no_text(server):
    for messages in (
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "\udc00"}],
        "hello",
    ):
        body = json.dumps({"model": MODEL, "messages": messages}).encode()
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "bundled"}', b"\x00" * 50]
)
def test_malformed_bodies_are_400_and_the_next_request_is_served(body, server):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert server.post(request(max_tokens=2)).status_code == 200


def test_bytes_that_are_no_http_and_unknown_paths_do_no_harm(server):
    with closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert server.post(request(max_tokens=2), headers={"Content-Type": "text/plain"}).status_code == 400, (
        "a web page of another origin may send that unasked"
    )


def test_oversized_bodies_are_413_however_they_come(scripted):
    server, _ = scripted(settings={"max_body_bytes": 2000})
    large = json.dumps(request(prompt="x" * 3000)).encode()

    def chunks():
        for start in range(0, len(large), 500):
            yield large[start : start + 500]

    for content in (large, chunks()):
        answer = httpx.post(
            f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]
    assert server.post(request(max_tokens=2)).status_code == 200
    wait_for(lambda: server.metric("requests_total", status="413") == 2)


def test_prompt_of_50000_tokens_is_a_clear_400(server, bundled_engine):
    prompt = "the king " * 25_000
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            server.client().completions.create(**request(prompt=prompt, stream=stream))
        assert refused.value.code == "context_length_exceeded"
        tokens = len(bundled_engine.encode(prompt))
        assert tokens > 50_000
        assert f"holds {bundled_engine.limit} tokens; the prompt has {tokens}" in refused.value.message
    for path, body in {
        "chat/completions": {"messages": [{"role": "user", "content": prompt}]},
        "responses": {"input": prompt},
    }.items():
        error = server.post({"model": MODEL} | body, f"/v1/{path}").json()["error"]
        assert "holds 16384 tokens" in error["message"] and error["param"] in body


def test_limits_on_prompt_and_answer_are_the_servers(scripted):
    server, _ = scripted(settings={"max_prompt_tokens": 5, "max_new_tokens": 7})
    assert server.post(request(prompt=[5] * 6, max_tokens=3)).json()["error"]["code"] == "context_length_exceeded"
    longer = server.post(request(prompt=[5] * 5, max_tokens=256)).json()  # what clients send by default
    assert longer["usage"]["completion_tokens"] == 7 and longer["choices"][0]["finish_reason"] == "length"
    assert server.post(CHAT, "/v1/chat/completions").json()["usage"]["completion_tokens"] == 7


def new_tokens_of_a_chat(server: Server, **changes) -> int:
    return server.post(CHAT | changes, "/v1/chat/completions").json()["usage"]["completion_tokens"]


def test_chat_without_a_limit_gets_the_servers_default_and_no_more_than_the_model_holds(scripted):
    server, _ = scripted(settings={"default_max_tokens": 30})
    assert new_tokens_of_a_chat(server) == 30
    assert new_tokens_of_a_chat(server, max_completion_tokens=35) == 35
    server, engine = scripted(settings={"default_max_tokens": 30})
    engine.limit = 21  # the prompt of a scripted chat has one token
    assert new_tokens_of_a_chat(server) == 20


def test_chat_without_a_limit_reserves_a_part_of_the_context(bundled_engine):
    asked = []

    class Recorded:
        models, limit, encode_chat = bundled_engine.models, bundled_engine.limit, bundled_engine.encode_chat
        cache_bytes = 0

        def generate(self, ids, max_new_tokens, **options):
            asked.append(max_new_tokens)
            return bundled_engine.generate(ids, 4, **options)

    with Server(Recorded()) as server:
        new_tokens_of_a_chat(server)
    assert asked == [1024] and bundled_engine.limit > 4096


# ---- keys


def test_key_is_asked_of_everything_but_health(scripted):
    server, _ = scripted(settings={"api_key": "s3cret"})
    assert server.client("s3cret").completions.create(**request(max_tokens=2)).choices[0].text == "xx"
    for key in ("wrong", "s3cre", "s3cret2", "S3CRET"):
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client(key).completions.create(**request())
        assert refused.value.code == "invalid_api_key" and "s3cret" not in refused.value.message
    for headers in (
        {},
        {"Authorization": "s3cret"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": b"Bearer \xff"},
    ):
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert httpx.get(server.url + path, headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_without_a_key_only_this_machine_is_served():
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        check_host(host, has_key=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(ConfigError, match="no API key is set; give --api_key_file"):
            check_host(host, has_key=False)
        check_host(host, has_key=True)
    with pytest.raises(ConfigError, match="API key is empty"):
        Settings("x", api_key="")
    assert "secret" not in repr(Settings("x", api_key="secret"))


def test_several_keys_are_let_in_and_share_no_prefixes(bundled_models):
    engine = SpecExtend(bundled_models, prefix_reuse=PrefixLimits(worth=4))
    body = request(prompt=PROMPT * 8, max_tokens=2)
    with Server(engine, api_keys={"ada": "k-ada", "bob": "k-bob"}) as server:

        def cached(key: str) -> int:
            return server.client(key).completions.create(**body).usage.prompt_tokens_details.cached_tokens

        tokens = len(engine.encode(body["prompt"]))
        assert [cached(key) for key in ("k-ada", "k-ada", "k-bob", "k-ada", "k-bob")] == [
            0, tokens - 1, 0, tokens - 1, tokens - 1,
        ]  # fmt: skip
        for key in ("ada", "k-ad", "k-adab", "k-ada k-bob"):
            assert server.post(body, headers={"Authorization": f"Bearer {key}"}).status_code == 401
        assert server.metric("client_tokens_total", client="ada") == 3 * (tokens + 2)
        wait_for(lambda: server.metric("requests_total", status="401") == 4)  # counted behind the response


def test_key_files_hold_one_key_per_line(tmp_path):
    path = tmp_path / "keys"
    for text, keys in (
        ("s3cret\n", {"key 1": "s3cret"}),
        ("# who\nada: a:b=\n\n  k2  \nBob B: k3\n", {"ada": "a:b=", "key 2": "k2", "Bob B": "k3"}),
    ):
        path.write_text(text)
        assert read_keys(path) == keys
    for text, message in (
        ("", "holds no key"),
        ("# k\n", "holds no key"),
        ("a\nb c\n", "line 2 is neither KEY nor NAME: KEY"),
        ("ada: x\nada: y\n", "line 2: the name ada is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message) as raised:
            read_keys(path)
        assert "\n" not in str(raised.value)
    for keys, message in (({"ada": "é"}, "of ada is empty or has"), ({"a": "x", "b": "x"}, "the same API key")):
        with pytest.raises(ConfigError, match=message):
            Settings("x", api_keys=keys)
    with pytest.raises(ConfigError, match="give one of them"):
        Settings("x", api_key="a", api_keys={"b": "b"})


# ---- models and metrics


def test_models_are_listed(server):
    assert [model.id for model in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).owned_by == "specextend"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-4")


def test_metrics_count_what_happened(scripted):
    server, engine = scripted()
    server.client().completions.create(**request(max_tokens=10))
    list(server.client().completions.create(**request(max_tokens=7), stream=True))
    server.post({})
    prompt_tokens = len(engine.models.tokenizer(PROMPT).input_ids)
    assert server.metric("generated_tokens_total") == 17 and server.metric("prompt_tokens_total") == 2 * prompt_tokens
    assert server.metric("accepted_per_round_count") == 5 and server.metric("accepted_per_round_sum") == 10
    assert server.metric("time_to_first_token_seconds_count") == server.metric("decode_tokens_per_second_count") == 2
    wait_for(lambda: server.metric("requests_total", status="200") == 2)
    wait_for(lambda: server.metric("requests_total", status="400") == 1)
    page = httpx.get(f"{server.url}/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for name in ("queue_length 0.0", "cache_bytes 0.0", "running 0.0", "generated_tokens_total 17.0"):
        assert f"specextend_{name}" in page.text


def test_metrics_are_read_while_the_cache_grows(scripted):
    """Between the old buffer and the new one there is none; only the decoding thread knows when."""
    server, engine = scripted(pace=0.02)

    class Growing(type(engine)):
        @property
        def cache_bytes(self) -> int:
            if threading.current_thread().name != "decode":
                raise AttributeError("'NoneType' object has no attribute 'nbytes'")
            return 4096

    engine.__class__ = Growing
    connection = server.send(request(max_tokens=300, stream=True))
    wait_for(lambda: engine.rounds_run >= 1)
    page = httpx.get(f"{server.url}/metrics")
    assert page.status_code == 200 and "specextend_cache_bytes 4096.0" in page.text
    connection.close()


def test_settings_of_a_request_are_forgotten_with_it(scripted):
    server, _ = scripted()
    for step in range(1, 21):
        server.post(request(max_tokens=3, temperature=step / 10, top_p=step / 20, top_k=1000 + step))
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) is SamplingConfig and one.top_k in range(1001, 1021)]
    assert len(alive) <= 1, "the last request's may be on a stack"


# ---- the program


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    """`python -m specextend.serve` on a free port: the process and its address."""
    command = [sys.executable, "-m", "specextend.serve", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "/v1" in line, process.stderr.read()
    return process, line.split()[-1].removesuffix("/v1")


def test_stop_finishes_the_answer_under_way_and_refuses_new_ones(bundled_engine):
    process, url = start("--grace", "60")
    body = request(max_tokens=160, stream=True)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        received = [next(lines)]
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json=request())
        received += list(lines)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
    assert received[-2] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in received if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == bundled_engine.generate(PROMPT, 160).text
    assert process.wait(20) == 0 and process.stderr.read() == ""


def test_stop_gives_up_an_answer_that_takes_too_long():
    process, url = start("--grace", "0.2")
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=request(max_tokens=9000, stream=True), timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        received = [line for line in lines if line]
    assert json.loads(received[-1][6:])["error"]["code"] == "stopping"
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    "given, message",
    [
        (("--host", "0.0.0.0"), "no API key is set"),
        (("--api_key", ""), "API key is empty"),
        (("--api_key_file", "/nothing/here"), "cannot be read"),
        (("--api_key", "a", "--api_key_file", "README.md"), "give it once"),
        (("--port", "TAKEN"), "cannot be listened on"),
        (("--port", "99999"), "cannot be listened on"),
        (("--max_waiting", "0"), "max_waiting is 0"),
        (("--max_connections", "0"), "max_connections is 0"),
        (("--header_timeout", "0"), "header_timeout_s is 0"),
        (("--default_max_tokens", "0"), "default_max_tokens is 0"),
        (("--nodez", "0"), "unrecognized arguments"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_a_line_and_status_2(given, message, server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve", *(str(server.port) if one == "TAKEN" else one for one in given)])
    with pytest.raises(SystemExit) as exited:
        flags.run(serve_main.main)
    error = capsys.readouterr().err
    assert exited.value.code == 2 and message in error and error.count("\n") == 1


def test_what_an_earlier_prompt_taught_is_not_read_again(server):
    long = request(prompt="Once upon a time in a small town. " * 12, max_tokens=8)
    before = server.metric("cached_prompt_tokens_total")
    first, second = (server.post(long).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == second["usage"]["prompt_tokens"] - 1  # the last one is read in any case
    first_cached = first["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert server.metric("cached_prompt_tokens_total") - before == first_cached + cached
