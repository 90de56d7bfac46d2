"""Quality of every preset: agreement with `exact` and mIoU on scenes with the embedded model.

    python -m benchmarks.presets --scenes 30

prints one JSON object. Seed 3 is the test set of tools/scenes.py.
"""

import argparse
import json
import time

import numpy as np

from cliper.model import CLIPer
from cliper.model.classes import ClassList
from cliper.model.presets import PRESETS, preset
from tools.scenes import CLASSES, make_scene
from tools.stage_gains import image_counts, miou, tiny_config


def measure(scenes: int, seed: int) -> dict[str, dict[str, float]]:
    """Label the same scenes with every preset: share of equal pixels, mIoU, seconds per image."""
    pictures = [make_scene(seed, index) for index in range(scenes)]
    classes = ClassList.parse(list(CLASSES))
    results: dict[str, dict[str, float]] = {}
    exact: list[np.ndarray] = []
    for name in PRESETS:
        model = CLIPer.load(preset(tiny_config(), name), classes)
        start = time.perf_counter()
        found = [model.segment([p.image], [f"scene-{i}"])[0].labels for i, p in enumerate(pictures)]
        seconds = (time.perf_counter() - start) / scenes
        exact = exact or found
        equal = float(np.mean([(a == b).mean() for a, b in zip(found, exact, strict=True)]))
        counts = np.stack([image_counts(p, labels) for p, labels in zip(pictures, found, strict=True)])
        results[name] = {"pixels_equal": equal, "miou": miou(counts), "seconds": seconds}
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=3)
    print(json.dumps(measure(**vars(parser.parse_args()))))
