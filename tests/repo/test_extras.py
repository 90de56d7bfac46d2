"""Without an extra's libraries a command names them and the extra, before it does anything else."""

import sys
from pathlib import Path

import pytest

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.errors import MissingExtraError
from cliper.pipeline.export.driver import export
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.label.job import open_job
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PHOTOS
from tests.support.export_runs import plan_of
from tests.support.fakes import write_corpus
from tests.support.labeled import label_small


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("name", [name for name, exporter in EXPORTERS.items() if exporter.needs])
def test_export(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_corpus(tmp_path / "images", 4)
    run = label_small(tmp_path / "images", tmp_path / "run")
    hide(monkeypatch, *EXPORTERS[name].needs)
    with pytest.raises(MissingExtraError, match=rf"the format {name} needs .*: pip install 'cliper\[export\]'"):
        export(run, plan_of(run, name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_conditions_and_codecs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "duckdb", "pycocotools")
    with pytest.raises(MissingExtraError, match="an SQL condition needs duckdb"):
        RowFilter(where="margin < 1").check(["cat"])
    config = JobConfig.model_validate({"mask_codec": "coco-rle"})
    with pytest.raises(MissingExtraError, match="mask_codec coco-rle needs pycocotools"):
        open_job(str(PHOTOS), str(tmp_path / "run"), config, ClassList.parse(["cat"]), Storage())
    assert not (tmp_path / "run").exists()
