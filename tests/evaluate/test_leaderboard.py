"""One table of several segmenters on imitations of the published trees."""

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from cliper.jobs.evaluations import Options
from cliper.jobs.leaderboard import entry_config, evaluate_segmenters, prepared_benchmarks
from cliper.jobs.options import Resources
from cliper.jobs.session import ray_session
from cliper.model.errors import ConfigError
from cliper.pipeline.config import load_classes
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.prepared import open_prepared
from cliper.pipeline.storage.backend import Storage
from tests.support import benchmark_trees as trees
from tests.support.direct import label_directly
from tests.support.tiny_models import tipsv2_folder


@pytest.fixture(scope="module")
def tips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A labeling config of a tiny TIPSv2."""
    folder = tipsv2_folder(tmp_path_factory.mktemp("weights"))
    model = {"model": str(folder), "short_side": 28, "prompts": {"templates": ["{}"], "mean_class": False}}
    path = tmp_path_factory.mktemp("config") / "tips.yaml"
    path.write_text(yaml.safe_dump({"segmenter": "tipsv2", "model": model}))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, tree in (("voc21", trees.voc), ("ade20k", trees.ade20k)):
        (folder / "raw" / name).mkdir(parents=True)
        tree(folder / "raw" / name)
        prepare(name, folder / "raw" / name, str(folder / name), Storage(), allow_partial=True)
    return folder


def label_and_count(data: Path, benchmark: str, config: str, output: Path) -> None:
    """What the command does on Ray, in this process."""
    prepared = open_prepared(str(data / benchmark), Storage())
    settings = entry_config(config, benchmark).job("default")
    run = label_directly(prepared.index_uri, str(output), settings, load_classes(benchmark))
    evaluation = open_evaluation(run, prepared)
    evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))


def test_one_table_of_two_segmenters_on_two_benchmarks(data: Path, tips: str, tmp_path: Path) -> None:
    tiny = yaml.safe_load((Path(__file__).parents[2] / "configs/label/tiny.yaml").read_text())
    tiny["model"] |= {"fgc": None}
    tiny["model"]["fusion"]["short_side"] = 32
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tiny))
    names = [str(tmp_path / "small.yaml"), tips]
    for benchmark in ("voc21", "ade20k"):
        for name in names:
            label_and_count(data, benchmark, name, tmp_path / "runs" / f"{benchmark}-{Path(name).stem}")
    with ray_session(False) as session:
        options = Options(Storage(), Resources(), session, None, None, False)
        table = evaluate_segmenters(str(data), str(tmp_path / "runs"), names, [], "mmseg", options)
        only = evaluate_segmenters(str(data), str(tmp_path / "runs"), names[1:], ["ade20k"], "cliper", options)
    lines = table.splitlines()
    assert lines[0].startswith("| benchmark | segmenter | mIoU | 95% interval | protocol | labels by | weights |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert {tuple(row[:2]) for row in cells} == {
        (f"{b}*", s) for b in ("voc21", "ade20k") for s in ("small", "tips")
    }  # the imitations are not complete
    assert [row[4] for row in cells] == ["mmseg"] * 4
    assert {row[1]: row[5] for row in cells} == {"small": "cliper", "tips": "its own rule"}
    assert {row[1]: row[6].split()[0] for row in cells} == {"small": "backbone", "tips": "tipsv2"}
    assert all(float(row[2]) >= 0 and " to " in row[3] for row in cells)
    for pair in (cells[:2], cells[2:]):
        assert float(pair[0][2]) >= float(pair[1][2])
    assert len(only.splitlines()) == 3


def test_mistakes_come_before_any_work(data: Path, tips: str, tmp_path: Path) -> None:
    with ray_session(False) as session:
        options = Options(Storage(), Resources(), session, None, None, False)
        with pytest.raises(
            ConfigError, match="--segmenter 'sam9' is neither a file nor a labeling config; did you mean sam3"
        ):
            evaluate_segmenters(str(data), str(tmp_path), [tips, "sam9"], [], "mmseg", options)
        with pytest.raises(ConfigError, match="--only 'voc' is no benchmark"):
            evaluate_segmenters(str(data), str(tmp_path), [tips], ["voc"], "mmseg", options)
        with pytest.raises(EvaluationError, match="holds no prepared benchmark"):
            evaluate_segmenters(str(tmp_path), str(tmp_path), [tips], [], "mmseg", options)
    assert not list(tmp_path.iterdir())


def test_cliper_is_the_official_config(data: Path) -> None:
    found = list(prepared_benchmarks(str(data), Storage(), []))
    assert [name for name, _ in found] == ["voc21", "ade20k"]
    assert entry_config("cliper", "voc21").published_miou
    for name in ("sam3", "sam3-active", "tipsv2", "vit-l-14"):
        config = entry_config(name, "ade20k")
        assert config.job("default").segmenter in (name, "cliper")
