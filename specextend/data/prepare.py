"""Building `data/<name>/<name>_<length>.jsonl` ("Experiments": inputs of 512 to 16K tokens, summarization prompts).

Documents come from the Hugging Face hub, from a folder of texts or of prompts, or from Python's language reference.
Each prompt is a document at least as long as asked for, cut so that the whole prompt, templates included, fills the
length by the target's tokenizer (`cutting.py`). All files of a set are collected first and then renamed into place:
there is never half a file.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from specextend.data.builtin import builtin_topics, join_topics
from specextend.data.cutting import Cutter, Document, SameDocuments, document_in, load_cutter, load_limit
from specextend.data.prompts import (
    TEXT_SUFFIXES,
    find_buckets,
    length_label,
    parse_length,
    read_prompts,
    read_text,
    strip_text,
)
from specextend.errors import InputError

DEFAULT_LENGTHS = ("512", "1K", "2K", "4K", "8K", "16K")
DEFAULT_SAMPLES = 20
DEFAULT_ROOM = 256
BUILTIN = "builtin"
AIME = "aime24"
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub: id, field with the text, splits in reading order, `load_dataset` options."""

    path: str
    text_field: str
    splits: tuple[str, ...] = ("test",)
    options: dict = field(default_factory=dict)


def _parquet_copy(path: str, config: str, text_field: str) -> HubSource:
    """The hub's own Parquet copy of a set whose main branch is a loading script, which `datasets` 4+ refuses."""
    options = {"revision": "refs/convert/parquet", "data_files": {"test": f"{config}/test/*.parquet"}}
    return HubSource(path, text_field, options=options)


# Tried in order; the first one that opens is used.
HUB_SOURCES: dict[str, tuple[HubSource, ...]] = {
    "govreport": (
        HubSource("ccdv/govreport-summarization", "report"),
        _parquet_copy("ccdv/govreport-summarization", "document", "report"),
        _parquet_copy("launch/gov_report", "plain_text", "document"),
    ),
    "pg19": (
        HubSource("emozilla/pg19-test", "text"),
        HubSource("emozilla/pg19", "text"),
        _parquet_copy("deepmind/pg19", "default", "text"),
    ),
    "booksum": (HubSource("kmfoda/booksum", "chapter", splits=("test", "train")),),
    AIME: (HubSource("HuggingFaceH4/aime_2024", "problem", splits=("train",)),),
}
KNOWN_SETS = (*HUB_SOURCES, BUILTIN)


@dataclass(frozen=True)
class PrepareConfig:
    """What to build for each set.

    Args:
        root: folder that receives one folder per set.
        model_name: whose tokenizer and conversation template count the tokens.
        lengths: prompt lengths in tokens.
        samples: prompts per length.
        force: build again what is there already.
        same_documents: every length has the same documents, in the same order, without their middle; else a length has
            the first documents that are long enough for it, cut at the end.
        room: tokens for the answer that the longest prompts leave to the model, with `same_documents`.
        skip: leave out the first documents of each length, such as those that settings were tuned on.
    """

    root: Path = Path("data")
    model_name: str = "bundled"
    lengths: tuple[int, ...] = tuple(parse_length(label) for label in DEFAULT_LENGTHS)
    samples: int = DEFAULT_SAMPLES
    force: bool = False
    same_documents: bool = False
    room: int = DEFAULT_ROOM
    skip: int = 0

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise InputError(f"skip is {self.skip}; it is a number of documents, 0 leaves out none", setting="skip")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; ask for at least 1 prompt per length", setting="samples")
        if not self.lengths:
            raise InputError(f"no length is given; the default is {' '.join(DEFAULT_LENGTHS)}", setting="lengths")


def ensure_data(data_dir: Path, model_name: str = "bundled", **settings) -> Path:
    """`data_dir`, built first if it is a known one (data/govreport, pg19, booksum, aime24, builtin) without prompts.

    Args:
        settings: further fields of `PrepareConfig`, except `root`.
    """
    data_dir = Path(data_dir)
    if data_dir.name in KNOWN_SETS and not any(data_dir.glob("*.jsonl")):
        say(f"{data_dir} is not there yet; building it")
        prepare_known(data_dir.name, PrepareConfig(data_dir.parent, model_name, **settings))
    return data_dir


def prepare_known(name: str, config: PrepareConfig) -> None:
    """Build one of `KNOWN_SETS` under `config.root`."""
    if name not in KNOWN_SETS:
        raise InputError(
            f"unknown data set {name!r}; known are {', '.join(KNOWN_SETS)}, or give a folder of texts",
            setting="from_dir",
        )
    if name == AIME:
        prepare_problems(config)
    elif name == BUILTIN:
        prepare_documents(name, builtin_documents(), config)
    else:
        prepare_documents(name, hub_documents(name), config)


def prepare_folder(folder: Path, name: str | None, config: PrepareConfig) -> None:
    """Build a set from a folder of text files, called like the folder unless `name` says otherwise."""
    folder = Path(folder)
    prepare_documents(name or folder.resolve().name, folder_documents(folder), config)


def prepare_documents(name: str, documents: Iterator[Document], config: PrepareConfig) -> None:
    """Write one file per length, prompts taken from the documents in their order; existing files stay.

    Where all lengths have the same documents they stay together or are all built again.
    """
    lengths = sorted(set(config.lengths))
    missing = [length for length in lengths if _is_due(_file_of(name, config.root, length), config)]
    if not missing:
        return
    check_writable(config.root / name)
    cutter = load_cutter(config.model_name)
    if config.same_documents:
        missing = lengths
        cutter = SameDocuments(cutter.tokenizer, cutter.template, load_limit(config.model_name, config.room))
    collected = collect(name, documents, cutter, missing, config.skip + config.samples)
    for length, records in collected.items():
        records = records[config.skip :]
        if len(records) < config.samples:
            say(f"{name}: {len(records)} of {config.samples} prompts of {length_label(length)}: no more such texts")
        if records:
            write_records(_file_of(name, config.root, length), records)


def prepare_problems(config: PrepareConfig) -> None:
    """Write the 30 problems of AIME 2024 as they are, without lengths and templates."""
    path = config.root / AIME / f"{AIME}.jsonl"
    if _is_due(path, config):
        check_writable(path.parent)
        write_records(path, [{key: row[key] for key in ("id", "problem", "answer")} for _, row, _ in hub_rows(AIME)])


def collect(
    name: str, documents: Iterator[Document], cutter: Cutter, lengths: Sequence[int], samples: int
) -> dict[int, list[dict]]:
    """Up to `samples` records per length, no text twice; reads no more documents than that takes."""
    collected: dict[int, list[dict]] = {length: [] for length in lengths}
    seen: set[str] = set()
    longest = 0
    # delayed: a source that cannot be opened should leave its error alone on the screen, without an empty bar
    bar = {"delay": 0.1, "leave": False, "disable": not sys.stderr.isatty()}
    with tqdm(total=len(lengths) * samples, desc=name, unit=" prompts", **bar) as progress:
        for document in documents:
            if document.text in seen or not document.text:
                continue
            seen.add(document.text)
            open_lengths = [length for length in lengths if len(collected[length]) < samples]
            for length, record in cutter.records(document, open_lengths).items():
                collected[length].append(record)
                longest = max(longest, record["original_length"])
                progress.update()
            progress.set_postfix(texts=len(seen), refresh=False)
            if all(len(records) == samples for records in collected.values()):
                break
    if not longest:
        raise InputError(
            f"{name}: none of {len(seen)} texts has {length_label(cutter.needed(lengths))} tokens; "
            "give longer texts or shorter lengths",
            setting="lengths",
        )
    return collected


def builtin_documents() -> Iterator[Document]:
    """The whole language reference once per topic, turned so as to begin there; neighbours in order start far apart."""
    topics = builtin_topics()
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    stride = next(n for n in range(round(0.618 * len(topics)), len(topics) + 2) if math.gcd(n, len(topics)) == 1)
    for step in range(len(topics)):
        start = step * stride % len(topics)
        yield Document(join_topics(topics[start:] + topics[:start]), f"{version} pydoc_data.topics:{topics[start][0]}")


def folder_documents(folder: Path) -> Iterator[Document]:
    """The text files below a folder, by name."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one of {', '.join(TEXT_SUFFIXES)} files", setting="from_dir")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    if not texts:
        raise InputError(
            f"{folder} holds no text file; read are {', '.join(TEXT_SUFFIXES)} in UTF-8", setting="from_dir"
        )
    if len(texts) < len(files):
        say(f"{folder}: reading {len(texts)} text files, leaving out {len(files) - len(texts)} other files")
    return (Document(strip_text(read_text(path)), path.relative_to(folder).as_posix()) for path in texts)


def prepare_prompts(folder: Path, name: str | None, config: PrepareConfig) -> None:
    """Build a set from the documents in a folder of prompts, called like the folder unless `name` says otherwise."""
    folder = Path(folder)
    target = config.root / (name or folder.resolve().name)
    if target.resolve() == folder.resolve():
        raise InputError(f"{folder} would be read and written; choose another folder or name", setting="root")
    prepare_documents(target.name, prompt_documents(folder), config)


def prompt_documents(folder: Path) -> Iterator[Document]:
    """The documents that the prompts of a folder ask about, those of the longest file first, each as long as it is.

    A file of shorter prompts often holds the same documents again: one whose first third begins another is left out.
    """
    known: list[str] = []
    for path in reversed(find_buckets(folder).values()):
        for prompt in read_prompts(path):
            text = strip_text(document_in(prompt.text))
            if not any(longer.startswith(text[: len(text) // 3]) for longer in known):
                known.append(text)
                yield Document(text, f"{path.name}:{prompt.source.rpartition(':')[2]}")


def hub_documents(name: str) -> Iterator[Document]:
    """The texts of a set on the hub, in the hub's order."""
    for source, row, where in hub_rows(name):
        yield Document(strip_text(row[source.text_field] or ""), where)


def hub_rows(name: str) -> Iterator[tuple[HubSource, dict, str]]:
    """Stream the rows of the first source of `name` that opens: its source, the row, "id/split:number"."""
    import httpx
    from datasets.exceptions import DatasetsError

    refusals = []
    try:
        probe_hub()
        say(f"{name}: reading from the Hugging Face hub")
        for source in HUB_SOURCES[name]:
            try:
                rows = _open_rows(source)
            except (ConnectionError, httpx.TransportError):
                raise
            except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # moved, gated, other fields, ...
                refusals.append(f"{source.path}: {_first_line(error)}")
                continue
            yield from ((source, row, where) for row, where in rows)
            return
    except (OSError, httpx.HTTPError, DatasetsError) as error:
        raise _unavailable(name, _first_line(error)) from error
    raise _unavailable(name, "; ".join(refusals))


def probe_hub() -> None:
    """Raise at once where the hub cannot be reached; `datasets` itself would retry for half a minute."""
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)


def _open_rows(source: HubSource) -> Iterator[tuple[dict, str]]:
    """The source's rows, the first one already fetched and seen to have its text field."""
    import datasets

    def rows() -> Iterator[tuple[dict, str]]:
        for split in source.splits:
            stream = datasets.load_dataset(source.path, split=split, streaming=True, **source.options)
            yield from ((row, f"{source.path}/{split}:{number}") for number, row in enumerate(stream))

    stream = rows()
    first = next(stream, None)
    if first is None or source.text_field not in first[0]:
        raise ValueError(f"no field {source.text_field!r}" if first else "no rows")
    return chain([first], stream)


def _unavailable(name: str, reason: str) -> InputError:
    if name == AIME:
        way_out = f"write problems as {name}/{name}.jsonl, a line each: " + '{"problem": "...", "answer": "..."}'
    else:
        way_out = (
            f"either build it from your own texts: `python scripts/prepare_data.py --from_dir FOLDER --name {name}`, "
            "or use Python's language reference: `python scripts/prepare_data.py --builtin` and then "
            f"--data_dir data/{BUILTIN}"
        )
    return InputError(f"{name} cannot be fetched from the Hugging Face hub ({reason}); {way_out}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def check_writable(folder: Path) -> None:
    """InputError if no file can be made in `folder`, which may not be there yet; leaves nothing behind."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for place in made:
            if place.is_dir():
                place.rmdir()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({error.strerror}); choose another folder", setting="root")


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write JSON Lines so that `path` holds all of them or, after any failure, what it held before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # temporary files are private, data files are not
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error
    say(f"wrote {path}")


def say(message: str) -> None:
    """One line on stderr that does not tear a progress bar."""
    tqdm.write(message, file=sys.stderr)


def _file_of(name: str, root: Path, length: int) -> Path:
    if name != Path(name).name or name in ("", ".."):
        raise InputError(f"{name!r} cannot name a folder of prompts; choose a plain name", setting="set_name")
    return root / name / f"{name}_{length_label(length)}.jsonl"


def _is_due(path: Path, config: PrepareConfig) -> bool:
    if path.exists() and not config.force:
        say(f"keeping {path} (--force builds it again)")
        return False
    return True
