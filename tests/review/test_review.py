"""Candidate, correct as Label Studio would, apply, read back: on disk and on S3."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle, encode_rle
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.model.classes import ClassList
from cliper.model.segmentation import Segmentation
from cliper.pipeline.corpus.decode import decode, to_file_grid, upright
from cliper.pipeline.dataset import MaskDataset
from cliper.pipeline.errors import CliperError, ReviewError, RunError
from cliper.pipeline.review.apply import apply_review
from cliper.pipeline.review.select import review_tasks, select_images
from cliper.pipeline.run.corrections import NO_CORRECTIONS, read_corrections, versions
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.rows import RowFilter, read_tables
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PHOTOS, S3Server
from tests.dataset.test_dataset import make_run
from tests.support.fakes import CLASSES, Brightness, brightness_labels, write_corpus

WHEN = "2026-03-01T12:00:00.000000Z"
NAMES = CLASSES.names


class Halves(Brightness):
    """Another model: the upper half is class 1, the lower half class 2, so that brightness disagrees."""

    def segment(self, images: Any, image_ids: Any) -> Any:
        return [Segmentation.of(self.halves(image), self.classes) for image in images]

    @staticmethod
    def halves(image: np.ndarray) -> np.ndarray:
        labels = np.full(image.shape[:2], 2, np.uint8)
        labels[: image.shape[0] // 2] = 1
        return labels


class Rare(Brightness):
    """Class 3 in photo-00007 alone, class 2 elsewhere; margins grow with the photo's number."""

    def segment(self, images: Any, image_ids: Any) -> Any:
        from dataclasses import replace

        found = []
        for image, image_id in zip(images, image_ids, strict=True):
            number = int(image_id[-9:-4])
            labels = np.full(image.shape[:2], 3 if number == 7 else 2, np.uint8)
            found.append(replace(Segmentation.of(labels, self.classes), margin=number / 100))
        return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """12 labeled photographs and five broken files."""
    write_corpus(tmp_path / "images", 17, broken_each=1)
    return make_run(str(tmp_path / "images"), str(tmp_path / "run"))[0]


def brush(mask: np.ndarray, name: str, **changed: Any) -> dict[str, Any]:
    """A region as the editor writes it: the run-length code of red RGBA pixels, by Label Studio's own encoder."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = (229, 13, 13, 255)
    height, width = mask.shape
    value = {"format": "rle", "rle": encode_rle(pixels.ravel()), "brushlabels": [name]}
    size = {"original_width": width, "original_height": height, "image_rotation": 0}
    return {"type": "brushlabels", "from_name": "label", "to_name": "image", "value": value} | size | changed


def annotated(task: dict[str, Any], labels: np.ndarray, **changed: Any) -> dict[str, Any]:
    """A task of the project's export whose annotation is `labels` [h, w]."""
    regions = [brush(labels == label, NAMES[label - 1]) for label in np.unique(labels).tolist() if label]
    annotation = {"completed_by": {"id": 4, "email": "ann@example.org"}, "updated_at": WHEN, "result": regions}
    return {"data": task["data"], "annotations": [annotation | changed]}


def masks(run: Run, **options: Any) -> dict[str, np.ndarray]:
    tables = read_tables(run, ["image_id", "mask", "mask_codec"], RowFilter(), **options)
    return {row["image_id"]: unpack_mask(row) for table in tables for row in table.to_pylist()}


def test_rare_or_doubtful_masks_come_first(tmp_path: Path) -> None:
    write_corpus(tmp_path / "images", 12)
    run, _ = make_run(str(tmp_path / "images"), str(tmp_path / "run"), segmenter=Rare)
    picks = select_images(run, 12)
    assert [found.image_id[-9:-4] for found in picks[:4]] == ["00007", "00000", "00001", "00002"]
    assert picks[0].rarity == pytest.approx(1 - np.log(2) / np.log(13))
    assert picks[0].doubt == pytest.approx(4 / 12)
    assert picks[1].doubt == pytest.approx(11 / 12)
    assert [found.score for found in picks] == sorted((found.score for found in picks), reverse=True)
    assert select_images(run, 3) == picks[:3]
    assert [found.image_id for found in select_images(run, 9, RowFilter(classes=("bright",)))] == [
        picks[0].image_id
    ]


def test_disagreement_with_another_run_counts(run: Run, tmp_path: Path) -> None:
    other, _ = make_run(run.identity["input_uri"], str(tmp_path / "other"), segmenter=Halves)
    found = {p.image_id: p.disagreement for p in select_images(run, 99, against=other)}
    assert len(found) == 12
    for image_id, disagreement in found.items():
        mine = brightness_labels(decode((tmp_path / "images" / image_id).read_bytes(), 10**8).pixels)
        theirs = Halves.halves(mine)
        present = sorted(set(np.unique(mine)) | set(np.unique(theirs)))
        ious = [np.sum((mine == k) & (theirs == k)) / np.sum((mine == k) | (theirs == k)) for k in present]
        assert disagreement == pytest.approx(1 - np.mean(ious))
    assert {p.disagreement for p in select_images(run, 99, against=run)} == {0.0}


def test_runs_that_cannot_be_compared_are_refused(run: Run, tmp_path: Path) -> None:
    cut, _ = make_run(run.identity["input_uri"], str(tmp_path / "cut"), shard={"images": 7})
    with pytest.raises(ReviewError, match="in the same shard|has no shard"):
        select_images(run, 1, against=cut)
    others = ClassList.parse(["a", "b", "c"])
    named, _ = make_run(run.identity["input_uri"], str(tmp_path / "named"), classes=others)
    with pytest.raises(ReviewError, match="have different classes"):
        select_images(run, 1, against=named)


def test_tasks_hold_the_masks_and_the_reasons(run: Run) -> None:
    picks = select_images(run, 5)
    tasks, before = review_tasks(run, picks), masks(run)
    assert [task["data"]["image_id"] for task in tasks] == [found.image_id for found in picks]
    for task, found in zip(tasks, picks, strict=True):
        labels = np.zeros_like(before[found.image_id])
        for region in task["predictions"][0]["result"]:
            drawn = decode_rle(region["value"]["rle"]).reshape(*labels.shape, 4)[..., 3] > 0
            labels[drawn] = 1 + NAMES.index(region["value"]["brushlabels"][0])
        assert np.array_equal(labels, before[found.image_id])
        assert task["data"]["review"]["score"] == round(found.score, 4)


def test_corrections_are_stored_exactly_and_originals_are_kept(run: Run) -> None:
    before = masks(run)
    tasks = review_tasks(run, select_images(run, 4))
    ids = [task["data"]["image_id"] for task in tasks]
    edited = np.roll(before[ids[0]], 7, axis=1)
    cancelled = annotated(tasks[2], np.zeros_like(edited), was_cancelled=True)
    export = [annotated(tasks[0], edited), annotated(tasks[1], before[ids[1]]), cancelled, {**tasks[3]}]
    done = apply_review(run, json.dumps(export).encode(), "export.json")
    assert (done.version, done.stored, done.changed, done.confirmed, done.skipped) == (1, True, 1, 1, 2)

    assert all(np.array_equal(mask, before[image_id]) for image_id, mask in masks(run).items())
    after = masks(run, corrections=read_corrections(run))
    assert np.array_equal(after.pop(ids[0]), edited)
    assert all(np.array_equal(mask, before[image_id]) for image_id, mask in after.items())
    assert list(after) == [image_id for image_id in before if image_id != ids[0]]

    [row] = [r for r in read_corrections(run).rows.to_pylist() if r["changed"]]
    assert (row["corrected_by"], row["source"]) == ("ann@example.org", "export.json")
    assert row["corrected_at"].isoformat() == "2026-03-01T12:00:00+00:00"
    assert {c["name"]: c["pixels"] for c in row["classes"]} == {
        ("background", *NAMES)[k]: int(np.sum(edited == k)) for k in np.unique(edited)
    }
    picked_next = {found.image_id for found in select_images(run, 99)}
    assert picked_next == set(before) - set(ids[:2])
    assert {found.image_id for found in select_images(run, 99, again=True)} == set(before)


def test_versions_add_up_and_the_same_export_is_stored_once(run: Run) -> None:
    task = review_tasks(run, select_images(run, 1))[0]
    image_id, plain = task["data"]["image_id"], masks(run)
    first, second = np.zeros_like(plain[image_id]), np.full_like(plain[image_id], 3)
    exports = [json.dumps([annotated(task, labels)]).encode() for labels in (first, second)]
    assert [apply_review(run, export, "e.json").version for export in exports] == [1, 2]
    again = apply_review(run, exports[0], "e.json")
    assert (again.version, again.stored) == (1, False)
    for version, expected in ((None, plain[image_id]), (1, first), (2, second), ("latest", second)):
        found = masks(run, corrections=read_corrections(run, version))  # type: ignore[arg-type]
        assert np.array_equal(found[image_id], expected)
        dataset = MaskDataset(run, corrections=version)  # type: ignore[arg-type]
        assert {e.image_id: np.array_equal(e.mask, expected) for e in dataset}[image_id]
    with pytest.raises(RunError, match="no corrections of version 3; versions: 1, 2"):
        read_corrections(run, 3)
    bright = RowFilter(classes=("bright",), min_area=1.0, min_confidence=1.0)
    assert list(masks_of(run, bright)) == [image_id]  # a filter sees the corrected row


def masks_of(run: Run, keep: RowFilter) -> list[str]:
    tables = read_tables(run, ["image_id"], keep, corrections=read_corrections(run))
    return [image_id for table in tables for image_id in table["image_id"].to_pylist()]


def test_the_last_annotation_and_the_last_brush_win(run: Run) -> None:
    task = review_tasks(run, select_images(run, 1))[0]
    plain = masks(run)[task["data"]["image_id"]]
    entry = annotated(task, np.full_like(plain, 1))
    left = np.zeros(plain.shape, bool)
    left[:, :20] = True
    late = {
        "updated_at": "2026-03-02T00:00:00Z",
        "result": [brush(np.ones_like(left), "dark"), brush(left, "bright")],
    }
    entry["annotations"].insert(0, entry["annotations"][0] | late)
    apply_review(run, json.dumps([entry]).encode(), "e.json")
    found = masks(run, corrections=read_corrections(run))[task["data"]["image_id"]]
    assert np.array_equal(found, np.where(left, 3, 1))


@pytest.mark.parametrize(
    ("applied", "stands"),
    [
        ([("dark", 1), ("bright", 2)], "bright"),
        ([("bright", 2), ("dark", 1)], "bright"),  # an older annotation, applied later
        ([("dark", 1), ("bright", 2), ("dark", 3)], "dark"),  # the first mask again, as the newest annotation
        ([("dark", 1), ("bright", 2), ("dark", 1)], "bright"),  # the first export again
    ],
)
def test_the_time_of_the_annotation_counts_not_the_order_of_applying(
    applied: list[tuple[str, int]], stands: str, run: Run
) -> None:
    task = review_tasks(run, select_images(run, 1))[0]
    image_id = task["data"]["image_id"]
    shape = masks(run)[image_id].shape
    for name, day in applied:
        labels = np.full(shape, NAMES.index(name) + 1, np.uint8)
        entry = annotated(task, labels, updated_at=f"2026-03-0{day}T00:00:00Z")
        apply_review(run, json.dumps([entry]).encode(), "e.json")
    found = masks(run, corrections=read_corrections(run))[image_id]
    assert np.unique(found).tolist() == [NAMES.index(stands) + 1]


def test_a_turned_photograph_is_corrected_as_it_is_seen(tmp_path: Path) -> None:
    run, _ = make_run(str(PHOTOS), str(tmp_path / "run"))
    [task] = [t for t in review_tasks(run, select_images(run, 4)) if t["data"]["image_id"] == "coffee.jpg"]
    region = task["predictions"][0]["result"][0]
    assert (region["original_width"], region["original_height"]) == (600, 400)  # the file's grid is 400 x 600
    seen = upright(masks(run)["coffee.jpg"], 6).copy()
    seen[:50, :80] = 2
    apply_review(run, json.dumps([annotated(task, seen)]).encode(), "e.json")
    assert np.array_equal(masks(run, corrections=read_corrections(run))["coffee.jpg"], to_file_grid(seen, 6))


def test_mismatching_exports_are_refused_and_nothing_is_written(run: Run) -> None:
    task = review_tasks(run, select_images(run, 1))[0]
    image_id = task["data"]["image_id"]
    shape = masks(run)[image_id].shape
    good, wide = np.ones(shape, np.uint8), np.ones((shape[0], shape[1] + 1), bool)
    rectangle = {"type": "rectanglelabels", "value": {}}
    broken = brush(good > 0, "dark")
    broken["value"]["rle"] = broken["value"]["rle"][:9]
    other = {"data": task["data"] | {"run_fingerprint": "0" * 16}, "annotations": [{"result": []}]}
    cases: list[tuple[Any, str]] = [
        (annotated(task, good, result=[brush(wide, "dark")]), "a brush is 65 x 48 pixels, its image 64 x 48"),
        (annotated(task, good, result=[brush(good > 0, "dark", image_rotation=90)]), "unrotated"),
        (annotated(task, good, result=[brush(good > 0, "cat")]), "no class 'cat'; it has: dark, middle, bright"),
        (annotated(task, good, result=[rectangle]), "a region of type 'rectanglelabels'"),
        (annotated(task, good, result=[broken]), "a brush cannot be read"),
        (annotated(task, good, updated_at="soon"), "an annotation has no time"),
        (annotated({"data": {"image_id": "nowhere.jpg"}}, good), "has no image 'nowhere.jpg'"),
        (annotated({"data": {"image_id": "broken/empty-0.jpg"}}, good), "was not labeled"),
        (annotated({"data": {"image": "x"}}, good), "a task has no data.image_id"),
        (other, "is of run 0000000000000000"),
        ("task", "is not a list of tasks"),
    ]
    for entry, message in cases:
        with pytest.raises(ReviewError, match=message):
            apply_review(run, json.dumps([annotated(task, good), entry]).encode(), "e.json")
    with pytest.raises(ReviewError, match="is not JSON"):
        apply_review(run, b"<html>", "e.json")
    assert versions(run) == {}
    assert read_corrections(run) is NO_CORRECTIONS
    assert apply_review(run, b"[]", "e.json").version is None


def test_the_commands_on_s3(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("review")
    write_corpus(s3.folder / "review" / "images", 4)
    run, _ = make_run(f"{bucket}/images", f"{bucket}/run", Storage())

    def cliper(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["review", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "picked    2 images" in cliper("pick", run.uri, "--count", "2", "--output", f"{bucket}/tasks")
    folder = s3.folder / "review" / "tasks"
    assert 'value="bright"' in (folder / "config.xml").read_text()
    tasks = json.loads((folder / "tasks.json").read_text())
    assert tasks[0]["data"]["image"].startswith("s3://review/images/")
    shape = masks(run)[tasks[0]["data"]["image_id"]].shape
    export = tmp_path / "export.json"
    export.write_text(json.dumps([annotated(task, np.zeros(shape, np.uint8)) for task in tasks]))
    shown = cliper("apply", run.uri, str(export))
    assert "reviewed  2 images: 2 changed, 0 confirmed" in shown
    assert "corrections/v0001" in shown
    assert "it held these corrections already" in cliper("apply", run.uri, str(export))
    assert len(read_corrections(run).rows) == 2
    for arguments, message in (
        (["pick", run.uri, "--output", f"{bucket}/tasks"], "exists already"),
        (["apply", run.uri, str(tmp_path / "none.json")], "does not exist"),
    ):
        with pytest.raises(CliperError, match=message):
            CliRunner().invoke(app, ["review", *arguments], catch_exceptions=False)
