"""Procedural scenes: images with captions for training, and pixel labels for evaluation only.

A scene is decided by (seed, index) alone. Its ground is one to three stuff textures divided by wavy borders;
two to four things lie on it, at least two of them overlapping; light, shadows, blur and noise vary. The caption
names every visible class and nothing else. Training reads images and captions, never `labels`.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from tools.scene_stuff import STUFF, Array, noise
from tools.scene_things import THINGS

CLASSES = (*STUFF, *THINGS)  # class k (1-based) is CLASSES[k - 1]; label 0 never occurs
SIDE = 256
SEEDS = {"train": 1, "validation": 2, "test": 3}
CAPTIONS = (
    "a photo of {things} on {stuff}.",
    "{things} and {stuff}",
    "there is {things} in the scene with {stuff}.",
)
MIN_VISIBLE = 0.4  # of a thing's own area


@dataclass(frozen=True)
class Scene:
    """One image: RGB uint8 [side, side, 3], class labels uint8 [side, side] (1-based), and its caption."""

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class Placed:
    """A painted thing in the full frame: cover [side, side], colours [side, side, 3], class and drawn area."""

    label: int
    cover: Array
    colours: Array
    area: float


def make_scene(seed: int, index: int, side: int = SIDE) -> Scene:
    """Draw scene number `index` of `seed`: `side` x `side` pixels (64 or more)."""
    rng = np.random.default_rng([seed, index])
    image, labels = _ground(rng, side)
    for thing in _arrange(rng, side):
        shadow = _shifted(thing.cover, int(rng.integers(1, 1 + side // 40)))
        image = image * (1 - 0.35 * shadow[..., None])
        image = image + (thing.colours - image) * thing.cover[..., None]
        labels = np.where(thing.cover > 0.5, np.uint8(thing.label), labels)
    return Scene(_photograph(rng, image), labels, _caption(rng, labels))


def make_scenes(seed: int, indices: Sequence[int], side: int = SIDE, workers: int = 1) -> list[Scene]:
    """Draw many scenes, in order, with `workers` processes."""
    draw = partial(make_scene, seed, side=side)
    if workers <= 1:
        return [draw(index) for index in indices]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(draw, indices, chunksize=64))


def classes_in(caption: str) -> list[int]:
    """Return the 0-based classes a caption names, in class order."""
    return [k for k, name in enumerate(CLASSES) if re.search(rf"\b{name}\b", caption)]


def _ground(rng: np.random.Generator, side: int) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Fill the frame with one to three stuff textures: image [side, side, 3] and labels [side, side]."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.55, 0.15]))
    kinds = rng.choice(len(STUFF), count, replace=False)
    painters = list(STUFF.values())
    image = painters[kinds[0]](rng, side)
    labels = np.full((side, side), kinds[0] + 1, np.uint8)
    for kind, level in zip(kinds[1:], (rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.35)), strict=False):
        region = _wavy(rng, side) > level
        image = np.where(region[..., None], image, painters[kind](rng, side))
        labels = np.where(region, labels, np.uint8(kind + 1))
    return image, labels


def _wavy(rng: np.random.Generator, side: int) -> Array:
    """Return a slope [side, side] from 0 to about 1 in a random direction, bent by smooth noise."""
    line = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = line[None, :] * np.cos(angle) + line[:, None] * np.sin(angle)
    return np.asarray(0.5 + slope + 0.35 * (noise(rng, side, 4, 4) - 0.5), dtype=np.float32)


def _arrange(rng: np.random.Generator, side: int) -> list[Placed]:
    """Place two to four things of different classes; the second overlaps the first, none is hidden too far."""
    count = int(rng.integers(2, 5))
    kinds = rng.choice(len(THINGS), count, replace=False)
    while True:
        placed = _attempt(rng, side, kinds)
        if all(share >= MIN_VISIBLE for share in _visible(placed)):
            return placed


def _attempt(rng: np.random.Generator, side: int, kinds: npt.NDArray[np.int64]) -> list[Placed]:
    radii = rng.uniform(0.13, 0.25, len(kinds)) * side
    centres = rng.uniform(0.15, 0.85, (len(kinds), 2)) * side
    towards = rng.uniform(0, 2 * np.pi)
    apart = rng.uniform(0.65, 0.95) * (radii[0] + radii[1])
    centres[1] = centres[0] + apart * np.array([np.cos(towards), np.sin(towards)])
    return [_place(rng, side, int(kind), centres[i], float(radii[i])) for i, kind in enumerate(kinds)]


def _place(
    rng: np.random.Generator, side: int, kind: int, centre: npt.NDArray[np.float64], radius: float
) -> Placed:
    """Paint one thing, turned by up to 35 degrees, into an empty frame."""
    cover, colours = np.zeros((side, side), np.float32), np.zeros((side, side, 3), np.float32)
    reach = int(1.45 * radius)
    top, left = (int(v) for v in np.clip(centre[::-1] - reach, 0, side))
    bottom, right = (int(v) for v in np.clip(centre[::-1] + reach, 0, side))
    angle = rng.uniform(-0.6, 0.6)
    dy, dx = np.mgrid[top:bottom, left:right].astype(np.float32)
    dx, dy = (dx - centre[0]) / radius, (dy - centre[1]) / radius
    x, y = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if x.size:
        painter = list(THINGS.values())[kind]
        cover[top:bottom, left:right], colours[top:bottom, left:right] = painter(rng, x, y, 1 / radius)
    return Placed(len(STUFF) + kind + 1, cover, colours, area=1.6 * radius**2)


def _visible(placed: list[Placed]) -> list[float]:
    """Return the share of each thing's nominal area that nothing above it covers and the frame does not cut."""
    shares = []
    for i, thing in enumerate(placed):
        free = thing.cover > 0.5
        for above in placed[i + 1 :]:
            free = free & (above.cover <= 0.5)
        shares.append(float(free.sum()) / thing.area)
    return shares


def _shifted(cover: Array, by: int) -> Array:
    """Return a soft copy of a cover moved down and right: the shadow it throws."""
    picture = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(by))
    moved = np.zeros_like(cover)
    moved[by:, by:] = np.asarray(picture, dtype=np.float32)[:-by, :-by] / 255
    return moved


def _photograph(rng: np.random.Generator, image: Array) -> npt.NDArray[np.uint8]:
    """Light the scene from one side, tint, blur and add sensor noise: uint8 [side, side, 3]."""
    side = len(image)
    light = 0.75 + 0.5 * _wavy(rng, side)
    image = image * light[..., None] * rng.uniform(0.9, 1.1, 3).astype(np.float32) * rng.uniform(0.8, 1.15)
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))
    grain = rng.normal(0, rng.uniform(0, 10), image.shape)
    return np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)


def _caption(rng: np.random.Generator, labels: npt.NDArray[np.uint8]) -> str:
    """Name the classes that cover half a percent of the frame or more, in random order: things, then stuff."""
    sizes = np.bincount(labels.ravel(), minlength=len(CLASSES) + 1)
    seen = [k for k in rng.permutation(np.arange(1, len(sizes))) if sizes[k] >= 0.005 * labels.size]
    things = [f"a {CLASSES[k - 1]}" for k in seen if k > len(STUFF)]
    stuff = [CLASSES[k - 1] for k in seen if k <= len(STUFF)]
    return CAPTIONS[rng.integers(len(CAPTIONS))].format(things=_listed(things), stuff=_listed(stuff))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
