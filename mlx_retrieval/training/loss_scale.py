"""Scale gradients where a model computes in float16, so that small ones do not become 0.

float16 has no number between 0 and 6e-8, and few digits below 6e-5. As the loss falls or a batch grows, more and more
of a backward pass is that small. So the gradient that enters the model is multiplied by a power of two which makes its
largest number about 1, and the float32 gradient that comes out is divided by it, which changes exponents alone
(Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, https://arxiv.org/abs/1710.03740). The scale follows
from each batch, so there is none to search for. bfloat16 has float32's range and needs no scale.
"""

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten, tree_map

EXPONENT = 0x7F800000  # the bits of a float32's exponent
# What the largest number that enters the model is scaled to; the second, for batches whose gradients of weights, which
# are sums over tokens, would exceed float16's 65,504. Their step is repeated with it, and a chat run keeps it.
LARGEST = (1.0, 2.0**-8)


def is_needed(model: nn.Module) -> bool:
    """Return whether part of a model computes in float16."""
    return any(value.dtype == mx.float16 for _, value in tree_flatten(model.parameters()))


def power_of_two(number: mx.array) -> mx.array:
    """Return the largest power of two that is not above each |number|, float32; infinite where it is not finite."""
    return (number.astype(mx.float32).view(mx.int32) & EXPONENT).view(mx.float32)


def scale_of(grad: mx.array, largest: float = LARGEST[0]) -> mx.array:
    """Return the power of two that brings the largest |number| of a float32 gradient to `largest`, or up to twice that.

    `largest`: a power of two.

    1 for a gradient of zeros; 0 if a number is not finite, so that the scaled gradient is not finite either.
    """
    power = power_of_two(mx.abs(grad).max())
    return mx.where(power > 0, largest / power, 1)


def overflowed(loss: mx.array, grads: dict) -> bool:
    """Return whether gradients are not finite although the loss is."""
    finite = mx.stack([mx.isfinite(grad).all() for _, grad in tree_flatten(grads)]).all()
    return (mx.isfinite(loss) & ~finite).item()


def unscaled(grads: dict, scale: mx.array) -> dict:
    """Return float32 gradients divided by the scale of the gradient that they came from."""
    return tree_map(lambda grad: grad / scale, grads)
