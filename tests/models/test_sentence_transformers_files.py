"""Models with dense layers and prompts, as sentence-transformers writes them: equal vectors, exact gradients, saved.

python -m pytest tests/models/test_sentence_transformers_files.py
"""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import random_encoders
import random_models
from mlx.utils import tree_flatten
from random_models import shake
from sample_texts import EDGE_CASES

import data_loader
import embed
import export
import train
from mlx_retrieval.backbones import lora
from mlx_retrieval.inference import checks, embedder
from mlx_retrieval.models import loading, sentence_transformers_files
from mlx_retrieval.models.batching import micro_batches
from mlx_retrieval.models.runners import make_runner

GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "same: "}
QWEN_PROMPTS = {"query": "Instruct: find the passages that answer the question\nQuery:", "document": ""}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, toy_tokenizer_folder) -> Path:
    """Opens with `<bos>` and closes with `<eos>`, as EmbeddingGemma's does."""
    folder = shutil.copytree(toy_tokenizer_folder, tmp_path_factory.mktemp("tokenizers") / "framed")
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    from tokenizers import Tokenizer, processors

    whole = Tokenizer.from_str(json.dumps(settings))
    whole.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    whole.save(str(folder / "tokenizer.json"))
    names = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("similarity", [pytest.param("dot", marks=pytest.mark.slow), "cosine", None])
def test_models_that_do_not_normalise(models, tmp_path, similarity):
    """Dot products of what pooling gives, where the model says so; else a cosine, to which lengths do not matter."""
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(models["qwen3"], tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([m for m in modules if not m["type"].endswith("Normalize")]))
    said = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said | {"similarity_fn_name": similarity}))
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), embedder.load(folder)
    assert ours.config.normalize == (similarity != "dot")
    texts = [text for text in EDGE_CASES if text.strip() and "<" not in text]
    expected = theirs.encode(texts, prompt_name="query", normalize_embeddings=ours.config.normalize)
    np.testing.assert_allclose(ours.encode(texts, "query"), expected, rtol=1e-4, atol=2e-5)
    if similarity == "dot":
        assert np.linalg.norm(expected, axis=1).max() > 1.5
        assert np.array_equal(ours.encode(texts, dimensions=8), ours.encode(texts)[:, :8])
        assert all(finding.passed is not False for finding in checks.check(str(folder), data_loader.make_batch))
        assert export.main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 0
        again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
        np.testing.assert_allclose(again.encode(texts, prompt_name="query"), expected, rtol=1e-4, atol=2e-5)
        assert again.similarity_fn_name == "dot"


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan"])
def test_other_similarities_are_refused(tmp_path, similarity):
    kinds = ("Transformer", "Pooling")
    modules = [{"path": "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": similarity}))
    with pytest.raises(embed.UserError, match=f"similarity {similarity} is not supported; known: cosine, dot"):
        sentence_transformers_files.read(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """The three that do more than pool, in small and random, as the installed sentence-transformers saves them."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from torch.nn import Identity, Tanh

    root = tmp_path_factory.mktemp("sentence-models")

    def save(name: str, trunk: Path, prompts: dict, pooling: str, *layers: Dense) -> Path:
        shutil.copytree(tokenizer, trunk, dirs_exist_ok=True)
        transformer = Transformer(str(trunk), max_seq_length=300)
        whole = [transformer, Pooling(64, pooling), *layers, Normalize()]
        whole = library.SentenceTransformer(modules=whole, device="cpu", prompts=prompts)
        whole.save(str(root / name), create_model_card=False)
        return root / name

    gemma = random_models.save("gemma3_text", root / "gemma", bare=True, use_bidirectional_attention=True)
    qwen = random_models.save("qwen3", root / "qwen", bare=True)
    t5 = random_encoders.save("t5", root / "t5-trunk")
    plain = {"bias": False, "activation_function": Identity()}
    return {
        "gemma3_text": save("g", gemma, GEMMA_PROMPTS, "mean", Dense(64, 96, **plain), Dense(96, 64, **plain)),
        "qwen3": save("q", qwen, QWEN_PROMPTS, "lasttoken"),
        "t5": save("t", t5, {}, "mean", Dense(64, 24, activation_function=Tanh())),
    }


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "t5"])
def test_vectors_are_those_of_sentence_transformers(models, kind):
    from sentence_transformers import SentenceTransformer

    theirs, ours = SentenceTransformer(str(models[kind]), device="cpu"), embedder.load(models[kind])
    assert ours.dimensions == {"gemma3_text": 64, "qwen3": 64, "t5": 24}[kind]
    texts = [text for text in EDGE_CASES if text.strip() and "<" not in text] + ["kidney stone " * 200]
    prompts = {"gemma3_text": GEMMA_PROMPTS, "qwen3": QWEN_PROMPTS, "t5": {"query": ""}}[kind]
    for name in prompts:
        expected = theirs.encode(texts, prompt_name=name)
        np.testing.assert_allclose(ours.encode(texts, name), expected, rtol=0, atol=2e-5)
    if kind == "gemma3_text":  # the prompts are not just ignored on both sides
        assert np.abs(ours.encode(texts, "query") - ours.encode(texts, "STS")).max() > 0.01


def test_gradients_go_through_frozen_dense_layers(models):
    """The adapter's gradient is torch's, whose dense layers are as frozen as ours."""
    import torch
    from sentence_transformers import SentenceTransformer

    model, config, folder = loading.build(str(models["gemma3_text"]))
    lora.adapt(model.backbone, rank=4, alpha=4.0, keys=["q_proj"])
    shake(model)
    assert not model.head.trainable_parameters()["dense"][0]["linear"]
    tokens = config.tokenizer(folder)(["what is a kidney stone", "the cat", "a hard piece of material"], "query")
    rows = [rows for _, rows in micro_batches(tokens, 1000, 0)]
    (cotangent,) = (mx.random.normal((len(part.lengths), 64), key=mx.random.key(3)) for part in rows)
    mx.eval(rows, cotangent)
    found = make_runner(model).gradient(rows, [0], [cotangent])
    found = dict(tree_flatten(found))

    theirs = SentenceTransformer(str(folder), device="cpu")
    scale, adapters = 4.0 / 4, dict(tree_flatten(model.trainable_parameters()))
    modules, leaves = dict(theirs[0].named_modules()), {}
    for name, value in adapters.items():
        leaves[name] = torch.tensor(np.array(value), requires_grad=True)

    def hook(a: torch.Tensor, b: torch.Tensor):
        return lambda module, inputs, output: output + scale * inputs[0] @ a @ b

    for name in {name.rsplit(".", 1)[0] for name in adapters}:
        inner = name.removeprefix("backbone.lm.model.")
        (module,) = (m for path, m in modules.items() if path.endswith(inner))
        module.register_forward_hook(hook(leaves[f"{name}.lora_a"], leaves[f"{name}.lora_b"]))
    features = {
        "input_ids": torch.tensor(np.array(rows[0].ids)),
        "attention_mask": torch.tensor(np.arange(rows[0].ids.shape[1]) < np.array(rows[0].lengths)[:, None]).long(),
    }
    (theirs(features)["sentence_embedding"] * torch.tensor(np.array(cotangent))).sum().backward()
    for name, leaf in leaves.items():
        expected = leaf.grad.numpy()
        assert np.abs(np.array(found[name]) - expected).max() <= 1e-3 * np.abs(expected).max(), name


@pytest.mark.parametrize(("train_type", "saved"), [("lora", False), ("full", True)])
def test_dense_layers_are_saved_where_they_are_trained(models, tmp_path, write_rows, train_type, saved):
    """LoRA leaves them to the base model; with all weights they train too, and come back with the adapter."""
    data = write_rows({"query": f"question {i}", "positive": f"the cat sat on mat {i}"} for i in range(8))
    command = ["--model", str(models["t5"]), "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "2"]
    command += ["--batch-size", "4", "--train-type", train_type, "--learning-rate", "1e-2", "--eval-tasks"]
    assert train.main(command) == 0
    final = tmp_path / "run" / "final"
    assert (final / "heads.safetensors").is_file() == saved
    base, adapter = embedder.load(models["t5"]), embedder.load(final)
    weights = [model.model.head.dense[0].linear.weight for model in (base, adapter)]
    assert mx.array_equal(*weights).item() != saved
    assert np.abs(base.encode(["a cat"]) - adapter.encode(["a cat"])).max() > 1e-4


def test_dense_weights_that_do_not_fit_are_told(models, tmp_path):
    folder = shutil.copytree(models["t5"], tmp_path / "model")
    (file,) = folder.glob("2_Dense/model.safetensors")
    mx.save_safetensors(str(file), {"linear.weight": mx.zeros((3, 3))})
    with pytest.raises(embed.UserError, match=r"2_Dense: 2 tensors do not fit the model:\n  missing linear.bias"):
        embedder.load(folder)
    file.unlink()
    with pytest.raises(embed.UserError, match="2_Dense: no weights"):
        embedder.load(folder)
