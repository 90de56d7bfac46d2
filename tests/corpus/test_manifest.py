"""Sources and the manifest: every input form, stable ids, shards, refusals."""

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.listing import listing_server
from cliper.pipeline.config import InputConfig, ShardConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import read_manifest, write_manifest
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage
from tests.conftest import S3Server
from tests.support.cutting import plain_shards, shards_of
from tests.support.fakes import jpeg, write_corpus

LOCAL = Storage()


def listed(uri: str, storage: Storage = LOCAL, **config: object) -> list[Entry]:
    return list(list_entries(storage, uri, InputConfig.model_validate(config)))


def loaded(entries: list[Entry], storage: Storage = LOCAL, column: str = "image") -> dict[str, bytes]:
    table = load_entries(storage, 0, entries, column)
    return dict(zip(table.column("image_id").to_pylist(), table.column("data").to_pylist(), strict=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("corpus")
    contents = write_corpus(folder, 20)
    (folder / "notes.txt").write_text("not an image")
    return folder, contents


def test_folder_lists_images_only_in_order(corpus: tuple[Path, dict[str, bytes]]) -> None:
    folder, contents = corpus
    entries = listed(str(folder))
    assert [entry.image_id for entry in entries] == sorted(contents)
    assert loaded(entries) == contents


def test_glob_ids_are_relative_to_its_fixed_part(corpus: tuple[Path, dict[str, bytes]]) -> None:
    folder, contents = corpus
    entries = listed(f"{folder}/part[12]/*.jpg")
    assert {e.image_id for e in entries} == {name for name in contents if name.startswith(("part1/", "part2/"))}
    assert loaded(entries) == {e.image_id: contents[e.image_id] for e in entries}


def test_single_file(corpus: tuple[Path, dict[str, bytes]]) -> None:
    folder, contents = corpus
    name = min(contents)
    assert list(loaded(listed(str(folder / name))).values()) == [contents[name]]


def test_s3_prefix_and_range_reads(corpus: tuple[Path, dict[str, bytes]], s3: S3Server) -> None:
    _, contents = corpus
    bucket = s3.bucket("listing")
    write_corpus(s3.folder / "listing" / "deep" / "photos", 20)
    storage = Storage(s3.options)
    entries = listed(f"{bucket}/deep/photos", storage)
    assert [entry.image_id for entry in entries] == sorted(contents)
    assert loaded(entries, storage) == contents
    missing = load_entries(storage, 0, [Entry("gone", f"{bucket}/deep/gone.jpg")], "image").to_pylist()[0]
    assert (missing["data"], missing["error_type"]) == (None, "missing")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt"])
def test_lists_of_uris(corpus: tuple[Path, dict[str, bytes]], suffix: str) -> None:
    folder, contents = corpus
    names = sorted(contents)[:5]
    target = folder / f"list.{suffix}"
    if suffix == "csv":
        with target.open("w", newline="") as handle:
            csv.writer(handle).writerows([["image_id", "uri"], *([f"id-{n}", n] for n in names)])
    elif suffix == "parquet":
        pq.write_table(pa.table({"image_id": [f"id-{n}" for n in names], "uri": names}), target)
    else:
        target.write_text("\n".join(names) + "\n")
    entries = listed(str(target))
    prefix = "" if suffix == "txt" else "id-"
    assert loaded(entries) == {f"{prefix}{n}": contents[n] for n in names}


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_image_bytes(tmp_path: Path, struct: bool) -> None:
    images = [jpeg(i) for i in range(7)]
    column = [{"bytes": data, "path": None} for data in images] if struct else images
    pq.write_table(
        pa.table({"key": list("abcdefg"), "image": column}), tmp_path / "part.parquet", row_group_size=3
    )
    entries = listed(str(tmp_path), format="parquet", id_column="key")
    assert loaded(entries) == dict(zip("abcdefg", images, strict=True))
    assert [e.image_id for e in listed(str(tmp_path), format="parquet")][:2] == ["part/0", "part/1"]
    assert loaded(entries[4:6]) == {"e": images[4], "f": images[5]}


def test_webdataset_members_are_read_by_range(tmp_path: Path) -> None:
    images = {f"{i:03d}.jpg": jpeg(i) for i in range(5)}
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for name, data in [*images.items(), ("000.json", b"{}")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    entries = listed(str(tmp_path / "shard-0.tar"))
    assert loaded(entries) == {f"shard-0/{name}": data for name, data in images.items()}
    assert listed(f"{tmp_path}/*.tar") == entries or listed(f"{tmp_path}/*.tar", format="tar") == entries


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"path\nx.jpg\n", "has no column 'uri'; it has: path"),
        ("list.parquet", b"not parquet", "is not a Parquet file"),
        ("data.tar", b"\x1f\x8b not a tar" * 100, "is not an uncompressed tar"),
    ],
)
def test_wrong_lists_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        listed(str(tmp_path / name))


def test_missing_input() -> None:
    with pytest.raises(InputError, match="/no/such/folder does not exist"):
        listed("/no/such/folder")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), images=st.integers(1, 7), megabytes=st.integers(1, 4), rows=st.integers(1, 50))
def test_shards_are_those_of_a_plain_loop(data: st.DataObject, images: int, megabytes: int, rows: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, 3 * 2**20) | st.none(), max_size=40))
    groups = data.draw(st.lists(st.none() | st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    entries = [
        Entry(str(i), f"/{i // 15}", size, group=group)
        for i, (size, group) in enumerate(zip(sizes, groups, strict=True))
    ]
    limits = ShardConfig(images=images, megabytes=megabytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cliper.pipeline.corpus.cut.LARGE_GROUP", 2)
        patch.setattr("tests.support.cutting.LARGE_GROUP", 2)
        assert shards_of(entries, limits, rows) == plain_shards(entries, limits)


def test_manifest_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.corpus.manifest.SHARDS_PER_PART", 2)
    entries = [Entry(f"é{i}", f"/data/{i}", i, offset=i if i % 2 else None, row=None) for i in range(23)]
    written = write_manifest(entries, LOCAL, str(tmp_path), ShardConfig(images=4))
    manifest = read_manifest(LOCAL, str(tmp_path))
    assert manifest == written
    assert manifest is not None
    assert (manifest.images, manifest.shards, len(manifest.parts)) == (23, 6, 3)
    assert [e for shard in range(6) for e in manifest.read_shard(LOCAL, str(tmp_path), shard)] == entries
    assert manifest.images_in({0, 5}) == 4 + 3


def test_unfinished_manifest_does_not_count(tmp_path: Path) -> None:
    assert read_manifest(LOCAL, str(tmp_path)) is None


def test_colliding_ids_are_refused_with_both_places(tmp_path: Path) -> None:
    entries = [Entry("a", "/1"), Entry("b", "/2"), Entry("a", "/3")]
    with pytest.raises(InputError, match="image_id 'a' occurs twice: /1 and /3"):
        write_manifest(entries, LOCAL, str(tmp_path), ShardConfig(images=1))
    assert read_manifest(LOCAL, str(tmp_path)) is None


def test_equal_hashes_of_different_ids_are_no_collision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.corpus.manifest.id_hashes", lambda ids: np.full(len(ids), 7, np.uint64))
    assert write_manifest([Entry("a", "/1"), Entry("b", "/2")], LOCAL, str(tmp_path), ShardConfig()).images == 2


def test_colliding_ids_are_found_among_hashes_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.corpus.ids.HELD", 100)
    monkeypatch.setattr("cliper.pipeline.corpus.manifest.SHARDS_PER_PART", 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    entries = [Entry(str(i % 999), f"/{i}") for i in range(1000)]
    with pytest.raises(InputError, match="image_id '0' occurs twice: /0 and /999"):
        write_manifest(entries, LOCAL, str(tmp_path / "run"), ShardConfig(images=30))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert write_manifest(entries[1:], LOCAL, str(tmp_path / "run"), ShardConfig(images=30)).images == 999


def test_a_bucket_is_listed_page_by_page() -> None:
    with listing_server(2_345) as (endpoint, _):
        storage = Storage({"endpoint_url": endpoint, "key": "key", "secret": "secret"})
        entries = list(list_entries(storage, "s3://bucket/photos", InputConfig()))
    assert [e.image_id for e in entries] == [f"{i // 8:04d}/{i:09d}.jpg" for i in range(2_345)]
    assert entries[-1].uri == "s3://bucket/photos/0293/000002344.jpg"
