"""Any flags: the answer is autoregressive's, or one line and status 2; never a traceback.

SPECEXTEND_EXAMPLES=10000 tries more of them, SPECEXTEND_SEED=1 others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from specextend.cli import commands, flags
from specextend.data import encoded
from specextend.data.builtin import builtin_text
from specextend.methods import METHODS
from specextend.policy import costs

EXAMPLES = int(os.environ.get("SPECEXTEND_EXAMPLES", "150"))
LIMIT = 256

HUGE = ["4611686018427387904", "99999999999999999999", "-99999999999999999999"]
NOT_NUMBERS = ["", "nan", "inf", "-inf", "1e400", "many", "0x10"]


def some(*likely: object, unlikely: list[str] = [*HUGE, *NOT_NUMBERS, "-1", "0"]) -> st.SearchStrategy[str]:  # noqa: B006
    """Mostly one of `likely`, sometimes what nobody should give."""
    return st.sampled_from([*map(str, likely)] * 4 + unlikely)


VALUES = {
    "--method": st.sampled_from([*METHODS, "no_such_method", ""]),
    "--draft_cache": st.sampled_from(["full", "streaming", "retrieval", "some"]),
    "--draft_window": some(0, 1, 16, 512),
    "--prefill_block": some(0, 1, 7, 64),
    "--nodes": some(1, 2, 8, 50, 100),
    "--max_depth": some(1, 2, 10, 64),
    "--tree": some("paper", "price", "tall"),
    "--threshold": some(0, 0.3, 0.7, 5),
    "--min_probability": some(0, 0.1, 0.9, 1),
    "--retrieval_chunk_size": some(1, 3, 32, 500),
    "--retrieve_top_k": some(1, 2, 8, 1000),
    "--retrieve_every_n_steps": some(1, 2, 5),
    "--retrieval_sink": some(0, 1, 4),
    "--retrieval_recent": some(1, 2, 5),
    "--temperature": some(0, 0.5, 1, 3),
    "--top_p": some(0.1, 0.9, 1, 2),
    "--top_k": some(0, 1, 5, 1000),
    "--seed": some(0, 1, 2**63 - 1, 2**63),
    "--max_gen_len": some(1, 2, 9, LIMIT),
    "--input_len": some(1, 2, 40, 100, LIMIT - 1, LIMIT),
    "--max_samples": some(1, 2),
    "--dtype": st.sampled_from(["auto", "float32", "float64", "int3"]),
    "--stop": st.sampled_from(["a", "the", ""]),
}
SWITCHES = [
    "--use_specextend", "--flash_prefill", "--no-flash_prefill", "--hybrid_tree_attention",
    "--no-hybrid_tree_attention", "--eager", "--no_such_flag",
]  # fmt: skip


@st.composite
def command_lines(draw) -> list[str]:
    """A few flags with values, and switches; the prompt is short unless a flag says otherwise."""
    words = []
    for flag in draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=6, unique=True)):
        words += [flag, draw(VALUES[flag])]
    words += draw(st.lists(st.sampled_from(SWITCHES), max_size=2, unique=True))
    for flag, value in (("--input_len", "60"), ("--max_gen_len", "12")):
        words += [flag, value] if flag not in words else []
    return words


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory, make_model) -> tuple[Path, Path]:
    """Directories of a random target and draft whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("pair")
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocab | {"</s>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    for name, number in (("target", 0), ("draft", 1)):
        make_model("gqa", number, vocab_size=257, max_position_embeddings=LIMIT, eos_token_id=256).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    return folder / "target", folder / "draft"


@pytest.fixture(scope="session")
def run_line(pair_dirs) -> Callable[[list[str]], tuple[int, list[tuple[list[int], list[int]]]]]:
    """run_line(words): exit status, and (tokens of the method, tokens of the target alone) of each prompt.

    The real parser, checks and config; models are loaded once per dtype.
    """
    loaded: dict[str, object] = {}
    text = builtin_text()[: 8 * LIMIT]  # the whole takes longer to encode than all that is tried takes to run
    answers: list[tuple[list[int], list[int]]] = []

    class Recorder(commands.ConsoleReporter):
        """Runs the method as ever, and the target alone beside it."""

        def introduce(self, engine, sampling) -> None:
            super().introduce(engine, sampling)
            self._engine = engine

        def answer(self, prompt, methods, **request) -> None:
            alone = self._engine.autoregressive(prompt.ids, **request)
            for generate in methods.values():
                answers.append((generate(prompt.ids, **request).token_ids, alone.token_ids))

    def main(words: list[str]) -> None:
        parser = flags.parser("test")
        flags.add_model_flags(parser, widen=True)
        commands.add_run_flags(parser)
        target, draft = map(str, pair_dirs)
        args = parser.parse_args(["-m", target, "--draft_model", draft, *words])

        def load():
            if args.dtype not in loaded:
                loaded[args.dtype] = commands.load_pair(args)
            return loaded[args.dtype]

        commands.answer(args, load)

    def run(words: list[str]) -> tuple[int, list[tuple[list[int], list[int]]]]:
        answers.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commands, "ConsoleReporter", Recorder)
            patch.setattr(encoded, "builtin_text", lambda: text)
            patch.setattr(costs, "REPEATS", 1)
            try:
                flags.run(lambda: main(words))
            except SystemExit as exit_:
                return exit_.code, []
        return 0, list(answers)

    return run


@seed(int(os.environ.get("SPECEXTEND_SEED", "0")))
@settings(max_examples=EXAMPLES)
@given(words=command_lines())
def test_any_flags_give_the_targets_tokens_or_one_line_and_status_2(words, run_line, capsys):
    capsys.readouterr()
    status, answers = run_line(words)
    err = capsys.readouterr().err
    if status == 0:
        assert answers and all(ours == alone for ours, alone in answers) and err == ""
    else:
        assert status == 2 and err.count("\n") == 1 and len(err) < 1000 and "Traceback" not in err
