"""Everything a training run can be told, its defaults those of the bundled pair."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STAGES = {  # of each thing that can be trained
    "pair": ("tokenizer", "target", "draft", "measure"),
    "longer": ("tokenizer", "longer"),
    "eagle1": ("tokenizer", "answers", "heads"),
    "eagle3": ("tokenizer", "answers", "heads"),
    "both": ("tokenizer", "answers", "heads"),
}
PROMPT_SHARES = (1.0, 0.85, 1.0, 0.53, 1.0, 0.85, 0.21, 1.0)  # lengths of prompts, of what an answer leaves, in turn
LEAD = 24  # pairs before an answer that count in a head's loss, too

# Two runs that differ in one of these cannot share an output folder: stages would not fit together.
IDENTITY = (
    "target", "seed", "vocab_size", "max_characters", "validation_tokens", "target_hidden", "target_layers",
    "target_heads", "target_ffn", "draft_hidden", "draft_layers", "draft_heads", "draft_ffn", "long_context",
    "draft_context",
)  # fmt: skip


class TrainingError(Exception):
    """The caller's mistake: what was given and the way out, in one line."""


@dataclass(frozen=True)
class Settings:
    """Sizes, budgets in seconds and seeds of one run."""

    target: str = ""  # whose heads are trained, or that learns on: a preset, directory, GGUF file or hub id
    seed: int = 0
    vocab_size: int = 8192
    max_characters: int = 0  # of the corpus; 0 reads all of it
    validation_tokens: int = 1_000_000
    num_facts: int = 20_000

    target_hidden: int = 384
    target_layers: int = 6
    target_heads: int = 6
    target_ffn: int = 1024
    draft_hidden: int = 256
    draft_layers: int = 2
    draft_heads: int = 4
    draft_ffn: int = 704

    short_context: int = 2048
    short_batch: int = 64
    long_context: int = 16384
    long_batch: int = 8
    draft_context: int = 1024
    draft_batch: int = 128
    teacher_temperature: float = 0.8  # of what the draft learns; below 1: capacity goes to likely tokens

    target_seconds: float = 600.0
    long_fraction: float = 0.5
    generation_seconds: float = 45.0
    generation_rows: int = 4096
    generation_prompt: int = 256  # of what the draft learns from
    generation_answer: int = 424  # tokens of an answer at most, of what heads learn from
    draft_seconds: float = 300.0

    eagle_batch: int = 32
    eagle_own: float = 0.8  # share of rows that the target wrote; the others are text of the corpus
    eagle_layers: str = ""  # EAGLE-3's features: what enters these layers, as 2,15,28; "": the published choice
    eagle_vocab: int = 0  # EAGLE-3's; 0: as many thousands as cover 95 % of the target's answers
    eagle_steps: int = 5  # of the training-time test
    eagle_stride: int = 4  # every how many pairs a chain of its later steps begins
    eagle_seconds: float = 400.0  # of training, for all heads at once
    eagle_budget: int = 0  # steps, instead of seconds
    eagle_lr: float = 1e-3  # of AdamW: EAGLE-3's readout and the norms
    eagle_matrix_lr: float = 0.008
    eagle_decay: float = 1.0  # heads forget what they learn at a high rate: theirs falls from the beginning
    eagle_validations: int = 8

    lr_decay: float = 0.5  # last share of a training's budget over which the learning rates fall to nothing
    matrix_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    uncounted_steps: int = 20  # at the start of each phase, off the clock: compilation
    unlikelihood_weight: float = 0.5
    log_steps: int = 200
    validations: int = 8  # per training stage
    checkpoint_seconds: float = 120.0
    step_seconds: float = 0.0  # what a step counts as in the budgets; 0 measures it
    call_seconds: float = 0.0  # after so long a training pauses, to go on with the same command; 0: never

    measure_windows: int = 40
    measure_prompts: int = 64

    def __post_init__(self) -> None:
        if self.target_hidden % self.target_heads or self.draft_hidden % self.draft_heads:
            raise TrainingError("the hidden size must be a multiple of the number of heads")
        if not 0 <= self.long_fraction <= 1:
            raise TrainingError(f"--long_fraction {self.long_fraction} is not between 0 and 1")
        if self.generation_prompt >= self.draft_context:
            raise TrainingError(f"--generation_prompt must stay below --draft_context ({self.draft_context})")
        if self.draft_context > self.long_context or self.short_context > self.long_context:
            raise TrainingError(f"no context may exceed --long_context ({self.long_context})")
        if not 1 <= self.generation_answer <= self.draft_context - 2 * LEAD:
            raise TrainingError(
                f"--generation_answer {self.generation_answer} must be 1 to --draft_context - {2 * LEAD} "
                f"({self.draft_context - 2 * LEAD})"
            )
        if not 1 <= self.eagle_stride <= self.pairs - self.eagle_steps:
            raise TrainingError(f"--eagle_stride {self.eagle_stride} leaves no chain of --eagle_steps in an answer")
        if not 0 <= self.eagle_own <= 1:
            raise TrainingError(f"--eagle_own {self.eagle_own} is not between 0 and 1")

    @property
    def pairs(self) -> int:
        """Pairs of a row on which a head's loss is taken: an answer and a little before it."""
        return self.generation_answer + LEAD

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of the prompts that the target answers, batch by batch."""
        longest = self.draft_context - self.generation_answer
        return tuple(max(LEAD + 1, round(share * longest)) for share in PROMPT_SHARES)

    def of_heads(self) -> "Settings":
        """As the trainer of heads reads them."""
        budget = {"step_seconds": 1.0, "eagle_seconds": float(self.eagle_budget)} if self.eagle_budget else {}
        return dataclasses.replace(
            self, adam_lr=self.eagle_lr, matrix_lr=self.eagle_matrix_lr, lr_decay=self.eagle_decay,
            validations=self.eagle_validations, **budget,
        )  # fmt: skip

    def smoke(self) -> "Settings":
        """The same shapes, a few seconds per stage, on a slice of the corpus."""
        return dataclasses.replace(
            self, max_characters=14_000_000, validation_tokens=400_000, num_facts=2_000, target_seconds=5.0,
            generation_seconds=1.0, generation_rows=512, draft_seconds=5.0, eagle_seconds=6.0,
            log_steps=20, validations=2, checkpoint_seconds=3.0, measure_windows=4, measure_prompts=16,
        )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its files: what ships, and `work/`, which only resuming needs."""

    out: Path

    @property
    def target(self) -> Path:
        return self.out / "target"

    @property
    def draft(self) -> Path:
        return self.out / "draft"

    @property
    def eagle1(self) -> Path:
        return self.out / "eagle1"

    @property
    def eagle3(self) -> Path:
        return self.out / "eagle3"

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    @property
    def record(self) -> Path:
        return self.out / "training_record.json"

    @property
    def answers(self) -> Path:
        return self.work / "answers.npz"


def token_dtype(vocab_size: int) -> type[np.integer]:
    """What ids are kept in."""
    return np.uint16 if vocab_size <= 2**16 else np.int32
