"""The mode for tests in which any machine takes the path of a Mac.

python -m pytest tests/backend/test_as_metal.py
"""

import json

from mlx_retrieval.backend import as_metal as mode
from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest

from mlx_retrieval import backend
from tests.conftest import AS_METAL

HALF = [mx.bfloat16, mx.float16]


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def test_a_process_and_the_fixture_take_the_same_path(run_python, monkeypatch):
    monkeypatch.setenv("MLX_RETRIEVAL_AS", "metal")
    monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", "8")
    monkeypatch.delenv("MLX_RETRIEVAL_PLAIN", raising=False)
    code = (
        f"import json; from mlx_retrieval import backend; from mlx_retrieval.backend import mx\n"
        f"print(json.dumps([{{name: getattr(backend, name) for name in {list(AS_METAL)}}}, backend.device_info()]))\n"
        "print(backend.describe()); print(backend.compute_dtype(mx.bfloat16), backend.compute_dtype(mx.float16))\n"
        "print(mx.matmul.__module__, mx.addmm.__module__)"
    )
    choices, description, dtypes, modules = run_python(code).stdout.splitlines()
    choices, info = json.loads(choices)
    assert choices == AS_METAL
    assert info["memory_size"] == 8 << 30 and info["max_recommended_working_set_size"] >> 20 == 5461
    assert "Apple M (emulated) GPU" in description
    assert dtypes == "mlx.core.bfloat16 mlx.core.float16"
    assert modules == "mlx_retrieval.backend.as_metal mlx_retrieval.backend.as_metal"


@pytest.mark.parametrize("device, memory, line", [
    ("Metall", "8", "MLX_RETRIEVAL_AS=Metall: neither metal nor cpu"),
    ("metal", "abc", "MLX_RETRIEVAL_MEMORY=abc: not a number of GB above 0, such as 8"),
])  # fmt: skip
def test_other_values_are_refused(run_python, monkeypatch, device, memory, line):
    """Regression: a traceback, and exit code 1."""
    monkeypatch.setenv("MLX_RETRIEVAL_AS", device)
    monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", memory)
    done = run_python("import mlx_retrieval.backend")
    assert done.returncode == 2 and done.stderr.strip() == line


@pytest.mark.parametrize("given, gib", [("8", 8), ("0.5", 0.5), ("", 16), ("0", 0), ("-8", 0), ("nan", 0), ("inf", 0)])
def test_the_memory_of_a_mac_is_a_number_above_0(monkeypatch, given, gib):
    monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", given)
    if gib:
        assert mode.memory() == gib * 2**30
    else:
        with pytest.raises(ValueError, match=f"MLX_RETRIEVAL_MEMORY={given}: "):
            mode.memory()


@pytest.mark.parametrize("gib, mib", [(8, 5461), (16, 10922), (32, 21845), (36, 27648), (64, 49152)])
def test_the_working_set_is_that_of_macs(gib, mib):
    assert mode.working_set(gib << 30) >> 20 == mib


@pytest.mark.usefixtures("as_metal")
@pytest.mark.parametrize("dtype", HALF)
def test_products_are_added_up_in_float32_and_rounded_once(dtype):
    x, weight, bias = normal(4, 300, dtype=dtype), normal(300, 5, dtype=dtype, seed=1), normal(5, dtype=dtype, seed=2)
    exact = x.astype(mx.float32) @ weight.astype(mx.float32)
    for product in (x @ weight, mx.matmul(x, weight)):
        assert product.dtype == dtype
        assert mx.array_equal(product, exact.astype(dtype))
    sums = mx.addmm(bias, x, weight)
    assert sums.dtype == dtype and mx.array_equal(sums, (exact + bias.astype(mx.float32)).astype(dtype))


@pytest.mark.usefixtures("as_metal")
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_have_the_dtype_of_what_they_are_of(dtype):
    layer = nn.Linear(8, 4)
    layer.set_dtype(dtype)
    grads = nn.value_and_grad(layer, lambda x: layer(x).astype(mx.float32).square().sum())(normal(3, 8, dtype=dtype))[1]
    assert {value.dtype for value in grads.values()} == {dtype}


@pytest.mark.usefixtures("as_metal")
def test_products_of_several_dtypes_are_mlx_s_own():
    x, weight = normal(2, 8, dtype=mx.bfloat16), normal(8, 3)
    assert (x @ weight).dtype == mx.float32
    assert (x @ weight.astype(mx.float16)).dtype == mx.float32
    with pytest.raises(TypeError):
        x @ "no array"


@pytest.mark.usefixtures("as_metal")
@pytest.mark.parametrize("dtype", HALF)
def test_quantised_products_keep_their_dtype(dtype):
    x, weight = normal(2, 64, dtype=dtype), normal(8, 64, dtype=dtype, seed=1)
    packed, scales, biases = mx.quantize(weight, 32, 4)
    product = mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=32, bits=4)
    whole = mx.dequantize(packed, scales, biases, 32, 4).astype(mx.float32)
    assert product.dtype == dtype
    assert mx.allclose(product.astype(mx.float32), x.astype(mx.float32) @ whole.T, rtol=0.01, atol=0.05)


def _masks(kind: str) -> mx.array | str | None:
    seen = np.tril(np.ones((5, 5), bool))
    return {
        "none": None,
        "causal": "causal",
        "bool": mx.array(seen),
        "of rows": mx.array(np.stack([seen, seen])[:, None]),
        "added": mx.where(mx.array(seen), 0.0, -1e4).astype(mx.bfloat16),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "of rows", "added"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_agrees_with_float32(as_metal, kind, kv_heads):
    q = normal(2, 4, 5, 8)
    k, v = normal(2, kv_heads, 5, 8, seed=1), normal(2, kv_heads, 5, 8, seed=2)
    mask = _masks(kind)
    attend = mx.fast.scaled_dot_product_attention
    exact = attend(q, k, v, scale=0.3, mask=mask.astype(mx.float32) if kind == "added" else mask)
    half = attend(*(each.astype(mx.bfloat16) for each in (q, k, v)), scale=0.3, mask=mask)
    assert half.dtype == mx.bfloat16 and half.shape == exact.shape
    assert mx.abs(half.astype(mx.float32) - exact).max().item() < 0.04


def test_the_fixture_leaves_nothing_behind():
    if not backend.AS_METAL:
        assert mx.matmul.__module__ == "mlx.core" and mx.array.__matmul__.__class__.__name__ != "function"
