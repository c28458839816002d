"""The training script of the bundled pair, end to end on tiny models, and the parts whose mistakes would be silent."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import eagle
from eagle.weights import load_head
from scripts.train import divergence as divergence_module
from scripts.train import measure
from scripts.train.corpus import BOS_ID, EOS_ID, Encoded, encode, hold_out, read_documents, train_tokenizer
from scripts.train.divergence import chunk_divergence, divergence
from scripts.train.facts import make_facts
from scripts.train.generation import continue_prompts, write_rows
from scripts.train.models import (
    CACHED,
    CAUSAL,
    causal_attention,
    load_any_target,
    load_model,
    new_model,
    save_model,
    target_config,
)
from scripts.train.objectives import loop_avoiding_loss, target_objective
from scripts.train.prompts import Prompts
from scripts.train.rows import LOOPED, PLAIN, SILENT, Mix, Row, RowSource
from scripts.train.settings import Settings, TrainingError
from scripts.train.trainer import Phase, Task, Trainer, make_optimizers
from specextend import SpecExtend
from specextend.config import SpecExtendConfig
from specextend.evaluation.answers import ends_in_loop, repeated_share
from specextend.models.loading import load_models

pytestmark = pytest.mark.xdist_group("warm")  # and one training serves many of them
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = {  # a step counts as 0.2 s, as 1 s for heads: checkpoints after 50 steps, and 10; one batch written, by no clock
    "vocab_size": 400, "validation_tokens": 6000, "num_facts": 50, "target_hidden": 32, "target_layers": 2,
    "target_heads": 2, "target_ffn": 48, "draft_hidden": 16, "draft_layers": 1, "draft_heads": 1, "draft_ffn": 24,
    "short_context": 128, "short_batch": 4, "long_context": 512, "long_batch": 1, "draft_context": 128,
    "draft_batch": 4, "target_seconds": 30.0, "generation_seconds": 0.0, "generation_rows": 6, "generation_prompt": 32,
    "draft_seconds": 14.0, "generation_answer": 64, "eagle_budget": 150, "eagle_lr": 3e-3, "eagle_batch": 4,
    "eagle_vocab": 200, "eagle_layers": "0,1,2", "eagle_steps": 3, "eagle_validations": 2, "warmup_steps": 5,
    "uncounted_steps": 2, "log_steps": 5, "validations": 2, "checkpoint_seconds": 10.0,
    "step_seconds": 0.2, "measure_windows": 2, "measure_prompts": 3,
}  # fmt: skip


def small_target(folder: Path, tokenizer, model_type: str = "llama") -> Path:
    """A target that this project did not train: grouped queries, a chat template, its own EOS."""
    torch.manual_seed(0)
    options = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID, "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}ask {{ m['content'] }} {% endfor %}answer")
    return folder


def synthetic_documents(count: int, words: int) -> list[str]:
    rng = np.random.default_rng(0)
    lexicon = ["".join(rng.choice(list("abcdefghijklmnop"), size=rng.integers(2, 8))) for _ in range(200)]
    return [" ".join(rng.choice(lexicon, size=words)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = synthetic_documents(24, 300) + synthetic_documents(8, 2000)
    (folder / "part1.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n")
    table = "| source repository | commit | licence | documents | MB |\n|---|---|---|---|---|\n"
    (folder / "README.md").write_text(f"## books: some\n\n{table}| someone/somewhere | abc | CC0 | 32 | 0.1 |\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path):
    return train_tokenizer(read_documents([corpus], 0), Settings(**TINY))


@pytest.fixture(scope="module")
def run_script(warm) -> Callable[..., subprocess.CompletedProcess]:
    """run_script(arguments): the script as it ends in a process of its own."""
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    return partial(warm.run, "scripts.train", "--device=cpu", "--no-compile", *flags)


@pytest.fixture(scope="module")
def trained(run_script, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair")
    done = run_script("--corpus", corpus, "--out", out, "--what", "pair", "eagle1", "eagle3")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = ["tokenizer", "target", "draft", "measure", "answers", "eagle1", "eagle3"]
    assert json.loads(done.stdout.splitlines()[-1])["finished"] == stages
    return out


def test_outputs_load_with_plain_transformers(trained: Path) -> None:
    for name in ("target", "draft"):
        model = AutoModelForCausalLM.from_pretrained(trained / name)
        tokenizer = AutoTokenizer.from_pretrained(trained / name)
        ids = tokenizer("some text", return_tensors="pt").input_ids
        assert ids[0, 0] == BOS_ID and tokenizer.eos_token_id == EOS_ID
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == "some text"
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation != CAUSAL
        assert model(ids).logits.isfinite().all()
    assert not list(trained.glob("*.partial"))


def test_record_and_card_hold_every_measurement(trained: Path) -> None:
    record = json.loads((trained / "training_record.json").read_text())
    measured = record["measure"]
    for name in ("loss_by_position", "loss_by_context", "agreement_natural", "agreement_own_text", "copying", "facts"):
        assert measured[name], name
    assert 0 <= measured["looping"]["repeated_4grams"] <= 1
    first, *_, last = record["target"]["training"]["validation"]
    assert last["loss"] < np.log(TINY["vocab_size"]) and last["step"] > first["step"]
    card = (trained / "README.md").read_text()
    assert "someone/somewhere" in card and "Apache-2.0" in card and "{" not in card
    assert "| eagle1 |" in card and "| eagle3 |" in card


def test_trained_heads_load_and_have_learned(trained: Path) -> None:
    target = load_models(str(trained / "target"), draft=str(trained / "draft"), device="cpu").target
    record = json.loads((trained / "training_record.json").read_text())
    for kind in ("eagle1", "eagle3"):
        head = load_head(trained / kind, target, kind)
        assert (head.target_ids is None) == (kind == "eagle1")
        validation = record[kind]["training"]["validation"]
        assert validation[-1]["same_argmax_1"] > 20 / TINY["vocab_size"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_heads_of_any_target_are_trained_in_several_calls_and_draft_losslessly(
    model_type: str, run_script, corpus: Path, tokenizer, tmp_path: Path
) -> None:
    target, out = small_target(tmp_path / "target", tokenizer, model_type), tmp_path / "heads"
    arguments = ("--corpus", corpus, "--out", out, "--target", target, "--eagle_budget", 40)
    first = run_script(*arguments, "--call_seconds", 0.01, "--eagle_layers", "", "--eagle_vocab", 0)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "paused" in first.stdout and json.loads(first.stdout.splitlines()[-1])["finished"] == [
        "tokenizer",
        "answers",
    ]
    again = run_script(*arguments, "--eagle_layers", "", "--eagle_vocab", 0)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "answers: already done" in again.stdout and "resumed" in again.stdout
    record = json.loads((out / "training_record.json").read_text())
    assert record["eagle3"]["layers"] == [2, 5, 7] and record["eagle3"]["covered"] >= 0.95
    assert record["answers"]["template"] == "chat" and record["answers"]["rows"] % TINY["generation_rows"] == 0
    first_loss, *_, last_loss = (point["loss"] for point in record["eagle1"]["training"]["curve"])
    assert last_loss < first_loss
    for kind in ("eagle1", "eagle3"):
        card = (out / kind / "README.md").read_text()
        assert "someone/somewhere" in card and "{" not in card
        models = eagle.load_models(str(target), draft=str(out / kind), device="cpu", dtype="float64")
        assert models.preset.retrieval.top_k == TINY["draft_context"] // 32
        engine = SpecExtend(models, SpecExtendConfig.specextend(retrieval=models.preset.retrieval))
        prompt = torch.randint(3, 300, (300,))
        assert engine.generate(prompt, 40).token_ids == engine.autoregressive(prompt, 40).token_ids


def test_mistakes_about_the_target_are_one_line_and_status_2(run_script, corpus: Path, tmp_path: Path) -> None:
    out = ("--corpus", corpus, "--out", tmp_path / "out")
    for arguments, said in (
        (("--target", tmp_path / "none.gguf"), "does not exist"),
        (("--target", "bundled", "--what", "pair"), "has its weights already"),
        (("--target", "bundled", "--generation_answer", 100), "--generation_answer 100 must be"),
    ):
        done = run_script(*out, *arguments)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr


def test_answers_end_where_the_target_ends_them_and_other_rows_follow(tokenizer, tmp_path: Path) -> None:
    writer = load_any_target(str(small_target(tmp_path / "target", tokenizer)), CPU, attention=CACHED).target
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 300, size=(6, 20))
    greedy = continue_prompts(writer, torch.from_numpy(prompts), 30, temperature=0.0).numpy()
    stop = int(greedy[0, 25])
    written = write_rows(
        writer, lambda count, length: prompts[:count, :length], lengths=[20], rows=6, context=64, answer=30,
        stops={stop}, seconds=0, seed=0,
    )  # fmt: skip
    assert written.rows.shape == (6, 64) and written.rows.dtype == np.uint16
    (first,) = (i for i, row in enumerate(written.rows) if np.array_equal(row[:20], prompts[0]))
    end = 20 + int(written.answers[first])
    assert written.greedy[first] and end == 21 + list(greedy[0, 20:]).index(stop)
    assert np.array_equal(written.rows[first, :end], greedy[0, :end])
    assert np.array_equal(written.rows[first, end : end + 20], prompts[1])


def test_prompts_frame_an_excerpt_of_one_document(tokenizer, tmp_path: Path) -> None:
    folder = small_target(tmp_path / "target", tokenizer)
    chat = AutoTokenizer.from_pretrained(folder)
    corpus = Encoded(np.arange(1000, dtype=np.uint16), np.array([0, 400, 1000]))
    for template in ("chat", None):
        prompts = Prompts(corpus, chat, template, seed=0)(40, 200)
        assert prompts.shape == (40, 200)
        for row in prompts:
            excerpt = max(np.split(row, np.flatnonzero(np.diff(row) != 1) + 1), key=len)
            assert len(excerpt) >= 16 and (excerpt[0] < 400) == (excerpt[-1] < 400)
            assert template or len(excerpt) >= 199  # <s> stands before it
    assert corpus.draw(np.random.default_rng(0), 0, 50).shape == (0, 50)
    with pytest.raises(TrainingError, match="leave no room"):
        Prompts(corpus, chat, "chat", seed=0)(2, 16)


@pytest.mark.parametrize("known", [None, torch.arange(5, 45, 2)])
def test_divergence_in_chunks_has_the_gradient_of_the_plain_formula(known, monkeypatch) -> None:
    monkeypatch.setattr(divergence_module, "CHUNK_BYTES", 4 * 60 * 7)  # 7 pairs a chunk
    torch.manual_seed(0)
    hidden, nexts = torch.randn(2, 23, 8, dtype=torch.float64)
    readout, scale = torch.randn(60, 8, dtype=torch.float64), torch.rand(23, dtype=torch.float64)
    weight = torch.randn(60 if known is None else len(known), 8, dtype=torch.float64)
    inputs = [[one.clone().requires_grad_() for one in (hidden, weight)] for _ in range(2)]
    chunked = divergence(*inputs[0], nexts, readout, known, scale, 0.8, chunk_divergence)
    wanted = (nexts @ readout.mT / 0.8).log_softmax(-1)
    wanted = wanted if known is None else wanted[:, known]
    plain = (scale[:, None] * wanted.exp() * (wanted - (inputs[1][0] @ inputs[1][1].mT).log_softmax(-1))).sum()
    (3 * chunked).backward()
    (3 * plain).backward()
    torch.testing.assert_close(chunked.double(), plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_heads_of_a_finished_target_take_its_tokenizer(run_script, trained: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"  # as it ships: without the folder that only resuming needs
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("work", "eagle*"))
    record = json.loads((out / "training_record.json").read_text())
    del record["eagle1"], record["eagle3"]
    (out / "training_record.json").write_text(json.dumps(record))
    done = run_script("--corpus", corpus, "--out", out, "--what", "eagle1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokenizer taken from the target" in done.stdout and (out / "eagle1" / "model.safetensors").exists()
    assert "eagle3" not in json.loads(done.stdout.splitlines()[-1])["finished"]


def test_a_target_learns_on_at_more_positions(run_script, trained: Path, corpus: Path, tmp_path: Path) -> None:
    given = ("--corpus", corpus, "--out", tmp_path / "out", "--target", trained / "target", "--what", "longer")
    done = run_script(*given, "--long_context", 1024, "--target_seconds", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["finished"] == ["tokenizer", "longer"]
    before, longer = (AutoModelForCausalLM.from_pretrained(at) for at in (trained / "target", tmp_path / "out/target"))
    assert longer.config.max_position_embeddings == 1024 == 2 * before.config.max_position_embeddings
    assert longer.config.rope_parameters["factor"] == 2 * before.config.rope_parameters["factor"]
    assert longer.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert not torch.equal(longer.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    card = (tmp_path / "out" / "target" / "README.md").read_text()
    assert "at 1,024 positions" in card and f"{longer.num_parameters():,} |" in card and "{" not in card
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())["longer"]["training"]
    first = record["curve"][0]
    assert first["loss"] < np.log(TINY["vocab_size"]) and record["phases"]["longer"]["context"] == 1024
    loaded = load_models(str(tmp_path / "out/target"), draft=str(trained / "draft"), device="cpu", dtype="float64")
    engine = SpecExtend(loaded, SpecExtendConfig.specextend())
    prompt = torch.randint(3, 300, (900,))
    assert engine.generate(prompt, 24).token_ids == engine.autoregressive(prompt, 24).token_ids


def test_a_target_that_holds_as_much_is_refused(run_script, trained: Path, corpus: Path, tmp_path: Path) -> None:
    given = ("--corpus", corpus, "--out", tmp_path / "out", "--target", trained / "target", "--what", "longer")
    done = run_script(*given, "--long_context", 512)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--long_context 512 must exceed the 512 positions of the target" in done.stderr


def test_finished_stages_are_skipped_and_other_sizes_refused(
    run_script, trained: Path, corpus: Path, tmp_path: Path
) -> None:
    before = (trained / "target" / "model.safetensors").stat().st_mtime_ns
    again = run_script("--corpus", corpus, "--out", trained)
    assert again.returncode == 0 and again.stdout.count("already done, skipped") == 4
    assert (trained / "target" / "model.safetensors").stat().st_mtime_ns == before
    other = run_script("--corpus", corpus, "--out", trained, "--seed", 7)
    assert other.returncode == 2 and "seed 0 -> 7" in other.stderr
    cold = [sys.executable, "-m", "scripts.train", "--corpus", tmp_path / "nowhere", "--out", tmp_path / "out"]
    missing = subprocess.run(cold, cwd=ROOT, capture_output=True, text=True)  # which imports everything itself
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


def test_encoded_documents_keep_their_text_and_borders(corpus: Path, tokenizer) -> None:
    documents = read_documents([corpus], 0)
    encoded = encode(documents, tokenizer.backend_tokenizer, ([BOS_ID], [EOS_ID]))
    assert len(documents) == 32 and len(encoded.starts) == 33 and encoded.stream.dtype == np.uint16
    for document, tokens in zip(documents, encoded.documents(), strict=True):
        assert tokens[0] == BOS_ID and tokens[-1] == EOS_ID
        assert tokenizer.decode(tokens[1:-1].tolist()) == document


def test_held_out_documents_are_disjoint_and_partly_long(corpus: Path) -> None:
    documents = read_documents([corpus], 0)
    train, validation = hold_out(documents, Settings(**TINY))
    assert sorted(train + validation) == sorted(documents) and train and validation
    assert max(map(len, validation)) > 5 * min(map(len, validation))


def test_copies_repeat_at_their_distance() -> None:
    rng, mix, distances = np.random.default_rng(0), Mix(), []
    for _ in range(100):
        row = Row(rng.integers(0, 60_000, size=4096))
        plants = [plant for _ in range(4) if (plant := row.plant_copy(rng, mix))]
        for plant in plants:
            copied = row.tokens[plant.start : plant.start + plant.length]
            assert np.array_equal(copied, row.tokens[plant.source : plant.source + plant.length])
            assert plant.start - plant.source >= 256 and 24 <= plant.length <= 200
            distances.append(plant.start - plant.source)
        assert not row.kinds.any()
    assert min(distances) < 320 and max(distances) > 3000


def test_loops_repeat_the_text_before_them_and_are_marked() -> None:
    rng, mix = np.random.default_rng(0), Mix()
    for _ in range(100):
        text = rng.integers(0, 60_000, size=2049)
        row = Row(text)
        plant = row.plant_loop(rng, mix)
        period, end = plant.start - plant.source, plant.start + plant.length
        assert 6 <= period <= 160 and period <= plant.length <= 3 * period
        assert np.array_equal(row.tokens[plant.start : end], row.tokens[plant.source : end - period])
        assert np.array_equal(row.tokens[: plant.start], text[: plant.start])
        assert np.array_equal(row.tokens[end:], text[plant.start : -plant.length])  # the text goes on where it was
        assert (row.kinds[plant.start : end][:8] == SILENT).all() and (row.kinds[plant.start : end][8:] == LOOPED).all()
        assert (row.kinds[: plant.start] == PLAIN).all() and (row.kinds[end:] == PLAIN).all()


def test_facts_are_stated_and_recalled(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for fact in make_facts(20, tokenizer.backend_tokenizer, seed=0):
        row = Row(rng.integers(3, 400, size=2048))
        plant = row.plant_fact(rng, fact)
        value = tokenizer.decode(fact.recall[fact.answer])
        stated = row.tokens[plant.source : plant.source + len(fact.statement)]
        recalled = row.tokens[plant.start : plant.start + plant.length]
        assert value in tokenizer.decode(stated) and value in tokenizer.decode(recalled)
        assert np.array_equal(recalled, fact.recall) and plant.source + len(stated) <= plant.start


def test_rows_are_drawn_with_the_shares_of_the_mix(tokenizer) -> None:
    stream = np.arange(60_000, dtype=np.uint16)  # consecutive numbers: any jump was planted
    facts = make_facts(20, tokenizer.backend_tokenizer, seed=0)
    tokens, kinds = RowSource(stream, facts, Mix(), seed=0).draw(400, 2049)
    assert tokens.shape == kinds.shape == (400, 2049)
    changed = (np.diff(tokens, axis=1) != 1).any(1).mean()
    assert 0.55 < changed < 0.75 and 0.05 < (kinds == LOOPED).any(1).mean() < 0.16


def test_unlikelihood_pushes_looped_tokens_down_and_skips_silent_ones() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0]] * 3, requires_grad=True)
    losses = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="none")[None]
    loop_avoiding_loss(losses, torch.tensor([[PLAIN, SILENT, LOOPED]]), 0.5).backward()
    plain, silent, looped = logits.grad[:, 0].tolist()
    assert plain < 0 and silent == 0 and looped > 0.05  # a sure loop still has a gradient


def test_only_matrices_of_the_layers_are_orthogonalised() -> None:
    model = new_model(target_config(Settings(**TINY)), CPU, seed=0)
    muon, adam = make_optimizers(model, Settings(**TINY))
    matrices, others = ({id(weight) for weight in one.param_groups[0]["params"]} for one in (muon, adam))
    names = {name: id(weight) for name, weight in model.named_parameters()}
    assert matrices == {one for name, one in names.items() if "_proj" in name}
    assert others == set(names.values()) - matrices
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    loss = model.lm_head(model.model(torch.arange(3, 40)[None]).last_hidden_state).square().mean()
    loss.backward()
    muon.step()
    step = (weight - before) / muon.param_groups[0]["lr"]
    singular = torch.linalg.svdvals(step / max(1, step.shape[0] / step.shape[1]) ** 0.5)
    assert singular.max() < 1.4 and singular.median() > 0.5


def test_registered_attention_equals_masked_reference_and_gets_no_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 20, 8, dtype=torch.float64)
    output, _ = causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    reference = ((query @ key.mT) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(output, reference.transpose(1, 2))

    target = new_model(target_config(Settings(**TINY)), CPU, seed=0)
    (tmp_path / "tokenizer").mkdir()
    save_model(target, tmp_path / "tokenizer", tmp_path / "target")
    tokens = torch.randint(3, 400, (2, 300))
    ours = load_model(tmp_path / "target", CPU)  # its assertion would fail on a mask
    theirs = load_model(tmp_path / "target", CPU, attention="sdpa")
    torch.testing.assert_close(ours(tokens, use_cache=False).logits, theirs(tokens).logits)

    writer = load_model(tmp_path / "target", CPU, attention=CACHED)
    written = continue_prompts(writer, tokens[:, :16], 12, temperature=0.0)
    for length in range(16, 28):
        assert torch.equal(ours(written[:, :length], use_cache=False).logits[:, -1].argmax(-1), written[:, length])
    mixed = continue_prompts(writer, tokens[:, :16], 12, temperature=torch.tensor([0.8, 0.0]))
    assert torch.equal(mixed[1], written[1]) and not torch.equal(mixed[0], written[0])


def test_loop_measures_tell_loops_from_text() -> None:
    text = np.random.default_rng(0).integers(0, 8192, size=256)
    looped = np.concatenate([text[:100], np.tile(text[:30], 6)])
    assert repeated_share(text) == 0 and not ends_in_loop(text)
    assert repeated_share(looped) > 0.4 and ends_in_loop(looped)


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings = Settings(**TINY | {"checkpoint_seconds": 0.05, "step_seconds": 0.01, "validations": 100})
    rows = RowSource(np.arange(3, 400, dtype=np.uint16).repeat(10), [], replace(Mix(), fact_rows=0.0), seed=0)

    def trainer(seconds: float) -> Trainer:
        model = new_model(target_config(settings), CPU, seed=0)

        def draw(phase: Phase) -> tuple[torch.Tensor, ...]:
            return tuple(map(torch.from_numpy, rows.draw(phase.batch, phase.context + 1)))

        task = Task(draw, target_objective(model, 0.5), lambda phase: {"loss": 0.0}, lambda: None)
        return Trainer("tiny", model, task, seconds, settings, tmp_path / "tiny.pt")

    phases = [Phase("short", 0.5, 2, 64), Phase("long", 1.0, 1, 128)]
    first = trainer(0.4).fit(phases)
    resumed = trainer(0.8)
    second = resumed.fit(phases)
    assert first["phases"]["long"]["steps"] > 0 and second["steps"] > first["steps"] // 2
    assert second["phases"]["long"]["seconds"] > first["phases"]["long"]["seconds"]
    assert second["validation"][0] == first["validation"][0]
    assert all(state["momentum_buffer"].any() for state in resumed.optimizers[0].state.values())


def test_a_model_agrees_with_itself_everywhere() -> None:
    model = new_model(target_config(Settings(**TINY)), CPU, seed=0).eval()
    windows = torch.randint(3, 400, (2, 513))
    figures = measure.agreement_by_position(model, model, windows, 128)["full_cache"]
    assert list(figures) == ["0-128", "256", "512"]
    for figure in figures.values():
        assert figure["same_argmax"] == 1 and figure["overlap_draft_at_0.8"] == pytest.approx(1, abs=1e-4)
