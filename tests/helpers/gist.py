"""sentence-transformers' loss with a guide, of vectors that are computed already.

compute = guided_loss(("query-document", "query-query"), temperature=0.05, margin=0.0)
compute([queries, positives, negatives], [guide_of_queries, guide_of_positives, guide_of_negatives])
"""

from collections.abc import Callable, Sequence

import pytest


def guided_loss(directions: Sequence[str], temperature: float, margin: float) -> Callable:
    """Return a function of the vectors of each column, (B, D) tensors, and of those by the guide, to the loss."""
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    loss = object.__new__(losses.CachedGISTEmbedLoss)  # whose constructor asks for models with tokenizers
    torch.nn.Module.__init__(loss)
    values = {"temperature": temperature, "margin_strategy": "absolute", "margin": margin, "mini_batch_size": 1_000}
    values |= {"contrast_anchors": "query-query" in directions, "contrast_positives": "document-document" in directions}
    values |= {"gather_across_devices": False, "show_progress_bar": False}
    values |= {"similarity_fct": torch.nn.CosineSimilarity(dim=-1), "cross_entropy_loss": torch.nn.CrossEntropyLoss()}
    for name, value in values.items():
        setattr(loss, name, value)
    return lambda columns, guide: loss.calculate_loss([[c] for c in columns], [[c] for c in guide])
