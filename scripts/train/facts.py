"""Planted facts: a sentence that states something and a later one that asks for it or uses it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

WORDS = {
    "adj": (
        "northern southern eastern western upper lower old new royal hidden grand silent outer inner distant "
        "central ancient marble wooden stone coastal imperial public private"
    ).split(),
    "noun": (
        "archive library station harbour observatory warehouse laboratory museum garden tower bridge mill "
        "hospital chapel theatre workshop reservoir school market depot lighthouse vault"
    ).split(),
    "first": (
        "Alice Bernard Clara Daniel Edith Frank Grace Henry Irene James Katherine Louis Margaret Nathan Olive "
        "Peter Ruth Samuel Teresa Victor Walter Helen Arthur Martha"
    ).split(),
    "last": (
        "Abbott Barlow Carver Dawson Ellery Fenton Garland Hobbs Ingram Jarvis Keller Lowell Mercer Norwood "
        "Osborne Prescott Quimby Randall Sutton Thornton Upton Vickers Whitman Yates"
    ).split(),
    "object": (
        "lantern compass ledger violin map telescope diary sword letter clock crown seal portrait key ring "
        "manuscript bell chart medal mirror"
    ).split(),
    "colour": "red blue green yellow black white brown grey purple orange golden silver".split(),
    "box": "chest drawer cabinet trunk cupboard basket desk safe barrel case".split(),
    "town": (
        "Ashford Brampton Colville Dunmore Eastleigh Farrow Glenwood Harlow Kingsley Lakeside Milford Newbury "
        "Oakham Penrose Ravenna Selby Tilbury Westbrook Winslow Yarmouth"
    ).split(),
    "word": (
        "falcon winter copper meadow thunder velvet candle granite harvest island juniper marble orchid "
        "pepper raven saffron timber walnut willow ember"
    ).split(),
    "month": "January February March April May June July August September October November December".split(),
}


class Template(NamedTuple):
    """`{value}` is what must be remembered; its own pattern is the last field."""

    statement: str
    recall: str
    value: str


TEMPLATES = (
    Template(
        "The access code of the {adj} {noun} is {value}.",
        "What is the access code of the {adj} {noun}? The access code of the {adj} {noun} is {value}.",
        "{number}",
    ),
    Template(
        "The keeper of the {adj} {noun} is {value}.",
        "Who is the keeper of the {adj} {noun}? The keeper of the {adj} {noun} is {value}.",
        "{first} {last}",
    ),
    Template(
        "{first} {last} keeps the {object} in the {value}.",
        "Where does {first} {last} keep the {object}? {first} {last} keeps the {object} in the {value}.",
        "{colour} {box}",
    ),
    Template(
        "{first} {last} was born in {value}.",
        "When and where was {first} {last} born? {first} {last} was born in {value}.",
        "{town} in {year}",
    ),
    Template(
        "The password for the {noun} at {town} is {value}.",
        "Now the password for the {noun} at {town} was needed again. The password is {value}.",
        "{word}-{colour}-{small}",
    ),
    Template(
        "The council will discuss the {object} of {town} on {value}.",
        "On which day will the council discuss the {object} of {town}? The council will meet on {value}.",
        "{day} {month} {year}",
    ),
    Template(
        "Remember that the secret word of {first} {last} is {value}.",
        "As was said above, the secret word of {first} {last} is {value}.",
        "{word} {object}",
    ),
    Template(
        "The road from {town} to the {adj} {noun} is {value} long.",
        "How long is the road from {town} to the {adj} {noun}? It is {value} long.",
        "{number} miles",
    ),
)


@dataclass(frozen=True)
class Fact:
    """One planted fact, tokenised; `recall[answer]` are the tokens only the statement can tell."""

    statement: np.ndarray  # [n] int64
    recall: np.ndarray  # [m] int64
    answer: slice


def make_facts(count: int, tokenizer: Tokenizer, seed: int) -> list[Fact]:
    """`count` random facts, each starting with a space so that it can follow any text."""
    rng = np.random.default_rng(seed)
    texts = [_segments(rng) for _ in range(count)]
    flat = tokenizer.encode_batch([segment for four in texts for segment in four], add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int64) for encoding in flat]
    facts = []
    for statement, question, value, end in zip(ids[0::4], ids[1::4], ids[2::4], ids[3::4], strict=True):
        answer = slice(len(question), len(question) + len(value))
        facts.append(Fact(statement, np.concatenate((question, value, end)), answer))
    return facts


def _segments(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """Statement, recall up to the value, value, rest: cut where the byte-level pre-tokenizer cuts too."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    value = template.value.format(**_fields(rng))
    fields = _fields(rng)
    question, rest = template.recall.split(" {value}")
    statement = template.statement.format(value=value, **fields)
    return " " + statement, " " + question.format(**fields), " " + value, rest


def _fields(rng: np.random.Generator) -> dict[str, str]:
    fields = {name: words[rng.integers(len(words))] for name, words in WORDS.items()}
    numbers = {"number": (10_000, 100_000), "small": (100, 1_000), "year": (1700, 1990), "day": (1, 29)}
    return fields | {name: str(rng.integers(low, high)) for name, (low, high) in numbers.items()}
