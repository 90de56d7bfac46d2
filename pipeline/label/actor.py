"""The actor: one resident model, with decode and encode threads beside it.

Decoded pixels never leave the process: encoded images come in, encoded masks go out.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cliper.model.classes import ClassList
from cliper.model.errors import CliperError
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.decode import Decoded, decode, pixels_claimed, to_file_grid
from cliper.pipeline.errors import ImageError, ResourceError, text_of
from cliper.pipeline.label.fallback import CarefulSegmenter, out_of_memory
from cliper.pipeline.label.heatmaps import HasHeat, write_heatmaps
from cliper.pipeline.label.results import refuse_wrong
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.label.watch import Beat
from cliper.pipeline.label.window import Window
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.run.attempts import Attempts, HungWatch
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import pack_mask
from cliper.pipeline.run.schema import COLUMNS, class_entries
from cliper.pipeline.run.unwritten import Unwritten
from cliper.pipeline.telemetry import device_name, timed, watch_device

if TYPE_CHECKING:
    from cliper.model.segmentation import Segmentation

WINDOW_PIXELS = 32_000_000  # decoded pixels handed to the model at once: 96 MB
WINDOW_BATCHES = 4  # batches per call, so that images of equal size find each other


Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """An image on its way through the actor: decoded, or the error it failed with and the stage."""

    row: Row
    image: Decoded | None = None
    error: Exception | None = None
    stage: str = "decode"


class SegmentShard:
    """Ray Data actor: a table of load.SCHEMA (one shard) to a table of `shard` and COLUMNS."""

    def __init__(
        self,
        factory: SegmenterFactory,
        config: JobConfig,
        classes: ClassList,
        run: Run,
        cpu_threads: int,
        driver: str,
        beat: Beat | None = None,
    ) -> None:
        """Load the model. `cpu_threads` bounds torch's own threads, which matter when the model is on a CPU.

        `driver` tells this command from those that worked on the run before: see Attempts.begin. On `beat` the
        actor notes its progress. An expected error is raised by the first call: Ray reports an error of a
        constructor as a dead actor.
        """
        began = time.perf_counter()
        self.beat = beat
        self.refusal: CliperError | None = None
        try:
            with no_collections():
                self.segmenter = CarefulSegmenter(factory(config, classes))
            bound_threads(cpu_threads)
        except CliperError as error:
            self.refusal = error.with_traceback(None)
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            self.refusal = ResourceError(
                f"the model does not fit into memory ({reason}); free the device, use fewer --actors, or "
                "--preset clip-only"
            )
        self.config, self.classes, self.run, self.fingerprint = config, classes, run, run.fingerprint
        self.driver = driver
        self.unwritten = Unwritten(run.storage, run.uri)
        self.used = False  # whether this process has worked on a shard
        self.window = Window(WINDOW_BATCHES * config.batch_size, config.resources.image_seconds)
        self.shown: set[str] = set()  # images whose heat maps are written
        self.pool = ThreadPoolExecutor(max(1, config.resources.threads))
        if beat is not None:
            beat.loaded(time.perf_counter() - began, device_name())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Label one shard: as many rows out as in, in the same order. Raises the CliperError of a failed start.

        Rows that an interrupted attempt has left (run/attempts.py) are taken over.
        """
        if self.refusal is not None:
            raise self.refusal
        self.unwritten.look()
        [shard] = table.column("shard").unique().to_pylist()
        patience = self.config.resources.image_seconds
        attempts = Attempts.begin(
            self.run.storage, self.run.uri, shard, self.driver, patience, fresh=not self.used
        )
        self.used = True
        most = self.config.resources.keep_heatmaps if shard == 0 else 0
        self.shown = set(table.column("image_id").slice(0, most).to_pylist())
        kept = {row["image_id"]: row for row in attempts.done if row["image_id"] not in self.shown}
        rows = [
            # `tried` comes from cliper retry, see run/failed.py
            row | {"attempts": row.get("tried", 0) + 1 + attempts.deaths[row["image_id"]]}
            for row in table.to_pylist()
        ]
        left = [row for row in rows if row["image_id"] not in kept]
        work = Work(attempts, len(rows) - len(left))
        done = self._label_alone(left, work) if attempts.careful else self._label(left, work)
        watch_device(self.run.uri)
        labeled = pa.Table.from_pylist(in_order(rows, kept, done), COLUMNS)
        self.unwritten.add(attempts, labeled)
        return labeled.add_column(0, "shard", table.column("shard"))

    def _label(self, rows: list[Row], work: "Work | None" = None) -> list[Row]:
        """While the model works on one window, the threads decode the next and encode the last.

        With `work`, the images done so far are noted after each window, and kept if they took long.
        """
        most = self.window.most
        items = map_ahead(self.pool, self._decode, rows, most, self._pixels, WINDOW_PIXELS)
        done: list[Row] = []
        encoding: list[Future[Row]] = []
        with HungWatch(self.config.resources.image_seconds) as watch:
            for window in cut_windows(items, self.window.limit):
                began = time.perf_counter()
                next_encoding = self._segment(window)
                done += [future.result() for future in encoding]  # at most two windows of label maps in memory
                encoding = next_encoding
                watch.progress()
                self.window.took(len(window), time.perf_counter() - began)
                self.unwritten.look()
                watch.progress()  # a slow store is not a hanging image
                if work is not None:
                    self._note(work, len(done) + len(encoding), done)
                    if work.attempts.worth_keeping(len(rows) - len(done) - len(encoding)):
                        done, encoding = done + [future.result() for future in encoding], []
                        work.attempts.keep(normal(done))
                        watch.progress()
            return done + [future.result() for future in encoding]

    def _label_alone(self, rows: list[Row], work: "Work") -> list[Row]:
        """Image by image, after deaths that no exception explained (see run/attempts.py)."""
        done = list[Row]()
        for row in rows:
            if work.attempts.is_poison(row["image_id"]):
                seconds = self.config.resources.image_seconds
                reason = f"killed the process that worked on it, or took over {seconds:g} s, twice, while alone"
                error = ImageError("poison", reason)
                done.append(self._failure(Item(row), error, "segment") | {"status": "poison"})
                continue
            work.attempts.note(row["image_id"])
            done += normal(self._label([row]))
            work.attempts.remember(done[-1])
            self._note(work, len(done), done)
        return done

    def _note(self, work: "Work", images: int, done: list[Row]) -> None:
        if self.beat is not None:
            failed = sum(row["status"] != "ok" for row in done)
            self.beat.images(work.attempts.shard, work.kept + images, failed)

    def _pixels(self, row: Row) -> int:
        """Pixels of the decoded image, by its header; an oversized image is not decoded."""
        claimed = pixels_claimed(row["data"] or b"")
        return claimed if claimed <= self.config.max_pixels else 0

    def _decode(self, row: Row) -> Item:
        data = row.pop("data")
        if data is None:
            return Item(row, error=ImageError(row["error_type"], row["error_message"]), stage="load")
        with timed("decode", self.run.uri):
            try:
                return Item(row, image=decode(data, self.config.max_pixels, self.config.input.truncated))
            except ImageError as error:
                return Item(row, error=error)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of a decoder in Rust is no Exception
                return Item(row, error=ImageError("corrupt", f"{type(error).__name__}: {text_of(error)}"))

    def _segment(self, window: list[Item]) -> list["Future[Row]"]:
        """Segment the decoded images and pass all of the window to the encoding threads."""
        good = [(i, item.image, item.row["image_id"]) for i, item in enumerate(window) if item.image is not None]
        with timed("segment", self.run.uri):
            results = self.segmenter.segment([image.pixels for _, image, _ in good], [name for *_, name in good])
        self._keep_heatmaps([(image, name, found) for (_, image, name), found in zip(good, results, strict=True)])
        by_place = dict(zip([i for i, *_ in good], results, strict=True))
        return [self.pool.submit(self._finish, item, by_place.get(i)) for i, item in enumerate(window)]

    def _keep_heatmaps(self, labeled: "list[tuple[Decoded, str, Segmentation | Exception]]") -> None:
        """Write the heat maps of the images that are to be shown: the first of the first shard."""
        segmenter = self.segmenter.segmenter
        for image, name, found in labeled:
            if name in self.shown and not isinstance(found, Exception) and isinstance(segmenter, HasHeat):
                heat = segmenter.heat(image.pixels, name)
                write_heatmaps(self.run, name, image, heat, found, self.classes.names)

    def _finish(self, item: Item, result: "Segmentation | Exception | None") -> Row:
        """Encode a mask, or write down why there is none."""
        if item.image is None:
            return self._failure(item, item.error, item.stage)
        if result is None:
            result = ImageError("wrong_result", "the segmenter returned None")
        if isinstance(result, Exception):
            return self._failure(item, result, "segment")
        with timed("encode", self.run.uri):
            try:
                refuse_wrong(result, item.image.pixels.shape[:2], len(self.classes))
            except Exception as error:
                return self._failure(item, error, "segment")
            try:
                return self._success(item.row, item.image, result)
            except Exception as error:  # a codec's own limits; the other images are not affected
                return self._failure(item, error, "encode")

    def _success(self, row: Row, image: Decoded, found: "Segmentation") -> Row:
        grid = np.ascontiguousarray(to_file_grid(found.labels, image.orientation))
        return self._base(row, image) | {
            **pack_mask(grid, self.config.mask_codec),
            "classes": class_entries(found, self.classes.names),
            "confidence": found.confidence,
            "confidence_p10": found.confidence_p10,
            "margin": found.margin,
            "proposed": None if found.proposed is None else found.proposed.tolist(),
            "status": "ok",
        }

    def _failure(self, item: Item, error: Exception | None, stage: str) -> Row:
        kind = error.kind if isinstance(error, ImageError) else type(error).__name__
        if error is not None and out_of_memory(error):
            kind = "out_of_memory"
        reason = {
            "error_type": kind,
            "error_message": text_of(error)[:500] if error is not None else "",
            "stage": stage,
        }
        return self._base(item.row, item.image) | {"status": "failed"} | reason

    def _base(self, row: Row, image: Decoded | None) -> Row:
        known = {"image_id": row["image_id"], "uri": row["uri"]}
        if image is not None:
            known |= {"width": image.width, "height": image.height, "orientation": image.orientation}
            known["pages"] = image.pages
        return known | {"attempts": row["attempts"], "run_fingerprint": self.fingerprint}


def bound_threads(count: int) -> None:
    """Bound torch's own threads. A segmenter without torch does not wait for its import."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause Python's garbage collection: it takes a fifth of the time to import a model's libraries."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class Work:
    """The shard at hand: its attempts file, and the images taken over from an earlier attempt."""

    attempts: Attempts
    kept: int


def normal(rows: list[Row]) -> list[Row]:
    """Rows as they come back from a file: plain values, every column."""
    return pa.Table.from_pylist(rows, COLUMNS).to_pylist()


def in_order(rows: list[Row], kept: Mapping[str, Row], done: list[Row]) -> list[Row]:
    """The rows of a shard in its order: `kept` by image_id, and `done` for the others."""
    rest = iter(done)
    return [kept.get(row["image_id"]) or next(rest) for row in rows]


def cut_windows(items: Iterable[Item], most: Callable[[], int]) -> Iterator[list[Item]]:
    """Group items in order into windows of at most `most()` images and about WINDOW_PIXELS pixels."""
    window: list[Item] = []
    pixels = 0
    for item in items:
        window.append(item)
        pixels += 0 if item.image is None else item.image.width * item.image.height
        if len(window) >= most() or pixels >= WINDOW_PIXELS:
            yield window
            window, pixels = [], 0
    if window:
        yield window
