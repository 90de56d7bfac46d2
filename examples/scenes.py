"""Write procedural scenes as a folder of images with pixel labels, in the form `cliper prepare folder` reads.

    python -m examples.scenes build/scenes --count 240

FOLDER/images/scene-0000.png    the input of `cliper label`
FOLDER/labels/scene-0000.png    the class of every pixel, for evaluation only
FOLDER/classes.txt              one class a line
"""

import argparse
from pathlib import Path

from PIL import Image

from cliper.jobs.cli import run as as_command
from cliper.pipeline.errors import InputError
from tools.scenes import CLASSES, SEEDS, Scene, make_scenes

SPLITS = {"train": SEEDS["validation"], "heldout": SEEDS["test"]}  # the embedded model was trained on neither


def write_scenes(folder: Path, split: str, count: int) -> dict[str, Scene]:
    """Draw `count` scenes of a split into a new folder; returns them by file name. Raises InputError."""
    if folder.exists():
        raise InputError(f"{folder} is there already; choose another folder, or remove it")
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    names = [f"scene-{i:04d}.png" for i in range(count)]
    scenes = dict(zip(names, make_scenes(SPLITS[split], range(count), workers=2), strict=True))
    for name, scene in scenes.items():
        Image.fromarray(scene.image).save(folder / "images" / name)
        Image.fromarray(scene.labels).save(folder / "labels" / name)
    return scenes


def main() -> None:
    """Parse the arguments, draw the scenes, and print the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--split", choices=tuple(SPLITS), default="train", help="the two have no scene in common")
    given = parser.parse_args()
    write_scenes(given.folder, given.split, given.count)
    print(f"scenes    {given.count} in {given.folder / 'images'}")


if __name__ == "__main__":
    as_command(main)
