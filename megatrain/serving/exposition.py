"""The counts of the server in Prometheus' format: under vLLM's names, so that dashboards for it work, and under our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatrain.extras import need
from megatrain.serving.desk import Desk
from megatrain.serving.meters import ABORTED, Distribution

REASONS = ("stop", "length", ABORTED)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposed(desk: Desk, model: str, info: dict[str, str]) -> bytes:
    """All counts as text. info: what the model is, as labels of megatrain_model_info. Raises MissingPackageError."""
    prometheus = need("prometheus_client", "/metrics", "serve")
    registry = prometheus.CollectorRegistry(auto_describe=False)
    registry.register(_Counts(desk, model, info))
    text: bytes = prometheus.generate_latest(registry)
    return text


class _Counts:
    """A collector: the families of metrics, made when somebody looks."""

    def __init__(self, desk: Desk, model: str, info: dict[str, str]) -> None:
        self._desk, self._model, self._info = desk, model, info
        self._core = need("prometheus_client.core", "/metrics", "serve")

    def collect(self) -> Iterator[Any]:
        """The families."""
        yield from self._of_engine()
        yield from self._of_requests()
        yield from self._of_answers()

    def _of_engine(self) -> Iterator[Any]:
        desk, stats = self._desk, self._desk.meters.stats
        running = min(stats.running, desk.open)
        yield self._gauge("vllm:num_requests_running", "Requests that the engine works on.", running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for the engine.", desk.open - running)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the blocks of keys and values in use, 0 to 1.",
            stats.blocks_used / max(1, stats.blocks),
        )
        yield self._counter("vllm:num_preemptions", "Requests that gave their blocks back and began anew.", stats.preemptions)
        yield self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked for in the cache of prefixes.", stats.prefix_queries
        )
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits)
        yield self._counter("megatrain_engine_steps", "Iterations of the engine.", stats.steps)
        family = self._core.GaugeMetricFamily("megatrain_model_info", "What is served.", labels=["model_name", *self._info])
        family.add_metric([self._model, *self._info.values()], 1)
        yield family

    def _of_requests(self) -> Iterator[Any]:
        meters = self._desk.meters
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts that were read.", meters.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens that were written.", meters.generated_tokens)
        reasons = {reason: meters.finished[reason] for reason in REASONS}
        yield self._by("vllm:request_success", "Requests that ended, by why.", "finished_reason", reasons)
        for name, what, of in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", meters.first_token),
            ("inter_token_latency_seconds", "Between two tokens of a request.", meters.between_tokens),
            ("e2e_request_latency_seconds", "From a request's arrival to its last token.", meters.whole),
            ("request_queue_time_seconds", "From a request's arrival until its prompt is read.", meters.queued),
            ("request_prefill_time_seconds", "From there to its first token.", meters.prefill),
            ("request_decode_time_seconds", "From its first token to its last.", meters.decode),
            ("request_prompt_tokens", "Tokens of a prompt.", meters.prompt_lengths),
            ("request_generation_tokens", "Tokens of an answer.", meters.answer_lengths),
        ):
            yield self._histogram(f"vllm:{name}", what, of)

    def _of_answers(self) -> Iterator[Any]:
        meters = self._desk.meters
        yield self._by("megatrain_errors", "HTTP requests that were refused or failed, by status.", "status", meters.refused)
        yield self._counter("megatrain_refusals", "Answers that begin as refusals do.", meters.refusals)
        yield self._by(
            "megatrain_thumbs", "Thumbs of the chat page.", "rating", {name: meters.thumbs[name] for name in ("up", "down")}
        )
        what = "Mean log-probability of an answer's tokens: the negative of the model's entropy, as seen."
        yield self._histogram("megatrain_answer_logprob", what, meters.logprobs)
        yield self._histogram(
            "megatrain_answer_repetition", "Share of an answer's runs of 4 tokens that stood before.", meters.repetitions
        )

    def _gauge(self, name: str, what: str, value: float) -> Any:
        family = self._core.GaugeMetricFamily(name, what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Any:
        family = self._core.CounterMetricFamily(name, what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _by(self, name: str, what: str, label: str, values: Any) -> Any:
        family = self._core.CounterMetricFamily(name, what, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([self._model, str(key)], value)
        return family

    def _histogram(self, name: str, what: str, of: Distribution) -> Any:
        family = self._core.HistogramMetricFamily(name, what, labels=["model_name"])
        family.add_metric([self._model], of.buckets(), of.sum)
        return family
