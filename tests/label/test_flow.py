"""The flow on a real Ray: a thousand images, broken ones among them, locally and on a real S3 server."""

import hashlib
import inspect
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext

from benchmarks import scale
from cliper.model.classes import ClassList
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.flow import label_corpus, over_shards
from cliper.pipeline.label.feed import AHEAD
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.label.segmenters import CLIPerSegmenter
from cliper.pipeline.label.stages import Tasks
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PARITY, S3Server
from tests.support.fakes import CLASSES, Brightness, Fragile, Keeping, Stumbles, brightness_labels, write_corpus
from tests.support.jobs import fake_job, tasks_of

pytestmark = pytest.mark.usefixtures("ray_local")

TWO_ACTORS = Pool(actors=2, cpus_per_actor=1, gpus_per_actor=0)


def label(
    corpus: str,
    output: str,
    storage: Storage,
    factory: Any = Brightness,
    pool: Pool = TWO_ACTORS,
    shards: int | None = None,
    classes: ClassList = CLASSES,
    **settings: Any,
) -> tuple[Run, list[dict[str, Any]]]:
    """Open a run, label its pending shards (at most `shards`), and return all its rows."""
    job = fake_job(corpus, output, storage, factory, classes, **settings)
    tasks = tasks_of(job, shards)
    summaries = list(label_corpus(job, tasks, pool))
    assert sorted(summary["shard"] for summary in summaries) == [task.shard for task in tasks]
    return job.run, rows_of(job.run)


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows = []
    for shard in sorted(run.done_shards()):
        with run.storage.open(f"{run.uri}/{shard_file(shard)}") as handle:
            rows += pq.read_table(handle).to_pylist()
    return rows


def mask_digests(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {r["image_id"]: hashlib.sha256(r["mask"]["bytes"]).hexdigest() for r in rows if r["status"] == "ok"}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("thousand")
    return folder, write_corpus(folder, 1000, broken_each=6)  # 3% broken, five kinds


@pytest.fixture(scope="module")
def local_rows(
    thousand: tuple[Path, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "local"
    return label(str(thousand[0]), str(output), Storage(), shard={"images": 64})[1]


def test_a_thousand_images_become_a_thousand_rows(
    thousand: tuple[Path, dict[str, bytes]], local_rows: list[dict[str, Any]]
) -> None:
    contents = thousand[1]
    assert [row["image_id"] for row in local_rows] == sorted(contents)
    kinds = Counter(row["error_type"] for row in local_rows)
    assert kinds == {None: 970, "empty": 6, "not_an_image": 6, "corrupt": 6, "oversized": 6, "unsupported": 6}
    for row in local_rows:
        assert (row["mask"] is None) == (row["status"] == "failed") == (row["stage"] == "decode")


def test_masks_and_metadata_are_those_of_the_segmenter(
    thousand: tuple[Path, dict[str, bytes]], local_rows: list[dict[str, Any]]
) -> None:
    for row in [r for r in local_rows if r["status"] == "ok"][::50]:
        expected = brightness_labels(decode(thousand[1][row["image_id"]], 10**8).pixels)
        assert np.array_equal(unpack_mask(row), expected)
        assert (row["height"], row["width"]) == expected.shape
        counts = {entry["class_id"]: entry["pixels"] for entry in row["classes"]}
        assert counts == {int(k): int((expected == k).sum()) for k in np.unique(expected)}


def test_s3_gives_the_same_masks(
    thousand: tuple[Path, dict[str, bytes]], local_rows: list[dict[str, Any]], s3: S3Server
) -> None:
    s3.bucket("corpus")
    write_corpus(s3.folder / "corpus" / "images", 1000, broken_each=6)
    output = f"{s3.bucket('runs')}/first"
    run, rows = label("s3://corpus/images", output, Storage(s3.options), shard={"images": 64})
    assert len(rows) == 1000
    assert mask_digests(rows) == mask_digests(local_rows)
    written = b"".join(p.read_bytes() for p in (s3.folder / "runs").rglob("*") if p.is_file())
    assert s3.secret.encode() not in written
    assert run.done_shards() == set(range(16))


@pytest.mark.parametrize("shard_images", [17, 300])
@pytest.mark.parametrize("actors", [1, 2])
def test_masks_do_not_depend_on_shards_or_actors(
    thousand: tuple[Path, dict[str, bytes]],
    local_rows: list[dict[str, Any]],
    tmp_path: Path,
    shard_images: int,
    actors: int,
) -> None:
    pool = Pool(actors, 1, 0)
    corpus = f"{thousand[0]}/part[01]/*.jpg"
    _, rows = label(corpus, str(tmp_path / "run"), Storage(), pool=pool, shard={"images": shard_images})
    expected = mask_digests(local_rows)
    assert len(rows) == 278
    assert mask_digests(rows).items() <= expected.items()


def test_done_shards_are_not_read_or_computed_again(
    thousand: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    corpus, output = str(thousand[0] / "part2"), str(tmp_path / "run")
    run, rows = label(corpus, output, Storage(), shard={"images": 20}, shards=3)
    assert len(rows) == 60
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "labels").iterdir()}
    _, rows = label(corpus, output, Storage(), shard={"images": 20})
    assert len(rows) == len({row["image_id"] for row in rows}) == 139
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert run.done_shards() == set(range(7))


def test_a_raising_image_affects_only_its_own_row(tmp_path: Path) -> None:
    """And an actor that does not start is replaced, if Ray can do that: 2.50 cannot."""
    maker = Stumbles(str(tmp_path)) if hasattr(DataContext, "max_consecutive_actor_init_deaths") else Fragile
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 40)
    (corpus / "part0" / "photo-00000.jpg").rename(corpus / "part0" / "raise.jpg")
    _, rows = label(str(corpus), str(tmp_path / "run"), Storage(), factory=maker, shard={"images": 10})
    [bad] = [row for row in rows if row["status"] != "ok"]
    assert (bad["image_id"], bad["error_type"], bad["stage"]) == ("part0/raise.jpg", "RuntimeError", "segment")
    assert bad["error_message"] == "cannot segment part0/raise.jpg"
    assert (bad["width"], bad["height"]) == (64, 48)
    assert len(rows) == 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own options")
def test_actors_on_the_cpu_keep_freed_memory(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    _, rows = label(str(tmp_path / "corpus"), str(tmp_path / "run"), Storage(), factory=Keeping)
    assert {row["error_message"] for row in rows} == {None}


def test_images_that_kill_their_process_become_rows(tmp_path: Path) -> None:
    """Each death ends the whole actor; after a bounded number the image is identified, and no other is lost."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 40)
    for i in (0, 7):
        (corpus / "part0" / f"photo-{i:05d}.jpg").rename(corpus / "part0" / f"kill-{i}.jpg")
    run, rows = label(str(corpus), str(tmp_path / "run"), Storage(), factory=Fragile, shard={"images": 10})
    poison = [row for row in rows if row["status"] == "poison"]
    assert [row["image_id"] for row in poison] == ["part0/kill-0.jpg", "part0/kill-7.jpg"]
    assert all(row["error_type"] == "poison" and row["attempts"] == 3 for row in poison)
    assert len(rows) == 40
    assert sum(row["status"] == "ok" for row in rows) == 38
    assert not list((tmp_path / "run" / "attempts").iterdir())
    assert len(run.done_shards()) == 4


def test_an_image_that_hangs_becomes_a_row(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, 20)
    (corpus / "part0" / "photo-00000.jpg").rename(corpus / "part0" / "hang.jpg")
    settings = {"shard": {"images": 4}, "resources": {"image_seconds": 1}}
    _, rows = label(str(corpus), str(tmp_path / "run"), Storage(), factory=Fragile, **settings)
    [bad] = [row for row in rows if row["status"] != "ok"]
    assert (bad["image_id"], bad["status"], bad["error_type"]) == ("part0/hang.jpg", "poison", "poison")
    assert "or took over 1 s" in bad["error_message"]
    assert len(rows) == 20


def test_the_real_model_with_two_actors_and_other_batches(tiny_clip: Path, tmp_path: Path) -> None:
    """One actor against two, batch 1 against 8: the same mask bytes."""
    classes = ClassList.parse(["cat", "cup of coffee", "person"])
    model = {
        "backbone": {"model": f"local-dir:{tiny_clip}"},
        "fusion": {"short_side": 96},
        "fgc": {"model": str(PARITY / "sd_tiny"), "resolution": 128},
        "labels": {"presence_threshold": 0.1, "background_threshold": 0.1},
    }
    digests = []
    for actors, batch, images in ((1, 1, 8), (2, 8, 2)):
        output = str(tmp_path / f"run-{actors}-{batch}")
        settings = {"model": model | {"batch_size": batch}, "shard": {"images": images}}
        pool = Pool(actors, 1, 0)
        corpus = str(PARITY / "photos")
        _, rows = label(corpus, output, Storage(), CLIPerSegmenter, pool, None, classes, **settings)
        digests.append(mask_digests(rows))
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]


def test_shards_enter_the_engine_as_they_are_taken(tmp_path: Path) -> None:
    """Of 200,000 shards, few are loaded before the first results are read; all of one chunk and more arrive."""

    def load(task: Any) -> pa.Table:
        (tmp_path / str(task.shard)).touch()
        return pa.table({"shard": [task.shard]})

    flow = over_shards(Tasks(range(200_000)), load, lambda: lambda table: table, Pool(1, 1, 0))
    first = [next(flow)["shard"] for _ in range(5)]
    loaded = len(list(tmp_path.iterdir()))
    del flow
    assert len(set(first)) == 5
    assert loaded < 5 * AHEAD


def test_tasks_are_made_when_they_are_read() -> None:
    tasks = Tasks(shard for shard in range(10) if shard % 2)
    assert [task.shard for task in tasks] == [1, 3, 5, 7, 9]
    assert [task.shard for task in tasks[1:3]] == [3, 5]
    assert all(task.again is None for task in tasks)


def test_ray_still_keeps_statistics_where_they_are_dropped() -> None:
    """FewAhead clears a private list of Ray's operators; a Ray that renames it must be looked at."""
    from ray.data._internal.execution.operators.map_operator import MapOperator

    assert "self._output_blocks_stats" in inspect.getsource(MapOperator)


def test_the_benchmark_of_scale_goes_through_this_flow() -> None:
    found = scale.measure(scale.nothing(4, 1), shards=4, stop=3, limit=60, every=1)
    assert (found["shards"], found["commits"]) == (4, 3)
    assert found["samples"][-1]["commits"] == 3
