"""Prompt templates, and the text vectors computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.classes import ClassList
from cliper.model.config import PromptConfig

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
    """The common interface of open_clip's tokenizers."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [len(texts), context length]."""
        ...


def templates_of(config: PromptConfig) -> tuple[str, ...]:
    """Return the template strings, each with one ``{}``."""
    if config.templates == "scene15":
        return SCENE15
    if config.templates == "openai80":
        from cliper.model._libraries import open_clip

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


@dataclass(frozen=True)
class TextVectors:
    """A class list in CLIP's space: `vectors` [T, C] unit vectors, the first of them those of `classes` classes.

    Class c has the next `words[c]` vectors; without `words`, one each (the official case).
    """

    vectors: Tensor
    classes: int
    words: tuple[int, ...] = ()


def embed_classes(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    classes: ClassList,
    prompts: PromptConfig,
    background_is_class: bool = False,
) -> TextVectors:
    """Embed a class list with the templates and background words of `prompts`.

    `background_is_class`: the background words are the words of one more class, the last (protocol ``mmseg``).
    """
    foreground = [word for group in classes.words for word in group]
    background = prompts.background_words
    vectors = embed_prompts(model, tokenizer, [*foreground, *background], templates_of(prompts))
    bank = text_bank(vectors[: len(foreground)], vectors[len(foreground) :], prompts.mean_class)
    words = [len(group) for group in classes.words]
    if background_is_class and background:
        words.append(len(background))
    one_each = words == [1] * len(classes)
    return TextVectors(bank, len(words), () if one_each else tuple(words))
