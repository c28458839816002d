"""Prometheus metrics: tokens, speed, acceptance per round and by position, queue, memory, requests by status."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specextend.decoding.output import Generation, Round

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SPEEDS = (1, 5, 10, 25, 50, 100, 200, 400, 800, 1600)
CLIENT_GONE = 499  # as nginx counts them: the client closed the connection before it had its answer


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        waiting, running: jobs in the queue and under way, read at every scrape.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]):
        self.registry = CollectorRegistry()

        def make(kind, name: str, text: str, *labels: str, **options):
            return kind(f"specextend_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "requests", "Requests answered, by HTTP status", "status")
        self.prompt_tokens = make(Counter, "prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = make(Counter, "cached_prompt_tokens", "Those of them that an earlier prompt taught")
        self.tokens = make(Counter, "generated_tokens", "Tokens generated, those of cancelled requests included")
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "From arrival, waiting included", buckets=SECONDS
        )
        self.speed = make(
            Histogram, "decode_tokens_per_second", "Tokens per second after the first, by request", buckets=SPEEDS
        )
        self.accepted = make(
            Histogram, "accepted_per_round", "Draft tokens accepted in a round", buckets=tuple(range(17))
        )
        self.drafted = make(Counter, "drafted_tokens", "Draft tokens that the target verified")
        self.accepted_at = make(
            Counter, "accepted_tokens_at_position", "Draft tokens accepted, by place in their round from 0", "position"
        )
        self.client_tokens = make(
            Counter,
            "client_tokens",
            "Prompt and generated tokens of finished requests, by the API key's name",
            "client",
        )
        self.rounds = make(Counter, "rounds", "Rounds of decoding of finished requests")
        self.plain_rounds = make(Counter, "plain_rounds", "Rounds of them that verified no draft token")
        self.price = make(Gauge, "price_tokens_per_second", "What drafts had to earn, last request; 0: fixed trees")
        self.cache_bytes = make(Gauge, "cache_bytes", "Bytes of the target's key/value cache, as of the last round")
        make(Gauge, "queue_length", "Requests waiting").set_function(waiting)
        make(Gauge, "running", "Requests being decoded").set_function(running)

    def add_round(self, round_: Round) -> None:
        self.accepted.observe(round_.accepted)
        self.drafted.inc(round_.drafted)
        for position in range(round_.accepted):
            self.accepted_at.labels(str(position)).inc()

    def finished(self, result: Generation, client: str | None = None) -> None:
        """Count a generation, for `client` too where clients have names."""
        if client is not None:
            self.client_tokens.labels(client).inc(result.prompt_tokens + result.new_tokens)
        self.prompt_tokens.inc(result.prompt_tokens)
        self.cached_tokens.inc(result.cached_tokens)
        self.rounds.inc(len(result.rounds))
        self.plain_rounds.inc(sum(not round_.drafted for round_ in result.rounds))
        self.price.set(result.price)
        if result.rounds:
            self.speed.observe(result.decode_tokens_per_s)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
