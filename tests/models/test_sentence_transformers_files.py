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
from beir_folders import write_folder
from mlx.utils import tree_flatten
from random_models import shake
from sample_texts import EDGE_CASES
from served import served

import data_loader
import embed
import eval as evaluation
import export
import mine
import search
import train
from mlx_retrieval.backbones import lora
from mlx_retrieval.inference import checks, embedder
from mlx_retrieval.models import loading, sentence_transformers_files
from mlx_retrieval.models.batching import micro_batches
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.retrieval.lance_index import Index

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


def with_truncate_dim(folder: Path, target: Path, dimensions: int | None, normalizes: bool = True, **settings) -> Path:
    """Copy a model's folder, with truncate_dim and other settings in its files."""
    shutil.copytree(folder, target)
    if not normalizes:
        modules = json.loads((target / "modules.json").read_text())
        (target / "modules.json").write_text(json.dumps([m for m in modules if not m["type"].endswith("Normalize")]))
    file = target / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncate_dim": dimensions} | settings))
    return target


@pytest.mark.parametrize(
    ("normalizes", "similarity"),
    [(True, "cosine"), *(pytest.param(False, name, marks=pytest.mark.slow) for name in ("dot", None))],
)
def test_truncate_dim_is_obeyed(models, tmp_path, normalizes, similarity):
    """Regression: 64 dimensions were given where sentence-transformers gives 16."""
    from sentence_transformers import SentenceTransformer

    settings = {"similarity_fn_name": similarity}
    folder = with_truncate_dim(models["qwen3"], tmp_path / "model", 16, normalizes, **settings)
    texts = [text for text in EDGE_CASES if text.strip() and "<" not in text]
    ours, theirs = embedder.load(folder), SentenceTransformer(str(folder), device="cpu")
    unit = similarity != "dot"
    for model in (theirs, embedder.load(folder)):
        assert len(model.encode(texts)[0]) == 16
    expected = theirs.encode(texts, prompt_name="query", normalize_embeddings=unit)
    vectors = ours.encode(texts, "query")
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=2e-5)
    # The library compares by its own similarity, this toolkit by dot products: the same scores.
    similarities = theirs.similarity(*(2 * [theirs.encode(texts, prompt_name="query")]))
    np.testing.assert_allclose(vectors @ vectors.T, similarities, rtol=1e-4, atol=2e-5)
    assert ours.dimensions == 16 and ours.encode(texts, dimensions=40).shape == (len(texts), 40)  # the caller wins
    wide = theirs.encode(texts, truncate_dim=40, normalize_embeddings=unit)
    np.testing.assert_allclose(ours.encode(texts, dimensions=40), wide, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("normalizes", "similarity"), [(True, "cosine"), (False, "dot")])
def test_truncate_dim_is_exported(models, tmp_path, normalizes, similarity):
    from sentence_transformers import SentenceTransformer

    settings = {"similarity_fn_name": similarity}
    folder = with_truncate_dim(models["qwen3"], tmp_path / "model", 16, normalizes, **settings)
    assert export.main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 0
    theirs, again = (SentenceTransformer(str(each), device="cpu") for each in (folder, tmp_path / "out"))
    assert again.truncate_dim == 16
    expected = theirs.encode(EDGE_CASES[:2], prompt_name="query", normalize_embeddings=normalizes)
    actual = again.encode(EDGE_CASES[:2], prompt_name="query", normalize_embeddings=normalizes)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
    vectors = embedder.load(tmp_path / "out").encode(EDGE_CASES[:2], "query")
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=2e-5)
    assert "the first 16 of 64 dimensions" in (tmp_path / "out" / "README.md").read_text()


def test_values_of_truncate_dim(models, tmp_path):
    for name, value, expected in (("none", None, 0), ("as many", 64, 0), ("more", 999, 0)):
        folder = with_truncate_dim(models["qwen3"], tmp_path / name, value)
        assert loading.build(str(folder))[1].truncate_dim == expected
    for name, value in (("zero", 0), ("text", "16"), ("float", 16.0), ("true", True)):
        with pytest.raises(embed.UserError, match=f"truncate_dim {value!r} is not a number of dimensions"):
            loading.build(str(with_truncate_dim(models["qwen3"], tmp_path / name, value)))
    mixed = with_truncate_dim(models["qwen3"], tmp_path / "mixed", 16, similarity_fn_name="dot")
    with pytest.raises(embed.UserError, match="truncate_dim with dot products .* is not supported"):
        loading.build(str(mixed))
    assert loading.build(str(tmp_path / "none"), task="late")[1].truncate_dim == 0


@pytest.mark.slow
def test_every_command_obeys_truncate_dim(models, tmp_path, capsys):
    """Except for its own --dimensions, which wins."""
    folder = str(with_truncate_dim(models["qwen3"], tmp_path / "model", 16))
    texts = [f"text number {i}" for i in range(6)]
    beir = write_folder(
        tmp_path / "beir",
        [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)],
        [{"_id": "q", "text": "number 3"}],
        "q\td3\t1\n",
    )
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    output = tmp_path / "v.npy"
    flags = ["--model", folder, "--input", str(tmp_path / "texts.txt"), "--output", str(output)]
    for more, dimensions in (([], 16), (["--dimensions", "8"], 8), (["--dimensions", "40"], 40)):
        output.unlink(missing_ok=True)
        assert embed.main([*flags, *more]) == 0
        assert np.load(output).shape == (6, dimensions)
        assert f"vectors of {dimensions} dimensions" in capsys.readouterr().out
    assert embed.main(["--check", folder]) == 0

    results = tmp_path / "results.json"
    flags = ["--model", folder, "--eval-tasks", str(beir), "--output", str(results), "--precision", "binary"]
    for more, dimensions in (([], {16}), (["--dimensions", "8", "40"], {8, 40})):
        results.unlink(missing_ok=True)
        assert evaluation.main([*flags, *more]) == 0
        assert {entry["dimensions"] for entry in json.loads(results.read_text())["stored"]} == dimensions

    index = tmp_path / "index"
    assert search.main(["index", str(beir), "--model-path", folder, "--index", str(index)]) == 0
    assert Index.open(index).info.dimensions == 16
    assert search.main(["search", "number 3", "--index", str(index)]) == 0

    rows = "".join(json.dumps({"query": f"query {i}", "positive": text}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "pairs.jsonl").write_text(rows)
    mined = ["--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "mined.jsonl"), "--take", "1"]
    assert mine.main(["negatives", "--model", folder, *mined, "--relative-margin", "off"]) == 0

    model = embedder.load(folder)
    model.encode("the thread that loads weights computes them")
    with served(model=model) as client:
        for body, dimensions in (({}, 16), ({"dimensions": 8}, 8), ({"dimensions": 40}, 40)):
            data = client.post("/v1/embeddings", json={"input": "a text"} | body).json()["data"]
            assert len(data[0]["embedding"]) == dimensions


@pytest.mark.slow
def test_training_is_at_full_length_and_keeps_truncate_dim(models, tmp_path, capsys):
    folder = str(with_truncate_dim(models["qwen3"], tmp_path / "model", 16))
    rows = "".join(json.dumps({"query": f"query {i}", "positive": f"text number {i}"}) + "\n" for i in range(6))
    (tmp_path / "pairs.jsonl").write_text(rows)
    flags = ["--model", folder, "--data", str(tmp_path / "pairs.jsonl"), "--batch-size", "6", "--steps", "1"]
    flags += ["--eval-tasks", "--learning-rate", "0.01"]
    losses = {}
    for name, more in (("full", []), ("both", ["--matryoshka-dims", "16"]), ("untruncated", [])):
        model = ["--model", str(models["qwen3"])] if name == "untruncated" else []
        assert train.main([*flags, *model, *more, "--output", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = next(row["loss"] for row in map(json.loads, lines) if "loss" in row)
        told = "trained at 64 dimensions and used at the first 16" in capsys.readouterr().out
        assert told == (name == "full")
    assert losses["full"] == losses["untruncated"] != losses["both"]  # as in sentence-transformers
    trained = embedder.load(tmp_path / "full" / "final")
    assert trained.encode("a text").shape == (16,) and trained.encode("a text", dimensions=64).shape == (64,)


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
