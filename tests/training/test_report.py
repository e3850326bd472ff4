"""The report of a finished run.

python -m pytest tests/training/test_report.py
"""

import dataclasses
import html
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from beir_folders import write_folder

import train
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.evaluation.results import METRICS, Evaluation, compare
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training import report_facts
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.training.data_survey import survey_rows
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.report import Report, loss_report, render, retrieval_report, write_report

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "<script>alert(1)</script>"
EVIL = f"{SCRIPT} \"'&amp; ]]> {{{{ 7919 * 7907 }}}} \ud800\x00 \u202eabc"


class Page(HTMLParser):
    """The elements of a page, and its text; an AssertionError for tags that do not match."""

    VOID = ("meta", "link", "br")

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder with metrics of ten steps and two evaluations."""
    folder = tmp_path / "a run & more"
    (folder / "best").mkdir(parents=True)
    steps = [{"type": "train", "step": i, "loss": 1 / i, "learning_rate": 1e-3, "seconds": 6.5, "tokens": 100,
              "peak_memory_bytes": 2_500_000_000} for i in range(1, 11)]  # fmt: skip
    evals = [{"type": "eval", "step": i, "metrics": {"ndcg_at_10": 0.1 + i / 50, "validation_loss": 2 - i / 10}}
             for i in (0, 10)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [evals[0], *steps, evals[1]]))
    return folder


@pytest.fixture
def tasks(tmp_path):
    """Forty queries and documents; those of q0 and d0 are full of HTML."""
    corpus = [{"_id": f"d{i}", "text": f"document {i}" if i else EVIL} for i in range(40)]
    queries = [{"_id": f"q{i}", "text": f"query {i}" if i else EVIL} for i in range(40)]
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(40))
    return load_tasks([str(write_folder(tmp_path / "shop", corpus, queries, qrels))])[0]


def by_hand(scores, name: str = "m", task: str = "shop") -> Evaluation:
    by_query = {f"q{i}": float(score) for i, score in enumerate(scores)}
    found = {query: [query.replace("q", "d") if score else "d39", "d38", "d37"] for query, score in by_query.items()}
    figures = dict.fromkeys(METRICS, round(float(np.mean(scores)), 5))
    return Evaluation(name, {task: figures}, {task: dict.fromkeys(METRICS, by_query)}, {}, {task: found})


LOW, HIGH = [0.0] * 30 + [1.0] * 10, [1.0] * 30 + [0.0] * 10


def test_the_headline_is_that_of_the_comparison(tasks):
    before, after = by_hand(LOW), by_hand(HIGH)
    report = retrieval_report(before, after, tasks)
    assert report.headline == "nDCG@10 rose from 0.2500 to 0.7500 over 40 queries of shop."
    *_, low, high = compare(before, after)[0]
    assert report.detail.startswith(f"+0.5000, 95 % interval {low:+.4f} to {high:+.4f}. The trained model is better")
    assert report.verdict == "better" and len(report.gained) == 20 and len(report.lost) == 10
    worse = retrieval_report(after, before, tasks)
    assert worse.verdict == "worse" and "fell from 0.7500 to 0.2500" in worse.headline
    same = retrieval_report(before, before, tasks)
    assert "No difference to the untrained one is shown: the interval holds zero" in same.detail and (
        same.gained,
        same.lost,
    ) == ([], [])


def test_held_out_questions_are_called_so(tasks):
    before, after = (by_hand(scores, task="held-out") for scores in (LOW, HIGH))
    report = retrieval_report(before, after, {"held-out": tasks["shop"]})
    assert report.headline == "nDCG@10 rose from 0.2500 to 0.7500 over 40 held-out questions."


def test_reports_of_less(tasks, folder):
    after = by_hand(HIGH)
    alone = retrieval_report(None, after, tasks)
    assert alone.headline == "nDCG@10 is 0.7500 after training, over 40 queries of shop."
    assert "was not evaluated" in alone.detail and alone.verdict == "" and alone.tables[0].rows[0][1] is None
    away = retrieval_report(None, Evaluation("m", {}, {}, {"Nano": "Nano: the hub does not answer"}), {})
    assert away.notes == ["Not evaluated: Nano: the hub does not answer"]
    assert not alone.compared and shows_no_queries(folder, alone)


def shows_no_queries(folder: Path, report: Report) -> bool:
    page = render(folder, Settings(), [], [], report)
    return "Gained most" not in page and "Before is" not in page


def test_a_reranker_is_judged_by_the_order_that_it_was_given(tasks, folder):
    before, after, first = by_hand(LOW), by_hand(HIGH), by_hand([1.0] * 40, "BM25")
    report = retrieval_report(before, after, tasks, first)
    assert report.headline == (
        "nDCG@10 is 0.7500 after reranking and 1.0000 in the order of BM25, over 40 queries of shop."
    )
    *_, low, high = compare(first, after)[0]
    assert report.detail.startswith(f"-0.2500, 95 % interval {low:+.4f} to {high:+.4f}. The reranked order is worse")
    assert report.verdict == "worse" and len(report.gained) == 20
    assert report.notes[0].startswith("Training: nDCG@10 rose from 0.2500 to 0.7500, +0.5000, 95 % interval")
    head, first_row = re.findall(r"<tr>.*?</tr>", render(folder, Settings(), [], [], report), re.DOTALL)[:2]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in (head, first_row)]
    assert cells[0] == ["metric", "BM25", "before", "after", "difference", "95 % interval"]
    assert cells[1][:5] == ["nDCG@10", "1.0000", "0.2500", "0.7500", "+0.5000"]
    better = retrieval_report(before, after, tasks, by_hand([0.0] * 40, "BM25"))
    assert better.verdict == "better" and "is better than the order of BM25" in better.detail
    unknown = retrieval_report(None, after, tasks, first)
    assert unknown.verdict == "worse" and not unknown.compared and "was not evaluated" in unknown.notes[0]
    assert unknown.tables[0].names == ("BM25", "after") and unknown.tables[0].rows[0][1:3] == (1.0, 0.75)
    assert shows_no_queries(folder, unknown)


def test_the_comparison_is_with_the_evaluation_that_the_run_began_with(folder, tasks):
    """The base model by itself has other lengths, pooling and prompts than the run's step 0."""
    settings = Settings(model="base", max_length=48, rerank_depth=20, strict=True)
    report = retrieval_report(by_hand(LOW), by_hand(HIGH), tasks)
    report.eval_tasks = ["shop"]
    given = settings, report.eval_tasks
    commands = dict(report_facts.commands(folder, *given, report.compared, []))
    parts = shlex.split(commands["compare it with the untrained model"])
    assert parts[2:6] == ["--eval-tasks", "shop", "--depth", "20"]
    assert parts[6:] == ["--strict", "--compare", f"{folder}/before.json", f"{folder}/best"]
    assert "--depth 20 --strict" in commands["evaluate the model"]
    assert not [name for name in dict(report_facts.commands(folder, *given, False, [])) if "compare" in name]


def test_a_lengthened_run_is_not_repeated_by_its_settings(folder):
    (folder / "final").mkdir()
    for state, purpose in (
        ({"ends": []}, "repeat this run"),
        ({"ends": [[5, 5]]}, "start a new run with these settings"),
    ):
        (folder / "final" / "trainer_state.json").write_text(json.dumps(state))
        assert report_facts.commands(folder, Settings(), [], False, [])[0][0] == purpose


def test_paths_are_short_for_readers_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(data=[str(tmp_path / "sub" / "my.csv"), "/far/away/other.csv", "hub/rows"])
    page = render(folder, settings, [("reads", f"{tmp_path}/sub/my.csv: a -> b")], [], Report("done"))
    shown = page.partition("<h2>Commands")[0] + page.partition("<h2>Settings")[2]
    assert "sub/my.csv, other.csv, hub/rows" in shown and "sub/my.csv: a -&gt; b" in shown
    assert str(tmp_path) not in shown and "/far/away" not in shown


def test_reports_of_a_loss(folder):
    assert loss_report(folder) == Report(
        "The loss on the validation rows fell from 2.0000 to 1.0000.", verdict="better"
    )
    (folder / "metrics.jsonl").write_text("")
    assert loss_report(folder).headline == "The run is finished."


def test_the_page_is_whole_and_everything_in_it_is_escaped(folder, tasks, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"query": f"{EVIL} {i % 3}", "document": f"{EVIL}{'!' * (i % 2)} {i % 4}"}) + "\n" for i in range(40)
    ))  # fmt: skip
    limits = {"query": 8, "document": 512}
    tokenizer = TextTokenizer(ROOT / "gemma-3-tiny-mlx", {}, limits, append_eos=True)
    report = retrieval_report(by_hand(LOW), by_hand(HIGH), tasks)
    report.survey = survey_rows(Rows([tmp_path / "rows.jsonl"]), tokenizer, 8)
    report.notes.append(SCRIPT)
    settings = Settings(
        data=["https://user:secret@host:9200/index"], eval_tasks=["my folder; rm -rf ~"], query_prompt=EVIL
    )
    report.eval_tasks = settings.eval_tasks
    facts = [("model", EVIL), ("data", "http://user:secret@host/x")]
    page = render(folder, settings, facts, [("next", f"python embed.py {SCRIPT}"), ("speed", "1")], report)
    page.encode("utf-8", "surrogatepass")
    parsed = Page(page)
    assert "script" not in parsed.tags and "alert(1)" in parsed.text
    assert "secret" not in page and "\u202e" not in page
    assert "{{ 7919 * 7907 }}" in parsed.text and str(7919 * 7907) not in page  # no template in the data
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    links = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:,")) for link in links)  # nothing is fetched
    assert len(set(ids := [value for name, value in parsed.attributes if name == "id"])) == len(ids)
    assert parsed.tags.count("svg") == 3 and parsed.tags.count("details") == 30 + 2  # queries, examples, settings
    assert "100.0 % are longer than the 8 tokens" in " ".join(parsed.text.split())
    text = html.unescape(page)
    run = str(folder)
    assert f"python train.py --config '{run}/config.yaml' --output '{run}-again'" in text
    assert f"python eval.py --model '{run}/best' --eval-tasks 'my folder; rm -rf ~'" in text
    assert "65 s" not in text and "1 min 5 s" in text and "2.33 GB" in text
    chips = [li for li in re.findall(r"<li>.*?</li>", page, re.DOTALL) if "relevant" in li]
    shown = [d for change in report.gained + report.lost for d in change.documents_before + change.documents_after]
    assert len(chips) == sum(document.relevant for document in shown) < len(shown) / 2


def test_curves_have_the_pages_colours(folder):
    from mlx_retrieval.training import curves

    page = render(folder, Settings(), [], [], Report("done"))
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search("#[0-9a-f]{6}", svg) and "<text" in svg and "<metadata" not in svg
    for number in {int(n) for n in re.findall(r"var\(--c(\d+)\)", svg)}:
        assert page.count(f"--c{number}:") == 2  # in both schemes
    assert all(page.count(f"--c{i}:") == 2 for i in range(len(curves.COLORS)))


def test_a_failure_is_a_warning(folder, monkeypatch):
    warnings = []

    def broken():
        raise KeyError("top_documents")

    arguments = (folder, Settings(), [], [])
    assert write_report(*arguments, broken, warnings.append) is None
    assert warnings == ["report.html could not be written: 'top_documents'"]
    assert write_report(*arguments, lambda: None, warnings.append) is None and not (folder / "report.html").exists()
    assert write_report(*arguments, lambda: Report("done"), warnings.append) == folder / "report.html"
    assert (folder / "report.html").read_text().startswith("<!doctype html>") and len(warnings) == 1
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert write_report(*arguments, lambda: Report("again"), warnings.append) is None
    assert "No space left on device" in warnings[-1] and "done" in (folder / "report.html").read_text()


def test_settings_and_times():
    settings = Settings(steps=7, lora_keys=["a", "b"], task="embed", temperature=0.7)
    resolve_defaults(settings, 10**8, "qwen3")
    config = RetrievalConfig(pooling="cls", max_length=64, query_prompt="")
    rows = {
        name: (value, changed)
        for name, value, changed in report_facts.settings_table(
            settings, report_facts.model_defaults(settings, 10**8, "qwen3"), report_facts.model_values(config)
        )
    }
    assert rows["steps"] == ("7", True) and rows["lora_keys"] == ("a b", True) and rows["seed"] == ("0", False)
    assert rows["pooling"] == ("cls (as the model's files say)", False) and rows["wandb"] == ("no", False)
    assert rows["max_length"][0].startswith("64 (") and rows["query_prompt"][0].startswith("none (")
    assert not rows["loss"][1] and not rows["learning_rate"][1] and rows["temperature"] == ("0.7", True)
    assert rows["maxsim"] == ("not given", False)  # of other tasks
    assert rows.keys() == {field.name for field in dataclasses.fields(Settings)}
    assert [report_facts.duration(s) for s in (0.4, 59.6, 184, 7_500)] == ["0 s", "1 min 0 s", "3 min 4 s", "2 h 5 min"]


def test_a_chat_report_has_no_retrieval(folder):
    page = render(folder, for_task("chat", {}), [], [("fuse", "mlx_lm.fuse --model m")], loss_report(folder))
    assert "mlx_lm.fuse --model m" in page and "eval.py" not in page and "Training data" not in page


def test_the_last_lines_of_a_run_name_its_report(tmp_path, capsys, small):
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        rows = "".join(json.dumps({"query": f"query {i}", "document": f"document {i}"}) + "\n" for i in range(8))
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows)
    flags = ["--model", small, "--data", str(tmp_path / "data"), "--batch-size", "4", "--steps", "1", "--eval-tasks"]
    assert train.main([*flags, "--output", str(tmp_path / "run")]) == 0
    report = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.splitlines()[-2] == f"report    {report}"
    page = Page(report.read_text())
    assert "The loss on the validation rows" in page.text and "All 8 rows were looked at" in page.text
    assert "eval.py" not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_run_ends_with_its_report(tmp_path, capsys, small, task):
    """From the command to the page; a resumed run has the documents that were found before."""
    rows = [json.loads(line) for line in (ROOT / "train-data.jsonl").read_text().splitlines()[:64]]
    negatives = [row["document"] for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"query": row["query"], "positive": row["document"], "negatives": [negatives[i - 1]]}) + "\n"
        for i, row in enumerate(rows)
    ))  # fmt: skip
    corpus = [{"_id": f"d{i}", "text": row["document"]} for i, row in enumerate(rows)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows[:20])]
    shop = write_folder(tmp_path / "shop", corpus, queries, "".join(f"q{i}\td{i}\t1\n" for i in range(20)))
    run = tmp_path / "my run"
    flags = ["--model", small, "--task", task, "--data", str(tmp_path / "rows.jsonl"), "--eval-tasks", str(shop)]
    flags += ["--batch-size", "8", "--steps", "4", "--learning-rate", "0.02", "--output", str(run), "--lora-rank", "4"]
    flags += ["--reranker-type", "cross-encoder"] if task == "rerank" else []
    assert train.main([*flags, "--stop-after", "2"]) == 0
    assert not (run / "report.html").exists()
    capsys.readouterr()
    assert train.main(["--resume", "--output", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"report    {run / 'report.html'}" in out.splitlines() and "warning" not in out
    page = Page((run / "report.html").read_text())
    results = json.loads((run / "results.json").read_text())
    assert f"{results['before']['ndcg_at_10']:.4f} to {results['after']['ndcg_at_10']:.4f}" in page.text
    assert "first relevant document" in page.text and page.tags.count("svg") == 3
    assert "All 64 rows were looked at" in " ".join(page.text.split())
    assert train.main([*flags, "--overwrite", "--stop-after", "1"]) == 0
    assert not (run / "report.html").exists()
