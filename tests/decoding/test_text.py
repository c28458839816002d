"""Text out of a growing list of tokens: the pieces add up, and nothing is said that a later token takes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specextend.decoding.text import TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    """One byte per token, as byte-level tokenizers have them; broken characters become U+FFFD."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(ids: Sequence[int], sizes: Sequence[int], stop: Sequence[str] = (), decode=decode_bytes) -> list[str]:
    """Push `ids` in rounds of the given sizes, the rest at the end."""
    text, ends = TextStream(decode, stop), []
    for size in sizes:
        ends.append(min((ends[-1] if ends else 0) + size, len(ids)))
    pieces = [text.push(ids[:end]) for end in ends]
    return [*pieces, text.push(ids, last=True)]


SIZES = st.lists(st.integers(0, 5), max_size=60)


def test_character_split_over_tokens_comes_when_it_is_whole():
    ids = list("aé€😀b".encode())
    pieces = stream(ids, [1] * len(ids))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_unfinished_character_is_let_go_at_the_end():
    assert stream(list("a€".encode())[:-1], [1, 1, 1]) == ["a", "", "", "\ufffd"]


@settings(max_examples=300)
@given(st.text(max_size=30), SIZES)
def test_pieces_add_up_to_the_text(text, sizes):
    assert "".join(stream(list(text.encode()), sizes)) == text


@settings(max_examples=500)
@given(st.binary(max_size=30), SIZES)
@example(b"\xe2\x82a", [1, 1, 1])
@example(b"\xff\xff\xff", [1, 2])
@example(b"\xef\xbf\xbd\xe2", [3, 1])
def test_pieces_of_bytes_that_are_no_text_add_up_too(data, sizes):
    assert "".join(stream(list(data), sizes)) == decode_bytes(data)


@settings(max_examples=300)
@given(st.text("abc", max_size=24), SIZES, st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", [1, 1, 1], ["ab"])
@example("abcab", [2, 2, 1], ["bcb", "ca"])
def test_text_ends_before_the_first_stop_string(text, sizes, stop):
    ids = list(text.encode())
    ends = [text.find(one) + len(one) for one in stop if one in text]
    ids = ids[: min(ends, default=len(ids))]  # as a generation ends with the token that completes one
    cut = decode_bytes(ids)
    cut = cut[: min((cut.find(one) for one in stop if one in cut), default=len(cut))]
    pieces = stream(ids, sizes, stop)
    assert "".join(pieces) == cut


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    assert stream(list(b"xSTxSTOP"), [1] * 8, ["STOP"]) == ["x", "", "", "STx", "", "", "", "", ""]


def test_beginning_of_a_stop_string_is_let_go_at_the_end():
    assert stream(list(b"xST"), [1, 1, 1], ["STOP"]) == ["x", "", "", "ST"]


def test_nothing_comes_after_a_stop_string():
    assert stream(list(b"abXcd"), [1] * 5, ["X"]) == ["a", "b", "", "", "", ""]


def test_token_whose_text_depends_on_its_left_neighbour_keeps_its_space():
    # sentencepiece-like: a text's first word loses its space
    words = ["▁one", "▁two", "s", "▁three"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[n] for n in ids).replace("▁", " ").removeprefix(" ")

    assert stream([0, 1, 2, 3], [1, 1, 1, 1], decode=decode) == ["one", " two", "s", " three", ""]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_byte_level_tokenizer_streams_what_it_decodes(size):
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "Größe 10 €, 漢字 and 👩‍🔬 end"
    ids = tokenizer.encode(text).ids
    pieces = stream(ids, [size] * (len(ids) // size), decode=lambda part: tokenizer.decode(list(part)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
