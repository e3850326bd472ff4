"""Chunks: whole functions and classes with exact lines, and nothing lost.

python -m pytest tests/dataset/test_chunks.py
"""

import itertools
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_retrieval.dataset import chunks
from mlx_retrieval.dataset.chunks import chunk_file

# One definition a language, with what belongs to it: its first and last line, its kind and its name.
SNIPPETS = {
    "a.py": ("import os\n\n\n# halves\n@cache\ndef half(x):\n    return x / 2\n", 1, 7, "function", "half"),
    "a.rs": ("/// Halves.\n#[inline]\nfn half(x: f32) -> f32 {\n    x / 2.0\n}\n", 1, 5, "function", "half"),
    "A.java": ("/** Holds. */\nclass Box {\n  int half(int x) { return x / 2; }\n}\n", 1, 4, "class", "Box"),
    "a.ts": ("// halves\nexport function half(x: number) {\n  return x / 2;\n}\n", 1, 4, "function", "half"),
    "a.tsx": ("export const Half = (x: number) => <b>{x / 2}</b>;\n", 1, 1, "function", "Half"),
    "a.js": ("const half = (x) => {\n  return x / 2;\n};\n", 1, 3, "function", "half"),
    "a.swift": ("/// Halves.\nfunc half(x: Int) -> Int {\n    return x / 2\n}\n", 1, 4, "function", "half"),
    "a.c": ("/* halves */\nint half(int x) {\n    return x / 2;\n}\n", 1, 4, "function", "half"),
    "a.cpp": ("template <class T>\nT half(T x) {\n    return x / 2;\n}\n", 1, 4, "function", "half"),
    "a.m": ("@implementation Box\n- (int)half {\n    return 2;\n}\n@end\n", 1, 5, "class", "Box"),
    "a.go": ("// Half halves.\nfunc Half(x int) int {\n\treturn x / 2\n}\n", 1, 4, "function", "Half"),
}


def check(path: str, text: str, **limits) -> list[chunks.Chunk]:
    """Cut, and see that every chunk is what stands in its lines, and that no line is lost."""
    lines, found, seen = text.split("\n"), chunk_file(path, text, **limits), set()
    limit = limits.get("limit", chunks.MAX_CHARACTERS)
    for chunk in found:
        body = "\n".join(lines[chunk.line - 1 : chunk.end_line])
        assert chunk.text == body or (chunk.line == chunk.end_line and len(body) > limit and chunk.text in body)
        assert chunk.text.strip() and len(chunk.text) <= limit
        seen.update(range(chunk.line, chunk.end_line + 1))
    assert {number for number, line in enumerate(lines, 1) if line.strip()} <= seen
    return found


@pytest.mark.parametrize("path", SNIPPETS)
def test_a_definition_of_every_language(path):
    text, line, end_line, kind, name = SNIPPETS[path]
    chunk = check(path, text)[-1]
    assert (chunk.line, chunk.end_line, chunk.kind, chunk.name) == (line, end_line, kind, name)


def test_functions_classes_and_what_is_between():
    text = textwrap.dedent(
        '''\
        """A module."""
        import os
        import sys

        LIMIT = 3

        def first():
            return 1

        # About the second.
        class Second:
            def method(self):
                return 2

        if __name__ == "__main__":
            first()
            sys.exit()
        '''
    )
    found = [(c.line, c.end_line, c.kind, c.name, c.context) for c in check("a.py", text)]
    assert found == [
        (1, 5, "module", "", ""),
        (7, 8, "function", "first", ""),
        (10, 13, "class", "Second", ""),
        (15, 17, "module", "", ""),
    ]


def test_lines_too_few_to_stand_alone_belong_to_what_follows():
    text = "X = 1\n\ndef f():\n    return 1\n\nY = 2\n\ndef g():\n    return 2\n\nZ = 3\n"
    assert [(c.line, c.end_line, c.name) for c in check("a.py", text)] == [(1, 4, "f"), (6, 11, "g")]


def test_a_long_class_gives_its_methods_with_its_head():
    body = "        return " + " + ".join(["value"] * 20)
    methods = [f"    def method_{i}(self):\n{body}" for i in range(4)]
    text = "class Long(Base):\n    a = 1\n    b = 2\n\n" + "\n\n".join(methods) + "\n"
    found = check("a.py", text, limit=300, overlap=0)
    assert [(c.line, c.end_line, c.kind, c.name) for c in found] == [
        (1, 3, "class", "Long"),
        *((5 + 3 * i, 6 + 3 * i, "function", f"Long.method_{i}") for i in range(4)),
    ]
    assert [c.context for c in found] == ["", *["class Long(Base):"] * 4]
    assert found[1].embedded == f"class Long(Base):\n{methods[0]}"


def test_a_long_function_is_cut_by_lines_with_overlap():
    text = "def long():\n" + "".join(f"    step_{i:02d}()\n" for i in range(40))
    found = check("a.py", text, limit=200, overlap=40)
    assert len(found) > 3 and {c.name for c in found} == {"long"}
    assert found[0].context == "" and {c.context for c in found[1:]} == {"def long():"}
    for before, after in itertools.pairwise(found):
        assert before.end_line - after.line + 1 == 2  # lines of 14 characters and their ends: two in 40
    apart = check("a.py", text, limit=200, overlap=0)
    assert all(before.end_line + 1 == after.line for before, after in itertools.pairwise(apart))


def test_markdown_is_cut_at_headings_but_not_in_fences():
    text = "intro\n\n# One\ntext\n\n```sh\n# no heading\n```\n## Two ##\nmore\n\n# Three\n"
    found = check("a.md", text)
    assert [(c.line, c.end_line, c.kind, c.name) for c in found] == [
        (1, 1, "section", ""),
        (3, 8, "section", "One"),
        (9, 10, "section", "One > Two"),
        (12, 12, "section", "Three"),
    ]
    long = check("a.md", "## Title\n" + "word word\n" * 30, limit=100, overlap=0)
    assert {c.name for c in long} == {"Title"} and [c.context for c in long[:2]] == ["", "## Title"]


def test_text_is_cut_between_paragraphs():
    text = "\n\n".join(f"paragraph {i}\n" + "word " * 15 for i in range(6)) + "\n"
    found = check("notes.txt", text, limit=200, overlap=0)
    assert [c.line for c in found] == [1, 7, 13] and {c.kind for c in found} == {"text"}


def test_a_line_longer_than_a_chunk():
    text = "short\n" + "word " * 100 + "\n" + "x" * 250 + "\nend\n"
    found = check("a.txt", text, limit=100, overlap=20)
    assert sum(len(c.text.split()) for c in found if c.line == c.end_line == 2) == 100
    assert [len(c.text) for c in found if c.line == 3] == [100, 100, 50]


def test_without_its_grammar_a_file_is_cut_as_text(monkeypatch):
    monkeypatch.setattr(chunks, "has_grammar", lambda language: False)
    assert [c.kind for c in check("a.py", SNIPPETS["a.py"][0])] == ["text"]
    assert chunks.missing_grammar("a.py") == "tree-sitter-python" and chunks.missing_grammar("a.txt") == ""


def test_definitions_that_share_a_line_are_one_chunk():
    found = check("a.js", "function f() { return 1; } function g() {\n  return 2;\n}\nfunction h() {}\n")
    assert [(c.line, c.end_line) for c in found] == [(1, 3), (4, 4)]


def test_broken_code_loses_nothing():
    check("a.py", "def f(:\n    return (\n\nclass {}\n" + "x = [1,\n" * 5)
    check("a.cpp", "class A {\n  void f( {\n#if 1\n}\n#else\n}}\n#endif\n")


LINES = st.sampled_from(
    ["", "    x = 1", "def f():", "class A:", "    def m(self):", "        return 2", "# c", "}", "@d"]
)


@given(st.lists(LINES, max_size=40), st.integers(8, 120), st.integers(0, 60))
def test_any_lines_are_cut_without_loss(lines, limit, overlap):
    text = "\n".join(lines)
    for path in ("a.py", "a.md", "a.txt"):
        if text.strip():
            check(path, text, limit=max(limit, overlap + 1), overlap=overlap)


def test_markdown_headings_may_be_underlined():
    text = "---\ntitle: A guide\n# a comment\n---\n\nGuide\n=====\n\nUse\n---\ntext\n---\n\n- item\n---\n| a |\n---\n"
    found = check("a.md", text)
    names = ["", "Guide", "Guide > Use", "Guide > text"]
    assert [(c.line, c.name) for c in found] == list(zip([1, 6, 9, 11], names, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "```\n# code\n```",
        "~~~ sh\n# code\n```\n# code\n~~~",
        "    # code",
        "<!--\n# comment\n-->",
        "<details>\n# as it is\n</details>",
        "a | b\n--- | ---\n1 | 2",
        "- # in a list",
        "> # quoted\n> ---",
        "#no space",
        "####### seven",
        "***\n---",
        "\\# escaped",
    ],
)
def test_what_is_no_markdown_heading(text):
    assert not list(chunks.markdown_headings(text.split("\n")))


def test_markdown_headings_of_every_form():
    text = "# One #\n   ###   Three `x` ###\ntwo\nlines\n===\n#\n"
    found = [tuple(heading) for heading in chunks.markdown_headings(text.split("\n"))]
    assert found == [(0, 1, 1, "One"), (1, 2, 3, "Three `x`"), (2, 5, 1, "two lines"), (5, 6, 1, "")]


def test_a_row_of_dashes_at_the_top_is_front_matter_only_if_keys_follow_and_it_ends():
    assert chunks.front_matter(["---", "title: x", "---", "text"]) == 3
    assert chunks.front_matter(["---", "title: x", "text"]) == 0
    assert chunks.front_matter(["---", "# Heading", "---"]) == 0
    assert [h.title for h in chunks.markdown_headings(["---", "# Heading", "text", "---"])] == ["Heading", "text"]
