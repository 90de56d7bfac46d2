"""Shared parts of both training scripts: scenes in memory, augmentation, resumable checkpoints, the record."""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scenes import SEEDS, SIDE, make_scenes


def pick_device(name: str, threads: int | None = None) -> torch.device:
    """Resolve "auto" to CUDA if available; `threads` limits torch's threads on the CPU."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_scenes(count: int, folder: Path, workers: int) -> tuple[Tensor, list[str]]:
    """Training pictures uint8 [count, 3, SIDE, SIDE] and captions, drawn once and kept in `folder`.

    Pixel labels are dropped here: no training script sees them.
    """
    images_file, captions_file = folder / f"train-{count}.npy", folder / f"train-{count}.json"
    if not captions_file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scenes = make_scenes(SEEDS["train"], range(count), SIDE, workers)
        np.save(images_file, np.stack([scene.image for scene in scenes]))
        captions_file.write_text(json.dumps([scene.caption for scene in scenes]))
    images = torch.from_numpy(np.load(images_file))
    return images.permute(0, 3, 1, 2).contiguous(), json.loads(captions_file.read_text())


def shrink(images: Tensor, side: int, batch: int = 256) -> Tensor:
    """Resize uint8 [n, 3, h, w] to [n, 3, side, side], bicubic with antialiasing."""
    parts = [
        F.interpolate(images[i : i + batch].float(), size=(side, side), mode="bicubic", antialias=True)
        for i in range(0, len(images), batch)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def random_views(images: Tensor, side: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Crop, mirror and relight a batch: uint8 [B, 3, h, w] to float [B, 3, side, side] in [0, 1].

    A crop keeps a share between `smallest` and 1 of each side; gain 0.7 to 1.3, offset up to 0.1.
    """
    batch, device = len(images), images.device
    draw = torch.rand(batch, 6, generator=generator).to(device)
    scale = smallest + (1 - smallest) * draw[:, 0]  # [B]
    mirror = torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (2 * draw[:, 2:4] - 1) * (1 - scale)[:, None]
    grid = F.affine_grid(theta, [batch, 3, side, side], align_corners=False)
    views = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    gain, offset = 0.7 + 0.6 * draw[:, 4], 0.2 * draw[:, 5] - 0.1
    return (views * gain[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps (100 at most), then a cosine to zero."""
    warmup = min(100, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Plan:
    """How one network is trained: AdamW for `steps` of `batch`, warmed up to `rate`, then a cosine to zero.

    `half`: bfloat16 on the CPU too, as on CUDA always; twice as fast where the processor computes in it.
    """

    name: str
    steps: int
    batch: int
    rate: float
    decay: float
    save_every: int
    half: bool = False


def run(
    plan: Plan,
    model: nn.Module,
    loss_of: Callable[[Tensor, int], Tensor],
    count: int,
    folder: Path,
    generator: torch.Generator,
) -> None:
    """Train `model` on loss_of(scene numbers [batch], step), resuming from folder/NAME.pt."""
    device, path = next(model.parameters()).device, folder / f"{plan.name}.pt"
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=plan.decay)
    parts = {"model": model, "optimiser": optimiser}
    start, began = load_checkpoint(path, parts, generator), time.time()
    for step in range(start, plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, plan.steps, plan.rate)
        index = torch.randint(count, (plan.batch,), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.half or device.type == "cuda"):
            loss = loss_of(index, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 0 or step == plan.steps - 1:
            print(f"{plan.name} {step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % plan.save_every == 0 or step == plan.steps - 1:
            save_checkpoint(path, step + 1, parts, generator)


def save_checkpoint(path: Path, step: int, parts: dict[str, Any], generator: torch.Generator) -> None:
    """Write the state of `parts` (modules and optimisers) so that a killed run can continue."""
    state = {name: part.state_dict() for name, part in parts.items()}
    waiting = path.with_suffix(".tmp")
    torch.save({"step": step, "generator": generator.get_state(), **state}, waiting)
    waiting.replace(path)


def load_checkpoint(path: Path, parts: dict[str, Any], generator: torch.Generator) -> int:
    """Restore the output of `save_checkpoint`; returns the step to continue with, 0 if there is no file."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    return int(state["step"])


def write_record(folder: Path, settings: dict[str, Any], device: torch.device, seconds: float) -> None:
    """Write training.json: every setting, the machine kind and the seconds of the last uninterrupted run."""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    record = {
        "settings": settings,
        "torch": torch.__version__,
        "device": machine,
        "seconds": round(seconds, 1),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float16 copies, contiguous and on the CPU, for safetensors."""
    return {name: value.detach().cpu().half().contiguous() for name, value in state.items()}
