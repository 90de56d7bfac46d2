"""One import name: its public names and import cost."""

import subprocess
import sys
from pathlib import Path

import pytest

import cliper

PUBLIC = [
    "CLIPer",
    "CLIPerConfig",
    "ClassList",
    "CliperError",
    "EXPORTERS",
    "JobConfig",
    "MASK_CODECS",
    "MaskDataset",
    "OpenedRun",
    "Prediction",
    "SEGMENTERS",
    "Segmentation",
    "Storage",
    "load_classes",
    "load_config",
    "open_run",
    "overlay",
    "unpack_mask",
    "__version__",
]


def python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout.strip()


def test_the_public_names() -> None:
    assert set(cliper.__all__) == set(dir(cliper)) == set(PUBLIC)
    for name in PUBLIC:
        assert getattr(cliper, name) is not None
    with pytest.raises(AttributeError, match="module 'cliper' has no attribute 'Model'; it has .*CLIPer, "):
        cliper.Model  # noqa: B018


def test_importing_and_help_load_nothing_heavy(tmp_path: Path) -> None:
    heavy = "{'torch', 'ray', 'pandas', 'pyarrow', 'numpy', 'pydantic', 'fsspec', 'matplotlib', 'scipy'}"
    assert python(f"import sys, cliper; print({heavy} & set(sys.modules))", tmp_path) == "set()"
    help_page = "from cliper.jobs.cli import app; app(['--help'], standalone_mode=False)"
    page = python(f"import sys; {help_page}; print({heavy} & set(sys.modules))", tmp_path)
    assert page.endswith("set()")
    assert all(f" {name} " in page for name in ("label", "evaluate", "review"))


def test_weights_that_cannot_be_fetched_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.environ |= {{"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": {str(tmp_path)!r}}}
from cliper import CliperError, load_config
from cliper.pipeline.config import shipped
from cliper.pipeline.label.segmenters import chosen
for name in shipped("label"):
    kind, config = chosen(load_config(name))
    try:
        kind.pin(config)
    except CliperError as error:
        assert "is not in the cache" in str(error) and "HF_HUB_OFFLINE is set" in str(error), error
    else:
        print(name)
print({{"torch", "open_clip"}} & set(sys.modules))"""
    assert python(code).split() == ["tiny", "set()"]


def test_version_and_misspelt_commands(tmp_path: Path) -> None:
    script = str(Path(sys.executable).parent / "cliper")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert version == f"cliper {cliper.__version__}\n"
    wrong = subprocess.run([script, "lable"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Did you mean 'label'?" in wrong.stderr


def test_a_run_in_three_lines(tmp_path: Path) -> None:
    from tests.support.fakes import write_corpus
    from tests.support.labeled import label_small

    write_corpus(tmp_path / "images", 12, broken_each=1)
    label_small(tmp_path / "images", tmp_path / "run")
    run = cliper.open_run(str(tmp_path / "run"))
    table = run.table()
    assert len(table) == 12
    assert "mask" not in table.column_names
    good = run.table(["image_id"], where="status = 'ok'")["image_id"].to_pylist()
    assert len(good) == 7
    rows = {row["image_id"]: row for row in run.rows()}
    assert (run.mask(good[0]) == cliper.unpack_mask(rows[good[0]])).all()
    assert len(list(run.dataset(shuffle=False))) == 7
    with pytest.raises(cliper.CliperError, match="has no mask of 'nothing'; ids are in the column image_id"):
        run.mask("nothing")
