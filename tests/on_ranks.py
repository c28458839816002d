"""What test_parallel.py looks at, run by torchrun on every rank; rank 0 writes what it saw as JSON.

torchrun --nproc_per_node 2 tests/on_ranks.py FOLDER    (FOLDER: models and data that the tests put there)
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval_classic
import run_classic
from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.drafting.small_lm import ClassicDrafter
from specextend.engine import SpecExtend
from specextend.errors import SpecExtendError
from specextend.models import tensor_parallel
from specextend.models.checkpoints import read_config
from specextend.models.loading import LoadedModels
from specextend.models.presets import Preset

NEW_TOKENS = 16
SMALL = {"tree": TreeConfig(8, 4, 0.1), "retrieval": RetrievalConfig(8, 3, 2)}
CONFIGS = {
    "standard": SpecExtendConfig.standard(**SMALL),
    "specextend": SpecExtendConfig.specextend(**SMALL),
    "self": SpecExtendConfig.specextend(**SMALL, drafting="self"),
}
TEMPERATURES = (0.0, 0.8)


def prompts() -> list[torch.Tensor]:
    """Two, so that state that leaks from one into the next shows."""
    return [torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)) for length in (70, 33)]


def loaded(target, draft, **more) -> LoadedModels:
    return LoadedModels(
        name="tiny", preset=Preset("tiny", "tiny", None), target=target, draft=draft, tokenizer=Letters(),
        eos_token_ids=frozenset(), limit=512, vocab_size=97, device=torch.device("cpu"), dtype=torch.float32,
        target_id="tiny", draft_id="tiny", **more,
    )  # fmt: skip


class Letters:
    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + token % 26) for token in ids)


def generations(models: LoadedModels) -> dict[str, list]:
    """Tokens and accepted drafts by setting, temperature and prompt; autoregressive tokens too."""
    found = {}
    for name, config in CONFIGS.items():
        engine = SpecExtend(models, config)
        for temperature in TEMPERATURES:
            sampling = SamplingConfig(temperature, seed=3)
            for index, prompt in enumerate(prompts()):
                one = engine.generate(prompt, NEW_TOKENS, sampling=sampling)
                alone = engine.autoregressive(prompt, NEW_TOKENS, sampling=sampling)
                accepted = [round_.accepted for round_ in one.rounds]
                found[f"{name} {temperature} {index}"] = [one.token_ids, accepted, alone.token_ids]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    ranks, seen, said = tensor_parallel.join("cpu", check=True), {}, io.StringIO()
    draft = torch.load(folder / "draft.pt", weights_only=False)
    for path in sorted(folder.glob("target_*")):
        target = ranks.load(path, read_config(path), torch.float32)
        models = loaded(target, draft[path.name], ranks=ranks.count, make_target=ranks.make_target)
        seen[path.name] = generations(models)
        engine = SpecExtend(models, CONFIGS["specextend"])
        engine.generate(prompts()[0], 4)
        seen[f"{path.name} row"] = engine._method._target.attention_row().tolist()
        seen[f"{path.name} cache"] = list(engine._cache.buffer.shape)
    seen["parted"] = parted(models, ranks)

    with contextlib.redirect_stdout(said if tensor_parallel.speaks() else sys.stdout):
        tensor_parallel.leave, leave = lambda: None, tensor_parallel.leave  # several programs in one process group
        for program, flags in json.loads((folder / "programs.json").read_text()):
            sys.argv = [program, *flags]
            {"run_classic.py": run_classic, "eval_classic.py": eval_classic}[program].main()
        for flags in (["--method", "autoregressive_hf", "-max", "4"], ["--device", "cuda:1"]):
            sys.argv = ["run_classic.py", "--tensor_parallel", *flags]
            try:
                run_classic.main()
            except SpecExtendError as error:
                seen[flags[-1]] = str(error)
    if tensor_parallel.speaks():
        (folder / "seen.json").write_text(json.dumps(seen | {"said": said.getvalue()}))
    else:
        assert sys.stdout.name == "/dev/null"
    leave()


def parted(models: LoadedModels, ranks: tensor_parallel.Ranks) -> str:
    """What the check says when one rank's draft proposes other tokens."""

    class Wayward(ClassicDrafter):
        def propose(self, growth):
            tree = super().propose(growth)
            tree.tokens[-1] = (tree.tokens[-1] + ranks.rank) % 97
            return tree

    try:
        SpecExtend(replace(models, drafter=Wayward), CONFIGS["specextend"]).generate(prompts()[0], 4)
    except AssertionError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main()
