"""How commands begin and end: closed streams, readers that go away, misspelt flags, errors as one line.

python -m pytest tests/utils/test_command.py
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_retrieval.training import flags as training_flags
from mlx_retrieval.utils.command import Parser, command
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent

# --- streams: a command without mlx, so that a process takes a tenth of a second --------------------------------------

PROGRAM = """
import os, sys
from mlx_retrieval.utils.command import command

@command("program.py", goes_on={goes_on})
def main(argv=None):
    with open(sys.argv[0], "rb") as file:  # what mlx takes for a failure
        lowest = file.fileno()
    for i in range(20_000):  # more than a pipe holds
        print("line", i, "half \\ud83d of a pair")
        if i % 100 == 0:
            print("progress", i, file=sys.stderr)
    sys.stdin.read()
    with open("done", "w") as file:
        file.write(str(lowest))
    {end}
    return 0

sys.exit(main())
"""


@pytest.fixture
def shell(tmp_path):
    """`shell(redirections)` runs the program in a shell; returns its exit code, its standard error, and what it did."""

    def run(redirections: str, goes_on: bool = False, end: str = "pass", encoding: str = "utf-8"):
        (tmp_path / "program.py").write_text(PROGRAM.format(goes_on=goes_on, end=end))
        line = f'"{sys.executable}" program.py {redirections}; exit ${{PIPESTATUS[0]}}'
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, stdin=subprocess.DEVNULL
        )
        file = tmp_path / "done"
        return done.returncode, done.stdout.decode(), done.stderr.decode(), file.read_text() if file.exists() else None

    return run


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(shell, closed):
    """Descriptors 0 to 2 stay taken: the next file that is opened gets 3."""
    code, _, error, done = shell(closed)
    assert (code, done) == (0, "3") and "Traceback" not in error


def test_a_reader_that_goes_away_does_not_end_a_command(shell):
    code, out, error, done = shell("| head -n 1")
    assert (code, out, done) == (0, "line 0 half \ufffd of a pair\n", "3") and "program.py" not in error
    code, _, error, done = shell("| head -n 1", goes_on=True)
    assert (code, done) == (0, "3")
    assert [line for line in error.splitlines() if not line.startswith("progress")] == [
        "program.py: standard output has no reader any more; the run goes on"
    ]
    assert shell("2>&1 | head -n 1")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_on_a_full_disk(shell):
    """Figures that are lost are an error; a training run's log is not worth the run."""
    code, _, error, done = shell("> /dev/full")
    assert (code, done) == (2, None) and error.splitlines()[
        -1
    ] == "program.py: standard output: No space left on device"
    code, _, error, done = shell("> /dev/full", goes_on=True)
    assert (code, done) == (0, "3")
    assert error.count("program.py: standard output cannot be written (No space left on device); the run goes on") == 1
    assert shell("2> /dev/full")[0] == 0


def test_encodings_without_a_character(shell):
    code, out, _, _ = shell("2>/dev/null", encoding="latin-1", end="print('\u4e00')")
    assert code == 0 and out.splitlines()[0] == "line 0 half ? of a pair" and out.splitlines()[-1] == "?"


@pytest.mark.parametrize("end, code, line", [
    ("raise KeyboardInterrupt", 130, "program.py: interrupted"),
    ("raise KeyboardInterrupt('stopped')", 130, "program.py: stopped"),
    ("raise FloatingPointError('nan')", 2, "program.py: nan"),
    ("open('no/file', 'w')", 2, "program.py: no/file: No such file or directory"),
    ("raise OSError('12 requested and 3 written')", 2, "program.py: 12 requested and 3 written"),
], ids=lambda value: str(value)[:24])  # fmt: skip
def test_ways_to_end(capsys, tmp_path, monkeypatch, end, code, line):
    monkeypatch.chdir(tmp_path)

    @command("program.py")
    def main(argv=None) -> int:
        exec(end)
        return 0

    assert main() == code
    assert capsys.readouterr().err == line + "\n"


def test_errors_of_the_user_and_of_the_toolkit(capsys):
    @command("program.py")
    def main(argv) -> int:
        raise argv[0]

    assert main([UserError("no such file")]) == 2
    assert capsys.readouterr().err == "program.py: no such file\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        main([ZeroDivisionError()])


def test_the_streams_of_a_notebook_stay(capsys):
    before = sys.stdout, sys.stderr

    @command("program.py")
    def main(argv=None) -> int:
        assert (sys.stdout, sys.stderr) == before
        return 0

    assert main() == 0


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, message", [
    ("train.py --stpes 3", "no such flag: --stpes; did you mean --steps?"),
    ("train.py --stpes=3", "no such flag: --stpes; did you mean --steps?"),
    ("train.py --loss inf_nce", "inf_nce is not one of info_nce, "),
    ("train.py --loss inf_nce", "; did you mean info_nce?"),
    ("train.py --task embd", "--task: embd is not one of embed, late, rerank, chat; did you mean embed?"),
    ("train.py --steps many", "--steps/--iters: 'many' is not a whole number"),
    ("train.py --zzz", "no such flag: --zzz (train.py --help lists all)"),
    ("train.py surplus", "no flag takes this: surplus"),
    ("eval.py --modle x", "no such flag: --modle; did you mean --model?"),
    ("eval.py", "one of the arguments --model/--model-path --compare is required"),
    ("mine.py code", "the following arguments are required: PATH, --output"),
    ("eval.py --model m --precision int4", "int4 is not one of float32, int8, uint8, binary, ubinary; did you"),
    ("embed.py --ouput x", "no such flag: --ouput; did you mean --output?"),
    ("rerank.py --reranker-type qwen", "did you mean qwen3?"),
    ("search.py serch x", "command: serch is not one of index, search, eval, tune, serve, mcp; did you mean search?"),
    ("search.py search x --rerunk m", "search.py search: no such flag: --rerunk; did you mean --rerank?"),
    ("search.py search x --bm25 --hybrid", "not allowed with"),
    ("mine.py negatives --take", "--take/--num-negatives: expected one argument"),
    ("mine.py negatives --absolute-margin wide", "--absolute-margin: 'wide' is not understood"),
    ("mine.py code . --output x --languages pyton", "did you mean python?"),
    ("export.py --output x --formt mlx", "no such flag: --formt; did you mean --format?"),
], ids=lambda value: value[:40])  # fmt: skip
def test_a_misspelt_word_is_one_line(capsys, line, message):
    name, *words = line.split()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name.removesuffix(".py")).main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert error.startswith(name) and error.count("\n") == 1 and "usage" not in error


def test_odd_words_stay_on_one_short_line(capsys):
    parser = Parser(prog="p.py")
    parser.add_argument("--count", type=int)
    parser.add_argument("--kind", choices=("a", "b"))
    for words in (["--count", "1\n2"], ["--count", "9" * 5000], ["--kind", "\ud800\n"], ["--x\ny"], ["z" * 9999], [""]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(words)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 200


def test_help_is_argparse_s_own(capsys):
    texts = []
    for kind in (Parser, argparse.ArgumentParser):
        parser = kind(prog="p.py", description="Do it.")
        parser.add_argument("--kind", choices=("a", "b"), help="which")
        texts.append(parser.format_help())
    assert texts[0] == texts[1]


# --- paths ---

PATHS = {"DIR", "FILE", "FILE.npy", "FOLDER", "MODEL", "PATH", "QUERIES", "TASK"}
OTHERS = {  # of texts without a type
    *("TEXT", "NAME", "KEY", "TYPE", "CODE", "PATTERN", "ORIGIN", "BRANCH", "ORGANISATION/NAME", "OWNER/NAME"),
    *("es://INDEX", None),
    "NAME=PATH",  # of serve.py, which opens it as every model is opened
}


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield what a parser takes, and its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)
        elif action.nargs != 0:
            yield action


@pytest.mark.parametrize("name", ["embed", "eval", "export", "mine", "rerank", "search", "serve"])
def test_every_path_may_begin_with_the_home_folder(name, monkeypatch):
    """Shells leave ~ as it is in `--index=~/x`, and MCP's configurations everywhere: folders called ~ were made."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = importlib.import_module(name).parser()
    for action in actions(parser):
        where = f"{name}.py {action.option_strings or action.dest}"
        assert action.metavar in PATHS | OTHERS or action.type or action.choices, f"{where}: a path or not?"
        if action.metavar in PATHS:
            assert action.type is not None, where
            assert [action.type(text) for text in ("~/x", "owner/x~", "es://x")] == ["/home/me/x", "owner/x~", "es://x"]


def test_a_training_run_reads_its_settings_from_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("steps: 7\n")
    assert training_flags.from_flags("", argv=["--config=~/settings.yaml"])[0].steps == 7
