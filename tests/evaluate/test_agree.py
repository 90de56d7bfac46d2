"""Agreement of runs: counted by hand, exact across shards and interruptions, and a term of review."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.model.segmentation import Segmentation
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.agree import (
    count_agreement,
    image_agreement,
    open_agreement,
    read_agreement,
    write_agreement,
)
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.prepared import Prepared
from cliper.pipeline.report.run_page import write_run_report
from cliper.pipeline.review.select import select_images
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.backend import Storage
from tests.support import benchmark_trees as trees
from tests.support.fakes import Brightness, brightness_labels, write_corpus
from tests.support.labeled import label_small

A = {"a": [[1, 1, 0, 0], [2, 2, 2, 2]], "b": [[0, 0, 0, 0], [1, 1, 1, 1]], "c": [[1, 1, 1, 1], [1, 1, 1, 1]]}
B = {"a": [[1, 1, 0, 0], [2, 2, 2, 1]], "b": [[0, 0, 0, 0], [2, 2, 2, 2]], "c": [[1, 1, 1, 1], [1, 1, 1, 1]]}
C = {"a": [[1, 1, 0, 0], [2, 2, 2, 2]], "b": [[0, 0, 0, 0], [1, 1, 1, 1]], "c": [[0, 0, 0, 0], [0, 0, 0, 0]]}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    root = tmp_path / "raw"
    trees.names(root / "classes.txt", ["cat", "dog"])
    for name, labels in A.items():
        trees.photo(root / f"images/{name}.png", (2, 4))
        trees.grey(root / f"labels/{name}.png", np.array(labels, np.uint8))
    return prepare("folder", root, str(tmp_path / "out"), Storage())


def stored(prepared: Prepared, folder: Path, masks: dict[str, list[list[int]]], **settings: object) -> Run:
    arrays = {name: np.array(labels, np.uint8) for name, labels in masks.items()}
    return trees.stored_run(str(folder), prepared, arrays, **settings)  # type: ignore[arg-type]


def test_counts_are_those_by_hand(prepared: Prepared, tmp_path: Path) -> None:
    a, b = stored(prepared, tmp_path / "a", A), stored(prepared, tmp_path / "b", B)
    agreement = open_agreement([a, b])
    assert [summary["counted"] for summary in count_agreement(agreement)] == [2, 1]
    found = read_agreement(agreement)
    assert found.confusions[0].tolist() == [[6, 0, 0], [0, 10, 4], [0, 1, 3]]
    # a: background 2 of 2, cat 2 of 3, dog 3 of 4; b: background 4 of 4, cat and dog 0 of 4
    expected = {"b": (1 + 0 + 0) / 3, "a": (1 + 2 / 3 + 3 / 4) / 3, "c": 1.0}
    assert found.images["image_id"].to_pylist() == list(expected)
    assert found.images["agreement"].to_pylist() == pytest.approx(list(expected.values()))
    text = write_agreement(agreement, found)
    assert "| cat | 66.67 |" in text  # 10 of 15
    write_run_report(a, str(tmp_path / "report.html"), sample=10)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Agreement</h2>" in page
    assert f'<td class="text">{b.uri}</td><td class="n">3</td>' in page
    assert "<div>dog 37.5%</div>" in page  # 3 of 8
    assert "| cat | dog | 16.67 |" in text  # 4 of 24 pixels
    assert image_agreement(a, agreement.folder) == pytest.approx(expected)
    assert list(count_agreement(open_agreement([a, b]))) == []  # all shards are counted


def test_the_result_does_not_depend_on_shards(prepared: Prepared, tmp_path: Path) -> None:
    results = []
    for size in (1, 3):
        runs = [stored(prepared, tmp_path / f"{name}{size}", masks, shard_images=size)
                for name, masks in (("a", A), ("b", B), ("c", C))]  # fmt: skip
        agreement = open_agreement(runs)
        assert agreement.pairs == [(0, 1), (0, 2), (1, 2)]
        assert len(list(count_agreement(agreement))) == 3 / size
        results.append(read_agreement(agreement))
    one, other = results
    assert one.images.equals(other.images)
    assert all(np.array_equal(x, y) for x, y in zip(one.confusions, other.confusions, strict=True))
    assert one.images["image_id"].to_pylist()[0] == "c"  # A and B against C


def test_images_without_a_mask_are_left_out(prepared: Prepared, tmp_path: Path) -> None:
    agreement = open_agreement(
        [stored(prepared, tmp_path / "a", A), stored(prepared, tmp_path / "b", B, failed="b")]
    )
    list(count_agreement(agreement))
    found = read_agreement(agreement)
    assert (found.left_out, found.images["image_id"].to_pylist()) == (1, ["a", "c"])
    assert "1 without a mask in some run are left out" in write_agreement(agreement, found)


def test_runs_that_cannot_be_compared_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    a = stored(prepared, tmp_path / "a", A)
    with pytest.raises(EvaluationError, match="two runs or more"):
        open_agreement([a])
    with pytest.raises(EvaluationError, match="is given twice"):
        open_agreement([a, a])
    few = stored(prepared, tmp_path / "few", {"a": A["a"], "c": A["c"]})
    with pytest.raises(EvaluationError, match="shard 0 of .* holds different images, e.g. 'b'"):
        list(count_agreement(open_agreement([a, few])))


class Darker(Brightness):
    """Brightness, with the last class one step darker in images whose id has a 1."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        return [
            Segmentation.of(brightness_labels(image) // (2 if "1" in image_id else 1), self.classes)
            for image, image_id in zip(images, image_ids, strict=True)
        ]


def test_the_command_and_review(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 3)
    a = label_small(tmp_path / "in", tmp_path / "a")
    b = label_small(tmp_path / "in", tmp_path / "b", factory=Darker)
    done = CliRunner().invoke(app, ["agree", a.uri, b.uri], catch_exceptions=False)
    assert done.exit_code == 0
    assert "3 images, mean IoU between runs" in done.stdout
    folder = done.stdout.strip().splitlines()[-1]
    known = image_agreement(a, folder)
    picks = select_images(a, 3, agreement=known)
    assert {p.image_id: p.disagreement for p in picks} == {name: 1 - value for name, value in known.items()}
    assert picks[0].image_id == "part1/photo-00001.jpg"
    assert [p.disagreement for p in picks[1:]] == [0, 0]
    assert select_images(a, 1, against=b) == picks[:1]
    tasks = ["review", "pick", a.uri, "--agreement", folder, "--count", "1", "--output", str(tmp_path / "tasks")]
    assert CliRunner().invoke(app, tasks, catch_exceptions=False).exit_code == 0
    assert "part1/photo-00001.jpg" in (tmp_path / "tasks" / "tasks.json").read_text()
