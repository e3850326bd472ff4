"""Rank and linear correlation of cosines with scores, and bootstrap intervals of their differences.

correlations(cosines, scores)          # {"cosine_spearman": 0.82, "cosine_pearson": 0.81}
"""

from types import ModuleType

import numpy as np

from mlx_retrieval.utils import imports

CHUNK = 1_000_000  # numbers of resamples at once


def correlations(cosines: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return Spearman's and Pearson's correlation of cosines (N,) with scores (N,), by mteb's names.

    0 where one of them is the same for all pairs: then there is no correlation.
    """
    pearsonr, spearmanr = _scipy().pearsonr, _scipy().spearmanr
    if np.ptp(cosines) == 0 or np.ptp(scores) == 0:
        return {"cosine_spearman": 0.0, "cosine_pearson": 0.0}
    spearman, pearson = spearmanr(scores, cosines).statistic, pearsonr(scores, cosines).statistic
    return {"cosine_spearman": float(spearman), "cosine_pearson": float(pearson)}


def drawn_differences(
    before: np.ndarray, after: np.ndarray, scores: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return (resamples, 2): by what Spearman's and Pearson's correlation differ, after - before, in each resample.

    Args:
        before, after: (N,) cosines of two models.
        scores: (N,) of the same pairs. A resample draws pairs with replacement, the same for both models.
    """
    rankdata = _scipy().rankdata
    differences = np.empty((resamples, 2))
    chunk = max(1, CHUNK // len(scores))
    for first in range(0, resamples, chunk):
        drawn = rng.integers(len(scores), size=(min(chunk, resamples - first), len(scores)))
        columns = [values[drawn] for values in (scores, before, after)]
        for column, (gold, old, new) in ((0, [rankdata(values, axis=1) for values in columns]), (1, columns)):
            differences[first : first + len(drawn), column] = _pearson(gold, new) - _pearson(gold, old)
    return differences


def _scipy() -> ModuleType:
    """Return scipy.stats, which takes a second to import, and looks at torch, which commands hide."""
    imports.reveal("torch")
    import scipy.stats

    return scipy.stats


def _pearson(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of each row of two arrays (R, N); 0 where a row is constant."""
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    scale = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
    return np.where(scale > 1e-12, (one * other).sum(axis=1) / np.maximum(scale, 1e-12), 0.0)
