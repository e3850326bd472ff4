"""Backbones compute what transformers computes, padded or alone, causal or bidirectional.

python -m pytest tests/backbones/test_decoder.py
"""

import json
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
import random_models
from backbone_checks import alone, assert_close, assert_quantised, rows_of
from mlx.utils import tree_flatten
from random_models import DECODERS, ENCODERS, KINDS, WINDOW, texts

from mlx_retrieval import backend
from mlx_retrieval.backbones import count_parameters, load_backbone
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of random models, by kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: random_models.save(kind, root / kind) for kind in KINDS}


def reference(folder: Path, ids: mx.array, lengths: mx.array, mask=None) -> list[np.ndarray]:
    """Return transformers' states of each row's real tokens; `mask` (L, L) replaces its attention masks."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    real = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    attention = torch.tensor(real.astype(np.int64))
    if mask is not None:
        allowed = mask[None] & real[:, None, :] | np.eye(ids.shape[1], dtype=bool)
        attention = torch.where(torch.tensor(allowed[:, None]), 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        states = model(input_ids=torch.tensor(np.array(ids)), attention_mask=attention).last_hidden_state
    return [states[row, :length].numpy() for row, length in enumerate(lengths.tolist())]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_transformers(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts()
    expected = reference(folders[kind], ids, lengths)
    assert np.concatenate(expected).std() > 0.1  # there is something to compare
    assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    assert_close(alone(backbone, ids, lengths), expected, 1e-4)
    assert backbone.bidirectional == (kind in ENCODERS)
    assert backbone.hidden_size == 64 and len(backbone.layers) == random_models.LAYERS


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_state(folders, kind, bidirectional):
    if kind in ENCODERS and not bidirectional:
        with pytest.raises(UserError, match="cannot be made causal"):
            load_backbone(folders[kind], bidirectional=False)
        return
    backbone, (ids, lengths) = load_backbone(folders[kind], bidirectional), texts()
    expected = alone(backbone, ids, lengths)  # of other shapes, so that a BLAS may sum in another order
    assert_close(rows_of(backbone, ids, lengths), expected, 3e-5)
    padded = mx.pad(ids, ((0, 0), (0, 19)), constant_values=7)  # other padding, and more of it
    assert_close(rows_of(backbone, padded, lengths), expected, 3e-5)
    assert np.isfinite(np.array(backbone.hidden_states(padded, lengths))).all()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "llama3"])
def test_bidirectional_as_transformers_makes_it(folders, tmp_path, kind):
    folder = random_models.changed(folders[kind], tmp_path / "m", is_causal=False)
    ids, lengths = texts()
    expected = reference(folder, ids, lengths)
    assert_close(rows_of(load_backbone(folders[kind], bidirectional=True), ids, lengths), expected, 1e-4)
    backbone = load_backbone(folder)  # the config says so
    assert backbone.bidirectional
    assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    assert not load_backbone(folder, bidirectional=False).bidirectional
    causal = rows_of(load_backbone(folders[kind]), ids, lengths)
    assert np.abs(causal[0] - expected[0]).max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"is_causal": False, "sliding_window": WINDOW - 1},
        {"use_bidirectional_attention": True, "sliding_window": 2 * (WINDOW - 1)},
    ],
)
def test_gemma_bidirectional_window(folders, tmp_path, settings):
    """Distance < window, as mlx-lm counts; a config that declares it counts as transformers does."""
    folder = random_models.changed(folders["gemma3_text"], tmp_path / "m", **settings)
    ids, lengths = texts()
    expected = reference(folder, ids, lengths)
    assert_close(rows_of(load_backbone(folders["gemma3_text"], bidirectional=True), ids, lengths), expected, 1e-4)
    backbone = load_backbone(folder)
    assert backbone.bidirectional
    assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    assert_close(rows_of(load_backbone(folder, bidirectional=True), ids, lengths), expected, 1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_bidirectional_under_explicit_masks(folders, kind):
    ids, lengths = texts()
    everything = np.ones((ids.shape[1],) * 2, dtype=bool)
    expected = reference(folders[kind], ids, lengths, everything)
    assert_close(rows_of(load_backbone(folders[kind], bidirectional=True), ids, lengths), expected, 1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_causal_states_do_not_see_the_right(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts((20,))
    before = rows_of(backbone, ids, lengths)[0]
    ids[0, 12] = 5
    after = rows_of(backbone, ids, lengths)[0]
    np.testing.assert_array_equal(before[:12], after[:12])
    assert np.abs(before[12:] - after[12:]).max() > 1e-2


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_parameters": None, "rope_theta": 5e5}, "llama"),
        ({"rope_parameters": None, "rope_theta": 1e6}, "qwen3"),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": None}
            | {"_sliding_window_pattern": None, "sliding_window_pattern": 2},
            "gemma3_text",
        ),
        ({"layer_types": None, "_sliding_window_pattern": 2}, "gemma3_text"),
    ],
)
def test_configs_of_older_transformers(folders, tmp_path, old, new):
    folder = random_models.changed(folders[new], tmp_path / "m", **old)
    ids, lengths = texts()
    expected = rows_of(load_backbone(folders[new]), ids, lengths)
    assert_close(rows_of(load_backbone(folder), ids, lengths), expected, 0)


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_type": "default", "rope_theta": 3e4}, "sliding_attention": {"rope_theta": 500.0}},
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ],
)
def test_gemma_rope_of_each_kind_of_layer(folders, tmp_path, rope):
    rope["sliding_attention"]["rope_type"] = "default"
    folder = random_models.changed(folders["gemma3_text"], tmp_path / "m", rope_parameters=rope)
    ids, lengths = texts()
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "longest"),
    [
        ("mistral", {}, 128),
        ("mistral", {"sliding_window": None}, 4096 * 32),
        ("llama", {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}, 2048),
        ("qwen3", {"sliding_window": 16}, 32768),  # use_sliding_window is False
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True}, 16),
        ("gemma3_text", {}, 131_072),
    ],
)
def test_texts_end_at_a_window_that_is_not_built(tmp_path, kind, changes, longest):
    """If mlx-lm leaves out a sliding window, it computes longer texts otherwise than transformers."""
    folder = random_models.save(kind, tmp_path / "whole")
    folder = random_models.changed(folder, tmp_path / "changed", **changes)
    assert load_backbone(folder).max_positions == longest


def test_mistral_differs_from_its_window_on(folders):
    """The reason for the limit: states are equal up to the window's length, and not beyond."""
    backbone = load_backbone(folders["mistral"])
    window = backbone.max_positions
    for length, near in ((window, True), (window + 8, False)):
        ids, lengths = texts((length,))
        actual, expected = rows_of(backbone, ids, lengths)[0], reference(folders["mistral"], ids, lengths)[0]
        assert np.allclose(actual, expected, atol=1e-4) == near


@pytest.mark.parametrize("period", [1, 3, 4])
def test_layer_types_become_a_period(tmp_path, period):
    types = ["sliding_attention" if i % period else "full_attention" for i in range(1, 6)]
    save = {"layer_types": types, "num_hidden_layers": 5}
    folder = random_models.save("gemma3_text", tmp_path / "m", **save)
    ids, lengths = texts()
    backbone = load_backbone(folder)
    assert backbone.config["sliding_window_pattern"] == period
    assert_close(rows_of(backbone, ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["full_attention", "sliding_attention", "full_attention", "full_attention"], "not periodic"),
        (["sliding_attention", "full_attention", "full_attention", "sliding_attention"], "not periodic"),
        (["sliding_attention"] * 4, "without a layer of full attention"),
    ],
)
@pytest.mark.parametrize("pattern", [None, 2])
def test_layer_types_without_a_period_are_refused(folders, tmp_path, types, message, pattern):
    """transformers reads layer_types and ignores a period; mlx-lm reads the period alone."""
    settings = {"layer_types": types, "sliding_window_pattern": pattern}
    with pytest.raises(UserError, match=message):
        load_backbone(random_models.changed(folders["gemma3_text"], tmp_path / "m", **settings))


def test_layer_types_win_over_a_period(folders, tmp_path):
    folder = random_models.changed(folders["gemma3_text"], tmp_path / "m", sliding_window_pattern=4)
    ids, lengths = texts()
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


def test_gemma_with_fewer_layers_than_the_default_period_is_refused(folders, tmp_path):
    settings = {"layer_types": None, "_sliding_window_pattern": None}
    with pytest.raises(UserError, match="without a layer of full attention"):
        load_backbone(random_models.changed(folders["gemma3_text"], tmp_path / "m", **settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_trunk_saved_by_itself(tmp_path, kind, tied):
    """AutoModel and sentence-transformers write names without `model.` and no head, tied or not."""
    folder = random_models.save(kind, tmp_path / "m", bare=True, tie_word_embeddings=tied)
    assert "layers.0.mlp.up_proj.weight" in mx.load(str(folder / "model.safetensors"))
    backbone, (ids, lengths) = load_backbone(folder), texts()
    assert_close(rows_of(backbone, ids, lengths), reference(folder, ids, lengths), 1e-4)
    assert all(name.startswith("model.") for name, _ in tree_flatten(backbone.adapted.parameters()))


def test_multimodal_gemma_by_its_text_config(folders, tmp_path):
    """Weights and settings one level down, as in the 4B models of Gemma 3."""
    inner = json.loads((folders["gemma3_text"] / "config.json").read_text())
    folder = random_models.changed(
        folders["gemma3_text"], tmp_path / "m", model_type="gemma3", text_config=inner, vocab_size=512, hidden_size=None
    )
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {f"language_model.{k}": v for k, v in weights.items()})
    backbone, (ids, lengths) = load_backbone(folder), texts()
    assert backbone.hidden_size == 64 and backbone.max_positions == inner["max_position_embeddings"]
    expected = rows_of(load_backbone(folders["gemma3_text"]), ids, lengths)
    assert_close(rows_of(backbone, ids, lengths), expected, 0)


def test_recurrent_layers_cannot_be_bidirectional(tmp_path):
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    backbone, (ids, lengths) = load_backbone(tmp_path), texts((9, 4))
    ids = ids % 64
    assert_close(rows_of(backbone, ids, lengths), reference(tmp_path, ids, lengths), 1e-4)
    with pytest.raises(UserError, match="--bidirectional needs attention in every layer"):
        load_backbone(tmp_path, bidirectional=True)


# --- what a loaded backbone is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_loaded_frozen_in_evaluation_mode_and_float32_on_cpu(folders, tmp_path, kind):
    folder = random_models.recast(folders[kind], tmp_path / "m", mx.bfloat16)
    backbone = load_backbone(folder, dtype="float32")
    assert not tree_flatten(backbone.trainable_parameters())
    assert not any(module.training for _, module in backbone.named_modules())
    assert {value.dtype for _, value in tree_flatten(backbone.parameters())} == {mx.float32}
    assert backbone.hidden_states(*texts()).dtype == mx.float32
    half = load_backbone(folder, dtype="bfloat16")
    assert {value.dtype for _, value in tree_flatten(half.parameters())} == {mx.bfloat16}
    assert count_parameters(backbone) == (sum(v.size for _, v in tree_flatten(backbone.parameters())), 0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_decoder(folders, tmp_path, bits, bidirectional):
    """Close to the original model, equal padded and alone, and counted as dequantised weights."""
    folder = random_models.quantised(folders["gemma3_text"], tmp_path / "q", bits=bits)
    whole, backbone = (load_backbone(f, bidirectional, "float32") for f in (folders["gemma3_text"], folder))
    ids, lengths = texts()
    actual = rows_of(backbone, ids, lengths)
    assert_close(actual, alone(backbone, ids, lengths), 1e-4)  # the matrix-vector kernel sums in another order
    expected = rows_of(whole, ids, lengths)
    assert np.corrcoef(actual[0].ravel(), expected[0].ravel())[0, 1] > {4: 0.7, 8: 0.99}[bits]
    assert count_parameters(backbone)[0] == count_parameters(whole)[0]


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_encoder(folders, tmp_path, bits, embeddings, monkeypatch):
    monkeypatch.setattr(backend, "DEQUANTIZED", "off")  # packed on both sides, so equal to the last bit
    whole = load_backbone(folders["bert"])
    quantisation = {"group_size": 32, "bits": bits}
    kinds = (nn.Linear, nn.Embedding) if embeddings else nn.Linear
    nn.quantize(whole, **quantisation, class_predicate=lambda _, module: isinstance(module, kinds))
    folder = random_models.changed(folders["bert"], tmp_path / "q", quantization=quantisation)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(whole.parameters())))
    backbone, (ids, lengths) = load_backbone(folder), texts()
    exact = rows_of(load_backbone(folders["bert"]), ids, lengths)
    assert_quantised(backbone, whole, exact, ids, lengths, bits)


def test_library_classes_stay_as_they_are(folders):
    from mlx_lm.models import base, gemma3_text

    before = dict(vars(gemma3_text.Gemma3Model)), dict(vars(gemma3_text.Model)), base.create_attention_mask
    load_backbone(folders["gemma3_text"], bidirectional=True).hidden_states(*texts())
    assert before == (dict(vars(gemma3_text.Gemma3Model)), dict(vars(gemma3_text.Model)), base.create_attention_mask)


def test_minilm_with_its_real_weights(minilm):
    ids, lengths = texts((40, 7, 1))
    backbone = load_backbone(minilm)
    assert_close(rows_of(backbone, ids, lengths), reference(minilm, ids, lengths), 1e-4)
    assert backbone.max_positions == 512


def test_encoders_say_how_many_positions_they_have(folders):
    assert [load_backbone(folders[kind]).max_positions for kind in ENCODERS] == [64, 64, 64]
