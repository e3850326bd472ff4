"""The toolkit's own data and settings are found from any folder, and a user's files of these names come first.

python -m pytest tests/utils/test_toolkit.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_retrieval.dataset.sources import is_default_data
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.utils import toolkit

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def empty(tmp_path: Path, monkeypatch) -> Path:
    """The current folder, without files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_toolkit_s_files_are_found_from_any_folder(empty):
    assert Settings().data == [str(ROOT / "train-data.jsonl")] and is_default_data(Settings().data)
    assert Settings(data=["train-data.jsonl:2"]).data == [f"{ROOT / 'train-data.jsonl'}:2"]
    assert list(load_tasks(["eval-data"])[0]) == ["eval-data"]
    made, _ = from_flags("", argv=["--config", "configs/xtr-base-code.yaml"])
    assert made.task == "late"
    assert toolkit.find("tests") == "tests"  # of no use to a run


def test_the_user_s_own_files_of_these_names_come_first(empty):
    (empty / "train-data.jsonl").write_text('{"query": "q", "document": "d"}\n')
    assert Settings().data == ["train-data.jsonl"] and not is_default_data(Settings().data)
    (empty / "eval-data").mkdir()
    assert toolkit.find("eval-data") == "eval-data"


def test_the_toolkit_s_data_by_any_path_and_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    link = tmp_path / "link.jsonl"
    link.symlink_to(ROOT / "train-data.jsonl")
    own = tmp_path / "own.jsonl"
    own.write_text("{}\n")
    for data, is_own in (
        (["train-data.jsonl"], True),
        (["./train-data.jsonl:3"], True),
        ([str(link)], True),
        ([str(own)], False),
        (["train-data.jsonl", str(own)], False),
        (["train-data.jsonl", "hf://owner/name"], False),
        (["es://index"], False),
        (["none.jsonl"], False),
    ):
        assert is_default_data(data) == is_own, data


@pytest.mark.slow
def test_train_and_eval_run_in_an_empty_folder(empty):
    flags = ["--steps", "2", "--eval-steps", "0", "--batch-size", "4"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0 and "eval-data: 150 queries" in done.stdout, done.stderr
    assert (empty / "adapters" / "final").is_dir()
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", "--model", "adapters/final"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "\n eval-data " in done.stdout, done.stderr
