"""The report of an adaptation, `report.html`: documents, questions, training and figures on one page."""

from mlx_retrieval.adaptation.figures import only, read_evaluations
from mlx_retrieval.adaptation.split import DOCUMENTS
from mlx_retrieval.adaptation.workshop import Workshop
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.report import Part, Report, render, retrieval_report
from mlx_retrieval.training.settings_file import read_yaml
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import Lines

FILE = "report.html"


def write(shop: Workshop, following: Lines) -> Lines:
    """Write the page, and return the line that names it. `following`: how to use the model."""
    run, output = shop.path("run"), shop.path(FILE)
    settings = Settings(**read_yaml(run / "config.yaml"))
    report = content(shop)
    report.parts = [_documents(shop), _questions(shop)]
    facts = [
        ("documents", str(shop.job.documents)),
        ("model", shop.model),
        *(line for name in ("negatives", "export", "index") for line in shop.figures.get(name, {}).get("lines", [])),
    ]
    page = render(run, settings, [(name, value) for name, value in facts], following, report, shop.job.output.name)
    files.write_file(output, page)
    return [("report", str(output))]


def content(shop: Workshop) -> Report:
    """Return the result: the held-out questions before and after, and the other tasks as notes."""
    evaluations = read_evaluations(shop.path("evaluation.json"))
    tasks, _ = load_tasks([str(shop.path("held-out"))])
    # The first of the tasks; it has its whole path for a label there if another one is called as it is.
    held, label = next(iter(evaluations[0].tasks)), next(iter(tasks))
    before, after = (only(evaluation, held, label) for evaluation in (evaluations[0], evaluations[-1]))
    report = retrieval_report(before if len(evaluations) > 1 else None, after, tasks)
    report.eval_tasks = [str(shop.path("held-out"))]
    if len(evaluations) == 1:
        figure = f"nDCG@10 of its held-out questions is {after.average()['ndcg_at_10']:.4f}"
        report.headline = f"Training gained nothing: {shop.job.model} stays the model to use; {figure}."
        report.detail, report.tables = "", []
    for name, *figures in shop.figures["evaluate"]["rows"][1:]:
        report.notes.append(f"{name}: {figures[0]} before, {figures[1]} after, {figures[2]} {figures[3]}.")
    report.notes += [f"Not evaluated: {reason}" for reason in evaluations[0].unreachable.values()]
    report.notes.append(
        f"Nothing was trained on the documents of the held-out questions, searched among up to {DOCUMENTS:,} chunks."
    )
    return report


def _documents(shop: Workshop) -> Part:
    figures = shop.figures["read"]
    return Part("Documents", figures["lines"], ("not read", "files"), figures["unread"])


def _questions(shop: Workshop) -> Part:
    made, kept = shop.figures["questions"], shop.figures["filter"]
    return Part("Questions", [*made["lines"], *kept["lines"]], ("question", "made as", "from"), kept["examples"])
