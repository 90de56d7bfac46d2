"""A corpus listed by a crew: the manifest is that of this process, byte by byte, whoever lists."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cliper.pipeline.config import InputConfig, JobConfig, ShardConfig
from cliper.pipeline.corpus import sources
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.manifest import Manifest, write_listed, write_manifest
from cliper.pipeline.corpus.sources import list_entries, list_tables
from cliper.pipeline.errors import InputError
from cliper.pipeline.label.job import open_job
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.storage import listing
from cliper.pipeline.storage.backend import Storage
from tests.corpus.test_costs import parquet
from tests.corpus.test_tars import tar
from tests.support.fakes import CLASSES, write_corpus
from tests.support.faulty_s3 import FaultyS3

LIMITS = ShardConfig(images=4)


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyS3]:
    """Images in folders and directly in the bucket, other files, tars and Parquet files of images."""
    with FaultyS3() as server:
        names = [f"f{i:02d}/{j:02d}{'' if j else ' é'}.jpg" for i in range(12) for j in range(8)]
        names += ["f03/", "f03/a.txt", "f05/deep/er/a.jpg", "z.jpg", "f07/seg_mask.png"]
        server.objects.update({f"bucket/photos/{name}": b"x" * (len(name) % 7 + 1) for name in names})
        for i in range(10):
            members = [(f"{j}.jpg", b"x" * j) for j in range(i)] + [("notes.md", b"x")]
            server.objects[f"bucket/tars/{i}.tar"] = tar(members)
            server.objects[f"bucket/packed/{i}.parquet"] = parquet([b"x"] * (i + 3), group=3)
        yield server


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PAGE", 10)
    monkeypatch.setattr(sources, "MOST", 25)
    monkeypatch.setattr(sources, "SPANS", 3)
    monkeypatch.setattr(sources, "FILES", {"images": 7, "tar": 3, "parquet": 4})
    monkeypatch.setattr("cliper.pipeline.corpus.manifest.SHARDS_PER_PART", 3)


def by_crew(storage: Storage, uri: str, form: str, run: Path, workers: Workers = 1, threads: int = 1) -> Manifest:
    left_out = LeftOut()
    config = InputConfig.model_validate({"format": form})
    with crew(workers, threads=threads) as team:
        tables = list_tables(storage, uri, config, left_out, team)
        return write_listed(tables, Storage(), str(run), LIMITS, team, lambda count: None, left_out)


def by_this_process(storage: Storage, uri: str, form: str, run: Path) -> Manifest:
    left_out = LeftOut()
    entries = list_entries(storage, uri, InputConfig.model_validate({"format": form}), left_out)
    return write_manifest(entries, Storage(), str(run), LIMITS, left_out=left_out)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "manifest").iterdir()}


INPUTS = [
    ("s3://bucket/photos", "images"),
    ("s3://bucket/photos/*/*.jpg", "images"),
    ("s3://bucket/photos/f0?/0*", "images"),
    ("s3://bucket/photos/**/0[1-3].jpg", "images"),
    ("s3://bucket/photos/f{03..05}/*.jpg", "images"),
    ("s3://bucket/photos/z.jpg", "images"),
    ("s3://bucket/tars", "tar"),
    ("s3://bucket/packed/*.parquet", "parquet"),
]


@pytest.mark.parametrize(("uri", "form"), INPUTS)
def test_the_manifest_does_not_depend_on_who_lists(store: FaultyS3, uri: str, form: str, tmp_path: Path) -> None:
    storage = Storage(store.options)
    here = by_this_process(storage, uri, form, tmp_path / "here")
    there = by_crew(storage, uri, form, tmp_path / "there", threads=5)
    assert here == there
    assert here.images
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_the_manifest_does_not_depend_on_a_cluster(store: FaultyS3, tmp_path: Path, ray_local: None) -> None:
    for number, (uri, form) in enumerate([INPUTS[0], INPUTS[1], INPUTS[6], INPUTS[7]]):
        storage = Storage(store.options)
        by_this_process(storage, uri, form, tmp_path / f"here{number}")
        by_crew(storage, uri, form, tmp_path / f"there{number}", "ray")
        assert files(tmp_path / f"here{number}") == files(tmp_path / f"there{number}")
    write_corpus(tmp_path / "in", 20)
    open_job(str(tmp_path / "in"), str(tmp_path / "one"), JobConfig(), CLASSES, Storage())
    open_job(str(tmp_path / "in"), str(tmp_path / "ray"), JobConfig(), CLASSES, Storage(), workers=lambda: "ray")
    assert files(tmp_path / "one") == files(tmp_path / "ray")
    with pytest.raises(InputError, match="/nowhere does not exist"):
        by_crew(Storage(), str(tmp_path / "nowhere"), "tar", tmp_path / "none", "ray")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"bad\.tar is not an uncompressed tar"):
        by_crew(Storage(), str(tmp_path / "bad.tar"), "tar", tmp_path / "none", "ray")


def test_a_store_that_ignores_the_start_is_one_piece(store: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(Storage(store.options).spans("s3://bucket/photos"))) > 1
    monkeypatch.setattr(store, "ignores_start", True)
    assert len(list(Storage(store.options).spans("s3://bucket/photos"))) == 1


def test_an_error_of_a_worker_ends_the_listing(store: FaultyS3, tmp_path: Path) -> None:
    store.fail("GET", "start-after", "403 AccessDenied", times=1)
    with crew(1, threads=3) as team, pytest.raises(Exception, match="check the credentials"):
        list(list_tables(Storage(store.options), "s3://bucket/photos", InputConfig(), LeftOut(), team))
    store.forgive("GET")
