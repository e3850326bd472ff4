"""No command writes over an input, or over a file that it did not write itself unless it is told to.

python -m pytest tests/utils/test_outputs.py
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_retrieval.exporters import job
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.retrieval import index_folder
from mlx_retrieval.training import output_folder
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.outputs import check_output, check_parent


@pytest.fixture
def source(tmp_path) -> Path:
    """A file that a command reads, a link to it of each kind, and a folder of inputs."""
    file = tmp_path / "rows.jsonl"
    file.write_text("precious")
    (tmp_path / "symbolic.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "corpus.jsonl").write_text("precious")
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "symbolic.jsonl", "hard.jsonl", "folder/deep/corpus.jsonl"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_are_never_written_over(tmp_path, source, name, overwrite):
    inputs = [None, "owner/name-on-the-hub", "x" * 5000, str(source), tmp_path / "folder"]
    with pytest.raises(UserError, match=f"^--output .*{name}: this file is .* input.*; inputs are never"):
        check_output(tmp_path / name, overwrite, inputs)


def test_other_files_only_with_overwrite(tmp_path, source):
    other = tmp_path / "other.jsonl"
    other.write_text("")
    with pytest.raises(UserError, match=r"other.jsonl: the file exists \(--overwrite replaces it\)"):
        check_output(other, False, [source])
    check_output(other, True, [source])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the file exists"):
        check_output(tmp_path / "dangling", False)
    os.mkfifo(tmp_path / "pipe")
    not_files = [*map(Path, ("/dev/null", "/dev/stdout")), tmp_path / "pipe", tmp_path / "folder"]
    for path in not_files:  # even if /dev/stdout leads to a regular file
        for overwrite in (False, True):
            with pytest.raises(UserError, match="this is a folder" if path == not_files[-1] else "not a regular file$"):
                check_output(path, overwrite)


def test_no_file_becomes_part_of_a_model_or_an_index(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    for name in ("modules.json", "other.safetensors"):
        with pytest.raises(UserError, match=f"{name}: {tmp_path} holds a model"):
            check_output(tmp_path / name, True)
    for name in ("vectors.npy", "mined.jsonl", "results.json", "sub/config.json"):
        check_output(tmp_path / name, False)
    (tmp_path / ".index" / "chunks.lance").mkdir(parents=True)
    (tmp_path / ".index" / "index.json").write_text("")
    with pytest.raises(UserError, match="is an index of search.py"):
        check_output(tmp_path / ".index" / "results.csv", True)


def test_folders_that_cannot_be_written_to(tmp_path, source, monkeypatch):
    check_output(tmp_path / "new" / "folders" / "v.npy", False, [source])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="rows.jsonl is not a folder"):
        check_output(source / "below" / "v.npy", False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"^--index .*: the folder {tmp_path} cannot be written to"):
        check_parent(tmp_path / "new" / "v.npy", "--index")


# --- every command that writes a file ---------------------------------------------------------------------------------

ROW = json.dumps({"query": "a", "positive": "b", "negatives": ["c"], "text": "d", "path": "a.py"}) + "\n"
COMMANDS = {
    "embed.py": "--model m --input {input} --output {output}",
    "eval.py": "--model m --eval-tasks {folder} --output {output}",
    "search.py eval": "{input} --index i --output {output}",
    "mine.py code": "{input} --output {output}",
    "mine.py negatives": "--data {input} --by bm25 --output {output}",
    "mine.py score": "--data {input} --teacher m --output {output}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_keep_inputs_and_other_files(tmp_path, capsys, name):
    """Regression: `embed.py --input x.jsonl --output x.jsonl` replaced the texts by their vectors."""
    ending = ".py" if name == "mine.py code" else ".jsonl"
    source, other = tmp_path / f"rows{ending}", tmp_path / "other.jsonl"
    for file in (source, other):
        file.write_text(ROW)
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text(ROW)
    (tmp_path / f"link{ending}").symlink_to(source)
    script, *words = name.split()
    main = importlib.import_module(script.removesuffix(".py")).main
    target = folder / "corpus.jsonl" if script == "eval.py" else tmp_path / f"link{ending}"
    if name == "embed.py" or ending == ".jsonl":
        slots = {"input": source, "folder": folder}
        flags = COMMANDS[name].format(output=other, **slots).split()
        assert main([*words, *flags]) == 2
        assert "the file exists (--overwrite replaces it)" in capsys.readouterr().err
    for path in (source, target)[script == "eval.py" :]:
        flags = COMMANDS[name].format(output=path, input=source, folder=folder).split()
        assert main([*words, *flags, "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert "; inputs are never overwritten" in error and error.count("\n") == 1
    assert [file.read_text() for file in (source, other, folder / "corpus.jsonl")] == [ROW] * 3


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_run_replaces_no_file_of_others_and_no_input(tmp_path):
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "rows.jsonl").write_text("precious")
    settings = Settings(data=[f"{folder}/best/rows.jsonl:2"], output=str(folder), overwrite=True, eval_tasks=[])
    with pytest.raises(UserError, match="would replace best, and .*rows.jsonl is an input"):
        output_folder.check(folder, settings)
    with pytest.raises(UserError, match="would replace best, and .* is an input"):
        output_folder.check(folder, Settings(model=str(folder / "best"), output=str(folder), overwrite=True))
    shutil.rmtree(folder / "best")
    with pytest.raises(UserError, match="this folder is an input"):
        output_folder.check(folder, Settings(data=[str(folder)], output=str(folder)))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a model is in this folder"):
        output_folder.check(folder, Settings(output=str(folder)))
    (folder / "config.json").unlink()
    (folder / "results.json").write_text("precious")
    with pytest.raises(UserError, match="results.json is there without a run"):
        output_folder.check(folder, Settings(output=str(folder)))
    output_folder.check(folder, Settings(output=str(folder), overwrite=True))
    with pytest.raises(UserError, match="would replace results.json"):
        output_folder.check(folder, Settings(output=str(folder), overwrite=True, data=[str(folder / "results.json")]))


def test_a_run_keeps_the_settings_file_that_it_was_given(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"# mine\noutput: {tmp_path}\n")
    with pytest.raises(UserError, match="--overwrite would replace this file"):
        from_flags("", argv=["--config", str(file), "--overwrite"])
    assert from_flags("", argv=["--config", str(file), "--overwrite", "--output", "other"])[0].output == "other"


def test_an_index_replaces_no_file_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        index_folder.check(tmp_path)


def test_notes_of_file_managers_do_not_make_a_folder_somebody_elses(tmp_path):
    """A look at a folder in Finder leaves .DS_Store there, and the next command refused it."""
    for name in (".DS_Store", "._index.json", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0")
    index_folder.check(tmp_path)
    job.check_output(tmp_path, overwrite=False, sources=[])
    assert not ResumableCache(tmp_path).open({})[0]
    (tmp_path / "about.json").unlink()
    (tmp_path / "DS_Store").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        index_folder.check(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        job.check_output(tmp_path, overwrite=False, sources=[])
    with pytest.raises(UserError, match="holds other files"):
        ResumableCache(tmp_path).open({})
