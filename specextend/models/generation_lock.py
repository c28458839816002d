"""One generation at a time over a set of models, whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from specextend.errors import InputError


class GenerationLock:
    """Held from the beginning of a generation to its end; other threads wait for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._holder: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for the turn and hold it; InputError for a thread that would wait for itself."""
        if self.is_mine():
            raise InputError(
                "a stream of these models is open in this thread; read it to its end or close() it before the next"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def is_mine(self) -> bool:
        """Whether this thread began what is under way."""
        return self._holder == threading.get_ident()
