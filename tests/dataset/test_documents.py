"""Documents of each format: titles, headings and texts, and why a file cannot be read.

python -m pytest tests/dataset/test_documents.py
"""

import ast
import functools
import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest
from document_files import docx, docx_of, pdf, plain_pdf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_retrieval.dataset import documents
from mlx_retrieval.dataset.documents import decoding, document, docx_files, row_files
from mlx_retrieval.dataset.documents.document import REASONS, Document, SectionBuilder, UnreadableError, title_of
from mlx_retrieval.dataset.documents.formats import FORMATS, READERS, format_of, read_file
from mlx_retrieval.dataset.documents.pdf_files import leave_out_running_heads
from mlx_retrieval.dataset.documents.plain_text import rst_headings


@pytest.fixture
def reads(tmp_path):
    """Return (documents, noted parts) of a file with this name and content; `reads.reason` if it cannot be read."""

    class Reads:
        def __call__(self, name: str, data: str | bytes) -> tuple[list[Document], list[tuple[str, str, str]]]:
            path = tmp_path / name
            path.write_bytes(data.encode() if isinstance(data, str) else data)
            notes = []
            return list(read_file(path, name, lambda *note: notes.append(note))), notes

        def one(self, name: str, data: str | bytes) -> Document:
            (only,), notes = self(name, data)
            assert not notes
            return only

        def reason(self, name: str, data: str | bytes) -> tuple[str, str]:
            with pytest.raises(UnreadableError) as raised:
                self(name, data)
            return raised.value.reason, raised.value.detail

    return Reads()


def outline(read: Document) -> list[tuple[tuple[str, ...], str]]:
    """Return the headings and the text of each section, without blank lines."""
    return [(s.headings, "\n".join(filter(None, map(str.strip, s.text.split("\n"))))) for s in read.sections]


# --- all formats ------------------------------------------------------------------------------------------------------


def test_sections_know_their_headings_and_lines():
    builder = SectionBuilder()
    builder.add("before")
    builder.heading(2, "A  \n b")
    builder.heading(3, "deep")
    builder.add("one\ntwo")
    builder.heading(2, "B")
    builder.add("three")
    builder.heading(1, "empty")
    assert [tuple(section) for section in builder.sections()] == [
        ((), 1, "before"),
        (("A b", "deep"), 4, "one\ntwo"),
        (("B",), 7, "three"),
    ]


@pytest.mark.parametrize(
    ("declared", "headings", "expected"),
    [
        ("Kettles", ["A"], "Kettles"),
        ("Microsoft Word - kettles.doc", ["A"], "A"),
        ("final report.docx", [], "my kettles"),
        ("Untitled document", ["A", "A"], "A"),
        ("", ["A", "B"], "my kettles"),
        ("12", [], "my kettles"),
        ("水壶", [], "水壶"),
    ],
)
def test_title(declared, headings, expected):
    sections = [document.Section((heading,), 1, "text") for heading in headings]
    assert title_of("a/my_kettles.txt", sections, declared) == expected


def test_text_of_a_document_holds_its_innermost_headings():
    sections = (document.Section((), 1, "one\n"), document.Section(("A", "B"), 3, "two"))
    assert Document("a.md", "markdown", "t", sections).text == "one\n\nB\ntwo"
    assert Document("a.csv", "table", "t", sections, line=7).name == "a.csv:7"


def test_format_is_known_by_the_ending():
    assert format_of("a/B.PDF") == "PDF" and format_of("rows.jsonl.gz") == "JSON" and format_of("v1.2.md") == "markdown"
    assert format_of("README") == "text" and format_of("a.png") is None and format_of("a.tar.gz") is None
    assert set(FORMATS.values()) == set(READERS)


def test_another_format_is_named(reads):
    assert reads.reason("slides.pptx", b"PK") == (document.OTHER_FORMAT, ".pptx")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.html", "a.py", "a.csv", "a.jsonl", "a.pdf", "a.docx"])
def test_an_empty_file_is_empty(reads, name):
    assert reads.reason(name, b"")[0] == document.EMPTY


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.html", "a.py", "a.csv"])
def test_texts_are_in_utf_8_or_marked(reads, name):
    assert reads.reason(name, b"caf\xe9 and more")[0] == document.NOT_UTF8
    assert reads.reason(name, b"caf\0 and more")[0] == document.BINARY
    text = "x = 'été, 水壶'\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert "été" in reads.one(name, text.encode(encoding)).text
    assert reads.reason(name, "aé".encode("utf-16") + b"\x00")[0] == document.NOT_UTF8


def test_no_permission_is_told_from_other_errors(reads, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert reads.reason("a.txt", "x") == (document.FORBIDDEN, "")
    monkeypatch.setattr(row_files, "open", denied, raising=False)
    with pytest.raises(UnreadableError, match=document.FORBIDDEN):
        list(row_files.read_json(Path("a.jsonl"), "a.jsonl", print))
    monkeypatch.undo()
    with pytest.raises(UnreadableError, match=document.UNREADABLE):
        decoding.read_bytes(Path("no such file"))


def test_libraries_are_imported_when_a_file_needs_them():
    for path in Path(documents.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"pypdf", "docx", "lxml"}, path


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_short_first_line_is_a_text_s_title(reads):
    read = reads.one("notes.txt", "\nKettles\n\nA kettle boils.\r\nWater.\n")
    assert read.title == "Kettles" and read.sections[0].line == 3 and outline(read) == [((), "A kettle boils.\nWater.")]
    read = reads.one("my-notes.txt", "A kettle boils.\nWater.\n")
    assert read.title == "my notes" and outline(read) == [((), "A kettle boils.\nWater.")]
    assert outline(reads.one("a.txt", "only this\n")) == [((), "only this")]


def test_markdown_has_headings_and_front_matter(reads):
    text = (
        '---\ntitle: "On kettles"\ntags: [x]\n---\nintro\n\n# Use\nboil\n```\n# no heading\n```\nCare\n---\n\nclean\n'
    )
    read = reads.one("a.md", text)
    assert read.title == "On kettles"
    assert outline(read) == [
        ((), "intro"),
        (("Use",), "boil\n```\n# no heading\n```"),
        (("Use", "Care"), "clean"),
    ]
    read = reads.one("a.md", "# Kettles\n\n## Use ##\nboil\n\nCare\n----\n\nclean\n")
    assert read.title == "Kettles"
    assert outline(read) == [(("Kettles", "Use"), "boil"), (("Kettles", "Care"), "clean")]
    assert [section.line for section in read.sections] == [4, 8]


def test_rst_headings_have_levels_by_their_signs(reads):
    text = "=====\nGuide\n=====\n\nintro\n\nUse\n---\nboil\n\nOn gas\n~~~~~~\nslowly\n\nCare\n----\nclean\n"
    read = reads.one("a.rst", text)
    assert read.title == "Guide"
    assert outline(read) == [
        (("Guide",), "intro"),
        (("Guide", "Use"), "boil"),
        (("Guide", "Use", "On gas"), "slowly"),
        (("Guide", "Care"), "clean"),
    ]
    assert [text.split("\n")[section.line - 1] for section in read.sections] == ["", "boil", "slowly", "clean"]


@pytest.mark.parametrize(
    "text", ["== ==\nab cd\n== ==", "long title\n---", "text\nab\n--", "    code\n    ----", "::\n\n  a\n  =="]
)
def test_what_is_no_rst_heading(text):
    assert not list(rst_headings(text.split("\n")))


def test_rst_is_read_whatever_its_directives_are(reads, tmp_path):
    """Those of Sphinx stay as they are, and none reads a file; the title of a table is no heading."""
    (tmp_path / "other.txt").write_text("Secret\n======\n")
    text = f"Guide\n=====\n\n.. automodule:: kettles\n   :members:\n\n.. include:: {tmp_path}/other.txt\n\n"
    text += ".. list-table:: Sizes\n\n   * - small\n\nSee :func:`boil`\n----------------\n\nWater, :doc:`there`.\n"
    read = reads.one("a.rst", text)
    assert [section.headings for section in read.sections] == [("Guide",), ("Guide", "See :func:`boil`")]
    assert read.sections[0].text.strip() == text.split("=====\n")[1].split("See")[0].strip()


def test_source_code_is_one_section(reads):
    text = '"""Kettles."""\n\ndef boil():\n    return 100\n'
    read = reads.one("boil_it.py", text)
    assert read.title == "boil it" and read.sections == (document.Section((), 1, text),)
    assert reads.reason("a.js", "x" * 2000)[0] == document.GENERATED
    assert reads.reason("a.go", "// Code generated by protoc. DO NOT EDIT.\npackage a\n")[0] == document.GENERATED


# --- HTML -------------------------------------------------------------------------------------------------------------

PAGE = """<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html><head><title>Kettles | Shop</title>
<style>p {color: red}</style></head><body><header>Shop</header><nav><a href="/">Home</a></nav>
before <script>var x;</script>after
<h1>All <em>about</em> kettles</h1><p>A kettle &amp; its
lid<br>shine.</p><div>One<div>Two</div>three</div>
<h2>Use</h2><ul><li>fill</li><li>boil</li></ul><table><tr><th>kind</th><td>price</td></tr></table>
<pre>  a
    b</pre><p hidden>secret</p><footer>Imprint</footer></body></html>"""


def test_html_gives_the_text_without_what_is_around_it(reads):
    read = reads.one("a.html", PAGE)
    assert read.title == "All about kettles" and read.left_out == 3
    assert outline(read) == [
        ((), "before after"),
        (("All about kettles",), "A kettle & its lid\nshine.\nOne\nTwo\nthree"),
        (("All about kettles", "Use"), "- fill\n- boil\nkind | price\na\nb"),
    ]
    assert "  a\n    b" in read.sections[-1].text and "shine.\n\nOne" in read.sections[1].text


def test_html_of_a_page_with_main_or_one_article(reads):
    page = "<title>Kettles</title><div>menu</div><{0}><header><h2>Use</h2></header>boil</{0}><p>below</p>"
    for name in ("main", "article"):
        read = reads.one("a.html", page.format(name))
        assert read.title == "Kettles" and outline(read) == [(("Use",), "boil")]
    assert "below" in reads.one("a.html", "<main> </main><p>below</p>").text
    assert "below" in reads.one("a.html", "<article>a</article><article>b</article><p>below</p>").text


def test_html_in_a_declared_encoding(reads):
    assert reads.one("a.html", '<meta charset="iso-8859-1"><p>caf\xe9 \x80'.encode("latin-1")).text == "café €"
    assert reads.one("a.html", "<meta charset=koi8-r><p>чайник".encode("koi8-r")).text == "чайник"
    for name in ("rot13", "undefined", "idna", "zip", "utf-8", "gb99"):
        assert reads.reason("a.html", f"<meta charset={name}><p>".encode() + b"\xe9")[0] == document.NOT_UTF8


def test_html_nested_deeply_is_read(reads):
    assert "kettle" in reads.one("a.html", "<p>kettle" + "<div>" * 5_000 + "deep").text


@pytest.mark.parametrize("page", ["<html></html>", "<nav>menu</nav>", "<!-- -->", "<p> </p>"])
def test_html_without_text_is_empty(reads, page):
    assert reads.reason("a.html", page)[0] == document.EMPTY


# --- PDF --------------------------------------------------------------------------------------------------------------


def test_pdf_gives_the_text_of_its_pages(reads):
    read = reads.one("a-kettle.pdf", plain_pdf([["A kettle (of steel)", "boils wa-", "ter."], ["It is Hot-", "Cold."]]))
    assert read.title == "a kettle"
    assert outline(read) == [((), "A kettle (of steel)\nboils water.\nIt is Hot-\nCold.")]


def test_bookmarks_are_headings_where_they_stand(reads):
    pages = [["preface"], ["1. Use", "boil", "1.1 On gas", "slowly"], ["clean"]]
    marks = [(1, 1, "Use"), (1, 2, "On gas"), (2, 1, "Care")]
    read = reads.one("a.pdf", pdf(pages, title="Kettles", bookmarks=marks))
    assert read.title == "Kettles"
    assert outline(read) == [
        ((), "preface"),
        (("Use",), "boil"),
        (("Use", "On gas"), "slowly"),
        (("Care",), "clean"),
    ]


def test_running_heads_are_left_out(reads):
    pages = [["KETTLES 2026", f"text {'abc'[i]}", f"page {i + 1} of 3"] for i in range(3)]
    read = reads.one("a.pdf", plain_pdf(pages))
    assert outline(read) == [((), "text a\ntext b\ntext c")] and read.left_out == 6
    lines = [["head", "same", "x", "y", "z", "foot"], ["head", "same"]]
    assert leave_out_running_heads(lines) == 0 and len(lines[0]) == 6  # two pages are too few


def test_pdf_reasons(reads):
    assert reads.reason("a.pdf", pdf([["secret"]], password="word")) == (document.ENCRYPTED, "it needs a password")
    assert outline(reads.one("a.pdf", pdf([["open"]], password=""))) == [((), "open")]
    assert reads.reason("a.pdf", plain_pdf([[], []]))[0] == document.SCANNED
    assert reads.reason("a.pdf", b"no pdf")[0] == document.DAMAGED
    assert reads.reason("a.pdf", plain_pdf([["x"]])[:200])[0] == document.DAMAGED


def test_aes_without_cryptography_is_encrypted(reads, monkeypatch):
    import pypdf
    from pypdf.errors import DependencyError

    def fails(*_, **__):
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fails)
    assert reads.reason("a.pdf", plain_pdf([["x"]]))[0] == document.ENCRYPTED
    monkeypatch.setattr(pypdf, "PdfReader", fails)
    assert reads.reason("a.pdf", plain_pdf([["x"]]))[0] == document.ENCRYPTED


def test_a_damaged_page_is_noted_and_the_others_are_read(reads, monkeypatch):
    import pypdf

    original = pypdf.PageObject.extract_text

    def fails_once(page):
        if "bad" in (text := original(page)):
            raise KeyError("/Font")
        return text

    monkeypatch.setattr(pypdf.PageObject, "extract_text", fails_once)
    (read,), notes = reads("a.pdf", plain_pdf([["good"], ["bad"]]))
    assert outline(read) == [((), "good")] and notes == [(document.DAMAGED, "page", "page 2: '/Font'")]
    assert reads.reason("a.pdf", plain_pdf([["bad"]])) == (document.DAMAGED, "page 1: '/Font'")


def test_a_damaged_title_is_noted_and_the_document_is_read(reads, monkeypatch):
    """Regression: it was given up without a word."""
    import pypdf

    def fails(_):
        raise KeyError("/Info")

    monkeypatch.setattr(pypdf.PdfReader, "metadata", property(fails))
    (read,), notes = reads("a.pdf", plain_pdf([["good"]]))
    assert read.title == "a" and outline(read) == [((), "good")]
    assert notes == [(document.DAMAGED, "declared title", "'/Info'")]


# --- Word -------------------------------------------------------------------------------------------------------------


def test_docx_gives_headings_paragraphs_and_tables(reads):
    data = docx(
        ("Title", "Kettles"),
        ("", "intro"),
        ("Heading 1", "Use"),
        ("", "boil\ttwice"),
        ("Heading 2", "On gas"),
        ("List Bullet", "slowly"),
        [["kind", "price"], ["steel", "20"]],
        ("Heading 1", "Care"),
        ("", "clean"),
        title="Another",
    )
    read = reads.one("a.docx", data)
    assert read.title == "Kettles"
    assert outline(read) == [
        ((), "intro"),
        (("Use",), "boil\ttwice"),
        (("Use", "On gas"), "slowly\nkind | price\nsteel | 20"),
        (("Care",), "clean"),
    ]
    assert reads.one("a.docx", docx(("", "x"), title="On kettles")).title == "On kettles"
    assert reads.one("my_file.docx", docx(("", "x"))).title == "my file"


def test_docx_changes_contents_and_outline_levels(reads):
    body = (
        '<w:p><w:pPr><w:pStyle w:val="TOC1"/></w:pPr><w:r><w:t>Use ... 1</w:t></w:r></w:p>'
        '<w:sdt><w:sdtContent><w:p><w:pPr><w:outlineLvl w:val="1"/></w:pPr><w:r><w:t>Use</w:t></w:r></w:p>'
        "</w:sdtContent></w:sdt>"
        "<w:p><w:ins><w:r><w:t>boil</w:t></w:r></w:ins><w:del><w:r><w:delText>burn</w:delText></w:r></w:del>"
        "<w:r><w:br/><w:t>water</w:t></w:r></w:p>"
        '<w:p><w:pPr><w:outlineLvl w:val="9"/></w:pPr><w:r><w:t>no heading</w:t></w:r></w:p>'
    )
    read = reads.one("a.docx", docx_of(body))
    assert outline(read)[-1] == (("Use",), "boil\nwater\nno heading")


def test_docx_moved_text_is_read_once(reads):
    """Regression: at its old place as well, and so were the tabs and line breaks of deletions."""
    moved = "<w:r><w:t>rinse</w:t></w:r>"
    away, here = f"<w:moveFrom>{moved}</w:moveFrom>", f"<w:moveTo>{moved}</w:moveTo>"
    body = (
        f'<w:p><w:moveFromRangeStart w:id="1" w:name="move1"/>{away}<w:moveFromRangeEnd w:id="1"/></w:p>'
        f"<w:p><w:r><w:t>boil</w:t></w:r>{away}<w:del><w:r><w:tab/><w:br/></w:r></w:del></w:p>"
        f"<w:tbl><w:tr><w:tc><w:p>{away}</w:p></w:tc></w:tr>"
        f"<w:tr><w:tc><w:p>{here}</w:p></w:tc><w:tc><w:p><w:r><w:t>twice</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
    )
    assert outline(reads.one("a.docx", docx_of(body))) == [((), "boil\nrinse | twice")]


def test_docx_reasons(reads, monkeypatch):
    good = docx(("", "text"))
    assert reads.reason("a.docx", docx_files.OLE + b"rest")[0] == document.ENCRYPTED
    assert reads.reason("a.docx", good[: len(good) // 2]) == (document.DAMAGED, "not a whole zip file")
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as packed:
        packed.writestr("a.txt", "text")
    assert reads.reason("a.docx", target.getvalue())[0] == document.DAMAGED
    assert reads.reason("a.docx", docx(("", " ")))[0] == document.EMPTY
    monkeypatch.setattr(docx_files, "MAX_UNPACKED", 1_000)
    assert reads.reason("a.docx", good)[0] == document.TOO_LARGE


# --- tables and JSON --------------------------------------------------------------------------------------------------


def shown(read: list[Document]) -> list[tuple[int, str, str]]:
    return [(row.line, row.title, row.text) for row in read]


def test_each_row_of_a_table_is_a_document(reads):
    read, notes = reads("a.csv", 'name,price,notes\nsteel kettle,20,"boils,\nfast"\n\ncopper kettle,,\n')
    assert shown(read) == [(2, "steel kettle", "price: 20\nnotes: boils,\nfast"), (5, "", "copper kettle")]
    read, _ = reads("a.tsv", "id\ttitle\ttext\n1\tKettles\tA kettle boils.\n2\tPots\tA pot cooks well.\n")
    assert shown(read) == [(2, "Kettles", "A kettle boils."), (3, "Pots", "A pot cooks well.")]
    assert [row.row_id for row in read] == ["1", "2"] and not notes


def test_tables_of_other_kinds(reads):
    read, _ = reads("a.csv", "sep=;\nquestion;answer\nWhat boils?;A kettle, of course.\n")
    assert shown(read) == [(3, "What boils?", "A kettle, of course.")]
    read, _ = reads("a.csv", "A kettle boils water on any stove.\nA pot cooks soup.\n")  # one column, no header
    assert [row.text for row in read] == ["A kettle boils water on any stove.", "A pot cooks soup."]


def test_a_broken_row_of_a_table_is_noted(reads):
    words = "a good text of many words"
    read, notes = reads("a.csv", f'title,text\nA,"one" two\nB,{words}\nC,{words} again\n')
    assert shown(read) == [(3, "B", words), (4, "C", f"{words} again")]
    assert [(reason, noun) for reason, noun, _ in notes] == [(document.DAMAGED, "row")]
    assert notes[0][2].startswith("line 2: ")


def test_json_lines_and_arrays(reads):
    rows = [
        {"_id": "k", "title": "Kettles", "text": "A kettle boils.", "url": "https://a"},
        {"author": {"name": "Ann", "id": 3}, "tags": ["hot", "wet"], "ok": True, "none": None, "link": "https://a"},
        "a text alone",
        {"id": 3},
    ]
    expected = [
        ("k", "Kettles", "A kettle boils."),
        ("", "", "author.name: Ann\nauthor.id: 3\ntags: hot\ntags: wet"),
        ("", "", "a text alone"),
    ]
    for data in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows, indent=1)):
        read, notes = reads("a.json", data)
        assert [(row.row_id, row.title, row.text) for row in read] == expected and not notes
    assert len(reads("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))[0]) == 3


def test_a_json_object_over_several_lines_is_one_document(reads):
    read = reads.one("my_kettle.json", json.dumps({"kind": "steel", "litres": 1.5, "parts": ["lid"]}, indent=2))
    assert (read.line, read.title, read.text) == (0, "my kettle", "kind: steel\nlitres: 1.5\nparts: lid")


def test_broken_json_is_noted(reads):
    read, notes = reads("a.jsonl", b'{"text": "one two"}\n{"text": \n{"text": "\xff"}\n')
    assert [row.text for row in read] == ["one two"]
    assert [(reason, noun, detail[:7]) for reason, noun, detail in notes] == [
        (document.DAMAGED, "row", "line 2:"),
        (document.NOT_UTF8, "row", "line 3:"),
    ]
    assert reads.reason("a.jsonl", '{"text": \nx\n')[0] == document.DAMAGED
    assert reads.reason("a.jsonl", '{"text": ""}\n')[0] == document.EMPTY
    packed = gzip.compress(b'{"text": "one two"}\n' * 1_000)
    assert reads.reason("a.jsonl.gz", packed[:20])[0] == document.DAMAGED
    assert reads.reason("a.jsonl.gz", b"no gzip")[0] == document.DAMAGED


# --- bytes of any kind ------------------------------------------------------------------------------------------------

SAMPLES = {
    ".md": lambda: b"---\ntitle: a\n---\n# A\ntext\n\nB\n---\nmore\n",
    ".txt": lambda: b"Title\n\ntext\n",
    ".rst": lambda: b"A\n=\n\ntext\n",
    ".py": lambda: b"def f():\n    return 1\n",
    ".html": lambda: PAGE.encode(),
    ".csv": lambda: b'title,text\nA,"one\ntwo"\n',
    ".jsonl": lambda: b'{"title": "A", "text": "one"}\n[1, {"a": "b"}]\n',
    ".jsonl.gz": lambda: gzip.compress(b'{"title": "A", "text": "one"}\n', mtime=0),
    ".pdf": lambda: pdf([["one"], ["two"]], title="A", bookmarks=[(0, 1, "one")]),
    ".docx": lambda: docx(("Heading 1", "A"), ("", "text"), [["a", "b"]]),
}


@functools.cache
def sample_of(suffix: str) -> bytes:
    return SAMPLES[suffix]()


@pytest.mark.parametrize("suffix", SAMPLES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_of_any_kind_are_read_or_have_a_reason(tmp_path, suffix, data):
    """Random bytes, and samples in which some bytes are others or missing: never another exception."""
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=60))
    else:
        content = bytearray(sample_of(suffix))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.sampled_from([0, 1, 1, 20]))] = data.draw(st.binary(max_size=3))
            content = content or bytearray(b" ")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(content))
    notes = []
    try:
        read = list(read_file(path, path.name, lambda *note: notes.append(note)))
    except UnreadableError as error:
        assert error.reason in REASONS and isinstance(error.detail, str)
        return
    assert read and all(one.text.strip() and (one.title or one.line) for one in read)
    assert all(reason in REASONS for reason, _, _ in notes)
    for one in read:
        one.text.encode()
        one.title.encode()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
@example(text="a\x0bb\u2028c\r\nd\n# A\n\x85e")
def test_lines_of_texts_are_those_of_the_file(tmp_path, text):
    """Whatever else Python or Unicode take for a line end."""
    path = tmp_path / "a.md"
    path.write_bytes(text.encode())
    try:
        (read,) = read_file(path, path.name, print)
    except UnreadableError:
        return
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for section in read.sections:
        for line, expected in zip(section.text.split("\n"), lines[section.line - 1 :], strict=False):
            assert [*filter(str.isalnum, line)] == [*filter(str.isalnum, expected)]
