"""`cliper plan`: the sample is uniform, the measurement is the actor's, the scaling is plain arithmetic."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cliper.jobs.plan import describe, human
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.sources import Entry, list_entries
from cliper.pipeline.label.estimate import Corpus, Measured, estimate, measure, sample_corpus
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PHOTOS
from tests.support.fakes import CLASSES, Brightness, write_corpus

MEASURED = Measured(10, 1, 0.5, 3.0, [4.0, 6.0], 2.0, 10_000, 5_000)


def test_every_image_is_equally_likely_to_be_drawn() -> None:
    entries = [Entry(str(i), str(i), 10) for i in range(20)]
    drawn = Counter(e.image_id for seed in range(2000) for e in sample_corpus(entries, 5, seed).sample)
    assert set(drawn) == {e.image_id for e in entries}
    assert max(abs(count - 500) for count in drawn.values()) < 100  # 5 standard deviations
    assert sample_corpus(entries, 5, 1) == sample_corpus(entries, 5, 1)


def test_the_corpus_is_counted_whole() -> None:
    listed = sample_corpus([Entry("a", "a", 7), Entry("b", "b", 8)], 5, 0)
    assert (listed.images, listed.bytes, len(listed.sample)) == (2, 15, 2)
    assert sample_corpus([Entry("a", "a", 7), Entry("b", "b")], 1, 0).bytes is None


def test_a_sample_goes_through_the_actor(tmp_path: Path) -> None:
    write_corpus(tmp_path, 22, broken_each=1)
    config = JobConfig()
    entries = list(list_entries(Storage(), str(tmp_path), config.input))
    found = measure(entries, Storage(), Brightness, config, CLASSES)
    failed = sum(1 for e in entries if e.image_id.startswith("broken"))
    assert (found.images, found.failed) == (len(entries), failed)
    assert len(found.part_rates) == 4
    assert found.rate == pytest.approx(found.images / found.seconds)
    assert found.output_bytes > 0
    assert found.input_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_scaling_is_plain_arithmetic() -> None:
    corpus = Corpus(3600 * 50, None, [])
    whole = estimate(corpus, MEASURED, 4, 2.5)  # 5 images/s
    assert whole.actor_hours == pytest.approx(10)
    assert whole.hours == pytest.approx(2.5)
    assert whole.output_bytes == pytest.approx(500 * 3600 * 50)
    assert whole.cost == pytest.approx(25)
    assert estimate(corpus, MEASURED, 4, None).cost is None
    assert "cost      25.00 at 2.5 an hour" in describe(corpus, MEASURED, whole, 4, 2.5)
    assert [human(n) for n in (7, 1500, 2e6, np.float64(3e9), 5e12)] == ["7 B", "1.5 kB", "2 MB", "3 GB", "5 TB"]


def test_command(settings: dict[str, str]) -> None:
    options = [part for pair in settings.items() for part in pair]
    options += ["--preset", "clip-only", "--price", "2"]
    command = [str(Path(sys.executable).parent / "cliper"), "plan", *options]
    done = subprocess.run(
        [*command, "--input", str(PHOTOS)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"sample    4 images, 0 failed; [\d.]+ images/s per actor", done.stdout)
    assert "corpus    4 images" in done.stdout
    assert "at 2 an hour" in done.stdout
    assert "without FGC" in done.stdout
    missing = subprocess.run([*command, "--input", "/nothing"], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr) == (2, "cliper: input /nothing does not exist\n")
