"""embed.py writes what its output's name says: each form is read back by its own library, bit for bit.

python -m pytest tests/inference/test_vector_files.py
"""

import csv
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import embed
from mlx_retrieval.dataset.text_files import Text
from mlx_retrieval.inference import vector_files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.files import SaveError

TEXTS = [Text(1, "a, b", "x"), Text(2, 'say "hi"\nnow', None), Text(4, "é 中 \t", "7")]
PLAIN = [Text(text.line, text.text, None) for text in TEXTS]
rng = np.random.default_rng(0)
FLOATS = np.concatenate([rng.normal(size=(2, 6)), [[0, -0.0, 1e-30, 3e38, 1 / 3, -1]]]).astype(np.float32)
BYTES = np.array([[0, 255, 7], [1, 2, 3], [9, 9, 9]], np.uint8)
TOKENS = [rng.normal(size=(n, 4)).astype(np.float32) for n in (2, 1, 3)]


def read(path: Path) -> tuple[list[str | None], list[str], list]:
    """Return ids, texts and vectors of a file, by another reader than the toolkit's."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        with_ids = header[0] == "id"
        assert header[with_ids:] == ["text", *(f"v{i}" for i in range(len(rows[0]) - 1 - with_ids))]
        ids = [(row[0] or None) if with_ids else None for row in rows]
        return ids, [row[with_ids] for row in rows], [[float(x) for x in row[1 + with_ids :]] for row in rows]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        import pyarrow.parquet as parquet

        rows = parquet.read_table(path).to_pylist()
    name = "vectors" if "vectors" in rows[0] else "vector"
    return [row.get("id") for row in rows], [row["text"] for row in rows], [row[name] for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("texts", [TEXTS, PLAIN], ids=["ids", "none"])
@pytest.mark.parametrize("vectors", [FLOATS, BYTES], ids=["float32", "uint8"])
def test_what_is_written_is_read_back(tmp_path, monkeypatch, ending, texts, vectors):
    monkeypatch.setattr(vector_files, "ROWS_AT_ONCE", 2)
    path = tmp_path / f"v{ending}"
    vector_files.write(path, texts, vectors)
    ids, words, numbers = read(path)
    assert (ids, words) == ([text.id for text in texts], [text.text for text in texts])
    assert np.array_equal(np.array(numbers, vectors.dtype), vectors)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_token_vectors(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(vector_files, "ROWS_AT_ONCE", 2)
    vector_files.write(tmp_path / f"v{ending}", TEXTS, TOKENS)
    for row, tokens in zip(read(tmp_path / f"v{ending}")[2], TOKENS, strict=True):
        assert np.array_equal(np.array(row, np.float32), tokens)
    assert [path.name for path in tmp_path.iterdir()] == [f"v{ending}"]


def test_npy_is_numpy_s(tmp_path):
    np.save(tmp_path / "own.npy", FLOATS[:, ::2])
    vector_files.write(tmp_path / "v.npy", TEXTS, FLOATS[:, ::2])
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "own.npy").read_bytes()
    vector_files.write(tmp_path / "late.npy", TEXTS, TOKENS)
    assert np.array_equal(np.load(tmp_path / "late.npy"), np.concatenate(TOKENS))
    assert np.load(tmp_path / "late.lengths.npy").tolist() == [2, 1, 3]


@pytest.mark.parametrize("name", ["v", "v.txt", "v.npz", "v.jsonl.gz", "v.CSV"])
def test_other_endings_are_refused(name):
    with pytest.raises(UserError, match=f"^--output {name}: .* one of .npy, .csv, .jsonl, .parquet"):
        vector_files.check_ending(Path(name))


def test_near_endings():
    with pytest.raises(UserError, match=r"did you mean \.jsonl\?$"):
        vector_files.check_ending(Path("v.json"))
    with pytest.raises(UserError, match="no place for a vector a token"):
        vector_files.check_late(Path("v.csv"))


@pytest.mark.parametrize("ending", vector_files.ENDINGS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, ending):
    """Regression: the message was "None", or numpy's "3000 requested and 100 written"."""
    path = tmp_path / f"v{ending}"
    path.write_text("the old one")
    texts, vectors = TEXTS[:1] * 3000, np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, before[1]))
    try:
        with pytest.raises(SaveError, match=f"^--output {path}: File too large$"):
            vector_files.write(path, texts, vectors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1


def test_the_command_writes_ids_and_texts(tmp_path, monkeypatch, capsys):
    """Regression: `--output docs.csv` wrote NumPy's bytes under that name."""
    config = SimpleNamespace(normalize=True)
    encode = lambda texts, prompt, dimensions: FLOATS[: len(texts)]  # noqa: E731
    model = SimpleNamespace(late=False, dimensions=6, config=config, encode=encode)
    monkeypatch.setattr(embed, "load", lambda *_, **__: model)
    monkeypatch.setattr(embed.dtypes, "warn", lambda *_: None)  # it has no weights
    rows = [{"_id": "d1", "title": "T", "text": "a"}, {"id": 2, "text": "b"}, {"text": "c"}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ending in vector_files.ENDINGS[1:]:
        output = tmp_path / "new" / f"v{ending}"
        assert embed.main(["--model", "m", "--input", str(tmp_path / "docs.jsonl"), "--output", str(output)]) == 0
        ids, texts, vectors = read(output)
        assert (ids, texts) == (["d1", "2", None], ["T a", "b", "c"])
        assert np.array_equal(np.array(vectors, np.float32), FLOATS)
    assert "3 vectors of 6 dimensions" in capsys.readouterr().out
