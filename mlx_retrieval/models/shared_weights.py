"""The weights of base models that are in memory: several adapters on one base hold them once.

shared = SharedWeights()
first = embedder.load("adapters/a", shared=shared)
second = embedder.load("adapters/b", shared=shared)      # adds the adapter's own weights alone
"""

from pathlib import Path
from weakref import WeakValueDictionary

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval.backbones import Backbone


class _Weights:
    """A base model's arrays by name; alive as long as a backbone holds it."""

    def __init__(self, arrays: dict[str, mx.array]):
        self.arrays = arrays


class SharedWeights:
    """Let backbones of the same files and dtypes use the same arrays, as long as one of them lives.

    Nothing changes an array in place: an adapter has its own, and training's results replace those of a model.
    """

    def __init__(self):
        self._weights: WeakValueDictionary[tuple, _Weights] = WeakValueDictionary()

    def share(self, folder: Path, backbone: Backbone) -> None:
        """Give a backbone, which was loaded from `folder` and not adapted yet, the arrays of an earlier one."""
        arrays = dict(tree_flatten(backbone.parameters()))
        forms = tuple((name, value.shape, str(value.dtype)) for name, value in arrays.items())
        weights = self._weights.setdefault((folder.resolve(), forms), _Weights(arrays))
        if weights.arrays is not arrays:
            backbone.update(tree_unflatten(list(weights.arrays.items())))
        backbone.shared_weights = weights
