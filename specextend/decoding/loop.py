"""The decode loop: the paper's algorithm, whatever proposes and whatever computes.

Autoregressive decoding is the same loop with a draft that proposes nothing. The loop is a generator that yields after
the prefill and after every round, so that a caller can stream, print or stop in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specextend.decoding.backend import Backend
from specextend.decoding.clock import StageClock
from specextend.decoding.output import Output, Round


@torch.inference_mode()
def decode(backend: Backend, output: Output) -> Iterator[Round | None]:
    """Extend the prompt of `output` with exactly the tokens the target alone would produce.

    At the top of every round the target's cache holds all tokens but the newest, which roots the next tree.
    """
    output.begin(backend.prefill(output))
    yield None

    clock = StageClock(backend.device)
    while not output.finished:
        clock.start()
        backend.plan()
        if backend.refresh_is_due():
            backend.refresh()
            clock.mark("retrieve")
        backend.draft()
        clock.mark("draft")
        backend.verify()
        clock.mark("verify")
        backend.accept()
        clock.mark("accept")
        yield output.append(*backend.read(), clock.seconds())
