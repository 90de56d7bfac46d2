"""`verify --source`: the images of a run are still those that were labeled, or what differs is named."""

import json
import os
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.source import check_source
from tests.support.fakes import jpeg, write_corpus
from tests.support.labeled import label_small


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_corpus(tmp_path / "in", 21, broken_each=1)
    return label_small(tmp_path / "in", tmp_path / "run")


def verify(run: Run, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", run.uri, "--workers", "1", *options])


def test_the_source_as_it_was(run: Run) -> None:
    result = verify(run, "--source", "all")
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        0,
        "source    16 images compared, 0 of them differ",
    )


def test_differences_are_named_by_kind(run: Run, tmp_path: Path) -> None:
    images = sorted((tmp_path / "in").glob("part*/*.jpg"))
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes() + b"!")
    images[2].write_bytes(jpeg(2, (32, 32)).ljust(len(images[2].read_bytes()), b"\0")[: images[2].stat().st_size])
    os.utime(images[3], ns=(1, 1))
    result = verify(run, "--source", "all", "--json")
    assert result.exit_code == 1
    assert "source    16 images compared, 3 of them differ" in result.output
    assert "  missing: 1, for example part0/photo-00000.jpg" in result.output
    assert "  changed: 2, for example part0/photo-00007.jpg" in result.output
    assert "  another modification time, else the same: 1" in result.output
    report = json.loads(result.stdout)
    assert report["whole"]
    assert report["source"] == {"checked": 16, "touched": 1, "missing": 1, "changed": 2}


def test_a_sample_reads_a_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliper.pipeline.run.source.SAMPLE", 6)
    monkeypatch.setattr("cliper.pipeline.run.source.SAMPLED_SHARDS", 2)
    assert check_source(run, sample=True).checked <= 6
    assert verify(run, "--source", "some").exit_code == 2
