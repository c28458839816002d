"""The built-in text: a long document that everyone has."""

from __future__ import annotations

from specextend.errors import InputError


def builtin_text() -> str:
    """Python's language reference, the text every CPython carries, as one long document with a heading per topic."""
    return join_topics(builtin_topics())


def builtin_topics() -> list[tuple[str, str]]:
    """Name and text of each topic of the language reference, in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python lacks pydoc_data.topics, the built-in text; give a file of prompts", setting="input_file"
        ) from error
    return sorted(topics.items())


def join_topics(topics: list[tuple[str, str]]) -> str:
    return "\n\n".join(f"# {name}\n\n{text.strip()}" for name, text in topics) + "\n"
