"""The production code against recorded outputs of the official code."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cliper.model.diffusion import QueryKey
from cliper.model.refine import refine
from tests.conftest import PARITY, ROOT
from tests.parity import Row, compare, refined_row
from tests.support.sharp import flip_bound


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


def test_refined_scores_may_differ_only_where_the_threshold_explains_it() -> None:
    difference, bound = torch.zeros(5, 4096), torch.zeros(5, 4096, dtype=torch.float64)
    difference[1, 7] = 0.01
    assert not refined_row("a", difference, bound, 0).ok  # no weight lies on the threshold there
    bound[1, 8] = 0.01
    assert not refined_row("a", difference, bound, 1).ok  # the adjacent entry
    bound[1, 7] = 0.009
    row = refined_row("a", difference, bound, 2)
    assert row.ok
    assert "1 of 20480 outside, 1 explained by 2 weights on the threshold" in str(row)
    difference[2, :4] = bound[2, :4] = 0.01
    assert not refined_row("a", difference, bound, 9).ok  # more than 1 in 5,000


@pytest.mark.parametrize("mode", ["chain", "mean", "selection"])
def test_the_bound_covers_a_weight_that_falls_either_way(mode: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 2, 64, 8, generator=generator) for _ in range(2))
    coarse = torch.rand(3, 8, 8, generator=generator)
    layers = [QueryKey(query, key, 8**-0.5)]
    weights = torch.softmax(query[0, 0].double() @ key[0, 0].double().T * 8**-0.5, dim=-1)
    relative = weights / (weights.amax(dim=0) + 1e-5)
    threshold = float(relative[10, 20])  # of the first head; query 10 is at the threshold with key 20
    kept, dropped = (refine(coarse[None], layers, threshold * near, mode)[0] for near in (1 - 5e-6, 1 + 5e-6))
    change = (kept - dropped).abs().flatten(1)
    bound, count = flip_bound(coarse, layers, threshold, mode)
    assert count == 1
    assert change[:, 10].max() > 1e-4
    assert (change <= bound + 1e-6).all()
    assert bound[:, :10].max() == 0
    assert flip_bound(coarse, layers, threshold * 1.001, mode)[0].max() == 0


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
