"""Prompts that refer back: questions about, and quotations from, one place of a long document, made by rule.

Every prompt asks for a passage at a known depth (0 is the beginning) of a document: to quote it, to continue it, or for
facts that were put there. Its records hold the true `answer` beside `task`, `depth` and `document`. At every length a
prompt asks for the same passage at the same depth: what changes is how much of the document lies around it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from tokenizers import Tokenizer

from scripts.train.facts import make_facts
from specextend.data.cutting import Document, SameDocuments, token_spans
from specextend.errors import InputError

TASKS = ("quote", "continue", "needle")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHORTEST, LONGEST = 80, 200  # tokens of a passage
REST = 50  # tokens of it that are asked for where two sentences are given
OPENING = 8  # words by which a passage is named
FACTS = 4  # stated in one place
SEED = 20_505_776 + 1  # of the facts: neither the training's nor needle.py's
ASTRAY = 0.04  # of the longest prompt: how far from its depth a passage may begin
FRAME = "Read the following text.\n### Text:\n\n{text}\n\n### Task:\n{question}"
QUOTE = (
    'Quote the paragraph of the text above that begins with "{opening}", word for word. Begin with these words, go on '
    "as the text does, and write nothing else."
)
CONTINUE = 'Continue this passage from the text above, word for word, and write nothing else:\n"{given}'
ASK = "Answer these questions from the text above, one sentence each.\n{questions}"
_SENTENCE_END = re.compile(r"(?:(?<!\b[A-Z])(?<!\b(?:Mr|Dr|St|No|vs))(?<!\bMrs)\.|[?!])[\"'”’)\]]*(?=\s)")
_PARAGRAPH = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """What a question is about: a stretch of a document, or something put into it.

    Attributes:
        start, end: characters of the document; they are equal where `inserted` is put there.
    """

    start: int
    end: int
    question: str
    answer: str
    inserted: str = ""


def make_records(
    sets: Sequence[Sequence[Document]], cutter: SameDocuments, lengths: Sequence[int], samples: int
) -> dict[int, list[dict]]:
    """`samples` records per length, the same questions in the same order; tasks, depths and sets take turns."""
    pages: dict[str, _Page] = {}
    facts = _fact_groups(cutter.tokenizer.backend_tokenizer)
    records: dict[int, list[dict]] = {length: [] for length in lengths}
    longest = cutter.needed(lengths)
    for sample in range(samples):
        turn, which = divmod(sample, len(sets))
        task, depth = TASKS[(turn + which) % len(TASKS)], DEPTHS[turn % len(DEPTHS)]
        for document in _in_turn(sets[which], turn):
            page = pages.setdefault(document.source, _Page(document, cutter))
            passage = page.passage(task, depth, longest, facts)
            if passage:
                break
        else:
            raise InputError(
                f"no document has {longest} tokens and a passage of {SHORTEST} to {LONGEST} tokens at depth {depth:g}; "
                "give longer texts or shorter lengths",
                setting="lengths",
            )
        for length in lengths:
            records[length].append(
                page.record(passage, depth, min(length, cutter.limit)) | {"task": task, "depth": depth}
            )
    return records


class _Page:
    """A document, its tokens and its sentences."""

    def __init__(self, document: Document, cutter: SameDocuments):
        self._document, self._cutter, self._text = document, cutter, document.text
        self._spans = token_spans(self._text, cutter.tokenizer)
        self._starts = [start for start, _ in self._spans]
        self._plain = " ".join(self._text.split())
        self._paragraphs = [_sentences(self._text, *stretch) for stretch in _between(_PARAGRAPH, self._text)]

    def passage(
        self, task: str, depth: float, longest: int, facts: Callable[[], tuple[str, str, str]]
    ) -> Passage | None:
        """What `task` asks for at `depth` of the document's first `longest` tokens, None where nothing suits."""
        if len(self._spans) < longest:
            return None
        near = depth * longest
        if task == "needle":
            starts = [first for sentences in self._paragraphs for first, _ in sentences]
            place = min(starts, key=lambda start: abs(self._token(start) - near), default=None)
            if place is None or abs(self._token(place) - near) > ASTRAY * longest:
                return None
            statement, question, answer = facts()
            return Passage(place, place, question, answer, f"\n\n{statement}\n\n")
        runs = (run for run in self._runs() if abs(self._token(run[0][0]) - near) <= ASTRAY * longest)
        for run in sorted(runs, key=lambda run: abs(self._token(run[0][0]) - near)):
            passage = self._quotation(run) if task == "quote" else self._continuation(run)
            if passage:
                return passage
        return None

    def record(self, passage: Passage, depth: float, most: int) -> dict:
        """The prompt of at most `most` tokens with the document around the passage."""
        first, last = self._token(passage.start), self._token(passage.end)
        keep = most
        while keep > last - first:
            start = max(0, last - keep, min(round(first - depth * keep), len(self._spans) - keep))
            begin, end = self._starts[start], self._spans[min(start + keep, len(self._spans)) - 1][1]
            body = self._text[begin : passage.start] + passage.inserted + self._text[passage.start : end]
            prompt = FRAME.format(text=body, question=passage.question)
            tokens = self._cutter.tokens_of(prompt)
            if tokens <= most:
                return {
                    "text": prompt, "answer": passage.answer, "original_length": len(self._spans),
                    "trunc_length": tokens, "document": self._document.source, "source": self._document.source,
                }  # fmt: skip
            keep -= tokens - most
        raise InputError(f"{most} tokens do not hold the passage and the question; use longer ones", setting="lengths")

    def _token(self, character: int) -> int:
        """The token that begins at a character or holds it."""
        return bisect_right(self._starts, character) - 1 if character < len(self._text) else len(self._spans)

    def _runs(self) -> Iterator[list[tuple[int, int]]]:
        """Runs of whole sentences of one paragraph, as long as a passage may be; the longest from each sentence on."""
        for sentences in self._paragraphs:
            for first in range(len(sentences)):
                begin = self._token(sentences[first][0])
                run = list(
                    takewhile(lambda one, begin=begin: self._token(one[1]) - begin <= LONGEST, sentences[first:])
                )
                if run and self._token(run[-1][1]) - begin >= SHORTEST and self._is_prose(run[0][0], run[-1][1]):
                    yield run

    def _is_prose(self, start: int, end: int) -> bool:
        """No table and no frame of dashes, and named by words that stand nowhere else."""
        text = self._text[start:end]
        opening = _opening(text)
        return sum(map(str.isalpha, text)) > 0.7 * len(text) and self._plain.count(opening) == 1 and '"' not in opening

    def _quotation(self, run: list[tuple[int, int]]) -> Passage:
        start, end = run[0][0], run[-1][1]
        text = self._text[start:end]
        return Passage(start, end, QUOTE.format(opening=_opening(text)), text)

    def _continuation(self, run: list[tuple[int, int]]) -> Passage | None:
        """Two sentences are given; the rest is asked for."""
        if len(run) < 3 or self._token(run[-1][1]) - self._token(run[2][0]) < REST:
            return None
        start, end = run[0][0], run[-1][1]
        given = " ".join(self._text[start : run[1][1]].split())
        return Passage(start, end, CONTINUE.format(given=given), self._text[run[2][0] : end])


def _between(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """The stretches of a text that `pattern` separates."""
    start = 0
    for match in pattern.finditer(text):
        yield start, match.start()
        start = match.end()
    yield start, len(text)


def _sentences(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Beginning and end of each whole sentence between two characters."""
    part, found, begin = text[start:end] + " ", [], 0
    for match in _SENTENCE_END.finditer(part):
        begin += len(part[begin:]) - len(part[begin:].lstrip())
        found.append((start + begin, start + match.end()))
        begin = match.end()
    return found


def _opening(text: str) -> str:
    return " ".join(text.split()[:OPENING])


def _in_turn(documents: Sequence[Document], first: int) -> Iterator[Document]:
    """All of them, beginning with number `first`."""
    for index in range(len(documents)):
        yield documents[(first + index) % len(documents)]


def _fact_groups(tokenizer: Tokenizer) -> Callable[[], tuple[str, str, str]]:
    """Gives `FACTS` new facts: their statement, the questions, and the answers."""

    def facts() -> Iterator[tuple[str, str, str]]:
        for fact in make_facts(FACTS * 2000, tokenizer, SEED):
            statement, recall = (tokenizer.decode(ids.tolist()).strip() for ids in (fact.statement, fact.recall))
            question, mark, answer = recall.partition("? ")
            if mark:
                yield statement, question + "?", answer

    found = facts()

    def group() -> tuple[str, str, str]:
        statements, questions, answers = zip(*islice(found, FACTS), strict=True)
        lines = ("\n".join(f"{number}. {one}" for number, one in enumerate(of, 1)) for of in (questions, answers))
        questions, answer = lines
        return " ".join(statements), ASK.format(questions=questions), answer

    return group
