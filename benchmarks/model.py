"""The official order against ours, stage by stage and whole, on random weights at full size.

    python -m benchmarks.model --name L/14 --fgc --device cpu

prints one JSON object. Needs cliper_model and its dependencies only. Each side runs in a separate process, one
after the other.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.measure import Stopwatch
from benchmarks.official import Official
from cliper.model.allocator import KEEP_FREED_MEMORY
from cliper.model.diffusion import image_noise
from cliper.model.fusion import coarse_scores
from cliper.model.labels import presence_scores, segment_scores
from cliper.model.presets import preset
from cliper.model.refine import refine
from cliper.model.segmenter import CLIPer


@dataclass(frozen=True)
class Pair:
    """Both orders of computation with the same networks."""

    ours: CLIPer
    official: Official
    images: list[np.ndarray]

    @property
    def ids(self) -> list[str]:
        """Image ids."""
        return [str(i) for i in range(len(self.images))]


def build(name: str, fgc: bool, device: torch.device, dtype: torch.dtype, preset_name: str, batch: int) -> Pair:
    """Create the networks once, and both sides with them."""
    config = preset(models.configuration(name, fgc, batch_size=batch), preset_name)
    visual = models.clip_visual(name, device, dtype)
    diffusion = models.stable_diffusion(device, dtype, with_text=True) if config.fgc is not None else None
    ours = models.segmenter(name, config, visual, diffusion, device)
    official = Official(config, visual, ours.text, models.CLASSES, diffusion)
    return Pair(ours, official, [models.photo(i) for i in range(batch)])


def run_official(pair: Pair, watch: Stopwatch) -> None:
    """One image in the official order."""
    official, image = pair.official, pair.images[0]
    with watch.stage("prepare"):
        pixels = pair.ours.preprocess(image)[None].to(pair.ours.device)
    with watch.stage("clip"):
        refined = coarse = official.clip(pixels)
    if official.diffusion is not None:
        with watch.stage("diffusion"):
            maps = official.maps(image, image_noise(0, "0", 64))
        with watch.stage("refine"):
            refined = official.refine(coarse, maps)
    with watch.stage("labels"):
        official.label(coarse.float(), refined.float(), image.shape[:2])


def run_ours(pair: Pair, watch: Stopwatch) -> None:
    """One batch in ours."""
    ours, images, count = pair.ours, pair.images, len(pair.images)
    config = ours.config
    with watch.stage("prepare", count):
        pixels = torch.stack([ours.preprocess(image) for image in images]).to(ours.device)
    with watch.stage("clip", count):
        refined = coarse = coarse_scores(ours.visual, pixels, ours.text, ours.classes, config.fusion, None)
    if ours.diffusion is not None and config.fgc is not None:
        with watch.stage("diffusion", count):
            attention = ours.diffusion(images, pair.ids)
        with watch.stage("refine", count):
            refined = refine(coarse, attention, config.fusion.attention_threshold, config.fgc.refinement)
    with watch.stage("labels", count):
        presence = presence_scores(coarse, refined)
        for row, image in enumerate(images):
            segment_scores(refined[row], presence[row], image.shape[:2], config.labels)


class _Blind(Stopwatch):
    """A stopwatch that does not reset the peak of the enclosing one."""

    def _begin(self) -> int:
        return 0


def measure_official(pair: Pair, device: str, repeats: int) -> dict[str, Any]:
    """The memory of a whole image, then every stage `repeats` times; a whole image's time is their sum."""
    first, watch = Stopwatch(device), Stopwatch(device)
    with first.stage("whole"):
        run_official(pair, _Blind(device))
    for _ in range(repeats):
        run_official(pair, watch)
    stages = watch.result()
    times = {key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "cpu_seconds")}
    return stages | {"whole": times | {"bytes": first.result()["whole"]["bytes"]}}


def measure_ours(pair: Pair, device: str, repeats: int) -> dict[str, Any]:
    """The memory of a whole batch and of every stage in a first pass, then the time of both `repeats` times."""
    first, watch = Stopwatch(device), Stopwatch(device)
    with first.stage("whole", len(pair.images)):
        pair.ours.segment(pair.images, pair.ids)
    run_ours(pair, first)
    for _ in range(repeats):
        run_ours(pair, watch)
        with watch.stage("whole", len(pair.images)):
            pair.ours.segment(pair.images, pair.ids)
    watch.bytes = first.bytes
    return watch.result()


SIDES = {"official": measure_official, "ours": measure_ours}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run each side in a separate process, one after the other, so that neither inherits the other's memory.

    On the CPU our side keeps freed memory, as our actors do. Kept memory hides the need of a stage, so the peaks
    are measured in an additional process that does not keep it.
    """
    results, on_cpu = {}, args.device == "cpu"
    if args.side != "ours":
        results["official"] = child("official", {})
    if args.side != "official":
        results["ours"] = ours = child("ours", KEEP_FREED_MEMORY if on_cpu else {})
        for name, stage in child("ours", {}, "--repeats", "1").items() if on_cpu else ():
            ours[name]["bytes"] = stage["bytes"]
    return results


def child(side: str, environment: dict[str, str], *options: str) -> dict[str, Any]:
    """Run this module for one side."""
    command = [sys.executable, "-m", "benchmarks.model", *sys.argv[1:], *options, "--here", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | environment)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


@torch.inference_mode()
def main() -> None:
    """Measure as requested and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", choices=models.ARCHITECTURES, default="L/14")
    parser.add_argument("--fgc", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--preset", choices=["exact", "fast"], default="exact")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--side", choices=["both", *SIDES], default="both")
    parser.add_argument("--here", choices=SIDES, help="measure this side in this process")
    args = parser.parse_args()
    if args.here is None:
        print(json.dumps(compare(args)))
        return
    dtype = getattr(torch, args.dtype)
    pair = build(args.name, args.fgc, torch.device(args.device), dtype, args.preset, args.batch)
    print(json.dumps(SIDES[args.here](pair, args.device, args.repeats)))


if __name__ == "__main__":
    main()
