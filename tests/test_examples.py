"""The notebook runs from top to bottom, and the README tells the truth about the files.

python -m pytest tests/test_examples.py
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_quickstart_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "step 40/40" in text and "(400, 256), dtype('float32')" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(re.findall(r"^0\.\d{3}  ", text, flags=re.MULTILINE)) == 3


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return done.stdout.split()


def test_the_readme_s_file_tree_is_whole():
    tree = (ROOT / "README.md").read_text().split("```")
    tree = next(block for block in tree if "trainer.py" in block and "loss.py" in block)
    top = {path.split("/")[0] for path in tracked() if not path.startswith(".")}
    assert {name for name in top if name not in tree} == set()
    named = set(re.findall(r"^([\w.-]+\.(?:py|jsonl|txt|toml|md))", tree, flags=re.MULTILINE))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_readme_s_flags_exist():
    import dataclasses

    from mlx_retrieval.training.config import Settings
    from mlx_retrieval.utils.errors import flag

    known = {name for f in dataclasses.fields(Settings) for name in (flag(f.name), *f.metadata.get("aliases", ()))}
    known |= {"--config", "--no-bidirectional"}
    commands = re.findall(
        r"^\s*python train\.py([^\n#]*(?:\\\n[^\n#]*)*)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    used = {word for command in commands for word in re.findall(r"--[a-z-]+", command)}
    assert commands and used <= known
