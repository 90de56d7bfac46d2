"""Refinement: every fast path equals the formula on fresh random inputs."""

import pytest
import torch

from cliper.model.diffusion import QueryKey
from cliper.model.refine import apply_head, head_map, head_operator, refine
from tests.support.kernel_checks import run_kernel_checks


def random_layer(seed: int, batch: int = 2, heads: int = 2, tokens: int = 144, width: int = 16) -> QueryKey:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, tokens, heads * width, generator=generator)
    split = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (query, key))  # as diffusers lays them out
    return QueryKey(*split, scale=width**-0.5)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_streamed_product_equals_the_formula(threshold: float) -> None:
    layer, scores = random_layer(1, tokens=1156), torch.rand(2, 1156, 5)  # three blocks of rows, the last short
    apply = head_operator([layer], threshold)
    for head in range(2):
        expected = head_map(layer.query[:, head], layer.key[:, head], layer.scale, threshold) @ scores
        assert torch.allclose(apply(0, head, scores), expected, atol=2e-5)


def test_buffer_contents_do_not_matter() -> None:
    layer, scores = random_layer(2), torch.rand(144, 3)
    query, key = layer.query[0, 0], layer.key[0, 0]
    poisoned = torch.full((144, 144), float("nan"))
    first = apply_head(query, key, layer.scale, 0.2, scores, poisoned)
    assert torch.equal(first, apply_head(query, key, layer.scale, 0.2, scores, torch.zeros(144, 144)))


def test_chain_equals_the_product_of_the_maps() -> None:
    layers = [random_layer(3, batch=1), random_layer(4, batch=1)]
    maps = [head_map(x.query[:, h], x.key[:, h], x.scale, 0.2) for x in layers for h in range(2)]
    coarse = torch.rand(1, 3, 12, 12)
    flat = coarse.flatten(2).transpose(1, 2)
    product = maps[0] @ maps[1] @ maps[2] @ maps[3] @ flat
    assert torch.allclose(refine(coarse, layers, 0.2, "chain").flatten(2).transpose(1, 2), product, atol=1e-5)
    mean = torch.stack(maps).mean(dim=0) @ flat
    assert torch.allclose(refine(coarse, layers, 0.2, "mean").flatten(2).transpose(1, 2), mean, atol=1e-5)


def test_triton_kernels_equal_the_formula() -> None:
    pytest.importorskip("triton")
    run_kernel_checks("refinement")
