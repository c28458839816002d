"""The decode loops: `speculative`, the paper's algorithm, and `autoregressive`, its baseline and oracle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specextend.decoding.output import Output, Round
from specextend.decoding.sampling import Chooser
from specextend.drafting.drafter import Drafter
from specextend.drafting.retrieval import Retriever
from specextend.modeling.target import Target
from specextend.trees.acceptance import accept
from specextend.trees.tree import DraftTree


@torch.inference_mode()
def speculative(
    target: Target, drafter: Drafter, retriever: Retriever, choose: Chooser, prompt: Tensor, output: Output
) -> Iterator[Round | None]:
    """Extend `prompt` [N] with exactly the tokens `target` alone would produce.

    At the top of every round the target's cache holds all tokens but the newest, which roots the next tree.
    """
    with output.prefill_stage("target"):
        logits = target.prefill(prompt, output.extra_slots)
        first = choose(logits, 0, ROOT)[0]
    with output.prefill_stage("draft"):
        drafter.prefill(prompt, first, output.extra_slots)
    output.begin(first)
    yield None

    while not output.finished:
        if retriever.is_due(len(output.rounds), output.context):
            with output.stage("retrieve"):
                drafter.refresh(retriever.select(target.attention_row, drafter.context))
        with output.stage("draft"):
            tree = drafter.propose()
        with output.stage("verify"):
            logits = target.verify(tree)
        with output.stage("accept"):
            accepted = accept(tree, choose(logits, output.new_tokens, tree.depth))
            target.commit(accepted.path)
            drafter.commit(accepted)
        yield output.append(len(tree) - 1, [*accepted.tokens.tolist(), int(accepted.bonus)])


@torch.inference_mode()
def autoregressive(target: Target, choose: Chooser, prompt: Tensor, output: Output) -> Iterator[Round | None]:
    """Extend `prompt` [N] one token at a time: a speculative round whose tree is its root."""
    with output.prefill_stage("target"):
        newest = choose(target.prefill(prompt, output.extra_slots), 0, ROOT)[0]
    output.begin(newest)
    yield None

    while not output.finished:
        with output.stage("verify"):
            tree = DraftTree.root(newest)
            newest = choose(target.verify(tree), output.new_tokens, ROOT)[0]
            target.commit(tree.depth)
        yield output.append(0, [int(newest)])


ROOT = torch.zeros(1, dtype=torch.long)  # depth of a lone root
