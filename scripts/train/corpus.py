"""Text to tokens: read documents, hold some out, train the tokenizer, encode both splits."""

import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from scripts.train.settings import Settings, TrainingError, token_dtype

SEPARATOR = "<|endoftext|>"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BOS_ID, EOS_ID = 1, 2
MIN_CHARACTERS = 500
TOKENIZER_CHARACTERS = 60_000_000
PIECE_CHARACTERS = 50_000
BATCH_PIECES = 400
CHARACTERS_PER_TOKEN = 4.1  # only to size the held-out part before a tokenizer exists
HUB_SPLITS = (("emozilla/pg19", "text"), ("ccdv/govreport-summarization", "report"))


@dataclass(frozen=True)
class Encoded:
    """Documents as one stream, each with its control tokens; document d is `stream[starts[d]:starts[d + 1]]`."""

    stream: np.ndarray  # [N] uint16, int32 where the vocabulary is larger
    starts: np.ndarray  # [documents + 1] int64

    def save(self, path: Path) -> None:
        np.savez(path, stream=self.stream, starts=self.starts)

    @classmethod
    def load(cls, path: Path) -> "Encoded":
        with np.load(path) as arrays:
            return cls(arrays["stream"], arrays["starts"])

    def documents(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.stream[start:end]

    def windows(self, length: int, limit: int) -> np.ndarray:
        """Up to `limit` disjoint windows, [n, length] int64, each within one document, taken round-robin."""
        cut = [[d[i : i + length] for i in range(0, len(d) - length + 1, length)] for d in self.documents()]
        deepest = max((len(windows) for windows in cut), default=0)
        chosen = [windows[depth] for depth in range(deepest) for windows in cut if depth < len(windows)][:limit]
        if not chosen:
            raise TrainingError(f"no held-out document has {length} tokens; give more text or smaller contexts")
        return np.stack(chosen).astype(np.int64)

    def draw(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Windows [count, length] int64 from anywhere, each within one document.

        A document counts as the root of its length, so that books do not crowd out everything else.
        """
        sizes = np.diff(self.starts)
        weights = np.sqrt(sizes) * (sizes >= length)
        if not weights.any():
            raise TrainingError(f"no document has {length} tokens; give longer texts or smaller contexts")
        chosen = rng.choice(len(sizes), size=count, p=weights / weights.sum())
        starts = self.starts[chosen] + (rng.random(count) * (sizes[chosen] - length + 1)).astype(np.int64)
        return np.array([self.stream[start : start + length] for start in starts], np.int64).reshape(count, length)


def read_documents(paths: list[Path], max_characters: int) -> list[str]:
    """Documents of text files (plain or .xz) or of all `*.txt*` in folders, separated by `<|endoftext|>` lines."""
    files = [file for path in paths for file in (sorted(path.glob("*.txt*")) if path.is_dir() else [path])]
    missing = [str(path) for path in [*paths, *files] if not path.exists()]
    if missing or not files:
        raise TrainingError(f"no corpus text at {', '.join(missing or map(str, paths))}")
    documents, characters = [], 0
    for file in files:
        opener = lzma.open if file.suffix == ".xz" else open
        with opener(file, "rt", encoding="utf-8") as handle:
            text = handle.read()
        for document in ("\n" + text).split(f"\n{SEPARATOR}\n"):
            document = document.strip().removesuffix(SEPARATOR).strip()
            if len(document) < MIN_CHARACTERS:
                continue
            documents.append(document)
            characters += len(document)
            if max_characters and characters >= max_characters:
                return documents
    if not documents:
        raise TrainingError(f"no document of {MIN_CHARACTERS} characters in {', '.join(map(str, files))}")
    return documents


def read_hub(max_characters: int) -> list[str]:
    """The same many characters of each of the PG-19 and GovReport train splits, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TrainingError("--hub needs the package `datasets`; or give --corpus") from error
    documents = []
    for name, field in HUB_SPLITS:
        left = (max_characters or 170_000_000) // len(HUB_SPLITS)
        for row in load_dataset(name, split="train", streaming=True):
            text = row[field].strip()
            if len(text) >= MIN_CHARACTERS:
                documents.append(text)
                left -= len(text)
            if left <= 0:
                break
    return documents


def source_table(paths: list[Path]) -> list[dict[str, str]]:
    """Rows "source repository | commit | licence | documents | MB" of the README.md in a corpus folder."""
    rows = []
    for readme in (path / "README.md" for path in paths if path.is_dir()):
        lines = readme.read_text(encoding="utf-8").splitlines() if readme.exists() else []
        kind = ""
        for line in lines:
            if line.startswith("## "):
                kind = line[3:].split(":")[0]
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if len(cells) == 5 and "/" in cells[0] and cells[3].isdigit():
                rows.append(dict(zip(("repository", "commit", "licence", "documents", "mb"), cells, strict=True)))
                rows[-1]["kind"] = kind
    return rows


def hold_out(documents: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Split into (train, validation): the latter about `validation_tokens`, 70 % of it in long documents."""
    budget = settings.validation_tokens * CHARACTERS_PER_TOKEN
    long = 1.25 * settings.long_context * CHARACTERS_PER_TOKEN
    order = np.random.default_rng(settings.seed).permutation(len(documents))
    held: list[int] = []
    used = 0.0
    for wants_long, share in ((True, 0.7), (False, 1.0)):
        for index in order:
            size = len(documents[index])
            if used >= share * budget:
                break
            if (size >= long) == wants_long and size <= 8 * long:
                held.append(index)
                used += size
    if len(held) in (0, len(documents)):
        raise TrainingError(
            f"of {len(documents)} documents {len(held)} would be held out; give more of them (in one file, a line "
            f"{SEPARATOR} separates them), or change --validation_tokens"
        )
    chosen = set(held)
    return [d for i, d in enumerate(documents) if i not in chosen], [documents[i] for i in held]


def train_tokenizer(documents: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<unk> <s> </s>` as 0, 1, 2, that puts `<s>` in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(map(len, documents))
    share = min(1.0, TOKENIZER_CHARACTERS / total)
    tokenizer.train_from_iterator((d[: int(len(d) * share) + 1] for d in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNK,
        model_max_length=settings.long_context,
        clean_up_tokenization_spaces=False,
    )


def encode(documents: list[str], tokenizer: Tokenizer, edges: tuple[Sequence[int], Sequence[int]]) -> Encoded:
    """Encode in parallel, in pieces that end before a space, so that pieces join as if never cut.

    Args:
        edges: ids put before and after each document.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype = token_dtype(tokenizer.get_vocab_size())
    pieces = [(index, piece) for index, document in enumerate(documents) for piece in _pieces(document)]
    bodies: list[list[np.ndarray]] = [[] for _ in documents]
    for begin in range(0, len(pieces), BATCH_PIECES):
        batch = pieces[begin : begin + BATCH_PIECES]
        encodings = tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
        for (index, _), encoding in zip(batch, encodings, strict=True):
            bodies[index].append(np.array(encoding.ids, dtype=dtype))
    before, after = (np.array(ids, dtype=dtype) for ids in edges)
    whole = [np.concatenate([before, *body, after]) for body in bodies]
    return Encoded(np.concatenate(whole), np.cumsum([0, *map(len, whole)]))


def _pieces(document: str) -> Iterator[str]:
    begin = 0
    while begin < len(document):
        end = begin + PIECE_CHARACTERS
        if end < len(document):
            space = document.rfind(" ", begin + 1, end)
            end = space if space > begin else end
        yield document[begin:end]
        begin = end
