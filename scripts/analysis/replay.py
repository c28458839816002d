"""Score tree policies without a GPU and without a model: replay them over draft trees recorded at every position.

`record` lets the draft grow a large tree at every position of an output and writes down what it gave each node and
whether the target's own text went there. `replay` lets a policy decide over these trees as the backends do, with the
real code of growth, cut and learning, and adds up what its rounds would cost by a table of costs.

    python -m scripts.analysis.replay record --data_dir data/pg19 --lengths 4K --temperature 0.8 --out trees.npz
    python -m scripts.analysis.replay score trees.npz --output results/cpu/replay.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from specextend.config import SamplingConfig, TreeConfig
from specextend.drafting.expansion import Level, grow
from specextend.engine import SpecExtend
from specextend.evaluation.journal import write_json
from specextend.evaluation.plan import read_buckets
from specextend.policy.costs import Costs, Curve
from specextend.policy.policies import FixedTree, Outcome, Policy, PricedTree
from specextend.trees.growth import Growth
from specextend.trees.host_tree import HostTree
from specextend.trees.tree import DraftTree

RECORDED = Growth(nodes=64, max_depth=12, threshold=0.0, floor=1e-3)
NEGLIGIBLE = 1e-9  # probability of what was not recorded


@dataclass(frozen=True)
class Output:
    """One output and the tree that the draft grew at each of its positions but the last.

    Attributes:
        context: tokens before the first of them; tokens: [n].
        trees: n - 1 trees; tree i is rooted in token i.
    """

    name: str
    context: int
    tokens: list[int]
    trees: list[HostTree]


class LargeTrees:
    """A policy that lets the draft grow a large tree in every round and verifies nothing of it."""

    price = 0.0

    def begin(self) -> None:
        pass

    def plan(self, context: int) -> Growth:
        return RECORDED

    def spares(self, branch: np.ndarray) -> bool:
        return False

    def size(self, reach: np.ndarray, context: int) -> int:
        return 0

    def learn(self, outcome: Outcome) -> None:
        pass


def record(engine: SpecExtend, prompts: dict[str, torch.Tensor], new_tokens: int, temperature: float) -> list[Output]:
    """An output for each of `prompts`, by name; `engine` decodes eagerly."""
    backend, outputs, trees = engine._method, [], []
    backend._policy, backend._set_costs = LargeTrees(), lambda verify: None
    propose = backend._drafter.propose

    def recorded(growth: Growth) -> DraftTree:
        trees.append(propose(growth))
        return trees[-1]

    backend._drafter.propose = recorded
    for seed, (name, prompt) in enumerate(prompts.items()):
        result = engine.generate(prompt, new_tokens, sampling=SamplingConfig(temperature, seed=seed))
        outputs.append(Output(name, len(prompt), result.token_ids, [HostTree.of(tree) for tree in trees]))
        trees.clear()
    return outputs


def save(path: Path, outputs: list[Output]) -> None:
    flat = {}
    for index, output in enumerate(outputs):
        sizes = [len(tree) for tree in output.trees]
        flat |= {
            f"{index}/name": output.name, f"{index}/context": output.context,
            f"{index}/tokens": np.array(output.tokens, dtype=np.int32),
            f"{index}/sizes": np.array(sizes, dtype=np.int16),
            f"{index}/parents": np.concatenate([tree.parents for tree in output.trees]).astype(np.int16),
            f"{index}/ids": np.concatenate([tree.tokens for tree in output.trees]).astype(np.int32),
            f"{index}/logprobs": np.concatenate([tree.logprobs for tree in output.trees]).astype(np.float16),
        }  # fmt: skip
    np.savez_compressed(path, **flat)


def load(path: Path) -> list[Output]:
    outputs = []
    with np.load(path) as flat:
        for index in range(sum(key.endswith("/name") for key in flat)):
            ends = np.cumsum(flat[f"{index}/sizes"])[:-1]
            parts = [np.split(flat[f"{index}/{name}"], ends) for name in ("ids", "parents", "logprobs")]
            trees = []
            for ids, parents, logprobs in zip(*parts, strict=True):
                tree = DraftTree.from_parents(*(torch.from_numpy(one.astype(np.int64)) for one in (ids, parents)))
                given = torch.from_numpy(logprobs.astype(np.float64))
                trees.append(HostTree.of(replace(tree, logprobs=given, reach=torch.zeros_like(given))))
            name, context = str(flat[f"{index}/name"]), int(flat[f"{index}/context"])
            outputs.append(Output(name, context, flat[f"{index}/tokens"].tolist(), trees))
    return outputs


@dataclass
class Score:
    """What a policy made of an output, `speedup` over rounds that do not speculate.

    Attributes:
        said, came: of every drafted node, the probability that the target accepts the path to it, and whether it did.
    """

    tokens: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    rounds: int = 0
    plain_rounds: int = 0
    switches: int = 0
    said: list[np.ndarray] = field(default_factory=list)
    came: list[np.ndarray] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.seconds


def replay(policy: Policy, output: Output, costs: Costs, refresh: float = 0.0, every: int = 4) -> Score:
    """Let `policy` decode `output`.

    Args:
        costs: what rounds take; refresh: seconds of one, every so many rounds.
    """
    policy.begin()
    score, at, speculated = Score(), 0, True
    while at < len(output.trees):
        context = output.context + at
        growth = policy.plan(context)
        grown = None if growth is None else _Regrown(output.trees[at]).grow(growth)
        drafted = None if grown is None else HostTree.of(grown.tree)
        nodes = 0 if drafted is None else policy.size(drafted.reach[1:], context)
        verified = nodes + 1
        rest = output.tokens[at + 1 :]
        tokens = rest[: 1 + (len(_path(drafted.most_probable(nodes), rest)) if nodes else 0)]
        seconds = {"draft": 0.0, "verify": costs.verifying(verified, context), "accept": 0.0, "host": 0.0}
        if grown is not None:
            score.said.append(np.exp(drafted.reach[1:]))
            score.came.append(np.isin(np.arange(1, len(drafted)), _path(drafted, rest)))
            seconds["draft"] = costs.draft(len(grown.passes), sum(grown.passes))
            if refresh and (score.rounds - score.plain_rounds) % every == 0:
                seconds["retrieve"] = refresh
        promised = drafted.expected(nodes) if nodes else 0.0
        policy.learn(
            Outcome(drafted, grown and grown.passes, np.empty(0), promised, verified, tokens, seconds, context)
        )
        score.tokens += len(tokens)
        score.seconds += sum(seconds.values())
        score.plain_seconds += sum(costs.verifying(1, context + i) for i in range(len(tokens)))
        score.rounds += 1
        score.plain_rounds += drafted is None
        score.switches += (drafted is not None) != speculated
        speculated, at = drafted is not None, at + len(tokens)
    return score


class _Regrown:
    """A recorded tree as the draft that grew it, for bounds that are no larger; its vocabulary are its tokens."""

    def __init__(self, tree: HostTree):
        self._parents, self._logprobs = torch.from_numpy(tree.parents), torch.from_numpy(tree.logprobs)
        self.passes: list[int] = []
        self._ids, self._columns = torch.unique(torch.from_numpy(tree.tokens), return_inverse=True)
        self._handed = [[0]]

    def grow(self, growth: Growth) -> _Regrown:
        bounds = replace(growth, floor=max(growth.floor, NEGLIGIBLE))
        grown = grow(self._columns[0], self._after([0]), self._expand, bounds)
        self.tree = replace(grown, tokens=self._ids[grown.tokens])
        return self

    def _expand(self, level: Level) -> torch.Tensor:
        self.passes.append(len(level.tokens))
        above = self._handed[-1]
        nodes = [
            self._child(above[parent], column)
            for parent, column in zip(level.parents.tolist(), level.tokens.tolist(), strict=True)
        ]
        self._handed.append(nodes)
        return self._after(nodes)

    def _child(self, node: int, column: int) -> int:
        return int(((self._parents == node) & (self._columns == column)).nonzero()[0, 0])

    def _after(self, nodes: list[int]) -> torch.Tensor:
        """Log-probabilities [n, V] after recorded nodes; what was not recorded has none."""
        rows = torch.full((len(nodes), len(self._ids)), -torch.inf, dtype=torch.float64)
        for row, node in enumerate(nodes):
            children = self._parents == node
            rows[row, self._columns[children]] = self._logprobs[children]
        return rows


def _path(tree: HostTree, text: list[int]) -> list[int]:
    """The nodes of `tree` below the root that foretell `text`."""
    path = [0]
    for token in text:
        found = np.flatnonzero((tree.parents == path[-1]) & (tree.tokens == token))
        if not len(found):
            break
        path.append(int(found[0]))
    return path[1:]


def calibration_error(said: np.ndarray, came: np.ndarray) -> float:
    """Expected calibration error of probabilities `said` [n] for what `came` [n] true, in ten equal bins."""
    if not len(said):
        return 0.0
    bins = np.minimum((said * 10).astype(int), 9)
    return float(np.abs(np.bincount(bins, weights=said - came)).sum() / len(said))


def machines() -> dict[str, Costs]:
    """Costs of rounds, in seconds, as measured on an H200 (`results/h200/steps.json`) and on two CPU cores."""

    def of(rows, contexts, milliseconds, draft) -> Costs:
        return Costs(Curve(rows, contexts, np.asarray(milliseconds) * 1e-3), np.asarray(draft) * 1e-3)

    return {
        "H200, 7B cost": of((1, 8, 64), (1024, 16384), [[4.3, 4.78, 4.78], [5.95, 6.57, 6.57]], [0.3, 0.18, 0.0]),
        "2 cores, bundled": of(
            (1, 2, 8, 16, 32, 64),
            (1024, 16384),
            [[7, 7.7, 8.1, 9.5, 13, 22], [20, 25, 38, 55, 75, 139]],
            [4.2, 2.1, 0.1],
        ),
    }


def policies(costs: Costs) -> Iterator[tuple[str, Policy]]:
    """What is compared: the default, the paper's tree, and fixed ones that suit one machine or the other."""
    fresh = Costs(costs.verify_curve, costs._measured)
    yield "priced", PricedTree(TreeConfig.priced(), fresh, 4)
    yield "paper", FixedTree(TreeConfig())
    yield "50, 0.15", FixedTree(TreeConfig(50, 10, 0.15))
    yield "50, 0.05", FixedTree(TreeConfig(50, 12, 0.05))
    yield "12, 0.35, 0.06", FixedTree(TreeConfig(12, 8, 0.35, 0.06))


def scores(outputs: list[Output]) -> pd.DataFrame:
    """One row per machine, output and policy."""
    rows = []
    for machine, costs in machines().items():
        for output in outputs:
            for name, policy in policies(costs):
                one = replay(policy, output, costs)
                rows.append(
                    {"machine": machine, "output": output.name, "policy": name, "seconds": one.seconds,
                     "plain": one.plain_seconds, "speedup": one.speedup, "tokens_per_round": one.tokens / one.rounds,
                     "plain_share": one.plain_rounds / one.rounds, "switches": 100 * one.switches / one.rounds,
                     "said": np.concatenate(one.said or [np.empty(0)]),
                     "came": np.concatenate(one.came or [np.empty(0)])}
                )  # fmt: skip
    return pd.DataFrame(rows)


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per machine, cell and policy: sums over the outputs of a cell, `worst` of them, switches in 100 rounds."""
    frame = frame.assign(cell=frame["output"].str.replace(r", \d+$", "", regex=True))
    groups = frame.groupby(["machine", "cell", "policy"], sort=False)
    shown = groups[["plain", "seconds"]].sum().assign(speedup=lambda one: one["plain"] / one["seconds"])
    shown["outputs"], shown["worst"] = groups.size(), groups["speedup"].min()
    shown = shown.join(groups[["tokens_per_round", "plain_share", "switches"]].mean()).drop(
        columns=["plain", "seconds"]
    )
    shown["calibration_error"] = [
        calibration_error(*(np.concatenate(list(of[name])) for name in ("said", "came"))) for _, of in groups
    ]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    recording = commands.add_parser("record", help="decode prompts and write their trees")
    recording.add_argument("--data_dir", type=Path, required=True)
    recording.add_argument("--lengths", nargs="+", default=["1K"])
    recording.add_argument("--samples", type=int, default=2)
    recording.add_argument("--new_tokens", type=int, default=96)
    recording.add_argument("--temperature", type=float, default=0.0)
    recording.add_argument("--out", type=Path, required=True)
    scoring = commands.add_parser("score", help="replay policies over recorded trees")
    scoring.add_argument("trees", type=Path, nargs="+")
    scoring.add_argument("--output", type=Path, help="file for the table, as JSON")
    args = parser.parse_args()
    if args.command == "record":
        engine = SpecExtend.from_pretrained(eager=True, prefix_reuse=False)
        engine = engine.with_config(tree=replace(TreeConfig.priced(), lookup_branch=False))
        prompts = {}
        for bucket, found in read_buckets(args.data_dir, args.samples, args.lengths).items():
            for index, prompt in enumerate(found):
                ids, most = engine.encode(prompt.text), engine.max_prompt_tokens(args.new_tokens)
                name = f"{args.data_dir.name} {bucket}, temperature {args.temperature:g}, {index}"
                prompts[name] = ids if len(ids) <= most else torch.cat((ids[: most // 2], ids[most // 2 - most :]))
        save(args.out, record(engine, prompts, args.new_tokens, args.temperature))
        return
    frame = scores([output for path in args.trees for output in load(path)])
    shown = table_of(frame)
    print(shown.round(2).to_string())
    if args.output:
        rows = shown.reset_index().to_dict(orient="records")
        write_json(args.output, {"trees": [path.name for path in args.trees], "rows": rows})


if __name__ == "__main__":
    main()
