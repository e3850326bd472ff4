"""Say in which dtype a model computes, as commands do on standard error."""

import sys
from typing import Protocol

from mlx_retrieval.backbones import describe_dtype, is_slow
from mlx_retrieval.models.heads import RetrievalModel


class Loaded(Protocol):
    """A model for inference: `embedder.Model` or `reranker.Reranker`."""

    name: str
    model: RetrievalModel


def describe(model: Loaded) -> str:
    """Return `adapters/best computes in bfloat16`, with a hint if that is slow on this device."""
    return f"{model.name} {describe_dtype(model.model.backbone)}"


def report(*models: Loaded) -> None:
    """Print the dtype of each model."""
    for model in models:
        print(describe(model), file=sys.stderr)


def warn(program: str, *models: Loaded | None) -> None:
    """Print the dtype of each model for which it is slow on this device; None = no model."""
    for model in models:
        if model is not None and is_slow(model.model.backbone):
            print(f"{program}: {describe(model)}", file=sys.stderr)
