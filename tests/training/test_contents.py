"""A run is resumed with the data, the evaluation and the base model that it was begun with, or it says what differs.

python -m pytest tests/training/test_contents.py
"""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from mlx_retrieval.dataset import row_files
from mlx_retrieval.dataset.contents import Content, differences, of_file
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.sources import open_source
from mlx_retrieval.training import contents
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

# --- contents ---------------------------------------------------------------------------------------------------------


def test_differences_name_what_changed_and_how():
    one, two = Content("a.jsonl", 40, "rows", "x"), Content("b.jsonl", 7, "rows", "y")
    index = Content("http://h:9200/docs", 0, "", "docs id1")
    assert differences([one, two, index], [one, two, index]) == []
    assert differences([one], [one._replace(name="moved/a.jsonl")]) == []
    assert differences([one], [one._replace(size=44, digest="z")]) == ["a.jsonl: 40 rows then, 44 now"]
    assert differences([one], [one._replace(digest="z")]) == ["a.jsonl: 40 rows as then, but not the same"]
    assert differences([one], [one, two]) == ["b.jsonl: was not read then"]
    assert differences([one, two], [two]) == ["a.jsonl: was read then, and is not now"]
    assert differences([index], [index._replace(digest="docs id2")]) == [f"{index.name}: another index of this name"]
    assert differences([index], [index._replace(digest="")]) == []


def test_a_small_file_is_read_whole_and_a_large_one_in_blocks(tmp_path, monkeypatch):
    file = tmp_path / "corpus.jsonl"
    data = bytes(range(256)) * 400
    file.write_bytes(data)
    whole = of_file(file)

    def differs(at: int, length: int = 1) -> bool:
        file.write_bytes(data[:at] + bytes(b ^ 1 for b in data[at : at + length]) + data[at + length :])
        changed = of_file(file).digest != whole.digest
        file.write_bytes(data)
        return changed

    assert (whole.size, whole.unit) == (len(data), "bytes")
    assert all(differs(at) for at in (0, 51_111, len(data) - 1))
    monkeypatch.setattr(files, "READ_WHOLE", 1_000)
    monkeypatch.setattr(files, "BLOCK", 100)
    whole = of_file(file)
    assert differs(0) and differs(len(data) - 1) and not differs(150)  # the limit that the documentation states
    assert all(differs(at, len(data) // files.BLOCKS + 100) for at in (1_000, 51_111))


ROWS = [{"query": f"query {i}", "positive": f"answer {i}"} for i in range(40)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(file: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "folder", "parquet", "hub", "mixture"])
def test_one_edited_row_of_any_source_changes_its_content(tmp_path, monkeypatch, kind):
    name = {"gz": "rows.jsonl.gz", "parquet": "rows.parquet", "folder": "train.jsonl"}.get(kind, "rows.jsonl")
    file = tmp_path / name

    def read(rows: list[dict]) -> list[Content]:
        if kind == "parquet":
            write_parquet(file, rows)
        else:
            file.write_bytes(gzip.compress(lines(rows)) if kind == "gz" else lines(rows))
        monkeypatch.setattr(row_files, "_hub_rows", lambda _: iter(rows))
        source = {"hub": "hf://owner/name", "folder": str(tmp_path)}.get(kind, str(file))
        return open_source([f"{source}:2", f"{source}:1"] if kind == "mixture" else [source]).contents()

    before = read(ROWS)
    assert [content.size for content in before] == [40] * (2 if kind == "mixture" else 1) and before == read(ROWS)
    edited = [*ROWS[:-2], ROWS[-2] | {"positive": "another 38"}, ROWS[-1]]
    assert "40 rows as then, but not the same" in differences(before, read(edited))[0]
    assert "40 rows then, 39 now" in differences(before, read(ROWS[:-1]))[0]
    assert differences(before, read([ROWS[1], ROWS[0], *ROWS[2:]]))  # the order is content too


def test_an_index_is_known_by_its_id():
    """Documents may come and go, `ElasticRows.restore` deals with that; an index made again counts from 0."""
    answer = {"docs": {"settings": {"index": {"uuid": "id1"}}}}
    found = object.__new__(Documents)
    found.address = SimpleNamespace(index="docs")
    client = SimpleNamespace(indices=SimpleNamespace(get_settings=None))
    found.server = SimpleNamespace(client=client, call=lambda method, **body: answer)
    assert found.identity() == "docs id1"

    def refuse(method, **body):
        raise UserError("403")

    found.server.call = refuse
    assert found.identity() == ""


# --- what a resumed run does with them --------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """A run's folder with its contents."""
    now = {
        "data": [Content("rows.jsonl", 40, "rows", "x")],
        "evaluation": [Content("e/corpus.jsonl", 9, "bytes", "e")],
        contents.BASE: [Content("m/model.safetensors", 1000, "bytes", "w")],
    }
    contents.write(tmp_path, now)
    return tmp_path, now


def test_equal_contents_continue_without_a_word(begun, capsys):
    run, now = begun
    assert contents.check(run, now, False) == set() and capsys.readouterr().out == ""


def test_changed_data_are_refused_or_accepted(begun, capsys):
    run, now = begun
    changed = now | {
        "data": [Content("rows.jsonl", 44, "rows", "y")],
        "evaluation": [Content("e/corpus.jsonl", 9, "bytes", "f")],
    }
    with pytest.raises(UserError) as refusal:
        contents.check(run, changed, False)
    for part in ("data: rows.jsonl: 40 rows then, 44 now", "evaluation: e/corpus.jsonl: 9 bytes as then, but not the"):
        assert part in str(refusal.value)
    assert "--accept-changed-data continues" in str(refusal.value)
    assert contents.check(run, changed, True) == {"data", "evaluation"}
    assert capsys.readouterr().out.count("changed ") == 2


@pytest.mark.parametrize("accept", [False, True])
def test_another_base_model_is_never_accepted(begun, accept):
    run, now = begun
    other = now | {contents.BASE: [Content("m/model.safetensors", 1000, "bytes", "v")]}
    with pytest.raises(UserError, match="the base model is not the one .*model.safetensors: 1,000 bytes as then, but"):
        contents.check(run, other, accept)


def test_a_run_of_an_earlier_version_continues_and_says_that_nothing_was_compared(begun, capsys):
    run, now = begun
    (run / contents.FILE).unlink()
    assert contents.check(run, now, False) == set()
    assert "not compared with those that the run was begun with" in capsys.readouterr().out
    (run / contents.FILE).write_text("[]")
    with pytest.raises(UserError, match="contents.json: not as this toolkit writes it"):
        contents.check(run, now, False)


def test_an_index_whose_settings_cannot_be_read_is_told(begun, capsys):
    run, now = begun
    index = Content("http://h/docs", 0, "", "id1")
    contents.write(run, now | {"data": [index]})
    assert contents.check(run, now | {"data": [index._replace(digest="")]}, False) == set()
    assert "http://h/docs: not compared" in capsys.readouterr().out
    contents.write(run, now | {"data": [index._replace(digest="")]})  # what was known is not lost
    with pytest.raises(UserError, match="another index of this name"):
        contents.check(run, now | {"data": [index._replace(digest="id2")]}, False)


def test_a_run_inside_its_model_s_folder_is_no_part_of_the_model(tmp_path):
    for name in ("model.safetensors", "2_Dense/model.safetensors", "run/adapters.safetensors", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [Path(c.name).relative_to(tmp_path).as_posix() for c in contents.base_contents(tmp_path, tmp_path / "run")]
    assert names == ["model.safetensors", "2_Dense/model.safetensors", "config.json"]


def edit_row(settings: Settings) -> None:
    file = Path(settings.data[0]) / "train.jsonl"
    file.write_text(file.read_text().replace("number 3 ", "number 33 ", 1))


def edit_validation(settings: Settings) -> None:
    file = Path(settings.data[0]) / "valid.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def edit_evaluation(settings: Settings) -> None:
    file = Path(settings.eval_tasks[0]) / "queries.jsonl"
    file.write_text(file.read_text().replace("meow", "mew"))


def edit_base(settings: Settings) -> None:
    file = Path(settings.model) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 64
    file.write_bytes(data)


@pytest.fixture
def job(tmp_path, small):
    """`job(task)` returns the settings of a small run on a folder with validation rows."""
    from beir_folders import write_folder

    model = shutil.copytree(small, tmp_path / "model")
    documents = [{"_id": "d0", "text": "dogs bark"}, {"_id": "d1", "text": "cats meow"}]
    queries = [{"_id": "q0", "text": "which dogs bark"}, {"_id": "q1", "text": "cats that meow"}]
    evaluation = write_folder(tmp_path / "task", documents, queries, "q0\td0\t1\nq1\td1\t1\n")
    (tmp_path / "data").mkdir()

    def make(task: str, **changes) -> Settings:
        for name, count in (("train", 8), ("valid", 4)):
            rows = [
                {"prompt": f"number {i} ?", "completion": f"answer {i}"}
                if task == "chat"
                else {"query": f"number {i} ?", "positive": f"answer {i}", "negatives": [f"other {i}"]}
                for i in range(count)
            ]
            (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(rows))
        given = {"model": str(model), "data": [str(tmp_path / "data")], "batch_size": 4, "steps": 4, "lora_rank": 2}
        given |= {"output": str(tmp_path / "run"), "save_steps": 0, "warmup": 0.0, "max_length": 300}
        given |= {} if task == "chat" else {"eval_tasks": [str(evaluation)]}
        given |= {"skip_eval_init": True} | changes
        return for_task(task, given)

    return make


CASES = [
    ("embed", edit_row, r"data: .*train.jsonl: 8 rows as then"),
    ("embed", edit_validation, r"validation: .*valid.jsonl: 4 rows then, 3 now"),
    ("embed", edit_evaluation, r"evaluation: .*queries.jsonl: \d+ bytes then, \d+ now"),
    ("embed", edit_base, r"the base model is not the one .*model.safetensors: "),
    ("chat", edit_row, r"data: .*train.jsonl: 8 conversations as then"),
    ("chat", edit_base, r"the base model is not the one .*model.safetensors: "),
    *(pytest.param(task, edit, told, marks=pytest.mark.slow) for task in ("late", "rerank") for edit, told in (
        (edit_row, "train.jsonl: 8 rows as then"), (edit_evaluation, "queries.jsonl"), (edit_base, "the base model is"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("task", "edit", "told"), CASES)
def test_every_task_refuses_what_has_changed(job, task, edit, told):
    settings = job(task)
    begun = training_run.prepare(settings)
    training_run.begin(begun)
    begun.trainer.state.step = 1
    begun.trainer.save()
    given = {"resume": True, "output": settings.output}
    training_run.begin(training_run.prepare(train.resumed_settings(given)))  # unchanged
    edit(settings)
    resumed = training_run.prepare(train.resumed_settings(given))
    with pytest.raises(UserError, match=told):
        training_run.begin(resumed)
    accepted = training_run.prepare(train.resumed_settings(given | {"accept_changed_data": True}))
    if edit is edit_base:
        with pytest.raises(UserError, match=told):
            training_run.begin(accepted)
        return
    training_run.begin(accepted)
    assert accepted.trainer.state.step == 1
    training_run.begin(
        training_run.prepare(train.resumed_settings(given))
    )  # what was accepted is the run's from now on


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embed", "rerank", "chat"])
def test_a_run_continues_to_its_end_with_data_that_were_accepted(job, task, tmp_path, capsys):
    """Other data, other validation rows, other judgements: figures of two evaluations are not compared."""
    settings = job(task, stop_after=2, skip_eval_init=False, eval_steps=1)
    train.train(settings)
    edit_row(settings)
    edit_validation(settings)
    if task != "chat":
        edit_evaluation(settings)
        queries = tmp_path / "task" / "queries.jsonl"
        queries.write_text(queries.read_text().replace("q1", "q2"))
        qrels = tmp_path / "task" / "qrels" / "test.tsv"
        qrels.write_text(qrels.read_text().replace("q1", "q2"))
    command = ["--resume", "--output", settings.output]
    assert train.main(command) == 2 and "--accept-changed-data" in capsys.readouterr().err
    assert train.main([*command, "--accept-changed-data"]) == 0
    assert (tmp_path / "run" / "final").is_dir() and "changed" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["before"] is None


# --- from another folder ----------------------------------------------------------------------------------------------


def test_saved_paths_are_whole_and_all_else_is_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "model/config.json", "task/corpus.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    sources = ["a.jsonl:2", "b.jsonl:1", "hf://owner/name:train", "es://index", "https://host:9200/index"]
    settings = Settings(model="model", data=sources, eval_tasks=["task", "NanoMSMARCORetrieval"], output="run")
    saved = settings.with_absolute_paths()
    assert saved.data == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1", *sources[2:]]
    assert saved.eval_tasks == [f"{tmp_path}/task", "NanoMSMARCORetrieval"]
    assert (saved.model, saved.output) == (f"{tmp_path}/model", f"{tmp_path}/run")
    assert Settings(model="owner/name").with_absolute_paths().model == "owner/name"
    assert saved.with_absolute_paths() == saved


def test_a_run_is_resumed_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(lines(ROWS))
    Path("run").mkdir()
    write_yaml(Settings(data=["rows.jsonl"], eval_tasks=[], output="run", steps=7), Path("run/config.yaml"))
    given = {"resume": True, "output": "run"}
    same = train.resumed_settings(given | {"data": ["rows.jsonl"], "steps": 7})  # what is given again may be relative
    assert same.data == ["rows.jsonl"]  # and so do the first lines and the report
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = train.resumed_settings({"resume": True, "output": "../run"})
    assert resumed.data == [str(tmp_path / "rows.jsonl")] and Path(resumed.output).samefile(tmp_path / "run")
    with pytest.raises(UserError, match="--data was"):
        train.resumed_settings({"resume": True, "output": "../run", "data": ["rows.jsonl"]})
    ends = {"resume": True, "output": "../run", "steps": 12, "epochs": 0.5}
    with pytest.raises(UserError, match="--steps 12 and --epochs 0.5 are two ends of the run, which may disagree"):
        train.resumed_settings(ends)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "adapters")  # `--output` is the folder that was read
    assert Path(train.resumed_settings({"resume": True}).output).resolve() == tmp_path / "elsewhere" / "adapters"
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="rows.jsonl: no such file or folder; if it has moved, correct adapters/config"):
        train.resumed_settings({"resume": True})
