"""`/v1/responses` by the `openai` client: the chat's answer in the newer form."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402
from serving import MODEL, PROMPT  # noqa: E402


def ask(server, **changes):
    return server.client().responses.create(
        **{"model": MODEL, "input": PROMPT, "max_output_tokens": 8, "temperature": 0} | changes
    )


def test_response_is_the_librarys_answer(server, bundled_engine):
    answer, expected = ask(server), bundled_engine.generate(PROMPT, 8)
    assert answer.output_text == expected.text and answer.output[0].role == "assistant"
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        expected.prompt_tokens, 8, expected.prompt_tokens + 8,
    )  # fmt: skip


def test_instructions_and_messages_are_one_conversation(server, bundled_engine):
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is a king?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A ruler."}]},
        {"role": "user", "content": "Why?"},
    ]
    answer = ask(server, input=turns, instructions="Be brief.", store=False, tools=[], truncation="disabled")
    assert answer.output_text == bundled_engine.generate("Be brief.\n\nWhat is a king?\n\nA ruler.\n\nWhy?", 8).text
    assert answer.instructions == "Be brief."


def test_stream_grows_into_the_response(server):
    events = list(ask(server, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == ask(server).output_text
    with server.client().responses.stream(model=MODEL, input=PROMPT, max_output_tokens=8, temperature=0) as stream:
        for _ in stream:
            pass


def test_response_follows_a_schema(server):
    pytest.importorskip("llguidance")

    class Mood(BaseModel):
        glad: bool

    answer = server.client().responses.parse(
        model=MODEL, input=PROMPT, text_format=Mood, max_output_tokens=60, temperature=0
    )
    assert isinstance(answer.output_parsed, Mood) and answer.status == "completed"


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 17000}, "max_output_tokens"),
        ({"background": True}, "background"),
    ],
    ids=str,
)
def test_what_a_response_cannot_do_is_refused(changes, param, server):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **changes)
    assert refused.value.param == param
