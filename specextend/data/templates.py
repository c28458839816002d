"""Conversation templates: a prompt or a conversation as the model expects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specextend.errors import InputError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]


def encode_prompt(text: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the whole prompt, template and special tokens included, each special token once."""
    return encode_chat([{"role": "user", "content": text}], template, tokenizer)


def encode_chat(messages: Sequence[Message], template: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant answers, each special token once."""
    formatted = format_chat(messages, template, tokenizer)
    return tokenizer(formatted, add_special_tokens=template != "chat", verbose=False).input_ids


def format_prompt(text: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` as the user's turn of a conversation, up to where the assistant begins."""
    return format_chat([{"role": "user", "content": text}], template, tokenizer)


def format_chat(messages: Sequence[Message], template: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as one text, up to where the assistant begins.

    Args:
        messages: as {"role": "user", "content": "..."}; roles are system, user and assistant.
        template: name of a fschat conversation ("vicuna_v1.1"), "chat" for the tokenizer's own chat template, whose
            result already holds the special tokens (encode it without adding more). None, for a model that knows no
            conversations: the contents one after the other, a blank line between them.
    """
    check_messages(messages)
    if template is None:
        return "\n\n".join(message["content"] for message in messages)
    if template == "chat":
        if tokenizer.chat_template is None:
            raise InputError("the model's tokenizer has no chat template; use a fschat template's name or plain text")
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # what a template says of messages it does not take
            raise InputError(f"the model's chat template refuses these messages ({error})") from error
    return _format_by_fschat(messages, template)


def check_messages(messages: Sequence[Message]) -> None:
    """InputError for what is no conversation."""
    if isinstance(messages, str) or not messages:
        raise InputError('messages must be a non-empty list like [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f'message {index} must be like {{"role": "user", "content": "..."}}')
        if message.get("role") not in ROLES:
            raise InputError(f"message {index} has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")


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
