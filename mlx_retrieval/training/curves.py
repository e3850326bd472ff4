"""The picture of a run: loss, learning rate and evaluation over its steps, from its `metrics.jsonl`.

python -c "from mlx_retrieval.training.curves import draw_curves as d; d('adapters/metrics.jsonl', 'curves.png')"

Also here: reading a metrics file, and spelling its names.
"""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.utils import files

MAIN_METRICS = ("ndcg_at_10", "cosine_spearman")  # a run goes by the first that it has
METRIC_NAMES = {
    "cosine_spearman": "Spearman",
    "cosine_pearson": "Pearson",
    "ndcg": "nDCG",
    "mrr": "MRR",
    "map": "MAP",
    "recall": "Recall",
    "precision": "P",
}

PANELS = ("loss", "learning rate", "evaluation")
LOSS, LOSS_OF_STEP, RATE, VALIDATION = "#1f6fb2", "#9ec5e8", "#7b6aa8", "#c8501e"
METRIC_COLORS = ("#c8501e", "#d9a521", "#4f9d8b", "#7d93ad", "#b58fb5", "#a3a380")
AXIS, LABEL, GRID, NOTE = "#9aa5b1", "#52606d", "#e4e7eb", "#7b8794"
COLORS = (LOSS, LOSS_OF_STEP, RATE, *METRIC_COLORS, AXIS, LABEL, GRID, NOTE)


def is_number(value: Any) -> bool:
    """Return True for ints and floats, but not for bools."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in file order, without half-written lines; [] if there is no file."""
    records = []
    for line in Path(file).read_bytes().splitlines() if Path(file).exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    records = [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]
    return [r for r in records if r.get("type") in ("train", "eval")]


def metric_name(key: str) -> str:
    """Return the usual spelling of a metric: `nDCG@10` for `ndcg_at_10`."""
    name, _, cutoff = key.partition("_at_")
    return METRIC_NAMES.get(name, name.replace("_", " ")) + (f"@{cutoff}" if cutoff else "")


def draw_curves(metrics_file: str | Path, png: str | Path) -> None:
    """Draw loss, learning rate and evaluation over the steps of a metrics file: a PNG of 1200x900 pixels."""
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state; PNGs are drawn by Agg

    figure = Figure(figsize=(10, 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[4, 2, 4])
    steps = _draw_panels(read_metrics(metrics_file), panels)
    panels[2].set_xlabel("optimizer step")
    figure.align_ylabels()
    progress = f"step {max(steps)}" if steps else "nothing recorded yet"
    figure.suptitle(f"{Path(metrics_file).resolve().parent.name}, {progress}", weight="bold")
    with files.replacing(Path(png)) as temporary:
        figure.savefig(temporary, format="png")


def curves_svg(metrics_file: str | Path, colors: dict[str, str]) -> list[str]:
    """Return the same panels, those with a line, each as an SVG element for a page of HTML.

    Args:
        colors: colour in COLORS -> colour in the SVG, such as a CSS variable.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figures = [Figure(figsize=(4.2, 2.7), layout="constrained") for _ in PANELS]
    panels = [figure.subplots() for figure in figures]
    _draw_panels(read_metrics(metrics_file), panels, legend_columns=2)
    elements = []
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text, in the page's font
        for name, figure, panel in zip(PANELS, figures, panels, strict=True):
            if not panel.lines:
                continue
            panel.set_xlabel("optimizer step")
            out = io.StringIO()
            matplotlib.rcParams["svg.hashsalt"] = name  # ids that differ between the panels, and not between runs
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
            svg = out.getvalue()
            svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
            svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name.replace(' ', '-')}-", svg)
            svg = re.sub("|".join(map(re.escape, colors)), lambda match: colors[match[0]], svg)
            elements.append(svg)
    return elements


def _draw_panels(records: Sequence[dict[str, Any]], panels: Sequence[Any], legend_columns: int = 6) -> list[int]:
    """Draw the records of a metrics file into the axes of PANELS. Return the steps that they are of."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    train = {r["step"]: r for r in records if r["type"] == "train"}
    evals = {r["step"]: r.get("metrics", {}) for r in records if r["type"] == "eval"}

    def plot(panel: int, rows: dict[int, Any], key: str, block: int = 1, **look: Any) -> np.ndarray:
        """Draw one line, a point for the mean of each `block` steps. Return steps and values (2, points)."""
        points = [(step, rows[step][key]) for step in sorted(rows) if is_number(rows[step].get(key))]
        if not points:
            return np.empty((2, 0))
        starts = np.arange(0, len(points), block)
        means = np.add.reduceat(points, starts).T / np.diff(starts, append=len(points))
        marker = "o" if rows is evals or len(points) < 30 else ""
        panels[panel].plot(*means, marker=marker, solid_capstyle="round", **look)
        return means

    block = len(train) // 2000 + 1  # long runs would take a minute to draw step by step
    width = 2 * (len(train) // block // 40) + 1  # points in the moving mean of the loss, centred
    raw = {"color": LOSS_OF_STEP, "linewidth": 1} if width > 1 else {"color": LOSS}
    raw["label"] = f"mean of {block} steps" if block > 1 else "each step"
    steps, values = plot(0, train, "loss", block, **raw)
    if len(values) >= width > 1:
        sums, counts = (np.convolve(row, np.ones(width), "same") for row in (values, np.ones(len(values))))
        smooth = {"color": LOSS, "linewidth": 2.2, "label": f"mean of {width * block} steps"}
        panels[0].plot(steps, sums / counts, **smooth)
    plot(1, train, "learning_rate", block, linewidth=2, color=RATE)

    plot(0, evals, "validation_loss", color=VALIDATION, label="validation")
    names = {key: 0 for row in evals.values() for key in row if key != "validation_loss"}
    names = sorted(names, key=lambda key: key not in MAIN_METRICS)
    for name, color in zip(names, METRIC_COLORS, strict=False):
        main = {"linewidth": 2.4, "markersize": 7, "zorder": 3} if name == names[0] else {"alpha": 0.6}
        steps, values = plot(2, evals, name, color=color, label=metric_name(name), **main)
        if name == names[0] and name in MAIN_METRICS and len(values):
            best = values.argmax()
            look = {"color": color, "weight": "bold", "ha": "center", "textcoords": "offset points"}
            panels[2].annotate(f"{values[best]:.4f}", (steps[best], values[best]), (0, 9), **look)

    seen = [*train, *evals]
    first, last = min(seen, default=0), max(seen, default=0)
    margin = max((last - first) * 0.04, 0.5)
    for panel, name in zip(panels, PANELS, strict=True):
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(AXIS)
        panel.tick_params(color=AXIS, labelcolor=LABEL)
        panel.margins(y=0.12)
        if panel.lines:
            panel.grid(color=GRID)
        else:
            panel.set_yticks([])
            panel.text(0.5, 0.5, f"no {name} yet", transform=panel.transAxes, ha="center", color=NOTE)
        if panel.lines and name != "learning rate":
            panel.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=legend_columns, frameon=False)
        panel.set_xlim(first - margin, last + margin)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return seen
