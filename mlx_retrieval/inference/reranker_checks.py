"""Check that a reranker is sound, by what every score relies on: `python rerank.py --check MODEL`."""

from collections.abc import Sequence

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval.inference import checks, weight_checks
from mlx_retrieval.inference.checks import HALF_PRECISION, TEXTS, Finding
from mlx_retrieval.inference.reranker import Reranker

QUERY = "which kettle hisses?"
DIFFERENT = 1e-6  # least difference between the scores of different documents


def weights(reranker: Reranker) -> tuple[bool, str]:
    """Check that every number of the weights is finite."""
    return weight_checks.finite_weights(reranker.model, reranker.tokenizer.tokenizer)


def finite(reranker: Reranker) -> tuple[bool, str]:
    """Check that unusual documents and queries have finite scores."""
    limit = min(reranker.config.max_length, checks.LONGEST)
    texts = checks.unusual_texts(limit)
    for text in texts.values():
        reranker.score(QUERY, [text])
        reranker.score(text, [TEXTS[3]])
    return True, ", ".join(texts)


def batching(reranker: Reranker) -> tuple[bool | None, str]:
    """Check that a document's score is the same alone and among others."""
    if reranker.kind == "listwise":
        return None, "a listwise reranker reads a query's documents together"
    together = reranker.score(QUERY, TEXTS)
    alone = np.concatenate([reranker.score(QUERY, [text]) for text in TEXTS])
    half = any(value.dtype in (mx.bfloat16, mx.float16) for _, value in tree_flatten(reranker.model.parameters()))
    limit = (HALF_PRECISION if half else 1e-4) * max(1.0, float(np.ptp(together)))
    worst = float(np.abs(together - alone).max())
    return worst <= limit, f"worst difference {worst:.1e} of {len(TEXTS)} scores, limit {limit:.0e}"


def differing(reranker: Reranker) -> tuple[bool, str]:
    """Check that different documents have different scores."""
    spread = float(np.ptp(reranker.score(QUERY, TEXTS)))
    return spread > DIFFERENT, f"scores differ by up to {spread:.1e}, must exceed {DIFFERENT:.0e}"


CHECKS = {
    checks.WEIGHTS: weights,
    "finite scores": finite,
    "order and batching": batching,
    "documents are told apart": differing,
}


def examine(reranker: Reranker) -> Sequence[Finding]:
    """Run all checks of a reranker; see `checks.run_check`."""
    return [checks.run_check(name, function, reranker) for name, function in CHECKS.items()]
