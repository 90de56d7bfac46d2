"""Checks of the Triton kernels on fresh random inputs: on CUDA if available, else in Triton's interpreter.

python -m tests.support.kernel_checks refinement
python -m tests.support.kernel_checks fusion

They run in a separate process, because Triton selects its interpreter at import.
"""

import os
import subprocess
import sys

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_kernel_checks(name: str) -> None:
    """Run the checks called `name` in a new process; AssertionError with its output if one fails."""
    interpreted = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    command = [sys.executable, "-m", "tests.support.kernel_checks", name]
    done = subprocess.run(command, env=os.environ | interpreted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def random_heads(layers: int = 3, tokens: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [L, B, H, N, D] with heads side by side in memory."""
    projected = torch.randn(layers, 2, tokens, 3 * 2 * 16, device=DEVICE)
    query, key, value = (p.unflatten(-1, (2, 16)).transpose(-3, -2) for p in projected.chunk(3, dim=-1))
    return query, key, value


@torch.inference_mode()
def refinement() -> None:
    """Every head's map times scores, for lengths and class counts that fill no tile."""
    from cliper.model.diffusion import QueryKey
    from cliper.model.kernels.refine_triton import HeadMaps
    from cliper.model.refine import head_map

    for tokens, classes in ((144, 3), (256, 20), (64, 150)):
        (query,), (key,), _ = random_heads(1, tokens)
        layer, scores = QueryKey(query, key, 16**-0.5), torch.rand(2, tokens, classes, device=DEVICE)
        apply = HeadMaps([layer], 0.2)
        for head in range(2):
            expected = head_map(query[:, head], key[:, head], layer.scale, 0.2) @ scores
            torch.testing.assert_close(apply(0, head, scores), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def fusion() -> None:
    """Summed attention, Sinkhorn vectors, and values spread by the affinity."""
    from cliper.model.backbone import attend
    from cliper.model.fusion import affinity, sinkhorn_rounds
    from cliper.model.kernels import fusion_triton

    query, key, value = random_heads()
    plain = attend(query, key).sum(dim=0)
    attention = fusion_triton.attention_sum(query, key, 16**-0.5)
    torch.testing.assert_close(attention, plain, atol=1e-4, rtol=1e-4)
    host = sinkhorn_rounds(plain.cpu(), 3)
    for scaling, vectors in zip(host, fusion_triton.sinkhorn_vectors(attention, 3), strict=True):
        for ours, expected in zip(vectors, (scaling.row, scaling.column, scaling.mean), strict=True):
            torch.testing.assert_close(ours.cpu(), expected, atol=1e-5, rtol=1e-3)
        weights = affinity(plain.cpu(), scaling)
        expected = weights / weights.sum(dim=-1, keepdim=True) @ value[0].cpu()
        spread = fusion_triton.spread_values(attention, *vectors, value[0])
        torch.testing.assert_close(spread.cpu(), expected, atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
    {"refinement": refinement, "fusion": fusion}[sys.argv[1]]()
