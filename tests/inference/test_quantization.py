"""Stored forms: sentence-transformers' bits, rankings that are the stored form's, and mistakes told in time.

python -m pytest tests/inference/test_quantization.py
"""

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_retrieval.evaluation.quantized import CachedEncoder, QuantizedEncoder
from mlx_retrieval.inference import quantization
from mlx_retrieval.inference.quantization import PRECISIONS, quantise, ranges, restore, row_bytes, truncate
from mlx_retrieval.utils.errors import UserError


def vectors(count: int = 150, dimensions: int = 24, seed: int = 0, dtype=np.float32) -> np.ndarray:
    """Unit vectors with what is special in them: zeros, a constant dimension, ties at the ends of ranges."""
    made = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    made[:, 1] = 0.25
    made[3] = 0
    made[5, ::2] = -0.0
    made[7] = made[8] = made.max(axis=0)
    return (made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)).astype(dtype)


# --- against sentence-transformers ---


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("dimensions", [24, 21])
def test_bits_are_those_of_sentence_transformers(theirs, name, dtype, dimensions):
    some, sample = vectors(dimensions=dimensions, dtype=dtype), vectors(120, dimensions, seed=1, dtype=dtype)
    narrow = np.stack([np.full(dimensions, -0.1), np.full(dimensions, 0.2)])
    for bounds, options in (
        (None, {}),
        (ranges(sample), {"calibration_embeddings": sample}),  # some values lie beyond these
        (ranges(sample), {"ranges": ranges(sample)}),
        (narrow, {"ranges": narrow}),
    ):
        ours, expected = quantise(some, name, bounds), theirs(some, name, **options)
        assert ours.dtype == expected.dtype == PRECISIONS[name] and ours.shape == expected.shape
        assert np.array_equal(ours, expected)
        assert ours.nbytes == len(some) * row_bytes(name, dimensions)
    assert np.array_equal(quantise(some[9], name, bounds), theirs(some[9], name, ranges=bounds))  # one vector alone


def test_ranges_are_those_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.util.quantization import _get_quantization_ranges

    sample = vectors()
    assert ranges(sample).dtype == np.float32 and ranges(sample).shape == (2, 24)
    assert np.array_equal(ranges(sample), _get_quantization_ranges(sample, "int8", None))


def test_chunks_do_not_show(monkeypatch):
    some = vectors()
    whole = {name: quantise(some, name) for name in PRECISIONS}
    monkeypatch.setattr(quantization, "CHUNK", 7)
    assert all(np.array_equal(quantise(some, name), whole[name]) for name in PRECISIONS)


# --- by hand ---


def test_by_hand():
    bounds = np.array([[-127.5, 0.0, 0.0], [127.5, 510.0, 0.0]], np.float32)  # steps of 1, 2 and none
    some = np.array([[-127.5, 0, 0], [127.5, 510, 0], [0.3, 3.9, 0], [-999, 999, -1]], np.float32)
    expected = [[0, 0, 0], [255, 255, 0], [127, 1, 0], [0, 255, 0]]
    assert quantise(some, "uint8", bounds).tolist() == expected
    assert (quantise(some, "int8", bounds) + np.int16(128)).tolist() == expected
    middle = restore(quantise(some, "int8", bounds), "int8", bounds)
    assert middle[2].tolist() == [0, 3, 0]
    bits = np.array([0.1, -0.1, 0.0, 3, -3, 1, 1, 1, 0.5], np.float32)  # 10010111 1, and seven bits of nothing
    assert quantise(bits, "ubinary").tolist() == [0b10010111, 0b10000000]
    assert quantise(bits, "binary").tolist() == [0b10010111 - 128, 0]
    assert restore(quantise(bits, "binary"), "binary", dimensions=9).tolist() == [1, -1, -1, 1, -1, 1, 1, 1, 1]


def test_restored_values_are_within_half_a_step():
    some = vectors()
    bounds = ranges(some)
    half = (bounds[1] - bounds[0]) / 255 / 2
    for name in quantization.CALIBRATED:
        back = restore(quantise(some, name, bounds), name, bounds)
        assert back.dtype == np.float32
        assert (np.abs(back - some) <= half * 1.01 + 1e-7).all()


@pytest.mark.parametrize("name", ["binary", "ubinary"])
@pytest.mark.parametrize("dimensions", [24, 21])
def test_dot_products_of_restored_bits_are_hamming_distances(name, dimensions):
    stored = quantise(vectors(40, dimensions), name)
    back = restore(stored, name, dimensions=dimensions)
    distances = np.unpackbits(stored[:, None].view(np.uint8) ^ stored[None].view(np.uint8), axis=-1).sum(axis=-1)
    assert np.array_equal(back @ back.T, dimensions - 2.0 * distances)


def test_middle_and_lower_end_of_a_step_rank_alike():
    some, query = vectors(), vectors(seed=9)[0]
    bounds = ranges(some)
    stored = quantise(some, "uint8", bounds)
    lower = stored * ((bounds[1] - bounds[0]) / 255) + bounds[0]
    difference = (restore(stored, "uint8", bounds) - lower) @ query
    assert np.ptp(difference) < 1e-6 < abs(difference[0])  # the same for all documents


def test_truncation_gives_unit_length():
    some = vectors()
    assert truncate(some, None) is some
    short = truncate(some, 8)
    assert short.shape == (150, 8)
    assert np.allclose(np.linalg.norm(np.delete(short, 3, axis=0), axis=1), 1, atol=1e-6)
    assert not short[3].any()  # a vector of zeros stays one


def test_bytes_of_a_vector():
    assert [row_bytes(name, 384) for name in PRECISIONS] == [1536, 384, 384, 48, 48]
    assert row_bytes("binary", 21) == 3


# --- mistakes ---


def test_mistakes():
    some = vectors()
    for message, arguments in (
        ("precision 'int4' is unknown; known: float32, int8", (some, "int4")),
        ("99 texts are too few", (some[:99], "int8")),
        (r"share ranges.*quantization\.ranges\(model\.encode\(sample\)\)", (some[:3], "uint8")),
        (r"ranges are \(2, 16\), but vectors of 24 dimensions need \(2, 24\)", (some, "int8", np.zeros((2, 16)))),
        ("a smallest value above its largest", (some, "int8", ranges(some)[::-1])),
        ("ranges: not finite", (some, "int8", ranges(some) * np.nan)),
        ("int8, not floating-point numbers: already quantised", (quantise(some, "int8"), "binary")),
    ):
        with pytest.raises(UserError, match=message):
            quantise(*arguments)
    sick = some.copy()
    sick[4, 2] = np.nan
    for name in ("int8", "binary", "ubinary"):
        with pytest.raises(UserError, match="1 of 150 vectors are not finite"):
            quantise(sick, name)
    with pytest.raises(UserError, match="at least two vectors"):
        ranges(some[0])
    with pytest.raises(UserError, match="restored with the ranges"):
        restore(quantise(some, "int8"), "int8")


# --- evaluation of stored forms ---


class Counting:
    """Vectors from the texts' numbers, and how often each text was embedded."""

    name = "counting"

    def __init__(self):
        self.seen: list[tuple[str, str]] = []

    def encode(self, texts, prompt, show_progress):
        self.seen += [(prompt, text) for text in texts]
        return vectors(50)[[int(text) for text in texts]]


def test_cached_encoder_embeds_once_and_knows_the_documents():
    model = Counting()
    cached = CachedEncoder(model)
    parts = [[str(i) for i in range(20)], [str(i) for i in range(20, 30)]]
    for _ in range(2):
        for texts in parts:
            assert np.array_equal(cached.encode(texts, "document", False), vectors(50)[[int(t) for t in texts]])
        assert np.array_equal(cached.encode(["40"], "query", False), vectors(50)[[40]])
    assert len(model.seen) == len(set(model.seen)) == 31
    assert np.array_equal(cached.ranges(24), ranges(vectors(50)[:30]))  # without the query
    assert np.array_equal(cached.ranges(8), ranges(truncate(vectors(50)[:30], 8)))


def test_stored_forms_of_queries_and_documents():
    cached = CachedEncoder(Counting())
    documents = cached.encode(["1", "2", "4"], "document", False)
    for name in PRECISIONS:
        encoder = QuantizedEncoder(cached, name, 8)
        query, found = (encoder.encode(["1", "2", "4"], prompt, False) for prompt in ("query", "document"))
        short = truncate(documents, 8)
        bounds = ranges(short) if name in quantization.CALIBRATED else None
        assert np.array_equal(found, restore(quantise(short, name, bounds), name, bounds, 8))
        asymmetric = name in (*quantization.CALIBRATED, "float32")
        assert np.array_equal(query, short if asymmetric else np.where(short > 0, 1, -1))


def test_vectors_of_any_length_keep_theirs():
    """Models that compare plain dot products: cut, but not scaled."""

    class Model:
        name, config = "plain", SimpleNamespace(normalize=False)

        def encode(self, texts, prompt, show_progress):
            return 3 * vectors()[: len(texts)]

    cached = CachedEncoder(Model())
    whole = cached.encode(["a", "b"], "document", False)
    assert np.array_equal(QuantizedEncoder(cached, "float32", 8).encode(["a", "b"], "document", False), whole[:, :8])
    assert np.array_equal(cached.ranges(8), np.stack([whole[:, :8].min(axis=0), whole[:, :8].max(axis=0)]))
