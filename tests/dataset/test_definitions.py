"""Definitions of every language: the exact query, the exact document, the name and the line.

python -m pytest tests/dataset/test_definitions.py
"""

import ast
import sysconfig
from pathlib import Path

import pytest
from code_samples import SAMPLES, expected

from mlx_retrieval.dataset.source_code import languages
from mlx_retrieval.dataset.source_code.definitions import definitions
from mlx_retrieval.dataset.source_code.languages import LANGUAGES, check_grammars, language_of
from mlx_retrieval.mining.code_pairs import Rules, pairs
from mlx_retrieval.utils.errors import UserError


@pytest.mark.parametrize("file", SAMPLES)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_query_document_name_and_line(tmp_path, file, ends):
    source, expectation = SAMPLES[file]
    (tmp_path / file).write_bytes(source.replace("\n", ends).encode())
    # Duplicates: a class of one method resembles it.
    found = list(pairs([tmp_path], Rules(keep_duplicates=True)))
    assert [(pair.name, pair.line, pair.query, pair.positive) for pair in found] == expected(expectation)
    assert {pair.path for pair in found} == {file}
    language = "cpp" if file == "ring.h" else language_of(file).name
    assert {pair.language for pair in found} == {language}


def test_every_language_is_tested():
    tested = {"cpp" if file == "ring.h" else language_of(file).name for file in SAMPLES}
    assert tested == set(LANGUAGES)


def test_a_header_is_what_its_lines_say():
    assert language_of("a.h").name == "c"
    assert language_of("a.h", b"int f(void);\n").name == "c"
    assert language_of("a.h", b"// x\n@interface Foo : NSObject\n@end\n").name == "objc"
    assert language_of("a.h", b"#pragma once\n  namespace a {\n}\n").name == "cpp"
    assert language_of("a.txt") is None


@pytest.mark.parametrize("folder", ["json", "email", "concurrent"])
def test_documents_of_real_code_are_sound_python_without_docstrings(folder):
    found = list(pairs([Path(sysconfig.get_paths()["stdlib"]) / folder], Rules(keep_duplicates=True)))
    assert len(found) > 10
    for pair in found:
        tree = ast.parse(pair.positive)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)], pair.name
        first = tree.body[0]
        assert isinstance(first, kinds) and first.name == pair.name.rpartition(".")[2]


def found_in(source: str, language: str):
    return definitions(source.encode(), LANGUAGES[language])


def test_a_comment_must_be_directly_above():
    apart = "// Adds two numbers up.\n\nfunc Add(a, b int) int {\n\treturn a + b\n}\n"
    assert found_in("package a\n" + apart, "go")[0].doc == ""
    assert found_in("package a\n" + apart.replace("\n\n", "\n"), "go")[0].doc == " Adds two numbers up."


def test_the_comment_behind_another_statement_is_none():
    (found,) = found_in("int x; // how many there are\nint f(void) { return x + 1; }\n", "c")
    assert found.doc == ""


def test_a_group_shares_no_comment():
    source = "// Both of them together.\nconst a = () => { go(1); }, b = () => { go(2); };\n"
    assert [found.doc for found in found_in(source, "javascript")] == ["", ""]


def test_a_docstring_alone_leaves_an_ellipsis():
    source = 'class A:\n    """One two three."""\n\n    def f(self):\n        """Four five six."""\n'
    first, second = found_in(source, "python")
    assert first.code == "class A:\n    def f(self):\n        ..."
    assert second.code == "def f(self):\n    ..."


@pytest.mark.parametrize(
    "text", ['f"Three {words} here"', 'b"Three words here"', '1, "Three words here"', 'x = "Three words here"', '"  "']
)
def test_what_is_no_docstring(text):
    (found,) = found_in(f"def f(words):\n    {text}\n    return words + 1\n", "python")
    assert found.doc == "" and text in found.code


def test_joined_and_escaped_docstrings():
    (found,) = found_in("def f(a):\n    \"Caf\\u00e9 \" 'au lait'\n    return a + 1\n", "python")
    assert found.doc == "Café au lait" and found.code == "def f(a):\n    return a + 1"


def test_a_backslash_that_is_no_escape_does_no_harm():
    (found,) = found_in('def f(a):\n    "Find \\d in it."\n    return a + 1\n', "python")
    assert found.doc == "Find \\d in it."


def test_the_comment_of_a_rust_file_is_not_its_first_functions():
    (found,) = found_in("//! All about numbers.\nfn f(x: u8) -> u8 {\n    x + 1\n}\n", "rust")
    assert found.doc == ""


def test_names_leave_out_what_has_none():
    (found,) = found_in("namespace a {\nnamespace {\nint f(int x) { return x; }\n}\n}\n", "cpp")
    assert found.name == "a.f"


def test_lean_blocks_that_end_do_not_end_the_namespace():
    source = "namespace A\nmutual\ndef b := 1\nend\nsection C\ndef d := 1\nend C\ndef e := 1\nend A\ndef f := 1\n"
    assert [found.name for found in found_in(source, "lean")] == ["A.b", "A.d", "A.e", "f"]


def test_only_the_broken_definition_is_broken():
    source = "def f():\n    return 1\n\ndef g():\n    return 2 $ 3\n\ndef h():\n    return 3\n"
    broken = {found.name: found.is_broken for found in found_in(source, "python")}
    assert broken == {"f": False, "g": True, "h": False}


@pytest.mark.parametrize("file", SAMPLES)
def test_half_a_file_breaks_nothing(file):
    source = SAMPLES[file][0].encode()
    for end in range(0, len(source), 11):
        part = source[:end].decode("utf-8", "ignore")
        for found in definitions(part.encode(), language_of(file, source)):
            assert found.name and 1 <= found.line <= part.count("\n") + 1


def test_missing_grammars_are_all_named(monkeypatch):
    absent = ("tree_sitter_rust", "tree_sitter_swift")
    real = languages.importlib.util.find_spec
    monkeypatch.setattr(languages.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    check_grammars([LANGUAGES["python"], LANGUAGES["lean"]])
    with pytest.raises(UserError) as caught:
        check_grammars([LANGUAGES[name] for name in ("swift", "python", "rust")])
    assert "pip install tree-sitter-rust tree-sitter-swift" in str(caught.value)
    assert "--languages python" in str(caught.value)


def test_only_the_grammars_that_are_met_are_imported(run_python, tmp_path):
    (tmp_path / "a.py").write_text('def f(x):\n    "Add one to it."\n    return x + 1\n')
    code = (
        "import sys; from mlx_retrieval.mining.code_pairs import pairs; print(len(list(pairs(sys.argv[1:]))));"
        "print(*sorted(m for m in sys.modules if m.startswith('tree_sitter_') and '.' not in m))"
    )
    assert run_python(code, tmp_path).stdout.split() == ["1", "tree_sitter_python"]
