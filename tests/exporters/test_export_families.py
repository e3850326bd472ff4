"""Models of the families in models/families.py, from sentence-transformers and back, with the same vectors.

python -m pytest tests/exporters/test_export_families.py
"""

import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from exported import read_json, run_export
from random_families import SETTINGS, publish_new, publish_nomic, save
from random_models import word_tokenizer
from random_rerankers import make_qwen_tokenizer
from trained_models import trained

from mlx_retrieval.exporters import parity
from mlx_retrieval.inference import embedder
from mlx_retrieval.utils.errors import UserError

TEXTS = ["a", "the cat sat on the mat", "", "a kidney stone is a hard piece of material " * 6, "what is it?"]
PUBLISHED = {"new": publish_new, "nomic, published": publish_nomic}  # configs that name code of their own
KINDS = (*SETTINGS, *PUBLISHED)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(kind)`: the folder of a random model with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def of(kind: str) -> Path:
        if not (root / kind).is_dir():
            source = {"new": "gte", "nomic, published": "nomic_bert"}.get(kind, kind)
            save(source, root / kind, **({"vocab_size": 640} if kind == "qwen2" else {}))
            PUBLISHED.get(kind, lambda folder: folder)(root / kind)
            tokenizer = make_qwen_tokenizer if kind == "qwen2" else word_tokenizer
            tokenizer(root / kind, **({"roberta": True} if kind == "mpnet" else {}))
        return root / kind

    return of


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at fewer and shorter texts than it does for users."""
    monkeypatch.setattr(parity, "COUNTS", (1, 4, 25))
    monkeypatch.setattr(parity, "LONGEST", 30)


@pytest.mark.parametrize(
    ("kind", "skip"), [("new", True), *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_an_exported_model(bases, tmp_path, capsys, kind, skip):
    """sentence-transformers compares its vectors before the folder is written; here it is seen that it did."""
    _, adapter = trained(bases(kind), tmp_path / "run" / "final", "full" if kind == "deberta-v2" else "lora")
    expected = embedder.load(adapter).encode(TEXTS)
    untrained = embedder.load(bases(kind)).encode(TEXTS)
    assert (expected * untrained).sum(axis=1).min() < 0.98  # training changed something
    folder = run_export(tmp_path / "out", adapter=adapter, skip_library_check=skip)
    assert ("SentenceTransformer 6." in capsys.readouterr().out) == (not skip)
    np.testing.assert_allclose(embedder.load(folder).encode(TEXTS), expected, rtol=0, atol=1e-4)
    config = read_json(folder)
    assert "auto_map" not in config or kind not in PUBLISHED
    assert config["model_type"] == {"new": "gte"}.get(kind, read_json(bases(kind))["model_type"])
    assert config.get("hidden_size") == 64 or kind == "distilbert"
    names = set(mx.load(str(folder / "model.safetensors")))
    assert names <= set(mx.load(str(bases(kind) / "model.safetensors")))  # the published ones
    small = run_export(tmp_path / "q", adapter=adapter, format="mlx", quantize=8)
    assert (embedder.load(small).encode(TEXTS) * expected).sum(axis=1).min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_model_that_sentence_transformers_saved(bases, tmp_path, kind):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    parts = [Transformer(str(bases(kind)), max_seq_length=100), Pooling(64, "cls"), Normalize()]
    theirs = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "what: "})
    theirs.save(str(tmp_path / "saved"), create_model_card=False)
    ours = embedder.load(tmp_path / "saved")
    assert (ours.config.pooling, ours.config.max_length, ours.config.query_prompt) == ("cls", 100, "what: ")
    texts = [text for text in TEXTS if text or kind != "qwen2"]  # whose tokenizer makes no token of an empty text
    for name in (None, "query"):
        np.testing.assert_allclose(ours.encode(texts, name), theirs.encode(texts, prompt_name=name), rtol=0, atol=1e-4)


def test_some_of_the_layers(bases, tmp_path):
    folder = run_export(tmp_path / "out", model=bases("distilbert"), keep_layers=[0, 2], format="hf")
    assert read_json(folder)["n_layers"] == 2 and embedder.load(folder).encode(TEXTS).shape == (5, 64)


def test_gguf_ready_is_refused_for_architectures_that_were_not_checked(bases, tmp_path):
    with pytest.raises(UserError, match="mpnet is not converted as a text encoder"):
        run_export(tmp_path / "out", model=bases("mpnet"), gguf_ready=True)


def test_a_base_model_without_files_pools_as_its_family(bases, tmp_path):
    pooling = {kind: embedder.load(bases(kind)).config.pooling for kind in ("mpnet", "new")}
    assert pooling == {"mpnet": "mean", "new": "cls"}
    shutil.copytree(bases("new"), tmp_path / "m")
    assert embedder.load(tmp_path / "m", pooling="mean").config.pooling == "mean"


def test_gguf_ready_is_refused_where_llama_cpp_assumes_another_shape(bases, tmp_path):
    with pytest.raises(UserError, match="its EuroBERT has heads that are as wide together as the model"):
        run_export(tmp_path / "out", model=bases("eurobert"), gguf_ready=True)
