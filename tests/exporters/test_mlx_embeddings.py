"""Folders of `--format mlx` in mlx-embeddings: it loads them, and gives the same vectors where it pools alike.

python -m pytest tests/exporters/test_mlx_embeddings.py

mlx-embeddings is licensed under the GPL, so no requirement names it. Without `pip install
mlx-embeddings`, its tests are skipped.
"""

from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import random_encoders
import random_models
from exported import read_json, run_export
from random_rerankers import make_qwen_tokenizer
from trained_models import trained

from mlx_retrieval.exporters import mlx_layout, parity
from mlx_retrieval.inference import embedder
from mlx_retrieval.models.retrieval_config import RetrievalConfig

TEXTS = ["a kidney stone is a hard piece of material", "the cat", "what is it"]
POOLED_AS_THERE = [(kind, pooling) for kind, poolings in mlx_layout.POOLING.items() for pooling in poolings]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(kind)`: the folder of a random model with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def of(kind: str) -> Path:
        folder = root / kind
        if folder.is_dir():
            return folder
        # mlx-embeddings 0.1 leaves out an untied lm_head, but not the scales of one that is quantised.
        wide = (
            {"vocab_size": 640, "tie_word_embeddings": True}
            if kind == "qwen3"
            else {"max_position_embeddings": 200, "pad_token_id": 0}
        )
        (random_encoders if kind == "modernbert" else random_models).save(kind, folder, **wide)
        return make_qwen_tokenizer(folder) if kind == "qwen3" else random_models.word_tokenizer(folder)

    return of


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at fewer and shorter texts than it does for users."""
    monkeypatch.setattr(parity, "COUNTS", (1, 4, 25))
    monkeypatch.setattr(parity, "LONGEST", 30)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("kind", "pooling"), POOLED_AS_THERE)
def test_the_same_vectors(bases, tmp_path, capsys, kind, pooling, bits):
    library = pytest.importorskip("mlx_embeddings")
    _, adapter = trained(bases(kind), tmp_path / "run" / "final", pooling=pooling)
    folder = run_export(tmp_path / "out", adapter=adapter, format="mlx", quantize=bits)
    assert "mlx-embeddings gives" not in capsys.readouterr().out
    ours = embedder.load(folder)
    model, tokenizer = library.load(str(folder))
    for text in TEXTS:
        found = library.generate(model, tokenizer, [text]).text_embeds
        assert float(np.array(found.astype(mx.float32))[0] @ ours.encode([text])[0]) > 0.99999


def test_which_families_are_loaded():
    """Of those that it does not know, the library says so."""
    pytest.importorskip("mlx_embeddings")
    from mlx_embeddings.utils import _get_model_arch

    from mlx_retrieval.backbones import ENCODERS

    for kind in (*ENCODERS, "qwen2", "qwen3", "llama", "gemma3_text", "mistral", "lfm2"):
        if kind in mlx_layout.MLX_EMBEDDINGS:
            _get_model_arch({"model_type": kind})
        else:
            with pytest.raises(ValueError, match="not supported"):
                _get_model_arch({"model_type": kind})


FRAME, PROMPT = {"pool_special": False}, {"pool_prompt": False, "query_prompt": "find: "}


@pytest.mark.parametrize(
    ("kind", "fields", "two_sided", "told"),
    [
        ("qwen3", {"pooling": "last"}, False, []),
        ("qwen3", {"pooling": "last"}, True, ["mlx-embeddings: before it alone", "MLXEmbedders: before it alone"]),
        ("qwen3", FRAME, False, ["mlx-embeddings: the last of all", "MLXEmbedders: the tokenizer's own tokens count"]),
        ("qwen2", {"pooling": "last"}, True, ["not for mlx-embeddings and MLXEmbedders, which do not load it"]),
        ("gemma3_text", {}, False, ["not for mlx-embeddings and MLXEmbedders, which do not load it"]),
        ("bert", {}, False, []),
        ("bert", FRAME, False, ["mlx-embeddings: own tokens count", "MLXEmbedders: own tokens count"]),
        ("bert", PROMPT, False, ["mlx-embeddings: prompt's tokens count", "MLXEmbedders: prompt's tokens count"]),
        ("bert", {"normalize": False}, False, ["mlx-embeddings: vectors have unit length"]),
        ("bert", {"pooling": "cls"}, False, ["mlx-embeddings: the mean of all", "MLXEmbedders: the pooler's output"]),
        ("bert", {"dense": [{}]}, False, ["MLXEmbedders: dense layers are left out"]),
        ("modernbert", {"pooling": "cls"}, False, ["not for MLXEmbedders, which does not load it"]),
        ("nomic_bert", {}, False, ["not for mlx-embeddings, which does not load it"]),
    ],
)
def test_what_other_readers_would_make_of_a_model(kind, fields, two_sided, told):
    """They ignore in silence what they do not read."""
    notes = mlx_layout.notes(RetrievalConfig(**{"pooling": "mean"} | fields), kind, two_sided)
    assert len(notes) == len(told)
    for note, (reader, _, text) in zip(notes, (line.partition(": ") for line in told), strict=True):
        assert note.startswith(f"{reader} gives other vectors: " if text else reader) and text in note


def test_a_decoder_that_attends_to_both_sides_is_told(tmp_path, capsys):
    base = make_qwen_tokenizer(random_models.save("qwen3", tmp_path / "base", vocab_size=640))
    _, adapter = trained(base, tmp_path / "run" / "final", pooling="last", bidirectional=True)
    run_export(tmp_path / "out", adapter=adapter, format="mlx")
    out = capsys.readouterr().out
    assert out.count("gives other vectors: a token attends to those before it alone") == 2


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_described_as_sentence_transformers_does(bases, tmp_path, capsys, pooling):
    """MLXEmbedders of mlx-swift-lm reads this file; mlx-embeddings goes by the family, which the export says."""
    _, adapter = trained(bases("bert"), tmp_path / "run" / "final", pooling=pooling)
    folder = run_export(tmp_path / "out", adapter=adapter, format="mlx")
    flags = read_json(folder / "1_Pooling")
    mode = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    assert [name for name, value in flags.items() if value is True] == [mode, "include_prompt"]
    assert flags["word_embedding_dimension"] == 64
    kinds = [module["type"].rpartition(".")[2] for module in read_json(folder, "modules.json")]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    told = "mlx-embeddings gives other vectors: the mean of all tokens is taken for bert" in capsys.readouterr().out
    assert told == (pooling == "cls")
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= mx.load(str(folder / "model.safetensors")).keys()


def test_a_pooling_that_sentence_transformers_does_not_have(bases, tmp_path, capsys):
    _, adapter = trained(bases("bert"), tmp_path / "run" / "final", pooling="max", pool_special=False)
    folder = run_export(tmp_path / "out", adapter=adapter, format="mlx")
    assert not (folder / "1_Pooling").exists()
    told = "without 1_Pooling: sentence-transformers cannot ignore the tokenizer's own tokens in max pooling\n"
    assert told in capsys.readouterr().out
