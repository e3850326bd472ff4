"""Merge the token vectors of a document that are most alike, so that fewer are stored.

Clavié, Chaffin and Adams 2024 (arXiv 2409.14683): hierarchical clustering by Ward's method on the cosine distances of
a document's token vectors, cut at 1 / factor of their number; the vectors of a cluster become their mean.
"""

import numpy as np

from mlx_retrieval.utils.products import product


def pool(vectors: np.ndarray, factor: int) -> np.ndarray:
    """Return at most L / factor + 1 vectors of unit length, float32, for token vectors (L, d). 1 = all of them.

    The first vector stays as it is: it is that of the special token or of the prompt, which all documents share.
    """
    count = (len(vectors) - 1) // factor
    if factor <= 1 or count < 1:
        return vectors
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    rest = vectors[1:]
    distances = np.maximum(1 - product(rest, rest.T), 0)
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), method="ward")
    clusters = fcluster(tree, t=count, criterion="maxclust") - 1
    order = np.argsort(clusters, kind="stable")
    sums = np.add.reduceat(rest[order], np.searchsorted(clusters[order], np.unique(clusters)), axis=0)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.concatenate([vectors[:1], sums / np.maximum(norms, 1e-12)]).astype(np.float32)
