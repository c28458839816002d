"""What a second question over the same document costs, and a conversation: results/cpu/prefix.json.

    python -m scripts.bench.prefix
    python -m scripts.bench.prefix --widen vicuna_7b --dtype float16 --output results/gpu/prefix.json
    python -m scripts.bench.prefix -m smollm2 --document_tokens 7000 --output smollm2.json

Questions: each after the same document, by an engine that keeps prefixes, beside one that reads every prompt whole.
Return: the document again after another one, out of a copy.
Conversation: ten turns of one session over the document, greedy and sampled; tokens and accepted drafts of every turn
are compared with those of an engine that reads the whole. Seconds to the first token, the draft's prefill included.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from eagle import entry
from specextend import SamplingConfig, SpecExtend
from specextend.cli import flags
from specextend.data.builtin import builtin_text
from specextend.decoding.output import Generation
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.models.loading import LoadedModels

QUESTIONS = (
    "What is this text about?", "Who is named in it?", "Where does it take place?", "What happens first?",
    "What is said of the weather?", "Which numbers are given?", "What is left open?", "Who decides?",
    "What was different before?", "How does it end?",
)  # fmt: skip
SAMPLINGS = {"greedy": SamplingConfig(), "sampled": SamplingConfig(0.8, seed=1)}
WARM_UP = 16  # tokens


def main() -> None:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--document_tokens", type=int, default=8000, help="length of the document")
    parser.add_argument("--new_tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--output", type=Path, default=Path("results/cpu/prefix.json"))
    entry.add_model_flags(parser)
    parser.set_defaults(use_specextend=True)
    args = parser.parse_args()
    models = entry.load_either(args)
    document, other = (document_of(models, args.document_tokens, number) for number in range(2))
    record: dict[str, Any] = {
        "setting": {
            "model": models.name, "draft": models.draft_id, "dtype": str(models.dtype).removeprefix("torch."),
            "device": models.device.type, "document_tokens": args.document_tokens, "new_tokens": args.new_tokens,
        },
        "environment": environment(),
        "questions": questions(models, document, args.new_tokens, args.eager),
        "return": returning(models, document, other, args.eager),
        "conversations": {
            name: conversation(models, document, args.new_tokens, args.eager, sampling)
            for name, sampling in SAMPLINGS.items()
        },
    }  # fmt: skip
    record["summary"] = summary(record)
    write_json(args.output, record)
    print(json.dumps({"output": str(args.output)} | record["summary"]))


def document_of(models: LoadedModels, tokens: int, number: int = 0) -> str:
    """One of the parts of the built-in text, repeated if it is too short."""
    ids = models.tokenizer(builtin_text(), add_special_tokens=False).input_ids
    return models.tokenizer.decode((ids * -(-(number + 1) * tokens // len(ids)))[number * tokens :][:tokens])


def questions(models: LoadedModels, document: str, new_tokens: int, eager: bool) -> list[dict[str, Any]]:
    """A row per question: both engines answer it, in turns."""
    rows = []
    engines = [SpecExtend(models, eager=eager, prefix_reuse=reuse) for reuse in (True, False)]
    for engine in engines:
        engine.autoregressive(document, 1)  # leaves no prefix behind
        engine.generate(QUESTIONS[0], WARM_UP)
    for question in QUESTIONS:
        asked = [{"role": "system", "content": document}, {"role": "user", "content": question}]
        rows.append(compared(*(engine.chat(asked, new_tokens) for engine in engines)))
    return rows


def returning(models: LoadedModels, document: str, other: str, eager: bool) -> dict[str, Any]:
    """The same document before and after another one, which writes over it in the caches."""
    engine = SpecExtend(models, eager=eager)
    first, _, back = (
        engine.generate(f"{text}\n\n{question}", 1)
        for text, question in zip((document, other, document), QUESTIONS, strict=False)
    )
    return {
        "first_ttft_s": first.ttft_s, "back_ttft_s": back.ttft_s, "cached_tokens": back.cached_tokens,
        "copies_bytes": engine.prefix_bytes,
    }  # fmt: skip


def conversation(
    models: LoadedModels, document: str, new_tokens: int, eager: bool, sampling: SamplingConfig
) -> list[dict[str, Any]]:
    """A row per turn of a session, beside the same messages read whole."""
    rows = []
    engine, fresh = (SpecExtend(models, eager=eager, prefix_reuse=reuse) for reuse in (True, False))
    session = engine.session([{"role": "system", "content": document}], sampling=sampling)
    for question in QUESTIONS:
        answer = session.ask(question, new_tokens)
        rows.append(compared(answer, fresh.chat(session.messages[:-1], new_tokens, sampling=sampling)))
    return rows


def compared(kept: Generation, whole: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": kept.prompt_tokens, "cached_tokens": kept.cached_tokens,
        "ttft_s": kept.ttft_s, "whole_ttft_s": whole.ttft_s, "prefill_s": kept.prefill_seconds,
        "accepted_per_round": kept.accepted_per_round, "whole_accepted_per_round": whole.accepted_per_round,
        "same_tokens": kept.token_ids == whole.token_ids,
    }  # fmt: skip


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Shares of the first question's seconds, which may hold what is done once for all, and of reading the whole in the
    same state, medians; turns whose tokens and accepted drafts are a fresh engine's."""
    first, *rest = record["questions"]
    turns = [row for rows in record["conversations"].values() for row in rows]
    later = [row["ttft_s"] / row["whole_ttft_s"] for rows in record["conversations"].values() for row in rows[1:]]
    return {
        "first_ttft_s": first["ttft_s"],
        "second_over_first": rest[0]["ttft_s"] / first["ttft_s"],
        "later_over_first": statistics.median(row["ttft_s"] for row in rest) / first["ttft_s"],
        "question_over_whole": statistics.median(row["ttft_s"] / row["whole_ttft_s"] for row in rest),
        "back_over_first": record["return"]["back_ttft_s"] / record["return"]["first_ttft_s"],
        "turn_over_whole": statistics.median(later),
        "turns": len(turns),
        "same_tokens": sum(row["same_tokens"] for row in turns),
        "same_acceptance": sum(row["accepted_per_round"] == row["whole_accepted_per_round"] for row in turns),
    }


if __name__ == "__main__":
    flags.run(main)
