"""Charts and overlays of a report, as inline SVG and data URIs. No display, no global state of matplotlib."""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from pipeline.masks import palette
from pipeline.results import Results, by_iou

COLOURS = np.array(palette(), dtype=np.uint8).reshape(256, 3)
OVERLAY_SIDE = 320  # pixels, the longer side in the page
_MOST_NAMES = 60  # class names along a heat map


def bar_chart(results: Results) -> str:
    """IoU of the counted classes, the best on top: SVG."""
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
    """Where the pixels of each class went: rows of the confusion matrix, each adding up to 1. SVG."""
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
    """Every name where there is room, else every n-th."""
    for names, axis in ((columns, axes.xaxis), (rows, axes.yaxis)):
        step = -(-len(names) // _MOST_NAMES) or 1
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=6)
    axes.tick_params(axis="x", rotation=90)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture(pixels: npt.NDArray[np.uint8], side: int = OVERLAY_SIDE) -> str:
    """RGB uint8 [H, W, 3] as a JPEG data URI; its longer side is `side` at most."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def overlay(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Labels [H, W] in the palette's colours, half transparent, over a greyed RGB image [H, W, 3]."""
    grey = pixels.mean(axis=2, keepdims=True) * 0.8 + 40
    return (0.4 * grey + 0.6 * COLOURS[palette_index(labels)]).clip(0, 255).astype(np.uint8)


def palette_index(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The palette entry of every label, uint8: labels from 256 on repeat the colours, 0 keeps its own."""
    wide = labels.astype(np.int64)
    return np.where(wide == 0, 0, (wide - 1) % 255 + 1).astype(np.uint8)


def mask_layer(labels: npt.NDArray[Any], side: int = OVERLAY_SIDE) -> str:
    """Labels [H, W] as a palette PNG data URI, its longer side `side` at most; label 0 is transparent."""
    image = Image.fromarray(palette_index(labels))
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST)
    image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour(label: int) -> str:
    """The CSS colour of a label."""
    return "rgb({},{},{})".format(*COLOURS[int(palette_index(np.array(label)))])
