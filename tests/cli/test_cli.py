"""The command line: flags become settings, mistakes one line and status 2, and `run_classic.py` does what it says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specextend.cli import commands, flags
from specextend.cli.reporter import ConsoleReporter
from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.data import encoded
from specextend.data.builtin import builtin_text
from specextend.data.encoded import EncodedPrompt
from specextend.decoding.output import Generation, Output, Round
from specextend.errors import ConfigError, SpecExtendError
from specextend.models.presets import PRESETS, Preset

ROOT = Path(__file__).parents[2]
LIMIT = 512


# ---- flags to settings


def parse(*words: str) -> argparse.Namespace:
    parser = flags.parser("test")
    flags.add_model_flags(parser)
    flags.add_method_flags(parser)
    flags.add_sampling_flags(parser)
    return parser.parse_args(words)


def config_of(*words: str, device: str = "cpu", ranks: int = 1) -> SpecExtendConfig:
    models = SimpleNamespace(preset=Preset("tiny", "tiny", None), device=torch.device(device), ranks=ranks)
    return flags.config_from(parse(*words), models)


def test_without_flags_the_setting_is_standard_and_the_papers():
    assert config_of("--tree", "paper") == SpecExtendConfig.standard()
    config = config_of("--tree", "paper")
    assert (config.flash_prefill, config.hybrid_tree_attention, config.draft_cache) == (False, False, "full")
    assert config.tree == TreeConfig(50, 10, 0.7)
    assert config.retrieval == RetrievalConfig(32, 32, 4)


def test_use_specextend_turns_all_parts_on():
    config = config_of("--use_specextend")
    assert (config.flash_prefill, config.hybrid_tree_attention, config.draft_cache) == (True, True, "retrieval")


@pytest.mark.parametrize(
    "words, field, value",
    [
        ("--flash_prefill", "flash_prefill", True),
        ("--use_specextend --no-flash_prefill", "flash_prefill", False),
        ("--hybrid_tree_attention", "hybrid_tree_attention", True),
        ("--use_specextend --no-hybrid_tree_attention", "hybrid_tree_attention", False),
        ("--draft_cache streaming", "draft_cache", "streaming"),
        ("--use_specextend --draft_cache full", "draft_cache", "full"),
        ("--draft_window 0", "draft_window", 0),
        ("--prefill_block 77", "prefill_block", 77),
    ],
)
def test_every_switch_changes_its_own_field(words, field, value):
    base = "--use_specextend" if "--use_specextend" in words else ""
    expected = {**vars(config_of(*base.split())), field: value}
    assert vars(config_of(*words.split())) == expected and getattr(config_of(*base.split()), field) != value


@pytest.mark.parametrize(
    "flag, part, field",
    [
        ("--nodes", "tree", "nodes"),
        ("--max_depth", "tree", "max_depth"),
        ("--threshold", "tree", "threshold"),
        ("--retrieval_chunk_size", "retrieval", "chunk_size"),
        ("--retrieve_top_k", "retrieval", "top_k"),
        ("--retrieve_every_n_steps", "retrieval", "every_n_steps"),
        ("--retrieval_sink", "retrieval", "sink"),
        ("--retrieval_recent", "retrieval", "recent"),
    ],
)
def test_every_parameter_of_the_reference_has_its_flag(flag, part, field):
    expected = {**vars(getattr(config_of("--tree", "paper"), part)), field: 7}
    assert vars(getattr(config_of(flag, "7"), part)) == expected


def test_problems_to_reason_about_get_long_sampled_answers_unless_flags_say_otherwise(tmp_path, monkeypatch):
    problems = tmp_path / "aime24"
    problems.mkdir()
    (problems / "aime24.jsonl").write_text('{"id": 0, "problem": "What is 1 + 1?", "answer": "2"}\n')
    plans = []
    monkeypatch.setattr(commands, "evaluate", lambda engine, plan, *_, **__: plans.append(plan) or {})
    monkeypatch.setattr(commands, "uniform_engine", lambda *_, **__: SimpleNamespace(limit=5000))
    preset = Preset("tiny", "tiny", None)

    def plan_of(*words: str):
        parser = flags.parser("test")
        commands.add_eval_flags(parser)
        flags.add_model_flags(parser)
        args = parser.parse_args(["--data_dir", str(problems), *words])
        commands.measure(args, lambda: SimpleNamespace(preset=preset, device=torch.device("cpu"), ranks=1))
        return plans[-1]

    plan = plan_of()
    assert list(plan.buckets) == ["all"] and plan.buckets["all"][0].extra["answer"] == "2"
    assert (plan.max_new_tokens, plan.sampling.temperature) == (5000 - 1024, 0.5)
    plan = plan_of("-max", "64", "--temperature", "0")
    assert (plan.max_new_tokens, plan.sampling.temperature) == (64, 0)


def test_trees_are_priced_unless_a_flag_gives_a_bound_or_the_target_is_shared():
    assert config_of("--use_specextend").tree == TreeConfig.priced()
    assert config_of().tree == replace(TreeConfig.priced(), lookup_branch=False)  # standard decoding has none
    assert config_of("--nodes", "9").tree == TreeConfig(nodes=9)
    assert config_of("--threshold", "0.3").tree == TreeConfig(threshold=0.3)
    assert config_of("--tree", "paper").tree == TreeConfig()
    assert config_of(ranks=2).tree == TreeConfig()
    assert config_of("--use_specextend", device="cuda").tree == TreeConfig.priced()


def test_priced_trees_are_a_flag_and_take_no_bounds_but_their_size():
    priced = ("--use_specextend", "--tree", "price")
    assert config_of(*priced).tree == TreeConfig.priced()
    assert config_of(*priced, "--nodes", "9").tree == replace(TreeConfig.priced(), nodes=9)
    with pytest.raises(ConfigError, match="threshold is 0.3; priced trees have no such bound"):
        config_of("--tree", "price", "--threshold", "0.3")
    assert config_of("--method", "prompt_lookup", "--tree", "price").tree.rule == "fixed"  # chains have their own


def test_a_branch_is_asked_for_with_any_method_that_prices_trees_and_is_no_bound():
    without = replace(TreeConfig.priced(), lookup_branch=False)
    assert config_of("--use_specextend", "--no-lookup_branch").tree == without
    assert config_of("--method", "fa_hta", "--lookup_branch").tree == TreeConfig.priced()
    assert config_of("--use_specextend", "--nodes", "9", "--no-lookup_branch").tree == TreeConfig(nodes=9)
    with pytest.raises(ConfigError, match="lookup_branch is True; it has a place in priced trees alone"):
        config_of("--tree", "paper", "--lookup_branch")


def test_sampling_flags_become_the_sampling_setting():
    words = ("--temperature", "0.7", "--top_p", "0.9", "--top_k", "40", "--seed", "12")
    assert flags.sampling_from(parse(*words)) == SamplingConfig(0.7, 0.9, 40, 12)
    assert flags.sampling_from(parse()) == SamplingConfig()


@pytest.mark.parametrize("error, status", [(SpecExtendError("no\nsuch  thing"), 2), (KeyboardInterrupt(), 130)])
def test_run_turns_mistakes_into_a_line_and_a_status(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        flags.run(main)
    assert exit_.value.code == status
    assert capsys.readouterr().err == ("SpecExtendError: no such thing\n" if status == 2 else "interrupted\n")


def test_run_hides_no_error_of_our_own():
    with pytest.raises(ZeroDivisionError):
        flags.run(lambda: 1 / 0)


# ---- run_classic.py on a tiny checkpoint


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory, make_model) -> tuple[Path, Path]:
    """Directories of a random target and draft whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab | {"</s>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    for name, seed in (("target", 0), ("draft", 1)):
        model = make_model("gqa", seed, vocab_size=257, max_position_embeddings=LIMIT, eos_token_id=256)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "target", folder / "draft"


@pytest.fixture(scope="session")
def run_classic():
    spec = importlib.util.spec_from_file_location("run_classic", ROOT / "run_classic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def classic(run_classic, tiny_pair, monkeypatch, capsys):
    """classic(*flags): (status, stdout, stderr) of `run_classic.py` on the tiny pair."""

    def call(*words: str, pair: bool = True, whole: bool = False) -> tuple[int, str, str]:
        if not whole:  # most of a run's time would go into encoding what is cut off
            monkeypatch.setattr(encoded, "builtin_text", lambda: builtin_text()[:20_000])
        target, draft = tiny_pair
        named = ["--model_name", str(target), "--draft_model", str(draft)] if pair else []
        monkeypatch.setattr(sys, "argv", ["run_classic.py", *named, *map(str, words)])
        status = 0
        try:
            flags.run(run_classic.main)
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return call


def results(stdout: str) -> list[dict]:
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


SHORT = ("--input_len", "100", "-max", "8")


def test_run_answers_the_built_in_text(classic):
    status, out, err = classic(*SHORT, "--use_specextend")
    assert status == 0 and err == ""
    assert "specextend: flash prefill on, hybrid tree attention on, draft cache retrieval" in out
    assert "Python language reference" in out and "100 tokens" in out
    assert re.search(r"specextend: 8 tokens \(length\), \d\.\d\d draft tokens accepted per round", out)


def test_run_without_use_specextend_is_standard(classic):
    _, out, _ = classic(*SHORT)
    assert "standard: flash prefill off, hybrid tree attention off, draft cache full" in out


def test_run_with_single_parts_names_them(classic):
    _, out, _ = classic(*SHORT, "--use_specextend", "--no-flash_prefill")
    assert "hta-retrieval: flash prefill off, hybrid tree attention on, draft cache retrieval" in out


def test_result_line_is_json_with_the_figures_and_the_text(classic):
    status, out, _ = classic(*SHORT, "--output_result_line")
    (result,) = results(out)
    assert status == 0 and out.splitlines()[-1].startswith("{")
    assert result["method"] == "standard" and result["prompt_tokens"] == 100 and result["new_tokens"] == 8
    assert result["finish_reason"] == "length" and isinstance(result["text"], str)
    numbers = ("accepted_per_round", "tokens_per_round", "ttft_s", "decode_tokens_per_s", "tokens_per_s")
    assert all(result[number] >= 0 for number in numbers)


def test_compare_shows_three_methods_with_the_same_text(classic):
    status, out, _ = classic(*SHORT, "--compare", "--use_specextend", "--output_result_line")
    lines = results(out)
    assert status == 0
    assert [line["method"] for line in lines] == ["autoregressive", "standard", "specextend"]
    assert len({line["text"] for line in lines}) == 1
    assert "speedup" in out and "NO" not in out.split("speedup")[-1].split("{")[0]


def test_seed_and_temperature_reach_the_sampler(classic):
    def sampled(*flags: str) -> list[str]:
        _, out, _ = classic(*SHORT, "--compare", "--output_result_line", "--temperature", "1.5", *flags)
        return [line["text"] for line in results(out)]

    first = sampled("--seed", "1")
    assert len(set(first)) == 1 and first == sampled("--seed", "1") and first != sampled("--seed", "2")


def test_verbose_streams_the_text_that_the_result_line_reports(classic, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time")
    _, out, _ = classic("-i", prompt, "-max", "20", "--verbose", "--output_result_line")
    (result,) = results(out)
    visible = "".join(character for character in result["text"] if character.isprintable())
    shown = "".join(character for character in out.split("\n\nstandard: ")[0] if character.isprintable())
    assert visible and shown.endswith(visible)
    assert "the target's own" not in out  # no colours, no legend of them


def test_prompts_come_from_a_jsonl_file_up_to_max_samples(classic, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": f"prompt {n} " * 10}) + "\n" for n in range(3)))
    _, out, _ = classic("-i", file, "-n", "2", "-max", "3", "--output_result_line")
    assert [line["source"] for line in results(out)] == [f"{file}:1", f"{file}:2"]
    assert [line["prompt_tokens"] for line in results(out)] == [90, 90]


@pytest.mark.parametrize("words, known", [((), 1), (("--no-prefix_reuse",), 0), (("--compare",), 0)])
def test_a_prompt_that_begins_like_the_last_is_read_from_there(words, known, classic, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text((json.dumps({"text": "the same prompt " * 6}) + "\n") * 2)
    status, out, _ = classic("-i", file, "-n", "2", "-max", "3", *words)
    assert status == 0 and out.count("(95 prompt tokens were known)") == known and out.count("were known") == known


def test_prompt_is_cut_only_when_input_len_says_so(classic, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("word " * 200)
    status, out, _ = classic("-i", file, "-max", "4", "--input_len", "300")
    assert status == 0 and "300 tokens, cut from 1000" in out
    status, out, err = classic("-i", file, "-max", "4")
    assert status == 2 and "1000 tokens" in err and "508" in err and "--input_len" in err


def test_built_in_text_fills_what_the_model_holds(classic):
    _, out, _ = classic("-max", "12", "--output_result_line")
    assert results(out)[0]["prompt_tokens"] == LIMIT - 12


@pytest.mark.parametrize("length", [100, 300])
def test_built_in_text_is_said_to_be_as_long_as_it_is(length, classic):
    _, whole, _ = classic("-max", "4", "--input_len", str(length), whole=True)
    said = re.search(rf"{length} tokens, cut from (\d+)", whole)
    assert int(said[1]) > len(builtin_text()) // 2  # nearly a token per character


def test_stop_flag_ends_the_answer(classic):
    _, out, _ = classic(*SHORT[:2], "-max", "40", "--output_result_line")
    text = results(out)[0]["text"]
    stop = text[10:12]
    _, out, _ = classic(*SHORT[:2], "-max", "40", "--output_result_line", "--stop", stop)
    assert results(out)[0]["text"] == text[: text.find(stop)] and results(out)[0]["finish_reason"] == "stop"


BAD = [
    ("--nodes 0", "nodes is 0"),
    ("--max_depth 0", "max_depth is 0"),
    ("--threshold -1", "threshold is -1"),
    ("--threshold nan", "threshold is nan"),
    (
        "--retrieval_chunk_size 0",
        "retrieval chunk_size is 0; give a whole number from 1 to 1048576 tokens (--retrieval_chunk_size)",
    ),
    ("--retrieve_top_k 0", "retrieval top_k is 0"),
    ("--retrieve_every_n_steps 0", "retrieval every_n_steps is 0"),
    ("--retrieval_sink -1", "sink is -1"),
    ("--retrieval_recent 0", "recent is 0"),
    ("--draft_window -1", "draft_window is -1"),
    ("--prefill_block -1", "prefill_block is -1"),
    ("--nodes 5000", "nodes is 5000; give a whole number from 1 to 1024 draft tokens (--nodes)"),
    ("--retrieve_top_k 4611686018427387904", "(--retrieve_top_k)"),
    ("--draft_window 99999999999999999999", "(--draft_window)"),
    ("--method prompt_lookup --draft_cache retrieval", "drafting 'lookup' has no draft cache"),
    ("--method autoregressive --draft_cache streaming", "drafting 'none' has no draft cache"),
    ("--temperature -0.1", "temperature is -0.1"),
    ("--temperature nan", "temperature is nan"),
    ("--temperature inf", "temperature is inf"),
    ("--top_p 0", "top_p is 0"),
    ("--top_p 1.5", "top_p is 1.5"),
    ("--top_k -1", "top_k is -1"),
    ("--seed 99999999999999999999", "seed is 99999999999999999999"),
    ("--seed -1", "seed is -1"),
    ("--max_gen_len 0", "max_gen_len is 0"),
    ("--max_gen_len -3", "max_gen_len is -3"),
    ("--max_gen_len 600", "512"),
    ("--max_samples 0", "max_samples is 0"),
    ("--input_len 0", "input_len is 0"),
    ("--input_len -5", "input_len is -5"),
    ("--input_len 512", "holds 512 positions"),
    ("--dtype int3", "dtype 'int3' is unknown"),
    ("--device cuda:99", "device 'cuda:99' is not there"),
    ("--device tpu", "device 'tpu' is not there"),
    ("--draft_cache some", "invalid choice: 'some'"),
    ("--nodes many", "invalid int value: 'many'"),
    ("--temperature warm", "invalid float value: 'warm'"),
    ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ("--nodes", "expected one argument"),
    ("--draft_model no-such-model", "no-such-model"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flag_gives_one_line_and_status_2(flags, message, classic):
    status, _, err = classic(*flags.split())
    assert status == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


def test_empty_stop_string_gives_one_line_and_status_2(classic):
    status, _, err = classic(*SHORT, "--stop", "")
    assert status == 2 and "stop" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_that_is_not_there_gives_one_line_and_status_2(classic):
    status, _, err = classic("--device", "cuda")
    assert status == 2 and err == "DeviceError: device 'cuda' is not there; this machine has cpu (--device)\n"


@pytest.mark.parametrize("model", ["no-such-model", "", "a/b/c/d", "[/bold]", "model[red]"])
def test_unknown_model_lists_the_known(model, classic):
    status, _, err = classic("-m", model, pair=False)
    assert status == 2 and err.count("\n") == 1
    assert all(name in err for name in PRESETS)


FILES = {
    "empty.jsonl": ("", "empty"),
    "blank.txt": (" \n\n", "blank.txt"),
    "malformed.jsonl": ('{"text": "fine"}\n{"text": \n', "malformed.jsonl:2"),
    "number.jsonl": ("17\n", "number.jsonl:1"),
    "textless.jsonl": ('{"text": "fine"}\n{"title": "x"}\n', "textless.jsonl:2"),
    "void.jsonl": ('{"text": "  "}\n', "void.jsonl:1"),
    "unknown.pdf": ("text", ".pdf"),
    "long.jsonl": (json.dumps({"text": "x" * 600}) + "\n", "600 tokens"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_cannot_be_used_gives_one_line_and_status_2(name, classic, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    status, _, err = classic("-i", tmp_path / name, "-n", "5", "-max", "4")
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("path", ["missing.jsonl", "."])
def test_file_that_is_not_there_gives_one_line_and_status_2(path, classic, tmp_path):
    status, _, err = classic("-i", tmp_path / path)
    assert status == 2 and str(tmp_path) in err and err.count("\n") == 1


def test_malformed_line_behind_max_samples_does_not_matter(classic, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "fine"}\nbroken\n')
    assert classic("-i", file, "-n", "1", "-max", "3")[0] == 0


@pytest.mark.parametrize("verbose", [False, True])
def test_text_is_printed_as_it_is(verbose, capsys):
    # neither markup nor emoji codes are the printer's business
    text = ":warning: [bold]x[/] [/]\n  end "
    generation = Generation(3, [1, 2], text, "length", [Round([2], 1, 0, {})], {"target": 1.0})

    def generate(prompt, *, on_round):
        decode = {0: "", 1: text[:12], 2: text}
        output = Output(torch.tensor([1, 2, 3]), 2, frozenset(), (), lambda ids: decode[len(ids)])
        output.begin(torch.tensor(1))
        on_round(output, None)
        on_round(output, output.append(1, [2, 3], {}))
        return generation

    prompt = EncodedPrompt(torch.tensor([1, 2, 3]), "[file]:1", 3)
    ConsoleReporter(verbose=verbose, result_line=False).answer(prompt, {"standard": generate})
    out = capsys.readouterr().out
    assert text in out and "[file]:1" in out


def test_compare_warms_up_and_times_every_method_there_and_back(capsys):
    calls = []

    def method(name: str, tokens_per_s: float):
        def generate(prompt, *, max_new_tokens, on_round=None):
            calls.append((name, max_new_tokens))
            seconds = (max_new_tokens - 1) / tokens_per_s
            return Generation(3, [1] * max_new_tokens, "x", "length", [Round([1], 1, 0, {"verify": seconds})], {})

        return generate

    prompt = EncodedPrompt(torch.tensor([1, 2, 3]), "a:1", 3)
    reporter = ConsoleReporter(verbose=False, result_line=False)
    reporter.answer(prompt, {"one": method("one", 10), "two": method("two", 20)}, max_new_tokens=21)
    assert calls == [("one", 8), ("one", 21), ("two", 8), ("two", 21), ("two", 21), ("one", 21)]
    assert "2.00x" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_figures_side_by_side_are_whole_at_any_width(width, classic, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = classic(*SHORT, "--compare", "--method", "fa_hta_streaming")
    table = out[out.index("accepted") :].splitlines()
    assert "…" not in out and max(map(len, table)) <= width
    (row,) = (line.split() for line in table if line.startswith("fa_hta_streaming"))
    assert row[-1] == "yes" and len([cell for cell in row if cell.endswith("x")]) == 2


@pytest.mark.parametrize("method", ["prompt_lookup", "autoregressive", "magicdec"])
def test_compare_does_without_standard_where_no_draft_is_known(method, classic, tiny_pair):
    status, out, err = classic(
        "-m", tiny_pair[0], "--method", method, *SHORT, "--compare", "--output_result_line", pair=False
    )
    assert (status, err) == (0, "")
    assert [line["method"] for line in results(out)] == list(dict.fromkeys(["autoregressive", method]))


@pytest.mark.parametrize("words, message", [("-i missing.jsonl", "missing.jsonl"), ("-n 0", "max_samples is 0")])
def test_mistakes_are_found_before_the_models_are_loaded(words, message, run_classic, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_models", lambda *_, **__: pytest.fail("loaded"))
    for more in ([], ["--nodes", "0"], ["--temperature", "-1"], ["--draft_model", ""]):
        monkeypatch.setattr(sys, "argv", ["run_classic.py", *words.split(), *more])
        with pytest.raises(SystemExit) as exit_:
            flags.run(run_classic.main)
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and err.count("\n") == 1 and (message in err or more)


def test_a_text_larger_than_any_prompt_is_refused_untokenized(classic, tmp_path, monkeypatch):
    file = tmp_path / "huge.jsonl"
    file.write_text(json.dumps({"text": "word " * 10_000}) + "\n")
    monkeypatch.setattr(commands.SpecExtend, "encode", lambda *_: pytest.fail("tokenized"))
    status, _, err = classic("-i", file, "--input_len", "100")
    assert status == 2 and err.count("\n") == 1 and "huge.jsonl:1 has 50,000 characters" in err and "shorten it" in err


def test_long_work_says_what_goes_on_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("specextend.cli.reporter.QUIET_S", 0.01)
    reporter = ConsoleReporter(verbose=False, result_line=False)
    with reporter.busy("standard: reading 4096 tokens") as busy:
        while "0 s so far" not in (err := capsys.readouterr().err):
            pass
        assert err.startswith("standard: reading 4096 tokens, 0 s so far\n")
        busy.stop()


# ---- as a process of its own


@pytest.mark.parametrize("script", ["run_classic.py", "run_eagle.py", "eval_classic.py", "eval_eagle.py"])
def test_ctrl_c_while_python_imports_is_one_line_and_130(script):
    program = (
        "import sys, runpy, importlib.abc\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['{script}']\n"
        f"runpy.run_path('{ROOT / script}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_pipe_that_closes_over_stdout_and_stderr_leaves_the_status():
    program = "from specextend.cli.entry import run\nrun(lambda: [print('x' * 100) for _ in range(100_000)])"
    done = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done.stdout.readline()
    done.stdout.close()
    assert done.wait() == 141


@pytest.mark.parametrize("end", ["full", "closed"])
def test_output_that_cannot_be_written_is_one_line_and_a_status(end, tmp_path):
    program = (
        "import sys; from specextend.cli.entry import run\n"
        "def main():\n"
        "    for _ in range(100_000): print('x' * 100)\n"
        "run(main)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=full if end == "full" else subprocess.PIPE,
        )  # fmt: skip
        if done.stdout:
            done.stdout.readline()
            done.stdout.close()
        err = done.stderr.read()
        done.stderr.close()
    assert err.count("\n") == 1 and "Traceback" not in err and "output" in err
    assert done.wait() == (2 if end == "full" else 141)


def test_process_answers_from_any_directory(tiny_pair):
    target, draft = map(str, tiny_pair)
    flags = ["-m", target, "--draft_model", draft, *SHORT, "--use_specextend", "--output_result_line"]
    command = [sys.executable, str(ROOT / "run_classic.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=600)
    assert done.returncode == 0, done.stderr
    assert results(done.stdout)[-1]["new_tokens"] == 8 and "Traceback" not in done.stderr


@pytest.mark.xdist_group("warm")
def test_process_ends_a_mistake_with_one_line_and_status_2(tiny_pair, warm):
    target, draft = map(str, tiny_pair)
    flags = ["-m", target, "--draft_model", draft, "--input_file", "/no/such/file.jsonl"]
    done = warm.run(str(ROOT / "run_classic.py"), *flags, cwd=Path("/"))
    assert done.returncode == 2 and "/no/such/file.jsonl" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
