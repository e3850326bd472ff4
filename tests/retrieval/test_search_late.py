"""Search with late-interaction models: token vectors as they are and compressed, and an index of an earlier version.

python -m pytest tests/retrieval/test_search_late.py
"""

import errno
import json
import shlex
import shutil

from mlx_retrieval.backend import mx

import numpy as np
import pytest

import embed
import search
from mlx_retrieval.backbones import lora
from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.evaluation.index_search import evaluate, read_queries
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading
from mlx_retrieval.retrieval import token_store
from mlx_retrieval.retrieval.base import EVERYWHERE
from mlx_retrieval.retrieval.indexer import update
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town", "kettle", "hiss")


@pytest.fixture(scope="module")
def model(small, tmp_path_factory) -> embedder.Model:
    """A late-interaction adapter with a projection, loaded as a user would."""
    mx.random.seed(0)
    built, config, _ = loading.build(small, task="late", projection=16)
    adapter = lora.adapt(built.backbone, rank=2)
    folder = tmp_path_factory.mktemp("late") / "adapter"
    files.write_folder(folder, lambda where: loading.save_model(where, built, adapter, config))
    return embedder.load(folder)


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """Forty documents of a few words, and queries that are parts of some of them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("beir") / "task"
    (folder / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS, rng.integers(3, 30))) + f" {i}" for i in range(40)]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    queries = [{"_id": f"q{i}", "text": " ".join(documents[i].split()[:4])} for i in range(0, 40, 4)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(0, 40, 4))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def index(beir, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    update(beir, folder, model)
    return folder


def test_semantic_search_is_maxsim(beir, model, index):
    """All chunks are candidates here, so the figures are those of the exhaustive search of eval.py."""
    searcher = Searcher(index)
    assert searcher.index.info.maxsim == "mean"
    results = evaluate(searcher.index, searcher.model, read_queries(beir))
    expected = retrieval.evaluate(model, [str(beir)])
    assert results["semantic"].tasks["queries"]["ndcg_at_10"] == pytest.approx(
        expected.average()["ndcg_at_10"], abs=1e-4
    )
    rows = [json.loads(line) for line in open(beir / "corpus.jsonl")]
    query = "boiler drips at night"
    tokens, documents = model.encode([query], "query")[0], model.encode([row["text"] for row in rows], "document")
    scores = {row["_id"]: float((tokens @ d.T).max(axis=1).mean()) for row, d in zip(rows, documents, strict=True)}
    hits = searcher.search(query, "semantic", top=5)
    assert [hit.path for hit in hits] == sorted(scores, key=lambda name: -scores[name])[:5]
    np.testing.assert_allclose([hit.score for hit in hits], [scores[hit.path] for hit in hits], atol=2e-3)  # float16
    assert {hit.path for hit in searcher.search(query, "hybrid", top=40)} == set(scores)


@pytest.mark.parametrize("precision", ["binary", "uint8"])
def test_token_vectors_have_no_other_precision(model, tmp_path, capsys, precision):
    """They were written as float32 all the same."""
    (tmp_path / "docs.txt").write_text("boiler\n" * 100)
    flags = ["--model", model.name, "--input", str(tmp_path / "docs.txt"), "--output", str(tmp_path / "v.npy")]
    assert embed.main([*flags, "--precision", precision]) == 2
    assert f"--precision {precision}: the token vectors of" in capsys.readouterr().err
    assert not (tmp_path / "v.npy").exists()


@pytest.fixture
def compressing(monkeypatch):
    """Compress token vectors from the first on."""
    monkeypatch.setattr(token_store, "CODED_FROM", 1)


@pytest.mark.parametrize("settings", [{"token_bits": 4}, {"token_bits": 2, "token_pooling": 2}])
def test_a_compressed_index_finds_the_same(beir, model, index, tmp_path, compressing, settings):
    update(beir, tmp_path / "index", model, **settings)
    compressed, whole = Searcher(tmp_path / "index"), Searcher(index)
    assert compressed.index.late.store.codebook is not None and whole.index.late.store.codebook is None
    assert compressed.index.size() < whole.index.size() or settings["token_bits"] == 4
    for i in range(0, 40, 8):
        query = json.loads((beir / "queries.jsonl").read_text().splitlines()[i // 4])["text"]
        first, *_ = whole.search(query, "semantic", top=5)
        assert first.path in {hit.path for hit in compressed.search(query, "semantic", top=5)}
    assert len(compressed.search("boiler drips", "hybrid", top=40)) == 40
    with pytest.raises(UserError, match=r"--token-bits \d --token-pooling \d: --rebuild"):
        update(beir, tmp_path / "index", model, token_bits=1)


def texts(folder, **documents) -> None:
    for name, text in documents.items():
        (folder / f"{name}.txt").write_text(text)


def test_a_compressed_index_follows_its_folder(model, tmp_path, compressing):
    """Add, change and delete: every search, also one that is open, finds what is there now."""
    folder, index = tmp_path / "texts", tmp_path / "index"
    folder.mkdir()
    texts(folder, **{f"t{i}": " ".join(WORDS[i % 9 : i % 9 + 3]) + f" {i}" for i in range(30)})
    update(folder, index, model)
    searcher = Searcher(index)
    assert searcher.search("boiler drips night", "semantic", top=1)[0].path in {
        "t0.txt",
        "t9.txt",
        "t18.txt",
        "t27.txt",
    }
    texts(folder, new="kettle hiss hiss", t0="grey town")
    for name in ("t9", "t18", "t27"):
        (folder / f"{name}.txt").unlink()
    summary = update(folder, index, model)
    assert (summary.embedded, summary.changed, summary.removed) == (2, 2, 3)
    hits = searcher.search("kettle hiss hiss", "semantic", top=50)
    assert hits[0].path == "new.txt" and len(hits) == 28
    assert {hit.path for hit in hits}.isdisjoint({"t9.txt", "t18.txt", "t27.txt"})
    assert [hit.text for hit in hits if hit.path == "t0.txt"] == ["grey town"]
    assert [hit.path for hit in searcher.search("kettle", "semantic", top=5, paths=["t1*.txt"])] != []
    assert all(hit.path.startswith("t1") for hit in searcher.search("kettle", "semantic", top=5, paths=["t1*.txt"]))
    before = sorted((index / "tokens").iterdir())
    for path in folder.glob("t*.txt"):
        path.unlink()
    update(folder, index, model)
    assert [hit.path for hit in searcher.search("boiler", "semantic", top=50)] == ["new.txt"]
    assert searcher.index.late.store.count == 1 and sorted((index / "tokens").iterdir()) != before


def test_a_search_keeps_to_the_vectors_that_it_began_with(model, tmp_path, monkeypatch):
    """A thread that opens a newer version meanwhile once left it with documents of one, and numbers of the other."""
    folder, index = tmp_path / "texts", tmp_path / "index"
    folder.mkdir()
    texts(folder, **{f"t{i}": " ".join(WORDS[i : i + 3]) for i in range(9)})
    update(folder, index, model)
    late, query = Index.open(index).late, model.encode(["boiler drips"], "query")[0]
    expected = late.search(query, 20, EVERYWHERE)
    best = LateIndex.best

    def interrupted(self, *args):
        found = best(self, *args)
        monkeypatch.undo()
        for name in ("t0", "t1", "t2"):
            (folder / f"{name}.txt").unlink()
        update(folder, index, model)
        late.table.checkout_latest()
        assert len(late.search(query, 20, EVERYWHERE)) == 6  # of another thread
        return found

    monkeypatch.setattr(LateIndex, "best", interrupted)
    assert late.search(query, 20, EVERYWHERE) == expected and len(expected) == 9


def test_an_index_of_version_2_is_brought_up_to_date_without_embedding(beir, model, index, tmp_path):
    """Version 2 kept the vectors of all tokens in the table, with their mean."""
    import lancedb
    import pyarrow as pa

    old = tmp_path / "index"
    shutil.copytree(index, old)
    vectors = token_vectors(Searcher(index))
    database = lancedb.connect(old)
    rows = database.open_table("chunks").to_arrow()
    cells = pa.array([vectors[slot].tobytes() for slot in rows["slot"].to_pylist()], pa.large_binary())
    means = pa.array([np.zeros(16, np.float32)] * len(rows), pa.list_(pa.float32(), 16))
    rows = rows.drop_columns("slot").append_column("vector", means).append_column("token_vectors", cells)
    database.create_table("chunks", rows, mode="overwrite")
    shutil.rmtree(old / "tokens")
    info = json.loads((old / "index.json").read_text())
    del info["token_bits"], info["token_pooling"]
    (old / "index.json").write_text(json.dumps(info | {"version": 2}))

    with pytest.raises(UserError, match="kept token vectors uncompressed. To bring it up to date, without embedding"):
        Searcher(old)
    assert update(beir, old, model).embedded == 0
    for one, other in zip(*(Searcher(each).search("boiler drips", top=10) for each in (index, old)), strict=True):
        assert one.id == other.id and one.score == pytest.approx(other.score, abs=1e-5)


def test_another_language_keeps_the_token_vectors(beir, model, index, tmp_path):
    shutil.copytree(index, tmp_path / "index")
    assert update(beir, tmp_path / "index", model, language="german").embedded == 0
    hits = [Searcher(each).search("boiler drips", "semantic", top=10) for each in (index, tmp_path / "index")]
    assert [hit.id for hit in hits[0]] == [hit.id for hit in hits[1]]


def token_vectors(searcher: Searcher) -> dict[int, np.ndarray]:
    """The vectors of every slot, as they are."""
    index, slots = searcher.index.late.store.open("mean", 0)
    vectors = np.split(index.parts[0].vectors, np.cumsum(index.lengths)[:-1])
    return {int(slot): np.asarray(each) for slot, each in zip(slots, vectors, strict=True)}


@pytest.mark.parametrize("damage", ["cut", "missing", "codebook", "no codebook"])
def test_damaged_token_vectors_are_one_line(beir, model, tmp_path, compressing, damage):
    update(beir, tmp_path / "index", model)
    tokens = tmp_path / "index" / "tokens"
    if damage == "missing":
        shutil.rmtree(tokens)
    elif damage == "no codebook":
        (tokens / "codebook.npz").unlink()
    else:
        file = tokens / "codebook.npz" if damage == "codebook" else next(tokens.glob("0*/codes.npy"))
        file.write_bytes(file.read_bytes()[:100])
    searcher = Searcher(tmp_path / "index")
    with pytest.raises(UserError, match="if the index is damaged, search.py index --rebuild replaces it") as caught:
        searcher.search("boiler drips", "semantic")
    assert "\n" not in str(caught.value)
    assert searcher.search("boiler drips", "bm25")


def test_a_rebuild_whose_token_vectors_are_damaged_is_begun_again(beir, model, tmp_path, compressing):
    """Regression: an interrupted --rebuild was continued, and failed in the same way for ever."""
    folder = tmp_path / "index"
    update(beir, folder, model)
    shutil.copytree(folder, tmp_path / "rebuilt")
    (tmp_path / "rebuilt").rename(folder / "rebuilt")
    (folder / "rebuilt/tokens/codebook.npz").unlink()
    assert update(beir, folder, model, rebuild=True).embedded == 40
    assert Searcher(folder).search("boiler drips", "semantic")


def test_an_interrupted_rebuild_outlives_token_vectors_that_cannot_be_opened_now(beir, model, tmp_path, monkeypatch):
    """Regression: any error of the system counted as damage, and the rebuild was begun again."""
    folder = tmp_path / "index"
    update(beir, folder, model)
    shutil.copytree(folder, tmp_path / "rebuilt")
    (tmp_path / "rebuilt").rename(folder / "rebuilt")
    with monkeypatch.context() as patch:

        def busy(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(token_store.TokenStore, "check", busy)
        with pytest.raises(UserError, match=f"^--index {folder}/rebuilt: .*Too many open files"):
            update(beir, folder, model, rebuild=True)
    assert update(beir, folder, model, rebuild=True).embedded == 0


def test_a_changed_document_is_embedded_again(beir, model, tmp_path):
    folder = tmp_path / "index"
    first = update(beir, folder, model)
    again = update(beir, folder, model)
    assert (first.embedded, again.embedded, again.unchanged) == (40, 0, 40)


def test_a_model_of_single_vectors_is_offered_a_rebuild_without_flags_of_token_vectors(beir, model, tmp_path, small):
    """Regression: the command that an error printed was refused."""
    update(beir, tmp_path / "index", model, token_bits=2)
    with pytest.raises(UserError, match=r"another model than .* --rebuild$") as caught:
        Searcher(tmp_path / "index", small).search("boiler", "semantic")
    command = str(caught.value).partition("To rebuild the index: ")[2]
    assert search.main(shlex.split(command)[2:]) == 0
    assert Searcher(tmp_path / "index").search("boiler", "semantic")


def test_an_index_of_single_vectors_is_not_searched_by_tokens(beir, model, index, small):
    with pytest.raises(UserError, match="another model"):
        update(beir, index, embedder.load(small))
