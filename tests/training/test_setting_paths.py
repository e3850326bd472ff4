"""Settings that name what a run reads: one list of them serves all that protects, saves and looks for files.

python -m pytest tests/training/test_setting_paths.py
"""

import dataclasses
import re

import pytest

import train
from mlx_retrieval.training import output_folder, setting_paths
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.setting_fields import kind_of
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils.errors import UserError


def test_every_setting_that_names_a_file_or_model_is_in_the_list():
    """A setting that takes any text, and whose help speaks of files, folders or a model, but for --output."""
    speaks = re.compile(r"\b(files?|folders?|model)\b")
    texts = [f for f in dataclasses.fields(Settings) if kind_of(f)[0] is str and "choices" not in f.metadata]
    assert {f.name for f in texts if speaks.search(f.metadata["help"])} - {"output"} == {*setting_paths.named(Settings)}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings with a file or folder of its own, of the current folder, for every input."""
    monkeypatch.chdir(tmp_path)
    for name in ("best/config.json", "teacher/config.json", "task/corpus.jsonl", "other/corpus.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for name in ("a.jsonl", "b.jsonl", "guide.safetensors", "teacher.safetensors"):
        (tmp_path / name).touch()
    files = {"guide": "guide.safetensors", "teacher_vectors": "teacher.safetensors"}
    return Settings(model="best", data=["a.jsonl:2", "b.jsonl:1"], eval_tasks=["task", "NanoNQRetrieval"], rounds=2,
                    guard=["other"], rounds_teacher="teacher", distill_weight=1.0, **files)  # fmt: skip


def test_paths_are_changed_and_weights_and_names_of_the_hub_stay(settings, tmp_path):
    """Regression: the teacher of --rounds was looked for in the current folder when the run was resumed."""
    saved = settings.with_absolute_paths()
    assert (saved.rounds_teacher, saved.data[0]) == (f"{tmp_path}/teacher", f"{tmp_path}/a.jsonl:2")
    assert saved.eval_tasks == [f"{tmp_path}/task", "NanoNQRetrieval"] and Settings(eval_tasks=None).eval_tasks is None
    names = setting_paths.inputs(saved)
    assert {name for name in names if "/" not in name} == {"NanoNQRetrieval"} and len(names) == 9
    source = {"data": "a.jsonl", "weight": 2}
    mixed = setting_paths.with_paths(Settings(sources=[source]), lambda name: f"x/{name}")
    assert mixed.sources == [source | {"data": "x/a.jsonl"}] and mixed.data == ["x/a.jsonl"]


@pytest.mark.parametrize("name", ["model", "guide", "teacher_vectors", "rounds_teacher", "eval_tasks", "guard"])
def test_overwrite_removes_no_input(settings, tmp_path, name):
    """Regression: --rounds-teacher adapters/best --output adapters --overwrite removed the teacher."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "file").touch()
    kept = str(tmp_path / "run" / "best" / "file")
    given = [kept] if isinstance(getattr(settings, name), list) else kept
    changed = dataclasses.replace(settings, **{name: given}, output="run", overwrite=True)
    with pytest.raises(UserError, match="--output run: the run would replace best, and .*file is an input"):
        output_folder.check(changed.folder, changed)


@pytest.mark.parametrize("name", ["guide.safetensors", "teacher.safetensors", "teacher/config.json"])
def test_a_resumed_run_names_inputs_that_are_gone(settings, tmp_path, name):
    (tmp_path / "run").mkdir()
    write_yaml(dataclasses.replace(settings, output="run"), tmp_path / "run" / "config.yaml")
    assert train.resumed_settings({"output": "run"}).guide == "guide.safetensors"  # as it is shortest to name
    (tmp_path / name).unlink()
    gone = (tmp_path / name).parent if name.startswith("teacher/") else tmp_path / name
    if gone.is_dir():
        gone.rmdir()
    with pytest.raises(UserError, match=f"--resume: {gone}: no such file or folder; if it has moved, correct"):
        train.resumed_settings({"output": "run"})
