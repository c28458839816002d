"""A target shared by two processes (gloo, CPU, fp32): its tokens, caches and rows are those of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import backend_of
from on_ranks import CONFIGS, generations, loaded, prompts
from transformers import LlamaConfig

from eagle.entry import load_pair as load_eagle_pair
from specextend.cli import commands, flags
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, DeviceError, ModelError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.records import SampleRecord
from specextend.models import tensor_parallel
from specextend.models.tensor_parallel import Ranks

pytestmark = pytest.mark.xdist_group("warm")  # and two ranks work once for all of them
needs_torchrun = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None or not torch.distributed.is_gloo_available(),
    reason="transformers shards with accelerate, ranks on a CPU talk by gloo",
)
# the readout split (98) and whole (97), tied and not; biases
KINDS = {
    "target_gqa": ("gqa", {}),
    "target_mha": ("mha", {"vocab_size": 98}),
    "target_qwen2": ("qwen2", {"vocab_size": 98, "tie_word_embeddings": True}),
}
EVAL = ["--method", "standard", "specextend", "-n", "2", "-r", "1", "-max", "12", "--device", "cpu", "--tree", "paper"]


@pytest.fixture(scope="session")
def pairs(make_model, perturbed):
    """Targets by name, each with a draft that often agrees with it."""
    targets = {name: make_model(kind, 5, **changes) for name, (kind, changes) in KINDS.items()}
    return {name: (target, perturbed(target, 0.15)) for name, target in targets.items()}


@pytest.fixture(scope="session")
def seen(pairs, warm, tmp_path_factory) -> dict:
    """What two ranks saw, started as torchrun would; `folder` is where they worked."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, (target, _) in pairs.items():
        target.save_pretrained(folder / name)
    torch.save({name: draft for name, (_, draft) in pairs.items()}, folder / "draft.pt")
    toys = folder / "toy"
    toys.mkdir()
    lines = [json.dumps({"text": f"word{index} and more " * 30}) for index in range(2)]
    (toys / "toy_512.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data_dir", str(toys), "--output_file", str(folder / "{method}.json"), "--tensor_parallel"]
    run = ["--use_specextend", "--tensor_parallel", "--input_len", "100", "-max", "12", "--output_result_line"]
    (folder / "programs.json").write_text(json.dumps([["run_classic.py", run], ["eval_classic.py", EVAL + data]]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        warm.start(str(ROOT / "tests" / "on_ranks.py"), folder, env=meeting | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    for done in [rank.wait() for rank in ranks]:
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text()) | {"folder": folder}


@needs_torchrun
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_write_the_tokens_of_one(seen, pairs, name):
    alone = json.loads(json.dumps(generations(loaded(*pairs[name]))))
    assert seen[name] == alone
    assert all(tokens == autoregressive for tokens, _, autoregressive in alone.values())
    accepted = [sum(drafts) for _, drafts, _ in alone.values()]
    assert sum(accepted) > len(accepted)  # or nothing but bonus tokens were compared


@needs_torchrun
@pytest.mark.parametrize("name", KINDS)
def test_the_attention_row_is_the_mean_over_the_heads_of_all_ranks(seen, pairs, name):
    engine = SpecExtend(loaded(*pairs[name]), CONFIGS["specextend"])
    engine.generate(prompts()[0], 4)
    torch.testing.assert_close(torch.tensor(seen[f"{name} row"]), backend_of(engine)._target.attention_row())
    whole = list(engine._cache.buffer.shape)
    assert seen[f"{name} cache"] == [*whole[:3], whole[3] // 2, *whole[4:]]  # half the KV heads


@needs_torchrun
def test_ranks_whose_drafts_part_are_stopped_by_the_check(seen):
    assert seen["parted"].startswith("ranks disagree on the draft tree")


@needs_torchrun
def test_rank_0_alone_prints_and_writes_and_the_records_are_those_of_one_process(seen, tmp_path, monkeypatch, capsys):
    folder = seen["folder"]
    (answer,) = (json.loads(line) for line in seen["said"].splitlines() if line.startswith('{"method"'))
    assert answer["new_tokens"] == 12 and seen["said"].count("draft tokens accepted per round") == 1
    flags = [*EVAL, "--data_dir", str(folder / "toy"), "--output_file", str(tmp_path / "{method}.json")]
    monkeypatch.setattr(sys, "argv", ["eval_classic.py", *flags])
    importlib.import_module("eval_classic").main()
    capsys.readouterr()
    for method in ("standard", "specextend"):
        shared, alone = (records_of(place / f"{method}.jsonl") for place in (folder, tmp_path))
        assert list(shared) == list(alone) and len(shared) == 2
        for key, record in shared.items():
            assert (record.method.sha256, record.accepted) == (alone[key].method.sha256, alone[key].accepted)
            assert record.first_difference is None
        assert json.loads((folder / f"{method}.json").read_text())["manifest"]["setting"]["ranks"] == 2


def records_of(path: Path) -> dict:
    records = [SampleRecord.from_json(json.loads(line)) for line in path.read_text().splitlines()[1:]]
    assert len({record.key for record in records}) == len(records)
    return {record.key: record for record in records}


@needs_torchrun
def test_what_cannot_be_sharded_is_said_in_a_line(seen):
    assert "no cache for a sharded target" in seen["4"] and "use cuda or cpu" in seen["cuda:1"]


@needs_torchrun
def test_the_benchmark_compares_ranks_with_one_and_finds_the_same_logits(tmp_path):
    pytest.importorskip("triton")
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "scripts.bench.parallel", "--smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--output", tmp_path / "parallel.json"], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "parallel.json").read_text())["shapes"]["tiny"]
    assert found["one"]["verify_ms"] > 0 and found["one"]["token_ms"] > 0
    shared = found["process_group"]
    assert shared["logits_error"] < 1e-5 and shared["same_choices"] == 1
    assert shared["of_one"]["verify_ms"] == pytest.approx(shared["verify_ms"] / found["one"]["verify_ms"])
    assert "failed" in found["peer_memory"]  # there is no GPU here, and the record says so


# ---- without other processes


def config(**changes) -> LlamaConfig:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 98}
    return LlamaConfig(hidden_size=64, **(sizes | changes))


def test_heads_and_neurons_must_be_shared_evenly():
    ranks = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(ModelError, match="toy has 8 attention heads and 4 KV heads, which 3 ranks.*1 or 2$"):
        ranks.plan("toy", config())
    with pytest.raises(ModelError, match="toy has 99 neurons per layer, which 2 ranks.*nproc_per_node 1$"):
        Ranks(0, 2, torch.device("cpu")).plan("toy", config(intermediate_size=99))


def test_a_rank_has_its_share_of_the_heads_and_heads_of_the_same_size():
    whole = config(vocab_size=97)
    share = Ranks(1, 4, torch.device("cpu")).local(whole)
    assert (share.num_attention_heads, share.num_key_value_heads, share.head_dim) == (2, 1, 8)
    assert (whole.num_attention_heads, whole.num_key_value_heads) == (8, 4)
    assert "lm_head" not in Ranks(0, 2, torch.device("cpu")).plan("toy", whole)
    assert Ranks(0, 2, torch.device("cpu")).plan("toy", config())["lm_head"] == "colwise_gather_output"


def some_flags(**changes) -> SimpleNamespace:
    plain = {"ray": False, "ray_address": None, "cpus_per_worker": None, "max_workers": None}
    return SimpleNamespace(**(plain | {"tensor_parallel": True, "check_ranks": False, "device": "cpu"} | changes))


def test_asking_for_what_is_not_there_is_one_line(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        tensor_parallel.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="rank 1 of this host has no GPU: there are 1; run with --nproc_per_node 1"):
        tensor_parallel.join("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        tensor_parallel.join()
    with pytest.raises(ConfigError, match="cannot be combined"):
        commands._workers(some_flags(ray=True), None)
    with pytest.raises(ConfigError, match="of no use without --tensor_parallel"):
        flags.ranks_from(some_flags(tensor_parallel=False, check_ranks=True))
    monkeypatch.setattr(tensor_parallel, "join", lambda *_, **__: Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match="EAGLE head"):
        load_eagle_pair(some_flags())


def test_one_device_runs_the_plain_target(bundled_engine):
    assert type(backend_of(bundled_engine)._target).__name__ == "Target" and bundled_engine.models.ranks == 1
