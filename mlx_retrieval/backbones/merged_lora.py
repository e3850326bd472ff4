"""Merge LoRA adapters into their layers' weights for one pass."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.ops import known_linear, merged_linear


def mergeable(model: nn.Module) -> list[nn.Module]:
    """Return the LoRA layers whose adapter can be added to the weight exactly: float32, not quantised, no dropout."""
    adapters = sys.modules.get("mlx_lm.tuner.lora")  # a second to import; without it, no layer can be one of its
    found = []
    for module in model.modules() if adapters else []:
        if not isinstance(module, adapters.LoRALinear) or module.dropout._p_1 < 1:
            continue
        if type(module.linear) is nn.Linear and module.linear.weight.dtype == mx.float32:
            if not hasattr(type(module), "_merged"):
                module.__class__ = _merging(type(module))
            found.append(module)
    return found


def merge(layer: nn.Module) -> mx.array:
    """Return the weight (out, in) of a `mergeable` layer with its adapter added."""
    return layer.linear.weight + (layer.scale * layer.lora_b.T) @ layer.lora_a.T


class Products:
    """The matrix products of `merged` layers, in the order of their calls: computed and noted, or `known` from before.

    Known ones save most of a forward pass that is repeated for its gradient.
    """

    def __init__(self, known: Sequence[mx.array] = ()):
        self.noted: list[mx.array] = []
        self._known = iter(known) if known else None

    def __call__(self, x: mx.array, weight: mx.array, a: mx.array, b: mx.array) -> mx.array:
        if self._known:
            return known_linear(x, weight, a, b, next(self._known))
        self.noted.append(merged_linear(x, weight, a, b))
        return self.noted[-1]


def product_size(layers: Sequence[nn.Module]) -> int:
    """Return the bytes that the products of `mergeable` layers take for each token."""
    return sum(layer.linear.weight.shape[0] * layer.linear.weight.itemsize for layer in layers)


@contextmanager
def merged(layers: Sequence[nn.Module], weights: Sequence[mx.array], products: Products) -> Iterator[None]:
    """Let `mergeable` layers compute with these `merge`d weights. Equal up to rounding, gradients too, and cheaper: one
    matrix product for three, and none of the sums. Without weights, layers compute as always."""
    if not weights:
        yield
        return
    for layer, weight in zip(layers, weights, strict=True):
        object.__setattr__(layer, "_merged", (weight, products))  # past nn.Module, which takes arrays for parameters
    try:
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "_merged", None)


def _merging(kind: type) -> type:
    """Return a subclass that uses merged weights; mlx-lm's class and all names of parameters stay the same."""

    def call(self: nn.Module, x: mx.array) -> mx.array:
        if self._merged is None:
            return kind.__call__(self, x)
        weight, products = self._merged
        y = products(x, weight, self.lora_a, self.scale * self.lora_b)
        return y + self.linear.bias if "bias" in self.linear else y

    return type(f"Merging{kind.__name__}", (kind,), {"__call__": call, "_merged": None})
