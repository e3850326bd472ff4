"""Vectors: the same as training's and evaluation's, in order, of unit length, and equal to sentence-transformers'.

python -m pytest tests/test_embed.py
"""

import json
from pathlib import Path

from backend import UserError

import numpy as np
import pytest

import embed
import eval as evaluation
import train
from config import Settings
from embed import load

TEXTS = ["a", "the boiler drips and hisses all night long", "", "bike " * 90, "the boiler drips", "été 🚲 <eos> [SEP]"]


@pytest.fixture(scope="module")
def model(small):
    return load(small)


def test_encode_keeps_order_type_and_unit_length(model):
    vectors = model.encode(TEXTS, prompt="document")
    assert vectors.shape == (6, 32) and vectors.dtype == np.float32 and model.dimensions == 32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    backwards = model.encode(TEXTS[::-1], prompt="document")[::-1]
    assert np.abs(vectors - backwards).max() < 1e-5
    alone = np.stack([model.encode(text, prompt="document") for text in TEXTS])
    assert np.abs(vectors - alone).max() < 1e-5


def test_encode_does_not_depend_on_the_token_budget(model):
    whole = model.encode(TEXTS * 20, batch_tokens=1_000_000)
    assert np.abs(whole - model.encode(TEXTS * 20, batch_tokens=50)).max() < 1e-5


def test_encode_in_chunks(model, monkeypatch):
    whole = model.encode(TEXTS)
    monkeypatch.setattr(embed, "CHUNK", 4)
    assert np.abs(whole - model.encode(TEXTS)).max() < 1e-5


def test_prompts_differ_and_are_named(model):
    query, document, bare = (model.encode("bike", prompt=name) for name in ("query", "document", None))
    assert not np.allclose(query, document) and not np.allclose(query, bare)
    with pytest.raises(UserError, match="prompt 'passage' is unknown"):
        model.encode("bike", prompt="passage")


def test_odd_input(model):
    assert model.encode([]).shape == (0, 32)
    assert model.encode("one text").shape == (32,)
    with pytest.raises(UserError, match=r"texts\[1\] is a int"):
        model.encode(["a", 3])


def test_matryoshka_dimensions(model):
    short, whole = model.encode(TEXTS, dimensions=8), model.encode(TEXTS)
    assert short.shape == (6, 8) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    assert np.allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(UserError, match="dimensions 33"):
        model.encode(TEXTS, dimensions=33)


def test_progress_bar_on_request(model, capsys):
    model.encode(TEXTS, show_progress=True)
    assert "6/6" in capsys.readouterr().err


def test_max_length_and_other_settings_can_be_overridden(small):
    short = load(small, max_length=8)
    assert np.array_equal(short.encode("bike " * 90), short.encode("bike " * 50))
    assert load(small, pooling="last").config.pooling == "last"
    with pytest.raises(UserError, match="pooling 'median' is unknown"):
        load(small, pooling="median")


def test_the_command_writes_what_encode_gives(model, small, tmp_path, capsys):
    rows = [{"_id": "1", "title": "Boiler", "text": "drips"}, {"_id": "2", "title": "", "text": "Bike"}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "docs.txt").write_text("Boiler drips\nBike\n")
    expected = model.encode(["Boiler drips", "Bike"], prompt="document")
    for name in ("docs.jsonl", "docs.txt"):
        flags = ["--model", small, "--input", str(tmp_path / name), "--output", str(tmp_path / "v.npy")]
        assert embed.main(flags) == 0
        assert "2 vectors of 32 dimensions" in capsys.readouterr().out
        assert np.array_equal(np.load(tmp_path / "v.npy"), expected)


def test_vectors_equal_sentence_transformers_on_real_weights(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    texts = ["How do I descale a kettle?", "kettle " * 400, "", "é ü 中文 🚲", "a b c"]
    expected = theirs.encode(texts, normalize_embeddings=True)
    assert (load(minilm).encode(texts, prompt="document") * expected).sum(axis=1).min() > 0.99999


def test_training_evaluation_and_use_agree_to_the_last_digit(small, tmp_path, monkeypatch):
    """What training printed at its last step, eval.py says of the saved adapter; from any folder."""
    task = tmp_path / "task"
    (task / "qrels").mkdir(parents=True)
    documents = [f"{word} number {i}" for i, word in enumerate(["boiler", "bike", "kettle", "lamp", "radio"] * 6)]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    queries = [{"_id": f"q{i}", "text": f"my {text} is broken"} for i, text in enumerate(documents)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(documents)))
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"query": f"what about {d}", "document": d}) + "\n" for d in documents))
    run = tmp_path / "run"
    settings = Settings(model=small, data=[str(data)], batch_size=8, steps=4, output=str(run), eval_tasks=[str(task)])
    results = train.train(settings)

    monkeypatch.chdir(tmp_path)
    flags = ["--model", small, "--adapter", str(run / "final"), "--eval-tasks", str(task), "--output", "results.json"]
    assert evaluation.main(flags) == 0
    again = json.loads(Path("results.json").read_text())
    printed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert printed["type"] == "eval" and again["tasks"] == {"task": printed["metrics"]}
    assert results["after"] == printed["metrics"] and results["before"] != results["after"]
    trained = load(run / "final")  # finds its base by itself
    assert evaluation.evaluate(trained, [str(task)]).average() == results["after"]
