"""The package can be imported anywhere, and installing it puts no common name in anybody's way.

python -m pytest tests/test_package.py
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlx_retrieval

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train", "eval", "embed", "rerank", "search", "serve", "mine", "export", "adapt")


@pytest.fixture
def crowded(tmp_path) -> Path:
    """A user's folder whose files are called as modules of the toolkit are, or were."""
    folder = tmp_path / "project"
    (folder / "models").mkdir(parents=True)
    for name in ("config", "utils", "search", "loss", "data_loader", "tokens", "backend", "models/__init__"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name}.py of the user is imported')\n")
    return folder


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=variables | environment, capture_output=True, text=True, timeout=120)


def test_the_package_exports_what_the_commands_do():
    import embed
    import eval as eval_command
    import rerank
    import search

    assert mlx_retrieval.load is embed.load and mlx_retrieval.Model is embed.Model
    assert mlx_retrieval.Reranker is rerank.Reranker and mlx_retrieval.Searcher is search.Searcher
    assert mlx_retrieval.evaluate is eval_command.evaluate
    assert set(mlx_retrieval.__all__) <= set(dir(mlx_retrieval))
    with pytest.raises(AttributeError, match="no attribute 'Rerankers'"):
        mlx_retrieval.Rerankers  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("module", ["embed", "mlx_retrieval"])
def test_a_folder_with_modules_of_the_same_names(crowded, module):
    """Regression: the toolkit took a notebook's own config.py, utils.py or search.py for one of its modules."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        f"from {module} import load\nfrom mlx_retrieval import Reranker, Searcher\n"
        f"print(load({str(ROOT / 'gemma-3-tiny-mlx')!r}).encode(['a kidney stone']).shape[0])\n"
        "try: import config\nexcept ImportError as error: print(error)"
    )
    done = run(crowded, code)
    assert done.stdout.splitlines() == ["1", "config.py of the user is imported"], done.stderr


def test_importing_the_package_alone_imports_nothing(crowded):
    code = "import mlx_retrieval, sys; print('mlx.core' in sys.modules, 'numpy' in sys.modules)"
    assert run(crowded, code, PYTHONPATH=str(ROOT)).stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_an_editable_install_maps_the_package_and_no_command(tmp_path, crowded):
    """As `pip install -e .` builds it, from a copy: building leaves files beside pyproject.toml."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "mlx_retrieval", source / "mlx_retrieval", ignore=shutil.ignore_patterns("__pycache__"))
    files = ("pyproject.toml", "requirements.txt", "loss.py", "data_loader.py", *(f"{name}.py" for name in COMMANDS))
    for name in files:
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    built = run(source, code)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    metadata = next(target.glob("*.dist-info/METADATA")).read_text()
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert metadata.count("Requires-Dist: ") == len(requirements)
    names = ["mlx_retrieval", "loss", "data_loader", *COMMANDS, "tests"]
    code = (
        f"import site; site.addsitedir({str(target)!r}); import importlib.util as util\n"
        f"specs = [spec for name in {names} if (spec := util.find_spec(name))]\n"
        f"print(*(spec.name for spec in specs if str(spec.origin).startswith({str(source)!r})))\n"
        "import mlx_retrieval.training.objectives, mlx_retrieval.exporters.job; print(mlx_retrieval.load.__name__)"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run(empty, code)
    assert done.stdout.splitlines() == ["mlx_retrieval loss data_loader", "load"], done.stderr
    done = run(
        crowded, f"import site; site.addsitedir({str(target)!r}); from mlx_retrieval import load, Reranker, Searcher"
    )
    assert done.returncode == 0, done.stderr
