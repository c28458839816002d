"""Clocks of the benchmarks, and the steps that the GPU benchmark replays one by one."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from scripts.bench.timing import in_turns, median_ms

CPU = torch.device("cpu")


def test_a_median_leaves_out_warm_up_and_what_runs_before():
    seconds = iter([0.05, 0.0, 0.004, 0.0])
    found = median_ms(lambda: time.sleep(next(seconds)), CPU, before=lambda: time.sleep(0.02), repeats=3, warm_up=1)
    assert found < 4


def test_runs_take_turns_and_who_is_first_changes():
    order: list[str] = []
    times = in_turns({name: partial(order.append, name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc" and [len(one) for one in times.values()] == [4, 4, 4]


def test_every_step_is_replayed_alone_from_the_state_that_a_generation_left():
    pytest.importorskip("triton")
    from scripts.bench.gpu import Bench

    class Steps:
        state, runs = 0, []

        def names(self):
            return ["draft", "verify"]

        def run(self, name):
            self.runs.append((name, self.state))
            self.state += 1

        def restore(self):
            self.state = 0

    class Engine:
        @contextmanager
        def steps_after(self, prompt, new_tokens):
            yield Steps()

    bench = object.__new__(Bench)  # no models: they need a GPU
    bench.median_ms = partial(median_ms, device=CPU, repeats=2, warm_up=1)
    assert set(bench.replayed_ms(Engine(), torch.arange(3), 4)) == {"draft_ms", "verify_ms"}
    assert Steps.runs == [("draft", 0)] * 3 + [("verify", 0)] * 3
