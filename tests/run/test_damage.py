"""Every command over a run with damage is right or names the file: single flipped bits and cut files.

CLIPER_FLIPS sets how many damaged runs are tried (default 60), CLIPER_SEED which ones.
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.model.errors import CliperError
from cliper.pipeline.corpus.manifest import read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.reader import labeled_shards, open_shard, set_aside, torn_shards
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.run.status import read_status
from cliper.pipeline.storage.backend import Storage
from tests.support.eventful import eventful_run
from tests.support.fakes import write_corpus
from tests.support.labeled import label_small

FLIPS, SEED = int(os.environ.get("CLIPER_FLIPS", "60")), int(os.environ.get("CLIPER_SEED", "16"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    write_corpus(folder / "corpus", 20, broken_each=1)
    label_small(folder / "corpus", folder / "run")
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Run:
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "run")
    return read_run(str(tmp_path / "run"), Storage())


def commands(run: str, out: str) -> dict[str, list[str]]:
    return {
        "verify": ["verify", run, "--workers", "1"],
        "status": ["status", run],
        "report": ["report", run, "--output", f"{out}/report.html", "--workers", "1"],
        "export": ["export", run, "--to", "coco", "--output", f"{out}/export", "--workers", "1"],
        "review": ["review", "pick", run, "--count", "3", "--output", f"{out}/tasks", "--workers", "1"],
    }


def outcome(arguments: list[str], out: Path) -> tuple[Result, str]:
    """What a command returned, and a digest of all it printed and wrote."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    result = CliRunner().invoke(app, arguments)
    digest = hashlib.sha256(re.sub(r"[\d.]+ s\b", "", result.output).encode())
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "cliper-export.json":
            digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return result, digest.hexdigest()


@contextmanager
def damaged(path: Path, chance: random.Random) -> Iterator[str]:
    """One flipped bit, or the file cut at a random place; put right again at the end."""
    before, times = path.read_bytes(), path.stat()
    place = chance.randrange(len(before))
    if chance.random() < 0.8:
        bit = chance.randrange(8)
        path.write_bytes(before[:place] + bytes([before[place] ^ (1 << bit)]) + before[place + 1 :])
        what = f"bit {bit} of byte {place}"
    else:
        path.write_bytes(before[:place])
        what = f"cut at {place}"
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    yield f"{path.name}, {what}"
    path.write_bytes(before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("kind", ["finished", "eventful"])
def test_every_command_is_right_or_names_what_is_damaged(kind: str, original: Path, tmp_path: Path) -> None:
    copy, out, chance = tmp_path / "run", tmp_path / "out", random.Random(SEED)
    if kind == "finished":
        shutil.copytree(original, copy)
    else:
        eventful_run(tmp_path)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "lease.json")
    assert {path.name for path in files} > FILES[kind]
    listed = commands(str(copy), str(out))
    right = {name: {outcome(arguments, out)[1]} for name, arguments in listed.items()}
    if kind == "eventful":  # a progress.json that cannot be read is none
        held = (copy / "progress.json").read_bytes()
        (copy / "progress.json").unlink()
        right["status"].add(outcome(listed["status"], out)[1])
        (copy / "progress.json").write_bytes(held)
    wrong = []
    for _ in range(FLIPS // 2):
        path = chance.choice(files)
        with damaged(path, chance) as what:
            for name, arguments in listed.items():
                result, digest = outcome(arguments, out)
                if digest not in right[name] and not named(result, path, out):
                    wrong.append(f"{name}: {what}: {result.exception!r} {result.output[-300:]}")
    assert not wrong, "\n".join(wrong)


FILES = {
    "finished": {"run.json", "index.json", "part-00000.parquet", "shard-000000.parquet"},
    "eventful": {
        "part-00000-1.parquet",
        "part-00001.parquet",
        "shard-000002.json",
        "progress.json",
        "summary.json",
    },
}


def named(result: Result, path: Path, out: Path) -> bool:
    """Whether a command names the damaged file, in an expected error or in what it printed or wrote."""
    if result.exception is not None and not isinstance(result.exception, SystemExit | CliperError):
        return False
    pages = "".join(page.read_text() for page in out.glob("*.html"))
    told = str(result.exception) + result.output + pages
    return path.name in told or "could not be read" in told


def test_a_copy_under_another_name_is_refused(run: Run) -> None:
    folder = Path(run.uri)
    shutil.copy(folder / shard_file(0), folder / shard_file(1))
    with pytest.raises(RunError, match=r"shard-000001.parquet of .* is damaged \(it is the file of shard 0\)"):
        list(read_tables(run, ["image_id"]))


def test_shards_beyond_the_manifest_are_ignored_and_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run.uri)
    shutil.copy(folder / shard_file(0), folder / shard_file(77))
    assert labeled_shards(run) == [0, 1, 2]
    assert "labels/shard-000077.parquet: the run has 3 shards" in capsys.readouterr().err
    assert sum(len(table) for table in read_tables(run, ["image_id"])) == 20


def test_a_file_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    other = label_small(_corpus(tmp_path), tmp_path / "other", max_pixels=999)
    shutil.copy(Path(other.uri, shard_file(0)), Path(run.uri, shard_file(0)))
    with pytest.raises(RunError, match="it is of the run"), open_shard(run, 0):
        pass


def _corpus(folder: Path) -> Path:
    write_corpus(folder / "corpus", 8)
    return folder / "corpus"


def test_torn_files_do_not_count_as_done(run: Run) -> None:
    folder = Path(run.uri)
    manifest = read_manifest(run.storage, run.uri)
    assert manifest is not None
    assert torn_shards(run, manifest) == []
    data = (folder / shard_file(1)).read_bytes()
    for content in (b"", data[:-1], data[: len(data) // 2], data[:-30] + b"?" + data[-29:]):
        (folder / shard_file(1)).write_bytes(content)
        assert torn_shards(run, manifest) == [1]
    shutil.copy(folder / shard_file(0), folder / shard_file(1))
    assert torn_shards(run, manifest) == [1]


def test_repair_sets_damaged_files_aside(run: Run) -> None:
    path = Path(run.uri, shard_file(2))
    data = path.read_bytes()
    path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    result = CliRunner().invoke(app, ["verify", run.uri, "--repair", "--workers", "1"])
    assert result.exit_code == 1
    assert "moved     labels/shard-000002.parquet to damaged/shard-000002.parquet" in result.output
    assert run.done_shards() == {0, 1}
    assert read_status(run).shards_done == 2


def test_set_aside_keeps_the_bytes(run: Run) -> None:
    before = Path(run.uri, shard_file(0)).read_bytes()
    assert list(set_aside(run, [0])) == [("labels/shard-000000.parquet", "damaged/shard-000000.parquet")]
    assert Path(run.uri, "damaged/shard-000000.parquet").read_bytes() == before
