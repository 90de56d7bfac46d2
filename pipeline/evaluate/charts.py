"""The confusion matrix of an evaluation page: an image of a pixel per cell, its numbers, the largest errors."""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cliper.pipeline.evaluate.results import Results

NAMED = 40  # classes whose names fit along the matrix
MOST_CONFUSIONS = 20
_RIGHT, _WRONG = (37, 99, 168), (208, 76, 38)  # colors of the diagonal and of the rest, on light and dark alike


def heat_map(results: Results) -> dict[str, Any]:
    """The matrix of the classes that occur: rows are ground truth, columns predictions.

    `image`: data URI of a PNG, a pixel per cell, whose opacity is the square root of the share of its row.
    `rows`, `columns`: class names. `cells`: pixels, a list per row. `totals`: pixels of each row.
    """
    confusion = np.array(results["confusion"], dtype=np.int64)
    rows = np.flatnonzero(confusion.sum(axis=1))
    columns = np.union1d(rows, np.flatnonzero(confusion.sum(axis=0))).astype(np.int64)
    cells, totals = confusion[np.ix_(rows, columns)], confusion[rows].sum(axis=1)
    names = [*(entry["name"] for entry in results["per_class"]), "no class"]
    return {
        "image": _image(cells / np.maximum(totals, 1)[:, None], rows[:, None] == columns[None]),
        "rows": [names[k] for k in rows],
        "columns": [names[k] for k in columns],
        "cells": cells.tolist(),
        "totals": totals.tolist(),
        "named": len(columns) <= NAMED,
    }


def _image(shares: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> str:
    """Shares [R, C] from 0 to 1 as a PNG data URI."""
    colour = np.where(right[..., None], np.array(_RIGHT), np.array(_WRONG))
    pixels = np.concatenate([colour, np.round(255 * np.sqrt(shares))[..., None]], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.size else np.zeros((1, 1, 4), np.uint8)).save(
        buffer, format="PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def confusions(results: Results, most: int = MOST_CONFUSIONS) -> list[dict[str, Any]]:
    """The largest cells off the diagonal: `truth`, `predicted`, `pixels`, and `share` of the class's pixels."""
    confusion = np.array(results["confusion"], dtype=np.int64)
    totals = confusion.sum(axis=1)
    wrong = confusion[:, :-1].copy()
    np.fill_diagonal(wrong, 0)
    names = [entry["name"] for entry in results["per_class"]]
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = [(int(i), *divmod(int(i), wrong.shape[1])) for i in order if wrong.flat[i]]
    return [
        {
            "truth": names[row],
            "predicted": names[column],
            "pixels": int(wrong.flat[i]),
            "share": float(wrong.flat[i] / totals[row]),
        }
        for i, row, column in cells
    ]


def taken_for(results: Results) -> list[tuple[str, float] | None]:
    """For every class, the class that most of its wrong pixels got, and their share of it; None without any."""
    confusion = np.array(results["confusion"], dtype=np.int64)
    wrong = confusion[:, :-1].copy()
    np.fill_diagonal(wrong, 0)
    names = [entry["name"] for entry in results["per_class"]]
    best, totals = wrong.argmax(axis=1), confusion.sum(axis=1)
    return [
        (names[best[k]], float(wrong[k, best[k]] / totals[k])) if wrong[k, best[k]] else None
        for k in range(len(names))
    ]
