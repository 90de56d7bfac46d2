"""Measure the mIoU after each stage of the method, on held-out procedural scenes with pixel labels.

    python -m tools.stage_gains            # 200 test scenes; SCENES=n and SEED=s choose others

Writes build/stage_gains.json and prints the README's table. Every stage runs the production code with the same
weights, thresholds and prompts; only the named part differs. FGC is measured on top of fused attention with
feature fusion, and so is the sliding window.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.labels import presence_scores, segment_scores
from cliper.model.refine import refine
from cliper.model.segmenter import CLIPer
from cliper.pipeline.evaluate import metrics
from cliper.pipeline.evaluate.bootstrap import drawn_miou, interval
from cliper.pipeline.evaluate.metrics import Ints
from tools.scenes import CLASSES, SEEDS, Scene, make_scene

TINY = Path(__file__).parent.parent / "configs" / "label" / "tiny.yaml"
ATTENTION = {"vanilla q-k": "vanilla", "q-q": "qq", "k-k": "kk", "v-v": "vv", "identity": "identity"}
FUSED, FUSION, SLIDING = "fused attention", "+ feature fusion", "+ sliding window"
REFINED = {"+ FGC (mean)": "mean", "+ FGC (selection)": "selection", "+ FGC (chain)": "chain"}
STAGES = (*ATTENTION, FUSED, FUSION, SLIDING, *REFINED)
DEFAULT_SLIDING = {"crop": 128, "stride": 32}


def stage_config(base: CLIPerConfig, stage: str) -> CLIPerConfig:
    """Return the settings of a stage without FGC: `base` with its attention, fusion and windows."""
    attention = ATTENTION.get(stage, "fused")
    fuse = stage not in ATTENTION and stage != FUSED
    sliding = (base.model_dump()["sliding"] or DEFAULT_SLIDING) if stage == SLIDING else None
    fusion = base.fusion.model_dump() | {"attention": attention, "feature_fusion": fuse}
    return CLIPerConfig.model_validate(base.model_dump() | {"fusion": fusion, "sliding": sliding, "fgc": None})


def image_counts(scene: Scene, labels: npt.NDArray[Any]) -> Ints:
    """Per class: pixels that agree, in the truth, in the labels. int64 [3, K + 1]."""
    return metrics.image_totals(metrics.image_confusion(scene.labels, labels, len(CLASSES), ()), len(CLASSES))


def miou(totals: Ints) -> float:
    """Mean IoU in percent over the classes of the truth, from `image_counts` [N, 3, K + 1]; 0 is no class."""
    agree, truth, labeled = totals.sum(axis=0)[:, 1:]
    ious = metrics.ratio(agree, truth + labeled - agree)
    return float(100 * ious[truth > 0].mean())


class Stages:
    """One set of weights, run stage by stage on the same images."""

    def __init__(self, base: CLIPerConfig, device: str = "auto") -> None:
        """Load CLIP and the diffusion model once. Raises WeightsError or ConfigError."""
        self.base = base
        self.full = CLIPer.load(base, ClassList.parse(list(CLASSES)), device)

    @torch.inference_mode()
    def label(
        self, scene: Scene, image_id: str, stages: Sequence[str] = STAGES
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield (stage, labels [H, W]) for each of `stages`; the diffusion step is shared by the FGC stages."""
        coarse_stages = [stage for stage in stages if stage not in REFINED]
        for stage in coarse_stages:
            yield stage, self._coarse(stage).segment([scene.image], [image_id])[0].labels
        modes = {stage: REFINED[stage] for stage in stages if stage in REFINED}
        if modes:
            yield from self._refined(scene, image_id, modes)

    def _coarse(self, stage: str) -> CLIPer:
        return CLIPer(stage_config(self.base, stage), self.full.visual, self.full.text, len(CLASSES), None)

    def _refined(
        self, scene: Scene, image_id: str, modes: dict[str, Any]
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        fgc, diffusion = self.base.fgc, self.full.diffusion
        if fgc is None or diffusion is None:
            raise ValueError("the FGC stages need a config with fgc")
        coarse = self._coarse(FUSION).scores([scene.image], [image_id]).coarse
        attention = diffusion([scene.image], [image_id])
        threshold = (
            self.base.fusion.attention_threshold if fgc.attention_threshold is None else fgc.attention_threshold
        )
        for stage, mode in modes.items():
            refined = refine(coarse, attention, threshold, mode, fgc.selection)
            presence = presence_scores(coarse, refined)
            yield stage, segment_scores(refined[0], presence[0], scene.labels.shape, self.base.labels).labels


def measure(
    base: CLIPerConfig, seed: int, scenes: int, device: str = "auto", stages: Sequence[str] = STAGES
) -> dict[str, Ints]:
    """`image_counts` [scenes, 3, K + 1] of every stage on the first `scenes` scenes of `seed`."""
    models = Stages(base, device)
    counts: dict[str, list[Ints]] = {stage: [] for stage in stages}
    for index in range(scenes):
        scene = make_scene(seed, index)
        for stage, labels in models.label(scene, f"scene-{seed}-{index}", stages):
            counts[stage].append(image_counts(scene, labels))
    return {stage: np.stack(parts) for stage, parts in counts.items()}


def summarise(counts: dict[str, Ints]) -> list[dict[str, Any]]:
    """One {name, miou, low, high} per stage, in percent: 95% intervals by drawing images with replacement."""
    rows = []
    for stage, totals in counts.items():
        spread = interval(100 * drawn_miou(totals, "cliper", ()))
        row = {"miou": miou(totals), "low": spread.low, "high": spread.high}
        rows.append({"name": stage} | {key: round(value, 2) for key, value in row.items()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the README's table."""
    lines = ["| stage | mIoU | 95% interval |", "| --- | ---: | ---: |"]
    return "\n".join(
        lines + [f"| {r['name']} | {r['miou']:.1f} | {r['low']:.1f} to {r['high']:.1f} |" for r in rows]
    )


def tiny_config(path: Path = TINY, **folders: str | None) -> CLIPerConfig:
    """Read the default label config, with other weights if folders for `clip` or `sd` are given."""
    model: dict[str, Any] = yaml.safe_load(path.read_text())["model"]
    if folders.get("clip"):
        model["backbone"] = {"model": f"local-dir:{folders['clip']}"}
    if folders.get("sd"):
        model["fgc"]["model"] = folders["sd"]
    return CLIPerConfig.model_validate(model)


def main() -> None:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=int(os.environ.get("SCENES", "200")))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", SEEDS["test"])))
    parser.add_argument("--output", type=Path, default=Path("build/stage_gains.json"))
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--clip", help="an open_clip local-dir instead of the embedded CLIP")
    parser.add_argument("--sd", help="a diffusers folder instead of the embedded Stable Diffusion")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.seed == SEEDS["train"]:
        parser.error(f"seed {args.seed} drew the training scenes; choose another")
    began = time.time()
    rows = summarise(
        measure(tiny_config(args.config, clip=args.clip, sd=args.sd), args.seed, args.scenes, args.device)
    )
    result = {"scenes": args.scenes, "seed": args.seed, "seconds": round(time.time() - began, 1), "stages": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
