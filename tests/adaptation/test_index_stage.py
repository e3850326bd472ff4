"""The index that adapt.py makes holds the chunks that it trained on, of every format, and search.py keeps it so.

python -m pytest tests/adaptation/test_index_stage.py
"""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from document_files import docx, pdf, write_files

import search
from mlx_retrieval.adaptation import chunk_file, stages
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.workshop import Workshop
from mlx_retrieval.retrieval.lance_index import Index

LIMITS = {"chunk_size": 220, "overlap": 40}


def about(*words: str) -> str:
    """Return a line for each word, of which no five words in a row are those of another word's."""
    return "\n".join(f"A {word} boils {word} on any {word}, and a {word} cooks {word}." for word in words)


CODE = "".join(f"    def boil_{name}(self):\n        return self.{name}.heated_to(100)\n\n" for name in ("gas", "coal"))
# Each file, a word of it alone, and the line where that is found; 0 = the file has no lines that could be looked up.
FILES = {
    "guide.md": (f"---\ntitle: Pans\n---\n# Copper\n\n{about('copper')}\n\n## Use\n\n{about('soap')}\n", "soap", 10),
    "note.txt": (f"Pots\n\n{about(*'abcdefghi')}\n\n{about('glass')}\n", "glass", 13),
    "manual.rst": (f"Iron\n====\n\n{about('iron')}\n\nRust\n----\n\n{about('rust')}\n", "rust", 9),
    "page.html": (f"<h1>Tin</h1><p>{about('tin')}</p><h2>Care</h2><p>{about('wax')}</p>", "wax", 0),
    "paper.pdf": (pdf([about("steel", "brass").split("\n")], title="On steel"), "brass", 0),
    "letter.docx": (docx(("Heading 1", "Clay"), ("", about("clay")), ("Heading 1", "Mud"), ("", "mud" * 9)), "clay", 0),
    "faq.csv": ("question,answer\nDoes it boil?,Yes.\nDoes zinc cook?,Never\n", "zinc", 3),
    "rows.jsonl": ('{"title": "Kettles", "text": "They sing"}\n{"name": "K1", "price": 2, "oven": "hot"}\n', "oven", 2),
    "more.jsonl.gz": (gzip.compress(b'{"text": "one of two"}\n{"text": "lead is no metal"}\n'), "lead", 2),
    "record.json": (json.dumps({"title": "Metals", "text": about("silver")}, indent=1), "silver", 0),
    "stove.py": (f"class Stove:\n    lit = 1\n    hot = 2\n    old = 3\n\n{CODE}", "coal", 9),
}
HIDDEN = {".env": "KEY=a secret", ".notes/a.md": f"# Hidden\n\n{about('hidden')}\n"}


class Piece(NamedTuple):
    path: str
    line: int
    name: str
    embedded: str


class Made(NamedTuple):
    """The chunks of an adaptation, and its index."""

    trained: list[Piece]
    indexed: list[Piece]
    index: Path


def indexed(index: Path) -> list[Piece]:
    return [
        Piece(row["path"], row["line"], row["name"], "\n".join(filter(None, (row["context"], row["text"]))))
        for row in Index.open(index).chunk_texts()
    ]


def make(documents: Path, model: str, output: Path) -> Made:
    """Carry out the stages read and index."""
    output.mkdir()
    shop = Workshop(Adaptation(documents, model, output, hold=(), guard=(), **LIMITS))
    stages.read(shop)
    stages.index(shop)
    chunks = chunk_file.Chunks(shop.path("chunks.jsonl"))
    trained = [Piece(str(c.place.file), c.place.line or 0, " > ".join(c.headings), c.embedded) for c in chunks]
    return Made(trained, indexed(shop.path("index")), shop.path("index"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("documents"), {name: file[0] for name, file in FILES.items()} | HIDDEN)


@pytest.fixture(scope="module")
def made(documents, small, tmp_path_factory) -> Made:
    return make(documents, small, tmp_path_factory.mktemp("adapted") / "out")


@pytest.mark.parametrize("name", FILES)
def test_an_index_holds_what_is_trained_on(made, name):
    """Regression: text, its marked up kinds, tables and JSON lines were cut in two ways, packed ones not indexed."""
    trained, held = (Counter(piece for piece in each if piece.path == name) for each in (made.trained, made.indexed))
    assert trained and held == trained


def test_hidden_files_are_neither_trained_on_nor_indexed(made):
    """Regression: the index held them, keys in .env as well."""
    assert {piece.path for pieces in made[:2] for piece in pieces} == {*FILES}


@pytest.mark.parametrize("name", FILES)
def test_documents_of_every_format_are_found(made, name, capsys):
    _, word, line = FILES[name]
    assert search.main(["search", word, "--bm25", "--top", "1", "--format", "grep", "--index", str(made.index)]) == 0
    assert f"/{name}:{line or 1}:" in capsys.readouterr().out
    (hit,) = Index.open(made.index).bm25(word, 1)
    assert hit.path == name and (hit.line <= line <= hit.end_line)


def test_short_and_similar_chunks_are_indexed_all_the_same(small, tmp_path):
    """They teach nothing, but somebody may look for them."""
    words = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(30))
    files = {"a.md": words, "b.md": f"{words[:-6]} other", "c.md": f"# Phone\n\n0800 12\n\n# Use\n\n{about('gas')}"}
    kinds, footer = ("tin", "clay", "iron", "lead", "zinc", "gold"), "Printed in a small town by the sea."
    files |= {f"{kind}.txt": f"{about(kind, 'old' + kind)}\n\n{footer}" for kind in kinds}
    made = make(write_files(tmp_path / "docs", files), small, tmp_path / "out")
    extra = Counter(made.indexed) - Counter(made.trained)
    assert sorted((piece.path, piece.name) for piece in extra) == [("b.md", ""), ("c.md", "Phone")]
    assert not Counter(made.trained) - Counter(made.indexed)
    assert [piece.path for piece in made.indexed if footer in piece.embedded] == ["clay.txt"]  # the first keeps it


def test_search_keeps_the_index_as_it_was_made(made, documents, small, tmp_path, capsys):
    root, index = shutil.copytree(documents, tmp_path / "docs"), tmp_path / "index"
    flags = ["--model", small, "--index", str(index), "--chunk-size", "220", "--overlap", "40"]

    def embedded() -> str:
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-8:])["embedded"]

    assert search.main(["index", str(root), *flags, "--documents"]) == 0
    assert sorted(indexed(index)) == sorted(made.indexed)
    assert embedded() == f"{len(made.indexed)} chunks of {len(FILES)} new or changed"
    assert search.main(["index", str(root), *flags]) == 0 and embedded() == "0 chunks of 0 new or changed"
    (root / "faq.csv").write_text("question,answer\nDoes it sing?,No.\n")
    assert search.main(["index", str(root), *flags]) == 0 and embedded() == "1 chunk of 1 new or changed"
    assert {piece.path for piece in indexed(index)} == {*FILES}
    assert "--documents" in Index.open(index).command(small)
    assert search.main(["index", str(root), *flags, "--no-documents"]) == 2
    assert "was made with --documents: --rebuild replaces it" in capsys.readouterr().err
    assert search.main(["index", str(root), *flags, "--rebuild"]) == 0  # another model may ask for it
    assert {piece.path for piece in indexed(index)} == {*FILES}
    assert search.main(["index", str(root), *flags, "--rebuild", "--no-documents"]) == 0
    assert {".env", "page.html"} < {piece.path for piece in indexed(index)}
    assert search.main(["index", str(root), *flags, "--documents"]) == 2
    assert "was made without --documents: --rebuild replaces it" in capsys.readouterr().err


def test_an_index_of_an_earlier_version_stays_as_it_is(documents, small, tmp_path, capsys):
    """Markdown by lines, headings included, whatever adapt.py does; nothing is embedded again."""
    index = tmp_path / "index"
    flags = ["index", str(documents), "--model", small, "--index", str(index)]
    assert search.main(flags) == 0
    before, about_it = indexed(index), json.loads((index / "index.json").read_text())
    assert about_it.pop("documents") is False
    (index / "index.json").write_text(json.dumps(about_it))
    capsys.readouterr()
    assert search.main(flags) == 0 and "0 chunks of 0 new or changed" in capsys.readouterr().out
    assert indexed(index) == before and any(piece.embedded.startswith("## Use") for piece in before)


def test_a_corpus_is_cut_and_keeps_its_ids(small, tmp_path):
    rows = [{"_id": "d:1", "title": "Stoves", "text": f"{about('gas', 'coal', 'wood')}\n\n{about('oil', 'peat')}"}]
    rows.append({"_id": "d2", "title": "", "text": about("sun")})
    corpus = "".join(json.dumps(row) + "\n" for row in rows)
    root = write_files(tmp_path / "beir", {"corpus.jsonl": corpus, "queries.jsonl": "x"})
    made = make(root, small, tmp_path / "out")
    assert Index.open(made.index).info.is_corpus
    assert {piece.path for piece in made.indexed} == {"d:1", "d2"} and len(made.indexed) > 2
    assert Counter(piece.embedded for piece in made.indexed) == Counter(piece.embedded for piece in made.trained)
