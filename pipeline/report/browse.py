"""All images of a run, page by page: search, sort and show them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.errors import ImageError, RunError
from cliper.pipeline.report.gallery import legend
from cliper.pipeline.report.index import RowIndex, read_index
from cliper.pipeline.report.page import render_page
from cliper.pipeline.report.run_images import read_pictures, read_source
from cliper.pipeline.report.run_page import LEGEND, label_names, model_line, run_notes
from cliper.pipeline.report.run_stats import Floats, Integers, choose_shards
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.reader import labeled_shards

PER_PAGE = 24
SIDE = 800  # pixels, of a picture's longer side
SORTS = {"": "order of the run", "name": "name", "confidence": "confidence", "margin": "margin"}


@dataclass(frozen=True)
class Query:
    """A search, as in a page's address. Confidence is the image's, or that of the class if one is given."""

    find: str = ""  # part of the image id, ignoring case
    label: str = ""  # name of a class
    status: str = ""
    sort: str = ""  # a key of SORTS
    down: bool = False
    most: float = 1.0  # confidence, 0 to 1
    page: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> "Query":
        """From the parameters of an address; values that make no sense are those of an empty search."""
        sort = given.get("sort", "")
        return cls(
            find=given.get("find", ""),
            label=given.get("label", ""),
            status=given.get("status", ""),
            sort=sort.removesuffix("-") if sort.removesuffix("-") in SORTS else "",
            down=sort.endswith("-"),
            most=_number(given.get("most", ""), 1.0),
            page=max(1, int(_number(given.get("page", ""), 1.0))),
        )

    def address(self, page: int) -> str:
        """The address of another page of the same search."""
        values = {name: value for name, value in asdict(self).items() if value and name not in ("down", "page")}
        values |= {"sort": self.sort + "-" * self.down, "page": page}
        return f"/?{urlencode(values)}"


def _number(text: str, default: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return default
    return number if np.isfinite(number) else default


class Browser:
    """A run whose metadata are in memory: about 150 bytes for every image."""

    def __init__(self, run: Run, most: int) -> None:
        """Read the metadata of about `most` rows: of a larger run, shards at random.

        Raises RunError if no shard is finished, or a file is damaged.
        """
        self.run, self.done = run, labeled_shards(run)
        if not self.done:
            raise RunError(
                f"{run.uri} has no finished shard yet; `cliper label` with the same options continues it"
            )
        self.shards = choose_shards(self.manifest, self.done, most)
        self.index: RowIndex = read_index(run, self.shards)
        self.names = label_names(run)

    @cached_property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return self.run.manifest()

    @property
    def images(self) -> int:
        """Rows that can be shown."""
        return len(self.index.ids)

    def find(self, query: Query) -> Integers:
        """The rows that a search finds, in its order."""
        keep, value = self._confidence(query.label)
        if query.find:
            keep &= _bools(pc.match_substring(self.index.ids, query.find, ignore_case=True))
        if query.status:
            keep &= _bools(pc.equal(self.index.status, query.status))
        if query.most < 1:
            keep &= value <= query.most
        rows = np.flatnonzero(keep)
        if query.sort == "name":
            order = pc.array_sort_indices(self.index.ids.take(pa.array(rows))).to_numpy()
        elif query.sort:
            key = (value if query.sort == "confidence" else self.index.margin)[rows]
            order = np.argsort(np.where(np.isnan(key), np.inf, -key if query.down else key), kind="stable")
            return rows[order]
        else:
            order = np.arange(len(rows))
        return rows[order[::-1] if query.down else order]

    def _confidence(self, label: str) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Whether each row has the class, and its confidence there; without a class, that of the image."""
        if not label:
            return np.ones(self.images, dtype=bool), self.index.confidence
        number = self.names.index(label) if label in self.names else -1
        mine = self.index.label == number
        value = np.full(self.images, np.nan)
        value[self.index.row[mine]] = self.index.sure[mine]
        return ~np.isnan(value), value

    def page(self, query: Query) -> str:
        """The HTML page of a search: its images with everything inline."""
        rows = self.find(query)
        pages = max(1, -(-len(rows) // PER_PAGE))
        query = replace(query, page=min(query.page, pages))
        shown = rows[(query.page - 1) * PER_PAGE : query.page * PER_PAGE].tolist()
        places = {row: (int(self.index.shard[row]), int(self.index.place[row])) for row in shown}
        found = read_pictures(self.run, self.manifest, places.values(), SIDE)
        sure = self._confidence(query.label)[1]
        images = [
            (replace(found[places[row]], link=f"/file/{row}"), self._caption(row, query.label, float(sure[row])))
            for row in shown
        ]
        return render_page(
            "browse.html",
            {
                "title": f"cliper run {self.run.uri.rstrip('/').rpartition('/')[2]}",
                "model": model_line(self.run, self.shards[0]),
                "notes": run_notes(self.run, self.manifest, len(self.done), len(self.shards), self.images),
                "query": query,
                "sorts": SORTS,
                "statuses": sorted(pc.unique(self.index.status).to_pylist()),
                "names": self._found_names,
                "legend": legend(self._found_names[:LEGEND]),
                "found": len(rows),
                "all": self.images,
                "pages": pages,
                "images": images,
            },
        )

    @cached_property
    def _found_names(self) -> list[tuple[int, str]]:
        """(label, name) of the classes that occur, the most frequent first."""
        images = np.bincount(self.index.label, minlength=len(self.names))
        order = (np.argsort(-images[1:], kind="stable") + 1).tolist()
        return [(label, self.names[label]) for label in order if images[label]]

    def _caption(self, row: int, label: str, sure: float) -> str:
        name = str(self.index.ids[row].as_py())
        if np.isnan(sure):
            return name
        return f"{name}: {label or 'confidence'} {sure:.2f}, margin {self.index.margin[row]:.2f}"

    def file(self, row: int) -> bytes:
        """The bytes of a row's image file. Raises ImageError."""
        if not 0 <= row < self.images:
            raise ImageError("missing", f"there is no row {row}; the run has {self.images}")
        return read_source(self.run, self.manifest, (int(self.index.shard[row]), int(self.index.place[row])))


def _bools(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
