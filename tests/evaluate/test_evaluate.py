"""The evaluation of a run: exact for any shards, actors, order and interruptions; complete or refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml
from PIL import Image

from cliper.jobs.evaluate import find_mode
from cliper.model.errors import ConfigError
from cliper.pipeline.config import JobConfig, ResourceConfig, ShardConfig, load_classes, load_config
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.evaluation import count_stored, open_evaluation, require_labeled
from cliper.pipeline.evaluate.metrics import score
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.results import Setting, summarise
from cliper.pipeline.flow import label_corpus
from cliper.pipeline.label.job import open_job
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.storage.backend import Storage
from tests.conftest import ROOT
from tests.support import benchmark_trees as trees
from tests.support.command import cliper_here
from tests.support.jobs import tasks_of
from tools.scenes import CLASSES, SEEDS, make_scene

SCENES = 12
IGNORE = (255, 65_535)


def prepared_folder(tmp_path: Path, images: int = 5):
    root = tmp_path / "raw"
    root.mkdir()
    truths = trees.folder(root, images=images)
    return truths, prepare("folder", root, str(tmp_path / "out"), Storage())


def count(evaluation) -> list[str]:
    """Count all shards in this process; returns the problems."""
    table = evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    return [problem for problem in table.column("problem").to_pylist() if problem is not None]


def test_a_result_computed_by_hand(tmp_path):
    root = tmp_path / "raw"
    trees.names(root / "classes.txt", ["cat", "dog", "cow"])
    truths = {"a": [[1, 1, 0, 255], [1, 1, 0, 255]], "b": [[2, 2, 2, 2], [0, 0, 0, 0]]}
    guesses = {"a": [[1, 1, 1, 3], [1, 0, 0, 3]], "b": [[2, 2, 1, 1], [0, 0, 0, 3]]}
    for name, truth in truths.items():
        trees.photo(root / f"images/{name}.png", (2, 4))
        trees.grey(root / f"labels/{name}.png", np.array(truth, dtype=np.uint8))
    prepared = prepare("folder", root, str(tmp_path / "out"), Storage())
    predictions = {name: np.array(guess, dtype=np.uint8) for name, guess in guesses.items()}
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, predictions, 1), prepared)
    assert count(evaluation) == []
    counts = evaluation.read()
    assert counts.confusion[:, :4].tolist() == [[4, 1, 0, 1], [1, 3, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0]]
    assert counts.ignored_pixels == 2
    results = summarise(counts, evaluation.identity, Setting("cliper", "cliper"))
    # background 4 of 7, cat 3 of 7, dog 2 of 4; cow is predicted but absent from the truth
    assert results["miou"] == pytest.approx((4 / 7 + 3 / 7 + 2 / 4) / 3, abs=1e-12)
    assert results["pixel_accuracy"] == pytest.approx(9 / 14, abs=1e-12)
    assert results["mean_accuracy"] == pytest.approx((4 / 6 + 3 / 4 + 2 / 4) / 3, abs=1e-12)
    assert results["frequency_weighted_iou"] == pytest.approx(6 / 14 * 4 / 7 + 4 / 14 * 3 / 7 + 4 / 14 * 2 / 4)
    other = summarise(counts, evaluation.identity, Setting("mmseg", "cliper"))
    assert other["miou"] == pytest.approx((4 / 7 + 3 / 7 + 2 / 4 + 0) / 4, abs=1e-12)
    assert [image["image_id"] for image in results["per_class"][1]["worst_images"]] == ["a"]


def test_failed_images_are_refused_or_counted_as_wrong(tmp_path):
    truths, prepared = prepared_folder(tmp_path)
    run = trees.stored_run(str(tmp_path / "run"), prepared, truths, failed="scene-003")
    [problem] = count(open_evaluation(run, prepared))
    assert "image 'scene-003' was not labeled (truncated)" in problem
    assert "--count-failed" in problem
    shutil.rmtree(tmp_path / "run/evaluation")
    evaluation = open_evaluation(run, prepared, count_failed=True)
    assert count(evaluation) == []
    counts = evaluation.read()
    wrong = int((truths["scene-003"] != 255).sum())
    assert (counts.failed, counts.confusion[:, -1].sum()) == (("scene-003",), wrong)
    assert counts.confusion[:, :-1].sum() == np.trace(counts.confusion[:, :-1])


def test_every_image_must_be_there_once(tmp_path):
    truths, prepared = prepared_folder(tmp_path)
    few = {name: truth for name, truth in truths.items() if name != "scene-002"}
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "few"), prepared, few), prepared)
    count(evaluation)
    with pytest.raises(EvaluationError, match=r"1 of 5 images .* not counted, e.g. 'scene-002'"):
        evaluation.read()
    many = truths | {"copy/scene-001.jpg": truths["scene-001"]}
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "many"), prepared, many), prepared)
    count(evaluation)
    with pytest.raises(EvaluationError, match="'scene-001' was counted 2 times"):
        evaluation.read()


def test_ids_may_be_file_names_and_other_images_are_skipped(tmp_path):
    truths, prepared = prepared_folder(tmp_path)
    files = {f"JPEGImages/{name}.jpg": truth for name, truth in truths.items()}
    files["JPEGImages/of-another-split.jpg"] = np.zeros((3, 3), dtype=np.uint8)
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, files), prepared)
    assert count(evaluation) == []
    counts = evaluation.read()
    assert len(counts.image_ids) == 5
    assert np.trace(counts.confusion[:, :-1]) == sum(int((t != 255).sum()) for t in truths.values())


def test_mismatching_runs_are_refused(tmp_path):
    truths, prepared = prepared_folder(tmp_path)
    small = {name: truth[:4] for name, truth in truths.items()}
    problems = count(open_evaluation(trees.stored_run(str(tmp_path / "small"), prepared, small, 5), prepared))
    assert "image 'scene-000': the prediction is 4x12 pixels but the ground truth 8x12" in problems[0]

    run = trees.stored_run(str(tmp_path / "run"), prepared, truths)
    other_root = tmp_path / "raw4"
    other_root.mkdir()
    trees.folder(other_root, classes=4)
    other = prepare("folder", other_root, str(tmp_path / "out4"), Storage())
    with pytest.raises(EvaluationError, match="class 4 is absent in the run and 'class 4' in the benchmark"):
        open_evaluation(run, other)
    open_evaluation(run, prepared)
    with pytest.raises(EvaluationError, match=r"another evaluation: count_failed was false, is now true.*Remove"):
        open_evaluation(run, prepared, count_failed=True)
    (tmp_path / "run/labels/shard-000001.parquet").unlink()
    with pytest.raises(EvaluationError, match="1 of 3 shards are not labeled"):
        require_labeled(run)


def test_a_missing_ground_truth_file_is_named(tmp_path):
    truths, prepared = prepared_folder(tmp_path)
    (tmp_path / "out/truth/scene-004.png").unlink()
    problems = count(open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, truths), prepared))
    assert "image 'scene-004': its ground truth cannot be read (FileNotFoundError" in problems[0]


# The whole thing on Ray with a real model.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with pixel labels, prepared."""
    root = tmp_path_factory.mktemp("scenes")
    trees.names(root / "classes.txt", list(CLASSES))
    for i in range(SCENES):
        scene = make_scene(SEEDS["test"], i, 80)
        trees.grey(root / f"labels/scene-{i:02d}.png", scene.labels)
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(scene.image).save(root / f"images/scene-{i:02d}.png")
    return prepare("folder", root, str(root / "prepared"), Storage())


@pytest.fixture(scope="module")
def model():
    """The embedded model, trained on such scenes, without FGC, which would take most of the suite's time."""
    return load_config("tiny").model.model_copy(update={"fgc": None})


@pytest.fixture(scope="module")
def expected(scenes, model):
    """The matrix by one loop over the images with the model in this process, counted pixel by pixel."""
    from cliper.model import CLIPer

    root = Path(scenes.uri).parent
    cliper = CLIPer.load(model, load_classes(str(root / "classes.txt")))
    size = len(CLASSES) + 1
    matrix = np.zeros((size, size), dtype=np.int64)
    for i in range(SCENES):
        name = f"scene-{i:02d}"
        [found] = cliper.segment([np.array(Image.open(root / f"images/{name}.png"))], [name])
        truth = np.array(Image.open(root / f"labels/{name}.png"))
        for t, p in zip(truth.ravel().tolist(), found.labels.ravel().tolist(), strict=True):
            matrix[t, p] += 1
    assert len(np.flatnonzero(matrix)) > 20  # a test of nothing otherwise
    return matrix


def live(scenes, model, uri: Path, actors: int, shard_images: int):
    """Label and count in one flow, as `cliper evaluate` does."""
    resources = ResourceConfig(actors=actors, threads=0)
    config = JobConfig(model=model, shard=ShardConfig(images=shard_images), resources=resources)
    classes = load_classes(str(Path(scenes.uri).parent / "classes.txt"))
    job = open_job(scenes.index_uri, str(uri), config, classes, Storage())
    evaluation = open_evaluation(job.run, scenes)
    for summary in label_corpus(job, tasks_of(job), Pool(actors, 0.75, 0), evaluation.counter().stage):
        assert summary["problem"] is None
    return evaluation


@pytest.mark.parametrize(("actors", "shard_images"), [(1, 12), (3, 5)])
@pytest.mark.usefixtures("ray_local")
def test_identical_matrices_for_any_actors_and_shards_live_and_stored(
    actors, shard_images, scenes, model, expected, tmp_path
):
    evaluation = live(scenes, model, tmp_path / "run", actors, shard_images)
    first = evaluation.read()
    assert np.array_equal(first.confusion[:, :-1], expected)
    assert not first.confusion[:, -1].any()
    shutil.rmtree(tmp_path / "run/evaluation")
    stored = open_evaluation(read_run(str(tmp_path / "run"), Storage()), scenes)
    shards = stored.uncounted_shards()
    assert len(shards) == -(-SCENES // shard_images)
    assert sum(summary["counted"] for summary in count_stored(stored, shards[:1])) == shard_images
    assert stored.uncounted_shards() == shards[1:]
    list(count_stored(stored, shards[1:]))  # the rest, as after an interruption
    second = stored.read()
    assert np.array_equal(second.confusion, first.confusion)
    assert np.array_equal(second.totals, first.totals)
    assert np.array_equal(second.boundary, first.boundary)


def benchmark_yaml(path: Path, scenes, model) -> str:
    content = {
        "benchmark": "folder",
        "backbone": "tiny",
        "protocol": "cliper",
        "classes": str(Path(scenes.uri).parent / "classes.txt"),
        "model": model.model_dump(mode="json"),
        "variants": {"whole": {}},
        "published_miou": {"whole": 12.5},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def cliper(*arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cliper.jobs.cli", "evaluate", *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_resumed_then_from_stored_shards_without_torch(
    scenes, model, expected, ray_local, monkeypatch, tmp_path
):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    config, run = benchmark_yaml(tmp_path / "scenes.yaml", scenes, model), tmp_path / "run"
    arguments = [config, "--data", scenes.uri, "--output", str(run), "--shard-images", "2", "--actors", "1"]
    killed = cliper(*arguments)
    counts = run / "evaluation/folder-png/counts"
    deadline = time.monotonic() + 120
    while not list(counts.glob("shard-*.parquet")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = len(list(counts.glob("shard-*.parquet")))
    assert 0 < done < 6

    resumed = cliper(*arguments)
    printed, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    metrics = run / "evaluation/folder-png/cliper/metrics.json"
    results = json.loads(metrics.read_text())
    assert np.array_equal(np.array(results["confusion"])[:, :-1], expected)
    assert results["miou"] == score(np.array(results["confusion"]), "cliper", IGNORE).miou
    assert results["published_miou"] == 0.125
    assert f"{100 * results['miou']:.2f}" in printed

    shutil.rmtree(run / "evaluation")
    # A torch that cannot be imported, in the command and in every worker it starts.
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch/torch.py").write_text("raise RuntimeError('torch was imported')")
    path = os.pathsep.join([str(tmp_path / "no-torch"), str(ROOT)])
    monkeypatch.delenv("RAY_ADDRESS")
    stored = cliper("--run", str(run), "--data", scenes.uri, PYTHONPATH=path)
    _, errors = stored.communicate()
    assert stored.returncode == 0, errors
    again = json.loads(metrics.read_text())
    same = ("confusion", "miou", "miou_interval", "per_class", "boundary_iou", "fingerprint")
    assert {key: again[key] for key in same} == {key: results[key] for key in same}
    assert again["published_miou"] is None  # the published setting of this run is unknown


def test_mistakes_are_one_message_and_exit_code_2(tmp_path):
    _, prepared = prepared_folder(tmp_path)
    for arguments, message in [
        (["--run", str(tmp_path / "nothing"), "--data", prepared.uri], "is not a run folder"),
        (
            ["voc21-b16", "--data", prepared.uri, "--output", str(tmp_path / "x")],
            "holds folder, but the config is for",
        ),
        (["voc99", "--data", "x", "--output", "y"], "neither a file nor a shipped benchmark config"),
        (["voc21-b16", "--output", "y"], "--data is missing"),
    ]:
        done = cliper_here("evaluate", *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--run": "a", "--all": True}, "--run and --all do not go together; give one of them"),
        ({"BENCHMARK": "voc21-b16", "--compare": ("a", "b")}, "BENCHMARK has no effect with --compare"),
        ({"--all": True, "--output": "o"}, "--data is missing; e.g. cliper evaluate"),
        ({"--run": "a", "--data": "d", "--output": "o"}, "--output has no effect with --run"),
        (
            {"BENCHMARK": "b", "--data": "d", "--output": "o", "--protocol": "mmseg"},
            "--protocol has no effect without --run, --all, --sweep or --compare",
        ),
        ({"BENCHMARK": "b", "--data": "d", "--output": "o", "--only": ["x"]}, "--only has no effect"),
    ],
)
def test_arguments_that_mean_nothing_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        find_mode(dict.fromkeys(["--data", "--output", "--run"]) | given)
