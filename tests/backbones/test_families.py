"""MPNet, DistilBERT, DeBERTa, nomic-bert, GTE, EuroBERT and bidirectional Qwen 2 compute what transformers computes.

python -m pytest tests/backbones/test_families.py
"""

import json
import re
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
    direction,
    gradient,
    rows_of,
    trainable,
)
from mlx.utils import tree_flatten
from random_families import LAYERS, SETTINGS, publish_new, publish_nomic, save
from random_models import shake, texts
from torch_checks import reference, rewritten, torch_gradients, torch_model

from mlx_retrieval import backend
from mlx_retrieval.backbones import ENCODERS, MODULES, count_parameters, load_backbone, lora, positions
from mlx_retrieval.backbones.activations import sizes_of
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.heads import EmbeddingHead, RetrievalModel
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.utils.errors import UserError

LENGTHS = (150, 60, 9, 1)  # beyond the farthest distance of DeBERTa and MPNet, and much padding
KINDS = tuple(SETTINGS)
ENCODING = tuple(kind for kind in KINDS if kind != "qwen2")


def slow(parameters: tuple | str):
    """Return the parameters of a test that others stand for in the quick tier."""
    return pytest.param(*[parameters] if isinstance(parameters, str) else parameters, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return folders of random models, by kind."""
    root = tmp_path_factory.mktemp("families")
    return {kind: save(kind, root / kind) for kind in KINDS}


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_transformers(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts(LENGTHS)
    expected = reference(folders[kind], ids, lengths)
    assert np.concatenate(expected).std() > 0.1  # there is something to compare
    assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    separate = alone(backbone, ids, lengths)  # of other shapes, so that a BLAS may sum in another order
    assert_close(separate, expected, 1e-4)
    padded = mx.pad(ids, ((0, 0), (0, 40)), constant_values=7)  # other padding, and more of it
    assert_close(rows_of(backbone, padded, lengths), separate, 3e-5)
    assert np.isfinite(np.array(backbone.hidden_states(padded, lengths))).all()
    assert backbone.bidirectional and backbone.hidden_size == 64 and len(backbone.layers) == LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_the_right_side_show_in_the_states(folders, kind):
    """Otherwise the comparisons above could not distinguish a right model from a wrong one."""
    backbone, (ids, lengths) = load_backbone(folders[kind]), texts((60,))
    actual = rows_of(backbone, ids, lengths)[0]
    swapped = mx.concatenate([ids[:, :1], ids[:, 2:3], ids[:, 1:2], ids[:, 3:]], axis=1)
    assert np.abs(rows_of(backbone, swapped, lengths)[0][0] - actual[0]).max() > 1e-2
    far = mx.concatenate([ids[:, :1], ids[:, -2:-1], ids[:, 2:-2], ids[:, 1:2], ids[:, -1:]], axis=1)
    assert np.abs(rows_of(backbone, far, lengths)[0][0] - actual[0]).max() > 1e-2


def test_positions(folders):
    expected = {"mpnet": 254, "distilbert": 256, "deberta-v3": 1 << 20, "deberta-v2": 256, "nomic_bert": 256}
    expected |= {"gte": 256, "eurobert": 256, "qwen2": 256}
    assert {kind: load_backbone(folders[kind]).max_positions for kind in KINDS} == expected


@pytest.mark.parametrize("kind", ["deberta-v2", "nomic_bert"])
def test_token_types(folders, kind):
    """The second text of a pair has a type of its own."""
    import torch

    ids, lengths = texts((20, 9))
    types = np.arange(20)[None] >= np.array([7, 4])[:, None]
    real = np.arange(20) < np.array(lengths)[:, None]
    theirs = torch_model(folders[kind])
    with torch.no_grad():
        arguments = {"attention_mask": torch.tensor(real).long(), "token_type_ids": torch.tensor(types).long()}
        expected = theirs(input_ids=torch.tensor(np.array(ids)), **arguments).last_hidden_state.numpy()
    backbone = load_backbone(folders[kind])
    states = np.array(backbone.hidden_states(ids, lengths, second=mx.array([7, 4])))
    assert np.abs(states - expected)[real].max() < 1e-4
    assert np.abs(np.array(backbone.hidden_states(ids, lengths)) - expected)[real].max() > 1e-2


@pytest.mark.parametrize(("count", "farthest"), [(256, 512), (8, 20), (-1, 40)])
def test_buckets_of_deberta_are_those_of_transformers(count, farthest):
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    length = torch.zeros(1, 700, 1)
    expected = build_relative_position(length, length, count, farthest)[0].numpy()
    distances = np.arange(700)[:, None] - np.arange(700)
    np.testing.assert_array_equal(positions.signed_buckets(distances, count, farthest), expected)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_skewed_rows(length):
    scores = mx.random.normal((2, 3, length, 2 * length))
    expected = [[scores[..., i, j - i + length - 1] for j in range(length)] for i in range(length)]
    actual = positions.skewed(scores)
    assert actual.shape == (2, 3, length, length)
    assert all(mx.array_equal(actual[..., i, j], expected[i][j]) for i in range(length) for j in range(length))


def test_attention_with_a_bias_is_written_out_for_cuda(monkeypatch):
    """Its kernel gives no gradient of a mask."""
    q, k, v = mx.random.normal((3, 2, 4, 6, 8))
    bias = positions.hide_padding(mx.random.normal((4, 6, 6)), mx.arange(6) < mx.array([[6], [4]]), q.dtype)

    def of(*arrays: mx.array) -> mx.array:
        return (positions.biased_attention(*arrays, 0.3, differentiable=True) ** 2).sum()

    expected = mx.value_and_grad(of, (0, 1, 2, 3))(q, k, v, bias)
    monkeypatch.setattr(backend, "IS_CUDA", True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
    actual = mx.value_and_grad(of, (0, 1, 2, 3))(q, k, v, bias)
    for one, other in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert mx.allclose(one, other, atol=1e-4)


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deberta-v3", {"pos_att_type": ["p2c"], "share_att_key": False}),
        ("gte", {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}, "type_vocab_size": 2}),
        *map(
            slow,
            [
                ("mpnet", {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
                ("distilbert", {"activation": "relu"}),
                ("deberta-v3", {"position_buckets": 256, "max_position_embeddings": 512}),
                ("deberta-v3", {"pos_att_type": "c2p", "norm_rel_ebd": "none"}),
                (
                    "deberta-v3",
                    {"relative_attention": False, "position_biased_input": True, "max_position_embeddings": 256},
                ),
                ("deberta-v2", {"conv_kernel_size": 5, "conv_act": "tanh", "conv_groups": 2}),
                ("nomic_bert", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "hidden_act": "gelu"}),
                (
                    "eurobert",
                    {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
                ),
                ("eurobert", {"rope_theta": 250_000.0, "head_dim": None}),
                ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": False}),
            ],
        ),
    ],
)
def test_settings(folders, tmp_path, kind, changes):
    folder = save(kind, tmp_path / "m", **changes)
    ids, lengths = texts(LENGTHS)
    actual = rows_of(load_backbone(folder), ids, lengths)
    assert_close(actual, reference(folder, ids, lengths), 1e-4)
    assert np.abs(actual[0] - rows_of(load_backbone(folders[kind]), ids, lengths)[0]).max() > 1e-3


def test_a_published_nomic_bert_config(folders, tmp_path):
    folder = publish_nomic(random_models.changed(folders["nomic_bert"], tmp_path / "m"))
    assert "hidden_size" not in json.loads((folder / "config.json").read_text())
    backbone, (ids, lengths) = load_backbone(folder), texts(LENGTHS)
    assert_close(rows_of(backbone, ids, lengths), reference(folders["nomic_bert"], ids, lengths), 1e-4)
    assert (backbone.hidden_size, backbone.max_positions) == (64, 256)
    long = random_models.changed(folder, tmp_path / "n", rotary_scaling_factor=2.0, max_trained_positions=100)
    assert load_backbone(long).max_positions == 100  # longer texts have positions of another kind


@pytest.mark.parametrize(("types", "factor"), [(0, 2.0), slow((2, 8.0))])
def test_new_is_what_gte_published(tmp_path, types, factor):
    scaling = {"type": "ntk", "factor": factor}
    folder = publish_new(save("gte", tmp_path / "m", type_vocab_size=types), rope_scaling=scaling)
    ids, lengths = texts(LENGTHS)
    expected = published_new(folder, ids, lengths)
    assert_close(rows_of(load_backbone(folder), ids, lengths), expected, 1e-4)
    assert_close(alone(load_backbone(folder), ids, lengths), expected, 1e-4)
    plain = random_models.changed(folder, tmp_path / "n", rope_scaling=None)
    assert np.abs(rows_of(load_backbone(plain), ids, lengths)[0] - expected[0]).max() > 1e-2


def published_new(folder: Path, ids: mx.array, lengths: mx.array) -> list[np.ndarray]:
    """Return the states of each row's real tokens, from a checkpoint's published names and mGTE's paper."""
    states = new_states(folder, new_tensors(folder), ids, lengths)
    return [states[row, :length].numpy() for row, length in enumerate(lengths.tolist())]


def new_tensors(folder: Path) -> dict:
    """Return a checkpoint's tensors for torch, by their published names without `new.`."""
    import torch

    weights = mx.load(str(folder / "model.safetensors"))
    return {name.removeprefix("new."): torch.tensor(np.array(value)) for name, value in weights.items()}


def new_states(folder: Path, tensors: dict, ids: mx.array, lengths: mx.array):
    """Return the states (B, L, D) that torch computes of these tensors.

    Positions are scaled as kexue.fm/archives/9706 does in equation 6, by a factor s: the base becomes s times as large,
    and all frequencies s^(2/d) times smaller.
    """
    import torch
    from torch.nn import functional

    config = json.loads((folder / "config.json").read_text())
    heads, s = config["num_attention_heads"], config["rope_scaling"]["factor"]
    d = config["hidden_size"] // heads
    frequencies = (config["rope_theta"] * s) ** -(torch.arange(0, d, 2) / d) / s ** (2 / d)
    angles = torch.outer(torch.arange(ids.shape[1]).float(), frequencies).repeat(1, 2)
    real = torch.tensor(np.arange(ids.shape[1]) < np.array(lengths)[:, None])[:, None, None]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    x = tensors["embeddings.word_embeddings.weight"][torch.tensor(np.array(ids))]
    if config["type_vocab_size"]:
        x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        packed = linear(x, f"{layer}.attention.qkv_proj")
        q, k, v = (y.unflatten(-1, (heads, d)).transpose(1, 2) for y in packed.chunk(3, dim=-1))
        scores = (rotated(q) @ rotated(k).transpose(-1, -2) * d**-0.5).masked_fill(~real, -1e9)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(x + linear(attended, f"{layer}.attention.o_proj"), f"{layer}.attn_ln")
        up, gate = linear(x, f"{layer}.mlp.up_gate_proj").chunk(2, dim=-1)
        x = norm(x + linear(functional.gelu(gate) * up, f"{layer}.mlp.down_proj"), f"{layer}.mlp_ln")
    return x


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mpnet", {"hidden_size": None, "vocab_size": None}, r"config\.json: no vocab_size, hidden_size"),
        ("distilbert", {"activation": "relu6"}, "activation 'relu6' is unknown"),
        ("distilbert", {"dim": None}, r"config\.json: no dim"),
        ("deberta-v2", {"conv_act": "relu6"}, "activation 'relu6' is unknown"),
        ("nomic_bert", {"prenorm": True, "num_experts": 8}, "prenorm True, num_experts 8: not supported"),
        ("nomic_bert", {"hidden_size": None}, r"config\.json: no hidden_size"),
        ("gte", {"layer_norm_type": "rms_norm"}, "layer_norm_type 'rms_norm': not supported"),
        ("gte", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn' are not supported"),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "type 'ntk' are not supported"),
        ("eurobert", {"hidden_act": "relu6"}, "activation 'relu6' is unknown"),
        ("eurobert", {"num_hidden_layers": 4}, r"missing layers\.3\.input_layernorm"),
    ],
)
def test_configs_that_cannot_be_loaded(folders, tmp_path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        load_backbone(random_models.changed(folders[kind], tmp_path / "m", **changes))


@pytest.mark.parametrize("kind", ENCODING)
def test_encoders_cannot_be_made_causal(folders, kind):
    with pytest.raises(UserError, match="cannot be made causal"):
        load_backbone(folders[kind], bidirectional=False)


def test_sizes_of_configs_with_other_names(folders, tmp_path):
    published = publish_nomic(random_models.changed(folders["nomic_bert"], tmp_path / "m"))
    kinds = ((folders["distilbert"], "bert"), (published, "modernbert"), (folders["deberta-v3"], "deberta"))
    for folder, family in kinds:
        sizes = sizes_of(json.loads((folder / "config.json").read_text()))
        assert (sizes.family, sizes.layers, sizes.hidden, sizes.heads, sizes.inner) == (family, LAYERS, 64, 4, 96)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "whole", "beside"),
    [
        ("mpnet", "MPNetForMaskedLM", "lm_head.dense.weight"),
        ("gte", "GteForSequenceClassification", "classifier.weight"),
        *map(
            slow,
            [
                ("mpnet", "MPNetForSequenceClassification", "classifier.out_proj.weight"),
                ("distilbert", "DistilBertForMaskedLM", "vocab_transform.weight"),
                ("distilbert", "DistilBertForSequenceClassification", "pre_classifier.weight"),
                ("deberta-v3", "DebertaV2ForMaskedLM", "cls.predictions.bias"),
                ("deberta-v2", "DebertaV2ForSequenceClassification", "pooler.dense.weight"),
                ("nomic_bert", "NomicBertForMaskedLM", None),
                ("nomic_bert", "NomicBertForSequenceClassification", "classifier.weight"),
                ("gte", "GteForMaskedLM", None),
                ("eurobert", "EuroBertForMaskedLM", "lm_head.weight"),
                ("eurobert", "EuroBertForSequenceClassification", "dense.weight"),
                ("qwen2", "Qwen2ForCausalLM", None),
            ],
        ),
    ],
)
def test_models_saved_in_a_larger_one(tmp_path, kind, whole, beside):
    folder = save(kind, tmp_path / "m", whole)
    assert beside is None or beside in mx.load(str(folder / "model.safetensors"))
    ids, lengths = texts(LENGTHS)
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize(("kind", "packed"), [slow(("nomic_bert", "attn.Wqkv")), ("gte", "attention.qkv_proj")])
def test_the_names_of_transformers_5(folders, tmp_path, kind, packed):
    """Without the published ones: `save_original_format=False`."""
    assert any(packed in name for name in mx.load(str(folders[kind] / "model.safetensors")))
    torch_model(folders[kind]).save_pretrained(tmp_path / "m", save_original_format=False)
    names = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert "layers.0.self_attn.q_proj.weight" in names and not any(packed in name for name in names)
    backbone, (ids, lengths) = load_backbone(tmp_path / "m"), texts(LENGTHS)
    assert_close(rows_of(backbone, ids, lengths), reference(folders[kind], ids, lengths), 1e-4)


@pytest.mark.parametrize(("kind", "prefix"), [("gte", "new."), ("nomic_bert", "bert.")])
def test_published_checkpoints_with_a_head(folders, tmp_path, kind, prefix):
    folder = rewritten(folders[kind], tmp_path / "m", lambda name: prefix + name.removeprefix(prefix))
    actual, expected = (dict(tree_flatten(load_backbone(f).parameters())) for f in (folder, folders[kind]))
    assert set(actual) == set(expected)
    assert all(mx.array_equal(actual[name], expected[name]) for name in expected)


def test_deberta_v3_with_a_table_of_positions_that_it_does_not_use(folders, tmp_path):
    folder = random_models.changed(folders["deberta-v3"], tmp_path / "m")
    weights = mx.load(str(folder / "model.safetensors")) | {"embeddings.position_embeddings.weight": mx.zeros((64, 64))}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    ids, lengths = texts((30, 4))
    assert_close(rows_of(load_backbone(folder), ids, lengths), reference(folder, ids, lengths), 1e-4)


@pytest.mark.parametrize("bits", [4, slow((8,))])
@pytest.mark.parametrize("kind", ["deberta-v2", *(slow(kind) for kind in ENCODING if kind != "deberta-v2")])
def test_quantised(tmp_path, kind, bits, monkeypatch):
    """Equal from the file and in memory, and close to the original model."""
    monkeypatch.setattr(backend, "DEQUANTIZED", "off")  # packed on both sides, so equal to the last bit
    source = save(kind, tmp_path / "whole")
    whole, (ids, lengths) = load_backbone(source), texts(LENGTHS)
    expected, total = rows_of(whole, ids, lengths), count_parameters(whole)[0]
    # MPNet's table of biases, one a head, is too narrow to be quantised.
    nn.quantize(
        whole, 32, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
    )
    folder = random_models.changed(source, tmp_path / "q", quantization={"group_size": 32, "bits": bits})
    tensors = dict(tree_flatten(whole.parameters()))
    assert sum(name.endswith(".scales") for name in tensors) > len(lora.linear_names(whole)) * LAYERS
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    backbone = load_backbone(folder)
    assert_quantised(backbone, whole, expected, ids, lengths, bits)
    assert count_parameters(backbone)[0] == total
    lora.adapt(backbone, rank=2)
    assert count_parameters(backbone)[1] > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_qwen2_that_attends_to_both_sides_quantised(tmp_path, bits):
    """As mlx-lm writes it; encoders are in the test above."""
    source = save("qwen2", tmp_path / "whole", "Qwen2ForCausalLM")
    folder = random_models.quantised(source, tmp_path / "q", bits=bits)
    whole, backbone = (load_backbone(f, dtype="float32") for f in (source, folder))
    assert whole.bidirectional and backbone.bidirectional
    ids, lengths = texts(LENGTHS)
    actual, expected = rows_of(backbone, ids, lengths), rows_of(whole, ids, lengths)
    assert_close(actual, alone(backbone, ids, lengths), 1e-4)
    assert np.corrcoef(actual[0].ravel(), expected[0].ravel())[0, 1] > {4: 0.7, 8: 0.99}[bits]
    assert count_parameters(backbone)[0] == count_parameters(whole)[0]


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v3", "nomic_bert"])
def test_float16(folders, kind):
    backbone, (ids, lengths) = load_backbone(folders[kind], dtype="float16"), texts((30, 4))
    exact = rows_of(load_backbone(folders[kind]), ids, lengths)
    states = backbone.hidden_states(ids, lengths)
    assert states.dtype == mx.float16
    assert_close([row.astype(np.float32) for row in rows_of(backbone, ids, lengths)], exact, 0.05)


# --- training -------------------------------------------------------------------------------------------------------

# Of published names: pattern -> names in transformers' model, several if the tensor is their concatenation.
_PACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PARTS = {
    "nomic_bert": {r"encoder\.layers": ["layers"], r"attn\.Wqkv": _PACKED, r"attn\.out_proj": ["self_attn.o_proj"]}
    | {"fc11": ["up_proj"], "fc12": ["gate_proj"], "fc2": ["down_proj"]}
    | {"norm1": ["post_attention_layernorm"], "norm2": ["post_mlp_layernorm"]},
    "gte": {r"encoder\.layer": ["layers"], r"attention\.qkv_proj": _PACKED, r"attention\.o_proj": ["self_attn.o_proj"]}
    | {"attn_ln": ["post_attention_layernorm"], "mlp_ln": ["post_mlp_layernorm"]}
    | {"up_gate_proj": ["up_proj", "gate_proj"]},
    "qwen2": {r"^model\.": [""]},
}


def parts_of(kind: str, name: str) -> list[str]:
    """Return the names in transformers' model of a tensor here."""
    names = [name]
    for pattern, parts in PARTS.get(kind, {}).items():
        if re.search(pattern, name):
            names = [re.sub(pattern, part, each) for each in names for part in parts]
    return names


@pytest.mark.parametrize("train_type", ["lora", slow("full")])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(folders, kind, train_type):
    """Of all tensors, including biases by distance and embeddings of distances."""
    backbone, batch = load_backbone(folders[kind]), texts((40, 20, 3))
    mx.random.seed(0)
    lora.adapt(backbone, train_type, rank=4, alpha=2.0)
    if train_type == "lora":
        shake(backbone)
    _, actual = gradient(backbone, *batch)
    weights = trainable(backbone)
    expected = torch_gradients(folders[kind], weights, 0.5, *batch, parts_of=lambda name: parts_of(kind, name))
    actual = {name.removeprefix("lm."): value for name, value in actual.items()}  # of decoders
    assert set(actual) == set(expected)
    assert (train_type == "lora") == all("lora_" in name for name in actual)
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        # Some biases of keys move all scores of a query alike: their gradient is zero but for rounding.
        tolerance = 1e-3 * np.abs(value).max() + 1e-6 * largest
        assert np.abs(np.array(actual[name]) - value).max() <= tolerance, name


def test_lora_gradients_of_new_are_those_of_the_published_formula(tmp_path):
    """With scaled positions, which transformers' own class does not have."""
    import torch

    folder = publish_new(save("gte", tmp_path / "m", type_vocab_size=2))
    backbone, (ids, lengths) = load_backbone(folder), texts((40, 20, 3))
    mx.random.seed(0)
    lora.adapt(backbone, rank=4, alpha=2.0)
    shake(backbone)
    _, actual = gradient(backbone, ids, lengths)
    leaves = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in trainable(backbone).items()}
    tensors = new_tensors(folder)
    for name in {name.rpartition(".")[0] for name in leaves}:
        tensors[f"{name}.weight"] = (
            tensors[f"{name}.weight"] + 0.5 * (leaves[f"{name}.lora_a"] @ leaves[f"{name}.lora_b"]).T
        )
    states = new_states(folder, tensors, ids, lengths)
    real = torch.tensor(np.arange(ids.shape[1]) < np.array(lengths)[:, None])[..., None]
    means = (states * real).sum(dim=1) / real.sum(dim=1)
    (means * torch.tensor(np.array(direction(means.shape)))).sum().backward()
    assert set(actual) == set(leaves) and len(leaves) == 2 * LAYERS * len(LINEAR["gte"])
    for name, leaf in leaves.items():
        expected = leaf.grad.numpy()
        assert np.abs(np.array(actual[name]) - expected).max() <= 1e-3 * np.abs(expected).max(), name


LINEAR = {
    "mpnet": {f"attention.attn.{name}" for name in "qkvo"} | {"intermediate.dense", "output.dense"},
    "distilbert": {f"attention.{name}_lin" for name in ("q", "k", "v", "out")} | {"ffn.lin1", "ffn.lin2"},
    "deberta-v3": {f"attention.self.{name}_proj" for name in ("query", "key", "value")}
    | {"attention.output.dense", "intermediate.dense", "output.dense"},
    "nomic_bert": {"attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2"},
    "gte": {"attention.qkv_proj", "attention.o_proj", "mlp.up_gate_proj", "mlp.down_proj"},
    "eurobert": {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
LINEAR["deberta-v2"] = LINEAR["deberta-v3"] | {"attention.self.pos_key_proj", "attention.self.pos_query_proj"}
LINEAR["qwen2"] = LINEAR["eurobert"]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_for_all_linear_layers(folders, kind):
    assert set(lora.adapt(load_backbone(folders[kind]), rank=3)["lora_parameters"]["keys"]) == LINEAR[kind]


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "nomic_bert"])
def test_checkpointing_changes_neither_loss_nor_gradient(folders, kind, train_type):
    """Bias and embeddings of distances, which come from outside the blocks, have a gradient through them."""
    assert_checkpointing_changes_nothing(lambda: load_backbone(folders[kind]), train_type, *texts((40, 20, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deberta-v2", "gte"])
def test_training_passes(folders, kind):
    """The gradient of compiled passes, of several shapes, is that of plain ones."""
    model = RetrievalModel(load_backbone(folders[kind]), EmbeddingHead())
    mx.random.seed(0)
    lora.adapt(model.backbone, rank=4, alpha=2.0)
    shake(model.backbone)
    batches, cotangents = [], []
    for counts in ((40, 3), (17, 5, 9)):
        ids, lengths = texts(counts)
        batches.append(MicroBatch(ids, lengths, mx.zeros_like(lengths), lengths))
        cotangents.append(mx.random.normal((len(counts), 64), key=mx.random.key(len(counts))))
    mx.eval(cotangents, [batch[:4] for batch in batches])
    actual = dict(tree_flatten(make_runner(model).gradient(batches, [0, 0], cotangents)))

    def loss() -> mx.array:
        return sum((model(batch) * cotangent).sum() for batch, cotangent in zip(batches, cotangents, strict=True))

    expected = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.abs(actual[name] - value).max() <= 1e-4 * mx.abs(value).max(), name


def test_every_family_is_registered():
    assert set(ENCODERS) == {kind for module in MODULES for kind in module.MODEL_TYPES}
    assert {"mpnet", "distilbert", "deberta-v2", "nomic_bert", "new", "gte", "eurobert"} <= set(ENCODERS)
