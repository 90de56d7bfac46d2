"""A contact sheet to inspect masks: image, mask without FGC, mask with FGC, ground truth, and a color legend.

python -m tools.contact_sheet --output build/contact_sheet.png
"""

import argparse
import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from cliper.model.config import CLIPerConfig
from tools.scenes import CLASSES, SEEDS, Scene, make_scene
from tools.stage_gains import FUSION, TINY, Stages, tiny_config

Picture = npt.NDArray[np.uint8]
COLUMNS = ("image", "without FGC", "with FGC", "ground truth")
GAP, HEAD, LEGEND_ROW = 4, 16, 18
INK, PAPER = (20, 20, 20), (255, 255, 255)


def palette(classes: int) -> Picture:
    """Return distinct colors uint8 [classes + 1, 3]: hues a golden angle apart; label 0 is black."""
    colours = [(0.0, 0.0, 0.0)]
    for k in range(classes):
        colours.append(colorsys.hsv_to_rgb((0.618034 * k) % 1, (0.85, 0.55, 1.0)[k % 3], (0.95, 0.85, 0.6)[k % 3]))
    return (np.array(colours) * 255).astype(np.uint8)


def overlay(image: Picture, labels: npt.NDArray[Any], colours: Picture) -> Picture:
    """Labels [H, W] as colors over a desaturated image [H, W, 3], with dark borders between labels."""
    grey = image.mean(axis=2, keepdims=True)
    mixed = 0.3 * grey + 0.7 * colours[labels]
    border = np.zeros(labels.shape, dtype=bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    mixed[border] = 0
    return mixed.astype(np.uint8)


def contact_sheet(
    rows: Sequence[Sequence[Picture]], names: Sequence[str], colours: Picture, across: int = 3
) -> Image.Image:
    """Arrange rows of images of one size, `across` per line, with headings and a legend of `names`."""
    cell = rows[0][0].shape[0]
    width = len(COLUMNS) * cell + GAP * 2
    lines = -(-len(rows) // across)
    per_row = max(1, across * width // 150)
    legend = LEGEND_ROW * (-(-len(names) // per_row)) + GAP
    sheet = Image.new("RGB", (across * width, HEAD + lines * (cell + GAP) + legend), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = (number % across) * width, HEAD + (number // across) * (cell + GAP)
        for column, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (left + column * cell, top))
            if number < across:
                draw.text((left + column * cell + 4, 2), COLUMNS[column], INK)
    _draw_legend(draw, names, colours, HEAD + lines * (cell + GAP) + GAP, per_row)
    return sheet


def _draw_legend(
    draw: ImageDraw.ImageDraw, names: Sequence[str], colours: Picture, top: int, per_row: int
) -> None:
    for k, name in enumerate(names):
        x, y = 4 + 150 * (k % per_row), top + LEGEND_ROW * (k // per_row)
        draw.rectangle((x, y, x + 12, y + 12), fill=tuple(int(v) for v in colours[k + 1]), outline=INK)
        draw.text((x + 17, y), name, INK)


def scene_row(models: Stages, scene: Scene, image_id: str, side: int, colours: Picture) -> list[Picture]:
    """The four images of one scene, each [side, side, 3]."""
    refinement = models.base.fgc.refinement if models.base.fgc else "chain"
    masks = dict(models.label(scene, image_id, (FUSION, f"+ FGC ({refinement})")))
    pictures = [scene.image, *(overlay(scene.image, m, colours) for m in (*masks.values(), scene.labels))]
    return [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.LANCZOS)) for p in pictures]


def draw_scenes(config: CLIPerConfig, count: int = 24, seed: int = SEEDS["test"], side: int = 144) -> Image.Image:
    """The sheet of the first `count` scenes of `seed`, labeled by `config` (which needs fgc)."""
    models, colours = Stages(config), palette(len(CLASSES))
    scenes = [make_scene(seed, index) for index in range(count)]
    rows = [scene_row(models, s, f"scene-{seed}-{i}", side, colours) for i, s in enumerate(scenes)]
    return contact_sheet(rows, CLASSES, colours)


def main() -> None:
    """Draw the sheet to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/contact_sheet.png"))
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=SEEDS["test"])
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_scenes(tiny_config(args.config), args.scenes, args.seed).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
