"""What changes or trains on a run with damage is right or names the file: label, retry, evaluation, MaskDataset.

The steps of the commands in this process, without Ray. CLIPER_FLIPS sets how many damaged runs are tried,
CLIPER_SEED which ones.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cliper.model.errors import CliperError
from cliper.pipeline.dataset import MaskDataset
from cliper.pipeline.evaluate.compare import compare, matching, to_markdown
from cliper.pipeline.evaluate.evaluation import open_evaluation, require_labeled
from cliper.pipeline.evaluate.page import write_report
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.prepared import open_prepared
from cliper.pipeline.evaluate.results import Setting, summarise
from cliper.pipeline.export.driver import export, make_plan
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.changed import changed_shards
from cliper.pipeline.run.failed import find_failed
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.run.reader import torn_shards
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.storage.backend import Storage
from tests.run.test_damage import SEED, damaged
from tests.support import benchmark_trees as trees
from tests.support.eventful import eventful_run, extended_job
from tests.support.fakes import write_corpus
from tests.support.jobs import fake_job, label_here, tasks_of
from tests.support.labeled import SHARD, label_small, rows_of

FLIPS = int(os.environ.get("CLIPER_FLIPS", "24"))
LOCAL = Storage()


def label(folder: Path) -> str:
    job = fake_job(str(folder / "corpus"), str(folder / "run"), **SHARD)
    label_here(job, [*tasks_of(job), *map(Task, torn_shards(job.run, job.manifest))])
    return _digest(rows_of(job.run))


def retry(folder: Path) -> str:
    job = fake_job(str(folder / "corpus"), str(folder / "run"), **SHARD)
    label_here(job, [Task(shard, failed) for shard, failed in find_failed(job.run, job.manifest).items()])
    return _digest(rows_of(job.run))


def dataset(folder: Path) -> str:
    examples = MaskDataset(read_run(str(folder / "run"), LOCAL), seed=1)
    return _digest([(e.image_id, e.mask.numpy().tobytes(), e.image.numpy().tobytes()) for e in examples])


def evaluation(folder: Path) -> str:
    run, prepared = read_run(str(folder / "run"), LOCAL), open_prepared(str(folder / "prepared"), LOCAL)
    require_labeled(run)
    found = open_evaluation(run, prepared)
    problems = found.counter().stage(pa.table({"shard": found.uncounted_shards()}))["problem"].to_pylist()
    named = [problem for problem in problems if problem is not None]
    if named:
        raise CliperError(named[0])
    counts = found.read()
    return _digest([counts.image_ids, counts.confusion.tolist(), counts.totals.tolist(), counts.failed])


def comparison(folder: Path) -> str:
    """`cliper evaluate --compare` of the run with itself."""
    evaluation(folder)
    found = compare(*matching(str(folder / "run"), str(folder / "run"), LOCAL), LOCAL)
    return _digest([to_markdown(found), found.image_ids, [miou.tolist() for miou in found.image_miou]])


def extend(folder: Path) -> str:
    """`cliper label --extend`: what an interruption left is taken over, and what changed is labeled again."""
    job = extended_job(folder)
    pending = tasks_of(job)
    label_here(job, [*pending, *map(Task, torn_shards(job.run, job.manifest))])
    label_here(job, [Task(shard, changed=True) for shard in changed_shards(job.run)])
    return _digest(rows_of(job.run))


def continued_export(folder: Path) -> str:
    """An export that was interrupted behind its first shard."""
    run, kept = read_run(str(folder / "run"), LOCAL), folder / "kept"
    shutil.copytree(folder / "export", kept)
    try:
        export(run, make_plan(run, "coco", RowFilter()), str(folder / "export"))
        files = sorted(path for path in (folder / "export").rglob("*") if path.is_file())
        return _digest([(path.name, path.read_bytes()) for path in files])
    finally:
        shutil.rmtree(folder / "export")
        kept.rename(folder / "export")


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    write_corpus(folder / "corpus", 14, broken_each=1)
    label_small(folder / "corpus", folder / "run")
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation and its results, of which one shard is not counted any more."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "raw").mkdir()
    truths = trees.folder(folder / "raw", images=6)
    prepared = prepare("folder", folder / "raw", str(folder / "prepared"), LOCAL)
    guesses = {name: np.where(truth == 255, 0, truth).astype(np.uint8) for name, truth in truths.items()}
    trees.stored_run(str(folder / "run"), prepared, guesses)
    evaluation(folder)
    found = open_evaluation(read_run(str(folder / "run"), LOCAL), prepared)
    counts = found.read()
    write_report(found, counts, summarise(counts, found.identity, Setting("cliper", "cliper")))
    next((folder / "run").rglob("counts/shard-000001.parquet")).unlink()
    return folder


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eventful")
    eventful_run(folder, images=14)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_corpus(folder / "corpus", 14, broken_each=1)
    run = label_small(folder / "corpus", folder / "run")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, make_plan(run, "coco", RowFilter()), str(folder / "export"), on_shard=stop)
    return folder


STEPS: dict[str, Callable[[Path], str]] = {
    "label": label,
    "retry": retry,
    "dataset": dataset,
    "evaluation": evaluation,
    "comparison": comparison,
    "extend": extend,
    "continued export": continued_export,
}
RUNS = {"evaluation": "evaluated", "comparison": "evaluated", "extend": "eventful", "continued export": "exported"}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_right_or_names_what_is_damaged(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    step, original = STEPS[name], request.getfixturevalue(RUNS.get(name, "labeled"))
    damageable = [
        original / "run",
        original / "export",
        original / "prepared" / "index.parquet",
        original / "prepared" / "dataset.json",
    ]
    files = sorted(
        path.relative_to(original)
        for top in damageable
        for path in ([top] if top.is_file() else top.rglob("*"))
        if path.is_file()
    )
    chance, right, wrong = random.Random(f"{SEED} {name}"), _run_on_copy(step, original, tmp_path), []
    for _ in range(FLIPS // len(STEPS)):
        with damaged(original / chance.choice(files), chance) as what:
            try:
                if _run_on_copy(step, original, tmp_path) != right:
                    wrong.append(f"{what}: another result")
            except CliperError as error:
                if not any(word in str(error) for word in ("damaged", ".parquet", ".json", "/evaluation/")):
                    wrong.append(f"{what}: {error}")
            except Exception as error:  # what the test looks for: an error that is no message
                wrong.append(f"{what}: {error!r}")
    assert not wrong, "\n".join(wrong)


def _run_on_copy(step: Callable[[Path], str], original: Path, tmp_path: Path) -> str:
    """The step's result on a copy of the run at the same place, so that paths in its files hold."""
    kept = tmp_path / "kept"
    shutil.copytree(original / "run", kept)
    try:
        return step(original)
    finally:
        shutil.rmtree(original / "run")
        kept.rename(original / "run")
