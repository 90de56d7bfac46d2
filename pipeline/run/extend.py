"""Extend a run to what its input holds now: new images become new shards behind the existing ones.

The order of the writes makes every interruption harmless, and the same command finishes what one left:

1. changed/shard-000000.json    images of finished shards to label again (changed.py)
2. manifest/part-00007.parquet  new shards; and, under another name, files whose images are listed otherwise now
3. manifest/index.json          replaced atomically: from here on, the run is the extended one
4. files that the index named before are removed

Rows of finished shards are touched only where `relabel` asks for it. A driver holds the run's lease meanwhile.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from cliper.pipeline.config import JobConfig, counted
from cliper.pipeline.corpus.compare import Comparison, Difference, Known, new_entries
from cliper.pipeline.corpus.ids import IdHashes
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.manifest import (
    Manifest,
    Part,
    fitting_shards,
    read_part,
    refuse_collisions,
    write_index,
    write_part,
    write_parts,
)
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.tables import table_of, tables_of
from cliper.pipeline.errors import InputError
from cliper.pipeline.parallel import crew
from cliper.pipeline.run.attempts import forget_attempts
from cliper.pipeline.run.changed import changed_shards, read_changed, write_changed
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.leftovers import unnamed_parts
from cliper.pipeline.storage.uris import join

RELABEL = ("changed", "touched")  # kinds of differences that can be labeled again
LOOK_LOCAL, LOOK_REMOTE = 100_000, 10_000  # images that are listed again only to tell of new ones

_REVISION = re.compile(r"(part-\d+)(?:-(\d+))?\.parquet")

Images = dict[str, Entry]


@dataclass
class Extension:
    """What an extension found and did."""

    found: Comparison
    new_shards: int = 0
    relabeled: int = 0  # images of finished shards noted to be labeled again
    first_vanished: str = ""
    relabel: Collection[str] = field(default_factory=tuple)

    def lines(self) -> list[str]:
        """A line per kind of finding."""
        found = self.found
        new = f"{counted(found.new, 'new image')} in {counted(self.new_shards, 'shard')}"
        lines = [f"extended  {new}; {found.known:,} were listed before"]
        if found.vanished:
            lines.append(
                f"vanished  {found.vanished:,} images are not in the input any more, for example "
                f"{self.first_vanished}; their rows stay"
            )
        for kind in RELABEL:
            lines += self._of(kind)
        return lines

    def _of(self, kind: str) -> list[str]:
        images = [difference for difference in self.found.differences if difference.kind == kind]
        if not images:
            return []
        also = " changed --relabel touched" if kind == "touched" else " changed"
        then = "labeled again" if kind in self.relabel else f"--extend --relabel{also} labels them again"
        first = f"{images[0].entry.image_id}: {images[0].reason}"
        return [f"{kind:<10}{len(images):,} images, for example {first}; {then}"]


def extend_run(
    run: Run,
    manifest: Manifest,
    listed: Iterable[Entry],
    config: JobConfig,
    left_out: LeftOut,
    relabel: Collection[str] = (),
    on_progress: Callable[[int], None] = lambda count: None,
) -> tuple[Manifest, Extension]:
    """List the corpus again and extend the manifest; `relabel`: which kinds of RELABEL are labeled again.

    Raises InputError for ids that occur twice, RunError for a damaged manifest.
    """
    known = Known(run.storage, run.uri, manifest)
    found = Comparison(manifest.images)
    try:
        new = _write_new(run, manifest, new_entries(known, listed, found), config, on_progress)
    except InputError:
        _remove_unnamed(run, manifest)
        raise
    extension = Extension(found, sum(len(part.images) for part in new), relabel=relabel)
    extension.relabeled, updates = _note_changed(run, found.differences, relabel)
    parts = [*(_rewritten(run, part, updates) for part in manifest.parts), *new]
    extended = Manifest(parts, left_out) if parts != manifest.parts else manifest
    if extended is not manifest:
        write_index(extended, run.storage, run.uri)
    _remove_unnamed(run, extended)
    extension.first_vanished = _first_vanished(run, extended, known, found)
    return extended, extension


def _write_new(
    run: Run,
    manifest: Manifest,
    entries: Iterator[Entry],
    config: JobConfig,
    on_progress: Callable[[int], None],
) -> list[Part]:
    """Write the new shards. Raises InputError for two images of one id."""
    with IdHashes() as ids, crew(1) as team:
        limits, tables = fitting_shards(config, tables_of(entries))
        new = write_parts(tables, manifest.parts, run.storage, run.uri, limits, team, ids, on_progress)
        if new:
            refuse_collisions(ids, Manifest([*manifest.parts, *new]), run.storage, run.uri)
    return new


def _note_changed(
    run: Run, differences: Sequence[Difference], relabel: Collection[str]
) -> tuple[int, dict[int, Images]]:
    """Write the images to label again; returns their number, and the entries that the manifest is to have."""
    if not differences:
        return 0, {}
    done, waiting = run.done_shards(), set(changed_shards(run))
    again: dict[int, Images] = {}
    updates: dict[int, Images] = defaultdict(dict)
    for difference in differences:
        shard, entry = difference.shard, difference.entry
        if shard in waiting and shard not in again:
            again[shard] = read_changed(run, shard)
        wanted = difference.kind in relabel or entry.image_id in again.get(shard, {})
        if wanted and shard in done:
            again.setdefault(shard, {})[entry.image_id] = entry
        if wanted or difference.kind == "moved" or shard not in done:
            updates[shard][entry.image_id] = entry
    for shard, images in again.items():
        write_changed(run, shard, images)
    for shard in {*again, *updates}:  # rows that an interrupted attempt kept may be of an earlier image
        forget_attempts(run.storage, run.uri, shard)
    return sum(map(len, again.values())), updates


def _rewritten(run: Run, part: Part, updates: dict[int, Images]) -> Part:
    """The manifest file with entries replaced, under its next name; the same one if none are."""
    if not any(part.first_shard <= shard < part.end for shard in updates):
        return part
    entries = [
        updates.get(number, {}).get(entry.image_id, entry)
        for number, shard in enumerate(read_part(run.storage, run.uri, part), part.first_shard)
        for entry in shard
    ]
    match = _REVISION.fullmatch(part.file)
    stem, revision = (match[1], int(match[2] or 0)) if match else (part.file.removesuffix(".parquet"), 0)
    renamed = replace(part, file=f"{stem}-{revision + 1}.parquet")
    return write_part(renamed, table_of(entries), run.storage, run.uri)


def _remove_unnamed(run: Run, manifest: Manifest) -> None:
    """Remove manifest files that the index does not name: replaced ones, and those of an interruption."""
    for name in unnamed_parts(run, manifest):
        with suppress(FileNotFoundError):
            run.storage.remove(join(run.uri, "manifest", name))


def _first_vanished(run: Run, manifest: Manifest, known: Known, found: Comparison) -> str:
    if not found.vanished:
        return ""
    place = int(found.vanished_rows[0])
    shard = known.shard_of(place)
    first = int(known.ends[shard - 1]) if shard else 0
    return manifest.read_shard(run.storage, run.uri, shard)[place - first].image_id


def count_new(run: Run, manifest: Manifest, listed: Iterable[Entry]) -> Comparison:
    """Compare a listing with the manifest and write nothing. Raises as `extend_run` does."""
    found = Comparison(manifest.images)
    for _ in new_entries(Known(run.storage, run.uri, manifest), itertools.islice(listed, 2 * LOOK_LOCAL), found):
        pass
    return found
