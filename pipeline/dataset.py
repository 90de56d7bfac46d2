"""Train on a run's masks: an iterable dataset for torch, over any number of loader workers and ranks.

    loader = DataLoader(MaskDataset(run, transform=crop), batch_size=16, num_workers=4)

Rows are read shard by shard, only the columns that are needed. An epoch's order is decided by (seed, epoch) alone:
shards are permuted and divided into equal shares per rank and worker, and rows pass through a small shuffle
buffer. Over all ranks and workers, an epoch yields every row exactly once. The shares of ranks differ by at most
one row, so distributed training needs `torch.distributed.algorithms.Join`, or has to stop after the shortest
share.

A pass can resume exactly where it stopped, in any epoch, with torchdata's loader:

    loader = StatefulDataLoader(MaskDataset(run, transform=RandomCrop(512, 255)), batch_size=16, num_workers=4)
    torch.save(loader.state_dict(), "loader.pt")             # at any time
    loader.load_state_dict(torch.load("loader.pt"))          # in a new process, then go on

`RandomCrop` gives every example the same size; `PadBatch` is a `collate_fn` for examples of different sizes.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from cliper.model.classes import ignore_value
from cliper.pipeline.corpus.decode import decode, to_file_grid, upright
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.errors import FilterError, ImageError, InputError, RunError
from cliper.pipeline.run.corrections import Version, read_corrections
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import labeled_shards
from cliper.pipeline.run.rows import LABELED, RowFilter, read_tables

T = TypeVar("T")

log = logging.getLogger(__name__)

READ = ("image_id", "mask", "mask_codec", "classes", "orientation")
READ_AHEAD = 32  # images fetched at once
COUNT_THREADS = 8  # they wait for storage

Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Example(NamedTuple):
    """One image with its mask, in the same pixel grid; batches collate field by field."""

    image: torch.Tensor  # uint8 [3, H, W], RGB
    mask: torch.Tensor  # int64 [H, W]: 0 = background or unknown, k = class k, or the ignore value
    image_id: str


@dataclass(frozen=True)
class Share:
    """A slice of a shard's filtered rows: `first` to `end` (excluded)."""

    shard: int
    first: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """A row in the shuffle buffer, with its image still encoded."""

    row: dict[str, Any]
    data: bytes | ImageError


class MaskDataset(IterableDataset[Example]):
    """Images and masks of a run, each once per epoch.

    `keep`: a filter on rows. `min_confidence` (0 to 1): the stored confidence is per class and image, so a class
    whose `confidence` ("mean" or "p10" over its pixels) is lower becomes the ignore value everywhere in that
    image. `upright`: apply the EXIF orientation to image and mask, instead of using the file's own grid.
    `transform`: applied to image and mask. `on_error`: if an image cannot be read, or its size differs from its
    mask's, InputError is raised or the image is logged and skipped. `rank`, `world_size`: from torch.distributed
    if not given. `shards`: only these. `corrections`: "latest", a version, or None for the model's masks (see
    corrections.py).

    Raises FilterError for a filter that does not fit the run, RunError if the run is not finished and no
    `shards` are named: ranks that list different shards would train on different rows.
    """

    def __init__(
        self,
        run: Run,
        keep: RowFilter = LABELED,
        *,
        min_confidence: float | None = None,
        confidence: Literal["mean", "p10"] = "mean",
        upright: bool = False,
        transform: Transform | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        shuffle: bool = True,
        seed: int = 0,
        shuffle_buffer: int = 512,
        rank: int | None = None,
        world_size: int | None = None,
        shards: Sequence[int] | None = None,
        corrections: Version = "latest",
    ) -> None:
        if min_confidence is not None and not 0 <= min_confidence <= 1:
            raise FilterError(f"the minimum confidence must be between 0 and 1, not {min_confidence:g}")
        self.run, self.keep, self.transform, self.upright = run, keep, transform, upright
        self.min_confidence, self.confidence_column = min_confidence, f"{confidence}_confidence"
        self.skip_errors, self.shuffle, self.seed = on_error == "skip", shuffle, seed
        self.shuffle_buffer = max(1, shuffle_buffer)
        self.rank, self.world_size = _place(rank, world_size)
        self.classes = class_names(run.identity)
        self.ignore_value = ignore_value(len(self.classes))
        self.manifest = _finished_manifest(run, shards)
        self.corrections = read_corrections(run, corrections)
        self.counts = self._count(labeled_shards(run) if shards is None else shards)
        # Shared memory: loader workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._at: tuple[int, int] | None = None  # (epoch, rows taken) of the last pass in this process
        self._resumed: tuple[int, int] | None = None  # where the next pass starts

    @property
    def rows(self) -> int:
        """Rows of one epoch over all ranks."""
        return sum(self.counts.values())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next pass; the default is the same order every time."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Rows of this rank in an epoch; fewer examples if errors are skipped."""
        return sum(share.end - share.first for share in split(self._order(0), self.rank, self.world_size))

    def state_dict(self) -> dict[str, Any]:
        """The position of the pass in this process: its epoch and the rows taken; `order` ties it to its data.

        torchdata's StatefulDataLoader calls this in every worker, so that its own state resumes inside any epoch.
        """
        epoch, seen = self._at or (int(self._epoch.item()), 0)
        return {"epoch": epoch, "seen": seen, "order": self._order_digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next pass at a position of `state_dict`, in its epoch; later passes start at the beginning.

        Raises RunError for a state of other rows, another seed, shuffle or rank.
        """
        if state["order"] != self._order_digest():
            raise RunError("the loader's state is of other rows, or of another seed, shuffle buffer or rank")
        self._resumed = (int(state["epoch"]), int(state["seen"]))

    def _order_digest(self) -> str:
        place = [self.rank, self.world_size]
        settings = [self.run.fingerprint, self.seed, self.shuffle, self.shuffle_buffer, *place]
        return hashlib.sha256(json.dumps([settings, list(self.counts.items())]).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples of this rank and worker."""
        epoch, seen = self._resumed or (int(self._epoch.item()), 0)
        self._resumed, self._at = None, (epoch, seen)
        return self._examples(epoch, seen)

    def _examples(self, epoch: int, seen: int) -> Iterator[Example]:
        """The examples of an epoch after the first `seen` rows; the images of those are not read."""
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        shares = split(split(self._order(epoch), self.rank, self.world_size), part, parts)
        seeds = [self.seed, epoch, self.rank * parts + part]
        total = sum(share.end - share.first for share in shares)
        gone = frozenset(itertools.islice(self._shuffled(iter(range(total)), seeds), seen))
        for number, item in enumerate(self._shuffled(self._encoded(shares, gone), seeds), 1):
            if item is None:
                continue
            self._at = (epoch, number)
            example = self._example(item)
            if example is not None:
                yield example

    def _shuffled(self, items: Iterator[T], seeds: Sequence[int]) -> Iterator[T]:
        if not self.shuffle:
            return items
        return shuffled(items, self.shuffle_buffer, np.random.default_rng(seeds))

    def _encoded(self, shares: Sequence[Share], gone: frozenset[int]) -> Iterator[Encoded | None]:
        """The rows of the shares in order; None for those whose position is in `gone`."""
        first = 0
        for share in shares:
            size = share.end - share.first
            wanted = [place not in gone for place in range(first, first + size)]
            yield from self._read(share, wanted) if any(wanted) else itertools.repeat(None, size)
            first += size

    def _order(self, epoch: int) -> list[Share]:
        """The shards in an epoch's order, which is the same on every rank and worker."""
        order = np.array(list(self.counts), dtype=np.int64)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return [Share(shard, 0, self.counts[shard]) for shard in order.tolist()]

    def _count(self, shards: Sequence[int]) -> dict[int, int]:
        """The number of rows that pass the filter, by shard; shards without one are omitted."""

        def count(shard: int) -> int:
            tables = read_tables(self.run, ["image_id"], self.keep, [shard], self.corrections)
            return sum(len(table) for table in tables)

        with ThreadPoolExecutor(COUNT_THREADS) as pool:
            counts = dict(zip(shards, pool.map(count, shards), strict=True))
        return {shard: rows for shard, rows in counts.items() if rows}

    def _read(self, share: Share, wanted: Sequence[bool]) -> Iterator[Encoded | None]:
        """Yield the wanted rows of a share with their images' bytes, fetching READ_AHEAD images at a time."""
        entries = {e.image_id: e for e in self.manifest.read_shard(self.run.storage, self.run.uri, share.shard)}
        column = self.run.identity["input"]["image_column"]
        flags = iter(wanted)
        for table in read_tables(self.run, READ, self.keep, [share.shard], self.corrections):
            rows = table.slice(share.first, share.end - share.first)
            for batch in rows.to_batches(max_chunksize=READ_AHEAD):
                listed = list(zip(batch.to_pylist(), flags, strict=False))
                chosen = [entries[row["image_id"]] for row, flag in listed if flag]
                loaded = iter(load_entries(self.run.storage, share.shard, chosen, column).to_pylist())
                yield from (Encoded(row, _bytes(next(loaded))) if flag else None for row, flag in listed)

    def _example(self, item: Encoded) -> Example | None:
        try:
            image, mask = self._decode(item)
        except ImageError as error:
            if self.skip_errors:
                log.warning("left out %s: %s", item.row["image_id"], error)
                return None
            raise InputError(f"image '{item.row['image_id']}' cannot be read: {error}") from error
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        labels = torch.from_numpy(np.ascontiguousarray(mask).astype(np.int64))
        if self.transform is not None:
            pixels, labels = self.transform(pixels, labels)
        return Example(pixels, labels, item.row["image_id"])

    def _decode(self, item: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] and mask [H, W], in the same grid. Raises ImageError."""
        if isinstance(item.data, ImageError):
            raise item.data
        found = decode(item.data, self.run.identity["max_pixels"], "accept")
        image = to_file_grid(found.pixels, found.orientation)
        mask = self._trusted(unpack_mask(item.row), item.row["classes"])
        if image.shape[:2] != mask.shape:
            raise ImageError("changed", f"it is {_size(image)} pixels now, its mask {_size(mask)}")
        if self.upright:
            return upright(image, found.orientation), upright(mask, found.orientation)
        return image, mask

    def _trusted(self, mask: np.ndarray, classes: Sequence[dict[str, Any]]) -> np.ndarray:
        """The mask with classes below `min_confidence` set to the ignore value."""
        if self.min_confidence is None:
            return mask
        doubtful = [c["class_id"] for c in classes if c[self.confidence_column] < self.min_confidence]
        return np.where(np.isin(mask, doubtful), self.ignore_value, mask) if doubtful else mask


def split(shares: Sequence[Share], part: int, parts: int) -> list[Share]:
    """Part number `part` of `parts` of a sequence of rows; sizes differ by one at most, order is kept."""
    total = sum(share.end - share.first for share in shares)
    first, end = total * part // parts, total * (part + 1) // parts
    chosen, before = [], 0
    for share in shares:
        size = share.end - share.first
        low, high = max(first - before, 0), min(end - before, size)
        if low < high:
            chosen.append(Share(share.shard, share.first + low, share.first + high))
        before += size
    return chosen


def shuffled(items: Iterator[T], size: int, generator: np.random.Generator) -> Iterator[T]:
    """Yield the items in random order, each drawn from a buffer of `size`; depends on their number alone."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in generator.permutation(len(buffer)).tolist():
        yield buffer[place]


def _bytes(loaded: dict[str, Any]) -> bytes | ImageError:
    if loaded["data"] is None:
        return ImageError(loaded["error_type"], loaded["error_message"])
    data: bytes = loaded["data"]
    return data


def _size(grid: np.ndarray) -> str:
    return f"{grid.shape[1]} x {grid.shape[0]}"


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size of this process. Raises ValueError if only one is given or the rank is out of range."""
    if (rank is None) != (world_size is None):
        raise ValueError("give rank and world_size, or neither")
    if rank is None or world_size is None:
        ready = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1}, not {rank}")
    return rank, world_size


def _finished_manifest(run: Run, shards: Sequence[int] | None) -> Manifest:
    manifest = run.manifest()
    pending = run.pending_shards(manifest) if shards is None else []
    if pending:
        raise RunError(
            f"{run.uri} is not finished: {len(pending)} of {manifest.shards} shards are not labeled. Continue it "
            "with its own 'cliper label' command, or name the shards to read"
        )
    return manifest


@dataclass(frozen=True)
class RandomCrop:
    """A transform: a random window of size x size pixels; smaller images are padded at the right and bottom.

    Padding is black in the image and `ignore_value` (MaskDataset.ignore_value) in the mask. Draws from torch's own
    generator, which loaders seed per worker.
    """

    size: int
    ignore_value: int

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop [3, H, W] and [H, W] to [3, size, size] and [size, size]."""
        height, width = (max(self.size, side) for side in mask.shape)
        image, mask = padded(image, mask, height, width, self.ignore_value)
        top, left = (int(torch.randint(side - self.size + 1, ())) for side in mask.shape)
        rows, columns = slice(top, top + self.size), slice(left, left + self.size)
        return image[:, rows, columns], mask[rows, columns]


def padded(
    image: torch.Tensor, mask: torch.Tensor, height: int, width: int, ignore_value: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad [3, H, W] with 0 and [H, W] with the ignore value at the right and bottom."""
    room = (0, width - mask.shape[1], 0, height - mask.shape[0])
    return torch.nn.functional.pad(image, room), torch.nn.functional.pad(mask, room, value=ignore_value)


@dataclass(frozen=True)
class PadBatch:
    """A `collate_fn`: pads the examples of a batch to the largest height and width among them."""

    ignore_value: int

    def __call__(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Images uint8 [B, 3, H, W], masks int64 [B, H, W], ids."""
        height, width = (max(example.mask.shape[axis] for example in examples) for axis in (0, 1))
        pairs = [padded(e.image, e.mask, height, width, self.ignore_value) for e in examples]
        images, masks = zip(*pairs, strict=True)
        return torch.stack(images), torch.stack(masks), [example.image_id for example in examples]
