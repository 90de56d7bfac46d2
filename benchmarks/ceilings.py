"""A lower bound on the time per image: its operations over the matrix rate, its bytes over the copy rate.

    python -m benchmarks.ceilings --device cuda --dtype float16

Operations are counted by torch on the real modules; both rates are measured. The floor is the sum over the
stages of the larger of the two times; weights are read once per batch.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks import models
from benchmarks.operations import counter as flop_counter
from cliper.model.backbone import encode
from cliper.model.diffusion import image_noise
from cliper.model.segmenter import CLIPer

TOKENS, HEADS, WIDTH = 4096, 10, 64  # of the two self-attention layers FGC reads


def seconds(function: Any, device: str, repeats: int = 20) -> float:
    """Median time of a call after three warm-up calls."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large product of random matrices."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device)


@torch.inference_mode()
def operations(ours: CLIPer, device: torch.device) -> dict[str, float]:
    """Operations of one image per stage; the UNet only up to the last attention that is read."""
    image = models.photo(0)
    pixels = ours.preprocess(image)[None].to(device)
    counted = {}
    with flop_counter() as counter:
        encode(ours.visual, pixels)
    patch = ours.visual.patch_size[0]
    tokens = 1 + (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    layers, width = len(ours.visual.transformer.resblocks), ours.visual.proj.shape[0]
    fusion = layers * 2 * tokens * width * (tokens + 2 * width + ours.visual.proj.shape[1])
    counted["clip"] = counter.get_total_flops() + fusion
    if ours.diffusion is not None:
        prepared = ours.diffusion._prepare(image)[None]
        with flop_counter() as counter:
            ours.diffusion._step(prepared, image_noise(0, "0", 64)[None].to(device))
        counted["diffusion"] = counter.get_total_flops()
        # Products q k^T once (a map need not be computed twice) and the map times the scores.
        counted["refine"] = HEADS * 2 * TOKENS**2 * (WIDTH + models.CLASSES)
    return counted


def main() -> None:
    """Measure, count and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", choices=models.ARCHITECTURES, default="L/14")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    visual = models.clip_visual(args.name, device, dtype)
    diffusion = models.stable_diffusion(device, dtype, with_text=False)
    ours = models.segmenter(args.name, models.configuration(args.name, True), visual, diffusion, device)
    matrix, copy = matrix_rate(args.device, dtype), copy_rate(args.device)
    counted = operations(ours, device)
    size = {m: sum(p.numel() * p.element_size() for p in n.parameters()) for m, n in _networks(ours).items()}
    weights = {"clip": size["visual"], "diffusion": size["unet"] + size["vae"], "refine": 0}
    floor = {k: max(v / matrix, weights[k] / args.batch / copy) for k, v in counted.items()}
    result = {"matrix_flops": matrix, "copy_bytes": copy, "operations": counted, "floor_seconds": floor}
    print(json.dumps(result | {"floor_total": sum(floor.values())}))


def _networks(ours: CLIPer) -> dict[str, Any]:
    assert ours.diffusion is not None
    return {"visual": ours.visual, "unet": ours.diffusion.unet, "vae": ours.diffusion.vae}


if __name__ == "__main__":
    main()
