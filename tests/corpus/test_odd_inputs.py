"""Inputs that a user may have by accident: each is labeled right, or named in one line."""

import json
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from cliper.model.errors import CliperError
from cliper.pipeline.config import InputConfig, JobConfig
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.errors import ImageError, InputError, RunError, StorageError
from cliper.pipeline.label.job import notice_of_new, open_job
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import CLASSES, jpeg
from tests.support.faulty_s3 import FaultyS3

LOCAL = Storage()


def ids(uri: str | Path, **settings: str) -> list[str]:
    config = InputConfig.model_validate(settings)
    return [entry.image_id for entry in list_entries(LOCAL, str(uri), config)]


def fill(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))
    return folder


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "uri,uri\na.jpg,b.jpg\n", "has 2 columns called 'uri'"),
        ("a.csv", "image_id,uri,image_id\n1,a.jpg,2\n", "has 2 columns called 'image_id'"),
        ("a.jsonl", '{"uri": "a.jpg", "uri": "b.jpg"}\n', "'uri' occurs twice in one object"),
        ("a.csv", 'uri\n"a.jpg\nb.jpg\n', "cannot be read: unexpected end of data; is a quote open"),
        ("a.csv", 'uri\n"a.jpg\nb.jpg\n"c.jpg\n', "cannot be read: .* expected after .*; is a quote open"),
        ("a.csv", "", "has no line that names the columns; it must begin with 'uri'"),
        ("a.tsv", "\n\n", "has no line that names the columns"),
        ("a.csv", "image_id;uri\nx;a.jpg\n", "its columns are divided by ';', not by ','"),
        ("a.tsv", "image_id,uri\nx,a.jpg\n", r"its columns are divided by ',', not by '\\t'"),
        ("a.csv", "a.jpg\nb.jpg\n", "the first line names no columns, but is a.jpg; .* call a list .* .txt"),
        ("a.txt", "a\0.jpg\n", "an id has 1 to 4096 characters, none of them null"),
    ],
)
def test_lists_that_would_be_misread_are_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        ids(tmp_path / name)


def test_lists_in_utf_16_name_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("uri\na.jpg\n".encode("utf-16"))
    with pytest.raises(InputError, match="it is UTF-16: iconv -f UTF-16 -t UTF-8"):
        ids(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text", ["image_id, uri\nx, a.jpg\n", 'image_id , "uri"\n"x", "a.jpg"\n', "\ufeffimage_id,uri\r\nx,a.jpg\r\n"]
)
def test_spaces_and_quotes_around_values_are_no_part_of_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    [entry] = list_entries(LOCAL, str(tmp_path / "a.csv"), InputConfig())
    assert (entry.image_id, entry.uri) == ("x", str(tmp_path / "a.jpg"))


def test_columns_that_occur_twice_in_parquet_are_refused(tmp_path: Path) -> None:
    names = pa.table([pa.array(["a.jpg"]), pa.array(["b.jpg"])], names=["uri", "uri"])
    images = pa.table([pa.array([b"a"]), pa.array([b"b"])], names=["image", "image"])
    pq.write_table(names, tmp_path / "names.parquet")
    pq.write_table(images, tmp_path / "images.parquet")
    with pytest.raises(InputError, match="has 2 columns called 'uri'"):
        ids(tmp_path / "names.parquet")
    with pytest.raises(InputError, match="has 2 columns called 'image'"):
        ids(tmp_path / "images.parquet", format="parquet")


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.csv", "uri\n"), ("a.json", "[]")])
def test_a_list_without_rows_is_called_so(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"no images found in .*{name}; .*{name} has no rows"):
        open_job(str(tmp_path / name), str(tmp_path / "run"), JobConfig(), CLASSES, LOCAL)


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_input_or_output_is_not_the_current_folder(blank: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the input is empty"):
        ids(blank)
    with pytest.raises(RunError, match="the output is empty"):
        open_job(str(fill(tmp_path, "a.jpg")), blank, JobConfig(), CLASSES, LOCAL)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "names no bucket"),
        ("https://", "names no server"),
        ("http://x.test/photos/", "names no file"),
    ],
)
def test_addresses_of_nothing_are_refused(uri: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ids(uri)


@pytest.mark.parametrize("pattern", ["", "/**", "/*.jpg"])
def test_pictures_in_the_runs_own_folder_are_not_images_of_the_corpus(pattern: str, tmp_path: Path) -> None:
    corpus, output = f"{fill(tmp_path, 'a.jpg')}{pattern}", tmp_path / "ru[n] 1"
    open_job(corpus, str(output), JobConfig(), CLASSES, LOCAL)
    fill(output, "heatmaps/a.jpg/001-cat.png")
    again = open_job(corpus, str(output), JobConfig(), CLASSES, LOCAL, extend=())
    assert again.manifest.images == 1
    assert notice_of_new(again, corpus) is None


def test_a_prefix_that_begins_another_is_not_mixed_with_it() -> None:
    with FaultyS3() as store:
        store.objects |= {"b/photos/a.jpg": jpeg(1), "b/photos2/b.jpg": jpeg(2), "b/photos": b""}
        found = list_entries(Storage(store.options), "s3://b/photos", InputConfig())
        assert [entry.uri for entry in found] == ["s3://b/photos/a.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nothing can be created")
def test_an_output_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    corpus = str(fill(tmp_path / "in", "a.jpg"))
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for output in ("/proc/x", f"{tmp_path}/file", f"{tmp_path}/file/run", f"{tmp_path}/nowhere", "/dev/null"):
        with pytest.raises(StorageError, match=f"cannot access {output}"):
            open_job(corpus, output, JobConfig(), CLASSES, LOCAL)


def test_unusual_names_are_labeled_under_them(tmp_path: Path) -> None:
    names = ["a\nb.jpg", "😀.jpg", "100%.jpg", "a%20b.jpg", "a#b.jpg", "a?b.jpg", " a.jpg", "a\\b.jpg", "-a.jpg"]
    names += ["e\u0301.jpg", "\u00e9.jpg", "::.jpg", "~.jpg", "$HOME.jpg", "x" * 250 + ".jpg", ".hidden.jpg"]
    fill(tmp_path, *names)
    entries = list(list_entries(LOCAL, str(tmp_path), InputConfig()))
    assert sorted(entry.image_id for entry in entries) == sorted(names)
    read = LOCAL.read_many([entry.uri for entry in entries], [None] * len(entries))
    assert {entry.image_id: data for entry, data in zip(entries, read, strict=True)} == {
        name: jpeg(seed) for seed, name in enumerate(names)
    }


def test_a_pointer_of_git_lfs_is_called_one() -> None:
    with pytest.raises(ImageError, match="a Git LFS pointer, not the file: git lfs pull"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n", 10**6)


def pack_tar(path: Path, image: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(image, "a.jpg")


def command_in(uri: Path) -> str:
    with pytest.raises(CliperError) as caught:
        ids(uri)
    message = str(caught.value)
    assert "\n" not in message
    command = message.partition(" it: ")[2].partition("; then")[0]
    return command.replace("python -", f"{shlex.quote(sys.executable)} -")


def test_the_commands_that_convert_refused_files_work(tmp_path: Path) -> None:
    image = fill(tmp_path, "a.jpg") / "a.jpg"
    pack_tar(tmp_path / "x y.tar.gz", image, "w:gz")
    pack_tar(tmp_path / "two.tgz", image, "w:gz")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.write(image, "a.jpg")
    pyarrow.feather.write_feather(pa.table({"image": [jpeg(1)]}), str(tmp_path / "f.feather"))
    for name in ("x y.tar.gz", "two.tgz", "zipped.zip", "f.feather"):
        subprocess.run(command_in(tmp_path / name), shell=True, check=True, capture_output=True)
    assert ids(tmp_path / "x y.tar") == ["x y/a.jpg"]
    assert ids(tmp_path / "two.tar") == ["two/a.jpg"]
    assert ids(tmp_path / "zipped") == ["a.jpg"]
    assert ids(tmp_path / "f.parquet", format="parquet") == ["f/0"]


def test_a_folder_of_save_to_disk_names_its_conversion(tmp_path: Path) -> None:
    """`datasets` 5.2 carries this command out; importing it here would take longer than all other tests."""
    fill(tmp_path / "one", "data-00000-of-00001.arrow", "state.json")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for name, folder, rest in (("one", "one", ""), ("splits", "splits/train", "; its splits are train, test")):
        with pytest.raises(InputError) as caught:
            open_job(str(tmp_path / name), str(tmp_path / "run"), JobConfig(), CLASSES, LOCAL)
        path = f"{tmp_path}/{folder}"
        assert f'load_from_disk(sys.argv[1]).to_parquet(sys.argv[2])" {path} {path}.parquet' in str(caught.value)
        assert str(caught.value).endswith(f"then --input {path}.parquet --format parquet{rest}")


@pytest.mark.parametrize("name", ["x.tar.zst", "x.7z", "x.rar", "x.tfrecord", "x.h5", "x.jpg.gz", "x.ARROW"])
def test_other_containers_are_refused_with_a_way(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not read[,;].*(unpack it: |convert it: |write its images)"):
        ids(tmp_path / name)


def test_links_that_lead_nowhere_or_in_circles_are_counted_or_named(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.jpg")
    for name, target in (("self", "self"), ("gone.jpg", "nowhere"), ("back", ".")):
        (tmp_path / "in" / name).symlink_to(target)
    assert ids(tmp_path / "in") == ["a.jpg"]
    for name in ("self", "gone.jpg"):
        with pytest.raises(InputError, match="cannot be opened: "):
            ids(tmp_path / "in" / name)
