"""The production code against recorded outputs of the official code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PARITY, ROOT
from tests.parity import Row, compare


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(compare(PARITY))


def test_every_recorded_case_agrees(rows: list[Row]) -> None:
    outside = [str(row) for row in rows if not row.ok]
    assert not outside, "\n".join(outside)


def test_every_kind_of_output_is_compared(rows: list[Row]) -> None:
    kinds = {row.what.rstrip("0123456789") for row in rows}
    assert kinds == {"pixels", "attn_map", "seg", "coarse", "attn_row", "refined", "score", "label_"}
    assert len(rows) == 62


def test_fusion_is_much_closer_than_the_agreement(rows: list[Row]) -> None:
    """Only the sharp thresholds of FGC can flip; everything before them is equal to rounding."""
    assert max(row.error for row in rows if row.what in ("seg", "coarse", "attn_map", "pixels")) < 2e-5


def test_wrong_directory_is_a_usage_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage: python -m tests.parity DIR" in done.stdout
