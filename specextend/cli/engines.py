"""The engines of the methods that are compared, all of them on one backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from specextend.config import SpecExtendConfig
from specextend.engine import SpecExtend
from specextend.methods import name_of
from specextend.models.loading import LoadedModels


def uniform_engine(
    models: LoadedModels, configs: Sequence[SpecExtendConfig], *, eager: bool, prefix_reuse: bool = False
) -> SpecExtend:
    """The engine of the first of `configs`, whose `with_config` gives the others on the same backend.

    On a GPU all are captured as CUDA graphs or none is, so that a comparison is one of methods; a line on stderr says
    who could not be. Every prompt is read whole, so that a prefill is one, unless `prefix_reuse` is asked for.
    """
    engine = SpecExtend(models, configs[0], eager=eager, prefix_reuse=prefix_reuse)
    if eager or models.device.type != "cuda":
        return engine
    for config in configs:
        one = engine if config == engine.config else engine.with_config(config)
        if getattr(one, "backend", "graphs") == "eager":
            print(
                f"all methods run eager: {name_of(config)} cannot be captured ({one.why_eager})",
                file=sys.stderr,
            )
            return SpecExtend(models, configs[0], eager=True, prefix_reuse=prefix_reuse)
    return engine
