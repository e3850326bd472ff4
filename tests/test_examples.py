"""The examples run from top to bottom. What notebooks import, `tests/test_docs.py` checks without running it.

python -m pytest tests/test_examples.py
"""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def execute(name: str, folder: Path, monkeypatch) -> tuple[str, list]:
    """Run a notebook of examples/ in an empty folder; return what it printed, and its outputs."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    return text, outputs


@pytest.mark.slow
def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    text, outputs = execute("quickstart.ipynb", tmp_path, monkeypatch)
    assert "step 40/40" in text and "(400, 256), dtype('float32')" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(re.findall(r"^0\.\d{3}  ", text, flags=re.MULTILINE)) == 3


@pytest.mark.slow
def test_the_notebook_from_a_csv_to_a_search_runs(tmp_path, monkeypatch):
    text, outputs = execute("csv_to_search.ipynb", tmp_path, monkeypatch)
    assert "question -> query, answer -> document" in text and "step 100/100" in text and "1,437 answers in" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(re.findall(r"^[01]\.\d{3}  ", text, flags=re.MULTILINE)) == 6
    assert (tmp_path / "csv-to-search" / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_notebook_from_a_folder_to_a_search_runs(tmp_path, monkeypatch):
    text, outputs = execute("folder_to_search.ipynb", tmp_path, monkeypatch)
    assert "nothing was trained or written" in text and "9 of 9  report" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(re.findall(r"[01]\.\d{3}  \S+\.md:\d+", text)) == 6
    assert (tmp_path / "folder-to-search" / "report.html").is_file()


@pytest.mark.slow
def test_a_csv_and_no_other_flag_gain_on_their_own_questions_clear_of_zero(tmp_path):
    """What a stranger does first, in an empty folder: `python /path/to/train.py --data my.csv`."""
    rows = [json.loads(line) for line in open(ROOT / "train-data.jsonl", encoding="utf-8")][::2]
    with open(tmp_path / "my.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer"), *((row["query"], row["document"]) for row in rows)])
    command = [sys.executable, str(ROOT / "train.py"), "--data", "my.csv"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert any("question -> query, answer -> document" in line for line in lines)
    assert any(re.match(r"judged on +\d+ questions held out", line) for line in lines)
    assert any(re.match(r" query +\d+ tokens +<bos><unused0>", line) for line in lines)
    figures = re.search(r"nDCG@10 +[\d.]+ +[\d.]+ +\+([\d.]+) +\[([+-][\d.]+), ([+-][\d.]+)\]", run.stdout)
    gain, low, high = figures.groups()
    assert 0 < float(low) < float(gain) < float(high)
    adapters = tmp_path / "adapters"
    assert (adapters / "report.html").is_file() and (adapters / "held-out" / "qrels" / "test.tsv").is_file()


def test_a_right_answer_that_ends_in_a_space_is_found():
    """Regression: held-out documents are without the white space around them, and the table is not."""
    spec = importlib.util.spec_from_file_location("csv_to_search", ROOT / "examples" / "csv_to_search.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.place_of({"right"}, ["wrong", " right \n"]) == "in place 2"
    assert example.place_of({"right"}, ["wrong"]) == "not among the first 100"


@pytest.mark.slow
def test_the_script_from_a_csv_to_a_search_runs_anywhere(tmp_path):
    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "examples" / "csv_to_search.py"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    table = "".join(f"how do I mend number {i},Number {i} is mended with part {i % 90}.\n" for i in range(300))
    (tmp_path / "mine.csv").write_text("title,body\n" + table)
    bad = run("mine.csv")
    assert bad.returncode == 2 and "--columns" in bad.stderr  # says what would work
    (tmp_path / "mine.csv").write_text("question,answer\n" + table)
    good = run("mine.csv", "--epochs", "1", "--output", "mine")
    assert good.returncode == 0, good.stderr
    assert "300 answers in" in good.stdout and good.stdout.count("The answer in the table is") == 2
    assert all((tmp_path / "mine" / name).exists() for name in ("run/report.html", "run/held-out", "index"))
    again = run("mine.csv", "--output", "mine")
    assert again.returncode == 2 and "a run is there already" in again.stderr
