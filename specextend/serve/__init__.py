"""An OpenAI-compatible server around one engine: `python -m specextend.serve`, or `create_app` for an ASGI server."""

from specextend.serve.app import create_app
from specextend.serve.settings import Settings

__all__ = ["Settings", "create_app"]
