"""ModernBERT and T5 compute what transformers computes: states, gradients, from every form of their checkpoints.

python -m pytest tests/backbones/test_encoders.py
"""

import json
import re
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
import random_models
from backbone_checks import (
    alone,
    assert_checkpointing_changes_nothing,
    assert_close,
    assert_quantised,
    gradient,
    rows_of,
    trainable,
)
from mlx.utils import tree_flatten
from random_encoders import LAYERS, SETTINGS, save
from random_models import VOCABULARY, shake, texts
from torch_checks import reference, rewritten, torch_gradients, torch_model, torch_states

from mlx_retrieval import backend
from mlx_retrieval.backbones import ENCODERS, count_parameters, load_backbone, lora, positions, t5
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import micro_batches
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.utils.errors import UserError

LENGTHS = (150, 60, 9, 1)  # beyond the window of 16 tokens, beyond T5's farthest bucket, and much padding

KINDS = tuple(SETTINGS)
MODERN, T5 = KINDS[:2], KINDS[2:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return folders of random models, by kind."""
    root = tmp_path_factory.mktemp("encoders")
    return {kind: save(kind, root / kind) for kind in KINDS}


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_transformers(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts(LENGTHS)
    expected = reference(folders[kind], ids, lengths)
    assert np.concatenate(expected).std() > 0.1  # there is something to compare
    assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    assert_close(alone(backbone, ids, lengths), expected, 1e-4)
    assert backbone.bidirectional and backbone.hidden_size == 64 and len(backbone.layers) == LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_state(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts(LENGTHS)
    expected = alone(backbone, ids, lengths)  # of other shapes, so that a BLAS may sum in another order
    assert_close(rows_of(backbone, ids, lengths), expected, 3e-5)
    padded = mx.pad(ids, ((0, 0), (0, 40)), constant_values=7)  # other padding, and more of it
    assert_close(rows_of(backbone, padded, lengths), expected, 3e-5)
    assert np.isfinite(np.array(backbone.hidden_states(padded, lengths))).all()


def test_padding_sees_something(folders):
    """Attention to nothing is NaN in some kernels, and a NaN in padding spreads in the next layer."""
    ids, lengths = texts(LENGTHS)
    masks = load_backbone(folders["modernbert"])._masks(mx.arange(ids.shape[1]) < lengths[:, None])
    assert all(mask.any(axis=-1).all() for mask in masks.values())


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_windows_show_in_the_states(folders, kind):
    """Otherwise the comparisons above could not distinguish a right model from a wrong one."""
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts((60,))
    actual = rows_of(backbone, ids, lengths)[0]
    swapped = mx.concatenate([ids[:, :1], ids[:, 2:3], ids[:, 1:2], ids[:, 3:]], axis=1)
    assert np.abs(rows_of(backbone, swapped, lengths)[0][0] - actual[0]).max() > 1e-2
    if kind in MODERN:
        backbone.config = backbone.config | {"local_attention": 1000}
        assert np.abs(rows_of(backbone, ids, lengths)[0] - actual).max() > 1e-2


@pytest.mark.parametrize("length", [8, 9, 10, 17])
def test_texts_about_as_long_as_the_window(folders, length):
    backbone, (ids, lengths) = load_backbone(folders["modernbert"]), texts((length, 3))
    assert_close(rows_of(backbone, ids, lengths), reference(folders["modernbert"], ids, lengths), 1e-4)


def test_positions(folders, tmp_path):
    assert load_backbone(folders["modernbert"]).max_positions == 256
    old = random_models.changed(folders["t5"], tmp_path / "m", n_positions=64)
    backbone, (ids, lengths) = load_backbone(old), texts((80,))
    assert backbone.max_positions > 100_000  # the text of 80 tokens is no longer than T5 can take
    assert_close(rows_of(backbone, ids, lengths), reference(old, ids, lengths), 1e-4)


@pytest.mark.parametrize("count", [8, 32, 64])
@pytest.mark.parametrize("farthest", [20, 128, 256])
def test_buckets_are_those_of_transformers(count, farthest):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(torch.tensor(distances), True, count, farthest)
    np.testing.assert_array_equal(positions.buckets(distances, count, farthest), expected.numpy())


# --- configs --------------------------------------------------------------------------------------------------------


def test_modernbert_configs_of_older_transformers(folders, tmp_path):
    """Older configs have bases and a period; transformers 5 writes `rope_parameters` and `layer_types`."""
    new = json.loads((folders["modernbert"] / "config.json").read_text())
    assert {"rope_parameters", "layer_types"} <= set(new) and "global_rope_theta" not in new
    old = {"global_rope_theta": 5000.0, "local_rope_theta": 300.0, "global_attn_every_n_layers": 2}
    old |= {"position_embedding_type": "absolute"}  # published configs say this beside their rotary bases
    old |= {"rope_parameters": None, "layer_types": None}
    folder = random_models.changed(folders["modernbert"], tmp_path / "m", **old)
    ids, lengths = texts(LENGTHS)
    actual = rows_of(load_backbone(folder), ids, lengths)
    assert_close(actual, reference(folder, ids, lengths), 1e-4)
    assert np.abs(actual[0] - rows_of(load_backbone(folders["modernbert"]), ids, lengths)[0]).max() > 1e-2
    one = random_models.changed(folder, tmp_path / "n", local_rope_theta=None)  # then the default
    assert_close(rows_of(load_backbone(one), ids, lengths), reference(one, ids, lengths), 1e-4)


def test_modernbert_without_a_local_base_has_one_base(folders, tmp_path):
    """transformers 4 read null as "the same"; 5 cannot load it."""
    settings = {"rope_parameters": None, "global_rope_theta": 500.0}
    null = random_models.changed(folders["modernbert"], tmp_path / "m", **settings)
    config = json.loads((null / "config.json").read_text()) | {"local_rope_theta": None}
    (null / "config.json").write_text(json.dumps(config))
    same = random_models.changed(folders["modernbert"], tmp_path / "n", **settings, local_rope_theta=500.0)
    ids, lengths = texts(LENGTHS)
    assert_close(rows_of(load_backbone(null), ids, lengths), reference(same, ids, lengths), 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 700.0}}},
        {"local_attention": 11},
        {"hidden_activation": "gelu_pytorch_tanh", "norm_eps": 1e-2},
    ],
)
def test_modernbert_settings(folders, tmp_path, changes):
    folder = random_models.changed(folders["modernbert"], tmp_path / "m", **changes)
    ids, lengths = texts(LENGTHS)
    actual = rows_of(load_backbone(folder), ids, lengths)
    assert_close(actual, reference(folder, ids, lengths), 1e-4)
    assert np.abs(actual[0] - rows_of(load_backbone(folders["modernbert"]), ids, lengths)[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}),
        ("t5", {"feed_forward_proj": "silu", "layer_norm_epsilon": 1e-2}),
        ("t5", {"feed_forward_proj": "gated-silu"}),
        ("t5", {"feed_forward_proj": "gelu"}),
        ("mt5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}),
        ("mt5", {"feed_forward_proj": "relu"}),
    ],
)
def test_t5_settings(tmp_path, kind, changes):
    folder = save(kind, tmp_path / "m", **changes)
    ids, lengths = texts(LENGTHS)
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize("kind", T5)
def test_t5_configs_that_leave_out_what_is_usual(folders, tmp_path, kind):
    """Early T5 configs lack the maximum distance and, for mT5, the feed-forward part."""
    usual = {"relative_attention_max_distance": None, "dense_act_fn": None, "is_gated_act": None}
    usual |= {} if kind == "t5-v1.1" else {"feed_forward_proj": None}
    folder = random_models.changed(folders[kind], tmp_path / "m", **usual)
    ids, lengths = texts(LENGTHS)
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folders[kind], ids, lengths), 1e-4)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "whole", "beside"),
    [
        ("modernbert", "ModernBertForMaskedLM", "head.dense.weight"),
        ("modernbert-biased", "ModernBertForSequenceClassification", "classifier.weight"),
        ("t5", "T5ForConditionalGeneration", "decoder.block.0.layer.1.EncDecAttention.q.weight"),
        ("t5-v1.1", "T5Model", "decoder.final_layer_norm.weight"),
        ("mt5", "MT5ForConditionalGeneration", "decoder.final_layer_norm.weight"),
        ("umt5", "UMT5Model", "decoder.final_layer_norm.weight"),
        ("t5", "T5ForSequenceClassification", "classification_head.dense.weight"),
        ("t5", "T5ForTokenClassification", "classifier.weight"),
    ],
)
def test_encoders_saved_in_a_larger_model(tmp_path, kind, whole, beside):
    folder = save(kind, tmp_path / "m", whole)
    assert beside in mx.load(str(folder / "model.safetensors"))
    ids, lengths = texts(LENGTHS)
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize(
    ("kind", "pattern", "name"),
    [
        ("modernbert", "", "model."),
        ("t5", r"shared\.", "encoder.embed_tokens."),
        ("t5", r"encoder\.", ""),  # T5Stack by itself; its embedding is added below
        ("mt5", "", "model."),
    ],
)
def test_other_names_of_the_same_tensors(folders, tmp_path, kind, pattern, name):
    folder = rewritten(folders[kind], tmp_path / "m", lambda old: re.sub("^" + pattern, name, old))
    actual, expected = (dict(tree_flatten(load_backbone(f).parameters())) for f in (folder, folders[kind]))
    assert set(actual) == set(expected)
    assert all(mx.array_equal(actual[name], expected[name]) for name in expected)


def test_an_embedding_under_both_names_is_one(folders, tmp_path):
    weights = mx.load(str(folders["t5"] / "model.safetensors"))
    folder = random_models.changed(folders["t5"], tmp_path / "m")
    extra = {f"{stack}.embed_tokens.weight": weights["shared.weight"] for stack in ("encoder", "decoder")}
    extra["lm_head.weight"] = mx.zeros((VOCABULARY, 64))
    mx.save_safetensors(str(folder / "model.safetensors"), weights | extra, metadata={"format": "pt"})
    actual = dict(tree_flatten(load_backbone(folder).parameters()))
    assert set(actual) == {name for name in weights if not name.startswith("encoder.embed_tokens.")}


@pytest.mark.parametrize("kind", ["modernbert", "t5", "mt5"])
def test_tensors_that_do_not_fit_are_all_told_at_once(folders, tmp_path, kind):
    block, matrix = ("layers", "attn.Wo") if kind == "modernbert" else ("encoder.block", "layer.0.SelfAttention.o")
    spoilt = {f"{block}.0.{matrix}.weight": None, f"{block}.1.{matrix}.weight": f"{block}.{LAYERS}.{matrix}.weight"}
    folder = rewritten(folders[kind], tmp_path / "m", lambda name: spoilt.get(name, name))
    with pytest.raises(UserError, match="3 tensors do not fit the model") as caught:
        load_backbone(folder)
    for line in (f"missing {block}.0", f"missing {block}.1", f"unknown {block}.{LAYERS}"):
        assert f"{line}.{matrix}.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("modernbert", {"hidden_size": None, "vocab_size": None}, r"config\.json: no vocab_size, hidden_size"),
        ("modernbert", {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ("modernbert", {"hidden_activation": "relu6"}, "activation 'relu6' is unknown; known: gelu, "),
        ("modernbert", {"num_hidden_layers": 5}, "layer_types must name .* for each of 5 layers"),
        ("modernbert", {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "not .*, linear_attention"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "type 'yarn' are not supported"),
        ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' are not supported"),
        ("t5", {"d_kv": None}, r"config\.json: no d_kv"),
        ("t5", {"dense_act_fn": None, "feed_forward_proj": "gated-relu6"}, "activation 'relu6' is unknown"),
        ("umt5", {"model_type": "t5"}, "3 tensors do not fit"),
    ],
)
def test_configs_that_cannot_be_loaded(folders, tmp_path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        load_backbone(random_models.changed(folders[kind], tmp_path / "m", **changes))


@pytest.mark.parametrize("kind", ["modernbert", "t5"])
def test_encoders_cannot_be_made_causal(folders, kind):
    with pytest.raises(UserError, match="cannot be made causal"):
        load_backbone(folders[kind], bidirectional=False)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(folders, tmp_path, kind, bits, embeddings, monkeypatch):
    """Equal from the file and in memory, and close to the original model."""
    monkeypatch.setattr(backend, "DEQUANTIZED", "off")  # packed on both sides, so equal to the last bit
    kinds = (nn.Linear, nn.Embedding) if embeddings else nn.Linear
    source = save(kind, tmp_path / "whole", **({} if kind in MODERN else {"d_kv": 16}))
    whole, (ids, lengths) = load_backbone(source), texts(LENGTHS)
    expected, total = rows_of(whole, ids, lengths), count_parameters(whole)[0]
    # T5's table of biases, one a head, is too narrow to be quantised.
    nn.quantize(whole, 32, bits, class_predicate=lambda _, m: isinstance(m, kinds) and m.weight.shape[-1] % 32 == 0)
    folder = random_models.changed(source, tmp_path / "q", quantization={"group_size": 32, "bits": bits})
    prefix = "model." if kind in MODERN else ""
    tensors = {prefix + name: value for name, value in tree_flatten(whole.parameters())}
    assert sum(name.endswith(".scales") for name in tensors) == len(lora.linear_names(whole)) * LAYERS + embeddings
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    backbone = load_backbone(folder)
    assert_quantised(backbone, whole, expected, ids, lengths, bits)
    assert count_parameters(backbone)[0] == total
    lora.adapt(backbone, rank=2)
    assert count_parameters(backbone)[1] > 0


@pytest.mark.parametrize("kind", ["t5", "t5-v1.1"])
def test_t5_in_float16_stays_finite(folders, kind):
    """States of large T5 models outgrow float16."""
    backbone, (ids, lengths) = load_backbone(folders[kind], dtype="float16"), texts((30, 4))
    exact = rows_of(load_backbone(folders[kind]), ids, lengths)
    assert_close([row.astype(np.float32) for row in rows_of(backbone, ids, lengths)], exact, 0.1)
    backbone.layers[1].layer[1]["DenseReluDense"].wo.weight *= 20_000
    states = backbone.hidden_states(ids, lengths)
    assert states.dtype == mx.float16 and mx.isfinite(states).all()


@pytest.mark.parametrize("kind", ["t5", "t5-v1.1"])
def test_t5_in_float16_where_the_feed_forward_products_overflow(folders, kind):
    """Regression: what `wi` and the gate gave was infinite, and `wo` made NaN of it. bfloat16 and float32 bear it."""
    half, whole = load_backbone(folders[kind], dtype="float16"), load_backbone(folders[kind], dtype="float32")
    for backbone in (half, whole):
        dense = backbone.layers[1].layer[1]["DenseReluDense"]
        for name in ("wi", "wi_0", "wi_1"):
            if name in dense:
                dense[name].weight *= 3_000 if name == "wi" else 600
        dense.wo.weight *= 1e-3
    ids, lengths = texts((30, 4))
    exact, close = rows_of(whole, ids, lengths), rows_of(half, ids, lengths)
    assert all(np.isfinite(row).all() for row in close)
    for one, other in zip(close, exact, strict=True):
        assert np.corrcoef(one.astype(np.float32).ravel(), other.ravel())[0, 1] > 0.999


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(folders, kind, train_type):
    """Of all tensors, including T5's position bias, whose gradient comes through attention's mask."""
    backbone, batch = load_backbone(folders[kind]), texts((40, 20, 3))
    mx.random.seed(0)
    lora.adapt(backbone, train_type, rank=4, alpha=2.0)
    if train_type == "lora":
        shake(backbone)
    _, actual = gradient(backbone, *batch)
    expected = torch_gradients(folders[kind], trainable(backbone), 0.5, *batch)
    assert set(actual) == set(expected)
    assert any("relative_attention_bias" in name for name in actual) == (kind in T5 and train_type == "full")
    for name, value in expected.items():
        if train_type == "full" and name.endswith("Wqkv.bias"):  # a third of it, the key's, has no effect at all
            actual[name], value = (np.delete(np.array(v), slice(64, 128)) for v in (actual[name], value))
        assert np.abs(np.array(actual[name]) - value).max() <= 1e-3 * np.abs(value).max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_for_all_linear_layers(folders, kind):
    linear = {
        "modernbert": {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"},
        "t5": {f"layer.0.SelfAttention.{name}" for name in "qkvo"}
        | {f"layer.1.DenseReluDense.{name}" for name in (("wi", "wo") if kind == "t5" else ("wi_0", "wi_1", "wo"))},
    }["modernbert" if kind in MODERN else "t5"]
    backbone = load_backbone(folders[kind])
    config = lora.adapt(backbone, rank=3)
    assert set(config["lora_parameters"]["keys"]) == linear
    blocks = "layers" if kind in MODERN else "encoder.block"
    leaves = ("lora_a", "lora_b")
    expected = {f"{blocks}.{i}.{name}.{leaf}" for i in range(LAYERS) for name in linear for leaf in leaves}
    assert set(trainable(backbone)) == expected


def test_t5_base_with_q_and_v_has_as_many_parameters_as_published():
    """12 layers, 2 matrices of 768 x 768, each with 16 x (768 + 768). No weight is computed."""
    shape = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
    backbone = t5.T5({"model_type": "t5", **shape})
    config = lora.adapt(backbone, rank=16, keys=["q", "v"])
    assert sorted(config["lora_parameters"]["keys"]) == ["layer.0.SelfAttention.q", "layer.0.SelfAttention.v"]
    assert count_parameters(backbone) == (109_628_544, 589_824)  # the base's encoder, what is trained


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("kind", ["modernbert", "t5", "umt5"])
def test_checkpointing_changes_neither_loss_nor_gradient(folders, kind, train_type):
    assert_checkpointing_changes_nothing(lambda: load_backbone(folders[kind]), train_type, *texts((40, 20, 3)))


@pytest.mark.parametrize("kind", ["modernbert", "t5"])
def test_the_base_is_known_again(folders, tmp_path, kind):
    marks = lora.fingerprint(load_backbone(folders[kind]))
    assert set(marks) == {"architecture", "norms", "matrices"}
    half = load_backbone(random_models.recast(folders[kind], tmp_path / "m", mx.bfloat16))
    assert lora.differing(marks, lora.fingerprint(half)) == []


# --- retrieval ------------------------------------------------------------------------------------------------------

TEXTS = ["a", "the cat sat on the mat", "", "a kidney stone is a hard piece of material " * 6, "été 🚲 <eos>"]


@pytest.fixture(params=["modernbert", "t5-v1.1"])
def whole(request, folders, tmp_path, toy_tokenizer_folder) -> Path:
    """Return the folder of an encoder with a tokenizer and the files of sentence-transformers."""
    folder = shutil.copytree(folders[request.param], tmp_path / "model")
    shutil.copytree(toy_tokenizer_folder, folder, dirs_exist_ok=True)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 200}))
    return folder


def test_embeddings(whole):
    """From text to vector, pooled as in torch; compiled and with worker threads where the backend uses them."""
    import torch

    actual = embedder.load(whole).encode(TEXTS)
    model, config, folder = loading.build(str(whole))
    assert isinstance(model, RetrievalModel) and folder == whole
    assert (config.dimensions, config.pooling, config.max_length, config.bidirectional) == (64, "mean", 200, True)
    tokens = config.tokenizer(folder)(TEXTS)
    theirs = torch_model(whole)
    for index, rows in micro_batches(tokens, 1000, 0):
        states, real = torch_states(theirs, rows.ids, rows.lengths)
        means = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        expected = torch.nn.functional.normalize(means, dim=1).detach().numpy()
        np.testing.assert_allclose(actual[index], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_passes(whole):
    """The gradient of several micro-batches is that of one plain pass, on every device."""
    model, config, folder = loading.build(str(whole))
    mx.random.seed(0)
    lora.adapt(model.backbone, rank=4, alpha=4.0)  # a strong adapter makes T5's gradient a matter of rounding
    shake(model.backbone)
    tokens = config.tokenizer(folder)(TEXTS)
    rows = [rows for _, rows in micro_batches(tokens, 100, 0)]
    assert len(rows) > 1
    cotangents = [mx.random.normal((len(part.lengths), 64), key=mx.random.key(i)) for i, part in enumerate(rows)]
    mx.eval(rows, cotangents)
    actual = dict(tree_flatten(make_runner(model).gradient(rows, [0] * len(rows), cotangents)))

    def loss() -> mx.array:
        return sum((model(part) * cotangent).sum() for part, cotangent in zip(rows, cotangents, strict=True))

    expected = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.abs(actual[name] - value).max() <= 1e-4 * mx.abs(value).max(), name


def test_every_encoder_is_registered():
    assert {"bert", "roberta", "xlm-roberta", "modernbert", "t5", "mt5", "umt5"} <= set(ENCODERS)
