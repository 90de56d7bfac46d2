"""`make demo`: label images on this machine without a download, and draw a contact sheet of the masks.

Labels 24 held-out procedural scenes and the example photographs with `cliper label` and the embedded model on a
local Ray, measures the scenes against their pixel labels, and draws build/demo/contact_sheet.png.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from PIL import Image

from cliper.jobs.cli import run
from cliper.jobs.label import label
from cliper.model import CLIPer
from cliper.model.classes import ClassList
from cliper.pipeline.config import load_classes, load_config
from cliper.pipeline.corpus.decode import decode, upright
from cliper.pipeline.run.masks import unpack_mask
from tools.contact_sheet import Picture, contact_sheet, overlay, palette
from tools.scenes import CLASSES, SEEDS, Scene, make_scene
from tools.stage_gains import image_counts, miou

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "demo"
SCENES = 24
CELL = 144


def write_corpus(folder: Path, count: int) -> dict[str, Scene]:
    """Write scenes as PNG files and copy the example photographs; returns the scenes by image id."""
    scenes = {f"scenes/scene-{i:02d}.png": make_scene(SEEDS["test"], i) for i in range(count)}
    (folder / "scenes").mkdir(parents=True)
    for name, scene in scenes.items():
        Image.fromarray(scene.image).save(folder / name)
    shutil.copytree(ROOT / "examples" / "photos", folder / "photos", ignore=shutil.ignore_patterns("*.md"))
    return scenes


def read_masks(run_folder: Path) -> dict[str, np.ndarray]:
    """The upright masks by image id."""
    columns = ["image_id", "mask", "mask_codec", "orientation", "status"]
    rows = ds.dataset(run_folder / "labels", format="parquet").to_table(columns=columns).to_pylist()
    return {
        row["image_id"]: upright(unpack_mask(row), row["orientation"]) for row in rows if row["status"] == "ok"
    }


def without_fgc(classes: ClassList, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks of the same model without fine-grained compensation, called as a library."""
    config = load_config("tiny").cliper.model_copy(update={"fgc": None})
    found = CLIPer.load(config, classes).segment(list(images.values()), list(images))
    return {image_id: result.labels for image_id, result in zip(images, found, strict=True)}


def draw(
    images: dict[str, np.ndarray],
    plain: dict[str, np.ndarray],
    refined: dict[str, np.ndarray],
    scenes: dict[str, Scene],
) -> Image.Image:
    """Draw one row per image: image, mask without FGC, mask with FGC, ground truth (gray if missing)."""
    colours = palette(len(CLASSES))

    def pictures(image_id: str) -> Iterator[Picture]:
        image = images[image_id]
        yield image
        yield overlay(image, plain[image_id], colours)
        yield overlay(image, refined[image_id], colours)
        known = scenes.get(image_id)
        yield np.full_like(image, 200) if known is None else overlay(image, known.labels, colours)

    rows = [[_cell(picture) for picture in pictures(image_id)] for image_id in images]
    return contact_sheet(rows, CLASSES, colours)


def _cell(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.LANCZOS))


def main(folder: Path = BUILD, count: int = SCENES) -> None:
    """Run the demo with `count` scenes in a clean folder."""
    shutil.rmtree(folder, ignore_errors=True)
    corpus, output = folder / "images", folder / "run"
    scenes = write_corpus(corpus, count)
    label(input=str(corpus), output=str(output), classes="tiny", config="tiny")
    refined = read_masks(output)
    ids = [*scenes, *sorted(refined.keys() - scenes.keys())]
    images = {image_id: decode((corpus / image_id).read_bytes(), 10**8).pixels for image_id in ids}
    plain = without_fgc(load_classes("tiny"), images)
    for name, masks in (("without FGC", plain), ("with FGC", refined)):
        counts = np.stack([image_counts(scene, masks[image_id]) for image_id, scene in scenes.items()])
        print(f"mIoU      {miou(counts):.1f} {name}, {len(scenes)} scenes against their pixel labels")
    picture = folder / "contact_sheet.png"
    draw(images, plain, refined, scenes).save(picture, optimize=True)
    print(f"picture   {os.path.relpath(picture)}")


if __name__ == "__main__":
    run(main)
