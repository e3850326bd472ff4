"""Keep the matrix products of a forward pass, so that the pass that repeats it for its gradient need not compute them.

products = Products()                                # or Products(those of the first pass)
with saved_products.of(layers, products):
    states = model(...)                              # products.computed: one for each call of a layer

That is for layers whose weights are trained; merged_lora.py does the same for those that have adapters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_retrieval.backend import mx, nn

from mlx_retrieval.backbones.ops import Linear, merged_linear, saved_linear, saved_trained_linear, trained_linear


class Products:
    """The matrix products of layers, in the order of their calls.

    Without `saved`, each product is computed and appended to `computed`. With `saved`, the products of an earlier pass,
    those are returned in turn: that spares most of a forward pass that is repeated for its gradient.
    """

    def __init__(self, saved: Sequence[mx.array] = ()):
        self.computed: list[mx.array] = []
        self._saved = iter(saved) if saved else None

    def merged(self, x: mx.array, weight: mx.array, a: mx.array, b: mx.array) -> mx.array:
        """Return the product of x (..., in) with a weight that contains its adapter: see `ops.merged_linear`."""
        if self._saved:
            return saved_linear(x, weight, a, b, next(self._saved))
        self.computed.append(merged_linear(x, weight, a, b))
        return self.computed[-1]

    def trained(self, x: mx.array, weight: mx.array) -> mx.array:
        """Return the product of x (..., in) with a weight (out, in) that is trained."""
        if self._saved:
            return saved_trained_linear(x, weight, next(self._saved))
        self.computed.append(trained_linear(x, weight))
        return self.computed[-1]


def trained_layers(backbone: nn.Module) -> list[Linear]:
    """Return the linear layers of the blocks whose float32 weights are trained themselves; mlx's own become ours."""
    modules = (module for block in backbone.layers for module in block.modules() if type(module) in (nn.Linear, Linear))
    layers = [m for m in modules if m.weight.dtype == mx.float32 and "weight" in m.trainable_parameters()]
    for layer in layers:
        layer.__class__ = Linear  # which computes the same
    return layers


def size(layers: Sequence[nn.Module]) -> int:
    """Return the bytes that the products of layers, each called once, take for each token."""
    weights = (layer.weight if isinstance(layer, Linear) else layer.linear.weight for layer in layers)
    return sum(weight.shape[0] * weight.itemsize for weight in weights)


@contextmanager
def of(layers: Sequence[Linear], products: Products) -> Iterator[None]:
    """Let the products of these layers be computed by `products`, or be those that it has."""
    for layer in layers:
        object.__setattr__(layer, "_products", products)  # nn.Module's own would take it for a parameter
    try:
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "_products", None)
