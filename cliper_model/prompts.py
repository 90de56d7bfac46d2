"""Templates, and the text vectors made of them."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper_model.config import PromptConfig

SCENE15 = (
    "a clean origami {}.",
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)


class Tokenizer(Protocol):
    """What open_clip's tokenizers have in common."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [len(texts), context length]."""
        ...


def templates_of(config: PromptConfig) -> tuple[str, ...]:
    """Return the template strings, each with one ``{}``."""
    if config.templates == "scene15":
        return SCENE15
    if config.templates == "openai80":
        from cliper_model._libraries import open_clip

        return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    return tuple(config.templates)


@torch.inference_mode()
def embed_prompts(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    templates: Sequence[str],
    batch: int = 512,
) -> Tensor:
    """Embed every prompt in every template and average: unit vectors, float32 [len(prompts), C].

    Each text vector is normalised before the mean over templates and the mean is normalised again
    (the CLIP paper's prompt ensembling).
    """
    device = next(model.parameters()).device
    texts = [template.format(prompt) for prompt in prompts for template in templates]
    vectors = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(texts[start : start + batch]).to(device)  # [b, context]
        vectors.append(F.normalize(model.encode_text(tokens).float(), dim=-1))  # type: ignore[operator]
    per_template = torch.cat(vectors).reshape(len(prompts), len(templates), -1)  # [P, T, C]
    return F.normalize(per_template.mean(dim=1), dim=-1)  # [P, C]


def text_bank(foreground: Tensor, background: Tensor, mean_class: bool) -> Tensor:
    """Stack foreground, background words and the mean of the foreground: [K + B (+ 1), C], unit vectors."""
    bank = [foreground, background]
    if mean_class:
        bank.append(foreground.mean(dim=0, keepdim=True))
    return F.normalize(torch.cat(bank), dim=-1)
