"""Listing: files in the corpus, skipped files and their counts, and one line per error."""

import bz2
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cliper.model.errors import CliperError
from cliper.pipeline.config import InputConfig, JobConfig, ShardConfig
from cliper.pipeline.corpus.left_out import MOST_KINDS, LeftOut
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest, read_manifest, write_manifest
from cliper.pipeline.corpus.sources.entry import Entry, checked_id
from cliper.pipeline.corpus.sources.select import mask_pattern
from cliper.pipeline.errors import InputError, StorageError
from cliper.pipeline.label.job import open_job
from cliper.pipeline.report.run_page import write_run_report
from cliper.pipeline.run.folder import identity_of
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import absolute
from tests.corpus.test_inputs import INPUTS
from tests.corpus.test_tars import listed, loaded, photos, tar
from tests.support.direct import label_directly
from tests.support.fakes import BROKEN, CLASSES, Brightness, jpeg
from tests.support.faulty_s3 import FaultyS3
from tests.support.labeled import rows_of

LOCAL = Storage()


def ids(uri: object, storage: Storage = LOCAL, **config: object) -> list[str]:
    return [entry.image_id for entry in listed(uri, storage, **config)[0]]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(1))
    return folder


# --- folders and globs -------------------------------------------------------------------------------------------


def mixed_folder(folder: Path) -> Path:
    """74 files: 13 good images, 6 broken ones, 40 HEIC, 10 AVIF and 5 without an extension."""
    fill(folder, *(f"good/{i:02d}.jpg" for i in range(13)))
    broken = list(BROKEN.values())
    for i in range(6):
        (folder / f"broken-{i}.png").write_bytes(broken[i % 5])
    for i in range(40):
        (folder / f"phone-{i}.HEIC").write_bytes((INPUTS / "heic.heic").read_bytes())
    for i in range(10):
        (folder / f"web-{i}.avif").write_bytes((INPUTS / "avif.avif").read_bytes())
    for i in range(5):
        (folder / f"{i}f3ab77").write_bytes(jpeg(i))
    return folder


def test_every_file_of_a_mixed_folder_is_labeled_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = str(mixed_folder(tmp_path / "in"))
    job = open_job(corpus, str(tmp_path / "run"), JobConfig(), CLASSES, LOCAL)
    assert job.manifest.images == 69
    assert capsys.readouterr().err == "left out  5 without ending: no ending; --any-name reads them by content\n"
    stored = read_manifest(LOCAL, str(tmp_path / "run"))
    assert stored == job.manifest
    assert stored is not None
    assert stored.left_out.total == 5
    assert len(ids(corpus, any_name=True)) == 74


def test_the_report_lists_skipped_files(tmp_path: Path) -> None:
    corpus = str(mixed_folder(tmp_path / "in"))
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in" / "moving.gif", save_all=True, append_images=frames[1:])
    run = label_directly(corpus, str(tmp_path / "run"), JobConfig(), CLASSES, Brightness)
    statuses = Counter(row["status"] for row in rows_of(run))
    assert statuses == {"ok": 64, "failed": 6}
    write_run_report(run, str(tmp_path / "report.html"), 1000)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Left out of the corpus" in page
    assert "<li>5 without ending: no ending; --any-name reads them by content" in page
    assert "<li>pages or frames behind the labeled one: 1 files, for example moving.gif" in page


def test_older_manifests_can_be_read(tmp_path: Path) -> None:
    old = pa.schema([pa.field(n, pa.string()) for n in ("image_id", "uri")])
    old = pa.schema(
        [*old, *(pa.field(n, pa.int64()) for n in ("bytes", "offset", "row")), pa.field("shard", pa.int32())]
    )
    (tmp_path / "manifest").mkdir()
    row = {"image_id": "a", "uri": "/a.jpg", "bytes": 7, "shard": 0}
    pq.write_table(pa.Table.from_pylist([row], old), tmp_path / "manifest/part-00000.parquet")
    part = {"file": "part-00000.parquet", "first_shard": 0, "images": [1]}
    (tmp_path / "manifest/index.json").write_text(json.dumps({"parts": [part]}))
    manifest = read_manifest(LOCAL, str(tmp_path))
    assert isinstance(manifest, Manifest)
    assert manifest.left_out == LeftOut()
    assert manifest.read_shard(LOCAL, str(tmp_path), 0) == [Entry("a", "/a.jpg", 7)]


def test_unused_settings_do_not_change_a_runs_identity() -> None:
    identity = identity_of(JobConfig(), CLASSES, "in", {})
    assert identity["input"] == {
        "format": "auto",
        "id_column": "image_id",
        "uri_column": "uri",
        "image_column": "image",
    }
    used = JobConfig(input=InputConfig(exclude=("*.png",)))
    assert identity_of(used, CLASSES, "in", {})["input"]["exclude"] == ["*.png"]


SYSTEM = ["._a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/thumb.jpg", "__MACOSX/a.jpg", ".Trash-1000/a.jpg"]
SYSTEM += [".thumbnails/a.png", "Thumbs.db", "sub/._a.jpg", ".DS_Store"]


def test_system_copies_are_skipped_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", *SYSTEM)
    entries, left_out = listed(tmp_path)
    assert [entry.image_id for entry in entries] == ["a.jpg"]
    assert left_out.total == len(SYSTEM)
    assert {reason for _, reason in left_out.counts} == {"a system's or tool's copy"}


def test_an_empty_corpus_lists_the_skipped_files(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.parquet", "b.parquet", "notes.txt", "x.dng")
    with pytest.raises(InputError) as caught:
        open_job(str(tmp_path / "in"), str(tmp_path / "run"), JobConfig(), CLASSES, LOCAL)
    for words in (
        "no images found in",
        "2 .parquet: a Parquet file; --format parquet",
        "1 .txt",
        "1 .dng: camera raw",
    ):
        assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_links_are_followed_but_circles_are_not(tmp_path: Path) -> None:
    fill(tmp_path, "in/a.jpg", "elsewhere/deep/b.jpg", "elsewhere/c.jpg")
    (tmp_path / "in/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/file.jpg").symlink_to(tmp_path / "elsewhere/c.jpg")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/self.jpg").symlink_to("self.jpg")
    (tmp_path / "in/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    entries, left_out = listed(tmp_path / "in")
    expected = ["a.jpg", "file.jpg", "folder/c.jpg", "folder/deep/b.jpg"]
    assert [entry.image_id for entry in entries] == expected
    assert ids(f"{tmp_path}/in/**/*.jpg") == expected
    assert ids(f"{tmp_path}/in/*.jpg") == ["a.jpg", "file.jpg"]
    reasons = Counter(reason.partition(" (")[0] for _, reason in left_out.counts.elements())
    assert reasons == {"a broken link": 2, "a link to a folder it is in": 1, "not a regular file": 1}


def test_names_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg")).write_bytes(jpeg(1))
    entries, left_out = listed(tmp_path)
    assert [entry.image_id for entry in entries] == ["a.jpg"]
    assert left_out.counts == {(".jpg", "the name is not UTF-8; rename the file"): 1}
    write_manifest(entries, LOCAL, str(tmp_path / "run"), ShardConfig(), left_out=left_out)


@pytest.mark.parametrize("name", ["a[1].jpg", "what?.jpg", "st*r.jpg", "{a,b}.jpg", "a::b.jpg", "{1..3}.jpg"])
def test_magic_in_names_that_exist_is_literal(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "in [1] {x,y} ::z", name, "other.jpg")
    assert ids(folder / name) == [name]
    assert loaded(listed(folder / name)[0]) == {name: jpeg(1)}
    assert ids(folder) == sorted([name, "other.jpg"])
    assert ids(f"{folder}/*.jpg") == sorted([name, "other.jpg"])
    with FaultyS3() as server:
        server.objects[f"b/in/{name}"] = jpeg(1)
        assert ids(f"s3://b/in/{name}", Storage(server.options)) == [name]


def test_include_and_exclude(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "masks/a.png", "x/masks/b.png", "x/c.jpg", "x/c.mask.png")
    assert ids(tmp_path, exclude=["**/masks/**", "*.mask.png"]) == ["a.jpg", "x/c.jpg"]
    assert ids(tmp_path, include=["x/**"]) == ["x/c.jpg", "x/c.mask.png", "x/masks/b.png"]
    assert ids(tmp_path, include=["*.jpg"], exclude=["x/*"]) == ["a.jpg"]
    _, left_out = listed(tmp_path, include=["*.jpg"])
    assert left_out.counts == {(".png", "not matched by --include"): 3}
    _, left_out = listed(tmp_path)
    assert set(left_out.lookalikes) == {"**/masks/**", "*.mask.png"}
    assert ids(tmp_path, exclude=list(left_out.lookalikes)) == ["a.jpg", "x/c.jpg"]


@pytest.mark.parametrize(
    "name", ["photo.jpg", "unmasked/a.jpg", "mask.jpg", "segway/a.png", "the_mask_of_zorro.jpg"]
)
def test_ordinary_names_do_not_look_like_masks(name: str) -> None:
    assert mask_pattern(name) is None


def test_counts_stay_small_and_add_up() -> None:
    left_out, total = LeftOut(), LeftOut()
    for i in range(MOST_KINDS * 3):
        left_out.skip(f"a.{i}", "unknown")
    total.add(left_out)
    total.add(left_out)
    assert total.total == 6 * MOST_KINDS
    assert len(total.counts) <= MOST_KINDS + 1
    assert LeftOut.from_json(json.loads(json.dumps(total.to_json()))) == total


def test_a_single_s3_object(tmp_path: Path) -> None:
    with FaultyS3() as server:
        server.objects |= {
            "b/dir/a.jpg": jpeg(1),
            "b/dir/a.tar": tar(photos(2)),
            "b/hash": jpeg(2),
            "b/dir/._x.jpg": b"",
        }
        storage = Storage(server.options)
        assert ids("s3://b/dir/a.jpg", storage) == ["a.jpg"]
        assert ids("S3://b/dir", storage) == ids("s3a://b/dir", storage) == ["a.jpg"]
        assert ids("s3://b/hash", storage) == ["hash"]
        assert ids("s3://b/dir/a.tar", storage) == ["a/000.jpg", "a/001.jpg"]
        with pytest.raises(InputError, match="s3://b/none.jpg does not exist"):
            ids("s3://b/none.jpg", storage)


# --- schemes and the boundary ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://bucket/x", "pip install gcsfs"),
        ("az://c/x", "pip install adlfs"),
        ("abfs://c/x", "pip install adlfs"),
        ("nope://x/y", "nope:// is not read"),
        ("http://127.0.0.1:9/x.csv", "does not exist or its server does not answer"),
        ("~/no such folder", f"{Path.home()}/no such folder does not exist"),
        ("/dev/null/x", "does not exist"),
        ("/dev/zero", "neither a file nor a folder"),
        ("a\0b", "cannot be listed|cannot be opened|does not exist"),
        ("{1..3}.jpg", "1.jpg does not exist"),
        ("memory://no/thing", "does not exist"),
    ],
)
def test_inputs_that_cannot_be_opened_are_one_line(uri: str, words: str) -> None:
    with pytest.raises((InputError, StorageError), match=words) as caught:
        ids(uri)
    assert "\n" not in str(caught.value)


def test_uris_are_normalized() -> None:
    assert absolute("S3A://Bucket/Key") == "s3://Bucket/Key"
    assert absolute("~/x") == f"{Path.home()}/x"
    assert absolute("GS://b/k") == "gs://b/k"


def test_an_unknown_scheme_in_a_list_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"gs://b/a.jpg\nnope://x/b.jpg\n{fill(tmp_path, 'c.jpg')}/c.jpg\n")
    rows = load_entries(LOCAL, 0, listed(tmp_path / "list.txt")[0], "image").to_pylist()
    assert [row["error_type"] for row in rows] == ["unreadable", "unreadable", None]
    assert "pip install gcsfs" in rows[0]["error_message"]


def test_a_run_that_cannot_be_listed_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"uri\na.jpg\n\xff\xfe\n")
    with pytest.raises(CliperError, match="UTF-8"):
        open_job(str(tmp_path / "bad.csv"), str(tmp_path / "run"), JobConfig(), CLASSES, LOCAL)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


# --- ids and lists -----------------------------------------------------------------------------------------------


def write_parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_integer_ids_are_ids_and_zero_too() -> None:
    assert ids(INPUTS / "int0.parquet") == ["0", "1"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image_id": [1.0, 2.0], "uri": ["a", "b"]}, "'image_id' is double; ids are text or whole numbers"),
        ({"image_id": [b"a", b"b"], "uri": ["a", "b"]}, "'image_id' is binary"),
        ({"image_id": [None, "b"], "uri": ["a", "b"]}, "row 0: the image id is missing"),
        ({"image_id": ["a", " "], "uri": ["a", "b"]}, "row 1: the image id is ' '"),
        ({"image_id": [["a"], ["b"]], "uri": ["a", "b"]}, "'image_id' is list"),
        ({"uri": [1, 2]}, "'uri' is int64; URIs are text"),
        ({"uri": [["a"], ["b"]]}, "'uri' is list"),
        ({"uri": ["a", None]}, "row 1: the URI is None"),
    ],
)
def test_wrong_columns_are_refused_at_listing(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ids(write_parquet(tmp_path / "a.parquet", **columns))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("bin.parquet", {}, "'uri' is binary; URIs are text"),
        ("b64.parquet", {"format": "parquet"}, "'image' is text; decode base64"),
        ("b64.parquet", {}, "no column 'uri'; it has: image. Name it: --uri-column"),
        ("defaultfmt_auto.parquet", {}, "--format parquet --image-column image"),
        (
            "defaultfmt_auto.parquet",
            {"format": "parquet", "image_column": "picture"},
            "no column 'picture'.*--image-column",
        ),
        ("int0.parquet", {"format": "parquet", "image_column": "image_id"}, "'image_id' is int64"),
    ],
)
def test_parquet_files_of_another_form_name_the_option(name: str, config: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ids(INPUTS / name, **config)


def test_structs_without_bytes_read_their_path(tmp_path: Path) -> None:
    fill(tmp_path, "x.jpg")
    (tmp_path / "a.parquet").write_bytes((INPUTS / "bytesnull_pathset.parquet").read_bytes())
    rows = load_entries(LOCAL, 0, listed(tmp_path / "a.parquet", format="parquet")[0], "image").to_pylist()
    assert [row["error_type"] for row in rows][1:] == [None, None, "missing"]
    assert rows[0]["error_type"] in ("missing", "unreadable")  # a path of another machine
    assert rows[1]["data"] == jpeg(1)
    assert rows[3]["error_message"] == "the row holds no image: null"


def test_images_of_the_default_features_are_read() -> None:
    entries, _ = listed(INPUTS / "defaultfmt_auto.parquet", format="parquet")
    assert all(data for data in loaded(entries).values())


@pytest.mark.parametrize("value", [0, 7, "a", "é/ü", 2**63])
def test_valid_ids(value: object) -> None:
    assert checked_id(value, "here") == str(value)


@pytest.mark.parametrize("value", [None, True, 1.5, b"a", "", "  ", "a\0b", "x" * 5000, "\udcff", ["a"], {}])
def test_invalid_ids(value: object) -> None:
    with pytest.raises(InputError, match="^here: the image id"):
        checked_id(value, "here")


LISTS = {
    "a.csv": "image_id,uri\n0,x.jpg\nb,y.jpg\n",
    "a.TSV": "uri\timage_id\nx.jpg\t0\ny.jpg\tb\n",
    "a.jsonl": '{"image_id": 0, "uri": "x.jpg"}\n\n{"image_id": "b", "uri": "y.jpg"}\n',
    "a.json": '[{"image_id": 0, "uri": "x.jpg"}, {"image_id": "b", "uri": "y.jpg"}]',
}


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("name", list(LISTS))
def test_text_lists_plain_and_compressed(tmp_path: Path, name: str, pack: str) -> None:
    fill(tmp_path, "x.jpg", "y.jpg")
    data = LISTS[name].encode()
    packed = {"": data, ".gz": gzip.compress(data), ".bz2": bz2.compress(data)}[pack]
    (tmp_path / (name + pack)).write_bytes(packed)
    entries, _ = listed(tmp_path / (name + pack))
    assert [entry.image_id for entry in entries] == ["0", "b"]
    assert all(loaded(entries).values())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"uri": "x.jpg"}\n{"url": "y.jpg"}\n', "line 2 has no column 'uri'; it has: url"),
        ("a.jsonl", "{nope\n", "line 1 is not JSON"),
        ("a.json", '{"uri": "x"}', "is not a list, but a JSON dict"),
        ("a.csv", "uri,image_id\nx.jpg\n", "line 2 has not as many values"),
        ("a.csv", "uri,image_id\nx.jpg,\n", "line 2: the image id is ''"),
        ("a.csv", "uri\nx,y.jpg\n", "line 2 has not as many values"),
        ("a.csv.gz", "not gzip", "cannot be read to its end"),
    ],
)
def test_wrong_text_lists_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        ids(tmp_path / name)


def test_folders_of_lists(tmp_path: Path) -> None:
    fill(tmp_path, "x.jpg")
    write_parquet(tmp_path / "0.parquet", uri=["x.jpg"], image_id=["a"])
    write_parquet(tmp_path / "1.PARQUET", uri=["x.jpg"], image_id=["b"])
    (tmp_path / "._0.parquet").write_bytes(b"junk")
    entries, left_out = listed(tmp_path, format="list")
    assert [entry.image_id for entry in entries] == ["a", "b"]
    assert all(loaded(entries).values())
    assert left_out.total == 2


def test_duplicate_ids_of_a_list_name_the_column(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(InputError, match=r"'a.jpg' occurs twice: .*--id-column.*remove one"):
        write_manifest(listed(tmp_path / "list.txt")[0], LOCAL, str(tmp_path / "run"), ShardConfig())
    doubled = write_parquet(tmp_path / "a.parquet", image=[b"a", b"b"], image_id=["x", "x"])
    with pytest.raises(InputError, match=r"a.parquet, row 0 and .*a.parquet, row 1; give every row another value"):
        write_manifest(listed(doubled, format="parquet")[0], LOCAL, str(tmp_path / "run"), ShardConfig())


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=2000),
    name=st.sampled_from(["a.tar", "a.parquet", "a.json", "a.jsonl", "a.tsv", "a.csv.gz"]),
)
def test_random_bytes_are_one_line(data: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    try:
        listed(path)
    except CliperError as error:
        assert str(path) in str(error)
