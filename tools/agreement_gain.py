"""Measure whether images on which two settings disagree hold more errors, on scenes with known truth.

    python -m tools.agreement_gain --count 300

Prints, for every pair of settings, the error of the 5% of images with the least agreement over that of all images.
"""

import argparse
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.resident import Resident
from cliper.pipeline.config import load_config
from cliper.pipeline.evaluate.metrics import image_confusion, image_totals, ratio
from tools.scenes import CLASSES, SEEDS, make_scene

SHARE = 0.05
Values = npt.NDArray[np.float64]


def settings() -> dict[str, CLIPerConfig]:
    """Settings of the embedded model that share its weights."""
    base = load_config("tiny").cliper.model_copy(update={"dtype": "float32"})
    small = base.fusion.model_copy(update={"short_side": 160})
    vv = base.fusion.model_copy(update={"attention": "vv"})
    return {
        "fgc": base,
        "coarse": base.model_copy(update={"fgc": None}),
        "coarse, 160 pixels": base.model_copy(update={"fgc": None, "fusion": small}),
        "coarse, value attention": base.model_copy(update={"fgc": None, "fusion": vv}),
    }


def mean_iou(first: np.ndarray, second: np.ndarray, classes: int) -> float:
    """Mean IoU of two label maps over the classes of either."""
    agree, mine, theirs = image_totals(image_confusion(first, second, classes, ()), classes)
    return float(np.nanmean(ratio(agree, mine + theirs - agree)))


def gains(agreement: Mapping[str, Values], errors: Values) -> dict[str, float]:
    """By pair: the mean error of the SHARE of images with the least agreement over the mean of all."""
    count = max(1, round(SHARE * len(errors)))
    return {
        name: float(errors[np.argsort(values, kind="stable")[:count]].mean() / errors.mean())
        for name, values in agreement.items()
    }


def main() -> None:
    """Label the scenes with every setting and print the gains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    count = parser.parse_args().count
    classes, configs = ClassList.parse(list(CLASSES)), settings()
    resident = Resident(configs["fgc"], "cpu")
    models = {name: resident.segmenter(config, classes) for name, config in configs.items()}
    agreement: dict[str, list[float]] = {}
    error: list[float] = []
    wrong: list[float] = []
    margin: list[float] = []
    for index in range(count):
        scene = make_scene(SEEDS["test"], index)
        found = {name: model.segment([scene.image], [str(index)])[0] for name, model in models.items()}
        labels = {name: one.labels for name, one in found.items()}
        error.append(1 - mean_iou(scene.labels, labels["fgc"], len(classes)))
        wrong.append(float((scene.labels != labels["fgc"]).mean()))
        margin.append(found["fgc"].margin)
        for name in list(configs)[1:]:
            pair = mean_iou(labels["fgc"], labels[name], len(classes))
            agreement.setdefault(f"fgc and {name}", []).append(pair)
    values = {name: np.array(found) for name, found in agreement.items()}
    values["all pairs"] = np.mean(list(values.values()), axis=0)
    values["margin of fgc alone"] = np.array(margin)
    shown = {"1 - mean IoU": np.array(error), "wrong pixels": np.array(wrong)}
    print("| ordered by | " + " | ".join(f"{n} ({v.mean():.3f})" for n, v in shown.items()) + " | best possible |")
    print("|---|---|---|---|")
    best = [gains({"": -e}, e)[""] for e in shown.values()]
    for name in values:
        row = [f"{gains({'': values[name]}, e)['']:.2f}x" for e in shown.values()]
        print(f"| {name} | " + " | ".join(row) + f" | {best[0]:.2f}x, {best[1]:.2f}x |")


if __name__ == "__main__":
    main()
