"""mine.py score --vectors: a teacher's vectors of all texts, written once, found by text, resumable.

python -m pytest tests/mining/test_row_vectors.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from sample_texts import SENTENCES

import mine
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference import embedder, text_vectors
from mlx_retrieval.inference.text_vectors import TextVectors
from mlx_retrieval.mining import cache
from mlx_retrieval.utils.errors import UserError

ROWS = [{"query": f"what is {text[:12]}", "positive": text, "negatives": [text.upper()]} for text in SENTENCES]


@pytest.fixture
def rows(write_rows) -> Path:
    return write_rows(ROWS, "rows.jsonl")


def score(model, rows, output, *flags) -> int:
    names = ["--teacher", str(model), "--data", str(rows), "--output", str(output)]
    return mine.main(["score", "--vectors", *names, *flags])


def keys_of(texts, prompt: str) -> np.ndarray:
    return np.array([vector_key(text, prompt) for text in texts])


def test_every_text_has_its_vector_under_its_own_prompt(small, rows, tmp_path, capsys):
    """Texts that differ only in case are two; queries have the query prompt of the teacher, which Gemma has."""
    output = tmp_path / "teacher.safetensors"
    assert score(small, rows, output) == 0
    vectors, model = TextVectors(output), embedder.load(small)
    queries, documents = [row["query"] for row in ROWS], [*SENTENCES, *map(str.upper, SENTENCES)]
    assert len(vectors) == len({*queries}) + len({*documents}) and vectors.dimensions == model.dimensions
    for texts, prompt in ((queries, "query"), (documents, "document")):
        np.testing.assert_allclose(vectors.of(keys_of(texts, prompt)), model.encode(texts, prompt), atol=1e-5)
    assert vectors.about == {"model": str(small), "fingerprint": f"{model.fingerprint()} {model.dtype}"}
    assert not vectors.has(keys_of(["another text", documents[0] + " "], "document")).any()
    out = capsys.readouterr().out
    assert "distinct queries" in out and f"--teacher-vectors {output}" in out
    assert not list(tmp_path.glob(".*"))  # nothing of the work is left


def test_a_killed_run_goes_on_with_the_same_bits(small, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "DOCUMENTS_AT_ONCE", 4)
    whole, output = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    score(small, rows, whole)
    embed, lots = embedder.embed, []

    def counting(model, texts, prompt):
        if len(lots) == 3:
            raise KeyboardInterrupt
        lots.append(texts)
        return embed(model, texts, prompt)

    with monkeypatch.context() as patched:
        patched.setattr(embedder, "embed", counting)
        assert score(small, rows, output) == 130
    assert not output.exists()
    monkeypatch.setattr(embedder, "embed", lambda *args: lots.append(args[1]) or embed(*args))
    assert score(small, rows, output) == 0 and "continued" in capsys.readouterr().err
    assert output.read_bytes() == whole.read_bytes()
    assert len(lots) == 6  # 24 texts, none of them twice


def test_validation_rows_of_a_folder_have_vectors_too(small, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, row in (("train", ROWS[0]), ("valid", ROWS[1])):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert score(small, folder, tmp_path / "v.safetensors") == 0
    assert TextVectors(tmp_path / "v.safetensors").has(keys_of([ROWS[0]["query"], ROWS[1]["query"]], "query")).all()


def test_validation_rows_of_a_hub_data_set_have_vectors_too(small, tmp_path, monkeypatch):
    """Regression: a run reads them, so that its error named the command that had left them out."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for name, row in (("train", ROWS[0]), ("validation", ROWS[1])):
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "owner" / "name" / f"{name}-0.parquet")
    assert score(small, "hf://owner/name", tmp_path / "v.safetensors") == 0
    assert TextVectors(tmp_path / "v.safetensors").has(keys_of([ROWS[0]["query"], ROWS[1]["query"]], "query")).all()


def test_scored_pairs_and_rows_that_differ_in_kind_have_vectors(small, write_rows, rows, tmp_path):
    """Sources of a run may differ in kind, and all their texts have vectors in one file."""
    pairs = write_rows([{"query": "a man eats", "document": "a man is eating", "score": 0.9}], "scored.jsonl")
    names = ["--teacher", str(small), "--data", str(rows), str(pairs), "--output", str(tmp_path / "v.safetensors")]
    assert mine.main(["score", "--vectors", *names]) == 0
    vectors = TextVectors(tmp_path / "v.safetensors")
    assert vectors.has(keys_of(["a man is eating", ROWS[0]["positive"]], "document")).all()


@pytest.mark.parametrize(("flags", "reason"), [
    (["--output", "vectors.npy"], "vectors.npy: vectors are written to a file whose name ends in .safetensors"),
    (["--raw-scores"], "--vectors: a reranker has none; name an embedding model as --teacher"),
    (["--teacher-kind", "reranker"], "--vectors: a reranker has none"),
], ids=str)  # fmt: skip
def test_what_has_no_vectors_is_refused_in_a_line(small, rows, tmp_path, flags, reason, capsys):
    assert score(small, rows, tmp_path / "v.safetensors", *flags) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_file_is_written_and_read_in_any_order(tmp_path):
    """Keys are not sorted in the file; the vectors stay on disk."""
    file, keys = tmp_path / "v.safetensors", np.array([7, -3, 2**62, 0])
    numbers = np.arange(12, dtype=np.float32).reshape(4, 3)
    text_vectors.write(file, keys, numbers, {"model": "m"})
    vectors = TextVectors(file)
    assert isinstance(vectors._vectors, np.memmap) and vectors.about["model"] == "m"
    np.testing.assert_array_equal(vectors.of(keys[[3, 0, 0, 2]]), numbers[[3, 0, 0, 2]])
    assert vectors.has(np.array([7, 8])).tolist() == [True, False]
    with pytest.raises(UserError, match="no vector of 1 of 2 texts"):
        vectors.of(np.array([7, 8]))


def test_safetensors_libraries_read_the_file_and_other_files_are_refused(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    file, numbers = tmp_path / "v.safetensors", np.ones((2, 3), np.float32)
    text_vectors.write(file, [1, 2], numbers, {"model": "m"})
    read = library.load_file(file)
    np.testing.assert_array_equal(read["vectors"], numbers)
    assert read["keys"].tolist() == [1, 2]
    library.save_file({"weight": numbers}, file)
    with pytest.raises(UserError, match="no file of vectors of texts, as mine.py score --vectors writes it"):
        TextVectors(file)
