"""The house keeps its order: a closed top level, imports that point down, no circles, tests that import no tests.

python -m pytest tests/test_house.py
"""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"train", "eval", "embed", "rerank", "search", "serve", "mine", "export", "adapt", "mlx_cross_encoder"}
# Lower layers last; `loss` and `data_loader` are files at the top.
LAYERS = (
    *("adaptation", "exporters", "training", "mining", "evaluation", "retrieval", "inference", "data_loader"),
    *("models", "loss", "backbones", "dataset", "backend", "utils"),
)
TOP_LEVEL = {
    *(f"{command}.py" for command in COMMANDS),
    *("data_loader.py", "loss.py", "mlx_retrieval", "tests", "benchmarks", "tools", "examples", "configs", "docs"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "requirements.txt"),
    *("adapters", "eval-data", "gemma-3-tiny-mlx", "train-data.jsonl"),
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
}
ROOMS = """The top level is closed: commands, loss.py, data_loader.py and the files of a first minute.
New code belongs in a room of mlx_retrieval/ (docs/architecture.md):
  adaptation/  from a folder of documents to a model and a search, in stages
  exporters/   a trained model becomes a folder that other libraries load
  training/    one run: settings, steps, losses' batches, checkpoints, reports
  mining/      training data from documents, code, indexes and other models
  evaluation/  figures and their intervals
  retrieval/   indexes, search, fusion, late interaction
  inference/   a model at work: embedding, reranking, the server
  models/      heads, tokenizers, batching: a backbone becomes a retrieval model
  backbones/   token ids -> token states
  dataset/     everything that is read
  backend/     device, dtype, BLAS, kernels
  utils/       errors, files, locks, console; no mlx
A test belongs in the folder of tests/ with the room's name, measurements in benchmarks/, chores in tools/."""


def tracked() -> list[str]:
    """Return the paths that git tracks; skip where this is no checkout."""
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return listing.splitlines()


def test_the_top_level_is_closed():
    names = {path.partition("/")[0] for path in tracked()}
    assert not names - TOP_LEVEL, f"{', '.join(sorted(names - TOP_LEVEL))} at the top level. {ROOMS}"


# --- imports ----------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Return all files of the toolkit by module name."""
    files = [*ROOT.glob("*.py"), *(ROOT / "mlx_retrieval").rglob("*.py")]
    names = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    return {".".join(n[:-1] if n[-1] == "__init__" else n): file for n, file in zip(names, files, strict=True)}


def imports(file: Path, known) -> set[str]:
    """Return the modules among `known` that a file imports anywhere: in functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}:{node.lineno}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known
            if inner - known:
                found.add(node.module)
    return found & known


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Every module with the modules that it imports."""
    files = modules()
    return {name: imports(file, files.keys()) - {name} for name, file in files.items()}


def test_no_file_imports_itself_by_way_of_others(graph):
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def layer(module: str) -> int:
    """Return the number of a module's layer; commands have -1."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "mlx_retrieval" and len(parts) > 1 else parts[0]
    return -1 if name in COMMANDS else LAYERS.index(name)


def test_imports_point_down(graph):
    """The same order as import-linter's contract, with the files at the top that it cannot read."""
    arrows = [(above, below) for above, names in graph.items() for below in names if above != "mlx_retrieval"]
    wrong = [f"{above} imports {below}" for above, below in arrows if layer(above) > layer(below)]
    wrong += [f"{above} imports the command {below}" for above, below in arrows if below in COMMANDS]
    assert not wrong, "\n".join(wrong)


def test_loss_and_data_loader_are_training_s(graph):
    """So that a folder with a loss.py of its own can use everything else."""
    users = {name for name, names in graph.items() if {"loss", "data_loader"} & names and layer(name) >= 0}
    assert all(name.startswith("mlx_retrieval.training.") for name in users - {"data_loader"}), users
    assert {name.split(".")[1] for name in graph["loss"]} == {"backend"}
    assert "loss" not in graph["data_loader"]


def test_no_type_is_a_name_that_is_not_imported():
    """A string with `noqa: F821` hides an import from every tool."""
    lines = ((file, line) for file in modules().values() for line in file.read_text(encoding="utf-8").splitlines())
    assert not [f"{file.relative_to(ROOT)}: {line.strip()}" for file, line in lines if "F821" in line]


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter in a folder."""
    program = Path(sys.executable).with_name("lint-imports")
    if not program.is_file():
        pytest.skip("import-linter is not installed")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_contract_is_kept():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "dataset/rows.py",
            "def later():\n    from mlx_retrieval.training import trainer",
            "Imports point down the layers",
        ),
        ("utils/files.py", "if TYPE_CHECKING:\n    import mlx_retrieval.backend", "Imports point down the layers"),
        ("training/clock.py", "from mlx_retrieval.training import run", "No circles between packages or files"),
        ("inference/embedder.py", "import embed", "The package imports no command"),
        ("mining/cache.py", "import loss", "Below training, nothing imports loss.py or data_loader.py"),
    ],
)
def test_the_contract_fails_on_an_import_that_is_turned_round(tmp_path, file, line, broken):
    shutil.copytree(ROOT / "mlx_retrieval", tmp_path / "mlx_retrieval", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "mlx_retrieval" / file, "a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and f"{broken} BROKEN" in result.stdout, result.stdout + result.stderr


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS - {"mlx_cross_encoder"}))
def test_a_command_runs_as_a_script(command, tmp_path):
    """From any folder."""
    result = subprocess.run(
        [sys.executable, ROOT / f"{command}.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {command}.py ")


# --- tests ------------------------------------------------------------------------------------------------------------


def test_tests_import_no_tests():
    wrong = []
    for file in (*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{file.relative_to(ROOT)}:{node.lineno}" for name in names if re.search(r"(^|\.)test_|^conftest", name)
            ]
    assert not wrong, f"{', '.join(wrong)}: shared makers belong in tests/helpers/, shared fixtures in a conftest.py"


def test_no_test_asserts_how_long_something_takes():
    """A busy machine makes such a test fail, and a fast one lets it pass: speed is measured in benchmarks/."""
    clock = r"(perf_counter(_ns)?|monotonic|\btime)\(\) *-"  # the end of waiting, monotonic() < deadline, is none
    wrong = []
    for file in ROOT.glob("tests/**/*.py"):
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        wrong += [f"{file.relative_to(ROOT)}:{n}" for n, line in lines if re.search(rf"assert .*{clock}", line)]
    assert not wrong, f"{', '.join(wrong)}: count what is done instead"


def test_tests_lie_in_the_folders_of_what_they_test_and_say_how_to_run_them():
    files = list(ROOT.glob("tests/**/test_*.py"))
    rooms = {path.name for path in (ROOT / "mlx_retrieval").iterdir() if path.is_dir()}
    assert {path.parent.name for path in files} <= rooms | {"tests", "chat"}
    assert not [name for name, count in Counter(path.name for path in files).items() if count > 1]
    for path in files:
        header, name = path.read_text(encoding="utf-8").split('"""')[1], re.escape(str(path.relative_to(ROOT)))
        assert re.search(rf"^python -m pytest (-m slow )?{name}", header, re.MULTILINE), path
    assert not list(ROOT.glob("tests/**/__init__.py")), "an __init__.py in tests/ would shadow a package"
