"""Compute with quantised weights on CPUs as with float32: as copies of them, or dequantised for each product.

dequantize(backbone, "auto")            # changes what the layers compute with, and no value
describe(backbone)                      # "4 bits, computed as float32 copies (0.5 GB) ..."

On CPUs, mlx's product with packed weights is about twenty times slower than BLAS's in float32 (benchmarks/README.md).
GPUs have fast ones: nothing here changes a model there. A copy is a plain `Linear` or `nn.Embedding`, which knows
by its `packed` what it was, so that fingerprints, estimates and checks still see a quantised model. Mixtures' stacks
of experts stay packed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlx_retrieval.backend import device_memory, mx, nn

from mlx.utils import tree_flatten, tree_unflatten

from mlx_retrieval import backend
from mlx_retrieval.backbones.ops import Linear
from mlx_retrieval.utils.text import gb

QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
COPIES_SHARE = 0.5  # of the free memory, which copies may take; a run's passes need the rest
BLOCK = 4 << 20  # numbers of a weight that are dequantised at once


@dataclass(frozen=True)
class Packed:
    """The size of a quantised weight that a copy stands for: bits a number, scales and biases, bytes of integers."""

    bits: int
    scales: int
    integers: int


def dequantize(model: nn.Module, wanted: str | None = None) -> None:
    """On CPUs, let a model's quantised layers compute in float32, in place. Nothing is read or computed yet.

    Args:
        wanted: one of `backend.DEQUANTIZE`; None = as `backend.set_dequantize` says.
            auto: `on` if half of the free memory has room for it, else `blocks`; `off` in half precision, which CPUs
            have no fast product for.
            on: copies of all weights, in the dtype that the model computes in.
            blocks: each product dequantises its weight, and its gradient does so again.
            off: mlx's product with packed weights.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QUANTISED)]
    how = chosen(model, wanted)
    if how == "off":
        return
    if how == "blocks":
        for _, module in layers:
            module.__class__ = BlockLinear if isinstance(module, nn.QuantizedLinear) else BlockEmbedding
        return
    dtype = _dtype(model)
    copies = {id(module): _copy(module, dtype) for _, module in layers}  # a tied layer has several names
    model.update_modules(tree_unflatten([(name, copies[id(module)]) for name, module in layers]))


def chosen(model: nn.Module, wanted: str | None = None, room: float | None = None) -> str:
    """Return what `dequantize` would let a model's packed weights be computed with: "on", "blocks" or "off".

    Args:
        room: bytes that the copies of `auto` may take; None = half of the free memory.
    """
    wanted = wanted or backend.DEQUANTIZED
    layers = [module for _, module in model.named_modules() if isinstance(module, QUANTISED)]
    if not layers or not backend.FUSED:
        return "off"
    if wanted != "auto":
        return wanted
    if (dtype := _dtype(model)) != mx.float32:
        return "off"
    numbers = sum(module.weight.size * 32 // module.bits for module in layers)
    room = COPIES_SHARE * device_memory.free() if room is None else room
    return "on" if numbers * dtype.size <= room else "blocks"


def _dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype that a model computes in."""
    dtypes = {value.dtype for _, value in tree_flatten(model.parameters())}
    return next((dtype for dtype in (mx.bfloat16, mx.float16) if dtype in dtypes), mx.float32)


def is_quantised(model: nn.Module) -> bool:
    """Return whether layers of a model are quantised, whatever they compute with."""
    return any(_is_copy(module) or "scales" in module for module in model.modules())


def way(model: nn.Module) -> str | None:
    """Return what a model's quantised layers compute with: "on", "blocks" or "off"; None if it has none."""
    kinds = {"on" if _is_copy(m) else "blocks" if isinstance(m, BLOCKS) else "off" for m in _quantised(model)}
    return next((kind for kind in ("on", "blocks", "off") if kind in kinds), None)


def describe(model: nn.Module) -> str:
    """Return what a model's quantised weights are and what is computed with, in words; "" if nothing is dequantised."""
    how = way(model)
    if how not in ("on", "blocks"):
        return ""
    layers = [*_quantised(model)]
    widths = sorted({layer.packed.bits if _is_copy(layer) else layer.bits for layer in layers})
    bits = f"{' and '.join(map(str, widths))} bits"
    faster = "as CPUs multiply these about 20 times faster; --dequantize off keeps them packed"
    if how == "blocks":
        return f"{bits}, dequantised for each product, {faster}"
    size = sum(layer.weight.nbytes for layer in layers if _is_copy(layer))
    dtype = str(next(layer for layer in layers if _is_copy(layer)).weight.dtype).rpartition(".")[-1]
    return f"{bits}, computed as {dtype} copies ({gb(size, 2)} GB), {faster}"


def packed_size(model: nn.Module) -> tuple[int, int, int]:
    """Return of a model's copies: their numbers, and of the weights that they stand for the scales and the bytes."""
    copies = [module for module in model.modules() if _is_copy(module)]
    numbers = sum(module.weight.size for module in copies)
    return numbers, sum(m.packed.scales for m in copies), sum(m.packed.integers for m in copies)


def block_size(model: nn.Module) -> int:
    """Return the bytes that the largest weight of a model takes while it is dequantised for a product; 0 = none is.

    mlx needs as much once more beside the result.
    """
    sizes = (module.weight.size * 32 // module.bits for module in model.modules() if isinstance(module, BLOCKS))
    return 2 * min(BLOCK, max(sizes, default=0)) * mx.float32.size


def _is_copy(module: nn.Module) -> bool:
    return hasattr(module, "packed") and isinstance(module.packed, Packed)


def _quantised(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if _is_copy(module) or isinstance(module, QUANTISED))


def _parts(module: nn.Module) -> list[mx.array]:
    """Return a quantised layer's integers, scales and, if it has them, biases of groups."""
    return [module[name] for name in ("weight", "scales", "biases") if module.get(name) is not None]


def _copy(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Return a plain layer with the values of a quantised one."""
    kind = Linear if isinstance(module, nn.QuantizedLinear) else nn.Embedding
    copy = kind.__new__(kind)  # its __init__ would draw random numbers
    nn.Module.__init__(copy)
    weight, *scales = _parts(module)
    copy.weight = mx.dequantize(weight, *scales, **_form(module), dtype=dtype)
    if "bias" in module:
        copy.bias = module.bias
    copy.packed = Packed(module.bits, sum(each.size for each in scales), weight.nbytes)
    copy.freeze()
    return copy


# --- blocks ---------------------------------------------------------------------------------------------------------


def _form(module: nn.Module) -> dict:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


@functools.cache
def _product(group_size: int, bits: int, mode: str) -> Callable[..., mx.array]:
    """Return a function of x (..., in) and a quantised weight's parts that gives x weight^T (..., out)."""

    def blocks(parts: Sequence[mx.array]) -> Iterator[tuple[slice, Callable[[mx.array], mx.array]]]:
        """Yield rows of the weight, and a function that dequantises them once an array is there, and not before."""
        rows, width = parts[0].shape[0], parts[0].shape[1] * 32 // bits
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            some = slice(first, first + step)

            def weight(after: mx.array, some: slice = some) -> mx.array:
                block = mx.depends([part[some] for part in parts], [after])
                return _numbers(block, group_size, bits, mode, after.dtype)

            yield some, weight

    @mx.custom_function
    def product(x: mx.array, *parts: mx.array) -> mx.array:
        results = []
        for _, weight in blocks(parts):
            results.append(x @ weight(results[-1] if results else x).T)
        return mx.concatenate(results, axis=-1) if len(results) > 1 else results[0]

    @product.vjp
    def product_vjp(primals: tuple, cotangent: mx.array, _) -> tuple:
        _, *parts = primals
        total = None
        for some, weight in blocks(parts):
            slopes = cotangent[..., some] @ weight(cotangent if total is None else total)
            total = slopes if total is None else total + slopes
        return total, *map(mx.zeros_like, parts)

    return product


def _numbers(parts: Sequence[mx.array], group_size: int, bits: int, mode: str, dtype: mx.Dtype) -> mx.array:
    """Return the numbers (rows, in) of a quantised weight's parts.

    For 4 and 8 bits in operations that `mx.compile` fuses: mlx's own function takes one number at a time.
    """
    if mode != "affine" or bits not in (4, 8):
        return mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode, dtype=dtype)
    integers, *scales = parts
    if bits == 4:  # a byte has two, the lower half first: each gets a byte of its own
        pairs = integers.view(mx.uint8).astype(mx.uint16)
        integers = (pairs | (pairs << 4)) & 0x0F0F
    scale, bias = (part[..., None].astype(dtype) for part in scales)
    groups = integers.view(mx.uint8).reshape(*scale.shape[:-1], group_size)
    return (groups.astype(dtype) * scale + bias).flatten(-2)


class BlockLinear(nn.QuantizedLinear):
    """A quantised layer that dequantises its weight, `BLOCK` numbers at a time, for each product."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(**_form(self))(x, *_parts(self))
        return y + self["bias"] if "bias" in self else y


class BlockEmbedding(nn.QuantizedEmbedding):
    """A quantised table of embeddings whose product with states, as a head, is that of `BlockLinear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(**_form(self))(x, *_parts(self))


BLOCKS = (BlockLinear, BlockEmbedding)
