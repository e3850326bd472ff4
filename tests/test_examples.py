"""The notebook runs from top to bottom. What it imports, `tests/test_docs.py` checks without running it.

python -m pytest tests/test_examples.py
"""

import re
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
