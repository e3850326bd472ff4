"""Figures for Prometheus: `GET /metrics`.

metrics = Metrics(models, thread)
metrics.count("/v1/embeddings", 200, 0.03, Record("tuned", tokens=12, texts=2))
metrics.page()                                          # bytes, in Prometheus's text format
"""

from mlx_retrieval.backend import mx

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mlx_retrieval.inference.serving.engine import Record
from mlx_retrieval.inference.serving.model_thread import ModelThread
from mlx_retrieval.inference.serving.served_models import ServedModels

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # upper ends of the histogram's buckets


class Metrics:
    """Count requests; a registry of its own, so that a process can have several servers."""

    def __init__(self, models: ServedModels, thread: ModelThread):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory and processor time of the process, on Linux
        name = "mlx_retrieval_"
        labels, own = ["path", "status", "model"], {"registry": self.registry}
        self.requests = Counter(f"{name}requests", "Requests answered.", labels, **own)
        self.seconds = Histogram(
            f"{name}request_seconds", "From a request's headers to its answer's end.", ["path"], buckets=SECONDS, **own
        )
        self.tokens = Counter(f"{name}tokens", "Tokens computed, with prompts and special ones.", ["model"], **own)
        self.texts = Counter(f"{name}texts", "Texts embedded, or scored for a query.", ["model"], **own)
        self.in_progress = Gauge(f"{name}requests_in_progress", "Requests being read, waiting or computed.", **own)
        waiting = Gauge(f"{name}queue", "Requests whose texts wait for the models, wholly or in part.", **own)
        waiting.set_function(lambda: thread.waiting)
        loaded = Gauge(f"{name}model_loaded", "Whether a model is loaded.", ["model"], **own)
        for each in models.all:
            loaded.labels(each.name).set_function(lambda each=each: each.model is not None)
        for about, of in (("loads", "Models loaded."), ("evictions", "Models evicted for others.")):
            gauge = Gauge(f"{name}model_{about}", of, **own)
            gauge.set_function(lambda about=about: getattr(models, about))
        memory = Gauge(f"{name}mlx_memory_bytes", "Memory of mlx's arrays: in use, or freed.", ["kind"], **own)
        memory.labels("active").set_function(mx.get_active_memory)
        memory.labels("cache").set_function(mx.get_cache_memory)

    def count(self, path: str, status: int, seconds: float, record: Record) -> None:
        """Count an answered request."""
        self.requests.labels(path, str(status), record.model).inc()
        self.seconds.labels(path).observe(seconds)
        if record.model:
            self.tokens.labels(record.model).inc(record.tokens)
            self.texts.labels(record.model).inc(record.texts)

    def page(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self.registry)
