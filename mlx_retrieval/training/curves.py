"""The picture of a run: loss, learning rate and evaluation over its steps, from its `metrics.jsonl`.

python -c "from mlx_retrieval.training.curves import draw_curves as d; d('adapters/metrics.jsonl', 'curves.png')"

Also here: reading a metrics file, and spelling its names.
"""

import json
from pathlib import Path
from typing import Any

from mlx_retrieval.utils import files

MAIN_METRIC = "ndcg_at_10"
METRIC_NAMES = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "recall": "Recall", "precision": "P"}


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
    import numpy as np
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state; PNGs are drawn by Agg
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics_file)
    train = {r["step"]: r for r in records if r["type"] == "train"}
    evals = {r["step"]: r.get("metrics", {}) for r in records if r["type"] == "eval"}

    figure = Figure(figsize=(10, 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[4, 2, 4])

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
    raw = {"color": "#9ec5e8", "linewidth": 1} if width > 1 else {"color": "#1f6fb2"}
    raw["label"] = f"mean of {block} steps" if block > 1 else "each step"
    steps, values = plot(0, train, "loss", block, **raw)
    if len(values) >= width > 1:
        sums, counts = (np.convolve(row, np.ones(width), "same") for row in (values, np.ones(len(values))))
        smooth = {"color": "#1f6fb2", "linewidth": 2.2, "label": f"mean of {width * block} steps"}
        panels[0].plot(steps, sums / counts, **smooth)
    plot(1, train, "learning_rate", block, linewidth=2, color="#7b6aa8")

    plot(0, evals, "validation_loss", color="#c8501e", label="validation")
    names = {key: 0 for row in evals.values() for key in row if key != "validation_loss"}
    names = sorted(names, key=lambda key: key != MAIN_METRIC)
    colors = ("#c8501e", "#d9a521", "#4f9d8b", "#7d93ad", "#b58fb5", "#a3a380")
    for name, color in zip(names, colors, strict=False):
        main = {"linewidth": 2.4, "markersize": 7, "zorder": 3} if name == names[0] else {"alpha": 0.6}
        steps, values = plot(2, evals, name, color=color, label=metric_name(name), **main)
        if name == MAIN_METRIC and len(values):
            best = values.argmax()
            look = {"color": color, "weight": "bold", "ha": "center", "textcoords": "offset points"}
            panels[2].annotate(f"{values[best]:.4f}", (steps[best], values[best]), (0, 9), **look)

    for panel, name in zip(panels, ("loss", "learning rate", "evaluation"), strict=True):
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#9aa5b1")
        panel.tick_params(color="#9aa5b1", labelcolor="#52606d")
        panel.margins(y=0.12)
        if panel.lines:
            panel.grid(color="#e4e7eb")
        else:
            panel.set_yticks([])
            panel.text(0.5, 0.5, f"no {name} yet", transform=panel.transAxes, ha="center", color="#7b8794")
        if panel.lines and name != "learning rate":
            panel.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=6, frameon=False)
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    seen = [*train, *evals]
    first, last = min(seen, default=0), max(seen, default=0)
    margin = max((last - first) * 0.04, 0.5)
    panels[2].set_xlim(first - margin, last + margin)
    panels[2].set_xlabel("optimizer step")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    progress = f"step {last}" if seen else "nothing recorded yet"
    figure.suptitle(f"{Path(metrics_file).resolve().parent.name}, {progress}", weight="bold")
    with files.replacing(Path(png)) as temporary:
        figure.savefig(temporary, format="png")
