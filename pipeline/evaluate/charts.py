"""Charts of an evaluation page as inline SVG. No display, no global state of matplotlib."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cliper.pipeline.evaluate.results import Results, by_iou

_MOST_NAMES = 60  # class names along a heat map


def bar_chart(results: Results) -> str:
    """IoU of the counted classes as an SVG bar chart, the best at the top."""
    entries = by_iou(results)[::-1]
    figure = Figure(figsize=(8, 0.6 + 0.2 * max(len(entries), 1)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * entry["iou"] for entry in entries]
    bars = axes.barh([entry["name"] for entry in entries], values, height=0.7, color="#3b6ea5")
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.set(xlim=(0, 105), xlabel="IoU, %")
    axes.margins(y=0.5 / max(len(entries), 1))
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def heat_map(results: Results) -> str:
    """The confusion matrix as an SVG heat map, each row normalized to 1."""
    confusion = np.array(results["confusion"], dtype=np.float64)
    rows = np.flatnonzero(confusion.sum(axis=1))
    names = [results["per_class"][k]["name"] for k in range(len(confusion))]
    columns = np.union1d(rows, np.flatnonzero(confusion[:, :-1].sum(axis=0)))
    shares = confusion[np.ix_(rows, columns)] / np.maximum(confusion[rows].sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.13 * len(columns), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the class's pixels")
    axes.set(xlabel="predicted", ylabel="ground truth")
    _name_ticks(axes, [names[k] for k in columns], [names[k] for k in rows])
    return _svg(figure)


def _name_ticks(axes: Any, columns: list[str], rows: list[str]) -> None:
    """Label every class if the names fit, else every n-th."""
    for names, axis in ((columns, axes.xaxis), (rows, axes.yaxis)):
        step = -(-len(names) // _MOST_NAMES) or 1
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=6)
    axes.tick_params(axis="x", rotation=90)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
