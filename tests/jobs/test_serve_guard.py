"""`cliper serve` reads what was uploaded to it and answers its own page; nothing else, and nothing blocks it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cliper.jobs.serve_guard import OwnPageOnly, read_upload
from cliper.pipeline.errors import ImageError


async def _unused(*_: Any) -> None:
    raise AssertionError


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"photo")
    return folder


def test_an_upload_is_read(uploads: Path) -> None:
    assert read_upload(str(uploads / "photo.jpg"), [uploads]) == b"photo"


def hostile_paths(uploads: Path) -> Sequence[str]:
    (uploads.parent / "secret").write_bytes(b"secret")
    (uploads / "link.jpg").symlink_to(uploads.parent / "secret")
    os.mkfifo(uploads / "fifo.jpg")
    inside = [str(uploads / name) for name in ("link.jpg", "fifo.jpg", "../secret", "none.jpg", ".")]
    return [*inside, "/etc/passwd", "/dev/zero", "/proc/self/environ", "", "\0", "x" * 5000, "uploads/photo.jpg"]


def test_nothing_else_is_read_and_every_refusal_is_alike(uploads: Path) -> None:
    said = set()
    for path in hostile_paths(uploads):
        with pytest.raises(ImageError) as raised:
            read_upload(path, [uploads])
        said.add(str(raised.value))
    assert said == {"this is not an uploaded image; choose it again"}


def test_size_is_bounded(uploads: Path) -> None:
    with pytest.raises(ImageError, match="more than 0 MB"):
        read_upload(str(uploads / "photo.jpg"), [uploads], most=4)


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("127.0.0.1:7860", None, True),
        ("localhost:7860", "http://localhost:7860", True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("gpu-box:7860", "http://gpu-box:7860", True),
        ("GPU-BOX:7860", "https://gpu-box:7860", True),
        ("10.0.0.7:7860", "http://10.0.0.7:7860", True),
        ("evil.example:7860", "http://evil.example:7860", False),
        ("127.0.0.1:7860", "http://evil.example", False),
        ("127.0.0.1:7860", "http://127.0.0.1:8888", False),
        ("127.0.0.1:7860", "null", False),
        ("", None, False),
        (None, None, False),
    ],
)
def test_only_the_page_itself_is_answered(host: str | None, origin: str | None, allowed: bool) -> None:
    assert OwnPageOnly(_unused, ["gpu-box"]).allows(host, origin) is allowed
