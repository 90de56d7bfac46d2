"""Things of the procedural scenes: painted objects, each with a distinct shape.

Each painter maps (generator, x, y, px) to a cover [h, w] in [0, 1] and RGB [h, w, 3] in [0, 1]. x and y are
coordinates [h, w] in which the object fits the square [-1, 1]; px is the size of a pixel in them. Shapes are
signed distances (negative inside), so edges are smooth at any size.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tools.scene_stuff import Array, blend, tint

Painted = tuple[Array, Array]
Painter = Callable[[np.random.Generator, Array, Array, float], Painted]
Colour = npt.ArrayLike


def cover(distance: Array, px: float) -> Array:
    """Anti-aliased inside of a signed distance [h, w]: 1 inside, 0 outside, a ramp one pixel wide."""
    return np.clip(0.5 - distance / px, 0, 1).astype(np.float32)


def ellipse(x: Array, y: Array, rx: float, ry: float, cx: float = 0.0, cy: float = 0.0) -> Array:
    """Return the approximate signed distance of an axis-aligned ellipse."""
    return ((np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)).astype(np.float32)


def box(x: Array, y: Array, rx: float, ry: float, cx: float = 0.0, cy: float = 0.0) -> Array:
    """Return the signed distance of a rectangle of half sides rx, ry."""
    return np.maximum(np.abs(x - cx) - rx, np.abs(y - cy) - ry)


def paint(image: Array, colour: Colour, weight: Array) -> Array:
    """Blend `colour` into an image [h, w, 3] with `weight` [h, w]."""
    return blend(image, np.asarray(colour, dtype=np.float32), weight)


def plain(x: Array, colour: Colour) -> Array:
    """Return an image [h, w, 3] of one colour."""
    return np.broadcast_to(np.asarray(colour, dtype=np.float32), (*x.shape, 3)).copy()


def dots(rng: np.random.Generator, x: Array, y: Array, count: int, size: float, reach: float, px: float) -> Array:
    """Cover [h, w] of `count` discs scattered evenly over the disc of radius `reach` (a sunflower spiral)."""
    n = np.arange(count)
    radius, angle = reach * np.sqrt((n + 0.5) / count), n * 2.39996 + rng.uniform(0, 6.28)
    centres = zip(radius * np.cos(angle), radius * np.sin(angle), strict=True)
    return cover(np.min([np.hypot(x - cx, y - cy) - size for cx, cy in centres], axis=0), px)


def striped_ball(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Beach ball: stripes of a vivid colour and white, bent round the ball."""
    colour = tint(rng, ((0.10, 0.25, 0.80), (0.85, 0.10, 0.35), (0.45, 0.10, 0.65))[rng.integers(3)])
    bent = y / np.sqrt(np.clip(1.15 - 0.6 * x * x, 0.3, None))
    stripes = cover(np.sin(bent * rng.uniform(7, 10) + rng.uniform(0, 3)).astype(np.float32) * 0.12, px)
    image = paint(plain(x, tint(rng, (0.95, 0.95, 0.92), 0.04)), colour, stripes)
    return cover(ellipse(x, y, 0.95, 0.95), px), image * (1.05 - 0.3 * np.hypot(x + 0.3, y + 0.3))[..., None]


def traffic_cone(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Orange cone with white bands on a dark base."""
    cone = np.maximum(np.abs(x) - (0.12 + 0.25 * (y + 1)), np.abs(y + 0.08) - 0.86)
    base = box(x, y, 0.82, 0.13, 0, 0.84)
    image = plain(x, tint(rng, (0.95, 0.40, 0.05)))
    for centre in (-0.35, 0.25):
        image = paint(image, (0.95, 0.95, 0.95), cover(np.abs(y - centre) - 0.13, px))
    image = paint(image, tint(rng, (0.22, 0.20, 0.22), 0.04), cover(base, px))
    return cover(np.minimum(cone, base), px), image


def sunflower(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Yellow petals round a dotted brown disc."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 6.28)
    petals = int(rng.integers(9, 14))
    edge = 0.62 + 0.33 * np.abs(np.cos(petals * angle / 2))
    image: Array = (
        plain(x, tint(rng, (0.98, 0.80, 0.10))) * (0.55 + 0.5 * np.abs(np.cos(petals * angle / 2)))[..., None]
    )
    image = paint(image, tint(rng, (0.30, 0.17, 0.07), 0.04), cover(radius - 0.46, px))
    image = paint(image, tint(rng, (0.62, 0.42, 0.14), 0.04), dots(rng, x, y, 24, 0.05, 0.42, px))
    return cover(radius - edge, px), image.astype(np.float32)


def ladybug(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Red wings with black spots, black head and a line between the wings."""
    body, head = ellipse(x, y, 0.78, 0.80, 0, 0.15), ellipse(x, y, 0.42, 0.32, 0, -0.66)
    image = plain(x, tint(rng, (0.85, 0.08, 0.07)))
    image = paint(image, (0.06, 0.05, 0.05), dots(rng, x, y - 0.15, 11, 0.13, 0.62, px))
    image = paint(image, (0.06, 0.05, 0.05), cover(np.abs(x) - 0.04, px))
    image = paint(image, (0.06, 0.05, 0.05), cover(np.minimum(head, y + 0.42), px))
    for side in (-0.2, 0.2):
        image = paint(image, (0.95, 0.95, 0.9), cover(ellipse(x, y, 0.09, 0.09, side, -0.72), px))
    return cover(np.minimum(body, head), px), image


def donut(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Ring of dough with wavy icing and sprinkles."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    icing = tint(rng, ((0.95, 0.55, 0.70), (0.38, 0.20, 0.12), (0.97, 0.93, 0.85))[rng.integers(3)])
    ring = np.abs(radius - 0.64) - 0.31
    wave = 0.24 + 0.035 * np.sin(angle * rng.integers(6, 10) + rng.uniform(0, 6))
    image = paint(plain(x, tint(rng, (0.82, 0.60, 0.33))), icing, cover(np.abs(radius - 0.64) - wave, px))
    for colour in ((0.2, 0.5, 0.9), (0.95, 0.85, 0.2), (0.3, 0.75, 0.35)):
        image = paint(image, colour, dots(rng, x, y, 26, 0.045, 0.86, px))
    return cover(ring, px), image


def kite(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Diamond in four colours with a thin tail of bows."""
    diamond = (np.abs(x) / 0.72 + np.where(y < -0.25, -(y + 0.25) / 0.72, (y + 0.25) / 0.82) - 1) * 0.5
    tail = np.maximum(np.abs(x - 0.10 * np.sin(14 * y)) - 0.045, np.abs(y - 0.76) - 0.24)
    bows = np.min([np.abs(x - 0.10 * np.sin(14 * c)) + np.abs(y - c) - 0.13 for c in (0.70, 0.88)], axis=0)
    one, two = tint(rng, (0.10, 0.65, 0.55), 0.1), tint(rng, (0.85, 0.20, 0.60), 0.1)
    image = np.where(((x > 0) ^ (y > -0.25))[..., None], one, two).astype(np.float32)
    image = paint(image, (0.98, 0.95, 0.3), cover(np.minimum(np.abs(x), np.abs(y + 0.25)) - 0.05, px))
    image = paint(image, (0.9, 0.25, 0.2), cover(np.minimum(tail, bows), px) * cover(-diamond, px))
    return cover(np.minimum(diamond, np.minimum(tail, bows)), px), image


def mushroom(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Toadstool: red cap with white dots on a pale stem."""
    cap = np.maximum(ellipse(x, y, 0.95, 0.90, 0, 0.05), y - 0.12)
    stem = box(x, y, 0.26, 0.46, 0, 0.5)
    image = paint(plain(x, tint(rng, (0.92, 0.86, 0.72))), tint(rng, (0.80, 0.12, 0.10)), cover(cap, px))
    spots = dots(rng, x, y + 0.1, 13, 0.12, 0.85, px) * cover(cap, px)
    lines = cover(np.sin(x * 40).astype(np.float32) * 0.02, px) * cover(-cap, px)
    image = paint(paint(image, (0.97, 0.96, 0.93), spots), (0.75, 0.68, 0.55), 0.6 * lines)
    return cover(np.minimum(cap, stem), px), image


def watermelon_slice(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Half a disc: green rind, white rim, red flesh with seeds."""
    radius = np.hypot(x, y + 0.4)
    half = np.maximum(radius - 0.98, -(y + 0.4))
    image = plain(x, tint(rng, (0.13, 0.42, 0.16)))
    image = paint(image, (0.90, 0.95, 0.80), cover(radius - 0.86, px))
    image = paint(image, tint(rng, (0.92, 0.26, 0.30)), cover(radius - 0.78, px))
    return cover(half, px), paint(image, (0.10, 0.06, 0.05), dots(rng, x, y + 0.4, 26, 0.05, 0.66, px))


def umbrella(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Scalloped canopy in two colours over a hooked stick."""
    canopy = np.maximum(ellipse(x, y, 0.97, 0.90, 0, 0.0), y + 0.09 * np.abs(np.sin(x * 9.7)) - 0.06)
    hook = np.maximum(np.abs(np.hypot(x - 0.15, y - 0.72) - 0.15) - 0.06, 0.72 - y)
    stick = np.minimum(box(x, y, 0.06, 0.40, 0, 0.36), hook)
    one, two = tint(rng, (0.15, 0.55, 0.85), 0.1), tint(rng, (0.98, 0.85, 0.25), 0.05)
    segment = np.floor(np.arctan2(x, 0.35 - y) / 0.36 + 0.5).astype(np.int64) % 2
    image = np.where((segment == 0)[..., None], one, two).astype(np.float32)
    image = paint(image, tint(rng, (0.30, 0.18, 0.10), 0.04), cover(-canopy, px))
    return cover(np.minimum(canopy, stick), px), image


def fish(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Scaled body with white bands, a forked tail and an eye."""
    body = ellipse(x, y, 0.68, 0.48, -0.25, 0)
    tail = np.maximum(np.abs(y) - (x - 0.25) * 0.8, np.maximum(x - 0.95 + 0.3 * (0.5 - np.abs(y)), 0.3 - x))
    colour = tint(rng, ((0.98, 0.50, 0.10), (0.20, 0.40, 0.85), (0.95, 0.78, 0.15))[rng.integers(3)])
    scales = 0.5 + 0.5 * np.sin(18 * x + 3 * np.cos(20 * y))
    image = plain(x, colour) * (0.75 + 0.3 * scales)[..., None]
    for centre in (-0.45, 0.05):
        image = paint(image, (0.96, 0.96, 0.94), cover(np.abs(x - centre + 0.2 * y * y) - 0.075, px))
    image = paint(image, (0.98, 0.98, 0.98), cover(ellipse(x, y, 0.11, 0.11, -0.70, -0.1), px))
    image = paint(image, (0.03, 0.03, 0.03), cover(ellipse(x, y, 0.06, 0.06, -0.72, -0.1), px))
    return cover(np.minimum(body, tail), px), image.astype(np.float32)


def starfish(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Five rounded arms with rows of pale bumps."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 6.28)
    arms = np.cos(2.5 * angle) ** 2
    edge = 0.36 + 0.59 * arms**1.6
    colour = tint(rng, ((0.90, 0.42, 0.25), (0.55, 0.28, 0.62))[rng.integers(2)])
    image = plain(x, colour) * (0.7 + 0.4 * arms)[..., None]
    bumps = dots(rng, x, y, 55, 0.045, 0.95, px)
    return cover((radius - edge) * 0.6, px), paint(image, (0.98, 0.88, 0.70), 0.9 * bumps).astype(np.float32)


def gift_box(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """Wrapped box with a patterned paper, a ribbon cross and a bow."""
    sides = box(x, y, 0.80, 0.68, 0, 0.28)
    bow = np.minimum(ellipse(x, y, 0.30, 0.19, -0.28, -0.58), ellipse(x, y, 0.30, 0.19, 0.28, -0.58))
    paper = tint(rng, ((0.25, 0.60, 0.30), (0.55, 0.30, 0.70), (0.20, 0.55, 0.80))[rng.integers(3)])
    lattice = cover(np.maximum(np.abs(np.sin(11 * x)), np.abs(np.sin(11 * y))) - 0.45, 0.3)
    image = paint(plain(x, paper), (0.95, 0.95, 0.85), 0.8 * lattice)
    ribbon = np.minimum(np.minimum(np.abs(x), np.abs(y - 0.28)) - 0.11, bow)
    return cover(np.minimum(sides, bow), px), paint(image, tint(rng, (0.90, 0.75, 0.15)), cover(ribbon, px))


def soccer_ball(rng: np.random.Generator, x: Array, y: Array, px: float) -> Painted:
    """White ball with black patches and seams between them."""
    turn = rng.uniform(0, 1.2)
    angles = np.arange(5) * 2 * np.pi / 5 + turn
    centres = [(0.0, 0.0), *zip(0.78 * np.cos(angles), 0.78 * np.sin(angles), strict=True)]
    patches = np.min([np.hypot(x - cx, y - cy) - 0.25 for cx, cy in centres], axis=0)
    seams = np.min(
        [np.abs(x * np.sin(a) - y * np.cos(a)) + 9 * (x * np.cos(a) + y * np.sin(a) < 0) for a in angles],
        axis=0,
    )
    image = plain(x, tint(rng, (0.93, 0.93, 0.93), 0.04)) * (1.08 - 0.3 * np.hypot(x + 0.3, y + 0.3))[..., None]
    image = paint(image.astype(np.float32), (0.25, 0.25, 0.27), cover(seams - 0.03, px))
    return cover(ellipse(x, y, 0.95, 0.95), px), paint(image, (0.06, 0.06, 0.08), cover(patches, px))


THINGS: dict[str, Painter] = {
    "striped ball": striped_ball,
    "traffic cone": traffic_cone,
    "sunflower": sunflower,
    "ladybug": ladybug,
    "donut": donut,
    "kite": kite,
    "mushroom": mushroom,
    "watermelon slice": watermelon_slice,
    "umbrella": umbrella,
    "fish": fish,
    "starfish": starfish,
    "gift box": gift_box,
    "soccer ball": soccer_ball,
}
