"""A corpus that changes between listing and reading: what differs is a failed row, not another image."""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.storage.backend import Storage
from tests.support import faulty_s3
from tests.support.fakes import jpeg
from tests.support.faulty_s3 import FaultyS3

LOCAL = Storage()


def listed(uri: Path, form: str = "auto") -> list[Entry]:
    return list(list_entries(LOCAL, str(uri), InputConfig.model_validate({"format": form})))


def outcome(entries: Sequence[Entry]) -> dict[str, str | None]:
    rows = load_entries(LOCAL, 0, entries, "image").to_pylist()
    return {row["image_id"]: row["error_type"] for row in rows}


def write_tar(path: Path, names: Sequence[str], data: bytes, **options: object) -> None:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


LONG = "folder/" * 20 + "x.jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_changed_places(tmp_path: Path, form: int) -> None:
    """Same sizes, same offsets, same sum of the names' bytes: only the order is another."""
    write_tar(tmp_path / "a.tar", ["img_12.jpg", "img_21.jpg", "é.jpg"], jpeg(1), format=form)
    entries = listed(tmp_path / "a.tar")
    assert set(outcome(entries).values()) == {None}
    write_tar(tmp_path / "a.tar", ["img_21.jpg", "img_12.jpg", "é.jpg"], jpeg(1), format=form)
    assert outcome(entries) == {"a/img_12.jpg": "changed", "a/img_21.jpg": "changed", "a/é.jpg": None}


def test_long_names_links_and_a_cut(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in (LONG, "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(1))
            archive.addfile(member, io.BytesIO(jpeg(1)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(link)
    entries = listed(tmp_path / "a.tar")
    assert outcome(entries) == {f"a/{LONG}": None, "a/b.jpg": None, "a/link.jpg": None}
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: (entries[1].offset or 0) + 10])
    assert outcome(entries)["a/b.jpg"] == "truncated"
    (tmp_path / "a.tar").write_bytes(b"\0" * len(data))
    assert outcome(entries)["a/b.jpg"] == "changed"


def test_a_file_of_another_size(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    entries = listed(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg(1)[:-5])
    assert outcome(entries) == {"a.jpg": "changed", "b.jpg": None}


def test_rows_that_changed_places(tmp_path: Path) -> None:
    def write(ids: Sequence[int]) -> None:
        table = pa.table({"image_id": list(ids), "image": [jpeg(i) for i in ids]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)

    write([1, 2, 3, 4])
    entries = listed(tmp_path / "a.parquet", "parquet")
    assert outcome(entries) == {"1": None, "2": None, "3": None, "4": None}
    write([1, 3, 2, 4])
    assert outcome(entries) == {"1": None, "2": "changed", "3": "changed", "4": None}


def test_members_with_long_names_that_changed_places(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{'folder/' * 20}{name}.jpg" for name in ("one", "two")]
        write_tar(tmp_path / "a.tar", names, jpeg(1), format=form)
        entries = listed(tmp_path / "a.tar")
        assert set(outcome(entries).values()) == {None}
        assert all(entry.stamp is not None for entry in entries)
        data = bytearray((tmp_path / "a.tar").read_bytes())
        data[(entries[0].offset or 0) - 512] ^= 1  # the member's own header, of another sum
        (tmp_path / "a.tar").write_bytes(data)
        assert outcome(entries) == {f"a/{names[0]}": "changed", f"a/{names[1]}": None}


def test_copies_with_another_modification_time_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    entries = listed(tmp_path)
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert listed(tmp_path) != entries
    assert outcome(entries) == {"a.jpg": None}


def test_files_modified_since_the_listing_are_not_labeled(tmp_path: Path) -> None:
    """The same size each time; what is read for labeling is `dated`."""
    for name in ("same", "replaced", "written into", "gone"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1))
        os.utime(tmp_path / f"{name}.jpg", ns=(10**18, 10**18))
    entries = listed(tmp_path)
    (tmp_path / "new").write_bytes(jpeg(1)[:-1] + b"?")
    (tmp_path / "new").replace(tmp_path / "replaced.jpg")
    with (tmp_path / "written into.jpg").open("r+b") as handle:
        handle.write(jpeg(1)[:100])
    (tmp_path / "gone.jpg").unlink()
    rows = load_entries(LOCAL, 0, entries, "image", dated=True).to_pylist()
    found = {row["image_id"]: row["error_type"] for row in rows}
    assert found == {
        "same.jpg": None,
        "replaced.jpg": "changed",
        "written into.jpg": "changed",
        "gone.jpg": "missing",
    }


def test_objects_replaced_under_an_etag_that_is_no_md5() -> None:
    """As of an upload in parts: the ETag of the answer is compared."""
    with FaultyS3() as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty_s3, "_etag", lambda data: f'"{hashlib.sha256(data).hexdigest()[:32]}-3"')
        storage = Storage(store.options)
        store.objects |= {f"bucket/in/{name}.jpg": jpeg(1) for name in "ab"}
        entries = list(list_entries(storage, "s3://bucket/in", InputConfig()))
        assert entries[0].stamp is not None
        assert entries[0].stamp.endswith("-3")
        store.objects["bucket/in/b.jpg"] = jpeg(1)[:-1] + b"?"
        rows = load_entries(storage, 0, entries, "image").to_pylist()
        assert [row["error_type"] for row in rows] == [None, "changed"]


@pytest.mark.parametrize("bucket", ["b", "bucket"])  # a bucket of one letter is left to s3fs
def test_objects_replaced_by_others_of_the_same_size(bucket: str) -> None:
    with FaultyS3() as store:
        storage = Storage(store.options)
        store.objects |= {f"{bucket}/in/{name}.jpg": jpeg(1) for name in "abcd"}
        entries = list(list_entries(storage, f"s3://{bucket}/in", InputConfig()))
        load_entries(storage, 0, entries, "image")
        unchanged = store.count("HEAD", "")
        store.objects |= {f"{bucket}/in/{name}.jpg": jpeg(1)[:-1] + b"?" for name in "bd"}
        rows = load_entries(storage, 0, entries, "image").to_pylist()
        assert [row["error_type"] for row in rows] == [None, "changed", None, "changed"]
        assert store.count("HEAD", "") == 2 * unchanged + 2
        # ETags that are no MD5: one look shows it, and the bytes are taken.
        other = [replace(entry, stamp=f"etag {'0' * 32}") for entry in entries]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Storage, "tag", lambda self, uri: "0" * 32)
            rows = load_entries(storage, 0, other, "image").to_pylist()
        assert [row["error_type"] for row in rows] == [None] * 4
