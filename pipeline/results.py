"""The Python interface to a run: rows, masks, a torch dataset, exports."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cliper.pipeline.errors import RunError
from cliper.pipeline.run.corrections import read_corrections
from cliper.pipeline.run.folder import Run, class_names, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.rows import ALL_ROWS, LABELED, METADATA, RowFilter, read_tables
from cliper.pipeline.storage.backend import Storage

if TYPE_CHECKING:
    from cliper.pipeline.dataset import MaskDataset


def open_run(uri: str, storage_options: Mapping[str, Any] | None = None) -> "OpenedRun":
    """Open a run folder for reading: a local path or an s3:// prefix.

    `storage_options` are fsspec's, e.g. {"anon": True}. Raises RunError if there is no run.
    """
    return OpenedRun(read_run(uri, Storage(dict(storage_options or {}))))


class OpenedRun:
    """The finished part of a run. Corrected masks replace the model's."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label k is `classes[k - 1]`, label 0 is background."""
        return class_names(self.run.identity)

    def table(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """The rows as one Arrow table: the named columns, or all but the masks.

        `where` is an SQL condition over the columns, e.g. "status = 'ok' AND margin < 0.2". Memory: all rows.
        Raises FilterError.
        """
        return pa.concat_tables(self._tables(METADATA if columns is None else columns, where))

    def rows(self, where: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield every row as a dictionary with its packed mask, with one shard in memory. Raises FilterError."""
        for table in self._tables(None, where):
            yield from table.to_pylist()

    def mask(self, image_id: str) -> np.ndarray:
        """The mask of one image: labels, uint8 or uint16 [height, width]. Raises RunError if it has none."""
        for table in self._tables(["image_id", "mask", "mask_codec"], None, LABELED):
            place = table.column("image_id").index(image_id).as_py()
            if place >= 0:
                return unpack_mask(table.slice(place, 1).to_pylist()[0])
        raise RunError(f"{self.run.uri} has no mask of '{image_id}'; ids are in the column image_id of .table()")

    def dataset(self, keep: RowFilter = LABELED, shuffle: bool = True, seed: int = 0) -> "MaskDataset":
        """Images and masks for torch; MaskDataset has more options. Raises RunError for an unfinished run."""
        from cliper.pipeline.dataset import MaskDataset

        return MaskDataset(self.run, keep, shuffle=shuffle, seed=seed)

    def _tables(
        self, columns: Sequence[str] | None, where: str | None, keep: RowFilter = ALL_ROWS
    ) -> Iterator[pa.Table]:
        chosen = keep if where is None else RowFilter(statuses=(), where=where)
        return read_tables(self.run, columns, chosen, corrections=read_corrections(self.run, "latest"))
