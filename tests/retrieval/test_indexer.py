"""Indexing: only what changed is embedded, what vanished is gone, and a kill at any moment costs nothing but a batch.

python -m pytest tests/retrieval/test_indexer.py
"""

import dataclasses
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from document_files import plain_pdf

import search
from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.documents import document
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import heads
from mlx_retrieval.retrieval import base, index_folder, indexer, lance_errors, lance_tables
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.rewriting import rewrite
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

FILES = {
    "src/lines.py": "import io\nimport os\nimport sys\n\ndef readLine(file):\n    return file.readline()\n",
    "src/area.py": "class Shape:\n    def area(self):\n        return self.width * self.height\n",
    "notes.md": "# Boiler\nIt drips and hisses.\n\n# Bike\nThe chain squeaks.\n",
    "it's odd.txt": "a name with a quote\n",
    "photo.png": b"\x89PNG\0\0",
    "latin.txt": "é".encode("latin-1"),
}


@pytest.fixture(scope="module")
def model(small):
    return embedder.load(small)


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    for name, content in FILES.items():
        write(root / name, content)
    return root


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(folder: Path) -> tuple[list[tuple], np.ndarray]:
    """Everything that is in an index, in the order of places."""
    index = Index.open(folder)
    assert index.info.complete and index.remove_orphans(index.records()) == 0
    found = sorted(index.chunks.search().limit(None).to_list(), key=lambda row: (row["path"], row["id"]))
    fields = ("id", "path", "line", "end_line", "language", "kind", "name", "context", "text", "tokens", "file_hash")
    return [tuple(row[name] for name in fields) for row in found], np.array([row["vector"] for row in found])


def assert_same(folder: Path, expected: Path) -> None:
    """The same rows, vectors, records and BM25 scores."""
    (texts, vectors), (wanted, wanted_vectors) = rows(folder), rows(expected)
    assert texts == wanted and np.abs(vectors - wanted_vectors).max() < 1e-5
    indices = [Index.open(folder), Index.open(expected)]
    records = [{path: record.sha256 for path, record in index.records().items()} for index in indices]
    assert records[0] == records[1]
    for query in ("read line", "shape area width", "the chain of a boiler"):
        hits = [[(hit.id, round(hit.score, 4)) for hit in index.bm25(query, 10)] for index in indices]
        assert hits[0] == hits[1] and hits[0]


def test_a_tree_is_indexed(tree, model, tmp_path):
    summary = update(tree, tmp_path / "index", model)
    assert (summary.files, summary.chunks, summary.embedded, summary.changed) == (4, 6, 6, 4)
    assert (summary.unchanged, summary.removed) == (0, 0)
    assert summary.left_out == {file_tree.BINARY: 1, file_tree.NOT_UTF8: 1}
    assert summary.size == sum(f.stat().st_size for f in (tmp_path / "index").rglob("*") if f.is_file()) > 0
    texts, vectors = rows(tmp_path / "index")
    places = {(row[1], row[2], row[3], row[6]) for row in texts}
    assert ("src/lines.py", 5, 6, "readLine") in places and ("notes.md", 4, 5, "Bike") in places
    expected = model.encode([row[8] for row in texts], prompt="document")
    assert np.abs(vectors - expected).max() < 1e-5


def test_only_what_changed_is_embedded(tree, model, tmp_path, monkeypatch):
    index = tmp_path / "index"
    update(tree, index, model)
    embedded: list[str] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kw: (embedded.extend(texts), encode(texts, **kw))[1])

    summary = update(tree, index, model)
    assert embedded == [] and (summary.unchanged, summary.embedded, summary.chunks) == (4, 0, 6)
    assert summary.left_out == {file_tree.BINARY: 1, file_tree.NOT_UTF8: 1}  # told again, though not read again

    os.utime(tree / "notes.md", ns=(1, 1))  # only the time is another
    assert update(tree, index, model).embedded == 0 and embedded == []
    assert Index.open(index).records()["notes.md"].stamp == 1

    write(tree / "notes.md", "# Boiler\nIt is quiet.\n")
    (tree / "it's odd.txt").unlink()
    (tree / "src/area.py").rename(tree / "src/shape.py")
    write(tree / "photo.png", "now a text\n")
    summary = update(tree, index, model)
    assert embedded == ["# Boiler\nIt is quiet.", "now a text", FILES["src/area.py"].rstrip()]
    assert (summary.changed, summary.unchanged, summary.removed, summary.files) == (3, 1, 2, 4)
    assert Index.open(index).bm25("hisses squeaks quote", 10) == []  # what it held before
    assert len(rows(index)[0]) == summary.chunks == 5
    write(tree / ".gitignore", "notes.md\n.gitignore\n")
    assert update(tree, index, model).removed == 1
    assert {row[1] for row in rows(index)[0]} == {"src/lines.py", "src/shape.py", "photo.png"}


def downgraded_to(reason: str, folder: Path, paths: Sequence[str]) -> None:
    """Record files as an earlier version did, which read none of their format."""
    index = Index.open(folder)
    old = [index.records()[path]._replace(chunks=0, left_out=reason) for path in paths]
    index.remove(paths)
    index.record(old)


@pytest.mark.parametrize("reason", [file_tree.BINARY, file_tree.NOT_UTF8])
def test_documents_that_an_earlier_version_left_out_are_read(tree, model, tmp_path, reason):
    """Their bytes are the same as before, which once passed for "only the time has changed"."""
    write(tree / "paper.pdf", plain_pdf([["A kettle boils water."]]))
    update(tree, tmp_path / "whole", model)
    update(tree, tmp_path / "index", model)
    downgraded_to(reason, tmp_path / "index", ["paper.pdf"])
    summary = update(tree, tmp_path / "index", model)
    assert (summary.embedded, summary.changed, summary.files) == (1, 1, 5)
    assert_same(tmp_path / "index", tmp_path / "whole")
    assert update(tree, tmp_path / "index", model).embedded == 0


def test_files_that_could_not_be_opened_are_tried_at_every_run(tree, model, tmp_path, monkeypatch):
    """A permission or a library changes neither size nor time of a file."""
    write(tree / "paper.pdf", plain_pdf([["A kettle boils water."]]))
    with monkeypatch.context() as forbidden:
        read = Path.read_bytes
        forbidden.setattr(
            Path, "read_bytes", lambda path: forbid(path) if path.suffix in (".pdf", ".md") else read(path)
        )
        for _ in range(2):
            summary = update(tree, tmp_path / "index", model)
            assert summary.left_out[document.FORBIDDEN] == summary.left_out[document.UNREADABLE] == 1
        forbidden.setattr(Index, "finish", lambda index: pytest.fail("nothing changed, so no word is indexed again"))
        assert update(tree, tmp_path / "index", model).files == 3
    assert update(tree, tmp_path / "index", model).changed == 2
    update(tree, tmp_path / "whole", model)
    assert_same(tmp_path / "index", tmp_path / "whole")


def forbid(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_increments_end_where_one_run_does(tree, model, tmp_path):
    write(tree / "gone.txt", "boiler chain line area\n" * 5)
    (tree / "notes.md").rename(tmp_path / "notes.md")
    update(tree, tmp_path / "index", model)
    (tree / "gone.txt").unlink()
    update(tree, tmp_path / "index", model)
    (tmp_path / "notes.md").rename(tree / "notes.md")
    for i in range(3):
        write(tree / "area.txt", f"the width of an area {i}\n")
        update(tree, tmp_path / "index", model)
    update(tree, tmp_path / "whole", model)
    assert_same(tmp_path / "index", tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import indexer
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.rewriting import rewrite
root, index, small, moment, count = sys.argv[1:]
indexer.BATCH = 1
def die_after(name, when):
    original, calls = getattr(Index, name), []
    def method(self, *args, **kwargs):
        calls.append(name)
        if when == "before" and len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args, **kwargs)
        if when == "after" and len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(Index, name, method)
die_after(*moment.split())
indexer.update(Path(root), Path(index), embedder.load(small))
print("not killed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "count"), [("record before", 3), ("record after", 3), ("finish before", 1)])
def test_a_killed_run_goes_on(tree, model, small, tmp_path, run_python, moment, count):
    """Between a batch's chunks and its records, between batches, and before the end."""
    index = tmp_path / "index"
    killed = run_python(KILLED, tree, index, small, moment, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr  # the third batch is the first with two chunks
    half = Index.open(index)
    assert not half.info.complete and 0 < half.chunks.count_rows() <= 6
    stored = {path for path, record in half.records().items() if not record.left_out}
    summary = update(tree, index, model)
    assert summary.unchanged == len(stored) and summary.changed == 4 - len(stored)
    update(tree, tmp_path / "whole", model)
    assert_same(index, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_while_it_replaces_goes_on(tree, model, small, tmp_path, run_python):
    index = tmp_path / "index"
    update(tree, index, model)
    write(tree / "notes.md", "# Boiler\nanother text\n")
    write(tree / "src/area.py", "def area():\n    return 3\n")
    assert run_python(KILLED, tree, index, small, "record before", 1).returncode == -signal.SIGKILL
    assert update(tree, index, model).changed == 2
    update(tree, tmp_path / "whole", model)
    assert_same(index, tmp_path / "whole")


def test_a_corpus_is_indexed_by_documents(model, tmp_path):
    root = tmp_path / "corpus"
    documents = [{"_id": "d1", "title": "Boiler", "text": "drips"}, {"_id": "d:2", "title": "", "text": "Bike\nchain"}]
    documents.append({"_id": "empty", "title": "", "text": " "})
    write(root / "corpus.jsonl", "".join(json.dumps(row) + "\n" for row in documents))
    write(root / "queries.jsonl", "not indexed\n")
    summary = update(root, tmp_path / "index", model)
    assert (summary.files, summary.chunks, summary.left_out) == (2, 2, {file_tree.EMPTY: 1})
    assert [(row[1], row[5], row[8]) for row in rows(tmp_path / "index")[0]] == [
        ("d1", "document", "Boiler drips"),
        ("d:2", "document", "Bike\nchain"),
    ]
    documents[0]["text"] = "sighs"  # as long as before
    write(root / "corpus.jsonl", "".join(json.dumps(row) + "\n" for row in documents))
    summary = update(root, tmp_path / "index", model)
    assert (summary.embedded, summary.unchanged) == (1, 1)
    assert rows(tmp_path / "index")[0][0][8] == "Boiler sighs"


def test_an_index_within_its_folder_may_move_with_it(tree, model, tmp_path):
    update(tree, tree / ".index", model)
    assert update(tree, tree / ".index", model).files == 4  # the index itself is not indexed
    tree.rename(tmp_path / "moved")
    summary = update(tmp_path / "moved", tmp_path / "moved/.index", model)
    assert (summary.unchanged, summary.embedded) == (4, 0)
    assert Index.open(tmp_path / "moved/.index").root == tmp_path / "moved"


def test_other_models_settings_and_folders_are_refused(tree, model, small, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    with pytest.raises(UserError, match="--chunk-size 2000 --overlap 200: --rebuild"):
        update(tree, index, model, max_characters=500, overlap=50)
    with pytest.raises(UserError, match=f"of {tree}: --rebuild"):
        update(tree / "src", index, model)
    shorter = embedder.load(small, max_length=16)
    with pytest.raises(UserError, match="as it was before its files changed: --rebuild"):
        update(tree, index, shorter)
    other = shutil.copytree(small, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another file"}))
    with pytest.raises(UserError, match=r"with another model \(.*small-gemma\): --rebuild"):
        update(tree, index, embedder.load(other))
    assert update(tree, index, embedder.load(other), rebuild=True).embedded == 6
    moved = shutil.copytree(other, tmp_path / "elsewhere")
    assert update(tree, index, embedder.load(moved)).embedded == 0  # the same files in another place


def test_folders_with_anything_else_are_left_alone(tree, model, tmp_path):
    write(tmp_path / "mine/thesis.txt", "years of work")
    for rebuild in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            update(tree, tmp_path / "mine", model, rebuild=rebuild)
    write(tmp_path / "file", "x")
    with pytest.raises(UserError, match="holds something else"):
        update(tree, tmp_path / "file", model)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="nothing to index"):
        update(tmp_path / "none", tmp_path / "index", model)


@pytest.mark.parametrize("place", ["index.json", "tables"])
def test_an_index_that_cannot_be_opened_now_is_not_called_damaged(tree, model, tmp_path, monkeypatch, place):
    """Regression: any error of the system was answered with the advice to rebuild."""
    index = tmp_path / "index"
    update(tree, index, model, language="german")

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        if place == "tables":
            patch.setattr(Index, "__init__", busy)
        else:
            patch.setattr(index_folder.json, "loads", busy)
        for rebuild in (False, True):
            with pytest.raises(UserError, match=r"not readable \(Too many open files\)$"):
                update(tree, index, model, rebuild=rebuild) if place == "index.json" else Index.open(index)
    assert Index.open(index).info.language == "german"


def test_a_damaged_index_is_told_and_rebuilt(tree, model, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    whole = (index / base.FILE).read_text()
    about = json.loads(whole)
    broken = [about | {"version": 0}, about | {"fields": about["fields"] | {"text": 9}}, {"version": 1}]
    for text in ("{", "[]", *map(json.dumps, broken)):
        (index / base.FILE).write_text(text)
        with pytest.raises(UserError, match="--rebuild replaces it"):
            update(tree, index, model)
    (index / base.FILE).write_text(whole)
    shutil.rmtree(index / "chunks.lance")
    with pytest.raises(UserError, match="damaged .* --rebuild replaces it"):
        update(tree, index, model)
    assert update(tree, index, model, rebuild=True).embedded == 6
    (index / base.FILE).unlink()  # a kill in the middle of making it
    assert update(tree, index, model).embedded == 6


def test_one_process_at_a_time(tree, model, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    with open(index / base.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is indexing"):
            update(tree, index, model)
    assert update(tree, index, model).unchanged == 4


def test_vectors_that_are_not_finite_are_refused(tree, model, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "unit", lambda vectors: vectors * np.nan)
    index = tmp_path / "index"
    with pytest.raises(UserError, match=f"vectors of 6 of 6 texts are not finite, the first is {tree}/"):
        update(tree, index, model)
    assert not index.exists()  # or another model would be refused, and a search would find nothing
    index.mkdir()
    with pytest.raises(UserError, match="not finite"):
        update(tree, index, model)
    assert {path.name for path in index.iterdir()} == {base.LOCK, ".gitignore"}
    monkeypatch.setattr(indexer, "_remove_empty", lambda *_: None)  # as if it was killed
    with pytest.raises(UserError, match="not finite"):
        update(tree, index, model)
    monkeypatch.undo()
    assert Index.open(index).is_empty()
    assert update(tree, index, model, max_characters=500).embedded == 6  # other settings, and no --rebuild
    write(tree / "notes.md", "# Kettle\nIt whistles.\n")
    monkeypatch.setattr(heads, "unit", lambda vectors: vectors * np.nan)
    with pytest.raises(UserError, match="notes.md:1"):
        update(tree, index, model, max_characters=500)
    assert Index.open(index).chunks.count_rows() == 6


def test_the_fingerprint_sees_changes_even_in_sampled_files(small, tmp_path, monkeypatch):
    folder = shutil.copytree(small, tmp_path / "model")
    weights = folder / "model.safetensors"
    whole, model = weights.read_bytes(), embedder.load(folder)
    assert model.fingerprint() == embedder.load(small).fingerprint()
    middle = len(whole) // 2

    def changes(length: int) -> bool:
        weights.write_bytes(whole)
        before = model.fingerprint()
        weights.write_bytes(
            whole[:middle] + bytes(b ^ 1 for b in whole[middle : middle + length]) + whole[middle + length :]
        )
        return model.fingerprint() != before

    assert changes(1)
    monkeypatch.setattr(files, "READ_WHOLE", 1_000)
    monkeypatch.setattr(files, "BLOCK", 100)
    assert changes(len(whole) // files.BLOCKS + 100) and not changes(0)


def test_batches_do_not_decide_what_is_indexed(tree, model, tmp_path, monkeypatch):
    update(tree, tmp_path / "whole", model)
    monkeypatch.setattr(indexer, "BATCH", 1)
    update(tree, tmp_path / "index", model)
    assert_same(tmp_path / "index", tmp_path / "whole")


def cut_in_half(table: Path) -> None:
    for file in table.glob("data/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("table", ["files", "chunks"])
def test_a_table_that_cannot_be_read_is_told_by_every_command(tree, model, tmp_path, table):
    """Regression: the advice was to run the same command again, which failed in the same way for ever."""
    index = tmp_path / "index"
    update(tree, index, model)
    downgrade(index, version=base.VERSION)  # of an earlier analysis: its words are looked at
    cut_in_half(index / f"{table}.lance")
    opened = Index.open(index)
    reads = {
        "files": [lambda: opened.known([]), opened.records],
        "chunks": [opened.has_older_words, opened.chunk_texts],
    }
    for read in (*reads[table], lambda: update(tree, index, model), lambda: rewrite(opened)):
        with pytest.raises(UserError, match=f"--index {index}: .*search.py index --rebuild replaces it") as caught:
            read()
        assert "\n" not in str(caught.value) and "what is indexed stays" not in str(caught.value)
    assert update(tree, index, model, rebuild=True).embedded == 6


def test_a_damaged_rebuild_is_begun_again(tree, model, tmp_path):
    """Regression: an interrupted --rebuild whose files are damaged was in the way of every further one."""
    index = tmp_path / "index"
    update(tree, index, model)
    update(tree, tmp_path / "other", model)
    shutil.copytree(tmp_path / "other", index / index_folder.REBUILT)
    cut_in_half(index / index_folder.REBUILT / "files.lance")
    assert update(tree, index, model, rebuild=True).embedded == 6


def test_what_is_written_to_a_damaged_table_is_told(tree, model, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    cut_in_half(index / "chunks.lance")
    with pytest.raises(files.SaveError, match="search.py index --rebuild replaces it, otherwise the same command"):
        Index.open(index).remove(["notes.md"])


def test_a_rebuild_that_fails_keeps_the_old_index_and_goes_on(tree, tmp_path, model, monkeypatch):
    """Regression: --rebuild removed the index before it had another; a full disk was a page about LanceDB's sources."""
    index = tmp_path / "index"
    assert update(tree, index, model).embedded == 6
    add, message = (
        Index.add,
        "lance error: LanceError(IO): No space left on device (os error 28), /registry/lance.rs:191",
    )

    def full(self, *args):
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", lance_errors.writing(full))
        with pytest.raises(
            files.SaveError, match="^--index .*: No space left on device; .* the same command continues$"
        ):
            update(tree, index, model, max_characters=40, overlap=0, rebuild=True)
    assert Index.open(index).info.complete and Index.open(index).chunks.count_rows() == 6
    summary = update(tree, index, model, max_characters=40, overlap=0, rebuild=True)
    assert summary.embedded > 6 and Index.open(index).info.max_characters == 40
    assert not (index / index_folder.REBUILT).exists()
    # A kill while the new index is put in place of the old one: the next run finishes that.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            update(tree, index, model, rebuild=True)
    assert (index / index_folder.REBUILT).is_dir() and not (index / "index.json").exists()
    assert update(tree, index, model).embedded == 0 and Index.open(index).chunks.count_rows() == 6
    assert Index.add is add


def test_an_interrupted_rebuild_outlives_what_the_system_refuses(tree, model, tmp_path, monkeypatch):
    """Regression: all that it had embedded was removed if its orphans could not be, or a file could not be opened."""
    index = tmp_path / "index"
    update(tree, index, model)
    monkeypatch.setattr(indexer, "BATCH", 1)
    with monkeypatch.context() as patch:
        record, calls = Index.record, []
        patch.setattr(Index, "record", lambda *args: calls.append(args) or (record(*args) if len(calls) < 3 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            update(tree, index, model, rebuild=True)
    rebuilt = index / index_folder.REBUILT
    table, count = type(Index.open(rebuilt).chunks), Index.open(rebuilt).count()
    full = RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), /registry/lance.rs:191")
    busy = OSError(errno.EMFILE, "Too many open files")
    refused = [(table, "delete", full, "No space left"), (lance_tables, "orphans", busy, "Too many open files")]
    for owner, name, error, message in refused:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising(error))
            with pytest.raises(files.SaveError, match=f"^--index {rebuilt}: .*{message}"):
                update(tree, index, model, rebuild=True)
        assert Index.open(rebuilt).count() == count
    Index.open(index).keep_weight(0.4)  # which `tune` learnt meanwhile
    summary = update(tree, index, model, rebuild=True)
    assert 0 < summary.embedded < 6 and len(rows(index)[0]) == 6 and Index.open(index).info.weight == 0.4


def raising(error: Exception) -> Callable:
    """Return a function that raises this error, whatever it is called with."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


# --- words: older versions, other languages, other weights ---


def downgrade(folder: Path, version: int = 1) -> None:
    """Make an index look as an earlier version wrote it: without later settings, and with other words."""
    index = Index.open(folder)
    index.chunks.update(values={"tokens": "'old'"})
    later = {"folders", "language", "fields", "weight", "documents", "exclude", "max_file_size", "analysis"}
    values = {name: value for name, value in vars(index.info).items() if name not in later} | {"version": version}
    (folder / base.FILE).write_text(json.dumps(values))


def test_an_index_of_the_version_before_is_refused_and_brought_up_to_date(tree, model, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    update(tree, tmp_path / "whole", model)
    downgrade(index)
    with pytest.raises(UserError, match=rf"without embedding again: python .*search.py index {tree} --model-path "):
        Index.open(index)
    write(tree / "notes.md", "# Boiler\nIt is quiet.\n\n# Bike\nThe chain squeaks.\n")
    summary = update(tree, index, model)
    assert (summary.embedded, summary.unchanged, summary.chunks) == (2, 3, 6)  # only the file that has changed
    update(tree, tmp_path / "whole", model)
    assert_same(index, tmp_path / "whole")
    assert not (index / index_folder.REBUILT).exists() and Index.open(index).info.version == base.VERSION


def made_before_marks_counted(folder: Path) -> None:
    index = Index.open(folder)
    index.chunks.update(where="path = 'book.txt'", values={"tokens": "'प स तक'"})
    (folder / base.FILE).write_text(json.dumps({k: v for k, v in vars(index.info).items() if k != "analysis"}))


def test_words_with_marks_of_an_earlier_version_are_made_again(tree, model, tmp_path, monkeypatch):
    """Words were cut at their vowel signs. Whoever neither asks for such words nor has them notices nothing."""
    index = tmp_path / "index"
    update(tree, index, model)
    made_before_marks_counted(index)
    with monkeypatch.context() as patch:
        patch.setattr(indexer, "rewrite", lambda *_, **__: pytest.fail("there is no such word"))
        update(tree, index, model)
    assert Index.open(index).bm25("पुस्तक", 5) == []
    write(tree / "book.txt", "पुस्तक\n")
    update(tree, index, model)
    update(tree, tmp_path / "whole", model)
    made_before_marks_counted(index)
    assert Index.open(index).bm25("read line", 5) == Index.open(tmp_path / "whole").bm25("read line", 5)
    with pytest.raises(
        UserError, match=r"cut words of this script otherwise.* without embedding again: python .*index"
    ):
        Index.open(index).bm25("पुस्तक", 5)
    assert update(tree, index, model).embedded == 0
    assert_same(index, tmp_path / "whole")
    assert Index.open(index).bm25("पुस्तक", 5)[0].path == "book.txt"


def test_an_unfinished_index_of_the_version_before_is_continued(tree, model, tmp_path, monkeypatch):
    index = tmp_path / "index"
    monkeypatch.setattr(indexer, "BATCH", 1)
    with monkeypatch.context() as patch:
        add, calls = Index.add, []
        patch.setattr(Index, "add", lambda *args: calls.append(args) or (add(*args) if len(calls) < 3 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            update(tree, index, model)
    downgrade(index)
    assert 0 < update(tree, index, model).unchanged < 4
    update(tree, tmp_path / "whole", model)
    assert_same(index, tmp_path / "whole")


def test_another_language_needs_other_words_and_no_vectors(tree, model, tmp_path):
    index = tmp_path / "index"
    write(tree / "haus.txt", "Die Häuser\n")
    update(tree, index, model)
    assert Index.open(index).bm25("haus", 1)[0].path == "haus.txt"  # by the name of the file
    summary = update(tree, index, model, language="german")
    assert (summary.embedded, summary.changed, Index.open(index).info.language) == (0, 0, "german")
    assert Index.open(index).bm25("Haus", 1)[0].score > 0 and update(tree, index, model).embedded == 0
    assert Index.open(index).info.language == "german"  # without the flag it stays
    update(tree, tmp_path / "whole", model, language="german")
    assert_same(index, tmp_path / "whole")
    with pytest.raises(UserError, match="--language elvish"):
        update(tree, index, model, language="elvish")


def test_other_weights_of_fields_give_the_words_of_a_new_index(tree, model, tmp_path):
    index = tmp_path / "index"
    update(tree, index, model)
    before = Index.open(index).bm25("read line", 10)
    weights = {"path": 0, "name": 8, "doc": 0, "text": 1}
    rewritten = rewrite(Index.open(index), fields=weights, weight=0.25)
    assert (rewritten.info.fields, rewritten.info.weight, rewritten.info.complete) == (weights, 0.25, True)
    after = rewritten.bm25("read line", 10)
    assert after[0].name == "readLine" and after[0].score > before[0].score
    summary = update(tree, index, model)  # and later runs keep them
    assert summary.embedded == 0 and Index.open(index).bm25("read line", 10) == after


def test_a_rebuild_keeps_the_language_and_what_was_tuned(tree, model, tmp_path):
    """--help says of --language "default: the index's", and of --weight "as tuned"."""
    index, weights = tmp_path / "index", {"path": 0, "name": 8, "doc": 0, "text": 1}
    update(tree, index, model, language="german")
    rewrite(Index.open(index), fields=weights, weight=0.25)
    assert update(tree, index, model, rebuild=True).embedded == 6
    info = Index.open(index).info
    assert (info.language, info.fields, info.weight) == ("german", weights, 0.25)
    update(tree, index, model, rebuild=True, language="none")
    info = Index.open(index).info
    assert (info.language, info.fields, info.weight) == ("none", weights, 0.25)
    (index / base.FILE).write_text("damaged")
    update(tree, index, model, rebuild=True)
    assert Index.open(index).info.language == "english"


def test_printed_commands_make_the_same_index(tree, model, small, tmp_path):
    """Whatever flag decides what is in an index, the command that an error prints has it."""
    settings = {"token_bits": 2, "token_pooling": 3, "max_characters": 40, "overlap": 5, "max_file_size": 60}
    index, exclude = tmp_path / "index", ["-x*", "/it's odd.txt"]
    update(tree, index, model, exclude=exclude, **settings)
    assert {row[1] for row in rows(index)[0]} == {"notes.md"}
    opened = Index.open(index)
    command = opened.rebuild_command(small, late=False)
    args = search.parser().parse_args(shlex.split(command)[2:])
    assert (args.chunk_size, args.overlap, args.max_file_size, args.exclude) == (40, 5, 60, exclude)
    assert (args.rebuild, args.documents) == (True, None)
    opened.info = dataclasses.replace(opened.info, maxsim="mean", token_bits=2, token_pooling=3)
    args = search.parser().parse_args(shlex.split(opened.rebuild_command(small, late=True))[2:])
    assert (args.token_bits, args.token_pooling) == (2, 3)
    assert "--token" not in opened.rebuild_command(small, late=False)  # which a model of single vectors refuses
    update(tree, index, model, max_characters=40, overlap=5)  # of files, what the last run was told counts
    args = search.parser().parse_args(shlex.split(Index.open(index).command(small))[2:])
    assert (args.max_file_size, args.exclude) == (None, [])


def test_printed_commands_of_single_vectors_have_no_flags_of_token_vectors(tree, model, small, tmp_path):
    """Regression: an earlier version kept them, and the command that an error printed was refused for them."""
    index = tmp_path / "index"
    update(tree, index, model, token_bits=2)  # without effect, as in a notebook
    assert "--token" not in Index.open(index).command(small)
    info = json.loads((index / base.FILE).read_text())
    (index / base.FILE).write_text(json.dumps(info | {"token_bits": 2, "token_pooling": 3}))
    command = Index.open(index).rebuild_command(small, late=False)
    assert "--token" not in command and search.main(shlex.split(command)[2:]) == 0


# --- several folders ---


def test_several_folders(tree, model, tmp_path):
    write(tree / "docs/boiler.md", "# Boiler\nIt drips.\n")
    roots, index = [tree / "src", tree / "docs", tree / "src/deep/..", tree / "src"], tmp_path / "index"
    assert update(roots, index, model).files == 3
    opened = Index.open(index)
    assert opened.root == tree and opened.info.folders == ["docs", "src"]
    assert {row[1] for row in rows(index)[0]} == {"docs/boiler.md", "src/area.py", "src/lines.py"}
    write(tree / "src/area.py", "def area():\n    return 3\n")
    (tree / "docs/boiler.md").unlink()
    write(tree / "docs/bike.md", "# Bike\nIt squeaks.\n")
    summary = update(roots, index, model)
    assert (summary.changed, summary.unchanged, summary.removed) == (2, 1, 1)
    with pytest.raises(UserError, match=f"was made of {tree}/docs, {tree}/src: --rebuild"):
        update([tree / "docs", tree / "more"] if write(tree / "more/a.txt", "a") is None else [], index, model)
    assert update([*roots, tree / "more"], index, model).files == 4  # one more folder
    assert update(tree, index, model).changed == 2  # the folder that holds them: notes.md and "it's odd.txt"


def test_missing_grammars_of_several_folders_are_counted(tree, model, tmp_path, monkeypatch):
    """Regression: only those of a single folder were told."""
    monkeypatch.setattr(chunks, "missing_grammar", lambda path: "a-grammar" if path.endswith(".py") else "")
    write(tree / "docs" / "readme.md", "# Manual\nTurn it on.\n")
    for number, folders in enumerate((tree, [tree / "src", tree / "docs"])):
        assert update(folders, tmp_path / f"{number}", model).without_grammar == {"a-grammar": 2}


def test_messages_about_several_folders_name_files_as_they_were_given(tree, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(heads, "unit", lambda vectors: vectors * np.nan)
    write(tree / "docs/boiler.md", "# Boiler\n")
    with pytest.raises(UserError, match="the first is docs/boiler.md:1"):
        update([Path("src"), Path("docs")], tmp_path / "index", model)
    write(tree / "corpus/corpus.jsonl", '{"_id": "d", "text": "t"}\n')
    with pytest.raises(UserError, match="corpus: a folder in BEIR layout is indexed alone"):
        update([Path("src"), Path("corpus")], tmp_path / "index", model)
