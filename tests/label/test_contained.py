"""One bad image, or one wrong result, affects only its own row."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliper.jobs.progress import FailureLimit, RunProgress
from cliper.model.labels import Segmentation
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.errors import ImageError, RunError, TooManyFailuresError, text_of
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.job import _list_new
from cliper.pipeline.label.results import refuse_wrong
from cliper.pipeline.run.attempts import Attempts, attempts_file
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import Brightness, brightness_labels, write_corpus
from tests.support.labeled import label_small, rows_of

Images, Ids = Sequence[np.ndarray], Sequence[str]
BAD = "photo-00003"


class Panic(BaseException):
    """As pyo3's PanicException."""


class Untold(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError


def raising(error: BaseException) -> Any:
    def act(found: list[Segmentation]) -> list[Segmentation]:
        raise error

    return act


def changed(**values: Any) -> Any:
    return lambda found: [replace(found[0], **values)]


def label(value: int, dtype: Any = np.uint8, shape: tuple[int, ...] = (48, 64)) -> np.ndarray:
    return np.full(shape, value, dtype)


HURTS = {
    "panic": (raising(Panic("at src/lib.rs")), "Panic", "at src/lib.rs"),
    "exit": (raising(SystemExit(3)), "SystemExit", "3"),
    "no text": (raising(Untold()), "Untold", "whose text cannot be made"),
    "no Unicode": (raising(ValueError("file \udcff")), "ValueError", "file ?"),
    "too few": (lambda found: [], "wrong_result", "returned 0 results for 1"),
    "too many": (lambda found: [*found, *found], "wrong_result", "returned more results for 1"),
    "no list": (lambda found: 3, "TypeError", "not iterable"),
    "no result": (lambda found: [None], "wrong_result", "returned None"),
    "shape": (changed(labels=label(0, shape=(3, 3))), "wrong_result", r"labels are uint8 \(3, 3\)"),
    "floats": (changed(labels=label(0, np.float32)), "wrong_result", "labels are float32"),
    "range": (changed(labels=label(9)), "wrong_result", "labels are 9 to 9; the list has 3"),
    "negative": (changed(labels=label(-1, np.int16)), "wrong_result", "labels are -1 to -1"),
    "counts": (changed(pixels=np.array([1, 2, 3, 4])), "wrong_result", "does not count the labels"),
    "statistics": (changed(class_margin=np.zeros(2)), "wrong_result", "class_margin is"),
    "not a number": (changed(confidence=float("nan")), "wrong_result", "not a finite number"),
    "presence": (changed(presence=np.full(3, np.inf, np.float32)), "wrong_result", "not a finite number"),
}


@pytest.mark.parametrize("name", HURTS)
def test_one_bad_image_is_one_failed_row(name: str, tmp_path: Path) -> None:
    hurt, kind, text = HURTS[name]

    class Hurt(Brightness):
        def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
            found = super().segment(images, image_ids)
            bad = [i for i, image_id in enumerate(image_ids) if BAD in image_id]
            if not bad:
                return found
            own = hurt(found[bad[0] : bad[0] + 1])
            return own if len(images) == 1 else [*found[: bad[0]], *own, *found[bad[0] + 1 :]]

    write_corpus(tmp_path / "corpus", 8)
    run = label_small(tmp_path / "corpus", tmp_path / "run", factory=Hurt)
    failed = [row for row in rows_of(run) if row["status"] != "ok"]
    assert [BAD in row["image_id"] for row in failed] == [True]
    assert (failed[0]["error_type"], failed[0]["stage"]) == (kind, "segment")
    assert re.search(text, failed[0]["error_message"])
    assert verify_run(run, workers=1).whole


@pytest.mark.parametrize("classes", [3, 40])
def test_right_results_pass(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes + 1, (60, 50)).astype(np.uint16)
    refuse_wrong(Segmentation.of(labels, classes), (60, 50), classes)
    wrong = replace(Segmentation.of(labels, classes), labels=np.roll(labels, 1) * 0)
    with pytest.raises(ImageError, match="does not count"):
        refuse_wrong(wrong, (60, 50), classes)


def test_any_error_has_a_text() -> None:
    assert text_of(Untold()) == "Untold, whose text cannot be made"
    assert text_of(ValueError("\udcff")) == "?"


class DyingError(BaseException):
    """The process ends."""


class Leaking(Brightness):
    """Its process dies at its third image, whatever it is; `poison` kills every process."""

    held, died = 0, 0

    def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
        type(self).held += len(images)
        if self.held > 2 or any("poison" in image_id for image_id in image_ids):
            type(self).held = 0
            type(self).died += 1
            raise KeyboardInterrupt
        return [Segmentation.of(brightness_labels(image), self.classes) for image in images]


def test_a_leak_convicts_no_healthy_image(tmp_path: Path) -> None:
    """Each process is a new actor; a shard of 13 images, one of which kills every process."""
    import pyarrow as pa

    from cliper.pipeline.corpus.load import load_entries
    from tests.support.fakes import CLASSES, jpeg
    from tests.support.labeled import open_small

    write_corpus(tmp_path / "corpus", 12)
    (tmp_path / "corpus" / "poison.jpg").write_bytes(jpeg(1))
    run, manifest, config = open_small(
        str(tmp_path / "corpus"), str(tmp_path / "run"), Storage(), shard={"images": 32}
    )
    table = load_entries(run.storage, 0, manifest.read_shard(run.storage, run.uri, 0), "image")
    Leaking.held = Leaking.died = 0
    done: pa.Table | None = None
    for _ in range(40):
        Leaking.held = 0
        try:
            done = SegmentShard(Leaking, JobConfig.model_validate(config), CLASSES, run, 1, "driver")(table)
            break
        except KeyboardInterrupt:
            continue
    assert done is not None
    status = dict(zip(done["image_id"].to_pylist(), done["status"].to_pylist(), strict=True))
    assert {name for name, state in status.items() if state != "ok"} == {"poison.jpg"}
    assert Leaking.died < 14
    assert Storage().exists(attempts_file(run.uri, 0))


def test_a_hang_is_charged_at_once_and_then_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("cliper.pipeline.run.attempts.time.time", lambda: now[0])

    def begin() -> Attempts:
        return Attempts.begin(Storage(), str(tmp_path), 0, "driver", 600.0, fresh=False)

    assert not begin().careful
    now[0] += 601  # a window that was killed for a hang
    second = begin()
    assert second.careful
    for expected in (1, 2):
        second.note("a.jpg")
        second.note("hang.jpg")
        now[0] += 601
        second = begin()
        assert second.deaths == {"hang.jpg": expected}
    assert second.is_poison("hang.jpg")


def test_a_corpus_is_never_listed_into_a_run_with_labels(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 10)
    run = label_small(tmp_path / "corpus", tmp_path / "run")
    Path(run.uri, "manifest", "index.json").unlink()
    write_corpus(tmp_path / "corpus", 20)
    with pytest.raises(RunError, match="holds labels, but its list of images .* is gone"):
        _list_new(run, iter([Entry("a", "/a")]), JobConfig(), LeftOut(), lambda left_out, team: iter(()), 1)
    assert run.done_shards() == {0, 1}


@pytest.mark.parametrize(("failed", "stops"), [(99, False), (100, True)])
def test_a_hundred_failures_in_a_row_stop_by_default(failed: int, stops: bool) -> None:
    progress = RunProgress(1000, 0)
    kinds = ["unreadable"] * failed
    progress.add({"shard": 0, "images": 100, "failures": kinds, "several": 0})
    with pytest.raises(TooManyFailuresError, match="all of the first 100") if stops else nullcontext():
        FailureLimit().check(progress)
    FailureLimit.parse("100%").check(progress)
