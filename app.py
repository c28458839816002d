"""The race page: three ways to decode one prompt, one after the other, replayed side by side in the browser.

python app.py                            # the bundled pair on this machine's CPU, http://127.0.0.1:7860
python app.py --head eagle3              # with an EAGLE head as draft
python app.py -m smollm2                 # SmolLM2-135M-Instruct with the head that ships for it
python app.py -m vicuna_7b --device cuda # hub weights, on a GPU
"""

from __future__ import annotations

import importlib.util

from eagle import entry
from specextend import SpecExtend
from specextend.cli import flags
from specextend.errors import ConfigError
from specextend.race.record import Racetrack


def main() -> None:
    parser = flags.parser(__doc__.splitlines()[0])
    entry.add_model_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this machine need 0.0.0.0")
    page.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.set_defaults(use_specextend=True)
    args = parser.parse_args()
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('the race page needs gradio: pip install "gradio>=6" pypdf')
    from specextend.race.ui import serve

    serve(Racetrack(SpecExtend(entry.load_either(args), eager=args.eager)), args.host, args.port)


if __name__ == "__main__":
    flags.run(main)
