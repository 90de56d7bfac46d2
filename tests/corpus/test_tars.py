"""Tars: every image in them is listed, or the tar is named."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from cliper.pipeline.config import InputConfig, ShardConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage
from tests.corpus.test_inputs import INPUTS
from tests.support.fakes import jpeg
from tests.support.faulty_s3 import FaultyS3
from tests.support.labeled import label_small, rows_of

LOCAL = Storage()


def listed(uri: object, storage: Storage = LOCAL, **config: object) -> tuple[list[Entry], LeftOut]:
    left_out = LeftOut()
    return list(list_entries(storage, str(uri), InputConfig.model_validate(config), left_out)), left_out


def tar(members: Sequence[tuple[str, bytes | str]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, content), or (name, "-> target") for a symbolic and (name, "=> target") for a hard link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                info.linkname = content[3:]
                archive.addfile(info)
                continue
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def photos(count: int, size: int = 3000) -> list[tuple[str, bytes | str]]:
    return [(f"{i:03d}.jpg", jpeg(i) + bytes(size)) for i in range(count)]


def loaded(entries: Sequence[Entry], storage: Storage = LOCAL) -> dict[str, bytes]:
    rows = load_entries(storage, 0, entries, "image").to_pylist()
    return {row["image_id"]: row["data"] for row in rows}


def test_a_damaged_tar_stops_the_run_by_name_and_byte() -> None:
    with pytest.raises(
        InputError, match=r"badhdr2\.tar is damaged at byte 1536 .*images found before it: 1.*--skip"
    ):
        listed(INPUTS / "badhdr2.tar")


def test_a_damaged_tar_is_counted_with_skip_damaged(tmp_path: Path) -> None:
    entries, left_out = listed(INPUTS / "badhdr2.tar", skip_damaged=True)
    assert [entry.image_id for entry in entries] == ["badhdr2/0.jpg"]
    assert left_out.counts == {(".tar", "damaged: what follows the damage is lost"): 1}
    assert "damaged at byte 1536" in left_out.notes[0]
    manifest = write_manifest(entries, LOCAL, str(tmp_path), ShardConfig(), left_out=left_out)
    assert manifest.left_out.total == 1


@pytest.mark.parametrize("remote", [False, True])
def test_a_cut_inside_a_member_is_that_members_row(tmp_path: Path, remote: bool) -> None:
    data = (INPUTS / "trunc_mid_member.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data)
    with FaultyS3() as server:
        server.objects["b/t.tar"] = data
        uri, storage = ("s3://b/t.tar", Storage(server.options)) if remote else (str(tmp_path / "t.tar"), LOCAL)
        entries, left_out = listed(uri, storage)
        assert [entry.image_id for entry in entries] == ["t/0.jpg", "t/1.jpg", "t/2.jpg"]
        assert "cut off at byte 3884, inside 2.jpg" in left_out.notes[0]
        rows = rows_of(label_small(uri, tmp_path / "run", storage))
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert (rows[2]["error_type"], rows[2]["error_message"]) == (
        "truncated",
        "the tar ends inside this member: 300 of 898 bytes",
    )


WHOLE = tar(photos(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[: 3 * 5 * 1024], "ends without an end-of-archive mark|unexpected end of data"),
        (tar([*photos(1), ("a.json", b"{}" * 3000)])[:9000], "ends inside a.json"),
        (WHOLE[:-10240] + b"rubbish" * 1000, "not the end of the archive|unexpected end|without an end"),
        (WHOLE + tar(photos(1))[7:], "no valid header"),
        (b"\x1f\x8b not a tar" * 100, "is not an uncompressed tar"),
        (b"", "is not an uncompressed tar"),
    ],
)
def test_a_tar_needs_a_proper_end(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(InputError, match=message):
        listed(tmp_path / "t.tar")
    listed(tmp_path / "t.tar", skip_damaged=True)


def test_every_cut_of_a_tar_is_an_error_or_all_images(tmp_path: Path) -> None:
    members = photos(3, 100)
    whole = tar(members)
    for size in range(0, len(whole), 256):
        (tmp_path / "t.tar").write_bytes(whole[:size])
        try:
            entries, left_out = listed(tmp_path / "t.tar")
        except InputError:
            continue
        assert len(entries) == 3 or left_out.notes


def test_concatenated_tars_are_one(tmp_path: Path) -> None:
    members = photos(4)
    (tmp_path / "t.tar").write_bytes(tar(members[:2]) + tar(members[2:]))
    entries, _ = listed(tmp_path / "t.tar")
    assert loaded(entries) == {f"t/{name}": data for name, data in members}


def test_links_in_a_tar_are_their_targets(tmp_path: Path) -> None:
    photo = jpeg(1)
    members = [("s.jpg", "-> in/a.jpg"), ("in/a.jpg", photo), ("h.jpg", "=> in/a.jpg"), ("in/t.jpg", "-> a.jpg")]
    (tmp_path / "t.tar").write_bytes(tar([*members, ("no.jpg", "-> gone.jpg")]))
    entries, left_out = listed(tmp_path / "t.tar")
    assert loaded(entries) == dict.fromkeys(("t/s.jpg", "t/in/a.jpg", "t/h.jpg", "t/in/t.jpg"), photo)
    assert left_out.counts == {(".jpg", "a link to nothing in the tar"): 1}


def test_sparse_members_are_skipped_and_counted(tmp_path: Path) -> None:
    header = tarfile.TarInfo("hole.jpg")
    header.size = 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[483:495] = b"%011o\0" % 4096  # its real size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "t.tar").write_bytes(bytes(block) + bytes(512) + tar(photos(1)))
    entries, left_out = listed(tmp_path / "t.tar")
    assert [entry.image_id for entry in entries] == ["t/000.jpg"]
    assert left_out.counts == {(".jpg", "a sparse member; pack it without --sparse"): 1}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_headers_are_read_remotely(kind: int) -> None:
    members = [(f"{'é' * 120}/{i}.jpg", jpeg(i) + bytes(5000 * i)) for i in range(6)]
    with FaultyS3() as server:
        server.objects["b/t.tar"] = tar(members, kind)
        entries, _ = listed("s3://b/t.tar", Storage(server.options))
        assert loaded(entries, Storage(server.options)) == {f"t/{name}": data for name, data in members}


def test_masks_in_a_tar_are_reported_and_can_be_excluded() -> None:
    entries, left_out = listed(INPUTS / "seg.tar")
    assert len(entries) == 4
    [_, notice] = left_out.lines()
    assert "look like masks, among the images to label: 3" in notice
    assert "--exclude '*.seg.png'" in notice
    patterns = ["*.seg.png", "*.mask.png", "*.depth.png"]
    entries, left_out = listed(INPUTS / "seg.tar", exclude=patterns)
    assert [entry.image_id for entry in entries] == ["seg/000.jpg"]
    assert left_out.counts[".png", "matched by --exclude"] == 3
    assert [e.image_id for e in listed(INPUTS / "seg.tar", include=["*.jpg"])[0]] == ["seg/000.jpg"]


def test_doubled_members_are_refused_with_both_places(tmp_path: Path) -> None:
    entries, _ = listed(INPUTS / "dup.tar")
    with pytest.raises(
        InputError, match=r"'dup/000.jpg' occurs twice: .*byte 512 and .*byte 2048; members of one tar"
    ):
        write_manifest(entries, LOCAL, str(tmp_path), ShardConfig())


def test_tars_in_a_folder_with_any_extension(tmp_path: Path) -> None:
    for name in ("a.tar", "b.TAR", "._a.tar", "c.tar.gz"):
        (tmp_path / name).write_bytes(tar(photos(1)) if name[0] in "ab" else b"junk")
    entries, left_out = listed(tmp_path, format="tar")
    assert [entry.image_id for entry in entries] == ["a/000.jpg", "b/000.jpg"]
    assert left_out.counts == {
        (".tar", "a system's or tool's copy"): 1,
        (".gz", "not a tar (.tar)"): 1,
    }


def test_brace_ranges(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i:05d}.tar").write_bytes(tar(photos(1)))
    entries, _ = listed(f"{tmp_path}/{{00000..00001}}.tar")
    assert [entry.image_id for entry in entries] == ["00000/000.jpg", "00001/000.jpg"]
    with pytest.raises(InputError, match=r"00003.tar does not exist"):
        listed(f"{tmp_path}/{{00000..00003}}.tar")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.zip", "x.arrow", "x.tfrecord", "x.jpg.gz"])
def test_refused_archives_explain_the_conversion(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="is not read.*(unpack|convert|write)"):
        listed(tmp_path / name)
