"""Figures for Prometheus: llama-server's names where they mean the same, ours for what only we have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from bridge.engine import Engine


class Metrics(Collector):
    """Counters of one server."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.answers: Counter[tuple[str, str]] = Counter()  # by endpoint and status

    def collect(self) -> Iterator[Any]:
        """What the engine has counted."""
        answers = CounterMetricFamily("mixkvq_http_requests", "Requests answered, by endpoint and status.", labels=["path", "status"])
        for labels, n in self.answers.items():
            answers.add_metric(labels, n)
        yield answers
        engine = self._engine
        if engine is None:
            return
        totals, seconds = engine.totals, engine.seconds
        counters = {
            "llamacpp:prompt_tokens": ("Prompt tokens read.", totals["prompt"]),
            "llamacpp:prompt_seconds": ("Seconds of reading prompts.", seconds["prompt"]),
            "llamacpp:tokens_predicted": ("Tokens generated.", totals["generated"]),
            "llamacpp:tokens_predicted_seconds": ("Seconds of generating them, summed over requests.", seconds["answer"]),
            "llamacpp:n_decode": ("Batches evaluated.", totals["batches"]),
            "mixkvq_requests": ("Requests taken by the engine.", totals["requests"]),
            "mixkvq_requests_failed": ("Requests that ended with an error.", totals["failed"]),
            "mixkvq_prompt_tokens_cached": ("Prompt tokens that were in a stream or a file.", totals["cached"]),
            "mixkvq_chats_parked": ("Chats written to files.", totals["parked"]),
            "mixkvq_chats_resumed": ("Chats read from files.", totals["resumed"]),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(name, what, value=value)
        running, waiting = engine.load()
        yield GaugeMetricFamily("llamacpp:requests_processing", "Requests that run.", value=running)
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait.", value=waiting)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
