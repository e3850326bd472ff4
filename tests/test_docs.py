"""The documentation keeps its word: commands parse, snippets import, bodies fit, links and paths lead somewhere.

python -m pytest tests/test_docs.py

Every fenced block of README.md, docs/, CONTRIBUTING.md and the notebooks of examples/ is checked, without running it:

    sh        each command goes through the real argparse parser of its script, with abbreviations refused
    python    compiled; imports are executed; calls of our own functions are held against their signatures
    json, jsonl, yaml    read; training rows and server bodies by the code that reads them in earnest
    text      a screen or a tree of files: only looked at
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "adapters" / "README.md", ROOT / "benchmarks" / "README.md"]
TOPICS = [page for page in PAGES if page.parent == ROOT / "docs" and page.name != "README.md"]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LANGUAGES = {"sh", "python", "json", "jsonl", "yaml", "text"}

FOLDERS = ("benchmarks", "configs", "docs", "eval-data", "examples", "gemma-3-tiny-mlx", "mlx_retrieval", "tests")
FOLDERS += ("tools",)
ELSEWHERE = {"convert_hf_to_gguf.py"}  # scripts of other projects
# Libraries that a reader may have and the tests have not.
OPTIONAL = {"openai", "cohere", "langchain_openai", "langchain_cohere", "llama_index"}
# Commands whose words are not checked; every other command has to be known to `check_command`.
UNCHECKED = {"cd", "git", "ruff", "source", "lint-imports", ".ci/run"}
ROW_KEYS = ({"query", "document"}, {"query", "positive"}, {"query", "documents"}, {"anchor", "positive"})


class Block(NamedTuple):
    """A fenced block, or the code cells of a notebook."""

    where: str  # file:line
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
    out, fence, start, language, lines = [], "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        match = re.match(r"^ *(```+)\s*([\w-]*)", line)
        if match and not fence:
            fence, language, start, lines = match[1], match[2], number, []
        elif match and match[1] == fence and not match[2]:
            out.append(Block(f"{name}:{start}", language, "\n".join(lines) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"{name}:{start}: the fence is never closed"
    return out


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    out, fence = [], ""
    for line in page.read_text(encoding="utf-8").split("\n"):
        match = re.match(r"^ *(```+)", line)
        if match and fence in ("", match[1]):
            fence = "" if fence else match[1]
        elif not fence:
            out.append(line)
    return "\n".join(out)


def cells_of(notebook: Path) -> Block:
    """The code of a notebook as one block."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return Block(str(notebook.relative_to(ROOT)), "python", "\n".join(code))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_in(*languages: str) -> list:
    """The blocks in these languages, as parameters that are named by their place."""
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.language in languages]


# --- shell ------------------------------------------------------------------------------------------------------------


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and assignments; `&&`, `;`, `|` and `&` separate."""
    pending = ""
    for line in text.split("\n"):
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on
            pending += "\n"
            continue
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, pending, words = True, "", []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0], re.DOTALL):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)
    assert not pending, f"the command never ends: {pending}"


class Parsed(BaseException):
    """Raised instead of all that follows the parsing of a command line; no command catches it."""


PARSE_ARGS = argparse.ArgumentParser.parse_args


def _exact(parser: argparse.ArgumentParser) -> None:
    """Refuse abbreviated flags, in subcommands too."""
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _exact(child)


def _parse_and_stop(self: argparse.ArgumentParser, args=None, namespace=None):
    _exact(self)
    raise Parsed(PARSE_ARGS(self, args, namespace))


def parse(main: Callable, words: list[str]) -> argparse.Namespace:
    """The flags of a command line as its own parser reads them; AssertionError with the parser's message."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
        patch.setattr(sys, "argv", ["command", *words])
        patch.chdir(ROOT)
        try:
            with contextlib.redirect_stderr(errors):
                main(words) if inspect.signature(main).parameters else main()
        except Parsed as done:
            return done.args[0]
        except SystemExit:
            raise AssertionError(errors.getvalue().strip().splitlines()[-1]) from None
    raise AssertionError("the command does not parse its flags with argparse")


def check_script(script: str, words: list[str]) -> None:
    """The flags of a script exist."""
    if script in ELSEWHERE:
        return
    assert (ROOT / script).is_file(), f"{script}: no such file"
    if "/" not in script:
        parse(importlib.import_module(script.removesuffix(".py")).main, words)
        return
    # Benchmarks and tools import peers that take seconds: their flags are looked up in the source.
    source = (ROOT / script).read_text(encoding="utf-8")
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or f'"{flag}"' in source, f"{script} has no {flag}"


def check_pytest(words: list[str]) -> None:
    config = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("-"):
            assert word in ("-k", "-q", "-x", "--lf") or f'"{word}"' in config, f"pytest has no {word}"
        elif "/" in word or word.endswith(".py"):
            assert (ROOT / word.partition("::")[0]).exists(), f"{word}: no such file"


def check_pip(words: list[str]) -> None:
    for flag, value in itertools.pairwise(words):
        if flag in ("-r", "--requirement"):
            assert (ROOT / value).is_file(), f"{value}: no such file"


def check_curl(words: list[str]) -> None:
    """A request to the server: its path, its headers and its body."""
    path = next(re.sub(r"https?://[^/]+", "", word) for word in words if word.startswith("http"))
    bodies = [words[i + 1] for i, word in enumerate(words) if word in ("-d", "--data", "--json")]
    if not bodies:
        assert path in ("/health", "/ready", "/metrics", "/info", "/v1/models"), f"{path} takes a body"
        return
    kind = [word.lower().replace(" ", "") for word in words]
    assert "--json" in words or "content-type:application/json" in kind, "the server wants a Content-Type"
    check_body(path, json.loads(bodies[0]))


def check_body(path: str, body: dict) -> None:
    """A request's body, by the shapes of the server, or by the search page's."""
    from pydantic import TypeAdapter

    from mlx_retrieval.inference.serving.shapes.table import SHAPES
    from mlx_retrieval.retrieval.search_app import Question

    if path == "/search":
        Question.model_validate(body)
        return
    TypeAdapter({shape.path: shape.body for shape in SHAPES}[path]).validate_python(body).request()


def check_command(words: list[str]) -> None:
    """AssertionError where a command of the documentation can not work; an unknown command is one."""
    name, *rest = words
    if name == "mlx.launch":
        assert "python" in rest, "mlx.launch needs `python` before the script"
        check_command(rest[rest.index("python") :])
    elif name in ("python", "python3") and rest[0] == "-m":
        {"pytest": check_pytest, "pip": check_pip, "venv": lambda _: None}[rest[1]](rest[2:])
    elif name in ("python", "python3") and rest[0] == "-c":
        check_python(rest[1])
    elif name in ("python", "python3"):
        check_script(rest[0], rest[1:])
    elif name.startswith("mlx_lm."):
        parse(importlib.import_module(name).main, rest)
    elif name == "pip" or name.endswith("/bin/pip"):  # of an environment that is not active
        check_pip(rest)
    elif name == "curl":
        check_curl(rest)
    else:
        assert name in UNCHECKED, f"{name}: this test does not know how to check that command"


@pytest.mark.parametrize("block", blocks_in("sh"))
def test_commands_parse(block):
    for words in simple_commands(block.text):
        try:
            check_command(words)
        except (AssertionError, ValueError, LookupError) as error:
            pytest.fail(f"{block.where}: {shlex.join(words)}: {error}", pytrace=False)


TRAIN = [
    pytest.param(words, id=block.where)
    for block in BLOCKS
    if block.language == "sh"
    for words in simple_commands(block.text)
    if "train.py" in words
]


def check_training(words: list[str]) -> None:
    """UserError for a wrong value, a wrong --config or a flag of another task."""
    from mlx_retrieval.training.flags import from_flags

    argv = words[words.index("train.py") + 1 :]
    for i in [i for i, word in enumerate(argv) if word == "--config" and argv[i + 1].startswith("adapters/")]:
        del argv[i : i + 2]  # of a run that the reader has made
    settings, _ = from_flags("", "", argv)
    if settings.task:
        settings.check_task(settings.task)


@pytest.mark.parametrize("words", TRAIN)
def test_training_commands_are_sound(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_training(words)


def clashes(page: Path) -> list[str]:
    """Commands of a page that find their output there, from a command above, and training without an --output."""
    out, written = [], set()
    blocks = [block.text for block in blocks_of(page) if block.language == "sh"]
    for words in itertools.chain.from_iterable(map(simple_commands, blocks)):
        if {"--dry-run", "--profile", "--resume", "--overwrite"} & {*words}:
            continue
        flags = dict(itertools.pairwise(words))
        if "train.py" in words and "--output" not in words and page.name != "README.md":
            out.append(f"{shlex.join(words)}: no --output")
        if "adapt.py" in words:  # the same command goes on
            continue
        made = flags.get("--output") or ("index" in words and "search.py" in words and flags.get("--index", ".index"))
        if made and made in written:
            out.append(f"{shlex.join(words)}: {made} is there")
        written.add(made)
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_can_follow_each_other(page):
    assert clashes(page) == []


COMMANDS = ("train.py", "eval.py", "embed.py", "rerank.py", "serve.py", "search.py", "mine.py", "export.py", "adapt.py")
OF_ALL = ("backends.md", "troubleshooting.md")  # pages about flags of all commands
# Environment variables that other programs set or read, which a user has no reason to set.
OF_OTHERS = {"LANCEDB_LOG", "MKL_THREADING_LAYER", "MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
OF_OTHERS |= {"TOKENIZERS_PARALLELISM"}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and its subcommands in all spellings, but for --help and the --no- form of a flag."""
    flags = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags.update(*map(flags_of, action.choices.values()))
        else:
            flags.update(name for name in action.option_strings if name.startswith("--"))
    return {name for name in flags if name != "--help" and name.replace("--no-", "--", 1) not in flags - {name}}


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a command's main() uses."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: found.append(self) or _stop())
        with contextlib.suppress(Parsed):
            main = importlib.import_module(script.removesuffix(".py")).main
            main([]) if inspect.signature(main).parameters else main()
    return found[0]


def _stop() -> None:
    raise Parsed


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_is_on_a_page_that_shows_its_command(script):
    shown = {block.where.partition(":")[0] for block in BLOCKS if block.language == "sh" and script in block.text}
    pages = [page for page in TOPICS if str(page.relative_to(ROOT)) in shown or page.name in OF_ALL]
    words = set(re.findall(r"--[a-z][\w-]*", "\n".join(page.read_text(encoding="utf-8") for page in pages)))
    flags = flags_of(parser_of(script))
    assert "--model" in flags and flags - words == set()


def flags_that_no_command_has(text: str) -> list[str]:
    """Commands between backticks, such as `mine.py score --vectors`, with a flag that theirs has not."""
    commands = re.findall(r"`(?:python )?(\w+\.py)\b([^`]*)`", text)
    given = [(name, flag) for name, rest in commands if name in COMMANDS for flag in re.findall(r"--[a-z][\w-]*", rest)]
    return [f"{name} {flag}" for name, flag in given if flag not in {*flags_of(parser_of(name)), "--help"}]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_have_their_flags(page):
    assert flags_that_no_command_has(prose_of(page)) == []


def test_a_wrong_flag_in_a_sentence_is_found():
    text = "`mine.py score --vectors` `python train.py --hep` `serve.py --help` `eval.py --serve 1` `other.py --x`"
    assert flags_that_no_command_has(text) == ["train.py --hep", "eval.py --serve"]


def test_every_environment_variable_is_on_a_page():
    files = [*ROOT.glob("*.py"), *(ROOT / "mlx_retrieval").rglob("*.py")]
    sources = [text for file in files if "environ" in (text := file.read_text(encoding="utf-8"))]
    values = [node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    texts = [value for value in values if isinstance(value, str)]
    variables = {text for text in texts if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", text)} - OF_OTHERS
    words = set(re.findall(r"`([A-Z][A-Z0-9_]+)\b", "\n".join(map(prose_of, TOPICS))))
    assert "ES_NODE" in variables and variables - words == set()


# --- Python -----------------------------------------------------------------------------------------------------------


def is_ours(module: str) -> bool:
    root = module.partition(".")[0]
    return (ROOT / f"{root}.py").is_file() or (ROOT / root / "__init__.py").is_file()


def imported(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """What an import statement binds, for modules of ours; others must only be there."""
    if isinstance(node, ast.Import):
        modules = [(alias.asname or alias.name, alias.name, "") for alias in node.names]
    else:
        modules = [(alias.asname or alias.name, node.module, alias.name) for alias in node.names]
    out = {}
    for bound, module, attribute in modules:
        if not is_ours(module):
            root = module.partition(".")[0]
            assert root in OPTIONAL or importlib.util.find_spec(root), f"no module {root}"
            continue
        out[bound] = importlib.import_module(module)
        if attribute and not hasattr(out[bound], attribute):
            importlib.import_module(f"{module}.{attribute}")
        if attribute:
            out[bound] = getattr(out[bound], attribute)
    return out


class Calls(ast.NodeVisitor):
    """Holds calls of our own functions, classes and methods against their signatures."""

    def __init__(self):
        self.objects: dict[str, Any] = {}  # names that imports bind
        self.kinds: dict[str, type] = {}  # variables -> class of their value

    def resolve(self, node: ast.expr) -> Any:
        """The function or class that an expression names; None where it is not one of ours."""
        if isinstance(node, ast.Name):
            return self.objects.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            if owner is None and isinstance(node.value, ast.Name):
                owner = self.kinds.get(node.value.id)
            if owner is not None:
                assert hasattr(owner, node.attr), f"{ast.unparse(node)}: {owner} has no {node.attr}"
                return getattr(owner, node.attr)
        return None

    def visit_Import(self, node):
        self.objects |= imported(node)

    def visit_ImportFrom(self, node):
        self.objects |= imported(node)

    def visit_Assign(self, node):
        self.generic_visit(node)
        called = self.resolve(node.value.func) if isinstance(node.value, ast.Call) else None
        if called is not None and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if not inspect.isclass(called):
                try:
                    called = typing.get_type_hints(called).get("return")
                except NameError:  # a type that is imported for type checkers only
                    called = None
            if inspect.isclass(called) and is_ours(called.__module__):
                self.kinds[node.targets[0].id] = called

    def visit_Call(self, node):
        self.generic_visit(node)
        called = self.resolve(node.func)
        if not callable(called) or any(isinstance(a, ast.Starred) for a in node.args):
            return
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        bind = inspect.signature(called).bind
        if any(keyword.arg is None for keyword in node.keywords):
            bind = inspect.signature(called).bind_partial
        method = isinstance(node.func, ast.Attribute) and inspect.isfunction(called) and "." in called.__qualname__
        try:
            bind(*[None] * (len(node.args) + method), **keywords)
        except TypeError as error:
            raise AssertionError(f"{ast.unparse(node)[:80]}: {error}") from None


def check_python(source: str) -> None:
    """AssertionError, ImportError or SyntaxError where a snippet can not work."""
    Calls().visit(ast.parse(source))


@pytest.mark.parametrize("block", [*blocks_in("python"), *(pytest.param(cells_of(n), id=n.name) for n in NOTEBOOKS)])
def test_snippets_import(block):
    try:
        check_python(block.text)
    except (AssertionError, ImportError, SyntaxError) as error:
        pytest.fail(f"{block.where}: {error}", pytrace=False)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks_in("json", "jsonl"))
def test_rows_and_bodies_are_read(block):
    from mlx_retrieval.dataset.row_formats import parse as parse_row
    from mlx_retrieval.training.chat.data import row_format
    from mlx_retrieval.training.chat.messages import dialogue_of

    if block.language == "json":
        json.loads(block.text)
        return
    for line in filter(str.strip, block.text.split("\n")):
        row = json.loads(line)
        if any(keys <= row.keys() for keys in ROW_KEYS):
            parse_row(line.encode())
        elif row_format(row) in ("messages", "prompt"):
            dialogue_of(row)


@pytest.mark.parametrize("block", blocks_in("yaml"))
def test_settings_in_yaml_exist(block, tmp_path):
    from mlx_retrieval.training.settings_file import read_yaml

    (tmp_path / "settings.yaml").write_text(block.text)
    assert read_yaml(tmp_path / "settings.yaml").keys() == yaml.safe_load(block.text).keys()


# --- pages ------------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    slugs = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slugs.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    repeated = {f"{slug}-{n}" for slug in slugs for n in range(1, slugs.count(slug))}
    return {*slugs, *repeated}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text, out = re.sub(r"`[^`\n]*`", "", prose_of(page)), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            out.append(link)
    return out


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    assert broken_links(page) == []


def is_path_of_ours(text: str) -> bool:
    """Whether a word in backticks is meant as a file or folder of the repository."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", text) or text in ELSEWHERE:
        return False
    folder, slash, _ = text.partition("/")
    return folder in FOLDERS if slash else text.endswith((".py", ".toml", ".ipynb"))


def lost_paths(text: str) -> list[str]:
    """Paths of the repository in a page's prose and shell blocks that do not exist."""
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    return sorted({word for word in words if is_path_of_ours(word) and not (ROOT / word).exists()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    assert lost_paths(prose_of(page)) == []
    shell = [f"`{word}`" for block in blocks_of(page) if block.language == "sh" for word in block.text.split()]
    assert lost_paths(" ".join(word for word in shell if "/" in word)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language(page):
    assert [block.where for block in blocks_of(page) if block.language not in LANGUAGES] == []


def test_the_readme_is_short_and_leads_everywhere():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 160
    for index, prefix in (("README.md", "docs/"), ("docs/README.md", "")):
        text = (ROOT / index).read_text(encoding="utf-8")
        assert [page.name for page in TOPICS if f"({prefix}{page.name}" not in text] == [], index


def test_the_readme_begins_with_a_result_and_one_s_own_data_and_ends_with_the_tests():
    first, second, *_, last = [block for block in blocks_of(ROOT / "README.md") if block.language == "sh"]
    assert first.text.strip() == "pip install -r requirements.txt && python train.py"
    assert second.text.strip() == "python train.py --data my.csv"
    assert last.text.strip() == "pip install -r tests/requirements.txt && python -m pytest"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-r requirements.txt && python train.py" in script and "time python -m pytest |" in script


@pytest.mark.parametrize("page", TOPICS, ids=lambda page: page.name)
def test_a_page_opens_with_a_command(page):
    head = page.read_text(encoding="utf-8").split("\n## ")[0]
    assert head.startswith("# ") and "```sh\n" in head


def test_the_tree_in_architecture_is_whole():
    """Every tracked file at the top and every package is in the tree, and nothing that does not exist."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    tree = next(b.text for b in blocks_of(ROOT / "docs" / "architecture.md") if "train.py" in b.text)
    tracked = [path.split("/") for path in done.stdout.split() if not path.startswith(".")]
    packages = {parts[1] for parts in tracked if parts[0] == "mlx_retrieval" and len(parts) > 2}
    assert {name for name in {parts[0] for parts in tracked} if name not in tree} == set()
    assert {name for name in packages if f"  {name}/" not in tree} == set()
    inside = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert {name for name in inside if not (ROOT / "mlx_retrieval" / name).is_dir()} == set()
    named = re.findall(r"^([\w.-]+(?:/|\.\w+))", tree, re.MULTILINE)
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_the_outputs_of_a_notebook_name_no_machine_s_folder(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = json.dumps([cell.get("outputs", []) for cell in cells])
    assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|Users|private|opt)/\S*", outputs) == []


# --- these tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python train.py --batchsize 64", "--batchsize"),
        ("python train.py --batch 64", "--batch"),  # argparse alone would take this for --batch-size
        ("python train.py --batch-size many", "not a whole number"),
        ("python eval.py --model M --tasks eval-data", "--tasks"),
        ("python search.py index src --modle M", "--modle|required"),
        ("python search.py find words", "find is not one of index, search, eval"),
        ("python mine.py code src", "--output"),
        ("python export.py --adapter A", "--output"),
        ("mlx.launch -n 2 python train.py --wrong", "--wrong"),
        ("cd x && ES_NODE=http://host:9200 python train.py --wrong", "--wrong"),
        ("python nowhere.py", "no such file"),
        ("python benchmarks/bm25.py --wrong eval-data", "has no --wrong"),
        ("pip install -r nowhere.txt", "no such file"),
        ("pytohn train.py", "does not know"),
        ("curl http://127.0.0.1:8000/v1/rerank -d '{}'", "Content-Type"),
        ("curl http://127.0.0.1:8000/v1/rerank --json '{'", "Expecting"),
        ('curl http://127.0.0.1:8000/v1/rerank --json \'{"query": "a"}\'', "documents"),
    ],
)
def test_a_wrong_command_is_found(command, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        for words in simple_commands(command):
            check_command(words)


@pytest.mark.parametrize(
    "snippet",
    [
        "from mlx_retrieval import lode",
        "import mlx_retrieval.nothing",
        "from no_such_library import x",
        "def f(:",
        "from mlx_retrieval import load\nload()",
        "from mlx_retrieval import load\nmodel = load('x')\nmodel.embed(['a'])",
        "from mlx_retrieval import load\nmodel = load('x')\nmodel.encode(['a'], prompts='query')",
        "from mlx_retrieval import Searcher\nSearcher('.index', modle='x')",
    ],
)
def test_a_wrong_snippet_is_found(snippet):
    with pytest.raises((AssertionError, ImportError, SyntaxError)):
        check_python(snippet)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 0 --output a", "must be above 0"),
        ("--task embed --mask-prompt --output a", "is for --task chat"),
        ("--config configs/nowhere.yaml --output a", "No such file"),
    ],
)
def test_an_unsound_training_command_is_found(flags, message, monkeypatch):
    from mlx_retrieval.utils.errors import UserError

    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, UserError), match=message):
        check_training(["python", "train.py", *flags.split()])


def test_commands_that_write_the_same_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    lines = ["mine.py code src --output a", "mine.py code src --output a", "mine.py code src --output a --overwrite"]
    lines += ["search.py index src --model M", "search.py index docs --model M", "search.py index src --index i"]
    lines += ["train.py --data rows", "train.py --dry-run", "train.py --output b", "train.py --resume --output b"]
    page.write_text("```sh\n" + "".join(f"python {line}\n" for line in lines) + "```\n")
    assert [line.rpartition(": ")[2] for line in clashes(page)] == ["a is there", ".index is there", "no --output"]


def test_shell_blocks_are_read_as_a_shell_does():
    text = "# no\nA=1 python x.py \\\n  --a 'b # c' && d  # no\ncurl u --json '{\n}'\ne | f &\n"
    commands = [["python", "x.py", "--a", "b # c"], ["d"], ["curl", "u", "--json", "{\n}"], ["e"], ["f"]]
    assert list(simple_commands(text)) == commands


def test_wrong_links_paths_and_fences_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[x](#a-b-c) [y](#nothing) [z](gone.md) `[q](r.md)` [w](https://a.b)\n")
    assert broken_links(page) == ["#nothing", "gone.md"]
    assert lost_paths("`train.py` `nothing.py` `tests/no.py` `docs.jsonl` `src/a.py` `convert_hf_to_gguf.py`") == [
        "nothing.py",
        "tests/no.py",
    ]
    page.write_text("```sh\npython train.py\n")
    with pytest.raises(AssertionError, match="never closed"):
        blocks_of(page)
