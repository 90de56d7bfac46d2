"""The images of a report: how many fit into one page, and the form in which the templates take them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cliper.pipeline.report.images import colour
from cliper.pipeline.report.run_images import Place, Shown
from cliper.pipeline.report.run_stats import RunStats, Sampled

MOST_IMAGES = 240  # in one page, each counted once
MOST_BYTES = 3_600_000  # of their data URIs: the page stays below 5 MB
FAILED = "without a mask"


@dataclass(frozen=True)
class Group:
    """The images of one class, each with its caption; `images` in the run have the class."""

    name: str
    images: int
    shown: list[tuple[Shown, str]]


def choose(stats: RunStats, labels: Iterable[int]) -> dict[int, list[Sampled]]:
    """The images to show for every label, in rounds over the labels until there are MOST_IMAGES."""
    queues = {label: stats.picks(label) for label in labels}
    chosen: dict[int, list[Sampled]] = {label: [] for label in queues}
    seen: set[Place] = set()
    for rank in range(max(map(len, queues.values()), default=0)):
        for label, queue in queues.items():
            pick = queue[rank] if rank < len(queue) else None
            if pick and (len(seen) < MOST_IMAGES or (pick.shard, pick.place) in seen):
                seen.add((pick.shard, pick.place))
                chosen[label].append(pick)
    return chosen


def failed_places(stats: RunStats) -> list[Place]:
    """The rows of some failed images, a few for every cause."""
    return [place for found in stats.failures.values() for place in found.places]


def that_fit(
    pictures: Mapping[Place, Shown], order: Iterable[Place], most: int = MOST_BYTES
) -> dict[Place, Shown]:
    """The pictures in `order`, each once, whose data URIs together have at most `most` bytes."""
    kept: dict[Place, Shown] = {}
    for place in dict.fromkeys(order):
        shown = pictures[place]
        most -= len(shown.photo or "") + len(shown.mask or "")
        if most < 0:
            break
        kept[place] = shown
    return kept


def rounds(picks: Mapping[int, Sequence[Sampled]]) -> list[Place]:
    """The places of all picks: the first of every label, the second of every label, and so on."""
    longest = max(map(len, picks.values()), default=0)
    return [(q[i].shard, q[i].place) for i in range(longest) for q in picks.values() if i < len(q)]


def class_groups(
    stats: RunStats, names: Sequence[str], picks: Mapping[int, Sequence[Sampled]], pictures: Mapping[Place, Shown]
) -> list[Group]:
    """The groups of the labels in `picks`; picks without a picture are left out."""
    groups = []
    for label, chosen in picks.items():
        found = [
            (pictures[pick.shard, pick.place], pick) for pick in chosen if (pick.shard, pick.place) in pictures
        ]
        shown = [(image, _caption(image, pick, names[label])) for image, pick in found]
        groups.append(Group(names[label], int(stats.images[label]), shown))
    return groups


def failed_group(stats: RunStats, pictures: Mapping[Place, Shown]) -> list[Group]:
    """The group of the failed images; none if all images have a mask."""
    shown = [(pictures[place], pictures[place].image_id) for place in failed_places(stats) if place in pictures]
    return [Group(FAILED, stats.rows - stats.statuses["ok"], shown)] if shown else []


def _caption(image: Shown, pick: Sampled, name: str) -> str:
    sure = f"{name} {image.confidence_of(pick.label):.2f}"
    return f"{image.image_id}: {pick.kind}, {sure}, margin {image.margin:.2f}"


def once(groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    """Replace every data URI by a key: the groups, and the data URI of each key, which the page holds once."""
    keys: dict[str, str] = {}

    def key(uri: str | None) -> str | None:
        return None if uri is None else keys.setdefault(uri, f"p{len(keys)}")

    def keyed(image: Shown) -> Shown:
        return replace(image, photo=key(image.photo), mask=key(image.mask))

    short = [replace(group, shown=[(keyed(image), text) for image, text in group.shown]) for group in groups]
    return short, {name: uri for uri, name in keys.items()}


def legend(names: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
    """The color of every (label, name)."""
    return [{"name": name, "colour": colour(label)} for label, name in names]
