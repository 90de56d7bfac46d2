"""Results, report page, comparison of runs, the table, and sweeps."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cliper.jobs.evaluate import parse_sweep
from cliper.jobs.evaluations import evaluate_all
from cliper.model.config import BackboneConfig, CLIPerConfig, FusionConfig, LabelConfig
from cliper.pipeline.config import JobConfig, ShardConfig, load_classes
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.charts import confusions, heat_map, taken_for
from cliper.pipeline.evaluate.compare import compare, find_results, matching, table, to_html
from cliper.pipeline.evaluate.compare import to_markdown as comparison_text
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.evaluate.page import write_report
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.results import Setting, image_miou, summarise, to_csv, to_markdown
from cliper.pipeline.evaluate.sweep import SweepShard, make_grid, open_sweep, sweep_results, sweep_table
from cliper.pipeline.label.job import open_job
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.digests import checked
from tests.support import benchmark_trees as trees
from tools.scenes import SEEDS, make_scene

STORAGE = Storage()


def noisy(truths, share, seed=0):
    """Predictions with a share of the pixels wrong."""
    rng = np.random.default_rng(seed)
    guess = {name: np.where(truth == 255, 0, truth) for name, truth in truths.items()}
    return {
        name: np.where(rng.random(g.shape) < share, rng.integers(0, 4, g.shape), g).astype(np.uint8)
        for name, g in guess.items()
    }


def reported(tmp_path: Path, name: str, prepared, predictions, protocol="cliper"):
    """A run with its report written."""
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / name), prepared, predictions, 4), prepared)
    evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    counts = evaluation.read()
    setting = Setting(protocol, "cliper", name, "tiny", "whole", f"model {name}", 0.5)
    results = summarise(counts, evaluation.identity, setting, prepared.expected)
    return evaluation, counts, results, write_report(evaluation, counts, results)


@pytest.fixture
def prepared(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    trees.folder(root, shape=(24, 32), images=10)
    return prepare("folder", root, str(tmp_path / "out"), STORAGE)


@pytest.fixture
def truths(prepared):
    return {
        row["image_id"]: np.array(Image.open(Path(prepared.uri) / row["truth"]))
        for row in prepared.index().to_pylist()
    }


def test_the_report_has_every_form_and_they_agree(tmp_path, prepared, truths):
    predictions = noisy(truths, 0.2)
    predictions["scene-007"] = np.full_like(predictions["scene-007"], 3)  # the worst by far
    predictions["scene-004"] = np.where(truths["scene-004"] == 255, 0, truths["scene-004"]).astype(np.uint8)
    evaluation, counts, results, page = reported(tmp_path, "run", prepared, predictions)
    folder = Path(page).parent
    assert checked((folder / "metrics.json").read_bytes()) == results
    wanted = {
        "miou",
        "per_class",
        "confusion",
        "protocol",
        "images",
        "fingerprint",
        "published_miou",
        "miou_interval",
    }
    assert wanted <= set(results)
    rows = list(csv.DictReader(io.StringIO((folder / "per_class.csv").read_text())))
    assert [row["name"] for row in rows] == ["background", "class 1", "class 2", "class 3"]
    counted = [float(row["iou"]) for row in rows if row["counted"] == "True"]
    assert sum(counted) / len(counted) == pytest.approx(results["miou"], abs=1e-12)
    low, high = results["miou_interval"]
    assert low < results["miou"] < high

    html = (folder / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", html), "the page must load nothing"
    assert html.count("data:image/webp") == 3 * 8  # four best, four worst: photo, truth, prediction
    for text in (f"{100 * results['miou']:.2f}", "50.00", "class 2", "protocol cliper", "not counted"):
        assert text in html
    best = html[html.index("Best images") : html.index("Worst images")]
    assert "scene-004, mIoU 100.00" in best
    worst = html[html.index("Worst images") :]
    assert worst.index("scene-007") < worst.index("scene-", worst.index("scene-007") + 1)
    ranked = image_miou(counts, evaluation.prepared.ignore_labels)
    assert counts.image_ids[int(np.argmin(ranked))] == "scene-007"
    assert results["per_class"][1]["worst_images"][0]["image_id"] == "scene-007"


def test_names_are_escaped(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    truths = trees.folder(root)
    trees.names(root / "classes.txt", ['a "b" c', "b & c", "$x_1$"])
    prepared = prepare("folder", root, str(tmp_path / "out"), STORAGE)
    *_, page = reported(tmp_path, "run", prepared, truths)
    html = Path(page).read_text()
    assert "a &#34;b&#34; c" in html and 'a "b" c' not in html
    assert "b &amp; c" in html
    table = (Path(page).parent / "per_class.tex").read_text()
    assert r"b \& c &" in table and r"\$x\_1\$ &" in table
    assert table.count(r" \\") == 2 + 4, "a head, three classes and background, and their mean"


def test_failed_and_partial_evaluations_are_marked(tmp_path, prepared, truths):
    run = trees.stored_run(str(tmp_path / "run"), prepared, truths, failed="scene-001")
    evaluation = open_evaluation(run, prepared, count_failed=True)
    evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    counts = evaluation.read()
    results = summarise(counts, evaluation.identity, Setting("mmseg", "cliper"), expected=1449)
    html = Path(write_report(evaluation, counts, results)).read_text()
    assert "Only 10 of the benchmark&#39;s 1449 images" in html
    assert "1 images have no mask" in html
    assert "labels decided by | protocol cliper" in to_markdown(results)
    assert "scene-001, mIoU" not in html


def test_the_matrix_holds_every_class_even_171_of_them():
    size = 172
    confusion = np.zeros((size, size + 1), dtype=np.int64)
    confusion[np.arange(size), np.arange(size)] = 4 * np.arange(size)
    confusion[171, 3], confusion[5, 9], confusion[7, size] = 300, 20, 1
    per_class = [{"name": f"n{k}", "counted": k > 0, "iou": k / size, "class_id": k} for k in range(size)]
    results = {"per_class": per_class, "confusion": confusion.tolist()}
    heat = heat_map(results)
    assert heat["rows"] == [f"n{k}" for k in range(1, size)], "classes that occur"
    assert heat["columns"] == [*heat["rows"], "no class"]
    assert heat["totals"][170] == 4 * 171 + 300
    with Image.open(io.BytesIO(base64.b64decode(heat["image"].partition(",")[2]))) as image:
        opacity = np.array(image)[..., 3]
    shares = np.array(heat["cells"]) / np.array(heat["totals"])[:, None]
    assert np.abs((opacity / 255.0) ** 2 - shares).max() < 0.01
    first, second = confusions(results)
    assert first == {"truth": "n171", "predicted": "n3", "pixels": 300, "share": 300 / (4 * 171 + 300)}
    assert second == {"truth": "n5", "predicted": "n9", "pixels": 20, "share": 0.5}
    assert [k for k, found in enumerate(taken_for(results)) if found] == [5, 171]


def test_compare_pairs_the_runs(tmp_path, prepared, truths):
    reported(tmp_path, "a", prepared, noisy(truths, 0.5))
    reported(tmp_path, "b", prepared, noisy(truths, 0.1))
    first, second = matching(str(tmp_path / "a"), str(tmp_path / "b"), STORAGE)
    comparison = compare(first, second, STORAGE)
    found, page = comparison.found, comparison_text(comparison)
    assert found.miou == pytest.approx(second.results["miou"] - first.results["miou"], abs=1e-12)
    assert 0 < found.interval.low < found.miou < found.interval.high
    assert found.share_better == 1
    figures = [f"{100 * entry.results['miou']:.2f}" for entry in (first, second)]
    assert f"| mIoU | {figures[0]} | {figures[1]} | {100 * found.miou:+.2f} |" in page
    html = to_html(comparison)
    for text in (*figures, f"{100 * found.miou:+.2f}", "Images that gain most", "class 2", '<td class="n">+'):
        assert text in html
    assert "Images that lose most" not in html
    assert [entry.results["setting"] for entry in find_results(str(tmp_path / "a"), STORAGE)] == ["a"]


def test_damaged_results_are_named_and_those_without_a_digest_are_read(tmp_path, prepared, truths):
    *_, results, page = reported(tmp_path, "a", prepared, noisy(truths, 0.5))
    run, file = str(tmp_path / "a"), Path(page).parent / "metrics.json"
    written = file.read_bytes()
    for place in range(len(written)):
        file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        try:
            assert find_results(run, STORAGE)[0].results == results, place
        except EvaluationError as error:
            assert "metrics.json is damaged" in str(error) and "'cliper evaluate' again" in str(error)
    file.write_text(json.dumps(results))  # as version 0.1 wrote it
    assert find_results(run, STORAGE)[0].results == results


def test_a_comparison_needs_whole_evaluation_files(tmp_path, prepared, truths):
    reported(tmp_path, "a", prepared, truths)
    first, second = matching(str(tmp_path / "a"), str(tmp_path / "a"), STORAGE)
    [file] = tmp_path.rglob("evaluation.json")
    file.write_text(file.read_text().replace("255", "254"))  # the label that is not counted
    with pytest.raises(EvaluationError, match=r"evaluation\.json is damaged"):
        compare(first, second, STORAGE)


def test_runs_that_share_nothing_are_not_compared(tmp_path, prepared, truths):
    reported(tmp_path, "a", prepared, truths)
    reported(tmp_path, "b", prepared, truths, protocol="mmseg")
    with pytest.raises(
        EvaluationError, match=r"share no evaluation: .*protocol cliper.* against .*protocol mmseg"
    ):
        matching(str(tmp_path / "a"), str(tmp_path / "b"), STORAGE)
    with pytest.raises(EvaluationError, match="no finished evaluation; run 'cliper evaluate"):
        matching(str(tmp_path / "a"), str(tmp_path / "nothing"), STORAGE)


def test_the_table_prints_measured_and_published_values():
    base = {"protocol": "cliper", "backbone": "ViT-B/16", "variant": "whole", "images": 2, "images_expected": 2}
    rows = [
        base | {"benchmark": "voc21", "miou": 0.6638, "published_miou": 0.664},
        base | {"benchmark": "ade20k", "miou": 0.2151, "published_miou": 0.215, "images": 1},
        base | {"benchmark": "voc21", "variant": "mine", "miou": 0.5, "published_miou": None},
    ]
    assert table(rows).splitlines() == [
        "| protocol | backbone | setting | voc21 | ade20k |",
        "|---|---|---|---|---|",
        "| cliper | ViT-B/16 | whole | 66.4 (66.4) | 21.5* (21.5) |",
        "| cliper | ViT-B/16 | mine | 50.0 | - |",
    ]


def test_the_table_names_what_is_missing(tmp_path, capsys):
    from cliper.jobs.evaluations import Options

    options = Options(STORAGE, None, None, None, None, False)
    with pytest.raises(EvaluationError, match="no prepared benchmark; run 'cliper prepare'"):
        evaluate_all(str(tmp_path), str(tmp_path / "runs"), ["voc21-b16", "cityscapes-l14"], options)
    printed = capsys.readouterr().err
    assert f"{tmp_path}/voc21" in printed and f"{tmp_path}/cityscapes-halves" in printed


@pytest.fixture
def job(tmp_path, prepared, tiny_clip):
    for i, path in enumerate(sorted((tmp_path / "raw/images").iterdir())):  # something to see
        Image.fromarray(make_scene(SEEDS["test"], i, 64).image).resize((32, 24)).save(path)
    model = CLIPerConfig(
        backbone=BackboneConfig(model=f"local-dir:{tiny_clip}"),
        fusion=FusionConfig(short_side=112),
        labels=LabelConfig(presence_threshold=0.1, background_threshold=0.3),
        fgc=None,
    )
    config = JobConfig(model=model, shard=ShardConfig(images=6))
    classes = load_classes(str(tmp_path / "raw/classes.txt"))
    return open_job(prepared.index_uri, str(tmp_path / "run"), config, classes, STORAGE)


def test_a_sweep_equals_separate_runs_and_runs_the_networks_once(job, prepared, tmp_path, monkeypatch):
    from cliper.model import CLIPer, segmenter

    passes = []
    original = segmenter.layer_scores
    monkeypatch.setattr(segmenter, "layer_scores", lambda *a: passes.append(1) or original(*a))
    values = parse_sweep(
        ["attention_threshold=0.2,0.99", "background_threshold=0.0,0.9", "presence_threshold=0.1,0.9"]
    )
    grid = make_grid(job.config, values)
    assert len(grid.variants()) == 8
    evaluation = open_evaluation(job.run, prepared)
    folder = open_sweep(evaluation, grid)
    assert folder == open_sweep(evaluation, grid)
    worker = SweepShard(job, grid, evaluation.counter(folder), 1)
    for shard in range(job.manifest.shards):
        entries = job.manifest.read_shard(STORAGE, job.run.uri, shard)
        worker(load_entries(STORAGE, shard, entries, "image"))
    assert len(passes) == prepared.images
    rows = sweep_results(STORAGE, folder, prepared, grid, "cliper")
    assert [row["miou"] for row in rows] == sorted((row["miou"] for row in rows), reverse=True)
    assert len({row["miou"] for row in rows}) > 2  # the thresholds matter here
    for row in (rows[0], rows[-1]):
        labels = {key: row[key] for key in ("presence_threshold", "background_threshold")}
        fusion = job.config.model.fusion.model_copy(update={"attention_threshold": row["attention_threshold"]})
        settings = job.config.model.model_copy(update={"fusion": fusion, "labels": LabelConfig(**labels)})
        cliper = CLIPer.load(settings, job.classes)
        predictions = {}
        for path in sorted((tmp_path / "raw/images").iterdir()):
            [found] = cliper.segment([np.array(Image.open(path))], [path.stem])
            predictions[path.stem] = found.labels
        *_, results, _ = reported(tmp_path, f"alone-{row['miou']}", prepared, predictions)
        assert results["miou"] == row["miou"]
    assert len((Path(folder) / "sweep.csv").read_text().splitlines()) == 9


def test_sweeps_of_the_unknown_are_refused(job):
    with pytest.raises(
        EvaluationError, match="'logit_scale' cannot be swept; allowed: attention_threshold, presence"
    ):
        make_grid(job.config, {"logit_scale": [50]})
    from cliper.model.errors import ConfigError

    with pytest.raises(ConfigError, match="presence_threshold: Input should be less than or equal to 1"):
        make_grid(job.config, {"presence_threshold": [2]})
    with pytest.raises(ConfigError, match="expected SETTING=A,B"):
        parse_sweep(["presence_threshold"])


def test_csv_leaves_undefined_ratios_empty():
    entry = {"class_id": 1, "name": "a, b", "counted": False, "iou": None, "accuracy": None, "boundary_iou": None,
             "truth_pixels": 0, "predicted_pixels": 0}  # fmt: skip
    assert to_csv({"per_class": [entry]}).splitlines()[1] == '1,"a, b",False,,,,0,0'


def test_the_margin_threshold_is_swept_and_otherwise_not_named():
    config = JobConfig()
    grid = make_grid(config, {"margin_threshold": [0.0, 0.3]})
    assert [variant["margin_threshold"] for variant in grid.variants()] == [0.0, 0.3]
    assert "margin_threshold" not in make_grid(config, {"presence_threshold": [0.1]}).variants()[0]
    rows = [variant | {"miou": 0.5, "pixel_accuracy": 0.6} for variant in grid.variants()]
    assert sweep_table(rows).splitlines()[0] == "| margin_threshold | mIoU | pixel accuracy |"
