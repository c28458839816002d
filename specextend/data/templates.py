"""Conversation templates: a prompt or a conversation as the model expects it.

Control tokens are the template's to write: one spelled out in a user's text ("</s>") is encoded as its characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specextend.errors import InputError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]


def encode_prompt(text: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the whole prompt, template and special tokens included, each special token once."""
    return encode_chat([{"role": "user", "content": text}], template, tokenizer)


def encode_chat(
    messages: Sequence[Message], template: str | None, tokenizer: PreTrainedTokenizerBase, **options
) -> list[int]:
    """Token ids of a conversation up to where the assistant answers, each special token once; options as below."""
    check_messages(messages, template)
    names = _control_tokens(tokenizer)
    texts = list(_texts([messages, options]))
    written = [name for name in names if any(name in text for text in texts)]
    adds = template != "chat"
    if template is None or not written:
        formatted = format_chat(messages, template, tokenizer, **options)
        as_text = template is None
        return tokenizer(formatted, add_special_tokens=adds, split_special_tokens=as_text, verbose=False).input_ids
    marks = dict(zip(written, _unused_characters(texts), strict=False))
    messages, options = _replaced_within([list(messages), options], marks)
    formatted = format_chat(messages, template, tokenizer, **options)
    return _encode_apart(formatted, names, {mark: name for name, mark in marks.items()}, tokenizer, adds)


def format_prompt(text: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` as the user's turn of a conversation, up to where the assistant begins."""
    return format_chat([{"role": "user", "content": text}], template, tokenizer)


def format_chat(
    messages: Sequence[Message], template: str | None, tokenizer: PreTrainedTokenizerBase, **options
) -> str:
    """A conversation as one text, up to where the assistant begins.

    Args:
        messages: as {"role": "user", "content": "..."}; roles are system, user and assistant, and
            tool where the tokenizer's own template is used.
        template: name of a fschat conversation ("vicuna_v1.1"), "chat" for the tokenizer's own chat template, whose
            result already holds the special tokens (encode it without adding more). None, for a model that knows no
            conversations: the contents one after the other, a blank line between them.
        options: what else the tokenizer's own template reads (tools, enable_thinking).
    """
    check_messages(messages, template)
    uses_tools = "tools" in options or any("tool_calls" in message for message in messages)
    if uses_tools and not (template == "chat" and "tool" in str(tokenizer.chat_template)):
        raise InputError(
            "the model's conversation template knows no tools; use a model whose chat template does", setting="tools"
        )
    if options and template != "chat":
        names = ", ".join(options)
        raise InputError(f"the model has no chat template of its own that would read {names}", setting="options")
    if template is None:
        return "\n\n".join(message["content"] for message in messages)
    if template == "chat":
        if tokenizer.chat_template is None:
            raise InputError("the model's tokenizer has no chat template; use a fschat template's name or plain text")
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, TypeError) as error:  # what a template says of messages it does not take
            raise InputError(f"the model's chat template refuses these messages ({error})") from error
    return _format_by_fschat(messages, template)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What control tokens look like as text, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _texts(value: object) -> Iterator[str]:
    """All texts within messages or what else a template reads, those of tools and their calls too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _replaced_within(value: Any, marks: Mapping[str, str]) -> Any:
    """The same with all its texts `_replaced`."""
    if isinstance(value, str):
        return _replaced(value, marks)
    if isinstance(value, Mapping):
        return {_replaced_within(key, marks): _replaced_within(one, marks) for key, one in value.items()}
    return [_replaced_within(one, marks) for one in value] if isinstance(value, list | tuple) else value


def _unused_characters(texts: Sequence[str]) -> Iterable[str]:
    """Characters of a private plane of Unicode that stand in none of the texts."""
    used = {character for text in texts for character in text}
    return (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)


def _replaced(text: str, marks: Mapping[str, str]) -> str:
    return re.sub("|".join(map(re.escape, marks)), lambda found: marks[found[0]], text)


def _encode_apart(
    formatted: str, names: list[str], texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, adds: bool
) -> list[int]:
    """Ids of a formatted conversation, its control tokens by their ids and all between them as text.

    Args:
        names: control tokens as text.
        texts: mark -> what it stands for in a user's text.
        adds: whether the tokenizer is to put its own control tokens around the whole.
    """
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", formatted):
        if part in names:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            text = _replaced(part, texts)
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    if not adds:
        return ids
    bare, whole = (tokenizer("a", add_special_tokens=added, verbose=False).input_ids for added in (False, True))
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:before] + ids + whole[before + len(bare) :]


def check_messages(messages: Sequence[Message], template: str | None = None) -> None:
    """InputError for what is no conversation."""
    roles = (*ROLES, "tool") if template == "chat" else ROLES
    if isinstance(messages, str) or not messages:
        raise InputError('messages must be a non-empty list like [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f'message {index} must be like {{"role": "user", "content": "..."}}')
        if message.get("role") not in roles:
            raise InputError(f"message {index} has the role {message.get('role')!r}; roles are {', '.join(roles)}")
        check_text(message["content"], "the text" if len(messages) == 1 else f"message {index}")


def check_text(text: str, what: str) -> None:
    """InputError for half of a surrogate pair: legal in JSON and in Python, but no text that could be tokenized."""
    found = re.search(r"[\ud800-\udfff]", text)
    if found:
        raise InputError(
            f"{what} holds half a surrogate pair (\\u{ord(found[0]):04x}, character {found.start()}); remove or "
            "complete it"
        )


def _format_by_fschat(messages: Sequence[Message], template: str) -> str:
    from fastchat.conversation import conv_templates, get_conv_template

    if template not in conv_templates:
        raise InputError(
            f"unknown conversation template {template!r}; give a fschat name such as vicuna_v1.1, or 'chat' for the "
            "tokenizer's own"
        )
    conversation = get_conv_template(template)
    for message in messages:
        if message["role"] == "system":
            conversation.set_system_message(message["content"])
        else:
            conversation.append_message(conversation.roles[message["role"] == "assistant"], message["content"])
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
