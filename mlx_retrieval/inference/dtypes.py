"""Say which dtype a model computes in, and what replaces quantised weights, as commands do on standard error."""

import sys
from typing import Protocol

from mlx_retrieval.backbones import dequantized, describe_dtype, is_slow
from mlx_retrieval.models.heads import RetrievalModel


class Loaded(Protocol):
    """A model for inference: `embedder.Model` or `reranker.Reranker`."""

    name: str
    model: RetrievalModel


def describe(model: Loaded) -> str:
    """Return `adapters/best computes in bfloat16`, with a hint if that is slow on this device."""
    return f"{model.name} {describe_dtype(model.model.backbone)}"


def report(*models: Loaded) -> None:
    """Print the dtype of each model, and what it computes with in place of quantised weights."""
    for model in models:
        print(describe(model), file=sys.stderr)
        _print_weights("", model)


def warn(program: str, *models: Loaded | None) -> None:
    """Print the dtype of each model for which it is slow here, and what replaces quantised weights; None = no model."""
    for model in models:
        if model is not None and is_slow(model.model.backbone):
            print(f"{program}: {describe(model)}", file=sys.stderr)
        if model is not None:
            _print_weights(f"{program}: ", model)


def _print_weights(before: str, model: Loaded) -> None:
    if text := dequantized.describe(model.model.backbone):
        print(f"{before}{model.name} has weights of {text}", file=sys.stderr)
