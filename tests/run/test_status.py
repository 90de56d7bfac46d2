"""The status of runs that are listed, half done, running, done or damaged; on disk and on S3."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.jobs.status import describe
from cliper.pipeline.config import JobConfig
from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.run.folder import Run, begin_run, identity_of
from cliper.pipeline.run.lease import Holder, hold
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.run.status import read_status, recent_rate
from cliper.pipeline.storage.backend import Storage
from tests.conftest import S3Server
from tests.support.fakes import CLASSES, write_corpus
from tests.support.labeled import label_small

IMAGES, SHARDS = 45, 6  # 8 a shard, the last has 5; 5 broken ones come first


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", IMAGES, broken_each=1)
    return tmp_path / "corpus"


def dated(run: Run, seconds: dict[int, float]) -> None:
    """Pretend that each shard was written at that time."""
    for shard, time in seconds.items():
        os.utime(Path(run.uri, shard_file(shard)), (time, time))


def test_a_run_that_stopped_half_way(corpus: Path, tmp_path: Path) -> None:
    run = label_small(corpus, tmp_path / "run", shards=[0, 2, 5])
    dated(run, {0: 1000.0, 2: 1010.0, 5: 1020.0})
    found = read_status(run)
    assert (found.state, found.images, found.images_done, found.shards, found.shards_done) == (
        "stopped",
        45,
        21,
        6,
        3,
    )
    assert found.failures == {"corrupt": 1, "empty": 1, "not_an_image": 1, "oversized": 1, "unsupported": 1}
    assert found.rate == pytest.approx((8 + 5) / 20)
    assert (found.last_write, found.seconds_left, found.driver, found.started) == (1020.0, None, None, ())
    text = describe(found, datetime.now(UTC))
    assert "left      unknown: not running" in text
    assert "failed    5 (" in text


def test_a_run_in_progress(corpus: Path, tmp_path: Path) -> None:
    run = label_small(corpus, tmp_path / "run", shards=[0, 1, 2])
    now = datetime.now(UTC)
    with hold(run.uri, run.storage):
        later = now.timestamp() + 100
        dated(run, {0: now.timestamp() - 9000, 1: later, 2: later + 16})  # the first is of an earlier driver
        for _ in range(3):
            Attempts.begin(run.storage, run.uri, 3, "me").note("part0/photo-00000.jpg")
        Attempts.begin(run.storage, run.uri, 4, "me")
        found = read_status(run)
        text = describe(found, datetime(2030, 1, 1, tzinfo=UTC))
    assert found.state == "running"
    assert found.rate == pytest.approx(8 / 16)
    assert found.seconds_left == pytest.approx(21 / 0.5)
    assert found.driver is not None
    assert (found.driver["pid"], found.driver["lives"]) == (str(os.getpid()), True)
    started = [(s.shard, s.starts, s.deaths, s.image) for s in found.started]
    assert started == [(3, 3, 2, "part0/photo-00000.jpg"), (4, 1, 0, None)]
    assert "left      about 0:00:42, until 2030-01-01 00:00 UTC" in text
    assert "active    2 shards, 1 of them restarted after an image's process died 2 times" in text
    assert read_status(run).state == "stopped"


def test_a_driver_that_died(corpus: Path, tmp_path: Path) -> None:
    run = label_small(corpus, tmp_path / "run", shards=[0])
    dead = Holder(**vars(Holder.me(60)) | {"process_started": 1})
    run.storage.write(f"{run.uri}/lease.json", dead.encode())
    found = read_status(run)
    assert found.state == "stopped"
    assert "the next command takes over" in describe(found, datetime.now(UTC))
    run.storage.write(f"{run.uri}/lease.json", b"{")
    assert read_status(run).state == "running"  # unknown; the lease expires


def test_a_run_that_is_not_listed_yet(corpus: Path, tmp_path: Path) -> None:
    run = begin_run(str(tmp_path / "run"), Storage(), identity_of(JobConfig(), CLASSES, str(corpus), {}))
    found = read_status(run)
    assert (found.state, found.images, found.rate, found.failures) == ("not listed", 0, None, {})
    text = describe(found, datetime.now(UTC))
    assert "images    none listed yet; run the same 'cliper label' command again" in text
    assert "0 of 0" not in text
    with hold(run.uri, run.storage):
        found = read_status(run)
    assert found.state == "listing"
    assert "images    being listed by the driver" in describe(found, datetime.now(UTC))


def test_a_run_whose_list_is_gone(corpus: Path, tmp_path: Path) -> None:
    run = label_small(corpus, tmp_path / "run", shards=[0, 2])
    Path(run.uri, "manifest/index.json").unlink()
    text = describe(read_status(run), datetime.now(UTC))
    assert "images    2 labeled shards, but manifest/index.json is gone; restore it" in text


def test_damaged_and_foreign_files_do_not_stop_it(corpus: Path, tmp_path: Path) -> None:
    run = label_small(corpus, tmp_path / "run")
    Path(run.uri, shard_file(0)).write_bytes(b"PAR1")
    Path(run.uri, shard_file(77)).write_bytes(b"")
    Path(run.uri, "labels", "notes.txt").write_bytes(b"")
    found = read_status(run)
    assert (found.state, found.shards_done, found.unreadable, found.failures) == ("done", 6, 1, {})
    assert "1 files could not be read: run cliper verify" in describe(found, datetime.now(UTC))
    assert read_status(run, failures=False).failures is None


def test_rate_needs_two_times() -> None:
    sizes = {0: 10, 1: 20, 2: 30}
    assert recent_rate(sizes, {}, 0) is None
    assert recent_rate(sizes, {0: 5.0}, 0) is None
    assert recent_rate(sizes, {0: 5.0, 1: 5.0}, 0) is None
    assert recent_rate(sizes, {0: 5.0, 2: 7.0, 1: 6.0}, 0) == 25.0
    assert recent_rate(sizes, {0: 5.0, 2: 7.0, 1: 6.0}, 5.5) == 30.0


def test_the_command_on_s3(s3: S3Server) -> None:
    write_corpus(s3.folder / "corpus" / "images", 6, broken_each=1)
    uri = f"{s3.bucket('status')}/run"
    label_small("s3://corpus/images", uri, Storage(s3.options))
    options = [part for pair in s3.options.items() for part in ("--storage-option", "=".join(pair))]
    done = CliRunner().invoke(app, ["status", uri, "--json", *options])
    assert done.exit_code == 0, done.output
    assert s3.secret not in done.stdout
    found = json.loads(done.stdout)
    assert (found["state"], found["images_done"], sum(found["failures"].values())) == ("done", 6, 5)
    assert abs(found["last_write"] - datetime.now(UTC).timestamp()) < 3600
    done = CliRunner().invoke(app, ["status", uri, *options])
    assert "images    6 of 6 (100.0%)" in done.stdout
    assert "left      nothing" in done.stdout
