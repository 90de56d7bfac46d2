"""Rules about the code that a reviewer would otherwise have to remember."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ALLOWED = {  # who may import whom, besides third parties
    "cliper_model": {"cliper_model"},
    "pipeline": {"pipeline", "cliper_model"},
    "jobs": {"jobs", "pipeline", "cliper_model"},
}
FORBIDDEN_IN_MODEL = {"ray", "pyarrow", "fsspec", "s3fs", "typer"}
FILES = [(package, path) for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of every module a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_imports_go_one_way(package: str, path: Path) -> None:
    ours = imported(path) & {"cliper_model", "pipeline", "jobs", "tools", "benchmarks", "tests"}
    assert ours <= ALLOWED[package]
    if package == "cliper_model":
        assert not imported(path) & FORBIDDEN_IN_MODEL


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_modules_and_functions_stay_readable(package: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 330, "split the module"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{node.name} is too long"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"eval", "exec"})


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_configs_and_help_needs_no_torch_and_no_ray() -> None:
    assert not modules_after("import jobs.cli, pipeline.config") & {"torch", "ray", "open_clip", "diffusers"}


def test_the_model_needs_no_ray() -> None:
    assert not modules_after("import cliper_model.segmenter") & {"ray", "pyarrow", "pipeline"}
