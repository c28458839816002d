"""Clients as people use them, against one server: their answers are the library's. Those that are installed run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from serving import MODEL, PROMPT, Server, request  # noqa: E402

NEW = 16
ASKED = [{"role": "user", "content": PROMPT}]
CHAT = {"model": MODEL, "messages": ASKED, "max_tokens": NEW, "temperature": 0}


def by_openai(server: Server) -> list[str]:
    client = server.client()
    response = client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=NEW, temperature=0)
    return [
        client.completions.create(**request(max_tokens=NEW)).choices[0].text,
        client.chat.completions.create(**CHAT).choices[0].message.content,
        "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**CHAT, stream=True)),
        response.output_text,
    ]


def by_openai_streams(server: Server) -> list[str]:
    """With the helpers that name the events; an answer cut by its limit is no complete one to them."""
    client = server.client()
    with client.chat.completions.stream(**CHAT) as stream:
        whole = "".join(event.delta for event in stream if event.type == "content.delta")
    with client.responses.stream(model=MODEL, input=PROMPT, max_output_tokens=NEW, temperature=0) as events:
        response = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return [whole, response]


def by_async_openai(server: Server) -> list[str]:
    async def ask() -> list[str]:
        async with server.async_client() as client:
            several = await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(3)))
        return [one.choices[0].message.content for one in several]

    return asyncio.run(ask())


def by_langchain(server: Server) -> list[str]:
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "model": MODEL}
    chat = langchain.ChatOpenAI(max_completion_tokens=NEW, **options)
    texts = langchain.OpenAI(max_tokens=NEW, **options)
    return [
        chat.invoke(PROMPT).content,
        "".join(chunk.content for chunk in chat.stream(PROMPT)),
        *(one.content for one in chat.batch([PROMPT, PROMPT])),
        *texts.batch([PROMPT, PROMPT]),
    ]


def by_llm(server: Server) -> list[str]:
    models = pytest.importorskip("llm.default_plugins.openai_models")
    model = models.Chat(MODEL, model_name=MODEL, api_base=f"{server.url}/v1")
    model.key = "none"
    return [
        model.prompt(PROMPT, stream=stream, temperature=0, max_tokens=NEW).text() for stream in (False, True)
    ]  # fmt: skip


def by_raw_lines(server: Server) -> list[str]:
    """As guidellm and locust ask: plain HTTP, a fixed number of tokens, server-sent events."""
    body = request(max_tokens=NEW, ignore_eos=True, stream=True, stream_options={"include_usage": True}, seed=-1)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == NEW
    return ["".join(event["choices"][0]["text"] for event in events[:-1])]


@pytest.mark.parametrize(
    "ask",
    [by_openai, by_openai_streams, by_async_openai, by_langchain, by_llm, by_raw_lines],
)
def test_client_gets_the_librarys_answer(ask: Callable[[Server], list[str]], server, bundled_engine):
    expected = bundled_engine.generate(PROMPT, NEW).text
    answers = ask(server)
    assert answers and set(answers) == {expected}
