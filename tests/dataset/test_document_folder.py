"""A folder of documents: what is read and what is not, boilerplate, chunks, and the counts for the screen.

python -m pytest tests/dataset/test_document_folder.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from document_files import docx, pdf, plain_pdf, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_retrieval.dataset.chunks import chunk_file
from mlx_retrieval.dataset.documents import document, folder
from mlx_retrieval.dataset.documents.boilerplate import Cleaner, RecurringLines
from mlx_retrieval.dataset.documents.document import Document, Section
from mlx_retrieval.dataset.documents.document_chunks import SHORT, ChunkCounts, chunk_documents
from mlx_retrieval.dataset.documents.folder import BESIDE_CORPUS, Unread, read_folder
from mlx_retrieval.dataset.documents.summary import summary, unread_rows
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.files import SaveError

LONG = "A kettle boils water on any stove, and a pot cooks soup, said the cook of the inn."


def sentence(word: str) -> str:
    """Return a text of which no five words in a row are those of another word's."""
    return f"A {word} boils {word} on any {word}, and a {word} cooks {word}."


def mixed(root: Path) -> Path:
    """A folder with a file of each format and of each reason."""
    return write_files(
        root,
        {
            "b/guide.md": f"# Guide\n\n{sentence('guide')}\n",
            "a.html": f"<h1>Page</h1><p>{sentence('page')}",
            "a.rst": f"Manual\n======\n\n{sentence('manual')}\n",
            "code.py": "def boil(water):\n    return water.heated_to(100)\n",
            "faq.csv": "question,answer\nWhat boils?,A kettle boils.\nWhat cooks?,A pot cooks.\n",
            "paper.pdf": plain_pdf([[sentence("paper")]]),
            "rows.jsonl": '{"text": "one text of a row"}\nbroken\n{"text": "one text of a row"}\n',
            "word.docx": docx(("Heading 1", "Use"), ("", sentence("file"))),
            "copy.txt": sentence("copy"),
            "copy/copy.txt": sentence("copy"),
            "secret.pdf": pdf([["x"]], password="p"),
            "scan.pdf": plain_pdf([[]]),
            "broken.docx": b"PK\3\4",
            "latin.txt": b"caf\xe9",
            "binary.txt": b"\0",
            "empty.txt": b"",
            "picture.png": b"\x89PNG",
            "large.txt": "x" * 200_000,
            ".env": "KEY=1",
            ".notes/a.md": "hidden",
            ".gitignore": "/build/\n",
            "build/a.md": "built",
        },
    )


def test_a_folder_is_read_with_a_reason_for_each_file_that_is_not(tmp_path):
    (mixed(tmp_path) / "link.md").symlink_to("b/guide.md")
    with read_folder(tmp_path, max_file_size=20_000_000) as whole:
        names = [one.name for one in whole]
        assert names == [
            *("a.html", "a.rst", "b/guide.md", "code.py", "copy.txt", "faq.csv:2", "faq.csv:3", "large.txt"),
            *("paper.pdf", "rows.jsonl:1", "word.docx"),
        ]
    with read_folder(tmp_path, max_file_size=199_999) as read:
        assert [one.name for one in read] == [name for name in names if name != "large.txt"]
        assert len(read) == 10 and read[0].title == "Page" and read[8] == [*read][8] and read[9].format == "Word"
        assert read.files == {
            **{"HTML": 1, "PDF": 1, "Word": 1, "table": 1, "JSON": 1, "source code": 1},
            **{"markdown": 1, "reStructuredText": 1, "text": 1},
        }
        assert {one.path: one.reason for one in read.unread if not one.parts} == {
            "binary.txt": document.BINARY,
            "broken.docx": document.DAMAGED,
            "copy/copy.txt": document.COPY,
            "empty.txt": document.EMPTY,
            "large.txt": document.TOO_LARGE,
            "latin.txt": document.NOT_UTF8,
            "picture.png": document.OTHER_FORMAT,
            "scan.pdf": document.SCANNED,
            "secret.pdf": document.ENCRYPTED,
        }
        assert [one for one in read.unread if one.parts] == [
            Unread("rows.jsonl", document.DAMAGED, "line 2: broken JSON (Expecting value at character 1)", "1 row"),
            Unread("rows.jsonl", document.COPY, "", "1 row"),
        ]
        assert read.left_out == {file_tree.HIDDEN: 3, file_tree.IGNORED: 1, file_tree.LINK: 1}
        with pytest.raises(IndexError):
            read[10]


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder$"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r": no document that can be read: it is empty$"):
        read_folder(tmp_path)
    write_files(tmp_path, {"a.txt": b"\0", "b.txt": b"\0", "c.png": b"x", ".d": "x"})
    expected = rf"can be read: 2 binary, 1 {document.OTHER_FORMAT}, 1 hidden \(a folder counts once\)$"
    with pytest.raises(UserError, match=expected):
        read_folder(tmp_path)


def test_files_are_results_without_those_of_exclude(tmp_path):
    with read_folder(write_files(tmp_path, {"a.md": LONG, "b/a.md": "other"}), exclude=["b/"]) as read:
        assert [one.path for one in read] == ["a.md"] and read.left_out == {file_tree.EXCLUDED: 1}


def test_of_an_evaluation_folder_the_corpus_alone_is_read(tmp_path):
    corpus = [{"_id": str(i), "title": "T", "text": f"text {i}"} for i in range(3)]
    files = {"corpus.jsonl": "\n".join(map(json.dumps, corpus)), "queries.jsonl": '{"_id": "q", "text": "query"}'}
    with read_folder(write_files(tmp_path, {**files, "qrels/test.tsv": "q\t1\t1\n", "README.md": "text"})) as read:
        assert [(one.row_id, one.title, one.text) for one in read] == [(str(i), "T", f"text {i}") for i in range(3)]
        assert read.left_out == {BESIDE_CORPUS: 3}


def test_what_a_file_gives_before_its_damage_is_kept(tmp_path, monkeypatch):
    def fails(path, name, note):
        yield Document(name, "JSON", "", (Section((), 1, "one"),), line=1)
        raise document.UnreadableError(document.DAMAGED, "cut off")

    monkeypatch.setattr(folder, "read_file", fails)
    with read_folder(write_files(tmp_path, {"a.jsonl": "x"})) as read:
        assert read.files == {"JSON": 1} and read.unread == [
            Unread("a.jsonl", document.DAMAGED, "cut off", "all after 1 row")
        ]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", lambda: SimpleNamespace(write=full, close=lambda: None))
    with pytest.raises(SaveError, match="No space left on device"):
        read_folder(write_files(tmp_path, {"a.md": LONG}))


# --- boilerplate ------------------------------------------------------------------------------------------------------


def documents(texts: list[str], form: str = "text", suffix: str = "txt") -> list[Document]:
    return [Document(f"{i}.{suffix}", form, "t", (Section((), 1, text),)) for i, text in enumerate(texts)]


def cleaned(read: list[Document]) -> tuple[list[str], list[int]]:
    """Return the texts without boilerplate, and how many lines each lost."""
    lines = RecurringLines()
    for one in read:
        lines.count(one)
    cleaner = Cleaner(lines)
    results = [cleaner.clean(one) for one in read]
    return [one.sections[0].text for one, _ in results], [count for _, count in results]


def test_lines_of_many_documents_are_left_out_but_in_the_first():
    texts = [f"Home  |  About\ntext {'abcdef'[i]}\n© 202{i} The Shop\n```sh\n---" for i in range(6)]
    results, counts = cleaned(documents(texts))
    assert results == [texts[0], *(f"\ntext {'abcdef'[i]}\n\n```sh\n---" for i in range(1, 6))]
    assert counts == [0, 2, 2, 2, 2, 2]


def test_lines_of_few_documents_stay():
    assert cleaned(documents([f"same\n{'abcd'[i]}" for i in range(4)]))[1] == [0] * 4  # below FEWEST
    others = [f"x{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(55)]
    assert sum(cleaned(documents(["same"] * 5 + others))[1]) == 0  # five of 60 are below SHARE
    assert sum(cleaned(documents(["same"] * 5 + others[:40]))[1]) == 4
    pages = documents(["same"] * 3) + documents(["same"] * 3, "HTML", "html")
    assert sum(cleaned(pages)[1]) == 0  # formats count by themselves
    twice = documents(["same\nsame"] * 4)
    assert sum(cleaned(twice)[1]) == 0  # a document counts once


def test_rows_stay_and_of_source_code_only_comments_go():
    assert sum(cleaned(documents(["country: Germany"] * 9, "table", "csv"))[1]) == 0
    code = ["# Copyright The Inn\nimport os\n"] * 6
    assert cleaned(documents(code, "source code", "py"))[0] == [code[0], *["\nimport os\n"] * 5]
    header = ["// Copyright\n#include <stdio.h>"] * 6
    assert cleaned(documents(header, "source code", "c"))[0][1:] == ["\n#include <stdio.h>"] * 5
    assert cleaned(documents(["# Copyright\nputs 1"] * 6, "source code", "rb"))[0][1:] == ["\nputs 1"] * 5


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["a", "B", "b ", "1", "", "c 2", "```"]), max_size=5), max_size=12))
def test_no_line_is_lost_everywhere_and_all_keep_their_places(lines):
    texts = ["\n".join(rows) for rows in lines]
    results, counts = cleaned(documents(texts))
    before, after = [text.split("\n") for text in texts], [text.split("\n") for text in results]
    assert [*map(len, before)] == [*map(len, after)]
    kept = {" ".join(row.split()).lower() for rows in after for row in rows}
    assert {" ".join(row.split()).lower() for rows in before for row in rows} <= kept
    changed = [(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True) if a != b]
    assert len(changed) == sum(counts) and all(not b for _, b in changed)


# --- chunks -----------------------------------------------------------------------------------------------------------


def chunked(root: Path, **limits) -> tuple[list, ChunkCounts]:
    counts = ChunkCounts()
    with read_folder(root) as read:
        return list(chunk_documents(read, counts, **limits)), counts


def test_chunks_keep_headings_places_and_context(tmp_path):
    text = f"# Guide\n\n## Use\n\n{LONG}\nOn gas.\n\n## Care\n\n{LONG} Really, never again with soap and a sponge.\n"
    (tmp_path / "a.md").write_text(text)
    results, counts = chunked(tmp_path)
    assert [(chunk.id, chunk.headings, str(chunk.place), chunk.context) for chunk in results] == [
        ("a.md#1", ("Guide", "Use"), "a.md:5", "Guide > Use"),
        ("a.md#2", ("Guide", "Care"), "a.md:10", "Guide > Care"),
    ]
    assert results[0].embedded == f"Guide > Use\n{LONG}\nOn gas." and results[0].document == "a.md"
    assert results[0].title == "Guide" and counts == ChunkCounts(1, 0, 0, 2)


def test_a_title_that_is_no_heading_is_in_the_context(tmp_path):
    (tmp_path / "my-page.html").write_text(f"<h1>A</h1><p>{LONG}</p><h1>B</h1><p>{sentence('b')}</p>")
    results, _ = chunked(tmp_path)
    assert [(chunk.context, str(chunk.place)) for chunk in results] == [
        ("my page > A", "my-page.html"),
        ("my page > B", "my-page.html"),
    ]


def test_long_sections_are_cut_as_search_cuts_texts(tmp_path):
    lines = [f"line {i} of the text has its own words: {i * i} {i**3}" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    results, _ = chunked(tmp_path, limit=400, overlap=60)
    expected = chunk_file("a.txt", "\n".join(lines), 400, 60)
    assert len(results) > 5
    assert [(chunk.place.line, chunk.text) for chunk in results] == [(chunk.line, chunk.text) for chunk in expected]
    assert {chunk.context for chunk in results} == {"a"}


def test_source_code_is_cut_by_functions(tmp_path):
    methods = "\n\n".join(f"    def boil_{i}(self):\n        return self.water_{i}.heat()" for i in "abc")
    (tmp_path / "a.py").write_text(f"class Kettle:\n    a = 1\n    b = 2\n    c = 3\n\n{methods}\n")
    results, _ = chunked(tmp_path, limit=120, overlap=0)
    assert [(chunk.headings, chunk.place.line, chunk.context) for chunk in results[-3:]] == [
        (("Kettle.boil_a",), 6, "class Kettle:"),
        (("Kettle.boil_b",), 9, "class Kettle:"),
        (("Kettle.boil_c",), 12, "class Kettle:"),
    ]


def test_rows_are_chunks_however_short(tmp_path):
    (tmp_path / "faq.csv").write_text("question,answer\nDoes it boil?,Yes.\nDoes it cook?,Yes.\nDoes it cook?,yes!\n")
    results, counts = chunked(tmp_path)
    assert [(chunk.id, chunk.context, chunk.text, chunk.place.line) for chunk in results] == [
        ("faq.csv:2#1", "Does it boil?", "Yes.", 2),
        ("faq.csv:3#1", "Does it cook?", "Yes.", 3),
        ("faq.csv:4#1", "Does it cook?", "yes!", 4),
    ]
    assert not counts.left_out


def test_short_and_similar_chunks_are_left_out_and_counted(tmp_path):
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)]
    text = " ".join(words)
    files = {"a.md": text, "b.md": f"{text[:-6]} other", "c.md": f"{text}\n\n# H\n\nshort"}
    results, counts = chunked(write_files(tmp_path, files))
    assert [chunk.document for chunk in results] == ["a.md"]
    assert counts.left_out == {"exact duplicate": 1, "near duplicate": 1, SHORT: 1}
    assert (counts.documents, counts.without_chunks, counts.chunks) == (1, 2, 1)
    with read_folder(tmp_path) as read:
        shown = dict(summary(read, counts))["duplicates"]
    assert "1 exact duplicate" in shown and "1 near duplicate" in shown


def test_boilerplate_is_not_in_chunks(tmp_path):
    kinds = ("copper", "steel", "glass", "iron", "clay", "tin")
    for kind in kinds:
        text = f"A {kind} kettle is good for {kind} lovers who like {kind} more than anything."
        (tmp_path / f"{kind}.html").write_text(f"<nav>Menu</nav><div>Log in here</div><p>{text}</p><div>Imprint</div>")
    results, counts = chunked(tmp_path)
    assert len(results) == 6 and "Log in" in results[0].text  # the first keeps it
    assert all("Log in" not in chunk.text and "Imprint" not in chunk.text for chunk in results[1:])
    assert counts.boilerplate == 2 * 5 + 6  # and each page's menu
    with read_folder(tmp_path) as read:
        assert dict(summary(read, counts))["boilerplate"] == "16 lines left out"


# --- the screen -------------------------------------------------------------------------------------------------------


def test_summary_for_the_screen(tmp_path):
    counts = ChunkCounts()
    with read_folder(mixed(tmp_path), max_file_size=199_999) as read:
        chunks = list(chunk_documents(read, counts))
    lines = dict(summary(read, counts))
    assert lines["files read"].startswith("9: 1 HTML, 1 reStructuredText, 1 markdown")
    assert lines["not read"].startswith("9: 1 binary, 1 damaged") and lines["documents"] == "10"
    assert lines["chunks"] == f"{len(chunks)} of 10 documents" and len(chunks) > 5
    assert lines["left out"] == "3 hidden (a folder counts once), 1 ignored by .gitignore (a folder counts once)"
    rows = dict(unread_rows(read))
    assert rows[f"{document.BINARY}: binary.txt"] == "1"
    assert rows[f"{document.ENCRYPTED}: secret.pdf (it needs a password)"] == "1"
    assert any(row.startswith("parts: damaged: rows.jsonl (1 row, line 2: broken JSON") for row in rows)


def test_many_files_of_a_reason_are_named_by_three(tmp_path):
    write_files(tmp_path, {f"{i}.png": b"x" for i in range(5)} | {"a.md": LONG})
    with read_folder(tmp_path) as read:
        assert unread_rows(read) == [(f"{document.OTHER_FORMAT}: 0.png (.png); 1.png (.png); 2.png (.png); …", "5")]


def test_the_order_is_that_of_paths(tmp_path):
    files = {name: f"{LONG} {name}" for name in ("b.md", "a/z.md", "a.md", "a/b/c.md")}
    runs = []
    for _ in range(2):
        with read_folder(write_files(tmp_path, files)) as read:
            runs.append([*read])
    assert runs[0] == runs[1] and [one.path for one in runs[0]] == sorted(files)
