"""Weights of several trained models: `export.py --merge-with` and `--merge-method`.

python -m pytest tests/exporters/test_soup.py
"""

import math
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from exported import refusal, run_export
from mlx.utils import tree_flatten
from random_models import save, shake
from random_rerankers import cross_encoder
from trained_models import trained

import export
from mlx_retrieval.exporters import blend, soup
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.models import loading
from mlx_retrieval.utils.errors import UserError

NAME = "encoder.layer.0.attention.self.query.weight"
TEXTS = ["the cat sat on the mat", "a kidney stone", "what is it"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, toy_tokenizer_folder) -> Path:
    return save("bert", tmp_path_factory.mktemp("soup") / "bert", tokenizer=toy_tokenizer_folder)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    """Three adapters of other kinds, with other weights, of one base model."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(("lora", "dora", "full")):
        target = root / kind / "best"
        model, _ = trained(base, target, kind)
        shake(model, seed)
        loading.save_model(target, model, loading.read_json(target / loading.ADAPTER_CONFIG), _config(target))
    return {folder.parent.name: folder for folder in root.glob("*/best")}


def _config(folder: Path):
    return loading.RetrievalConfig.read(folder)


def opened(adapter: Path):
    model, config, _ = loading.open_model(None, str(adapter), dtype="float32")
    return model, config


def merged(adapter: Path) -> dict[str, np.ndarray]:
    """Return the backbone's weights with the adapter in them."""
    model, _ = opened(adapter)
    soup.absorb(model)
    return {name: np.array(value) for name, value in tree_flatten(model.backbone.adapted.parameters())}


# --- slerp ------------------------------------------------------------------------------------------------------------


def shoemake(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The paper's formula, in float64."""
    angle = math.acos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_shoemake_s_formula(share):
    one, other = np.random.default_rng(0).normal(size=(2, 5, 7))
    result = soup.slerp(mx.array(one), mx.array(other), share)
    assert result.shape == (5, 7) and result.dtype == mx.float32
    np.testing.assert_allclose(np.array(result), shoemake(one, other, share), atol=1e-6)


def test_slerp_of_a_quarter_turn_keeps_the_length():
    result = soup.slerp(mx.array([2.0, 0.0]), mx.array([0.0, 2.0]), 1 / 3)
    np.testing.assert_allclose(np.array(result), [2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)], atol=1e-6)


def test_slerp_of_nearly_parallel_vectors_is_exact():
    """As weights of two runs from one start are: the angle is not taken from its cosine, which rounds to 1."""
    one = np.random.default_rng(1).normal(size=1_000)
    other = one + 1e-3 * np.random.default_rng(2).normal(size=1_000)
    result = np.array(soup.slerp(mx.array(one), mx.array(other), 0.3))
    np.testing.assert_allclose(result, shoemake(one, other, 0.3), atol=1e-6)


@pytest.mark.parametrize("other", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.0]])
def test_slerp_is_linear_where_there_is_no_arc(other):
    np.testing.assert_allclose(np.array(soup.slerp(mx.array([1.0, 2.0]), mx.array(other), 0.25)),
                               0.75 * np.array([1.0, 2.0]) + 0.25 * np.array(other), atol=1e-6)  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["lora", "full"])
def test_the_mean_of_three_models(adapters, first):
    """Adapters of any kind: it is the mean of what they make of the weights."""
    names = [first, *(name for name in adapters if name != first)]
    model, config = opened(adapters[first])
    soup.mix(model, config, [str(adapters[name]) for name in names[1:]])
    ends = [merged(adapters[name]) for name in names]
    changed = 0
    for name, value in tree_flatten(model.backbone.adapted.parameters()):
        np.testing.assert_allclose(np.array(value), sum(end[name] for end in ends) / 3, atol=1e-6, err_msg=name)
        changed += not np.array_equal(ends[0][name], ends[1][name])
    assert changed > 3


def test_slerp_of_two_models(adapters):
    model, config = opened(adapters["lora"])
    soup.mix(model, config, [str(adapters["dora"])], "slerp")
    ends = [merged(adapters[name]) for name in ("lora", "dora")]
    name = next(name for name in ends[0] if not np.array_equal(ends[0][name], ends[1][name]))
    value = dict(tree_flatten(model.backbone.adapted.parameters()))[name]
    np.testing.assert_allclose(np.array(value), shoemake(*(end[name].astype(float) for end in ends), 0.5), atol=1e-5)


def test_slerp_between_a_model_and_its_base(adapters):
    model, config = opened(adapters["lora"])
    original = loading.open_model(None, str(adapters["lora"]), bare=True)[0]
    ends = [np.array(dict(tree_flatten(original.backbone.adapted.parameters()))[NAME]), merged(adapters["lora"])[NAME]]
    blend.Blend(model, original, config, "slerp").set(0.7)
    value = dict(tree_flatten(model.backbone.adapted.parameters()))[NAME]
    np.testing.assert_allclose(np.array(value), shoemake(*(end.astype(float) for end in ends), 0.7), atol=1e-5)


def test_an_exported_soup(adapters, tmp_path, capsys):
    """Weights that only the other model has changed are written, too; a whole model can be mixed in."""
    others = [str(adapters["full"])]
    folder = run_export(tmp_path / "soup", adapter=adapters["lora"], merge_with=others)
    assert "their mean: " in capsys.readouterr().out
    assert "The trained weights are those of 2 models, their mean." in (folder / "README.md").read_text()
    model, config = opened(adapters["lora"])
    soup.mix(model, config, others)
    expected = load(str(adapters["lora"]))
    expected.model = model
    from mlx_retrieval.models.runners import make_runner

    expected.runner = make_runner(model, "off")
    vectors = load(str(folder)).encode(TEXTS)
    np.testing.assert_allclose(vectors, expected.encode(TEXTS), atol=1e-4)
    whole = run_export(tmp_path / "whole", adapter=adapters["full"])
    again = run_export(tmp_path / "again", adapter=adapters["lora"], merge_with=[str(whole)])
    np.testing.assert_allclose(load(str(again)).encode(TEXTS), vectors, atol=1e-4)


def test_heads_of_rerankers_are_mixed(tmp_path):
    base = tmp_path / "reranker"
    cross_encoder("bert", base)
    for seed in (1, 2):
        model, target = trained(base, tmp_path / f"{seed}" / "best", task="rerank")
        shake(model, seed)
        loading.save_model(target, model, loading.read_json(target / loading.ADAPTER_CONFIG), _config(target))
    folders = [tmp_path / f"{seed}" / "best" for seed in (1, 2)]
    heads = [{n: np.array(v) for n, v in tree_flatten(opened(folder)[0].head.parameters())} for folder in folders]
    model, config = opened(folders[0])
    soup.mix(model, config, [str(folders[1])])
    for name, value in tree_flatten(model.head.parameters()):
        np.testing.assert_allclose(np.array(value), (heads[0][name] + heads[1][name]) / 2, atol=1e-6)
    assert any(not np.array_equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_models_that_cannot_be_mixed(adapters, tmp_path, toy_tokenizer_folder, base_folders):
    first = adapters["lora"]
    model, config = opened(first)
    larger = save("bert", tmp_path / "larger", tokenizer=toy_tokenizer_folder, hidden_size=96)
    for name, message in (
        (larger, r"--merge-with .*larger: weights of other shapes: .* is \(.*96.*\), not "),
        (base_folders["qwen3"], "--merge-with .*qwen3: "),
        (trained(model_of(first), tmp_path / "cls", pooling="cls")[1], "has pooling 'cls', and .* 'mean'"),
    ):
        with pytest.raises(UserError, match=message):
            soup.mix(model, config, [str(name)])


def test_the_command_refuses_them_in_one_line(adapters, tmp_path, toy_tokenizer_folder, base_folders, capsys):
    first, others = adapters["lora"], [adapters["dora"], adapters["full"]]
    larger = save("bert", tmp_path / "larger", tokenizer=toy_tokenizer_folder, hidden_size=96)
    for flags, message in (
        ([larger], f"--merge-with {larger}: weights of other shapes: "),
        ([base_folders["qwen3"]], f"--merge-with {base_folders['qwen3']}: another architecture: "),
        ([first], "names a model twice"),
        ([*others, "--merge-method", "slerp"], "--merge-method slerp: goes from one model to another, and these are 3"),
        ([tmp_path / "nowhere"], "nowhere"),
    ):
        assert message in refusal(capsys, "--adapter", first, "--output", tmp_path / "out", "--merge-with", *flags)
    assert not (tmp_path / "out").exists()


def model_of(adapter: Path) -> str:
    return _config(adapter).base_model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"merge_with": ["lora"]}, "--merge-with .*lora.*: names a model twice"),
        ({"merge_with": ["dora", "full"], "merge_method": "slerp"}, "slerp: goes from one model to another, .* are 3"),
        ({"merge_method": "slerp"}, "--merge-method slerp: is for --merge-with and --merge-with-base"),
        ({"merge_method": "ties", "merge_with": ["dora"]}, "--merge-method ties: known are linear, slerp"),
        ({"merge_with": ["nowhere"]}, "nowhere"),
    ],
)
def test_mixtures_that_make_no_sense(adapters, flags, message, tmp_path):
    if "merge_with" in flags:
        flags = flags | {"merge_with": [str(adapters.get(name, name)) for name in flags["merge_with"]]}
    with pytest.raises(UserError, match=message):
        run_export(tmp_path / "out", adapter=adapters["lora"], **flags)
    assert not (tmp_path / "out").exists()


def test_a_run_s_folder_and_a_base_model_are_refused(adapters, base, tmp_path):
    with pytest.raises(UserError, match="a run was saved there; name .*dora/best"):
        run_export(tmp_path / "out", adapter=adapters["lora"], merge_with=[str(adapters["dora"].parent)])
    with pytest.raises(UserError, match="needs an --adapter to mix them with"):
        run_export(tmp_path / "out", model=str(base), merge_with=[str(adapters["dora"])])


def test_the_flags():
    flags = ["--adapter", "a", "--output", "o", "--merge-with", "b", "c", "--merge-method", "slerp"]
    args = export.parser().parse_args(flags)
    assert (args.merge_with, args.merge_method) == (["b", "c"], "slerp")
