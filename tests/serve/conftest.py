"""Servers for the tests beside this file; imported late, since the server's packages may be missing."""

from __future__ import annotations

from contextlib import ExitStack

import pytest


@pytest.fixture(scope="session")
def server(bundled_engine):
    from serving import Server

    with Server(bundled_engine) as running:
        yield running


@pytest.fixture
def scripted(bundled_models):
    """scripted(pace=..., settings=...): (server, engine) around a scripted engine."""
    from serving import Scripted, Server

    with ExitStack() as stack:

        def make(settings=None, **options) -> tuple[Server, Scripted]:
            engine = Scripted(bundled_models, **options)
            return stack.enter_context(Server(engine, **settings or {})), engine

        yield make


@pytest.fixture(scope="module")
def scripted_once(bundled_models):
    """One server around a scripted engine for all tests of a file that change nothing of it."""
    from serving import Scripted, Server

    with Server(Scripted(bundled_models)) as running:
        yield running
