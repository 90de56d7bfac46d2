"""Convert label maps, including holes, to polygons through pixel centers; filled by OpenCV they restore the map.

A region (8-connected) is one closed line. A bridge leads to a hole: the line leaves the outer contour, goes
around the hole and returns the same way, so an even-odd fill leaves the hole empty. Every bridge runs horizontally
over pixels of the region itself and therefore adds no pixels.
"""

from collections.abc import Iterator

import numpy as np

_NEXT, _CHILD, _PARENT = 0, 2, 3  # of OpenCV's contour hierarchy


def polygons(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(label, points int [n, 2] as x, y) of every region of every label but 0 of [H, W]; n is at least 3."""
    from scipy.ndimage import find_objects

    for label, place in enumerate(find_objects(labels.astype(np.int32)), 1):
        if place is not None:
            offset = (place[1].start, place[0].start)
            for points in regions(labels[place] == label):
                yield label, points + offset


def regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """One polygon per region of a bool [H, W] mask."""
    import cv2

    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for i, contour in enumerate(contours):
        if tree[0, i, _PARENT] >= 0:
            continue
        holes, child = [], tree[0, i, _CHILD]
        while child >= 0:
            holes.append(contours[child][:, 0])
            child = tree[0, child, _NEXT]
        yield _closed(_corners(_keyhole(contour[:, 0], holes, mask) if holes else contour[:, 0]))


def _keyhole(outer: np.ndarray, holes: list[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Join the region's contour and those of its holes to one line; all int [n, 2].

    The pixels left of the leftmost point of a hole's contour belong to the region, up to one that lies on the
    outer contour or on the contour of a hole further left, which the line already includes.
    """
    chain = [tuple(point) for point in outer.tolist()]
    for hole in sorted(holes, key=lambda points: points[:, 0].min()):
        around = np.roll(hole, -int(hole[:, 0].argmin()), axis=0).tolist()
        x, y = around[0]
        gaps = np.flatnonzero(~mask[y, :x])
        target = (int(gaps[-1]) + 1 if len(gaps) else 0, y)
        at = chain.index(target) + 1
        chain[at:at] = [*map(tuple, around), (x, y), target]
    return np.array(chain)


def _corners(points: np.ndarray) -> np.ndarray:
    """Remove the inner points of straight lines; corners are kept."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    straight = (np.sign(before) == np.sign(after)).all(axis=1) & (
        before[:, 0] * after[:, 1] == before[:, 1] * after[:, 0]
    )
    return points[~straight] if not straight.all() else points


def _closed(points: np.ndarray) -> np.ndarray:
    """Pad a single pixel or a line to three points by repeating its last point."""
    return points if len(points) >= 3 else np.concatenate([points, points[-1:].repeat(3 - len(points), axis=0)])
