"""Calls of tools in an answer's text, as models write them by the two common chat templates.

Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, behind any text; Llama's answer is one
object, `{"name": ..., "parameters": {...}}`. Anything else is text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection

OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def find_calls(text: str, names: Collection[str]) -> tuple[str, list[dict]]:
    """The text before the calls, and the calls in OpenAI's form.

    Args:
        names: of the tools that may be called; a call of another is text.
    """
    written = _CALL.findall(text)
    calls = [_call(one, names) for one in written or [text]]
    if not all(calls):
        return text, []
    return (text[: text.index(OPEN)].strip() if written else ""), calls


def end_of_text(text: str) -> int:
    """How much of a growing answer is surely text and no beginning of a call."""
    if text.lstrip().startswith("{"):
        return 0
    begin = text.find(OPEN)
    held = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
    return begin if begin >= 0 else len(text) - held


def _call(written: str, names: Collection[str]) -> dict | None:
    try:
        call = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
