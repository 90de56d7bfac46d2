"""The settings of the segmenters other than CLIPer."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cliper.model.config import (
    CLIPerConfig,
    LabelConfig,
    PromptConfig,
    Settings,
    SigmoidConfig,
    SlidingConfig,
    Unit,
)


class Sam3Config(Settings):
    """SAM 3 with a prompt for every word of every class.

    `model`: a folder or hub id in the form of transformers; `revision`: of the hub id. `chunk`: prompts that run
    together. `query_threshold`: an object query counts if its score times the prompt's presence is above it.
    """

    model: str = "facebook/sam3"
    revision: str | None = None
    chunk: PositiveInt = 8
    query_threshold: Unit = 0.5
    labels: SigmoidConfig = SigmoidConfig(threshold=0.5, margin_rule=True)


class Sam3ActiveConfig(Sam3Config):
    """SAM 3 with prompts only for the classes that CLIPer proposes for an image.

    `proposer`: CLIPer's settings. `top`: at most so many classes, by presence; `min_presence`: only classes with
    at least this presence. `always`: classes that are prompted in every image, on top of the others.
    """

    proposer: CLIPerConfig = CLIPerConfig(fgc=None)
    top: PositiveInt = 8
    min_presence: Unit = 0.0
    always: tuple[str, ...] = ()


class Tipsv2Config(Settings):
    """TIPSv2: the patch tokens of one pass, compared with the text.

    `model`: a folder or hub id in the form of transformers; `revision`: of the hub id. `short_side`: pixels of the
    resized shorter side. `temperature`: of the softmax over the classes; None is the model's own. `sliding`:
    windows whose logits are averaged with those of the whole image.
    """

    model: str = "google/tipsv2-b14"
    revision: str | None = None
    prompts: PromptConfig = PromptConfig(templates="openai80", mean_class=False)
    short_side: PositiveInt = 448
    temperature: PositiveFloat | None = None
    sliding: SlidingConfig | None = None
    labels: LabelConfig = LabelConfig(protocol="mmseg")

    @model_validator(mode="after")
    def _scores_are_shares(self) -> "Tipsv2Config":
        if self.labels.protocol == "mmseg" and self.prompts.mean_class:
            raise ValueError("labels.protocol 'mmseg' scores classes only; set prompts.mean_class to false")
        return self


class MasksConfig(Settings):
    """A vote inside regions over the labels of another segmenter.

    `segmenter` and `model`: the other one, as in a labeling config. `vote`: ``majority`` of the labels, or
    ``mean`` of the scores. `regions`: ``superpixels`` (SLIC of scikit-image: `count` of them, `compactness`), or
    ``sam2``: the masks of a grid of `points` x `points` by SAM 2 with a predicted IoU of at least `min_iou`;
    pixels outside all masks keep their labels. `weights`: SAM 2, a folder or hub id in the form of transformers;
    `revision`: of the hub id.
    """

    segmenter: str = "cliper"
    model: dict[str, object] = Field(default_factory=dict)
    regions: Literal["superpixels", "sam2"] = "superpixels"
    vote: Literal["majority", "mean"] = "majority"
    count: PositiveInt = 400
    compactness: PositiveFloat = 10.0
    weights: str = "facebook/sam2.1-hiera-tiny"
    revision: str | None = None
    points: PositiveInt = 16
    min_iou: Unit = 0.8
    labels: SigmoidConfig = SigmoidConfig(threshold=0.3)


class Member(Settings):
    """A segmenter of an ensemble, as in a labeling config, and the weight of its scores."""

    segmenter: str = "cliper"
    model: dict[str, object] = Field(default_factory=dict)
    weight: PositiveFloat = 1.0


class EnsembleConfig(Settings):
    """The mean of the scores of several segmenters, on a grid of `side` x `side`."""

    members: tuple[Member, ...] = Field(min_length=2)
    side: PositiveInt = 128
    labels: SigmoidConfig = SigmoidConfig(threshold=0.3)
