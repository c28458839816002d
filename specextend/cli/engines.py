"""The engines of the methods that are compared, all of them on one backend."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

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


def arm_engines(models: LoadedModels, configs: Mapping[str, SpecExtendConfig], *, eager: bool) -> dict[str, SpecExtend]:
    """The engine of every arm, by its name, over one cache of the target; every prompt is read whole.

    On a GPU each is captured where it can be, and a line on stderr says who is not: an arm that runs eager is not
    compared with the others by its method alone, and records and tables say so.
    """
    engines: dict[str, SpecExtend] = {}
    for name, config in configs.items():
        first = next(iter(engines.values()), None)
        engine = first.with_config(config) if first else SpecExtend(models, config, eager=eager, prefix_reuse=False)
        engines[name] = engine
        if not eager and models.device.type == "cuda" and engine.backend == "eager":
            print(f"{name} runs eager ({engine.why_eager}); --eager runs all arms so", file=sys.stderr)
    return engines
