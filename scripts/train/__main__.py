"""Train the bundled models, EAGLE heads for any target of the Llama family, or a target at more positions.

    python -m scripts.train --target MODEL --what both --corpus DIR_OR_FILES --out DIR     # docs/train_a_head.md
    python -m scripts.train --corpus DIR_OR_FILES --out DIR      # the bundled pair; --hub: PG-19 and GovReport
    python -m scripts.train --what both --corpus DIR_OR_FILES --out DIR    # heads of the pair's target in DIR
    python -m scripts.train --target MODEL --what longer --long_context 65536 --corpus DIR_OR_FILES --out DIR

Stages whose output exists are skipped, and an interrupted training goes on from its last checkpoint (DIR/work).
`--smoke` runs every stage with real shapes for a few seconds. The last line printed is a JSON summary.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from eagle.weights import save_head
from scripts.train import measure
from scripts.train.card import write_card, write_head_card, write_longer_card
from scripts.train.corpus import (
    BOS_ID,
    EOS_ID,
    Encoded,
    encode,
    hold_out,
    read_documents,
    read_hub,
    source_table,
    train_tokenizer,
)
from scripts.train.facts import make_facts
from scripts.train.generation import Written, write_rows
from scripts.train.heads import draft_vocabulary, feature_layers, head_agreement, head_objective, new_head
from scripts.train.models import (
    CACHED,
    CAUSAL,
    ENDS,
    draft_config,
    lengthened,
    load_any_target,
    load_model,
    new_model,
    save_model,
    target_config,
)
from scripts.train.objectives import draft_objective, target_objective, validation_agreement, validation_loss
from scripts.train.prompts import Prompts
from scripts.train.record import Record, environment
from scripts.train.rows import REPETITIVE, Mix, RowSource
from scripts.train.settings import LEAD, STAGES, Layout, Settings, TrainingError
from scripts.train.trainer import Paused, Phase, Task, Trainer, log, multiplies_bfloat16
from specextend.errors import SpecExtendError
from specextend.evaluation.answers import ends_in_loop
from specextend.models.loading import LoadedModels, load_tokenizer

VALIDATION_TOKENS_PER_CHECK = 131_072
PROMPT_TOKENS, LOOP_TOKENS = 1024, 256  # of the test for loops


class Run:
    """What the stages share: settings, folders, the record, and the data once the tokenizer stage has made it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.settings = args, settings_from(args)
        self.device = torch.device(args.device)
        self.layout = Layout(args.out)
        self.layout.work.mkdir(parents=True, exist_ok=True)
        self.record = Record(self.layout.record)
        self.record.begin(self.settings)
        self.heads = [kind for kind in HEADS if {kind, "both"} & set(args.what)]

    def data(self, split: str) -> Encoded:
        path = self.layout.work / f"{split}.npz"
        if not path.exists():
            raise TrainingError(f"{path} is missing; run the stage `tokenizer` first")
        return Encoded.load(path)

    def is_finished(self, stage: str) -> bool:
        """The record travels with the weights, the encoded corpus does not."""
        encoded = all((self.layout.work / f"{split}.npz").exists() for split in ("train", "validation"))
        if stage == "heads":
            return all(map(self.record.is_finished, self.heads))
        there = {"tokenizer": encoded, "answers": self.layout.answers.exists()}
        return self.record.is_finished(stage) and there.get(stage, True)

    def folder_of(self, model: str) -> Path:
        if not self.record.is_finished(model):
            raise TrainingError(f"the {model} is not trained yet; run the stage `{model}` first")
        return getattr(self.layout, model)

    def target_name(self) -> str:
        """The target whose heads are trained, as loaders know it."""
        return self.settings.target or str(self.folder_of("target"))

    def load_target(self, *, attention: str) -> LoadedModels:
        return load_any_target(self.target_name(), self.device, attention=attention)

    def rows(self, seed: int, mix: Mix) -> RowSource:
        """Rows of the training stream with everything planted."""
        tokenizer = AutoTokenizer.from_pretrained(self.layout.tokenizer).backend_tokenizer
        facts = make_facts(self.settings.num_facts, tokenizer, self.settings.seed)
        return RowSource(self.data("train").stream, facts, mix, seed)

    def to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def windows(self, length: int) -> Tensor:
        """Held-out windows of `length` tokens for the checks during training."""
        limit = max(1, VALIDATION_TOKENS_PER_CHECK // length)
        return self.to_device(self.data("validation").windows(length, limit))

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function if self.args.no_compile else torch.compile(function, dynamic=False)


def main() -> None:
    args = parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # TF32 would round the rotary angles, a float32 product
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length, 50 ms a token while text is written
    try:
        run = Run(args)
        for stage in dict.fromkeys(stage for thing in args.what for stage in STAGES[thing]):
            if run.is_finished(stage):
                log(f"{stage}: already done, skipped")
                continue
            log(f"{stage}: begins")
            STAGE_FUNCTIONS[stage](run)
            for section in run.heads if stage == "heads" else [stage]:
                run.record.update(section, finished=True, environment=environment(run.device, sys.argv))
            for kind in run.heads if stage == "heads" and args.target else []:
                card = write_head_card(kind, run.record.sections)
                (getattr(run.layout, kind) / "README.md").write_text(card, encoding="utf-8")
            if stage == "longer":
                card = write_longer_card(run.record.sections)
                (run.layout.target / "README.md").write_text(card, encoding="utf-8")
            if run.record.is_finished("measure"):
                (run.layout.out / "README.md").write_text(write_card(run.record.sections), encoding="utf-8")
    except Paused as paused:
        log(paused)
    except (TrainingError, SpecExtendError) as error:
        print(f"scripts.train: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(summary(run)), flush=True)


def prepare_tokens(run: Run) -> None:
    """Stage `tokenizer`: read the corpus, hold documents out, train the tokenizer, encode both splits."""
    settings, args = run.settings, run.args
    if not (args.hub or args.corpus):
        raise TrainingError("give --corpus DIR_OR_FILES or --hub")
    documents = read_hub(settings.max_characters) if args.hub else read_documents(args.corpus, settings.max_characters)
    characters = sum(map(len, documents))
    log(f"{len(documents)} documents, {characters / 1e6:.1f}M characters")
    if settings.target:  # of little text little is held out
        few = int(0.03 * characters / 4)
        settings = dataclasses.replace(settings, validation_tokens=min(settings.validation_tokens, few))
    train, validation = hold_out(documents, settings)
    given = settings.target or run.record.is_finished("target")  # the target, and its tokenizer with it
    tokenizer = load_tokenizer(run.target_name()) if given else train_tokenizer(train, settings)
    if not given and len(tokenizer) != settings.vocab_size:
        raise TrainingError(f"the corpus yields only {len(tokenizer)} tokens; lower --vocab_size")
    tokenizer.save_pretrained(run.layout.tokenizer)
    log("tokenizer " + ("taken from the target" if given else "trained"))
    edges = ([], []) if settings.target else ([BOS_ID], [EOS_ID])
    encoded = {
        "train": encode(train, tokenizer.backend_tokenizer, edges),
        "validation": encode(validation, tokenizer.backend_tokenizer, edges),
    }
    for split, tokens in encoded.items():
        tokens.save(run.layout.work / f"{split}.npz")
    run.record.update(
        "tokenizer",
        hub=args.hub,
        sources=[] if args.hub else source_table(args.corpus),
        documents=len(documents),
        megabytes=sum(len(document.encode()) for document in documents) / 1e6,
        tokens=len(encoded["train"].stream),
        validation_tokens=len(encoded["validation"].stream),
        validation_documents=len(validation),
        characters_per_token=sum(map(len, train)) / len(encoded["train"].stream),
    )
    log("encoded", {split: len(tokens.stream) for split, tokens in encoded.items()})


def train_target(run: Run) -> None:
    """Stage `target`: short rows first, then rows of the full context."""
    settings = run.settings
    model = new_model(target_config(settings), run.device, settings.seed)
    phases = [
        Phase("short", 1 - settings.long_fraction, settings.short_batch, settings.short_context),
        Phase("long", 1.0, settings.long_batch, settings.long_context),
    ]
    task = text_task(run, model, phases, ENDS)
    train(run, "target", model, task, phases, settings.target_seconds)


def train_longer(run: Run) -> None:
    """Stage `longer`: a target's weights learn on, on rows of more tokens than it had positions."""
    settings = run.settings
    target = run.load_target(attention=CAUSAL).target
    model = lengthened(target, settings.long_context)
    phases = [Phase("longer", 1.0, settings.long_batch, settings.long_context)]
    task = text_task(run, model, phases, target.generation_config)
    train(run, "longer", model, task, phases, settings.target_seconds)


def text_task(run: Run, model: LlamaForCausalLM, phases: list[Phase], ends: GenerationConfig) -> Task:
    """To foretell the corpus, with everything planted in it, in rows of these phases."""
    rows = run.rows(run.settings.seed + 1, Mix())
    windows = {phase.context: run.windows(phase.context + 1) for phase in phases}

    def draw(phase: Phase) -> tuple[Tensor, Tensor]:
        tokens, kinds = rows.draw(phase.batch, phase.context + 1)
        return run.to_device(tokens), run.to_device(kinds)

    return Task(
        draw=draw,
        loss=run.compiled(target_objective(model, run.settings.unlikelihood_weight)),
        validate=lambda phase: {"loss": validation_loss(model, windows[phase.context])},
        save=lambda: save_model(model, run.layout.tokenizer, run.layout.target, ends),
    )


def train_draft(run: Run) -> None:
    """Stage `draft`: distilled from the rounded target, half on the corpus, half on what the target writes.

    Without `generation_rows` all of it is on the corpus: a CPU writes too slowly.
    """
    settings = run.settings
    written = target_text(run) if settings.generation_rows else np.empty((0, settings.draft_context), np.uint16)
    run.record.update("draft", written_rows=len(written))
    target = load_model(run.folder_of("target"), run.device)
    draft = new_model(draft_config(settings), run.device, settings.seed)
    windows = run.windows(settings.draft_context)
    task = Task(
        draw=mixed_rows(run, written, settings.seed + 2),
        loss=run.compiled(draft_objective(draft, target, settings.teacher_temperature)),
        validate=lambda phase: validation_agreement(draft, target, windows),
        save=lambda: save_model(draft, run.layout.tokenizer, run.layout.draft),
    )
    phases = [Phase("distil", 1.0, settings.draft_batch, settings.draft_context)]
    train(run, "draft", draft, task, phases, settings.draft_seconds)


def write_answers(run: Run) -> None:
    """Stage `answers`: the target answers prompts made of the corpus, greedily and sampled."""
    settings, loaded = run.settings, run.load_target(attention=CACHED)
    template = loaded.preset.template
    written = write_rows(
        loaded.target, Prompts(run.data("train"), loaded.tokenizer, template, settings.seed + 3),
        lengths=settings.prompt_lengths, rows=settings.generation_rows, context=settings.draft_context,
        answer=settings.generation_answer, stops=loaded.eos_token_ids, seconds=settings.generation_seconds,
        seed=settings.seed + 4,
    )  # fmt: skip
    written.save(run.layout.answers)
    torch.cuda.empty_cache()
    lengths, counts = np.unique(written.prompts, return_counts=True)
    some = range(min(2000, len(written.rows)))
    loops = {
        name: [ends_in_loop(answer_of(written, i)) for i in some if written.greedy[i] == greedy]
        for name, greedy in (("greedy", True), ("sampled", False))
    }
    run.record.update(
        "answers",
        target=loaded.target_id,
        template=template,
        rows=len(written.rows),
        rows_by_prompt=dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
        tokens=int(written.answers.sum()),
        answer_quantiles={str(q): float(np.quantile(written.answers, q)) for q in (0.1, 0.5, 0.9)},
        ended=float(np.mean(written.answers < settings.generation_answer)),
        loops={name: float(np.mean(found)) for name, found in loops.items() if found},
        samples=[loaded.tokenizer.decode(answer_of(written, i)[:200]) for i in some[:6]],
    )


def answer_of(written: Written, index: int) -> np.ndarray:
    begin = written.prompts[index]
    return written.rows[index, begin : begin + written.answers[index]]


def train_heads(run: Run) -> None:
    """Stage `heads`: those asked for that are not there yet, all on one pass of the target."""
    settings = run.settings.of_heads()
    written, corpus = Written.load(run.layout.answers), run.data("train")
    target = run.load_target(attention=CAUSAL).target
    answers = np.concatenate([answer_of(written, index) for index in range(len(written.rows))])
    vocabulary, covered = draft_vocabulary(answers, settings.eagle_vocab, target.config.vocab_size)
    kinds = [kind for kind in run.heads if not run.record.is_finished(kind)]
    heads = nn.ModuleDict({kind: new_head(kind, target, settings, vocabulary) for kind in kinds})
    for kind, head in heads.items():
        own = {"draft_vocabulary": len(vocabulary), "covered": covered, "layers": feature_layers(target, settings)}
        trained = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
        run.record.update(kind, parameters=trained, written_rows=len(written.rows), **(own if kind == "eagle3" else {}))

    held, groups = by_prompt_length(written)
    windows = {
        "": (run.to_device(held[1].astype(np.int64)), held[0] - 1 - LEAD),
        "corpus_": (run.windows(settings.draft_context)[: len(held[1])], held[0] - 1 - LEAD),
    }

    def validate(phase: Phase) -> dict[str, float]:
        figures = {}
        for prefix, (rows, first) in windows.items():
            found = head_agreement(heads, target, rows, first, settings.pairs, settings.eagle_steps)
            figures |= {f"{kind}/{prefix}{name}": value for kind in found for name, value in found[kind].items()}
        return figures

    task = Task(
        draw=answers_and_corpus(run, groups, corpus, settings),
        loss=head_objective(heads, target, settings, settings.pairs, run.compiled),
        validate=validate,
        save=lambda: [save_head(head, getattr(run.layout, kind)) for kind, head in heads.items()],
    )
    phases = [Phase("distil", 1.0, settings.eagle_batch, settings.draft_context)]
    training = fit(run, "heads", heads, task, phases, settings.eagle_seconds, settings)
    for kind in heads:
        run.record.update(kind, training=training | {"validation": figures_of(kind, training["validation"])})


def by_prompt_length(written: Written) -> tuple[tuple[int, np.ndarray], dict[int, np.ndarray]]:
    """(prompt length, rows) held out of the longest prompts, and all other rows by prompt length."""
    groups = {int(length): written.rows[written.prompts == length] for length in np.unique(written.prompts)}
    longest = max(groups)
    spare = max(1, min(48, len(groups[longest]) // 8))
    held, groups[longest] = groups[longest][:spare], groups[longest][spare:]
    return (longest, held), {length: rows for length, rows in groups.items() if len(rows)}


def answers_and_corpus(
    run: Run, groups: dict[int, np.ndarray], corpus: Encoded, settings: Settings
) -> Callable[[Phase], tuple[Tensor, Tensor]]:
    """Batches of rows behind prompts of one length and rows of the corpus; with the pair their loss begins at."""
    rng = np.random.default_rng(settings.seed + 6)
    lengths = list(groups)
    shares = np.array([len(rows) for rows in groups.values()], float)

    def draw(phase: Phase) -> tuple[Tensor, Tensor]:
        length = lengths[rng.choice(len(lengths), p=shares / shares.sum())]
        own = round(phase.batch * settings.eagle_own)
        answered = groups[length][rng.integers(0, len(groups[length]), size=own)].astype(np.int64)
        natural = corpus.draw(rng, phase.batch - own, phase.context)
        rows = np.concatenate([answered, natural])
        return run.to_device(rows), torch.tensor(length - 1 - LEAD, device=run.device)

    return draw


def figures_of(kind: str, validations: list[dict]) -> list[dict]:
    """Of the validations of several heads, one head's, as those of a training of its own."""
    return [
        {
            name.removeprefix(f"{kind}/"): value
            for name, value in one.items()
            if name.startswith(f"{kind}/") or "/" not in name
        }
        for one in validations
    ]


def mixed_rows(run: Run, written: np.ndarray, seed: int) -> Callable[[Phase], tuple[Tensor]]:
    """Batches [B, T] of rows, half of them from `written` [n, T] if there are any, the others from the corpus."""
    rows, rng = run.rows(seed, REPETITIVE), np.random.default_rng(seed + 100)

    def draw(phase: Phase) -> tuple[Tensor]:
        own_rows = phase.batch // 2 if len(written) else 0
        natural, _ = rows.draw(phase.batch - own_rows, phase.context)
        own = written[rng.integers(0, max(1, len(written)), size=own_rows)]
        return (run.to_device(np.concatenate([natural, own.astype(np.int64)])),)

    return draw


def target_text(run: Run) -> np.ndarray:
    """Rows [n, draft_context] uint16 in which the target goes on with text of the corpus, made once."""
    path, settings = run.layout.work / "written.npy", run.settings
    if not path.exists():
        writer = load_model(run.folder_of("target"), run.device, attention=CACHED, dtype=serving_dtype(run.device))
        corpus, rng = run.data("train"), np.random.default_rng(settings.seed + 4)
        written = write_rows(
            writer, lambda count, length: corpus.draw(rng, count, length), lengths=[settings.generation_prompt],
            rows=settings.generation_rows, context=settings.draft_context,
            answer=settings.draft_context - settings.generation_prompt, stops=(), seconds=settings.generation_seconds,
            seed=settings.seed + 4,
        )  # fmt: skip
        np.save(path, written.rows)
        del writer
        torch.cuda.empty_cache()
    return np.load(path)


def measure_pair(run: Run) -> None:
    """Stage `measure`: held-out figures into the record one by one, then the model card."""
    settings = run.settings
    target = load_model(run.folder_of("target"), run.device)
    draft = load_model(run.folder_of("draft"), run.device)
    writer = load_model(run.layout.target, run.device, attention=CACHED, dtype=serving_dtype(run.device))
    both, held_out = {"target": target, "draft": draft}, run.data("validation")
    windows = torch.from_numpy(held_out.windows(settings.long_context + 1, settings.measure_windows)).to(run.device)
    prompts = held_out.windows(min(PROMPT_TOKENS, settings.long_context // 2), settings.measure_prompts)
    prompts = torch.from_numpy(prompts).to(run.device)
    lengths = [n for n in (900, 2048, 8192, 16000) if n <= settings.long_context] or [settings.long_context]
    tokenizer = AutoTokenizer.from_pretrained(run.layout.tokenizer).backend_tokenizer
    facts = make_facts(len(windows), tokenizer, settings.seed + 5)
    context = settings.draft_context
    measurements = {
        "loss_by_position": lambda: measure.loss_by_position(target, windows),
        "loss_by_context": lambda: measure.loss_by_context(target, windows),
        "agreement_natural": lambda: measure.agreement_by_position(target, draft, windows, context),
        "agreement_own_text": lambda: measure.agreement_on_own_text(
            target, draft, writer, prompts[:, : settings.generation_prompt], context
        ),
        "copying": lambda: measure.copying(both, windows, lengths),
        "facts": lambda: measure.recalling(both, windows, lengths, facts),
        "looping": lambda: measure.looping(writer, prompts, min(LOOP_TOKENS, settings.long_context // 2)),
    }
    run.record.update("measure", windows=len(windows), prompts=len(prompts))
    for name, measurement in measurements.items():
        figures = measurement()
        run.record.update("measure", **{name: figures})
        log(name, json.dumps(figures))


def train(run: Run, name: str, model: nn.Module, task: Task, phases: list[Phase], seconds: float) -> None:
    """Train a model and record it."""
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    run.record.update(name, parameters=parameters)
    log(f"{name}: {parameters / 1e6:.2f}M parameters")
    run.record.update(name, training=fit(run, name, model, task, phases, seconds, run.settings))
    if run.device.type == "cuda":
        run.record.update(name, peak_bytes=torch.cuda.max_memory_allocated())


def fit(
    run: Run, name: str, model: nn.Module, task: Task, phases: list[Phase], seconds: float, settings: Settings
) -> dict:
    """The record of a training; its checkpoint is of no use afterwards."""
    trainer = Trainer(name, model, task, seconds, settings, run.layout.work / f"{name}.pt")
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = trainer.fit(phases)
    trainer.checkpoint.unlink(missing_ok=True)
    return training


def serving_dtype(device: torch.device) -> torch.dtype:
    """What the target writes text in."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


HEADS = ("eagle1", "eagle3")
STAGE_FUNCTIONS = {
    "tokenizer": prepare_tokens,
    "target": train_target,
    "longer": train_longer,
    "draft": train_draft,
    "measure": measure_pair,
    "answers": write_answers,
    "heads": train_heads,
}


def summary(run: Run) -> dict:
    """The few figures worth a line."""
    sections = run.record.sections
    weights = [folder / "model.safetensors" for folder in (run.layout.target, run.layout.draft)]
    last = {kind: sections[kind]["training"]["validation"][-1] for kind in HEADS if run.record.is_finished(kind)}
    return {
        "out": str(run.layout.out),
        "finished": [stage for stage in (*STAGE_FUNCTIONS, *HEADS) if run.record.is_finished(stage)],
        "same_argmax_1": {kind: figures["same_argmax_1"] for kind, figures in last.items()},
        "weight_bytes": sum(file.stat().st_size for file in weights if file.exists()),
        **{name: sections.get("measure", {}).get(name) for name in ("loss_by_position", "copying", "looping")},
    }


def settings_from(args: argparse.Namespace) -> Settings:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**given)
    return settings.smoke() if args.smoke else settings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="folders or files (.txt, .txt.xz)")
    parser.add_argument("--hub", action="store_true", help="read PG-19 and GovReport through `datasets` instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--what", nargs="+", choices=STAGES, help="default: pair, with --target both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="real shapes, seconds per stage, a slice of the corpus")
    parser.add_argument(
        "--target",
        default="",
        help="whose heads are trained, or that learns on: preset, directory, GGUF file or hub id",
    )
    for field in dataclasses.fields(Settings)[1:]:
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=f"({field.default})")
    args = parser.parse_args()
    args.what = args.what or ["both" if args.target else "pair"]
    if args.target and "pair" in args.what:
        parser.error("--target has its weights already; ask for --what eagle1, eagle3, both or longer")
    if "longer" in args.what and not args.target:
        parser.error("--what longer needs --target, whose weights learn on")
    return args


if __name__ == "__main__":
    main()
