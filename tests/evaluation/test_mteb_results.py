"""Evaluation as it is handed in: which tasks, prompts, folders of results, a killed run, the peer's figures.

python -m pytest tests/evaluation/test_mteb_results.py
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
from mlx_retrieval.evaluation import mteb_results, mteb_selection, mteb_tasks
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.utils.errors import UserError

HUB_TASKS = {
    "Classification": "Banking77Classification.v2",
    "Clustering": "TwentyNewsgroupsClustering.v2",
    "PairClassification": "SprintDuplicateQuestions",
    "Reranking": "AskUbuntuDupQuestions",
    "Retrieval": "NanoMSMARCORetrieval",
    "STS": "STS12",
    "Summarization": "SummEvalSummarization.v2",
}


def mocks(*names: str) -> list:
    tasks = {task.metadata.name: task for task in mteb_selection.select(["mock"])}
    return [tasks[name] for name in names] if names else [*tasks.values()]


def figures_of(result) -> dict:
    """Every figure of a task's result: (split, subset, metric) -> figure."""
    return {
        (split, scores["hf_subset"], metric): value
        for split, subsets in result.scores.items()
        for scores in subsets
        for metric, value in scores.items()
        if isinstance(value, float | int)
    }


def prompted(folder: Path, target: Path, **others: str | None) -> Path:
    """A model's folder with prompts for a task, for types of tasks, and for documents of one type."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    settings = {"query": "question: ", "Classification": "topic: ", "Retrieval-document": "text: "}
    settings |= {"MockSTSTask": "which is alike? ", "STS": "never seen here: ", "search_query": "no name of mteb: "}
    settings = {name: prompt for name, prompt in (settings | others).items() if prompt is not None}
    (target / "config_sentence_transformers.json").unlink(missing_ok=True)
    described = {"prompts": settings, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (target / "config_sentence_transformers.json").write_text(json.dumps(described))
    return target


def test_prompts_that_a_model_does_not_take_are_refused():
    """They were dropped, and the results kept as if they had been obeyed."""
    from mlx_retrieval.evaluation import mteb_models

    models = {"a late-interaction model": SimpleNamespace(late=True), "a reranker": object.__new__(Reranker)}
    for kind, model in models.items():
        model.name = "m"
        with pytest.raises(UserError, match=f"^--task-prompts: m is {kind}, and only models of one vector a text"):
            mteb_models.as_mteb(model, None, {"STS": "alike: "})


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_benchmarks_stand_for_their_tasks():
    names = {task.metadata.name for task in mteb_selection.select(["NanoBEIR", "NanoMSMARCORetrieval"])}
    assert len(names) == 13 and "NanoMSMARCORetrieval" in names
    assert {task.metadata.type for task in mteb_selection.select(["CodeRAG"])} == {"Reranking"}
    retrieval = mteb_selection.select(["MTEB(eng, v2)"], types=["Retrieval"])
    assert {task.metadata.type for task in retrieval} == {"Retrieval"}
    whole = mteb_selection.select(["MTEB(eng)"])  # an alias
    assert len(whole) == 41 and len(retrieval) == sum(task.metadata.type == "Retrieval" for task in whole)
    assert {task.metadata.type for task in mteb_selection.select(["mock"])} >= {*HUB_TASKS}


def test_subsets_of_a_benchmark_are_not_those_of_the_task():
    """`MTEB(eng, v2)` has only the English pairs of STS17. Both are evaluated, as mteb does, if both are named."""
    parts = [task for task in mteb_selection.select(["MTEB(eng, v2)", "STS17"]) if task.metadata.name == "STS17"]
    assert [len(task.hf_subsets) == 1 for task in parts] == [True, False]
    (german,) = mteb_selection.select(["STS17"], languages=["deu"])
    assert german.hf_subsets == ["en-de"]
    again = [task for task in mteb_selection.select(["MTEB(eng, v2)"]) if task.metadata.name == "STS17"]
    assert again[0].hf_subsets == parts[0].hf_subsets  # a choice of languages does not last


def slow(*values: object) -> object:
    """Return values of a parametrised test that only the slow tier takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-tasks", "NanoBEIRR"], "NanoBEIRR: mteb knows no such task or benchmark; did you mean NanoBEIR?"),
        slow(["--eval-tasks", "STS21"], "STS21: mteb knows no such task or benchmark; did you mean STS2"),
        (["--eval-tasks", "tests"], "tests: --results is for tasks of mteb; evaluate folders and files without it"),
        (["--eval-tasks", "VisRAGRetArxivQA"], "about text, image; only tasks of text"),
        (["--eval-tasks", "nanobeir"], "nanobeir: mteb knows no such task or benchmark; did you mean NanoBEIR?"),
        (["--eval-tasks", "sts12"], "did you mean STS12?"),
        slow(["--eval-tasks", "Mock"], "did you mean mock?"),
        slow(["--eval-tasks", "MockSTSTasks"], "did you mean MockSTSTask?"),
        (["--eval-tasks", "MockVisualSTS"], "about image; only tasks of text"),
        (["--eval-tasks", "mock", "--task-types", "sts"], "did you mean STS?"),
        (["--eval-tasks", "STS12", "--languages", "deu"], "STS12: no task has one of these --languages"),
        (["--eval-tasks", "STS12", "--languages", "deu"], "there are the types STS and the languages eng"),
        (["--eval-tasks", "STS17", "--languages", "German"], "--languages German: mteb knows no such code; they are"),
        (["--eval-tasks", "STS17", "--languages", "German"], "did you mean deu? The tasks that you name have ara, deu"),
        (
            ["--eval-tasks", "STS17", "--languages", "zzz"],
            "eng or deu-Latn. The tasks that you name have ara, deu, eng",
        ),
        (["--eval-tasks", "STS17", "--languages", "en"], "did you mean eng?"),
        (["--eval-tasks", "STS17", "--languages", "ENG"], "did you mean eng?"),
        (["--eval-tasks", "STS17", "--languages", "Latn"], "--languages Latn: mteb knows no such code"),
        (["--eval-tasks", "MTEB(Multilingual, v2)", "--languages", "zzz"], " more"),
        (["--eval-tasks", "mock", "--task-types", "Clustring"], "knows no such type; did you mean Clustering?"),
        ([], "--results: name tasks or benchmarks of mteb by --eval-tasks"),
        (["--eval-tasks", "STS12", "--output", "x.json"], "--output: not with --results"),
        (["--eval-tasks", "STS12", "--strict", "--depth", "3"], "--strict and --depth: not with --results"),
        (["--eval-tasks", "STS12", "--results-name", "mine"], "--results-name mine: mteb's names"),
        (["--eval-tasks", "STS12", "--task-prompts", "nowhere.json"], "--task-prompts nowhere.json: no such file"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedder, "load", lambda *_, **__: pytest.fail("loaded"))
    assert evaluation.main(["--model", "m", "--results", str(tmp_path / "mteb"), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "mteb").exists()


def test_flags_of_results_need_results(capsys):
    assert evaluation.main(["--model", "m", "--languages", "eng", "--task-types", "STS"]) == 2
    assert "--task-types and --languages: only with --results" in capsys.readouterr().err


def test_a_benchmark_without_results_is_explained():
    for name in ("NanoBEIR", "mock"):
        with pytest.raises(UserError, match=f"{name} is a benchmark; eval.py evaluates its tasks with --results"):
            mteb_tasks.load(name)
    with pytest.raises(UserError, match="MockSTSTask is a mock task of mteb; eval.py evaluates it with --results"):
        mteb_tasks.load("MockSTSTask")
    with pytest.raises(UserError, match="neither a folder nor an MTEB task; close: NanoMSMARCORetrieval$"):
        mteb_tasks.load("nanomsmarcoretrieval")


def test_mock_tasks_have_names_of_their_own():
    """mteb's `get_task` does not know them."""
    everything = mocks()
    for task in everything:
        (named,) = mteb_selection.select([task.metadata.name])
        assert type(named) is type(task)
    assert len(mteb_selection.select(["mock", "MockSTSTask"])) == len(everything)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_come_before_the_models_own(minilm, tmp_path, monkeypatch):
    import mteb
    from mteb.types import PromptType

    from mlx_retrieval.evaluation import mteb_models

    model = embedder.load(prompted(minilm, tmp_path / "prompted"))
    file = tmp_path / "prompts.json"
    given = {"Banking77Classification.v2": "Instruct: {instruction}\nText: "}
    given |= {"STS": "alike: ", "Retrieval-query": "find: ", "MockSummarizationTask": "sum: ", "document": "d: "}
    file.write_text(json.dumps(given))
    prompts = mteb_selection.read_prompts(file, mocks())
    encoder = mteb_models.as_mteb(model, mteb_models.describe(model), prompts)
    seen = []

    def tokens(self, texts, name=None):
        seen.append(self.prompts[name] if name else "")
        return call(self, texts, name)

    call = type(model.tokenizer).__call__
    monkeypatch.setattr(type(model.tokenizer), "__call__", tokens)
    query, document = PromptType.query, PromptType.document
    expected = [
        ("MockSTSTask", None, "alike: "),  # of the file by its type, before the model's by its name
        ("MockSummarizationTask", None, "sum: "),
        ("MockClassificationTask", None, "topic: "),  # the model's own
        ("MockClusteringTask", None, ""),
        ("MockRetrievalTask", query, "find: "),
        ("MockRetrievalTask", document, "d: "),
        ("MockRerankingTask", query, "question: "),
    ]
    for name, kind, _ in expected:
        encoder.encode([{"text": ["a"]}], task_metadata=mocks(name)[0].metadata, prompt_type=kind)
    banking = mteb.get_task("Banking77Classification.v2").metadata
    encoder.encode([{"text": ["a"]}], task_metadata=banking)
    assert seen.pop() == f"Instruct: {banking.prompt}\nText: "
    assert seen == [prompt for *_, prompt in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('["query"]', "not an object of texts"),
        ('{"query": 1}', "not an object of texts"),
        ('{"Retreival": "x"}', "Retreival is neither a task of mteb.*did you mean Retrieval?"),
        slow('{"STS12-query": "x", "NanoMSMARCORetrievl-query": "x"}', "did you mean NanoMSMARCORetrieval?"),
        slow('{"STS12-passage": "x"}', "STS12-passage is neither"),
    ],
)
def test_files_of_prompts_that_do_not_fit(content, message, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        mteb_selection.read_prompts(file, [])


# --- results ----------------------------------------------------------------------------------------------------------


def command(model: Path, folder: Path, *arguments: str) -> list[str]:
    return ["--model", str(model), "--results", str(folder), *arguments]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The names of the tasks whose texts were embedded, in their order."""
    from mlx_retrieval.evaluation import mteb_models

    names: list[str] = []
    encode = mteb_models.Encoder.encode

    def count(self, inputs, *, task_metadata, **options):
        names.append(task_metadata.name)
        return encode(self, inputs, task_metadata=task_metadata, **options)

    monkeypatch.setattr(mteb_models.Encoder, "encode", count)
    return names


def test_a_run_is_read_by_mteb_and_goes_on_where_it_was_killed(minilm, tmp_path, capsys, counted, monkeypatch):
    from mteb import ResultCache

    tasks = mteb_selection.select(["mock"], types=["PairClassification", "STS"])
    names = [task.metadata.name for task in tasks]
    run = command(minilm, tmp_path, "--eval-tasks", "mock", "--task-types", "PairClassification", "STS")
    with monkeypatch.context() as killed:

        def interrupted(self, *args, **kwargs):
            raise KeyboardInterrupt

        killed.setattr(type(tasks[2]), "_evaluate_subset", interrupted)
        assert evaluation.main(run) == 130
    ((place,),) = [(tmp_path / "results" / f"{minilm.parent.name}__{minilm.name}").iterdir()]
    assert {file.stem for file in place.glob("Mock*.json")} == {*names[:2]}
    broken = place / f"{names[1]}.json"
    broken.write_text(broken.read_text()[:100])  # killed while it wrote
    counted.clear()
    capsys.readouterr()
    assert evaluation.main(run) == 0
    assert [*dict.fromkeys(counted)] == names[1:]
    shown = capsys.readouterr()
    assert f"{broken}: not complete" in shown.err
    for content in ("{}", "[]"):  # JSON, and no result
        broken.write_text(content)
        assert evaluation.main(run) == 0
        assert f"{broken}: not complete" in capsys.readouterr().err

    results = ResultCache(tmp_path).load_results(tasks=tasks)
    (model,) = results.model_results
    assert model.model_name == f"{minilm.parent.name}/{minilm.name}" and model.model_revision == place.name
    meta = json.loads((place / "model_meta.json").read_text())
    assert (meta["embed_dim"], meta["model_type"], meta["similarity_fn_name"]) == (384, ["dense"], "cosine")
    table = results.to_dataframe()  # mteb's own
    scores = dict(zip(table["task_name"], table[model.model_name], strict=True))
    rows = [line.split() for line in shown.out.splitlines() if line.lstrip().startswith("Mock")]
    assert {*scores} == {*names} and len(rows) == len(names)
    for name, row in zip(names, rows, strict=True):
        assert name == row[0] and row[-1] == f"{scores[name]:.4f}"
    assert f"{np.mean([*scores.values()]):.4f}" in next(x for x in shown.out.splitlines() if "Mean (Task)" in x)

    counted.clear()
    assert evaluation.main(run) == 0 and counted == []
    assert capsys.readouterr().out == shown.out
    assert evaluation.main([*run[:-2], "STS", "--overwrite"]) == 0
    assert [*dict.fromkeys(counted)] == [name for name in names if "STS" in name]


@pytest.mark.parametrize("content", ["{}", '{"name": "m"}', "[]", '{"na', None])
def test_a_model_meta_that_is_not_whole_is_written_again(minilm, tmp_path, capsys, counted, content):
    """Regression: `{}` was called another model's results, and what was cut off stayed so if no task was left to do."""
    from mteb import ResultCache

    run = command(minilm, tmp_path, "--eval-tasks", "MockSTSTask")
    assert evaluation.main(run) == 0
    (meta,) = tmp_path.glob("results/*/*/model_meta.json")
    whole = json.loads(meta.read_text())
    meta.unlink() if content is None else meta.write_text(content)
    counted.clear()
    capsys.readouterr()
    assert evaluation.main(run) == 0 and not counted
    state = "missing" if content is None else "not complete"
    assert f"{meta}: {state}; written again" in capsys.readouterr().err
    assert json.loads(meta.read_text()) == whole
    ResultCache._get_model_name_and_revision_from_path.cache_clear()
    (model,) = ResultCache(tmp_path).load_results(tasks=mocks("MockSTSTask")).model_results
    assert model.model_revision == meta.parent.name


def test_a_folder_that_cannot_be_made(minilm, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert evaluation.main(command(minilm, tmp_path / "file" / "mteb", "--eval-tasks", "MockSTSTask")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"eval.py: --results {tmp_path / 'file' / 'mteb'}: cannot be made (Not a directory)"


def test_two_runs_at_once(minilm, tmp_path, capsys, monkeypatch):
    """mteb merges what both would write into one file."""
    run = command(minilm, tmp_path, "--eval-tasks", "MockSTSTask")
    within = mteb_results._evaluate

    def beside(*arguments):
        assert evaluation.main(run) == 2
        assert "another process evaluates" in capsys.readouterr().err.splitlines()[-1]
        return within(*arguments)

    monkeypatch.setattr(mteb_results, "_evaluate", beside)
    assert evaluation.main(run) == 0


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_whole_names(capsys, monkeypatch, width):
    from mlx_retrieval.utils.console import console

    monkeypatch.setattr(console(), "_width", width)
    scores = [(task.metadata.name, task.metadata.type, task.metadata.main_score, 0.5) for task in mocks()]
    mteb_results.print_table(mteb_results.Run("m", Path(), scores, {"Mean (Task)": 0.5}, {}))
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.endswith("0.5000 ")]
    assert [row[0] for row in rows[:-1]] == [name for name, *_ in scores]
    assert all(row[-2] == metric for row, (*_, metric, _) in zip(rows, scores, strict=False))
    assert ("BitextMining " in out) == (width == 120) and max(map(len, out.splitlines())) <= width


def test_languages_are_added_to_what_is_there(minilm, tmp_path, capsys, counted):
    run = command(minilm, tmp_path, "--results-name", "org/my model", "--eval-tasks", "mock", "--task-types", "STS")
    assert evaluation.main([*run, "--languages", "fra"]) == 0
    (place,) = (tmp_path / "results" / "org__my_model").iterdir()

    def subsets() -> list[str]:
        scores = json.loads((place / "MockMultilingualSTSTask.json").read_text())["scores"]["test"]
        return [part["hf_subset"] for part in scores]

    assert [file.stem for file in place.glob("Mock*.json")] == ["MockMultilingualSTSTask"]
    assert subsets() == ["fra"]
    assert "Mean" not in capsys.readouterr().out  # of one task
    before = len(counted)
    assert evaluation.main([*run, "--languages", "fra", "eng"]) == 0
    assert subsets() == ["fra", "eng"] and counted[before:].count("MockMultilingualSTSTask") == before


@pytest.mark.slow
def test_results_of_other_revisions_and_settings_stay_apart(minilm, tmp_path, capsys):
    run = command(minilm, tmp_path, "--results-name", "org/m", "--eval-tasks", "mock", "--task-types", "STS")
    run += ["--languages", "fra"]
    assert evaluation.main(run) == 0
    (place,) = (tmp_path / "results" / "org__m").iterdir()
    kept = (place / "MockMultilingualSTSTask.json").read_bytes()
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"STS": "alike: "}')
    assert evaluation.main([*run, "--task-prompts", str(prompts)]) == 0
    (experiment,) = (place / "experiments").iterdir()
    assert json.loads((experiment / "model_meta.json").read_text())["experiment_kwargs"] == {
        "task_prompts": {"STS": "alike: "}
    }
    other = prompted(minilm, tmp_path / "other")
    capsys.readouterr()
    assert evaluation.main([*run[:1], str(other), *run[2:]]) == 0
    assert f"has results of other revisions, which stay as they are: {place.name}" in capsys.readouterr().err
    assert (place / "MockMultilingualSTSTask.json").read_bytes() == kept

    meta = json.loads((place / "model_meta.json").read_text())
    (place / "model_meta.json").write_text(json.dumps(meta | {"revision": "1234"}))
    assert evaluation.main(run) == 2
    assert "has revision '1234' in place of" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_the_hub_has_its_name_and_commit(minilm, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from mlx_retrieval.evaluation import mteb_models

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "c" * 40
    snapshot = tmp_path / "models--org--small" / "snapshots" / commit
    shutil.copytree(minilm, snapshot)
    (tmp_path / "models--org--small" / "refs").mkdir()
    (tmp_path / "models--org--small" / "refs" / "main").write_text(commit)
    meta = mteb_models.describe(embedder.load("org/small"))
    assert (meta.name, meta.revision) == ("org/small", commit)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("STS", "Retrieval") else pytest.mark.slow) for kind in HUB_TASKS]
)
def test_hub_layouts_of_every_type(kind, minilm, no_hub, tmp_path, capsys):
    """Parquet in the Hub's cache, without a network; without the data, one line says what to download."""
    import mteb
    from hub_tasks import publish, tables_of

    name = HUB_TASKS[kind]
    task = mteb.get_task(name)
    run = command(minilm, tmp_path, "--eval-tasks", name)
    assert evaluation.main(run) == 2
    assert f"{name}: data set {task.metadata.dataset['path']}" in capsys.readouterr().err
    publish(no_hub, task, tables_of(kind, task.eval_splits[0]))
    assert evaluation.main(run) == 0
    ((model,),) = [mteb.ResultCache(tmp_path).load_results(tasks=[name], validate_and_filter=True).model_results]
    (result,) = model.task_results
    assert result.dataset_revision == task.metadata.dataset["revision"]
    assert f"{result.get_score():.4f}" in capsys.readouterr().out
    assert result.get_score() > 0.7


@pytest.mark.parametrize(
    ("status", "address", "message"),
    [
        ("gated", "{hub}", "is a gated dataset on the Hub. Visit the dataset page"),  # as datasets says it
        ("missing", "{hub}", "doesn't exist on the Hub or cannot be accessed"),
        ("", "{hub}/else", "/else (HF_ENDPOINT) answers 404"),
        ("", "http://127.0.0.1:9", "http://127.0.0.1:9 (HF_ENDPOINT) does not answer"),
        ("", "huggingface.co", "HF_ENDPOINT is 'huggingface.co', which is no address of a Hub"),
    ],
)
def test_why_data_cannot_be_had(minilm, tmp_path, capsys, monkeypatch, status, address, message):
    """One line, within seconds."""
    import datasets
    import hub_stub
    from huggingface_hub import constants

    with hub_stub.serving() as hub:
        address = address.format(hub=hub.url)
        for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "c")}.items():
            monkeypatch.setattr(constants, name, value)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        hub.tokens["secret"] = "alice"
        if status == "gated":
            hub.repositories["mteb/sts12-sts"] = hub_stub.Repository({"main": {"README.md": b""}}, gated="all")
        mteb_tasks._hub_answers.cache_clear()
        try:
            assert evaluation.main(command(minilm, tmp_path, "--eval-tasks", "STS12")) == 2
        finally:
            mteb_tasks._hub_answers.cache_clear()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: STS12: ")]
    assert message in line, line


def test_a_bundle_has_the_mean_of_its_parts(minilm, tmp_path):
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    parts = mocks("MockSTSTask", "MockSummarizationTask")
    metadata = AggregateTaskMetadata(
        name="Both", description="Two tasks.", tasks=parts, main_score="cosine_spearman", type="STS",
        eval_splits=["test"], eval_langs=["eng-Latn"], reference=None, bibtex_citation="",
    )  # fmt: skip
    bundle = type("Both", (AbsTaskAggregate,), {"metadata": metadata})()
    run = mteb_results.evaluate(embedder.load(minilm), [bundle, *parts], tmp_path)
    both, one, other = (score for *_, score in run.scores)
    assert both == pytest.approx((one + other) / 2)
    again = mteb_results.evaluate(embedder.load(minilm), [bundle], tmp_path, overwrite=True)
    assert again.scores == run.scores[:1]
    assert run.means["Mean (TaskType)"] == pytest.approx(((both + one) / 2 + other) / 2)


# --- models of other kinds, and the peer ------------------------------------------------------------------------------


@pytest.mark.slow
def test_rerankers_have_the_figures_of_the_cross_encoder_of_sentence_transformers(tmp_path):
    import mteb
    from random_rerankers import cross_encoder
    from sentence_transformers import CrossEncoder

    cross_encoder("bert", tmp_path / "cross")
    tasks = mocks("MockRerankingTask", "MockMultilingualRerankingTask", "MockInstructionReranking")
    run = mteb_results.evaluate(Reranker(str(tmp_path / "cross"), raw_scores=True), tasks, tmp_path)
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    theirs = mteb.evaluate(
        CrossEncoder(str(tmp_path / "cross"), device="cpu"), mocks(*(t[0] for t in run.scores)), **options
    )
    for name, result in zip((name for name, *_ in run.scores), theirs.task_results, strict=True):
        ours = mteb.results.TaskResult.from_disk(run.folder / f"{name}.json")
        assert figures_of(ours) == pytest.approx(figures_of(result), abs=1e-5, nan_ok=True)
    with pytest.raises(UserError, match="MockSTSTask is of type STS, and .* for tasks of Reranking alone"):
        mteb_results.evaluate(
            SimpleNamespace(config=SimpleNamespace(task="rerank"), name="r"), mocks("MockSTSTask"), tmp_path
        )


def test_late_interaction_has_the_figures_of_its_own_search(minilm, tmp_path):
    from mlx_retrieval.evaluation import retrieval

    model = embedder.load(minilm, task="late")
    (task,) = mocks("MockRetrievalTask")
    run = mteb_results.evaluate(model, [task, *mocks("MockRerankingTask")], tmp_path)
    task.load_data()
    splits = mteb_tasks.MtebTask(task).evaluate(retrieval.searcher_for(model, "mock"))
    assert run.scores[0][-1] == pytest.approx(np.mean([s.figures["ndcg_at_10"] for s in splits]), abs=1e-5)
    meta = json.loads((run.folder / "model_meta.json").read_text())
    assert (meta["model_type"], meta["similarity_fn_name"]) == (["late-interaction"], "MaxSim")


@pytest.mark.slow
def test_mock_tasks_of_every_type_have_the_figures_of_sentence_transformers(minilm, tmp_path, capsys):
    """Same weights, and prompts by type and by role: mteb reads its whole mock benchmark, and of one task of each type
    every figure is that of sentence-transformers. A mock's name names no prompt there, as mteb's registry lacks it."""
    import mteb
    from sentence_transformers import SentenceTransformer

    folder = prompted(minilm, tmp_path / "prompted", MockSTSTask=None)
    assert evaluation.main(command(folder, tmp_path / "mteb", "--eval-tasks", "mock")) == 0
    shown = capsys.readouterr().out
    table = mteb.ResultCache(tmp_path / "mteb").load_results(tasks=mocks())
    ours = {result.task_name: result for result in table.model_results[0].task_results}
    assert {*ours} == {task.metadata.name for task in mocks()} == {*table.to_dataframe()["task_name"]}
    assert all(f"{result.get_score():.4f}" in shown for result in ours.values())
    peers = [task for task in mocks() if len(task.hf_subsets) == 1 and type(task).__name__ != "MockClusteringTask"]
    assert {task.metadata.type for task in peers} >= {*HUB_TASKS}
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    theirs = mteb.evaluate(SentenceTransformer(str(folder), device="cpu"), peers, **options).task_results
    assert len(theirs) == len(peers) > 10
    for result in theirs:
        name = result.task_name
        assert figures_of(ours[name]) == pytest.approx(figures_of(result), abs=2e-5, nan_ok=True), name
