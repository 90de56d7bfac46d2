import subprocess
import sys
from pathlib import Path

import pytest

from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.storage.backend import Storage


def begin(folder: Path, driver: str) -> Attempts:
    return Attempts.begin(Storage(), str(folder), 0, driver)


def test_an_image_with_two_deaths_under_one_driver_is_poison(tmp_path: Path) -> None:
    for _ in range(2):
        begin(tmp_path, "one").note("a.jpg")
    third = begin(tmp_path, "one")
    assert third.careful
    assert third.is_poison("a.jpg")
    assert not third.is_poison("b.jpg")


def test_deaths_of_drivers_are_not_counted(tmp_path: Path) -> None:
    for n in range(25):
        attempts = begin(tmp_path, f"driver {n}")
        assert (attempts.starts, attempts.careful, attempts.is_poison("a.jpg")) == (1, False, False)
        attempts.note("a.jpg")


def test_poison_is_remembered_after_its_driver_ends(tmp_path: Path) -> None:
    for _ in range(2):
        begin(tmp_path, "one").note("a.jpg")
    begin(tmp_path, "one").note("b.jpg")  # killed with its driver
    other = begin(tmp_path, "two")
    assert other.careful
    assert other.is_poison("a.jpg")
    assert other.deaths["b.jpg"] == 0


def run_watched(seconds: float, body: str) -> subprocess.CompletedProcess[str]:
    imports = "import time\nfrom cliper.pipeline.run.attempts import HungWatch\n"
    code = f"{imports}with HungWatch({seconds}) as watch:\n    {body}\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_a_hung_process_ends_with_a_traceback() -> None:
    done = run_watched(0.3, "time.sleep(300)")
    assert done.returncode == 1
    assert 'File "<string>", line 4' in done.stderr


def test_progress_keeps_a_process_alive() -> None:
    done = run_watched(3, "[(time.sleep(0.8), watch.progress()) for _ in range(5)]")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"starts": 1, "deaths": 3}'])
def test_a_torn_file_is_a_first_attempt(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "attempts" / "shard-000000.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert begin(tmp_path, "one").starts == 1
