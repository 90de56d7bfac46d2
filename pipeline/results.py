"""The Python interface to a run: rows, masks, pictures, a torch dataset, exports."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from cliper.pipeline.config import suggest
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.errors import FilterError, ImageError, InputError, RunError
from cliper.pipeline.run.corrections import Version, read_corrections
from cliper.pipeline.run.folder import Run, class_names, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import labeled_shards
from cliper.pipeline.run.rows import ALL_ROWS, LABELED, METADATA, RowFilter, read_tables
from cliper.pipeline.run.schema import COLUMNS
from cliper.pipeline.storage.backend import Storage

if TYPE_CHECKING:
    from cliper.pipeline.dataset import MaskDataset, Transform
    from cliper.pipeline.export.driver import Summary
    from cliper.pipeline.export.options import Options
    from cliper.pipeline.predict.prediction import Prediction


def open_run(uri: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> "OpenedRun":
    """Open a run folder for reading: a local path or an s3:// prefix.

    `storage_options` are fsspec's, e.g. {"anon": True}. Raises RunError if there is no run.
    """
    return OpenedRun(read_run(str(uri), Storage(dict(storage_options or {}))))


class OpenedRun:
    """The finished part of a run. Corrected masks replace the model's.

    >>> import cliper
    >>> run = cliper.open_run("tests/data/run_0_1/run")
    >>> run
    OpenedRun(.../run_0_1/run: 4 images labeled, 19 classes)
    >>> run.classes[:2]
    ('grass', 'brick wall')
    >>> run.table(["image_id", "status"]).to_pylist()[0]
    {'image_id': 'scene-1.jpg', 'status': 'ok'}
    >>> [row["image_id"] for row in run.rows(where="width > 96")]
    []
    >>> run.mask("scene-1.jpg").shape
    (72, 96)
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label k is `classes[k - 1]`, label 0 is background."""
        return class_names(self.run.identity)

    def __len__(self) -> int:
        """Rows of the finished shards, failed images included."""
        return sum(len(table) for table in self._tables(["image_id"], None))

    def __repr__(self) -> str:
        return f"OpenedRun({self.run.uri}: {len(self)} images labeled, {len(self.classes)} classes)"

    def table(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """The rows as one Arrow table: the named columns, or all but the masks. `.to_pandas()` works on it.

        `where` is an SQL condition over the columns, e.g. "status = 'ok' AND margin < 0.2". Memory: all rows.
        Raises FilterError, also for an unknown column.
        """
        unknown = [name for name in columns or () if name not in COLUMNS.names]
        if unknown:
            raise FilterError(f"a run has no column '{unknown[0]}'; {suggest(unknown[0], COLUMNS.names)}")
        return pa.concat_tables(self._tables(METADATA if columns is None else columns, where))

    def rows(self, where: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield every row as a dictionary with its packed mask, with one shard in memory. Raises FilterError."""
        for table in self._tables(None, where):
            yield from table.to_pylist()

    def mask(self, image_id: str) -> np.ndarray:
        """The mask of one image: labels, uint8 or uint16 [height, width]. Raises RunError if it has none."""
        return unpack_mask(self._row(image_id, ["image_id", "mask", "mask_codec"])[1])

    def prediction(self, image_id: str) -> "Prediction":
        """One image with its mask, as `CLIPer` returns it: `.overlay()`, `.classes`, `.to_coco()`.

        Raises RunError if it has no mask, InputError if the image cannot be read any more.
        """
        from cliper.pipeline.predict.prediction import Picture, of_row

        shard, row = self._row(image_id, None)
        entries = self.run.manifest().read_shard(self.run.storage, self.run.uri, shard)
        wanted = [entry for entry in entries if entry.image_id == image_id]
        column = self.run.identity["input"]["image_column"]
        [loaded] = load_entries(self.run.storage, shard, wanted, column).to_pylist()
        if loaded["data"] is None:
            raise InputError(f"the image {row['uri']} cannot be read: {loaded['error_message']}")
        try:
            found = decode(loaded["data"], self.run.identity["max_pixels"], "accept")
        except ImageError as error:
            raise InputError(f"the image {row['uri']} cannot be read: {error}") from error
        if (found.width, found.height) != (row["width"], row["height"]):
            raise InputError(
                f"the image {row['uri']} has changed: it is {found.width} x {found.height} pixels now"
            )
        return of_row(row, Picture(found.pixels, found.orientation), self.classes)

    def dataset(
        self,
        keep: RowFilter = LABELED,
        *,
        where: str | None = None,
        transform: "Transform | None" = None,
        min_confidence: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        shuffle: bool = True,
        seed: int = 0,
    ) -> "MaskDataset":
        """Images and masks for torch; MaskDataset explains the options and has more.

        `where`: an SQL condition, as in `table`. Raises RunError for an unfinished run, FilterError.
        """
        from cliper.pipeline.dataset import MaskDataset

        return MaskDataset(
            self.run,
            keep if where is None else RowFilter(where=where),
            transform=transform,
            min_confidence=min_confidence,
            on_error=on_error,
            shuffle=shuffle,
            seed=seed,
        )

    def export(
        self,
        to: str,
        output: str | PathLike[str],
        *,
        images: bool = False,
        where: str | None = None,
        keep: RowFilter = LABELED,
        options: "Options | None" = None,
        corrections: Version = "latest",
        workers: int = 1,
    ) -> "Summary":
        """Write the masks in another tool's format (`cliper export`), e.g. run.export("coco", "build/coco").

        `where`: an SQL condition, as in `table`, or `keep`: any filter. `options`: splits, instances, polygons
        and the rest of the command's options. Raises ExportError, FilterError, ConfigError.
        """
        from cliper.pipeline.export.driver import export, make_plan

        chosen = keep if where is None else RowFilter(where=where)
        plan = make_plan(self.run, to, chosen, images, options)
        return export(self.run, plan, str(output), workers, corrections)

    def _row(self, image_id: str, columns: Sequence[str] | None) -> tuple[int, dict[str, Any]]:
        """The shard and the row of an image that has a mask. Reads the ids of shards until it is found."""
        corrections = read_corrections(self.run, "latest")
        for shard in labeled_shards(self.run):
            for ids in read_tables(self.run, ["image_id"], LABELED, [shard], corrections):
                place = ids.column("image_id").index(image_id).as_py()
                if place >= 0:
                    [table] = read_tables(self.run, columns, LABELED, [shard], corrections)
                    return shard, table.slice(place, 1).to_pylist()[0]
        raise RunError(f"{self.run.uri} has no mask of '{image_id}'; ids are in the column image_id of .table()")

    def _tables(
        self, columns: Sequence[str] | None, where: str | None, keep: RowFilter = ALL_ROWS
    ) -> Iterator[pa.Table]:
        chosen = keep if where is None else RowFilter(statuses=(), where=where)
        return read_tables(self.run, columns, chosen, corrections=read_corrections(self.run, "latest"))
