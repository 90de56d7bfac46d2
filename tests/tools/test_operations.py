"""The counts of benchmarks/operations.py: the CPU's attention is one of them, and freed tensors are not."""

import torch

from benchmarks.operations import Cost, cost, counter, tensor


def test_attention_is_counted_on_the_cpu_and_without_a_device() -> None:
    wanted = 2 * 2 * (1 * 2 * 8 * 8 * 4)  # two products of [8, 4] and [4, 8] in two heads
    query = torch.randn(1, 2, 8, 4)
    with torch.inference_mode(), counter() as found:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert found.get_total_flops() == wanted
    empty = tensor(1, 2, 8, 4)
    assert cost(lambda: torch.nn.functional.scaled_dot_product_attention(empty, empty, empty)).operations == wanted


def test_the_peak_is_of_tensors_that_exist_at_once() -> None:
    def chain() -> torch.Tensor:
        x = tensor(1000, dtype=torch.float32)  # 4,000 bytes
        for _ in range(5):
            x = x + 1  # the old and the new one: 8,000
        return x

    found = cost(chain, torch.nn.Linear(10, 10, bias=False))
    assert (found.activations, found.weights) == (8000, 400)
    both = found + Cost(1, 9000, 100)
    assert (both.operations, both.activations, both.weights, both.memory) == (1, 9000, 500, 9500)
