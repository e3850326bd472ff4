"""Train, evaluate and use retrieval models with MLX.

from mlx_retrieval import Reranker, Searcher, load

model = load("adapters/final")                       # an adapter on its base, a base model, or a hub name
vectors = model.encode(texts, prompt="query")        # numpy float32 (N, D), unit length, in the texts' order
Reranker("adapters/reranker").rerank(query, documents)
Searcher(".index").search("where are gradients cached", top=5)

These are the objects that embed.py, rerank.py, search.py and eval.py export. Importing them loads a fast BLAS and
changes nothing else in the process. `mlx_retrieval.backend.prepare()`, called before the first model, makes CPUs faster
and keeps float32 products exact on GPUs that would round their factors; the commands call it.
"""

import importlib
from typing import Any

_MODULES = {
    "Model": "inference.embedder",
    "load": "inference.embedder",
    "Reranker": "inference.reranker",
    "Searcher": "retrieval.searcher",
    "evaluate": "evaluation.retrieval",
}
__all__ = ["Model", "Reranker", "Searcher", "evaluate", "load"]  # imported when they are first used


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
