"""A model with some of another one's layers: `export.py --keep-layers`.

python -m pytest tests/exporters/test_kept_layers.py
"""

from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from exported import read_json, run_export
from random_models import save
from random_rerankers import cross_encoder

import export
from mlx_retrieval.backbones import load_backbone
from mlx_retrieval.exporters import kept_layers
from mlx_retrieval.inference import embedder
from mlx_retrieval.utils.errors import UserError

TEXTS = ["a kidney stone", "the cat sat on the mat"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_tokenizer_folder) -> Path:
    """A BERT of six layers."""
    folder = tmp_path_factory.mktemp("whole") / "bert"
    return save("bert", folder, tokenizer=toy_tokenizer_folder, num_hidden_layers=6)


def test_the_folder_computes_as_the_whole_model_without_the_other_layers(whole, tmp_path):
    folder = run_export(tmp_path / "student", model=whole, keep_layers=[0, 2, 5])
    model = embedder.load(whole)
    kept = model.model.backbone.encoder.layer
    kept[:] = [kept[0], kept[2], kept[5]]
    np.testing.assert_allclose(embedder.load(folder).encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert read_json(folder)["num_hidden_layers"] == 3
    assert len(load_backbone(folder).layers) == 3


@pytest.mark.slow
def test_sentence_transformers_reads_it_with_equal_vectors(whole, tmp_path):
    """The export itself compares them; a folder that differs is not written."""
    folder = run_export(tmp_path / "student", model=whole, keep_layers=[1, 4], skip_library_check=False)
    library = pytest.importorskip("sentence_transformers")
    vectors = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, embedder.load(folder).encode(TEXTS), atol=1e-5)


def test_a_decoder_keeps_its_layers_too(tmp_path, toy_tokenizer_folder):
    whole = save("qwen3", tmp_path / "qwen3", tokenizer=toy_tokenizer_folder, num_hidden_layers=3)
    folder = run_export(tmp_path / "student", model=whole, keep_layers=[0, 2])
    model = embedder.load(whole)
    layers = model.model.backbone.layers
    layers[:] = [layers[0], layers[2]]
    np.testing.assert_allclose(embedder.load(folder).encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_tensors_of_kept_blocks_are_numbered_from_0():
    one = mx.zeros(1)
    names = ("embeddings.word", "encoder.layer.0.a", "encoder.layer.2.a", "encoder.layer.12.b", "model.layers.2.c")
    kept = kept_layers.renumbered(dict.fromkeys(names, one), [2, 12])
    assert [*kept] == ["embeddings.word", "encoder.layer.0.a", "encoder.layer.1.b", "model.layers.0.c"]


@pytest.mark.parametrize(("layers", "reason"), [
    ([0, 6], "the model has the layers 0 to 5"), ([2, 1], "in ascending order"), ([1, 1], "each layer once"),
    ([-1, 2], "the model has the layers 0 to 5"),
])  # fmt: skip
def test_layers_that_are_not_there_are_refused(whole, tmp_path, layers, reason):
    with pytest.raises(UserError, match=reason):
        run_export(tmp_path / "student", model=whole, keep_layers=layers)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("config", "reason"), [
    ({"num_hidden_layers": 2, "global_attn_every_n_layers": 3}, "differ by their numbers"),
    ({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, "differ by their numbers"),
    ({"num_layers": 2}, "layers cannot be left out"),
])  # fmt: skip
def test_models_whose_layers_differ_by_number_are_refused(config, reason):
    backbone = SimpleNamespace(layers=["first", "second"], config={"model_type": "some"} | config)
    with pytest.raises(UserError, match=reason):
        kept_layers.keep_layers(backbone, [0])
    alike = SimpleNamespace(layers=["first", "second"], config={"num_hidden_layers": 2, "layer_types": ["full"] * 2})
    kept_layers.keep_layers(alike, [1])
    kept_layers.adapt_config(alike.config, [1])
    assert alike.layers == ["second"] and alike.config == {"num_hidden_layers": 1, "layer_types": ["full"]}


def test_rerankers_and_adapters_are_refused_in_a_line(whole, tmp_path, capsys):
    cross_encoder("bert", tmp_path / "reranker")
    flags = ["--keep-layers", "0", "--output", str(tmp_path / "out")]
    assert export.main(["--model", str(tmp_path / "reranker"), "--task", "rerank", *flags]) == 2
    assert "--keep-layers is for embedding models, and this is a reranker" in capsys.readouterr().err
    assert export.main(["--adapter", str(whole), *flags]) == 2
    assert "--keep-layers takes layers of a whole model: export the --adapter first" in capsys.readouterr().err
