"""--rounds: negatives are mined with the model, trained on, and mined again, and a run goes on where it was stopped.

python -m pytest tests/training/test_rounds.py
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import train
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.training import checkpoint, output_folder, reporting, round_mining, rounds
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.rounds import Rounds
from mlx_retrieval.training.run_data import open_data
from mlx_retrieval.training.settings_file import read_yaml, write_yaml
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.errors import UserError

WORDS = ["boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town"]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eighty pairs in columns of other names."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    pick = [f"{WORDS[i % 10]} {WORDS[(3 * i + 1) % 10]}" for i in range(80)]
    rows = [{"ask": f"{i} {text}", "tell": f"{i} {text} {WORDS[i // 8]}"} for i, text in enumerate(pick)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(data, small, tmp_path):
    """Settings of two rounds of two steps, changed by keyword."""

    def make(**changes) -> Settings:
        given = {"model": small, "data": [str(data)], "columns": "query=ask,document=tell", "batch_size": 8, "steps": 2}
        given |= {"rounds": 2, "lora_rank": 2, "lora_keys": ["q_proj"], "save_steps": 1, "learning_rate": 1e-3}
        return Settings(**given | {"output": str(tmp_path / "run")} | changes)

    return make


@pytest.fixture(scope="module")
def whole(data, small, tmp_path_factory) -> Path:
    """The folder of a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    given = {"model": small, "data": [str(data)], "columns": "query=ask,document=tell", "batch_size": 8, "steps": 2}
    given |= {"rounds": 2, "lora_rank": 2, "lora_keys": ["q_proj"], "save_steps": 1, "learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patch:  # pictures and pages take most of the time
        patch.setattr(reporting, "draw_curves", lambda *_: None)
        patch.setattr(training_run, "write_report", lambda *_: None)
        training_run.train(Settings(**given, output=str(folder)))
    return folder


def test_rounds_mine_with_the_model_of_the_round_before(whole, small):
    first, second = (checkpoint.round_folder(whole, number) for number in (1, 2))
    configs = [read_yaml(folder / "config.yaml") for folder in (first, second)]
    assert configs[0]["model"] == small and configs[1]["model"] == str(first / "best")
    assert [config["seed"] for config in configs] == [0, 1]
    mined = [read(folder / "mined" / "1.jsonl") for folder in (first, second)]
    assert mined[0] != mined[1] and all(len(row["negatives"]) <= 1 for rows in mined for row in rows)
    assert any(row["negatives"] for row in mined[0])


def test_held_out_texts_are_the_same_in_all_rounds_and_mined_for_nothing(whole):
    questions = whole / "held-out"
    asked = {row["text"] for row in read(questions / "queries.jsonl")}
    documents = {row["_id"]: row["text"] for row in read(questions / "corpus.jsonl")}
    judged = [line.split("\t") for line in (questions / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    held = asked | {documents[document] for _, document, _ in judged}
    assert asked
    for number in (1, 2):
        folder = checkpoint.round_folder(whole, number)
        assert read_yaml(folder / "config.yaml")["eval_tasks"] == [str(questions)]
        rows = read(folder / "mined" / "1.jsonl")
        texts = {text for row in rows for text in (row["query"], row["positive"], *row["negatives"])}
        assert texts and not texts & held


def test_the_run_s_folder_has_what_any_run_leaves(whole):
    results = json.loads((whole / "results.json").read_text())
    assert len(results["rounds"]) == 2 and results["improved"] is True
    assert results["before"] == results["rounds"][0]["before"]
    assert results["after"] == results["rounds"][results["after_round"] - 1]["after"]
    best = checkpoint.round_folder(whole, results["after_round"]) / "best"
    for name in ("adapters.safetensors", "retrieval_config.json"):
        assert (whole / "best" / name).read_bytes() == (best / name).read_bytes()
    assert (whole / "final").is_dir() and (whole / "curves.png").is_file()
    page = (whole / "report.html").read_text()
    assert "Round 2: " in page and "rounds/round-" in page
    assert read_yaml(whole / "best" / "config.yaml")["rounds"] == 2
    assert [r["step"] for r in read(whole / "metrics.jsonl") if r["type"] == "train"] == [1, 2, 3, 4]
    assert checkpoint.is_finished(whole) and output_folder.to_resume({"output": str(whole)}) == whole


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_ends_as_an_uninterrupted_one(whole, settings, tmp_path, monkeypatch):
    """Stopped while it mines, by Ctrl-C in a step, and between two rounds; each time --resume continues it."""
    given = {"resume": True, "output": str(tmp_path / "run")}
    mine_negatives = round_mining.mine_negatives
    monkeypatch.setattr(round_mining, "mine_negatives", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="negatives were mined. Continue: python train.py --resume --output"):
        training_run.train(settings())
    monkeypatch.setattr(round_mining, "mine_negatives", mine_negatives)

    class StopError(Exception):
        pass

    def one_step(settings, introduction):
        training_run.train(Settings(**settings.to_dict() | {"stop_after": 1}), introduction)
        raise StopError

    def one_round(settings, introduction):
        training_run.train(settings, introduction)
        raise StopError

    for train_one in (one_step, one_round):
        with pytest.raises(StopError):
            rounds.train(train.resumed_settings(given), train_one)
    training_run.train(train.resumed_settings(given))
    for name in ("best", "final"):
        weights = [(run / name / "adapters.safetensors").read_bytes() for run in (whole, tmp_path / "run")]
        assert weights[0] == weights[1]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["improved"] is True
    with pytest.raises(UserError, match="--resume: the run in "):
        training_run.train(train.resumed_settings(given))


@pytest.fixture
def done(settings, tmp_path):
    """Make the folder of a run whose rounds came to these best scores; 0 = none better than before."""

    def make(*scores: float, planned: int = 2) -> Rounds:
        chosen = settings(rounds=planned)
        for number, score in enumerate(scores, 1):
            folder = checkpoint.round_folder(chosen.folder, number)
            (folder / "final").mkdir(parents=True)
            values = {"metric": "ndcg_at_10", "untrained": 0.5, "best": score or 0.5, "best_step": 2 * bool(score)}
            (folder / "final" / checkpoint.STATE).write_text(json.dumps(values))
            if score:
                (folder / "best").mkdir()
            (folder / "results.json").write_text("{}")
        return Rounds(chosen, lambda *_: {})

    return make


def test_the_next_round_starts_from_the_best_of_the_last_and_the_best_of_all_wins(done):
    outcomes = rounds.finished(done(0.7, 0.6, planned=3))
    assert [outcome.model for outcome in outcomes] == [str(outcome.folder / "best") for outcome in outcomes]
    assert rounds.best_of(outcomes).number == 1


def test_a_round_without_gain_is_the_last(done, monkeypatch):
    run = done(0.7, 0.0, planned=3)
    outcomes = rounds.finished(run)
    assert outcomes[-1].model is None
    monkeypatch.setattr(rounds, "mine_round", lambda *_: pytest.fail("a further round"))
    rounds.take_rounds(run, outcomes)
    assert len(outcomes) == 2


def test_a_run_that_gained_nothing_names_the_model_to_use(done, monkeypatch, capsys, small):
    run = done(0.0, planned=1)
    for name in ("write_curves", "write_round_report"):
        monkeypatch.setattr(rounds, name, lambda *_: None)
    folder = checkpoint.round_folder(run.folder, 1)
    (folder / "results.json").write_text('{"before": null, "after": null}')
    state = {"metric": "ndcg_at_10", "untrained": 0.5, "best": 0.5, "last": 0.4}
    (folder / "final" / checkpoint.STATE).write_text(json.dumps(state))
    assert rounds.conclude(run, rounds.finished(run))["improved"] is False
    out = capsys.readouterr().out
    assert f"{small}, which the run began with: final is no better" in out and "next" not in out
    assert (run.folder / "final").is_dir() and not (run.folder / "best").exists()


@pytest.fixture
def ending(done, monkeypatch) -> Rounds:
    """A run whose two rounds are done, the second with the better model, killed before that became the run's `best`."""
    run = done(0.6, 0.7)
    for number in (1, 2):
        folder = checkpoint.round_folder(run.folder, number)
        (folder / "best" / "adapters.safetensors").write_text(f"round {number}")
        (folder / "results.json").write_text('{"before": null, "after": null}')
    rounds._copy(checkpoint.round_folder(run.folder, 1) / "best", run, "best")
    for name in ("write_curves", "write_round_report"):
        monkeypatch.setattr(rounds, name, lambda *_: None)
    return run


def test_a_kill_before_the_best_round_s_model_is_copied(ending):
    """Regression: `best` stayed round 1's, while results.json and the screen said round 2."""
    assert rounds.conclude(ending, rounds.finished(ending))["after_round"] == 2
    assert (ending.folder / "best" / "adapters.safetensors").read_text() == "round 2"


def test_a_kill_before_the_figures_of_all_rounds_are_written(ending, monkeypatch):
    """Regression: the run had its `final` already, counted as finished, and never came to figures."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rounds, "results_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        rounds.conclude(ending, rounds.finished(ending))
    assert not (ending.folder / "final").exists()  # with which the run is finished
    rounds.conclude(ending, rounds.finished(ending))
    assert (ending.folder / "results.json").is_file() and (ending.folder / "final").is_dir()


def test_a_copy_of_the_held_out_questions_is_no_guard(settings, tmp_path):
    """Regression: its path was another one, so it guarded the run against nothing."""
    open_data(settings()).keep(tmp_path / "earlier")
    with pytest.raises(UserError, match="--guard .*earlier/held-out: the run is judged on this task, or on a copy"):
        training_run.train(settings(guard=[str(tmp_path / "earlier" / "held-out")]))
    assert not list((tmp_path / "run").rglob("mined"))


def test_a_run_without_evaluation_goes_on_from_the_last_step(tmp_path):
    assert rounds.Outcome(1, tmp_path, State(step=4)).model == str(tmp_path / "final")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": -1}, "--rounds -1: must not be negative"),
        ({"rounds": 0, "rounds_negatives": 2}, "--rounds-negatives 2: is for --rounds"),
        ({"rounds_negatives": 0}, "--rounds-negatives 0: must be above 0"),
        ({"rounds": 0, "rounds_teacher": "x"}, "--rounds-teacher x: is for --rounds"),
        ({"loss": "kl_distill"}, "--loss kl_distill: learns a teacher's scores, .* those of --rounds-teacher"),
        ({"stop_after": 3}, "--stop-after 3: does not go with --rounds"),
        ({"profile": 3}, "--profile 3: does not go with --rounds"),
        ({"data": ["es://index"], "columns": None}, "--rounds: es://index is an index"),
        ({"task": "late"}, "--rounds is for --task embed, and this is late"),
        ({"task": "chat", "data": ["data"], "columns": None}, "--rounds is for --task embed, and this is chat"),
    ],
)
def test_what_cannot_be_done_in_rounds_is_refused_before_anything_is_written(settings, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        training_run.train(settings(**changes))
    assert not (tmp_path / "run").exists()


def test_rows_without_a_positive_are_refused(settings, write_rows):
    file = write_rows([{"query": f"q {i}", "document": "d", "label": i % 2} for i in range(9)])
    with pytest.raises(UserError, match="--rounds: .*train.jsonl has rows of the kind 'label'"):
        training_run.train(settings(data=[str(file)], columns=None))


def test_resumed_settings_of_rounds(settings, tmp_path):
    (tmp_path / "run").mkdir()
    write_yaml(settings(), tmp_path / "run" / "config.yaml")
    given = {"resume": True, "output": str(tmp_path / "run")}
    assert train.resumed_settings(given | {"rounds": 3}).rounds == 3
    with pytest.raises(UserError, match="--steps is that of every round .*; --rounds N adds rounds"):
        train.resumed_settings(given | {"steps": 9})
    write_yaml(settings(rounds=0), tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match="but --rounds was 0"):
        train.resumed_settings(given | {"rounds": 3})


def test_nothing_is_left_to_do(done):
    run = done(0.6, 0.7)
    write_yaml(run.settings, run.folder / "config.yaml")
    (run.folder / "final").mkdir()
    write_yaml(run.settings, run.folder / "final" / "config.yaml")
    with pytest.raises(UserError, match="is finished, after 2 rounds. --rounds N, above that, adds rounds"):
        rounds.finished(run)
    run.settings.rounds = 3
    assert len(rounds.finished(run)) == 2
    (checkpoint.round_folder(run.folder, 2) / "best").rmdir()
    with pytest.raises(UserError, match="ended with round 2, which was no better than the model that it began with"):
        rounds.finished(run)


def test_the_length_of_a_round_is_that_of_the_whole_run_s_data(settings, tmp_path):
    """Regression: a round took an epoch of the toolkit's own data, where --help and --dry-run say 150 steps."""
    own = Settings(rounds=2, output=str(tmp_path / "own"))
    for chosen, length in ((own, (150, None)), (settings(steps=None), (None, 1.0)), (settings(), (2, None))):
        run = Rounds(chosen, lambda *_: {})
        rounds.begin(run, [])
        of_round = run.settings_of(1, chosen.model)
        assert (of_round.steps, of_round.epochs) == length and chosen.steps == (length[0] or 7)


def test_fewer_rounds_than_were_done(done):
    run = done(0.6, 0.7, planned=1)
    with pytest.raises(UserError, match="--rounds 1: the run in .* has done 2 rounds"):
        rounds.finished(run)


def test_rounds_negatives_and_sources_that_are_mixed(settings, write_rows, tmp_path):
    """Each source is mined by itself, and keeps its weight."""
    files = [
        write_rows([{"query": f"{name} {i}", "positive": f"{name} {i} {WORDS[i]}"} for i in range(10)], f"{name}.jsonl")
        for name in ("one", "two")
    ]
    chosen = settings(data=[f"{files[0]}:2", f"{files[1]}:1"], columns=None, eval_tasks=[], rounds_negatives=3)
    run = Rounds(chosen, lambda *_: {})
    rounds.begin(run, [])
    assert [len(read(file)) for file in run.rows] == [10, 10]
    of_round = run.settings_of(1, chosen.model)
    mined = checkpoint.round_folder(chosen.folder, 1) / "mined"
    assert of_round.data == [f"{mined / '1.jsonl'}:2", f"{mined / '2.jsonl'}:1"] and of_round.rounds == 0
    round_mining.mine_round(of_round, chosen, run.rows)
    texts = [text for row in read(mined / "2.jsonl") for text in row["negatives"]]
    assert texts and all(text.startswith("two") for text in texts)
    assert max(len(row["negatives"]) for row in read(mined / "1.jsonl")) == 3


class ToyTeacher:
    kind, fingerprint = "reranker", "toy"

    def __init__(self, name):
        self.model = type("Model", (), {"name": name})

    def score_groups(self, groups):
        return [
            np.array([1.0] + [0.96 if "cold" in text else 0.5 for text in documents[1:]]) for _, documents in groups
        ]


@pytest.mark.parametrize(("loss", "teacher"), [(None, None), (None, "toy"), ("kl_distill", "toy")])
def test_a_row_keeps_all_its_positives(settings, write_rows, tmp_path, monkeypatch, loss, teacher):
    """But those that are held out. Regression: each became a row of its own, and a negative of the others' query."""
    monkeypatch.setattr(round_mining, "Teacher", ToyTeacher)
    texts = [(f"{i} {WORDS[i % 10]}", f"{i} {WORDS[i % 7]} {WORDS[i % 9]}") for i in range(40)]
    given = [{"query": f"ask {i}", "positive": [*pair, texts[0][0]], "rank": 1 + i % 2} for i, pair in enumerate(texts)]
    (tmp_path / "data").mkdir()
    write_rows(given, "data/train.jsonl")
    write_rows([{"query": "ask", "positive": texts[0][0]}], "data/valid.jsonl")
    made = {"data": [str(tmp_path / "data")], "columns": None, "loss": loss, "rounds_teacher": teacher}
    run = Rounds(chosen := settings(**made), lambda *_: {})
    rounds.begin(run, [])
    source = open_data(settings(**made)).rows
    expected = [source[i] for i in sorted(itertools.islice(source.numbers(0, 0), len(source)))]
    assert [len(example.other_positives) for example in expected] == [0] + [1] * 78

    def read_back(file: Path) -> list[Example]:
        rows = Rows([file])
        return [rows[i]._replace(negatives=(), scores=()) for i in range(len(rows))]

    assert read_back(run.rows[0]) == expected
    round_mining.mine_round(run.settings_of(1, chosen.model), chosen, run.rows)
    mined = checkpoint.round_folder(chosen.folder, 1) / "mined" / "1.jsonl"
    assert read_back(mined) == expected and any(row["negatives"] for row in read(mined))


@pytest.mark.parametrize(("loss", "is_distilled"), [("kl_distill", True), (None, False)])
def test_rounds_teacher(settings, tmp_path, monkeypatch, loss, is_distilled):
    """Its scores are learnt, or they decide which negatives are left out."""
    monkeypatch.setattr(round_mining, "Teacher", ToyTeacher)
    chosen = settings(rounds_teacher="toy", loss=loss, rounds_negatives=4)
    run = Rounds(chosen, lambda *_: {})
    rounds.begin(run, [])
    round_mining.mine_round(run.settings_of(1, chosen.model), chosen, run.rows)
    folder = checkpoint.round_folder(chosen.folder, 1) / "mined"
    assert [file.name for file in folder.iterdir()] == ["1.jsonl"]
    rows = read(folder / "1.jsonl")
    assert all(("scores" in row) == is_distilled for row in rows)
    negatives = [text for row in rows for text in row["negatives"]]
    assert negatives and any("cold" in text for text in negatives) == is_distilled
    if is_distilled:
        assert all(len(row["scores"]) == 1 + len(row["negatives"]) for row in rows)
        training_run.prepare(run.settings_of(1, chosen.model))  # rows without negatives are no error


def test_a_teacher_that_does_not_exist_is_named_by_its_flag(settings, tmp_path):
    with pytest.raises(UserError, match="^--rounds-teacher .*nowhere: no folder .*nowhere$"):
        training_run.train(settings(rounds_teacher=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing_and_says_how_long_it_takes(settings, tmp_path, capsys):
    plan = training_run.train(settings(dry_run=True, eval_tasks=[]))
    lines = capsys.readouterr().out
    assert "2, each mines 1 negative for each of 80 rows and takes 2 steps" in lines and "all rounds" in lines
    assert plan["rounds"] == 2 and plan["mining_seconds"] > 0 and not (tmp_path / "run").exists()


def test_overwrite_removes_the_rounds_of_a_run_of_rounds_alone(settings, tmp_path):
    for planned in (0, 2):
        (tmp_path / "run" / "rounds" / "round-1").mkdir(parents=True, exist_ok=True)
        write_yaml(settings(rounds=planned), tmp_path / "run" / "config.yaml")
        checkpoint.remove_run(tmp_path / "run")
        assert (tmp_path / "run" / "rounds").is_dir() == (planned == 0)
    (tmp_path / "run" / "rounds").mkdir()
    with pytest.raises(UserError, match="rounds is there without a run"):
        output_folder.check_free(tmp_path / "run")


def test_the_command_that_continues_names_the_whole_run(tmp_path):
    folder = checkpoint.round_folder(tmp_path, 2)
    assert output_folder.continue_command(folder).endswith(f"--output {tmp_path}")
    assert checkpoint.round_of(folder) == 2 and checkpoint.round_of(tmp_path) == 0
