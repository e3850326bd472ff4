"""Trained weights: names, gradients against torch, refusals. Gradient checkpointing. Fingerprints of base models.

python -m pytest tests/backbones/test_lora.py
"""

import json
import re
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
import pytest
import random_models
from backbone_checks import assert_checkpointing_changes_nothing, direction, gradient, pooled_loss, trainable
from dtypes import assert_same
from mlx.utils import tree_flatten, tree_unflatten
from random_models import LAYERS, shake, texts

from mlx_retrieval.backbones import (
    Backbone,
    count_parameters,
    gradient_checkpointing,
    load_backbone,
    lora,
    merged_lora,
    set_dtype,
)
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.utils.errors import UserError

KINDS = ("gemma3_text", "qwen3", "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return folders of random models, one of them quantised."""
    root = tmp_path_factory.mktemp("models")
    plain = {kind: random_models.save(kind, root / kind) for kind in KINDS}
    return plain | {"4-bit": random_models.quantised(plain["qwen3"], root / "4-bit")}


# --- what is trainable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "4-bit"])
@pytest.mark.parametrize(
    ("train_type", "leaves"), [("lora", {"lora_a", "lora_b"}), ("dora", {"lora_a", "lora_b", "m"})]
)
def test_adapters_train_every_linear_layer_of_every_block(folders, kind, train_type, leaves):
    backbone = load_backbone(folders[kind])
    linear = lora.linear_names(backbone)
    assert linear and not any("lora" in name or "norm" in name.lower() for name in linear)
    config = lora.adapt(backbone, train_type, rank=3, alpha=6.0)
    blocks = "encoder.layer" if kind == "bert" else "model.layers"
    expected = {f"{blocks}.{i}.{name}.{leaf}" for i in range(LAYERS) for name in linear for leaf in leaves}
    assert set(trainable(backbone)) == expected
    assert config["lora_parameters"] == {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": linear}
    assert {value.shape[1] for name, value in trainable(backbone).items() if name.endswith("lora_a")} == {3}
    assert {value.dtype for value in trainable(backbone).values()} == {mx.float32}
    assert count_parameters(backbone)[1] == sum(value.size for value in trainable(backbone).values())


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dora_on_bits_that_do_not_fill_32(folders, tmp_path, bits):
    """Regression: mlx-lm took the number of inputs for a smaller one, and the first pass failed."""
    folder = random_models.quantised(folders["qwen3"], tmp_path / "base", bits=bits)
    backbone = load_backbone(folder, dtype="float32")  # few bits magnify the rounding of half precision
    expected = np.array(backbone.hidden_states(*texts()))
    lora.adapt(backbone, "dora", rank=2)
    assert np.abs(np.array(backbone.hidden_states(*texts())) - expected).max() < 2e-5 * np.abs(expected).max()
    shake(backbone)
    trained = np.array(backbone.hidden_states(*texts()))
    lora.fuse(backbone)
    assert np.abs(np.array(backbone.hidden_states(*texts())) - trained).max() < 1e-3 * np.abs(trained).max()


@pytest.mark.parametrize("kind", [*KINDS, "4-bit"])
def test_fresh_adapters_change_nothing(folders, kind):
    expected = load_backbone(folders[kind]).hidden_states(*texts())
    for train_type, limit in (("lora", 0), ("dora", 2e-5)):  # DoRA divides by the norm that it multiplies with
        backbone = load_backbone(folders[kind])
        lora.adapt(backbone, train_type, rank=2)
        assert_same(backbone.hidden_states(*texts()), expected, limit)


@pytest.mark.parametrize("kind", KINDS)
def test_full_trains_the_trunk_and_nothing_else(folders, kind):
    backbone = load_backbone(folders[kind])
    lora.adapt(backbone, "full")
    everything = {name for name, _ in tree_flatten(backbone.adapted.parameters())}
    assert set(trainable(backbone)) == {name for name in everything if not name.startswith("lm_head")}
    assert kind != "qwen3" or "lm_head.weight" in everything  # there is a head to leave out
    _, grads = gradient(backbone, *texts())
    used = {name for name, value in grads.items() if mx.abs(value).max().item() > 0}
    unused = set(grads) - used  # adding the same to all scores of a row changes no attention
    assert all(name.endswith("attention.self.key.bias") for name in unused)


def test_full_leaves_out_a_multimodal_models_head(tmp_path, folders):
    """A head one level down has no gradient either: weight decay would shrink it."""
    settings = json.loads((folders["gemma3_text"] / "config.json").read_text())
    target = random_models.changed(
        folders["gemma3_text"], tmp_path / "m", model_type="gemma3", text_config=settings, vocab_size=512
    )
    weights = {f"language_model.{k}": v for k, v in mx.load(str(target / "model.safetensors")).items()}
    weights["language_model.lm_head.weight"] = mx.ones((512, 64))
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    backbone = load_backbone(target)
    assert "language_model.lm_head.weight" in dict(tree_flatten(backbone.adapted.parameters()))
    lora.adapt(backbone, "full")
    assert trainable(backbone) and not any("lm_head" in name for name in trainable(backbone))


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_last_blocks_only(folders, kind, train_type):
    backbone = load_backbone(folders[kind])
    assert lora.adapt(backbone, train_type, num_layers=2)["num_layers"] == 2
    blocks = {int(re.search(r"\.layers?\.(\d+)\.", name)[1]) for name in trainable(backbone)}
    assert blocks == {LAYERS - 2, LAYERS - 1}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["q_proj"], ["self_attn.q_proj"]),
        (["self_attn.q_proj", "down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        ([r"self_attn\.[qv]_proj"], ["self_attn.q_proj", "self_attn.v_proj"]),
        ([r".*_proj"], None),
        ([r"mlp\..*", "mlp.up_proj"], ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]),
    ],
)
def test_keys_are_names_or_regular_expressions(folders, keys, expected):
    backbone = load_backbone(folders["qwen3"])
    expected = sorted(expected or lora.linear_names(backbone))
    config = lora.adapt(backbone, keys=keys)
    assert sorted(config["lora_parameters"]["keys"]) == expected
    named = {re.match(r"model\.layers\.\d+\.(.*)\.lora_[ab]$", name)[1] for name in trainable(backbone)}
    assert sorted(named) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "--num-layers 0: the model has 4 layers"),
        ({"num_layers": 5}, "--num-layers 5: the model has 4 layers"),
        ({"num_layers": -2}, "--num-layers -2"),
        ({"keys": ["qproj"]}, "--lora-keys qproj match nothing; .* has mlp.up_proj, .*self_attn.q_proj"),
        ({"keys": ["lm_head"]}, "--lora-keys lm_head match nothing"),
        ({"keys": ["[q"]}, r"--lora-keys \[q: neither a name nor a regular expression"),
        ({"keys": [".*embed.*"]}, "match nothing"),
    ],
)
def test_nothing_to_train_is_refused(folders, changes, message):
    backbone = load_backbone(folders["qwen3"])
    with pytest.raises(UserError, match=message):
        lora.adapt(backbone, **changes)
    assert not trainable(backbone)


def test_quantised_weights_cannot_be_trained_in_full(folders):
    for num_layers in (-1, 1):
        backbone = load_backbone(folders["4-bit"])
        with pytest.raises(UserError, match="quantised weights cannot be trained; use lora or dora"):
            lora.adapt(backbone, "full", num_layers=num_layers)


class Mixed(Backbone):
    """Two blocks of different kinds."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Module(), nn.Module()]
        self.blocks[0].recurrent, self.blocks[1].attention = nn.Linear(4, 4), nn.Linear(4, 4)

    @property
    def layers(self):
        return self.blocks


def test_keys_that_only_earlier_blocks_have_are_refused():
    with pytest.raises(UserError, match=r"--lora-keys recurrent match nothing; a block of this model has attention$"):
        lora.adapt(Mixed(), keys=["recurrent"], num_layers=1)


def test_a_layer_without_dora_is_a_users_error():
    from mlx_lm.models import mixtral

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {"model_type": "mixtral", "num_attention_heads": 2, "num_key_value_heads": 2, **shape}
    backbone = Decoder(mixtral.Model(mixtral.ModelArgs.from_dict(config)), config)
    with pytest.raises(UserError, match=r"--train-type dora: .*doesn't support DoRA"):
        lora.adapt(backbone, "dora")
    lora.adapt(backbone, "lora")
    assert any("switch_mlp" in name for name in trainable(backbone))


# --- against torch --------------------------------------------------------------------------------------------------


def torch_gradients(folder: Path, tensors: dict[str, mx.array], scale: float, ids, lengths) -> dict[str, np.ndarray]:
    """Return the gradients of `pooled_loss` by hand-written LoRA or DoRA layers in torch with the same tensors."""
    import torch
    from transformers import AutoModel

    class Adapted(torch.nn.Module):
        def __init__(self, base, parts):
            super().__init__()
            self.base, self.parts = base, parts

        def forward(self, x):
            a, b, weight = self.parts["lora_a"], self.parts["lora_b"], self.base.weight
            if "m" not in self.parts:
                return self.base(x) + scale * (x @ a) @ b
            whole = weight + scale * (a @ b).T
            whole = self.parts["m"][:, None] * whole / whole.norm(dim=1, keepdim=True).detach()
            return torch.nn.functional.linear(x, whole, self.base.bias)

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    leaves = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in tensors.items()}
    modules = {name.rsplit(".", 1)[0] for name in tensors}
    for module in modules:
        parts = {leaf: leaves[f"{module}.{leaf}"] for leaf in ("lora_a", "lora_b", "m") if f"{module}.{leaf}" in leaves}
        path = module.removeprefix("model.")
        parent = model.get_submodule(path.rsplit(".", 1)[0])
        setattr(parent, path.rsplit(".", 1)[1], Adapted(model.get_submodule(path), parts))
    real = torch.tensor(np.arange(ids.shape[1]) < np.array(lengths)[:, None])
    states = model(input_ids=torch.tensor(np.array(ids)), attention_mask=real.long()).last_hidden_state
    means = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
    (means * torch.tensor(np.array(direction(means.shape)))).sum().backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("train_type", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(folders, kind, train_type):
    backbone = load_backbone(folders[kind])
    config = lora.adapt(backbone, train_type, rank=4, alpha=2.0)
    assert config["lora_parameters"]["scale"] == 0.5
    shake(backbone)
    _, actual = gradient(backbone, *texts())
    tensors = trainable(backbone)
    expected = torch_gradients(folders[kind], tensors, 0.5, *texts())
    actual = {name.removeprefix("lm."): value for name, value in actual.items()}
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert np.abs(np.array(actual[name]) - value).max() <= 1e-3 * np.abs(value).max(), name


def test_quantised_base_has_the_gradients_of_its_dequantised_self(folders, tmp_path):
    """QLoRA: the base is exactly the dequantised weights, in float32: this model magnifies roundings a hundredfold."""
    from mlx_lm.utils import dequantize_model, load_model, save_config, save_model

    model, config = load_model(folders["4-bit"])
    model.set_dtype(mx.float32)
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    save_model(tmp_path, dequantize_model(model), donate_model=True)
    save_config(config, tmp_path / "config.json")
    grads = []
    for folder in (folders["4-bit"], tmp_path):
        backbone = load_backbone(folder)
        set_dtype(backbone, mx.float32)
        mx.random.seed(0)
        lora.adapt(backbone, rank=4)
        shake(backbone)
        grads.append(gradient(backbone, *texts())[1])
    for name, value in grads[1].items():
        assert mx.abs(grads[0][name] - value).max() <= 1e-3 * mx.abs(value).max(), name


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_quantised_base_trains(folders, train_type):
    import mlx.optimizers as optim

    backbone = load_backbone(folders["4-bit"])
    frozen = {k: v for k, v in tree_flatten(backbone.parameters())}
    lora.adapt(backbone, train_type, rank=4)
    optimizer = optim.Adam(1e-2)
    losses = []
    for _ in range(4):
        loss, tree = nn.value_and_grad(backbone, lambda *batch: pooled_loss(backbone, *batch))(*texts())
        optimizer.update(backbone, tree)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {k.replace(".linear.", "."): v for k, v in tree_flatten(backbone.parameters())}
    assert all(mx.array_equal(after[name], value) for name, value in frozen.items())


# --- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [None, True])
@pytest.mark.parametrize(
    ("kind", "train_type"), [*((kind, how) for kind in KINDS for how in ("lora", "full")), ("4-bit", "lora")]
)
def test_checkpointing_changes_neither_loss_nor_gradient(folders, kind, train_type, bidirectional):
    assert_checkpointing_changes_nothing(lambda: load_backbone(folders[kind], bidirectional), train_type, *texts())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_of_the_backward_pass_is_that_of_the_forward_pass(folders, checkpointed):
    """The gradient along a direction is the slope of the loss there, under the same seed."""
    backbone = load_backbone(folders["qwen3"])
    gradient_checkpointing.seed(0)
    lora.adapt(backbone, rank=8, alpha=8.0, dropout=0.5)
    shake(backbone)
    if checkpointed:
        gradient_checkpointing.checkpoint_blocks(backbone)
    backbone.train()

    def at(seed: int) -> tuple[float, dict[str, mx.array]]:
        gradient_checkpointing.seed(seed)
        return gradient(backbone, *texts())

    loss, grads = at(3)
    again, grads_again = at(3)
    other, _ = at(4)
    assert loss == again and loss != other
    assert all(mx.array_equal(value, grads_again[name]) for name, value in grads.items())

    start = dict(tree_flatten(backbone.trainable_parameters()))
    norm = sum(mx.square(value).sum() for value in grads.values()).sqrt().item()
    slopes = []
    for step in (5e-3, -5e-3):
        backbone.update(tree_unflatten([(k, v + step / norm * grads[k]) for k, v in start.items()]))
        slopes.append(at(3)[0])
    assert (slopes[0] - slopes[1]) / 1e-2 == pytest.approx(norm, rel=2e-2)


def test_blocks_drop_differently(folders):
    """Each checkpointed block has its own seed."""
    backbone = load_backbone(folders["bert"])
    lora.adapt(backbone, rank=8, dropout=0.5)
    gradient_checkpointing.checkpoint_blocks(backbone)
    seeds = []
    original = mx.random.seed
    mx.random.seed = lambda value: (seeds.append(value), original(value))
    try:
        backbone.hidden_states(*texts())
    finally:
        mx.random.seed = original
    assert len(set(seeds)) == LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_touches_this_model_alone(folders, kind):
    backbone, other = load_backbone(folders[kind]), load_backbone(folders[kind])
    lora.adapt(backbone, rank=2)
    kind_of_block, call = type(other.layers[0]), type(other.layers[0]).__call__
    names = [name for name, _ in tree_flatten(backbone.parameters())]
    gradient_checkpointing.checkpoint_blocks(backbone)
    assert [name for name, _ in tree_flatten(backbone.parameters())] == names
    assert type(other.layers[0]) is kind_of_block and kind_of_block.__call__ is call
    assert isinstance(backbone.layers[0], kind_of_block)
    expected = np.array(other.hidden_states(*texts()))
    gradient_checkpointing.checkpoint_blocks(backbone)  # twice is once
    np.testing.assert_array_equal(np.array(backbone.hidden_states(*texts())), expected)


class TwoInputs(Backbone):
    """A block with a second differentiable input beside x, like Gemma 3n's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.array([2.0, 3.0])

        def __call__(self, x: mx.array, mask: mx.array | str | None, extra: mx.array | None = None) -> mx.array:
            return mx.where(mask, mx.sin(x * self.weight) + extra, 0.0)

    def __init__(self):
        super().__init__()
        self.table, self.block = mx.array([0.5, 0.7]), TwoInputs.Block()

    @property
    def layers(self):
        return [self.block]

    def hidden_states(self, ids, lengths):
        return self.block(ids * self.table, mx.array([True, True]), extra=mx.cos(self.table))


def test_checkpointing_keeps_gradients_through_other_arguments():
    grads = []
    for checkpointed in (False, True):
        backbone = TwoInputs()
        if checkpointed:
            gradient_checkpointing.checkpoint_blocks(backbone)
        tree = nn.value_and_grad(backbone, lambda backbone=backbone: backbone.hidden_states(3.0, None).sum())()[1]
        grads.append(dict(tree_flatten(tree)))
    for name, value in grads[0].items():
        np.testing.assert_allclose(np.array(grads[1][name]), np.array(value), rtol=1e-6)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def marks(folder: Path) -> dict[str, str]:
    return lora.fingerprint(load_backbone(folder))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_base_in_another_dtype_is_the_same(folders, tmp_path, kind, dtype):
    base, other = marks(folders[kind]), marks(random_models.recast(folders[kind], tmp_path / "m", dtype))
    assert set(base) == {"architecture", "norms", "matrices"}
    assert lora.differing(base, other) == lora.differing(other, base) == []
    twice = marks(random_models.recast(tmp_path / "m", tmp_path / "n", mx.bfloat16))
    assert lora.differing(base, twice) == lora.differing(other, twice) == []


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3"])
def test_the_same_base_quantised_is_the_same(folders, tmp_path, kind, dtype):
    base, other = marks(folders[kind]), marks(random_models.quantised(folders[kind], tmp_path / "m", dtype))
    assert set(other) == {"architecture", "norms"}
    assert lora.differing(base, other) == lora.differing(other, base) == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_of_one_architecture_are_told_apart(folders, tmp_path, kind):
    other = random_models.save(kind, tmp_path / "m", seed=1)
    assert lora.differing(marks(folders[kind]), marks(other)) == ["matrices", "norms"]


def test_random_models_with_equal_norms_are_told_apart(tmp_path):
    one, two = (marks(random_models.save("qwen3", tmp_path / str(i), seed=i, equal_norms=True)) for i in range(2))
    assert lora.differing(one, two) == ["matrices"]


@pytest.mark.parametrize("kind", ["gemma3_text", "bert"])
def test_a_model_whose_last_block_was_trained_further_is_told_apart(folders, tmp_path, kind):
    target = random_models.changed(folders[kind], tmp_path / "m")
    weights = mx.load(str(target / "model.safetensors"))
    last = {name: v * 1.02 if f".{LAYERS - 1}." in name else v for name, v in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), last, metadata={"format": "pt"})
    assert "matrices" in lora.differing(marks(folders[kind]), marks(target))


def test_adapters_do_not_change_the_comparison_of_bases(folders, tmp_path):
    assert lora.differing(marks(folders["qwen3"]), marks(folders["bert"]))[0] == "architecture"
    fewer = random_models.save("qwen3", tmp_path / "m", num_hidden_layers=2)
    assert "architecture" in lora.differing(marks(folders["qwen3"]), marks(fewer))
    base = marks(folders["qwen3"])
    assert lora.differing({}, base) == []  # nothing is known of the base
    assert lora.differing(base | {"norms": "not what is written there"}, base) == ["norms"]


def test_changed_classes_can_be_stacked():
    """Regression: `super(type(self), self)` recursed without end in a subclass of a changed class."""
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear.from_base(nn.Linear(4, 3))
    x = mx.ones((2, 4))
    expected = layer(x)
    layer.__class__ = merged_lora._merging(type(layer))
    layer.__class__ = type("Derived", (gradient_checkpointing._checkpointing(type(layer)),), {})
    assert mx.array_equal(layer(x), expected)
    layer.__class__ = merged_lora._merging(type(layer))
    assert mx.array_equal(layer(x), expected)
