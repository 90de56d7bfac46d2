"""A corpus that grows, changes and shrinks under a run, with interruptions at any write.

CLIPER_DAYS (default 30) and CLIPER_SEEDS (default 1) set the length and number of the simulations.
"""

import os
import random
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.manifest import read_manifest, read_part, write_manifest
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.errors import InputError, RunError
from cliper.pipeline.label.job import Job, notice_of_new
from cliper.pipeline.label.stages import Task
from cliper.pipeline.results import open_run
from cliper.pipeline.run.attempts import Attempts
from cliper.pipeline.run.changed import changed_shards, forget_changed
from cliper.pipeline.run.extend import RELABEL, Extension, extend_run
from cliper.pipeline.run.failed import find_failed
from cliper.pipeline.run.folder import Run, begin_run, identity_of, read_run
from cliper.pipeline.run.leftovers import clean_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.status import read_status
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import CLASSES, Brightness, jpeg, kind
from tests.support.jobs import label_here, tasks_of
from tests.support.labeled import label_small, rows_of

DAYS, SEEDS = int(os.environ.get("CLIPER_DAYS", "30")), int(os.environ.get("CLIPER_SEEDS", "1"))
CONFIG = JobConfig.model_validate({"shard": {"images": 8}})
LOCAL = Storage()


class KilledError(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class Dying(Storage):
    """Dies before one of its next writes and removals, which is also after the one before it."""

    left: list[int] = field(default_factory=lambda: [-1])

    def _step(self) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise KilledError

    def write(self, uri: str, data: bytes) -> None:
        self._step()
        super().write(uri, data)

    def remove(self, uri: str) -> None:
        self._step()
        super().remove(uri)


@dataclass
class Corpus:
    """A folder of images whose every change has a new modification time."""

    folder: Path
    clock: int = 10**18

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.clock += 10**9
        os.utime(path, ns=(self.clock, self.clock))

    @property
    def names(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.jpg")}


def extend(
    corpus: Path, output: Path, relabel: Collection[str] = (), storage: Storage = LOCAL
) -> tuple[Job, Extension | None]:
    """What `cliper label --extend` does, up to the labeling."""
    run = begin_run(str(output), storage, identity_of(CONFIG, CLASSES, str(corpus), {}))
    entries, left_out = list_entries(storage, str(corpus), CONFIG.input), LeftOut()
    manifest, extension = read_manifest(storage, str(output)), None
    if manifest is None:
        manifest = write_manifest(entries, storage, str(output), CONFIG.shard)
    else:
        manifest, extension = extend_run(run, manifest, entries, CONFIG, left_out, relabel)
    return Job(run, manifest, CONFIG, CLASSES, kind(Brightness), "fake"), extension


def label_all(job: Job) -> None:
    """What `cliper label` labels: pending shards, then images that changed."""
    pending = tasks_of(job)
    label_here(job, pending)
    for shard in changed_shards(job.run):
        if shard not in {task.shard for task in pending}:
            label_here(job, [Task(shard, changed=True)])
        forget_changed(job.run, shard)


def masks(run: Run) -> dict[str, tuple[str, bytes]]:
    """Status and mask of every row by id; every id is there once."""
    rows = rows_of(run)
    found = {r["image_id"]: (r["status"], unpack_mask(r).tobytes() if r["mask"] else b"") for r in rows}
    assert len(found) == len(rows)
    return found


def whole_after_cleaning(run: Run) -> bool:
    """Whether the only leftovers of a kill are those that `verify --clean` removes."""
    list(clean_run(run))
    return verify_run(run, 1).whole


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path / "in")
    for i in range(20):
        corpus.write(f"{i:03d}.jpg", jpeg(i))
    return corpus


def test_new_images_become_new_shards(corpus: Corpus, tmp_path: Path) -> None:
    run = label_small(corpus.folder, tmp_path / "run")
    old = {p.name: p.read_bytes() for p in (tmp_path / "run/labels").iterdir()}
    for name in ("000a.jpg", "new/b.jpg", "zzz.jpg"):
        corpus.write(name, jpeg(77))
    job, extension = extend(corpus.folder, tmp_path / "run")
    assert extension is not None
    assert extension.lines() == ["extended  3 new images in 1 shard; 20 were listed before"]
    status = read_status(run)
    assert (status.state, status.images, status.images_done) == ("stopped", 23, 20)
    label_all(job)
    assert {name: (tmp_path / "run/labels" / name).read_bytes() for name in old} == old
    assert masks(run).keys() == corpus.names
    assert verify_run(run, 1).whole
    assert read_status(run).state == "done"
    assert extend(corpus.folder, tmp_path / "run")[0].manifest == job.manifest


def test_new_shards_are_as_small_as_those_of_a_small_corpus(corpus: Corpus, tmp_path: Path) -> None:
    config = JobConfig.model_validate({"batch_size": 4})
    run = begin_run(str(tmp_path / "run"), LOCAL, identity_of(config, CLASSES, str(corpus.folder), {}))
    listed = lambda: list_entries(LOCAL, str(corpus.folder), config.input)  # noqa: E731
    manifest = write_manifest(listed(), LOCAL, run.uri, config.shard)
    for i in range(10):
        corpus.write(f"new/{i}.jpg", jpeg(i))
    extended, _ = extend_run(run, manifest, listed(), config, LeftOut())
    assert [list(part.images) for part in extended.parts] == [[20], [4, 4, 2]]


def test_what_vanished_and_changed_is_reported_and_labeled_again_on_request(
    corpus: Corpus, tmp_path: Path
) -> None:
    run = label_small(corpus.folder, tmp_path / "run")
    before = masks(run)
    (corpus.folder / "003.jpg").unlink()
    size = len(jpeg(5))
    corpus.write("005.jpg", jpeg(105) + b" " * 7)
    corpus.write("012.jpg", (corpus.folder / "012.jpg").read_bytes())
    job, extension = extend(corpus.folder, tmp_path / "run")
    assert extension is not None
    assert extension.lines() == [
        "extended  0 new images in 0 shards; 20 were listed before",
        "vanished  1 images are not in the input any more, for example 003.jpg; their rows stay",
        f"changed   1 images, for example 005.jpg: {len(jpeg(105)) + 7:,} bytes; {size:,} were listed; "
        "--extend --relabel changed labels them again",
        "touched   1 images, for example 012.jpg: the same size, another modification time; "
        "--extend --relabel changed --relabel touched labels them again",
    ]
    label_all(job)
    assert masks(run) == before
    job, extension = extend(corpus.folder, tmp_path / "run", RELABEL)
    assert (extension and extension.relabeled) == 2
    assert read_status(run).state == "stopped"
    assert verify_run(run, 1).counts == {"outdated": 2}
    label_all(job)
    after = masks(run)
    assert [name for name in before if before[name] != after[name]] == ["005.jpg"]
    assert after["005.jpg"] == masks(label_small(corpus.folder, tmp_path / "new"))["005.jpg"]
    assert verify_run(run, 1).whole
    found = extend(corpus.folder, tmp_path / "run", RELABEL)[1]
    assert found is not None
    assert found.found.differences == []


def test_readers_take_the_extended_run(corpus: Corpus, tmp_path: Path) -> None:
    label_small(corpus.folder, tmp_path / "run")
    for name in ("000a.jpg", "new/b.jpg", "zzz.jpg"):
        corpus.write(name, jpeg(77))
    label_all(extend(corpus.folder, tmp_path / "run")[0])
    opened = open_run(str(tmp_path / "run"))
    assert set(opened.table(["image_id"])["image_id"].to_pylist()) == corpus.names
    assert {image_id for _, _, image_id in opened.dataset()} == corpus.names
    assert opened.export("coco", str(tmp_path / "coco")).images == 23
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--workers", "1"])
    assert "read      23 rows in" in done.output


def test_unlabeled_images_are_listed_anew(corpus: Corpus, tmp_path: Path) -> None:
    run = label_small(corpus.folder, tmp_path / "run", shards=[0])
    corpus.write("010.jpg", jpeg(110) + b"longer")
    label_all(extend(corpus.folder, tmp_path / "run")[0])
    assert {status for status, _ in masks(run).values()} == {"ok"}
    assert verify_run(run, 1).whole


def test_rows_kept_by_an_interrupted_attempt_are_not_taken_for_another_image(
    corpus: Corpus, tmp_path: Path
) -> None:
    run = label_small(corpus.folder, tmp_path / "run", shards=[0, 2])
    done = rows_of(label_small(corpus.folder, tmp_path / "other"))[10]
    Attempts.begin(LOCAL, run.uri, 1, "me").keep([done | {"run_fingerprint": run.fingerprint}])
    corpus.write("010.jpg", jpeg(110) + b"longer")
    label_all(extend(corpus.folder, tmp_path / "run")[0])
    assert masks(run)["010.jpg"] == masks(label_small(corpus.folder, tmp_path / "new"))["010.jpg"]


def test_an_id_that_is_listed_twice_is_refused_and_leaves_the_run(tmp_path: Path) -> None:
    corpus, listed = Corpus(tmp_path / "in"), tmp_path / "list.csv"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        corpus.write(name, jpeg(1))
    listed.write_text("uri,image_id\nin/a.jpg,1\n")
    run = label_small(listed, tmp_path / "run")
    for twice in ("in/b.jpg,1\n", "in/b.jpg,2\nin/c.jpg,2\n"):
        listed.write_text("uri,image_id\nin/a.jpg,1\n" + twice)
        with pytest.raises(InputError, match="occurs twice"):
            extend(listed, tmp_path / "run")
        assert verify_run(run, 1).whole


def test_a_lost_index_is_never_replaced_by_a_new_listing(corpus: Corpus, tmp_path: Path) -> None:
    run = label_small(corpus.folder, tmp_path / "run")
    damaged = tmp_path / "run/manifest/index.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(RunError, match="index.json is damaged"):
        extend(corpus.folder, tmp_path / "run")
    assert run.done_shards()


def test_the_plain_command_tells_of_new_images(corpus: Corpus, tmp_path: Path) -> None:
    label_small(corpus.folder, tmp_path / "run")
    job = Job(
        read_run(str(tmp_path / "run"), LOCAL),
        read_manifest(LOCAL, str(tmp_path / "run")),  # type: ignore[arg-type]
        CONFIG,
        CLASSES,
        kind(Brightness),
        "fake",
    )
    assert notice_of_new(job, str(corpus.folder)) is None
    for i in range(8):
        corpus.write(f"new{i}.jpg", jpeg(i))
    assert notice_of_new(job, str(corpus.folder)) == (
        "notice    8 new images in the input, for example new0.jpg; --extend labels them"
    )


def change(corpus: Corpus, chance: random.Random) -> None:
    """A day in a corpus: files added, replaced, removed, brought back."""
    names = sorted(corpus.names)
    for _ in range(chance.randrange(5)):
        corpus.write(f"{chance.randrange(3)}/{chance.randrange(120):03d}.jpg", jpeg(chance.randrange(10**6)))
    for name in chance.sample(names, min(len(names), chance.randrange(3))):
        corpus.write(name, jpeg(chance.randrange(10**6)))
    for name in chance.sample(names, min(len(names), chance.randrange(3))):
        (corpus.folder / name).unlink()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_is_extended_daily_with_kills(seed: int, corpus: Corpus, tmp_path: Path) -> None:
    """Every id is there once, with the mask that labeling the final corpus at once gives it."""
    chance, kills, ever = random.Random(seed), 0, set(corpus.names)
    for _ in range(DAYS):
        change(corpus, chance)
        for left in (*(chance.randrange(1, 12) for _ in range(chance.randrange(3))), -1):
            ever |= corpus.names
            try:
                label_all(extend(corpus.folder, tmp_path / "run", RELABEL, Dying(left=[left]))[0])
            except KilledError:
                kills += 1
    job, _ = extend(corpus.folder, tmp_path / "run", RELABEL)
    label_all(job)
    label_here(job, [Task(shard, failed) for shard, failed in find_failed(job.run, job.manifest).items()])
    grown, at_once = masks(job.run), masks(label_small(corpus.folder, tmp_path / "new"))
    assert kills > DAYS / 5
    assert {name: mask for name, mask in grown.items() if name in at_once} == at_once
    assert set(grown) <= ever
    assert whole_after_cleaning(job.run)


def test_a_kill_between_any_two_writes(tmp_path: Path) -> None:
    """One extension that adds, updates and relabels, killed at each of its steps; the same command finishes it."""
    corpus = Corpus(tmp_path / "in")
    for i in range(17):
        corpus.write(f"{i:03d}.jpg", jpeg(i, (8, 8)))
    label_small(corpus.folder, tmp_path / "before", shards=[0, 1])
    for i, name in enumerate(("003.jpg", "010.jpg", "016.jpg", "new.jpg")):
        corpus.write(name, jpeg(200 + i, (9, 9)))
    at_once = masks(label_small(corpus.folder, tmp_path / "at-once"))
    for step in range(1, 40):
        output = tmp_path / f"run{step}"
        shutil.copytree(tmp_path / "before", output)
        try:
            label_all(extend(corpus.folder, output, ("changed",), Dying(left=[step]))[0])
            break
        except KilledError:
            for part in read_manifest(LOCAL, str(output)).parts:  # type: ignore[union-attr]
                read_part(LOCAL, str(output), part)
        job, _ = extend(corpus.folder, output, ("changed",))
        label_all(job)
        assert masks(job.run) == at_once
        assert whole_after_cleaning(job.run)
    assert step > 8
