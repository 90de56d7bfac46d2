"""Early-layer fusion against the slow formulas."""

from typing import Any

import pytest
import torch

from cliper.model.config import FusionConfig
from cliper.model.fusion import combine_layers, mean_affinity, sinkhorn_rounds, spread_values, window_starts
from tests.support import reference


def random_attention(tokens: int = 13, heads: int = 2, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(batch, heads, tokens, tokens, generator=generator).softmax(dim=-1) * 5


def test_every_round_weighs_values_like_the_slow_formula() -> None:
    attention = random_attention()
    value = torch.randn(1, 2, 2, 13, 3, generator=torch.Generator().manual_seed(0))  # [G, B, H, N, D]
    rounds = list(sinkhorn_rounds(attention, 4))
    assert len(rounds) == 4
    for image in range(2):
        for scaling, slow in zip(rounds, reference.fused_maps(attention[image], 4), strict=True):
            fast = spread_values(attention, scaling, value)[0, image]
            torch.testing.assert_close(fast, slow @ value[0, image], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                mean_affinity(attention, scaling)[image], slow.mean(dim=0), atol=1e-6, rtol=1e-4
            )


def test_values_of_several_layers_share_a_map() -> None:
    attention = random_attention()
    *_, last = sinkhorn_rounds(attention, 5)
    values = torch.randn(3, 2, 2, 13, 4, generator=torch.Generator().manual_seed(1))
    together = spread_values(attention, last, values)
    for layer in range(3):
        alone = spread_values(attention, last, values[layer : layer + 1])[0]
        torch.testing.assert_close(together[layer], alone, atol=1e-6, rtol=1e-5)


def test_inputs_are_not_modified() -> None:
    attention = random_attention()
    before = attention.clone()
    scaling = list(sinkhorn_rounds(attention, 3))[-1]
    spread_values(attention, scaling, torch.ones(1, 2, 2, 13, 1))
    assert torch.equal(attention, before)


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (336, 336, 112, [0]),
        (224, 336, 112, [0]),  # smaller than the window: one window, cut off
        (448, 224, 112, [0, 112, 224]),
        (400, 224, 112, [0, 112, 176]),  # the last window ends at the border
        (592, 336, 112, [0, 112, 224, 256]),
    ],
)
def test_windows_cover_the_side(length: int, crop: int, stride: int, expected: list[int]) -> None:
    starts = window_starts(length, crop, stride)
    assert starts == expected
    covered = {i for start in starts for i in range(start, min(start + crop, length))}
    assert covered == set(range(length))


@pytest.mark.parametrize("combination", ["v2", "v1"])
def test_layers_are_combined_by_the_slow_formula(combination: Any) -> None:
    """One image, three layers, two classes, 2 x 3 patches: every sum written out."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(3, 1, 2, 2, 3, generator=generator)
    attention = torch.rand(1, 6, 6, generator=generator)
    found = combine_layers(scores, attention, FusionConfig(combination=combination, attention_threshold=0.5))
    layers = scores[:, 0].flatten(2)  # [L, K, hw]
    for k in range(2):
        last = [value if value >= 0.5 * layers[2, k].max() else 0.0 for value in layers[2, k].tolist()]
        for j in range(6):
            if combination == "v2":
                spread = sum(last[i] * float(attention[0, i, j]) for i in range(6))
                mean = (float(layers[0, k, j]) + float(layers[1, k, j]) + last[j]) / 3
            else:
                spread = sum(float(attention[0, j, i]) * last[i] for i in range(6))
                mean = (float(layers[0, k, j]) + float(layers[1, k, j])) / 2
            assert float(found[0, k].flatten()[j]) == pytest.approx(spread + mean, abs=1e-5)
