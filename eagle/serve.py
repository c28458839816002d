"""The server of `specextend.serve` with an EAGLE head as draft: `python -m eagle.serve --model_name smollm2`."""

from __future__ import annotations

from functools import partial

from eagle import entry
from specextend.cli import flags
from specextend.serve.__main__ import main

if __name__ == "__main__":
    flags.run(partial(main, entry.add_model_flags, entry.load_pair))
