"""Two runs over the same images side by side: a self-contained page of their settings, classes and images."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.errors import RunError
from cliper.pipeline.report.gallery import FAILED, MOST_BYTES, legend
from cliper.pipeline.report.index import RowIndex, read_index
from cliper.pipeline.report.page import render_page, share
from cliper.pipeline.report.run_images import Place, Shown, read_pictures
from cliper.pipeline.report.run_page import CLASSES_LISTED, LEGEND, label_names, run_notes
from cliper.pipeline.report.run_stats import Floats, Integers, choose_shards
from cliper.pipeline.run.folder import Run, differences
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import labeled_shards, open_shard

MOST_DIFFERENT = 60  # images shown
AT_RANDOM = 24
ONE_FAILED = 12


@dataclass(frozen=True)
class Side:
    """One of the two runs; `labels` maps its labels to places in the classes of both."""

    run: Run
    index: RowIndex
    labels: Integers  # [K + 1]
    rows: Integers  # [n], the rows of the images that both runs have

    def place(self, pair: int) -> Place:
        """Shard and row of image number `pair`."""
        row = self.rows[pair]
        return int(self.index.shard[row]), int(self.index.place[row])


@dataclass(frozen=True)
class Pair:
    """One image of both runs; `difference`: share of its pixels with another class, None without two masks."""

    first: Shown
    second: Shown
    difference: float | None


@dataclass(frozen=True)
class Against:
    """Two runs, joined by image id."""

    first: Side
    second: Side
    names: list[str]  # classes of both, "background" first
    moved: Floats  # [n]: share of the pixels that must have changed class, by the areas; nan without two masks


def write_against(first: Run, second: Run, output: str, sample: int) -> Against:
    """Write the page on the images that both runs have to the URI `output`.

    Reads the metadata of at most about `sample` rows, and the masks and images of the few that are shown. Raises
    RunError if a run has no finished shard, or the two have no image in common.
    """
    joined = join_runs(first, second, sample)
    page = _render(joined, [(title, read_pairs(joined, rows)) for title, rows in chosen(joined)])
    first.storage.write(output, page.encode())
    return joined


def join_runs(first: Run, second: Run, sample: int) -> Against:
    """Join two runs by image id; of a larger first run, shards at random."""
    a, b = first.manifest(), second.manifest()
    done = [labeled_shards(run) for run in (first, second)]
    for run, shards in zip((first, second), done, strict=True):
        if not shards:
            raise RunError(
                f"{run.uri} has no finished shard yet; `cliper label` with the same options continues it"
            )
    read = choose_shards(a, done[0], sample)
    same = list(a.counts) == list(b.counts)  # one corpus, cut alike: the same shards hold the same images
    other = sorted(set(read) & set(done[1])) if same else done[1]
    indexes = read_index(first, read), read_index(second, other or done[1])
    match = pc.index_in(indexes[0].ids, indexes[1].ids)
    both = np.flatnonzero(pc.is_valid(match).to_numpy(zero_copy_only=False))
    if not len(both):
        raise RunError(f"{first.uri} and {second.uri} have no image in common; label the same --input with both")
    names = list(dict.fromkeys([*label_names(first), *label_names(second)]))
    rows = both, match.take(pa.array(both)).to_numpy().astype(np.int64)
    sides = [
        Side(run, index, np.array([names.index(name) for name in label_names(run)]), chosen_rows)
        for run, index, chosen_rows in zip((first, second), indexes, rows, strict=True)
    ]
    return Against(sides[0], sides[1], names, _moved(sides[0], sides[1], len(names)))


def _pairs_of(side: Side) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """The pair of every entry of the index, [m], and whether it has one."""
    pair_of = np.full(len(side.index.ids), -1, dtype=np.int64)
    pair_of[side.rows] = np.arange(len(side.rows))
    pair = pair_of[side.index.row]
    return pair, pair >= 0


def _moved(first: Side, second: Side, classes: int) -> Floats:
    """Half the sum over the classes of the change in area, [n]: no fewer pixels have another class."""
    keys, shares = [], []
    for side, sign in ((first, 1.0), (second, -1.0)):
        pair, known = _pairs_of(side)
        keys.append(pair[known] * classes + side.labels[side.index.label[known]])
        shares.append(sign * side.index.share[known])
    cells, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    change = np.abs(np.bincount(inverse, weights=np.concatenate(shares), minlength=len(cells)))
    moved = 0.5 * np.bincount(cells // classes, weights=change, minlength=len(first.rows))
    return np.where(_both_ok(first, second), moved, np.nan)


def _both_ok(first: Side, second: Side) -> npt.NDArray[np.bool_]:
    return np.asarray(first.index.ok[first.rows] & second.index.ok[second.rows])


def chosen(joined: Against) -> list[tuple[str, list[int]]]:
    """The images to show, by group: those whose areas differ most, some at random, and those one run lacks."""
    ok = np.flatnonzero(~np.isnan(joined.moved))
    most = ok[np.argsort(-joined.moved[ok], kind="stable")][:MOST_DIFFERENT]
    rest = np.setdiff1d(ok, most)
    random = np.random.default_rng(0).permutation(rest)[:AT_RANDOM]
    a, b = (side.index.ok[side.rows] for side in (joined.first, joined.second))
    one = np.flatnonzero(a != b)[:ONE_FAILED]
    groups = [("largest differences", most), ("at random", random), (f"{FAILED} in one run", one)]
    return [(title, rows.tolist()) for title, rows in groups if len(rows)]


def read_pairs(joined: Against, pairs: Sequence[int]) -> list[Pair]:
    """Read masks and images of some images; the most different first."""
    places = [[side.place(pair) for pair in pairs] for side in (joined.first, joined.second)]
    a, b = (
        read_pictures(side.run, side.run.manifest(), found)
        for side, found in zip((joined.first, joined.second), places, strict=True)
    )
    x, y = (_masks(side, found) for side, found in zip((joined.first, joined.second), places, strict=True))
    found = [Pair(a[p], b[q], _difference(x.get(p), y.get(q))) for p, q in zip(places[0], places[1], strict=True)]
    return sorted(found, key=lambda pair: -(pair.difference or 0.0))


def _masks(side: Side, places: Iterable[Place]) -> dict[Place, npt.NDArray[Any]]:
    """The masks that there are, in the classes of both runs."""
    by_shard: dict[int, list[int]] = defaultdict(list)
    for shard, place in places:
        by_shard[shard].append(place)
    masks: dict[Place, npt.NDArray[Any]] = {}
    for shard, wanted in by_shard.items():
        with open_shard(side.run, shard) as file:
            rows = file.read(["mask", "mask_codec", "status"]).take(wanted).to_pylist()
        found = zip(wanted, rows, strict=True)
        masks |= {(shard, place): side.labels[unpack_mask(row)] for place, row in found if row["status"] == "ok"}
    return masks


def _difference(first: npt.NDArray[Any] | None, second: npt.NDArray[Any] | None) -> float | None:
    if first is None or second is None or first.shape != second.shape:
        return None
    return float(np.mean(first != second))


def _render(joined: Against, groups: Sequence[tuple[str, Sequence[Pair]]]) -> str:
    first, second = joined.first, joined.second
    shown, pictures = _once(groups)
    rows = _class_rows(joined)
    return render_page(
        "against.html",
        {
            "title": f"{_name(first.run)} against {_name(second.run)}",
            "first": first.run.uri,
            "second": second.run.uri,
            "notes": _notes(joined),
            "headline": _headline(joined),
            "groups": shown,
            "pictures": pictures,
            "statuses": sorted({side.status for g in shown for p in g["shown"] for side in (p.first, p.second)}),
            "legend": legend(list(enumerate(joined.names))[1 : LEGEND + 1]) if _same_classes(joined) else [],
            "classes": rows[:CLASSES_LISTED],
            "more_classes": max(0, len(rows) - CLASSES_LISTED),
            "settings": differences(first.run.identity, second.run.identity),
        },
    )


def _name(run: Run) -> str:
    return run.uri.rstrip("/").rpartition("/")[2]


def _same_classes(joined: Against) -> bool:
    return label_names(joined.first.run) == label_names(joined.second.run)


def _notes(joined: Against) -> list[str]:
    notes = []
    for letter, side in (("A", joined.first), ("B", joined.second)):
        read, done = len(np.unique(side.index.shard)), len(labeled_shards(side.run))
        found = run_notes(side.run, side.run.manifest(), done, read, len(side.index.ids))
        notes += [f"{letter}: {note}" for note in found]
    if not _same_classes(joined):
        notes.append("The runs have different class lists: a class may have another color in each.")
    return notes


def _headline(joined: Against) -> list[tuple[str, str]]:
    first, second = joined.first, joined.second
    sides = [(letter, side, side.index.ok[side.rows]) for letter, side in (("A", first), ("B", second))]
    failed = " / ".join(f"{np.count_nonzero(~ok):,}" for _, _, ok in sides)
    means = " / ".join(f"{_mean(side.index.confidence[side.rows]):.2f}" for _, side, _ in sides)
    return [
        (f"{len(joined.moved):,}", "images in both"),
        (share(_mean(joined.moved)), "of an image changes class at least"),
        (means, "mean confidence, A / B"),
        (failed, "failed, A / B"),
    ]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _class_rows(joined: Against) -> list[dict[str, Any]]:
    """Images, area and confidence of every class in both runs; the largest change of area first."""
    a, b = (_class_sums(side, len(joined.names)) for side in (joined.first, joined.second))
    order = np.argsort(-np.abs(a[1] - b[1]), kind="stable").tolist()
    return [
        {
            "name": joined.names[k],
            "images": [int(a[0][k]), int(b[0][k])],
            "area": [float(a[1][k]), float(b[1][k])],
            "confidence": [_ratio(a[2][k], a[0][k]), _ratio(b[2][k], b[0][k])],
        }
        for k in order
        if a[0][k] or b[0][k]
    ]


def _class_sums(side: Side, classes: int) -> tuple[Integers, Floats, Floats]:
    """Images, mean share of an image, and the sum of confidence of every class: each [classes]."""
    known = _pairs_of(side)[1]
    label = side.labels[side.index.label[known]]
    images = np.bincount(label, minlength=classes).astype(np.int64)
    area = np.bincount(label, weights=side.index.share[known], minlength=classes)
    sure = np.bincount(label, weights=side.index.sure[known], minlength=classes)
    labeled = int(np.count_nonzero(side.index.ok[side.rows]))
    return images, area / max(labeled, 1), sure.astype(np.float64)


def _ratio(total: float, count: float) -> str:
    return f"{total / count:.2f}" if count else "-"


def _once(groups: Sequence[tuple[str, Sequence[Pair]]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Replace data URIs by keys, as many images as fit into a page: the groups, and the data URI of each key."""
    keys: dict[str, str] = {}
    room = MOST_BYTES
    kept: list[dict[str, Any]] = []
    for title, pairs in groups:
        members: list[Pair] = []
        for pair in pairs:
            uris = [pair.first.photo or pair.second.photo, pair.first.mask, pair.second.mask]
            room -= sum(len(uri or "") for uri in uris)
            if room < 0:
                break
            photo, *masks = (None if uri is None else keys.setdefault(uri, f"p{len(keys)}") for uri in uris)
            sides = [
                replace(s, photo=photo, mask=m) for s, m in zip((pair.first, pair.second), masks, strict=True)
            ]
            members.append(Pair(sides[0], sides[1], pair.difference))
        kept.append({"name": title, "shown": members})
    return kept, {name: uri for uri, name in keys.items()}
