"""Convert label maps, including holes, to polygons.

`polygons` goes through pixel centers: filled by OpenCV the lines restore the map. `outlines` goes along the
edges of pixels: filled by pycocotools they restore it.

A region (8-connected) is one closed line. A bridge leads to a hole: the line leaves the outer contour, goes
around the hole and returns the same way, so an even-odd fill leaves the hole empty. Every bridge runs horizontally
over pixels of the region itself and therefore adds no pixels.
"""

from collections.abc import Callable, Iterator

import numpy as np

_NEXT, _CHILD, _PARENT = 0, 2, 3  # of OpenCV's contour hierarchy
Point = tuple[int, int]


def polygons(ids: np.ndarray, simplify: float = 0.0) -> Iterator[tuple[int, np.ndarray]]:
    """(number, points int [n, 2] as x, y) of every region of every number but 0 of [H, W]; n is at least 3.

    `simplify`: the largest distance, in pixels, of a left-out point from its line.
    """
    from scipy.ndimage import find_objects

    for number, place in enumerate(find_objects(ids.astype(np.int32)), 1):
        if place is not None:
            offset = (place[1].start, place[0].start)
            for points in regions(ids[place] == number, simplify):
                yield number, points + offset


def outlines(ids: np.ndarray, simplify: float = 0.0) -> Iterator[tuple[int, np.ndarray]]:
    """Like `polygons`, along the edges of pixels: x from 0 to W, y from 0 to H."""
    from scipy.ndimage import find_objects

    for number, place in enumerate(find_objects(ids.astype(np.int32)), 1):
        if place is not None:
            offset = (place[1].start, place[0].start)
            twice = (ids[place] == number).repeat(2, axis=0).repeat(2, axis=1)
            for points in regions(twice, 2 * simplify):  # the centers of quarters, moved out to the edges
                corners = _corners((points + 1) // 2)
                if len(corners) >= 3:
                    yield number, corners + offset


def overlap(labels: np.ndarray, drawn: Callable[[int], np.ndarray]) -> list[int]:
    """Pixels [in both, in either] of labels [H, W] and `drawn(label)`, bool [H, W], over all labels but 0."""
    both = either = 0
    for label in np.unique(labels[labels > 0]).tolist():
        wanted, filled = labels == label, drawn(label)
        both, either = both + int((wanted & filled).sum()), either + int((wanted | filled).sum())
    return [both, either]


def regions(mask: np.ndarray, simplify: float = 0.0) -> Iterator[np.ndarray]:
    """One polygon per region of a bool [H, W] mask."""
    import cv2

    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    starts = _run_starts(mask) if (tree is not None and (tree[0, :, _PARENT] >= 0).any()) else None
    for i, contour in enumerate(contours):
        if tree[0, i, _PARENT] >= 0:
            continue
        holes, child = [], tree[0, i, _CHILD]
        while child >= 0:
            holes.append(contours[child][:, 0])
            child = tree[0, child, _NEXT]
        if holes and starts is not None:
            yield _closed(_corners(_keyhole(contour[:, 0], holes, starts, simplify)))
        else:
            yield _closed(_corners(_simplified(contour[:, 0], [], simplify)[0]))


def _run_starts(mask: np.ndarray) -> np.ndarray:
    """For every pixel of the mask, the x at which the run of its row begins: int [H, W]."""
    columns = np.arange(mask.shape[1])
    return np.maximum.accumulate(np.where(mask, 0, columns + 1), axis=1)


def _keyhole(outer: np.ndarray, holes: list[np.ndarray], starts: np.ndarray, simplify: float) -> np.ndarray:
    """Join the region's contour and those of its holes to one line; all int [n, 2].

    The pixels left of the leftmost point of a hole's contour belong to the region, up to one that lies on the
    outer contour or on the contour of a hole further left, which the line already includes.
    """
    holes = sorted(holes, key=lambda points: int(points[:, 0].min()))
    lines = [outer, *(np.roll(hole, -int(hole[:, 0].argmin()), axis=0) for hole in holes)]
    place: dict[Point, tuple[int, int]] = {}  # of a point: its line, and its number there
    bridges: list[dict[int, list[int]]] = [{} for _ in lines]  # per line: at which point which holes hang
    for number, line in enumerate(lines):
        if number:
            x, y = line[0].tolist()
            owner, at = place[int(starts[y, x - 1]) if x else 0, y]
            bridges[owner].setdefault(at, []).append(number)
        for at, (x, y) in enumerate(line.tolist()):
            place.setdefault((x, y), (number, at))
    chosen = [_simplified(line, list(hung), simplify) for line, hung in zip(lines, bridges, strict=True)]
    return _joined(
        [points for points, _ in chosen], [_renumbered(b, n) for b, (_, n) in zip(bridges, chosen, strict=True)]
    )


def _renumbered(bridges: dict[int, list[int]], places: dict[int, int]) -> dict[int, list[int]]:
    return {places[at]: numbers for at, numbers in bridges.items()}


def _joined(lines: list[np.ndarray], bridges: list[dict[int, list[int]]]) -> np.ndarray:
    """Walk the outer line; at every bridge walk the hole's line and return. No recursion: holes are many."""
    walked: list[list[int]] = []
    stack = [(0, 0, lines[0].tolist())]
    while stack:
        number, at, points = stack.pop()
        while at < len(points):
            walked.append(points[at])
            waiting = bridges[number].get(at, [])
            at += 1
            if waiting:
                bridges[number][at - 1] = waiting[1:]
                again = at - 1 if waiting[1:] else at
                stack.append((number, again, points))
                hole = lines[waiting[0]].tolist()
                stack.append((waiting[0], 0, [*hole, hole[0], points[at - 1]]))
                break
    return np.array(walked)


def _simplified(points: np.ndarray, kept: list[int], tolerance: float) -> tuple[np.ndarray, dict[int, int]]:
    """A closed line without points that are at most `tolerance` off, and the new places of the `kept` ones.

    The first point of a line is always kept.
    """
    if not tolerance:
        return points, {at: at for at in kept}
    import cv2

    far = int(((points - points[0]) ** 2).sum(axis=1).argmax())
    stops = sorted({0, far, *kept})
    found: list[np.ndarray] = []
    places: dict[int, int] = {}
    for first, last in zip(stops, [*stops[1:], len(points)], strict=True):
        places[first] = len(found)
        piece = np.concatenate([points[first : last + 1], points[:1] if last == len(points) else points[:0]])
        found += list(cv2.approxPolyDP(piece[:, None], tolerance, False)[:-1, 0])
        if len(found) == places[first]:
            found.append(points[first])
    return np.array(found), places


def _corners(points: np.ndarray) -> np.ndarray:
    """Remove repeated points and the inner points of straight lines; corners are kept."""
    moved = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    points = moved if len(moved) else points[:1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    straight = (np.sign(before) == np.sign(after)).all(axis=1) & (
        before[:, 0] * after[:, 1] == before[:, 1] * after[:, 0]
    )
    return points[~straight] if not straight.all() else points


def _closed(points: np.ndarray) -> np.ndarray:
    """Pad a single pixel or a line to three points by repeating its last point."""
    return points if len(points) >= 3 else np.concatenate([points, points[-1:].repeat(3 - len(points), axis=0)])
