"""Vectors: the same as training's and evaluation's, in order, of unit length, and equal to sentence-transformers'.

python -m pytest tests/inference/test_embedder.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from sample_texts import EDGE_CASES

import embed
import eval as evaluation
import rerank
import train
from mlx_retrieval import backend
from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.inference import embedder, quantization, vector_files
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(scope="module")
def model(small):
    return load(small)


def test_encode_keeps_order_type_and_unit_length(model):
    vectors = model.encode(EDGE_CASES, prompt="document")
    assert vectors.shape == (6, 32) and vectors.dtype == np.float32 and model.dimensions == 32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    backwards = model.encode(EDGE_CASES[::-1], prompt="document")[::-1]
    assert np.abs(vectors - backwards).max() < 1e-5
    alone = np.stack([model.encode(text, prompt="document") for text in EDGE_CASES])
    assert np.abs(vectors - alone).max() < 1e-5


def test_encode_does_not_depend_on_the_token_budget(model):
    whole = model.encode(EDGE_CASES * 20, batch_tokens=1_000_000)
    assert np.abs(whole - model.encode(EDGE_CASES * 20, batch_tokens=50)).max() < 1e-5


def test_encode_in_chunks(model, monkeypatch):
    whole = model.encode(EDGE_CASES)
    monkeypatch.setattr(embedder, "CHUNK", 4)
    assert np.abs(whole - model.encode(EDGE_CASES)).max() < 1e-5


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
    short, whole = model.encode(EDGE_CASES, dimensions=8), model.encode(EDGE_CASES)
    assert short.shape == (6, 8) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    assert np.allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(UserError, match="dimensions 33"):
        model.encode(EDGE_CASES, dimensions=33)


def test_progress_bar_on_request(model, capsys):
    model.encode(EDGE_CASES, show_progress=True)
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
        assert embed.main([*flags, "--overwrite"]) == 0
        assert "2 vectors of 32 dimensions" in capsys.readouterr().out
        assert np.array_equal(np.load(tmp_path / "v.npy"), expected)


MANY = [f"{word} number {i}" for i in range(25) for word in ("boiler", "bike", "kettle", "radio")]  # 100


def test_stored_precisions(model):
    whole = model.encode(MANY, prompt="document")
    bounds = quantization.ranges(whole)
    for name, dtype in quantization.PRECISIONS.items():
        stored = model.encode(MANY, "document", precision=name)
        assert stored.dtype == dtype and stored.nbytes == 100 * quantization.row_bytes(name, 32)
        assert np.array_equal(stored, quantization.quantise(whole, name, bounds))
        few = model.encode(MANY[:3], "document", precision=name, ranges=bounds)
        assert np.array_equal(few, quantization.quantise(model.encode(MANY[:3], "document"), name, bounds))
        one = model.encode(MANY[7], "document", precision=name, ranges=bounds)
        alone = model.encode([MANY[7]], "document", precision=name, ranges=bounds)
        assert np.array_equal(one, alone[0])
    assert model.encode([], precision="binary").shape == (0, 4)


def test_truncation_comes_before_quantisation(model):
    short = model.encode(MANY, dimensions=12)
    for name in ("int8", "binary"):
        stored = model.encode(MANY, dimensions=12, precision=name)
        assert np.array_equal(stored, quantization.quantise(short, name))
    assert stored.shape == (100, 2)


def test_precision_that_cannot_be_had_is_told_before_embedding(model, monkeypatch):
    monkeypatch.setattr(model.runner, "representations", lambda rows: pytest.fail("it embeds"))
    for message, options in (
        ("precision 'int4' is unknown", {"precision": "int4"}),
        (
            r"99 texts are too few .* share ranges: .*quantization\.ranges\(model\.encode\(sample\)\)",
            {"precision": "int8"},
        ),
        (r"\(2, 32\), but vectors of 8 .*\(2, 8\)", {"precision": "int8", "ranges": np.ones((2, 32)), "dimensions": 8}),
    ):
        with pytest.raises(UserError, match=message):
            model.encode(MANY[:99], **options)


def run_embed(folder: str, tmp_path: Path, texts: list[str], *flags: str) -> int:
    (tmp_path / "docs.txt").write_text("\n".join(texts) + "\n")
    files = ["--input", str(tmp_path / "docs.txt"), "--overwrite", "--output", str(tmp_path / "v.npy")]
    return embed.main(["--model", folder, *files, *flags])


def test_the_command_calibrates_and_reads_ranges(model, small, tmp_path, capsys):
    assert run_embed(small, tmp_path, MANY, "--precision", "int8", "--dimensions", "16") == 0
    (line,) = capsys.readouterr().out.splitlines()
    beside = tmp_path / "v.ranges.npy"
    assert line == (
        f"{tmp_path / 'v.npy'}: 100 vectors of 16 dimensions, int8, 16 bytes a vector; calibrated on the 100 texts of "
        f"the input; ranges in {beside}: pass them with --ranges for queries"
    )
    documents = model.encode(MANY, "document", dimensions=16)
    assert np.array_equal(np.load(beside), quantization.ranges(documents))
    assert np.array_equal(np.load(tmp_path / "v.npy"), quantization.quantise(documents, "int8"))
    before = beside.read_bytes()
    flags = ["--precision", "uint8", "--dimensions", "16", "--ranges", str(beside), "--prompt", "query"]
    assert run_embed(small, tmp_path, ["a bike"], *flags) == 0
    out = capsys.readouterr().out
    assert out.endswith("v.npy: 1 vector of 16 dimensions, uint8, 16 bytes a vector\n")
    expected = model.encode(["a bike"], "query", dimensions=16, precision="uint8", ranges=np.load(beside))
    assert np.array_equal(np.load(tmp_path / "v.npy"), expected) and beside.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"docs.txt", "v.npy", "v.ranges.npy"}


def test_the_command_packs_bits(model, small, tmp_path, capsys):
    assert run_embed(small, tmp_path, MANY[:3], "--precision", "binary", "--dimensions", "20") == 0
    assert "3 vectors of 20 dimensions, binary in int8, 3 bytes a vector" in capsys.readouterr().out
    stored = np.load(tmp_path / "v.npy")
    assert stored.dtype == np.int8 and stored.shape == (3, 3) and not (tmp_path / "v.ranges.npy").exists()
    assert run_embed(small, tmp_path, MANY[:3]) == 0
    assert "3 vectors of 32 dimensions, float32, unit length, 128 bytes a vector" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_with_precision_and_ranges(small, tmp_path, capsys):
    ranges = tmp_path / "r.npy"
    np.save(ranges, np.zeros((2, 16), np.float32))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "ids.npy", np.zeros((2, 32), np.int64))
    for message, flags in (
        ("at least 100 texts, and", ["--precision", "int8"]),
        (
            "only for --precision int8 and uint8, not binary",
            ["--precision", "binary", "--ranges", str(ranges)],
        ),
        ("nowhere.npy: No such file", ["--precision", "int8", "--ranges", "nowhere.npy"]),
        (
            "not an array written by numpy",
            ["--precision", "int8", "--ranges", str(tmp_path / "text.npy")],
        ),
        ("not an array of floating-point", ["--precision", "int8", "--ranges", str(tmp_path / "ids.npy")]),
        ("ranges are (2, 16), but vectors of 32", ["--precision", "int8", "--ranges", str(ranges)]),
        ("text.npy is not a folder", ["--output", str(tmp_path / "text.npy" / "v.npy")]),
        ("one of .npy, .csv, .jsonl, .parquet", ["--output", str(tmp_path / "v.bin")]),
    ):
        assert run_embed(small, tmp_path, MANY[:99], *flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "v.npy").exists()


def test_neither_file_is_written_where_one_fails(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "v.npy").write_text("the old one")
    write = vector_files._write_npy

    def full(file, array):
        if array.dtype == np.int8:  # the vectors, which come after the ranges
            raise OSError(28, "No space left on device")
        write(file, array)

    monkeypatch.setattr(vector_files, "_write_npy", full)
    assert run_embed(small, tmp_path, MANY, "--precision", "int8") == 2
    assert "v.npy: No space left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"docs.txt", "v.npy"}
    assert (tmp_path / "v.npy").read_text() == "the old one"


WITHOUT_EFFECT = [
    *("--input", "x", "--output", "y", "--prompt", "query", "--dimensions", "8", "--precision", "int8"),
    *("--ranges", "r.npy"),
]


def test_missing_arguments_and_those_without_effect_are_named(capsys):
    for flags, message in (
        (["--model", "m"], "the following arguments are required: --input, --output (or only --check MODEL)"),
        (["--check", "m", "--input", "x"], "--check embeds nothing: leave out --input"),
        (["--check", "m", "--to", "es://x"], "--check embeds nothing: leave out --to"),
        (["--model", "m", "--to", "es://x", *WITHOUT_EFFECT], f"leave out {', '.join(WITHOUT_EFFECT[::2])}\n"),
        (["--model", "m", "--input", "x", "--output", "y", "--language", "none"], "are for --to: leave out --language"),
        (["--model", "m", "--input", "x", "--output", "y", "--word-fields", "name=title"], "leave out --word-fields"),
        (["--model", "m", "--input", "x", "--output", "y", "--precision", "int4"], "int4 is not one of float32"),
    ):
        with pytest.raises(SystemExit) as exit:
            embed.main(flags)
        assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--check", "m", "--serve", "--top-n", "3"], "--check ranks nothing: leave out --top-n, --serve"),
        (["--model", "m", "--serve", "--query", "q"], "--serve answers requests: leave out --query"),
        (["--model", "m", "--query", "q", "--documents", "d", "--port", "1"], "are for --serve: leave out --port"),
        (["--serve"], "--serve needs --model, --embedding-model or both"),
        (["--model", "m", "--query", "q"], "the following arguments are required: --documents (or --serve"),
    ],
)
def test_flags_of_rerank_without_effect_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        rerank.main(flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_one_word_works_in_every_command():
    """`--model-path` is search.py's name of `--model`, and `--top` that of `--top-n`."""
    assert embed.parser().parse_args(["--model-path", "m"]).model == "m"
    args = rerank.parser().parse_args(["--model-path", "m", "--top", "3"])
    assert (args.model, args.top_n) == ("m", 3)


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
    assert retrieval.evaluate(trained, [str(task)]).average() == results["after"]


@pytest.mark.parametrize(("flag", "compiled"), [("on", True), ("off", False), ("auto", False)])
def test_compile(small, tmp_path, monkeypatch, as_metal, flag, compiled):
    """`embed.py --compile`: of a model that is loaded after it; eval.py, rerank.py and search.py have the same flag."""
    monkeypatch.setattr(backend, "COMPILED", False)  # restored after the test
    runners = []
    monkeypatch.setattr(Model, "encode", lambda self, texts, *_, **__: runners.append(self.runner) or np.ones((1, 2)))
    (tmp_path / "texts.txt").write_text("a\n")
    command = ["--model", str(small), "--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "a.npy")]
    assert embed.main([*command, "--compile", flag]) == 0
    assert [runner.compiled for runner in runners] == [compiled]
