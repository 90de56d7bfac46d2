"""Train a small network on the masks of a run, with no pixel labels, and measure it against its teacher.

    python -m examples.student

Draws procedural scenes, labels them with `cliper label` and the embedded model on a local Ray, trains a small
U-Net on the masks through `cliper.pipeline.dataset.MaskDataset`, and measures teacher and student on held-out
scenes against their pixel labels, which are not used for training. With --run, it trains on the masks of your own
run, which must have the embedded model's classes.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cliper.jobs.cli import run as as_command
from cliper.jobs.label import label
from cliper.pipeline.dataset import MaskDataset
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.rows import LABELED, read_tables
from cliper.pipeline.storage.backend import Storage
from examples.scenes import write_scenes
from tools.scenes import CLASSES
from tools.stage_gains import image_counts, miou

SIDE = 128  # pixels, the student's input size
IGNORE = 255


class Student(nn.Module):
    """A U-Net of 0.9 million parameters: images float [B, 3, H, W], 0 to 1, to scores [B, K, H, W].

    H and W are multiples of 16. The first step folds 2 x 2 pixels into channels, which makes it four times faster.
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        before = (12, *widths[:-1])
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(before, widths, strict=True))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score every pixel for every class."""
        x = F.pixel_unshuffle(images - 0.5, 2)
        skipped: list[torch.Tensor] = []
        for block in self.down:
            x = block(x if not skipped else F.max_pool2d(x, 2))
            skipped.append(x)
        for block, skip in zip(self.up, skipped[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


def _block(before: int, after: int) -> nn.Sequential:
    def convolution(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(*convolution(before), *convolution(after))


def shrink(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image uint8 [3, H, W] to float [3, SIDE, SIDE] and mask to int64 [SIDE, SIDE], mirrored at random.

    The student's class k - 1 is the mask's class k; background or unknown teaches nothing.
    """
    small = F.interpolate(image[None] / 255, (SIDE, SIDE), mode="area")[0]
    labels = F.interpolate(mask[None, None].float(), (SIDE, SIDE), mode="nearest-exact")[0, 0].long()
    labels = torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
    return (small.flip(-1), labels.flip(-1)) if torch.rand(()) < 0.5 else (small, labels)


def train(dataset: MaskDataset, classes: int, epochs: int, batch: int = 16) -> Student:
    """Fit a student to the masks; prints the mean loss of every epoch."""
    torch.manual_seed(0)
    student = Student(classes)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    loader = DataLoader(dataset, batch_size=batch, drop_last=dataset.rows >= batch)
    steps = max(1, epochs * (dataset.rows // batch))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + epochs)
    student.train()
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        losses = []
        for example in loader:
            loss = F.cross_entropy(student(example.image), example.mask, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}", file=sys.stderr, flush=True)
    return student


@torch.inference_mode()
def predict(student: Student, image: np.ndarray) -> np.ndarray:
    """Labels uint8 [H, W], 1 to K, of an image uint8 [H, W, 3]."""
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    scores = student.eval()(F.interpolate(pixels, (SIDE, SIDE), mode="area"))
    full = F.interpolate(scores, image.shape[:2], mode="bilinear")
    return np.asarray(full[0].argmax(0).numpy() + 1, dtype=np.uint8)


def labeled(folder: Path) -> Run:
    """Label the images of a folder of scenes, as `cliper label` does."""
    label(input=str(folder / "images"), output=str(folder / "run"), classes="tiny", config="tiny")
    return read_run(str(folder / "run"), Storage())


def measure(student: Student, heldout: Path, count: int) -> None:
    """Draw and label held-out scenes; print the mIoU of teacher and student against the pixel labels."""
    truth = write_scenes(heldout, "heldout", count)
    rows = [row for table in read_tables(labeled(heldout), keep=LABELED) for row in table.to_pylist()]
    teacher = [image_counts(truth[row["image_id"]], unpack_mask(row)) for row in rows]
    learned = [image_counts(scene, predict(student, scene.image)) for scene in truth.values()]
    size = sum(parameter.numel() for parameter in student.parameters())
    print(f"teacher   {miou(np.stack(teacher)):.1f} mIoU on {len(rows)} held-out scenes")
    print(
        f"student   {miou(np.stack(learned)):.1f} mIoU, {size / 1e6:.1f} million parameters, no pixel label seen"
    )


def main() -> None:
    """Draw, label, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/student"), help="new folder for the output")
    parser.add_argument("--run", help="run folder to train on, instead of labeling new scenes")
    parser.add_argument("--scenes", type=int, default=240, help="scenes to label and train on, without --run")
    parser.add_argument("--heldout", type=int, default=40, help="scenes to measure on")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--min-confidence", type=float, help="ignore classes below this mean confidence, 0 to 1")
    given = parser.parse_args()
    started = time.monotonic()
    if given.run is None:
        write_scenes(given.output / "train", "train", given.scenes)
    run = labeled(given.output / "train") if given.run is None else read_run(given.run, Storage())
    dataset = MaskDataset(run, min_confidence=given.min_confidence, transform=shrink)
    student = train(dataset, len(CLASSES), given.epochs)
    measure(student, given.output / "heldout", given.heldout)
    torch.save(student.state_dict(), given.output / "student.pt")
    print(f"time      {time.monotonic() - started:.0f} s, {dataset.rows} images, {given.epochs} epochs")


if __name__ == "__main__":
    as_command(main)
