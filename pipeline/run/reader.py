"""The only reader of a shard's rows: it returns the rows this run wrote for this shard, or raises an error."""

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.corpus.manifest import Manifest, read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.shards import DIGEST, SHARD, shard_file, shard_number
from cliper.pipeline.storage.sealed import WHOLE, DamagedFileError, open_sealed, tail_is_whole
from cliper.pipeline.storage.uris import join

READERS = 16  # files read at once: they wait for storage
TAIL = 32 << 10  # bytes: the end of a label file, its footer included

_FINGERPRINT = b"cliper.run_fingerprint"
_WORDS = re.compile(r"\s+")


@contextmanager
def open_shard(run: Run, shard: int, whole: bool = False, most: int = WHOLE) -> Iterator[pq.ParquetFile]:
    """A finished shard's file; data read inside the block is checked.

    `whole`: check every byte, also of a large file; `most` 0: for the footer alone, read nothing else. Raises
    RunError that names the file and what to do, if it is missing, damaged, of another run, or of another shard.
    """
    try:
        with run.storage.open(join(run.uri, shard_file(shard))) as handle:
            file = open_sealed(handle, whole, most)
            _check_owner(file, run, shard)
            yield file
    except FileNotFoundError as error:
        raise RunError(f"{shard_file(shard)} of {run.uri} is not there; 'cliper label' writes it again") from error
    except (DamagedFileError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(run, shard, error) from error


def _check_owner(file: pq.ParquetFile, run: Run, shard: int) -> None:
    found = file.metadata.metadata or {}
    owner, number = found.get(_FINGERPRINT, b"").decode("utf-8", "replace"), found.get(SHARD)
    if owner != run.fingerprint:
        raise DamagedFileError(f"it is of the run {owner or 'none'}, this is {run.fingerprint}")
    if number is not None and number != str(shard).encode():
        raise DamagedFileError(f"it is the file of shard {number.decode('utf-8', 'replace')}")


def damaged(run: Run, shard: int, error: Exception) -> RunError:
    """The error of a label file that cannot be used."""
    reason = _WORDS.sub(" ", str(error) or type(error).__name__)[:200]
    return RunError(
        f"{shard_file(shard)} of {run.uri} is damaged ({reason}); 'cliper verify --repair {run.uri}' sets it "
        "aside, and the run's 'cliper label' command labels its images again"
    )


def shard_digests(run: Run, shards: Sequence[int]) -> list[str]:
    """The digest of the rows of each shard, in its file's footer. Raises as `open_shard` does."""

    def one(shard: int) -> str:
        with open_shard(run, shard, most=0) as file:
            return (file.metadata.metadata or {}).get(DIGEST, b"").decode()

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(one, shards))


def labeled_shards(run: Run) -> list[int]:
    """The finished shards of the run's manifest, in order; files of other shards are named on stderr."""
    done, manifest = run.done_shards(), read_manifest(run.storage, run.uri)
    if manifest is None:
        return sorted(done)
    beyond = sorted(shard for shard in done if shard >= manifest.shards)
    if beyond:
        print(
            f"ignored   {shard_file(beyond[0])}{f' and {len(beyond) - 1} more' if beyond[1:] else ''}: "
            f"the run has {manifest.shards} shards",
            file=sys.stderr,
            flush=True,
        )
    return sorted(done - set(beyond))


def torn_shards(run: Run, manifest: Manifest) -> list[int]:
    """Shards of the manifest whose file is empty, cut off, has a damaged footer, or is another shard's.

    Reads the last TAIL bytes of every file: many at a time where the store can.
    """
    sizes = _sizes(run, manifest.shards)
    uris = [join(run.uri, shard_file(shard)) for shard in sizes]
    ranges = [(max(0, size - TAIL), size) for size in sizes.values()]
    tails = run.storage.read_many(uris, ranges) if uris else []
    found = zip(sizes.items(), tails, strict=True)
    return [shard for (shard, size), tail in found if isinstance(tail, bytes) and not _whole(tail, size, shard)]


def _whole(tail: bytes, size: int, shard: int) -> bool:
    number = re.search(re.escape(SHARD) + rb"\x18.(\d+)", tail, re.DOTALL)
    return tail_is_whole(tail, size) and (number is None or int(number[1]) == shard)


def _sizes(run: Run, shards: int) -> dict[int, int]:
    try:
        files = [(shard_number(name), size) for name, size in run.storage.list_files(join(run.uri, "labels"))]
    except FileNotFoundError:
        return {}
    return {number: size for number, size in files if number is not None and number < shards}


def set_aside(run: Run, shards: Collection[int]) -> Iterator[tuple[str, str]]:
    """Move label files to `damaged/` in the run folder, so that their shards are labeled again.

    Yields (old name, new name). An earlier file of that name there is replaced.
    """
    for shard in sorted(shards):
        old, new = shard_file(shard), shard_file(shard).replace("labels/", "damaged/", 1)
        run.storage.write(join(run.uri, new), run.storage.read(join(run.uri, old)))
        run.storage.remove(join(run.uri, old))
        yield old, new
