"""Clients as people use them, against one server: their answers are the library's. Those that are installed run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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


def by_litellm(server: Server) -> list[str]:
    litellm = pytest.importorskip("litellm")
    options = {"api_base": f"{server.url}/v1", "api_key": "none", "max_tokens": NEW, "temperature": 0}
    chat = {"model": f"openai/{MODEL}", "messages": ASKED} | options
    text = {"model": f"text-completion-openai/{MODEL}"} | options
    return [
        litellm.completion(**chat).choices[0].message.content,
        "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)),
        litellm.text_completion(prompt=PROMPT, **text).choices[0].text,
        *(one.text for one in litellm.text_completion(prompt=[PROMPT, PROMPT], **text).choices),
    ]


def by_llama_index(server: Server) -> list[str]:
    llms = pytest.importorskip("llama_index.llms.openai_like")
    options = {"model": MODEL, "api_base": f"{server.url}/v1", "api_key": "none", "max_tokens": NEW, "temperature": 0}
    text, chat = (llms.OpenAILike(is_chat_model=chats, **options) for chats in (False, True))
    return [
        text.complete(PROMPT).text,
        chat.complete(PROMPT).text,
        "".join(part.delta or "" for part in chat.stream_complete(PROMPT)),
    ]


def by_raw_lines(server: Server) -> list[str]:
    """As guidellm and locust ask: plain HTTP, a fixed number of tokens, server-sent events."""
    body = request(max_tokens=NEW, ignore_eos=True, stream=True, stream_options={"include_usage": True}, seed=-1)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == NEW
    return ["".join(event["choices"][0]["text"] for event in events[:-1])]


@pytest.mark.parametrize(
    "ask",
    [
        by_openai,
        by_openai_streams,
        by_async_openai,
        by_langchain,
        by_llm,
        by_litellm,
        by_llama_index,
        by_raw_lines,
    ],
)
def test_client_gets_the_librarys_answer(ask: Callable[[Server], list[str]], server, bundled_engine):
    expected = bundled_engine.generate(PROMPT, NEW).text
    answers = ask(server)
    assert answers and set(answers) == {expected}


# ---- programs that measure or load a server, each as its users start it

LOCUST = """
from locust import HttpUser, task


class Reader(HttpUser):
    @task
    def ask(self):
        body = {"model": "bundled", "prompt": "The king said that the", "max_tokens": 8, "temperature": 0}
        answer = self.client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 8
"""


def test_locust_counts_no_failure(server, tmp_path):
    _run("locust", tmp_path, "-f", _written(tmp_path / "locustfile.py", LOCUST), "--host", server.url, "--headless",
         "--users", "4", "--spawn-rate", "4", "--run-time", "5s", "--json-file", "stats")  # fmt: skip
    (row,) = json.loads((tmp_path / "stats.json").read_text())
    assert row["num_requests"] > 0 == row["num_failures"]


def test_lm_eval_scores_what_the_library_says(server, tmp_path):
    """A task of its own, whose answers are the first words of the library's."""
    _written(tmp_path / "rows.jsonl", json.dumps({"text": PROMPT, "answer": "x"}) + "\n")
    task = {
        "task": "continue", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "output_type": "generate_until", "doc_to_text": "text", "doc_to_target": "answer",
        "generation_kwargs": {"max_gen_toks": NEW, "temperature": 0, "until": ["<never>"]},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    _written(tmp_path / "continue.yaml", json.dumps(task))
    of_model = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer_backend=None,num_concurrent=1"
    _run("lm_eval", tmp_path, "--model", "local-completions", "--model_args", of_model, "--tasks", "continue",
         "--include_path", ".", "--log_samples", "--output_path", "out")  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    expected = server.client().completions.create(**request(max_tokens=NEW)).choices[0].text
    assert json.loads(samples.read_text().splitlines()[0])["resps"] == [[expected]]


def test_guidellm_completes_every_request(server, tmp_path):
    tokenizer = Path(__file__).parents[2] / "specextend" / "models" / "bundled" / "target"
    _run("guidellm", tmp_path, "run", "--backend", f"kind=openai_http,target={server.url},model={MODEL}",
         "--tokenizer", f"kind=hf_auto,model={tokenizer}", "--profile", "kind=synchronous",
         "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8", "--constraint", "kind=max_requests,count=4",
         "--output", "kind=json,path=found.json", "--disable-console")  # fmt: skip
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    counts = found["metrics"]["request_totals"]
    assert counts["successful"] == 4 and counts["errored"] == counts["incomplete"] == 0


def _written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _run(module: str, folder: Path, *arguments: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
