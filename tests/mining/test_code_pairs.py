"""Mining code pairs: a snippet for every rule, duplicates, order, and the command.

python -m pytest tests/mining/test_code_pairs.py
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import mine
from mlx_retrieval.dataset.near_duplicates import NearDuplicates, jaccard, runs_of, tokens_of
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.mining.code_pairs import FILE_REASONS, REASONS, Counts, Rules, pairs

GOOD = '''
def middle(left, right):
    """Find the point halfway between two."""
    width = right - left
    return left + width / 2
'''


@pytest.fixture
def tree(tmp_path):
    """`tree({"a/b.py": text or bytes})` writes files below one folder and returns it."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, text in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "tree"

    return write


def mined(folder: Path, **rules) -> tuple[list, Counts]:
    counts = Counts()
    return list(pairs([folder], Rules(**rules), counts)), counts


def function(number: int, doc: str = "", steps: int = 6) -> str:
    """A function unlike those of other numbers."""
    body = "".join(f"    a{number}_{i} = b{number}_{i} ** c{number}_{i}\n" for i in range(steps))
    return f'def f{number}(x):\n    """{doc or f"Compute the value number {number}."}"""\n{body}    return x\n\n'


# --- rules that look at one definition ---

LEFT_OUT = [
    ("no docstring", "a.py", "def f(x):\n    y = x + 1\n    return y * 2\n"),
    ("docstring too short", "a.py", 'def f(x):\n    """Add one."""\n    return x + 1 + g(x)\n'),
    ("docstring too short", "a.py", 'def f(x):\n    """\n    Args:\n        x: the number"""\n    return x + g(x)\n'),
    ("docstring no prose", "a.py", 'def f(x):\n    """TODO: describe what this does."""\n    return x + g(x)\n'),
    ("docstring no prose", "a.c", "/* Copyright 2020 The Authors of this */\nint f(void) {\n  return g(1) + 2;\n}\n"),
    ("docstring no prose", "a.js", "// return go(a, b) || 1;\nfunction f(a) {\n  return g(a) + h(a);\n}\n"),
    ("syntax error", "a.py", 'def f(x):\n    """Add one to it."""\n    return x + 1 $ 2\n'),
    ("trivial body", "a.py", 'def f(x):\n    """Do nothing with it."""\n'),
    ("trivial body", "a.py", 'def f(x):\n    """Do nothing with it."""\n\n    # nothing\n    pass\n'),
    ("trivial body", "a.py", 'def f(self):\n    """Return the name of it."""\n    return self._name\n'),
    ("trivial body", "a.py", 'def f(self, x):\n    """Set the name of it."""\n    self._name = x\n'),
    ("trivial body", "a.py", 'def f(self):\n    """Say how it is called."""\n    return "mine"\n'),
    ("trivial body", "a.py", 'def f(x):\n    """Left to do."""\n    raise NotImplementedError("f of " + str(x))\n'),
    ("trivial body", "a.py", 'class A(ValueError):\n    """An error of this kind."""\n\n    code = 3\n'),
    ("trivial body", "a.rs", "/// Says how long it is.\nfn f(&self) -> usize {\n    self.length\n}\n"),
    ("trivial body", "a.rs", "/// Says how long it is.\nfn f(&self) -> usize {\n    todo!(\"a\")\n}\n"),
    ("trivial body", "A.java", "class A {\n  /** Sets its name. */\n  void f(int n) {\n    this.name = n;\n  }\n}\n"),
    ("trivial body", "a.h", "/** Says it on one line. */\nstatic inline int f(int x) { return g(x) + h(x); }\n"),
    ("too long", "a.py", function(1, steps=150)),
    ("too long", "a.py", 'def f(x):\n    """Add one to it."""\n' + f'    x = g("{"y" * 900}")\n' * 25),
    ("test function", "a.py", 'def test_f(x):\n    """Look whether it is right."""\n    y = f(x)\n    assert y == 2\n'),
    ("test function", "a.js", "// Look whether it is so.\nfunction testAll() {\n  check(f(1));\n  check(f(2));\n}\n"),
    ("test function", "a.rs", "/// Looks whether it holds.\n#[test]\nfn holds() {\n    check(1);\n    check(2);\n}\n"),
    ("test function", "a.rs", "mod tests {\n/// Sees that it holds.\nfn holds() {\n    one();\n    two();\n}\n}\n"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "name", "source"), LEFT_OUT)
def test_a_definition_that_is_left_out(tree, reason, name, source):
    found, counts = mined(tree({name: source, "good.py": GOOD}))
    assert [pair.name for pair in found] == ["middle"]
    assert counts.left_out[reason] == 1
    assert counts.definitions.total() == counts.pairs.total() + counts.left_out.total()


def test_all_reasons_are_tested():
    duplicates = {"exact duplicate", "near duplicate", "same query"}
    assert {reason for reason, _, _ in LEFT_OUT} | duplicates == set(REASONS)


@pytest.mark.parametrize(
    "body",
    [
        "    return self.a + self.b\n",
        "    return go(self.a, 1)\n",
        "    raise ValueError(x)\n",
        "    self.a = go(x)\n",
        "    self.a = x\n    self.b = x\n",
        "    yield from self.a\n",
    ],
)
def test_bodies_that_are_not_trivial(tree, body):
    found, _ = mined(tree({"a.py": f'def f(self, x):\n    """Do this and that."""\n{body}'}))
    assert [pair.positive for pair in found] == [f"def f(self, x):\n{body.rstrip()}"]


def test_lines_of_code_are_counted_without_blanks_and_comments(tree):
    folder = tree({"a.py": 'def f(x):\n    """Add one to it."""\n\n    # why\n    y = g(x)\n\n    return y + 1\n'})
    for least, most, expected in ((3, 3, 1), (4, 9, 0), (1, 2, 0)):
        assert len(mined(folder, min_lines=least, max_lines=most)[0]) == expected


def test_code_in_other_scripts_stays(tree):
    found, _ = mined(
        tree({"a.py": 'def f(x):\n    """计算两个向量的距离。"""\n    größe = x ** 2\n    return größe + 1\n'})
    )
    assert found[0].query == "计算两个向量的距离。" and "größe" in found[0].positive


# --- rules that look at files ---

FILES_LEFT_OUT = [
    ("folder of tests", "tests/a.py", GOOD),
    ("folder of tests", "src/__tests__/a.py", GOOD),
    ("test file", "test_a.py", GOOD),
    ("test file", "a_test.py", GOOD),
    ("test file", "conftest.py", GOOD),
    ("test file", "a.spec.ts", "x"),
    ("test file", "ATest.java", "x"),
    ("folder of builds or of others' code", "node_modules/a.py", GOOD),
    ("folder of builds or of others' code", "a/.git/a.py", GOOD),
    ("folder of builds or of others' code", "a/target/a.py", GOOD),
    ("not UTF-8", "a.py", GOOD.encode() + "# café\n".encode("latin-1")),
    ("generated or minified", "a.py", "# Generated by a tool.\n" + GOOD),
    ("generated or minified", "a.py", "# Code of the parser, generated from a.g\n" + GOOD),
    ("generated or minified", "a.py", '"""@generated"""\n' + GOOD),
    ("generated or minified", "a.py", "# This file: do not edit!\n" + GOOD),
    ("generated or minified", "a.py", f"x = '{'y' * 1_000}'\n" + GOOD),
    ("over 2 MB", "a.py", GOOD + "# more\n" * 300_000),
    ("ignored by .gitignore", "a/skip.py", GOOD),
    ("ignored by .gitignore", "skipped/b/a.py", GOOD),
]


@pytest.mark.parametrize(("reason", "name", "source"), FILES_LEFT_OUT)
def test_a_file_that_is_left_out(tree, reason, name, source):
    folder = tree({name: source, "good.py": function(1), ".gitignore": "skip.py\n/skipped/\n"})
    found, counts = mined(folder)
    assert [pair.path for pair in found] == ["good.py"]
    assert counts.left_out_files == {reason: 1}
    assert counts.files == {"python": 1}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("contest.py", GOOD),
        ("latest/attest.py", GOOD),
        ("a.py", "# A reader of the tables that were generated by gen.py\n" + GOOD),
        ("a.py", "\n" * 10 + "# Generated by a tool.\n" + GOOD),
        ("a.py", GOOD + f"# {'y' * 990}\n"),
        ("api_spec.py", GOOD),
        ("a.lean", "\ufeff/-- Three words here. -/\ndef a : Nat :=\n  b + c\n"),
    ],
)
def test_a_file_that_only_looks_like_it(tree, name, source):
    found, counts = mined(tree({name: source}))
    assert [pair.path for pair in found] == [name] and not counts.left_out_files


def test_links_and_files_without_permission(tree):
    folder = tree({"a.py": function(1), "b.py": function(2)})
    (folder / "c.py").symlink_to(folder / "a.py")
    (folder / "sub").symlink_to(folder)
    reads = Path.read_bytes

    def refuse(path: Path) -> bytes:  # the tests may run as root, whom no permission stops
        if path.name == "b.py":
            raise PermissionError
        return reads(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        found, counts = mined(folder)
    assert [pair.path for pair in found] == ["a.py"]
    assert counts.left_out_files == {"symbolic link": 1, "unreadable": 1}


def test_all_file_reasons_are_tested():
    elsewhere = {"symbolic link", "unreadable"}
    assert {reason for reason, _, _ in FILES_LEFT_OUT} | elsewhere == set(FILE_REASONS)


def test_a_deeper_gitignore_wins(tree):
    files = {".gitignore": "*.py\n!/a.py\n", "sub/.gitignore": "!b.py\n"}
    sources = {name: function(i) for i, name in enumerate(("a.py", "b.py", "sub/b.py", "sub/c.py"))}
    found, _ = mined(tree(files | sources))
    assert [pair.path for pair in found] == ["a.py", "sub/b.py"]


def test_an_ignored_folder_counts_once(tree):
    folder = tree({".gitignore": "made/\n", "made/a.py": function(1), "made/b.py": function(2), "c.py": GOOD})
    assert mined(folder)[1].left_out_files == {"ignored by .gitignore": 1}


def test_lines_of_gitignore_that_are_no_patterns(tree):
    folder = tree({"a.py": GOOD, "b.py": function(1), ".gitignore": "!\n/\n# b.py\na.py\n", "c/d.py": function(2)})
    os.mkdir(folder / "c" / ".gitignore")
    assert [pair.path for pair in mined(folder)[0]] == ["b.py", "c/d.py"]


def test_virtual_environments_are_known_by_their_file(tree):
    folder = tree({"env/pyvenv.cfg": "home = x\n", "env/a.py": GOOD, "venv/b.py": function(1)})
    found, counts = mined(folder)
    assert [pair.path for pair in found] == ["venv/b.py"] and counts.left_out_files.total() == 1


def test_include_tests(tree):
    source = 'def test_f(x):\n    """Look whether it is right."""\n    y = f(x)\n    assert y == 2\n'
    folder = tree({"tests/test_a.py": source})
    assert len(mined(folder)[0]) == 0 and len(mined(folder, include_tests=True)[0]) == 1


def test_the_paths_that_are_given_are_not_judged(tree):
    folder = tree({"vendor/tests/test_a.py": GOOD, "vendor/tests/b.py": function(1)})
    assert [pair.path for pair in pairs([folder / "vendor" / "tests" / "test_a.py"])] == ["test_a.py"]
    assert [pair.path for pair in pairs([folder / "vendor" / "tests"])] == ["b.py"]


def test_several_paths_keep_apart(tree):
    folder = tree({"a/src/x.py": function(1), "b/src/x.py": function(2), "c/x.py": function(3)})
    both = [folder / "b" / "src", folder / "a" / "src", folder / "a"]
    assert [pair.path for pair in pairs(both)] == ["a/src/x.py", "b/src/x.py"]


def test_languages(tree):
    folder = tree(
        {"a.py": GOOD, "a.go": "package a\n\n// Add adds a to b.\nfunc Add(a, b int) int {\n\treturn a + b\n}\n"}
    )
    assert {pair.language for pair in mined(folder)[0]} == {"python", "go"}
    found, counts = mined(folder, languages=("go",))
    assert [pair.name for pair in found] == ["Add"] and counts.files == {"go": 1}


# --- duplicates and order ---


def test_duplicates(tree):
    first = function(1, steps=20)
    copy = first.replace("Compute", "Tell").replace("    return x", "\n    return  x")
    like = first.replace("Compute", "Nearly compute").replace("b1_5", "other")
    folder = tree({"a.py": first, "b.py": copy, "c.py": like, "d.py": function(2, doc="COMPUTE the  value number 1.")})
    found, counts = mined(folder)
    assert [pair.path for pair in found] == ["a.py"]
    assert counts.left_out == {"exact duplicate": 1, "near duplicate": 1, "same query": 1}
    found, counts = mined(folder, keep_duplicates=True)
    assert len(found) == 4 and not counts.left_out


def test_a_pair_that_was_left_out_makes_no_duplicate(tree):
    """Bug guarded against: a query whose pair was left out for its code counted as seen."""
    second = function(1, doc="Something about it all.")
    folder = tree({"a.py": function(1), "b.py": second, "c.py": function(3, doc="Something about it all.")})
    assert [pair.path for pair in mined(folder)[0]] == ["a.py", "c.py"]


def test_similarity_is_that_of_sets_of_runs():
    rng = np.random.default_rng(5)
    words = [f"w{i}" for i in rng.integers(0, 10**6, 2_000)]
    for changed in (0, 20, 60, 150, 2_000):
        other = list(words)
        for i in rng.choice(2_000, changed, replace=False):
            other[i] = f"v{i}"
        runs = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (words, other)]
        assert jaccard(runs_of(words), runs_of(other)) == len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_candidates_are_compared_exactly():
    """A pair just below the threshold is kept and one just above is not: no estimate decides."""
    words = [f"w{i}" for i in range(104)]  # 100 runs
    for changed, expected in ((2, "near duplicate"), (3, "")):  # each in five runs: 90 / 110 = 0.82, 85 / 115 = 0.74
        other = [f"v{i}" if i in (10, 30, 50)[:changed] else word for i, word in enumerate(words)]
        seen = NearDuplicates()
        assert [seen.add(" ".join(text)) for text in (words, other, words)] == ["", expected, "exact duplicate"]


def test_near_duplicates_are_found_around_the_threshold():
    rng = np.random.default_rng(6)
    outcomes = {}
    for changed in (1, 12):  # of 200 tokens, each in five runs: a Jaccard similarity of 0.95 and of about 0.55
        outcomes[changed] = 0
        for _ in range(20):
            seen = NearDuplicates()
            words = [f"w{i}" for i in rng.integers(0, 10**6, 200)]
            assert seen.add(" ".join(words)) == ""
            for i in rng.choice(200, changed, replace=False):
                words[i] = "other"
            outcomes[changed] += seen.add(" ".join(words)) == "near duplicate"
    assert outcomes == {1: 20, 12: 0}


def test_short_and_empty_texts_have_runs():
    assert runs_of([]).shape == runs_of(["a"]).shape == (1,)
    assert jaccard(runs_of(["a"]), runs_of(["b"])) == 0 and jaccard(runs_of([]), runs_of([])) == 1
    assert tokens_of("a_1 += f(x)") == ["a_1", "+", "=", "f", "(", "x", ")"]
    assert tokens_of("水壶a_1 か.") == ["水", "壶", "a_1", "か", "."]


def test_order_is_that_of_paths_and_lines(tree):
    names = ["b.py", "a/z.py", "a/b/c.py", "a.py"]
    folder = tree({name: function(2 * i) + function(2 * i + 1) for i, name in enumerate(names)})
    found = mined(folder)[0]
    assert found == mined(folder)[0]
    assert [pair.path for pair in found[::2]] == ["a/b/c.py", "a/z.py", "a.py", "b.py"]
    assert all(first.line < second.line for first, second in zip(found[::2], found[1::2], strict=True))


def test_progress_is_reported_after_every_file(tree):
    told = []
    list(pairs([tree({"a.py": GOOD, "b.py": b"\xff"})], progress=lambda *counts: told.append(counts)))
    assert told == [(1, 2), (2, 2)]


# --- the command ---


def run(*arguments) -> int:
    return mine.main(["code", *map(str, arguments)])


def test_rows_are_training_data(tree, tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    folder = tree({"a.py": function(1) + function(2), "test_b.py": GOOD, "c.py": "def f(x):\n    return x + x * 2\n"})
    assert run(folder, "--output", output) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["path"], row["line"], row["name"], row["language"]) for row in rows] == [
        ("a.py", 1, "f1", "python"),
        ("a.py", 11, "f2", "python"),
    ]
    loaded = Rows([output])
    assert [loaded[i].query for i in range(len(loaded))] == [
        "Compute the value number 1.",
        "Compute the value number 2.",
    ]
    steps = "".join(f"    a1_{i} = b1_{i} ** c1_{i}\n" for i in range(6))
    assert loaded[0].positive == rows[0]["positive"] == f"def f1(x):\n{steps}    return x"
    told = capsys.readouterr().out
    assert re.search(r"python +2 +3 +2 *\n", told)
    assert re.search(r"test file: .* 1 file *\n", told) and re.search(r"no docstring: .* 1 definition *\n", told)
    assert f"{output} (2 pairs)" in told and f"python train.py --data {output}" in told
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["pairs.jsonl"]


def test_several_languages_are_summed_up(tree, tmp_path, capsys):
    sources = {"a.py": GOOD, "a.rs": "/// Adds one to it.\nfn f(x: u8) -> u8 {\n    g(x) + 1\n}\n"}
    assert run(tree(sources), "--output", tmp_path / "pairs.jsonl") == 0
    assert re.search(r"all +2 +2 +2 *\n", capsys.readouterr().out)


def test_flags_have_their_effect(tree, tmp_path):
    output, folder = (
        tmp_path / "pairs.jsonl",
        tree({"a.py": function(1, steps=2) + function(2) + GOOD, "test_b.py": GOOD}),
    )

    def count(*flags) -> int:
        assert run(folder, "--output", output, "--overwrite", *flags) == 0
        return len(output.read_text().splitlines())

    assert count() == 3
    assert count("--max-lines", 4) == 2
    assert count("--min-lines", 8) == 1
    assert count("--keep-duplicates") == 3
    assert count("--keep-duplicates", "--include-tests") == 4
    assert count("--languages", "python", "go") == 3


def test_what_is_refused(tree, tmp_path, capsys):
    folder, output = tree({"a.py": GOOD, "none/b.py": "x = 1\n"}), tmp_path / "pairs.jsonl"

    def refused(*arguments) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err

    assert "nowhere: no such file" in refused(tmp_path / "nowhere", "--output", output)
    assert "no pair found in 1 source file" in refused(folder / "none", "--output", output)
    assert "a.py is not a folder" in refused(folder, "--output", folder / "a.py" / "x.jsonl")
    assert "this is a folder" in refused(folder, "--output", tmp_path)
    assert "inputs are never overwritten" in refused(folder, "--output", folder / "a.py", "--overwrite")
    assert "needs 0 < min <= max" in refused(folder, "--output", output, "--min-lines", 9, "--max-lines", 8)
    assert not output.exists()
    output.write_text("precious\n")
    assert "--overwrite replaces it" in refused(folder, "--output", output)
    assert output.read_text() == "precious\n"
    with pytest.raises(SystemExit):
        run(folder, "--output", output, "--languages", "cobol")


def test_an_interrupted_run_leaves_nothing_behind(tree, tmp_path, monkeypatch):
    output = tmp_path / "pairs.jsonl"

    def interrupted(*_):
        yield next(iter(pairs([tree({"a.py": GOOD})])))
        raise KeyboardInterrupt

    monkeypatch.setattr(mine.code_pairs, "pairs", interrupted)
    assert run(tmp_path / "tree", "--output", output) == 130
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_help_states_every_rule_and_loads_no_grammar(run_python):
    code = (
        "import sys, mine\ntry: mine.main(['code', '--help'])\nexcept SystemExit: print('tree_sitter' in sys.modules)"
    )
    told = run_python(code).stdout
    assert all(reason in told for reason in FILE_REASONS | REASONS)
    assert told.endswith("False\n")
