"""Prompts: reading them, grouping them by length, putting them into a model's template, cutting them to fit.

A prompt file is JSON Lines (one record per line) or plain text (the whole file is one prompt). An evaluation folder
holds `<name>_<length>.jsonl` files, one per input length as in the paper's experiments (512, 1K ... 128K).
Every unusable input is an `InputError` naming the file and, where there is one, the line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from specextend.data.templates import check_text
from specextend.errors import CapacityError, InputError

SUMMARY_TEMPLATE = (
    "Summarize the following text into a summary of less than 800 words.\n### Text:\n\n{text}\n\n### Summary:"
)
TEXT_FIELDS = ("text", "problem", "prompt", "input", "document")
JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
ALL_LENGTHS = "all"
_K = 1024
_MIN_LENGTH = 64  # below it the templates alone fill the prompt, and `pg_19.jsonl` would count as a length
_LENGTH_IN_NAME = re.compile(r"_(\d+K?)\.jsonl$", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """One prompt as its file gives it; conversation templates come later (`format_prompt`).

    Args:
        text: the prompt, never blank.
        source: "file:line" of a record, the file alone for plain text.
        nominal_length: length label in the file's name ("1K"), None where it has none.
        extra: the record's other fields ("answer", "original_length", ...).
    """

    text: str
    source: str
    nominal_length: str | None = None
    extra: dict = field(default_factory=dict)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSON Lines or plain text file, at most the first `limit`; later lines are then not looked at."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"the number of prompts to read is {limit}; ask for at least 1")
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return [_text_prompt(path)]
    if suffix not in JSON_SUFFIXES:
        raise InputError(
            f"{path} has the ending {path.suffix!r}; prompts are read from JSON Lines ({', '.join(JSON_SUFFIXES)}) "
            f"or plain text ({', '.join(TEXT_SUFFIXES)}): rename the file"
        )
    prompts = []
    for number, line in enumerate(_read_lines(path), start=1):
        where = f"{path}:{number}"
        content = _decode(line, where)
        if content.strip():
            prompts.append(_record_prompt(content, where, _length_in_name(path)))
        if len(prompts) == limit:
            break
    if not prompts:
        raise InputError(f'{path} is empty; it needs at least one line like {{"text": "..."}}')
    return prompts


def find_buckets(data_dir: Path) -> dict[str, Path]:
    """The prompt files of a folder by length label, shortest first; a file without a length is the bucket "all"."""
    data_dir = Path(data_dir)
    if not data_dir.exists():
        raise InputError(f"{data_dir} does not exist; {_HOW_TO_PREPARE}")
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is a file; give a folder of <name>_<length>.jsonl files", setting="data_dir")
    buckets: dict[str, Path] = {}
    for path in sorted(data_dir.glob("*.jsonl")):
        label = _length_in_name(path) or ALL_LENGTHS
        if label in buckets:
            raise InputError(
                f"{data_dir} holds two files of length {label}, {buckets[label].name} and {path.name}; "
                "keep one data set per folder"
            )
        buckets[label] = path
    if not buckets:
        raise InputError(f"{data_dir} holds no .jsonl file; {_HOW_TO_PREPARE}")
    return dict(sorted(buckets.items(), key=lambda item: _length_tokens(item[0]) or math.inf))


def parse_length(label: str) -> int:
    """Tokens that a length label means: "512" -> 512, "16K" -> 16384; inverse of `length_label`."""
    tokens = _length_tokens(label.strip())
    if tokens is None:
        raise InputError(
            f"{label!r} is not a length; give {_MIN_LENGTH} to 1023 tokens, or whole K (1024 tokens) like 1K, 16K",
            setting="lengths",
        )
    return tokens


def nominal_tokens(label: str) -> float:
    """By which lengths are put in order, "all" last."""
    return math.inf if label == ALL_LENGTHS else parse_length(label)


def normal_label(label: str) -> str:
    """The label of whatever way a length is written: "1k", "1K" and "1024" are "1K"; "all" stays."""
    return label if label == ALL_LENGTHS else length_label(parse_length(label))


def length_label(tokens: int) -> str:
    """Label of a length in tokens: 512 -> "512", 16384 -> "16K"; inverse of `parse_length`."""
    return f"{tokens // _K}K" if tokens % _K == 0 else str(tokens)


def cut_to_fit(ids: Tensor, limit: int, keep_tail: int = 64) -> Tensor:
    """The ids [N], or at most `limit` of them: the middle goes, head and tail stay (instruction and answer marker).

    Args:
        keep_tail: tokens kept from the end; half the limit where that is less.
    """
    if limit < 1:
        raise CapacityError(f"no room for a prompt: {limit} tokens are left for it; ask for fewer new tokens")
    if len(ids) <= limit:
        return ids
    tail = min(keep_tail, limit // 2)
    return torch.cat([ids[: limit - tail], ids[len(ids) - tail :]])


def strip_text(text: str) -> str:
    """A book or report without Project Gutenberg's header, credits and licence, and without literal <s> and </s>."""
    text = re.sub(r"</?s>", "", text)
    text = _GUTENBERG_START.split(text)[-1]
    text = _GUTENBERG_END.split(text)[0]
    return _CREDITS.sub("", text).strip()


_GUTENBERG_START = re.compile(
    r"^[ \t]*\*{3} ?START OF TH(?:E|IS) PROJECT GUTENBERG[^*]*\*{3}[ \t]*$|^\*END\*? ?THE SMALL PRINT!.*\*END\*[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_GUTENBERG_END = re.compile(
    r"^[ \t]*(?:\*{3} ?)?END OF (?:TH(?:E|IS) )?PROJECT GUTENBERG.*$", re.IGNORECASE | re.MULTILINE
)
# PG-19 dropped the header's first line only: what is left is a wrapped title's rest, up to its stars, and the credits.
_CREDITS = re.compile(
    r"\A\s*(?:[^\n]*\*{3}\s*\n\s*)?(?:Produced by|E-text prepared by|Transcribed (?:by|from))\b.*?\n\s*\n", re.DOTALL
)
_HOW_TO_PREPARE = (
    "it should hold <name>_<length>.jsonl files: build data/builtin with `python scripts/prepare_data.py --builtin`, "
    "or your own with `python scripts/prepare_data.py --from_dir FOLDER`"
)


def read_text(path: Path) -> str:
    """A UTF-8 text file with line ends as newlines, a byte order mark dropped."""
    _require_file(path)
    return _decode(b"".join(_read_lines(path)), str(path)).replace("\r\n", "\n")


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path, or leave it out to use the built-in text")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file of prompts (folders go to eval_classic.py)")


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def _text_prompt(path: Path) -> Prompt:
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty; it should hold the prompt")
    return Prompt(text, str(path))


def _record_prompt(line: str, where: str, nominal_length: str | None) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))  # `msg` leaves out JSON's own line number, always 1 here
        raise InputError(f"{where}: malformed JSON ({reason}); each line must be one complete JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: a record must be a JSON object like {{"text": "..."}}, not {line.strip()[:20]!r}')
    name = next((name for name in TEXT_FIELDS if name in record), None)
    if name is None:
        raise InputError(f"{where}: a record without text; call the prompt's field one of {', '.join(TEXT_FIELDS)}")
    text = record.pop(name)
    if not isinstance(text, str):
        raise InputError(f"{where}: {name!r} is of type {type(text).__name__}; it must be a string")
    if not text.strip():
        raise InputError(f"{where}: {name!r} is empty; remove the line or fill in a prompt")
    check_text(text, f"{where}: {name!r}")
    return Prompt(text, where, nominal_length, record)


def _length_in_name(path: Path) -> str | None:
    """The length label a file's name ends in, None where the number is no length ("aime_2024.jsonl")."""
    match = _LENGTH_IN_NAME.search(path.name)
    tokens = _length_tokens(match[1]) if match else None
    return None if tokens is None else length_label(tokens)


def _length_tokens(label: str) -> int | None:
    match = re.fullmatch(r"(\d{1,6})(K?)", label, re.IGNORECASE | re.ASCII)
    tokens = int(match[1]) * (_K if match[2] else 1) if match else 0
    return tokens if tokens >= _MIN_LENGTH and (tokens < _K or tokens % _K == 0) else None
