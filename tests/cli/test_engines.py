"""All methods of a comparison run on one backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specextend.cli import engines
from specextend.config import SpecExtendConfig

CAPTURED, PLAIN = SpecExtendConfig.specextend(), SpecExtendConfig.standard()


class Engine:
    """Captures what has Hybrid Tree Attention."""

    def __init__(self, models, config, *, eager: bool, prefix_reuse: bool = True):
        self.models, self.config, self.eager = models, config, eager

    @property
    def backend(self) -> str:
        return "graphs" if not self.eager and self.config.hybrid_tree_attention else "eager"

    why_eager = "its tree is too large"

    def with_config(self, config):
        return Engine(self.models, config, eager=self.eager)


@pytest.mark.parametrize(
    "device, configs, eager, backend, line",
    [
        ("cuda", [CAPTURED], False, "graphs", ""),
        ("cuda", [CAPTURED, PLAIN], False, "eager", "all methods run eager: standard cannot be captured (its tree"),
        ("cuda", [CAPTURED, PLAIN], True, "eager", ""),
        ("cpu", [CAPTURED, PLAIN], False, "graphs", ""),
    ],
)
def test_one_method_that_cannot_be_captured_makes_all_of_them_eager(
    device, configs, eager, backend, line, monkeypatch, capsys
):
    monkeypatch.setattr(engines, "SpecExtend", Engine)
    models = SimpleNamespace(device=torch.device(device))
    engine = engines.uniform_engine(models, configs, eager=eager)
    assert engine.backend == backend and engine.config is configs[0]
    if backend == "eager":
        assert engine.with_config(CAPTURED).backend == "eager"
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)
