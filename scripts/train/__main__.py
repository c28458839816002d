"""Train what is bundled: tokenizer, long-context target, short-context draft, EAGLE heads; measure; write a model card.

    python -m scripts.train --corpus DIR_OR_FILES --out DIR      # or --hub: PG-19 and GovReport train splits
    python -m scripts.train --what eagle1 eagle3 --corpus DIR_OR_FILES --out DIR    # heads of the target in DIR

Stages whose output exists are skipped, and an interrupted training goes on from its last checkpoint (DIR/work).
`--smoke` runs every stage with real shapes for a few seconds. The last line printed is a JSON summary.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from eagle.weights import save_head
from scripts.train import measure
from scripts.train.card import write_card
from scripts.train.corpus import Encoded, encode, hold_out, read_documents, read_hub, source_table, train_tokenizer
from scripts.train.facts import make_facts
from scripts.train.generation import write_rows
from scripts.train.heads import frequent_tokens, head_agreement, head_objective, new_head
from scripts.train.models import CACHED, draft_config, load_model, new_model, save_model, target_config
from scripts.train.objectives import draft_objective, target_objective, validation_agreement, validation_loss
from scripts.train.record import Record, environment
from scripts.train.rows import REPETITIVE, Mix, RowSource
from scripts.train.settings import STAGES, Layout, Settings, TrainingError
from scripts.train.trainer import Phase, Task, Trainer, log, multiplies_bfloat16

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

    def data(self, split: str) -> Encoded:
        path = self.layout.work / f"{split}.npz"
        if not path.exists():
            raise TrainingError(f"{path} is missing; run the stage `tokenizer` first")
        return Encoded.load(path)

    def is_finished(self, stage: str) -> bool:
        """The record travels with the weights, the encoded corpus does not."""
        encoded = all((self.layout.work / f"{split}.npz").exists() for split in ("train", "validation"))
        return self.record.is_finished(stage) and (stage != "tokenizer" or encoded)

    def folder_of(self, model: str) -> Path:
        if not self.record.is_finished(model):
            raise TrainingError(f"the {model} is not trained yet; run the stage `{model}` first")
        return getattr(self.layout, model)

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
            run.record.update(stage, finished=True, environment=environment(run.device, sys.argv))
            if run.record.is_finished("measure"):
                (run.layout.out / "README.md").write_text(write_card(run.record.sections), encoding="utf-8")
    except TrainingError as error:
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
    train, validation = hold_out(documents, settings)
    trained = run.record.is_finished("target")  # then its tokenizer is given
    tokenizer = AutoTokenizer.from_pretrained(run.layout.target) if trained else train_tokenizer(train, settings)
    if len(tokenizer) != settings.vocab_size:
        raise TrainingError(f"the corpus yields only {len(tokenizer)} tokens; lower --vocab_size")
    tokenizer.save_pretrained(run.layout.tokenizer)
    log("tokenizer " + ("taken from the target" if trained else "trained"))
    encoded = {
        "train": encode(train, tokenizer.backend_tokenizer),
        "validation": encode(validation, tokenizer.backend_tokenizer),
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
    rows = run.rows(settings.seed + 1, Mix())
    windows = {length: run.windows(length + 1) for length in (settings.short_context, settings.long_context)}

    def draw(phase: Phase) -> tuple[Tensor, Tensor]:
        tokens, kinds = rows.draw(phase.batch, phase.context + 1)
        return run.to_device(tokens), run.to_device(kinds)

    task = Task(
        draw=draw,
        loss=run.compiled(target_objective(model, settings.unlikelihood_weight)),
        validate=lambda phase: {"loss": validation_loss(model, windows[phase.context])},
        save=lambda: save_model(model, run.layout.tokenizer, run.layout.target),
    )
    phases = [
        Phase("short", 1 - settings.long_fraction, settings.short_batch, settings.short_context),
        Phase("long", 1.0, settings.long_batch, settings.long_context),
    ]
    train(run, "target", model, task, phases, settings.target_seconds)


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


def train_head(kind: str, run: Run) -> None:
    """Stages `eagle1`, `eagle3`: a head of the finished target, half on the corpus, half on what the target writes."""
    settings = run.settings
    written = target_text(run)
    target = load_model(run.folder_of("target"), run.device)
    vocabulary = frequent_tokens([run.data("train").stream, written], settings.eagle_vocab, settings.vocab_size)
    head = new_head(kind, target, settings, vocabulary)
    run.record.update(kind, written_rows=len(written), draft_vocabulary=len(vocabulary) if kind == "eagle3" else None)
    windows = run.windows(settings.draft_context)
    task = Task(
        draw=mixed_rows(run, written, settings.seed + 6),
        loss=run.compiled(head_objective(head, target, settings)),
        validate=lambda phase: head_agreement(head, target, windows, settings.eagle_steps),
        save=lambda: save_head(head, getattr(run.layout, kind)),
    )
    phases = [Phase("distil", 1.0, settings.eagle_batch, settings.draft_context)]
    train(run, kind, head, task, phases, getattr(settings, f"{kind}_seconds"))


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
    """Rows [n, draft_context] uint16 that the target wrote, made once."""
    path, settings = run.layout.work / "written.npy", run.settings
    if not path.exists():
        writer = load_model(run.folder_of("target"), run.device, attention=CACHED, dtype=serving_dtype(run.device))
        written = write_rows(
            writer, run.data("train").stream, rows=settings.generation_rows, prompt=settings.generation_prompt,
            length=settings.draft_context, seconds=settings.generation_seconds, seed=settings.seed + 4,
        )  # fmt: skip
        np.save(path, written)
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
    """Train a model and record it; its checkpoint is of no use afterwards."""
    trainer = Trainer(name, model, task, seconds, run.settings, run.layout.work / f"{name}.pt")
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    run.record.update(name, parameters=parameters)
    log(f"{name}: {parameters / 1e6:.2f}M parameters")
    run.record.update(name, training=trainer.fit(phases))
    if run.device.type == "cuda":
        run.record.update(name, peak_bytes=torch.cuda.max_memory_allocated())
    trainer.checkpoint.unlink(missing_ok=True)


def serving_dtype(device: torch.device) -> torch.dtype:
    """What the target writes text in."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


STAGE_FUNCTIONS = {
    "tokenizer": prepare_tokens,
    "target": train_target,
    "draft": train_draft,
    "measure": measure_pair,
    "eagle1": partial(train_head, "eagle1"),
    "eagle3": partial(train_head, "eagle3"),
}


def summary(run: Run) -> dict:
    """The few figures worth a line."""
    sections = run.record.sections
    weights = [folder / "model.safetensors" for folder in (run.layout.target, run.layout.draft)]
    return {
        "out": str(run.layout.out),
        "finished": [stage for stage in STAGE_FUNCTIONS if run.record.is_finished(stage)],
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
    parser.add_argument("--what", nargs="+", choices=STAGES, default=["pair"], help="the heads need a finished pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="real shapes, seconds per stage, a slice of the corpus")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=f"({field.default})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
