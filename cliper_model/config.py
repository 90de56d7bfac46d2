"""The method's settings. Each field names its counterpart in the official code and defaults to its value."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Unit = Annotated[float, Field(ge=0.0, le=1.0)]

AttentionType = Literal["fused", "qq", "kk", "vv", "identity", "vanilla", "proxy"]
Refinement = Literal["chain", "mean", "selection"]


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error.

    `LATER` names fields that came after version 0.1. At their defaults they are not written, so that the settings
    of an older run are written as before, and its fingerprint is the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields, content = type(self).model_fields, write(self)
        unset = {name for name in self.LATER if getattr(self, name) == fields[name].default}
        return {name: value for name, value in content.items() if name not in unset}


class BackboneConfig(Settings):
    """Which CLIP to load.

    `model`: an open_clip architecture (``ViT-B-16-quickgelu``), ``embedded:tiny``, ``local-dir:FOLDER``
    (``open_clip_config.json`` and weights) or ``hf-hub:OWNER/NAME``.
    `weights`: an open_clip tag (``openai``) or a checkpoint file; only for architecture names.
    `revision`: branch, tag or commit of the hub repository behind ``hf-hub:`` or a tag; None is its main branch.
    """

    model: str = "embedded:tiny"
    weights: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _weights_match_model(self) -> "BackboneConfig":
        self_contained = self.model.split(":", 1)[0] in ("embedded", "local-dir", "hf-hub")
        if self_contained and self.weights is not None:
            raise ValueError(f"weights must be empty: '{self.model}' brings its own")
        if not self_contained and self.weights is None:
            raise ValueError(
                f"weights are needed for '{self.model}': an open_clip tag such as 'openai', or a checkpoint file"
            )
        if self.revision is not None and self.model.startswith(("embedded:", "local-dir:")):
            raise ValueError(f"revision must be empty: '{self.model}' does not come from the hub")
        return self


class PromptConfig(Settings):
    """How class names become text vectors.

    `templates`: ``scene15``, ``openai80``, or a list of strings with one ``{}`` each.
    `background_words`: distractors that take part in the softmax and are then dropped (official: first
    entry of the class list). `mean_class`: add the mean of the foreground vectors as one more distractor.
    """

    templates: Literal["scene15", "openai80"] | tuple[str, ...] = "scene15"
    background_words: tuple[str, ...] = ()
    mean_class: bool = True

    @model_validator(mode="after")
    def _one_placeholder_each(self) -> "PromptConfig":
        if isinstance(self.templates, tuple):
            bad = [t for t in self.templates if t.count("{}") != 1]
            if bad or not self.templates:
                raise ValueError(f"templates need exactly one {{}} each, at least one template; wrong: {bad}")
        return self


class FusionConfig(Settings):
    """Early-layer fusion, official step 1 to 6.

    `short_side` (size): pixels of the resized shorter side. `attention` (attn_type): the weights of the last
    block's values; ``proxy`` takes them from DINO's features (see DinoConfig). `feature_fusion` (fuse_feature):
    selected layer plus the mean of all. `select_layer`: index into the layers, negative from the end.
    `logit_scale`: temperature of the class softmax.
    `attention_threshold` (attention_thr): share of a class's maximum below which scores are dropped.
    `combination`: ``v2`` is the official code's; ``v1`` that of the paper's first version: attention is read by
    rows, and the mean leaves out the last layer.
    `position_dtype`: float16 rounds the resized position embedding as the official code does.
    `sinkhorn`: ``progressive`` is one normalisation round per layer (official); ``converged`` runs all
    rounds first and shares the last map between the layers.
    """

    short_side: PositiveInt = 336
    attention: AttentionType = "fused"
    feature_fusion: bool = True
    select_layer: int = -1
    logit_scale: Annotated[float, Field(gt=0)] = 100.0
    attention_threshold: Unit = 0.2
    combination: Literal["v2", "v1"] = "v2"
    position_dtype: Literal["float16", "float32"] = "float16"
    sinkhorn: Literal["progressive", "converged"] = "progressive"


class SlidingConfig(Settings):
    """Sliding window in resized pixels; both must be multiples of the patch size."""

    crop: PositiveInt = 224
    stride: PositiveInt = 112

    @model_validator(mode="after")
    def _windows_touch(self) -> "SlidingConfig":
        if self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is larger than crop {self.crop}: pixels would be skipped")
        return self


class FGCConfig(Settings):
    """Fine-grained compensation, official step 7.

    `model`: a diffusers folder, a hub id, or ``embedded:tiny``; `revision`: of the hub id.
    `layers` (attention_layers_to_use): indices into the UNet's attention modules in the order they run,
    self- and cross-attention counted, negative from the end; only self-attention is allowed.
    `steps`, `step_index` (time_step): the scheduler is set to `steps` timesteps, number `step_index` is used.
    `refinement`: ``chain`` (SFSA) multiplies the maps of all heads, ``mean`` averages them, ``selection``
    takes head number `selection` (attention_idx).
    `resolution`: side of the square diffusion input. `resize`: ``nearest`` is official.
    `attention_threshold`: None takes the fusion's value, as the official code does.
    `seed`: with the image id, decides the noise.
    `vae`: a folder or hub id of an AutoencoderTiny of diffusers, whose encoder replaces the model's own (not
    official, and half of the arithmetic); `vae_revision`: of the hub id.
    """

    LATER = frozenset({"vae", "vae_revision"})

    model: str = "embedded:tiny"
    revision: str | None = None
    layers: tuple[int, ...] = (-4, -6)
    steps: PositiveInt = 50
    step_index: Annotated[int, Field(ge=0)] = 45
    refinement: Refinement = "chain"
    selection: Annotated[int, Field(ge=0)] = 0
    resolution: PositiveInt = 512
    resize: Literal["nearest", "bilinear"] = "nearest"
    attention_threshold: Unit | None = None
    seed: int = 0
    vae: str | None = None
    vae_revision: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> "FGCConfig":
        if self.step_index >= self.steps:
            raise ValueError(f"step_index {self.step_index} must be below steps {self.steps}")
        if self.resolution % 64:
            raise ValueError(f"resolution {self.resolution} must be a multiple of 64")
        if not self.layers:
            raise ValueError("layers is empty: name at least one, e.g. [-4, -6], or set fgc to null")
        return self


class DinoConfig(Settings):
    """DINO's patch features as attention: A = softmax(scale * (S - shift * mean(S))) by rows, S their cosines.

    Negative entries of the difference are left out of the softmax.

    `model`: a folder or hub id of DINO (a ViT without a head), DINOv2 (with or without registers) or DINOv3 (ViT)
    in the form of transformers; `revision`: of the hub id.
    `refine` (refinement dino-* and dinov2-*): multiply A with the coarse scores, before FGC if both are used. The
    input is the image at its own size; `long_side`: larger images are scaled down to it (official: never).
    `proxy_scale`, `proxy_shift`, `proxy_pixels`: of ``fusion.attention: proxy``, which sees the backbone's input.
    The official code normalises those pixels by CLIP's and then by ImageNet's mean (``twice``); ``once`` is
    ImageNet's alone.
    """

    model: str
    revision: str | None = None
    refine: bool = True
    long_side: PositiveInt = 1024
    scale: PositiveFloat = 3.0
    shift: PositiveFloat = 1.2
    proxy_scale: PositiveFloat = 1.0
    proxy_shift: PositiveFloat = 1.0
    proxy_pixels: Literal["twice", "once"] = "twice"


class LabelConfig(Settings):
    """From scores to labels, official step 8 and 9.

    `protocol`: ``cliper`` is the official decision below; ``mmseg`` is that of mmsegmentation-based work: scores
    become probabilities over the classes and the best class wins. There the background words, if any, are a class
    of their own, `probability_threshold` turns less certain pixels into background, and the other settings are
    not used.
    `presence_threshold` (cls_thre): classes at or below it are absent from the image and cannot win.
    `background_threshold` (bkg_thre): values below it are background; 0 competes with a background plane
    ``(1 - max)^2`` instead. `normalize_per_class` (is_normalize): stretch every class to [0, 1] first.
    `margin_threshold` t: in both protocols, background is also where s1 * sqrt(s1 - s2) < t^1.25 for the best
    score s1 and the second s2; 0 is off (official).
    """

    LATER = frozenset({"margin_threshold"})

    presence_threshold: Unit = 0.3
    background_threshold: Unit = 0.3
    normalize_per_class: bool = False
    protocol: Literal["cliper", "mmseg"] = "cliper"
    probability_threshold: Unit = 0.0
    margin_threshold: Unit = 0.0


class SigmoidConfig(Settings):
    """From independent probabilities (sigmoid scores) to labels: rule ``sigmoid`` of `labels.LABEL_RULES`.

    `threshold`: a smaller best score is background. `margin_rule`: the lead over the second score counts as well.
    """

    protocol: Literal["sigmoid"] = "sigmoid"
    threshold: Unit = 0.5
    margin_rule: bool = False


class CLIPerConfig(Settings):
    """Every setting that affects masks. `sliding`, `dino` or `fgc` set to None switches that part off."""

    LATER = frozenset({"dino"})

    backbone: BackboneConfig = BackboneConfig()
    prompts: PromptConfig = PromptConfig()
    fusion: FusionConfig = FusionConfig()
    sliding: SlidingConfig | None = None
    dino: DinoConfig | None = None
    fgc: FGCConfig | None = FGCConfig()
    labels: LabelConfig = LabelConfig()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _every_vector_is_a_class(self) -> "CLIPerConfig":
        if self.labels.protocol == "mmseg" and self.prompts.mean_class:
            raise ValueError("labels.protocol 'mmseg' scores classes only; set prompts.mean_class to false")
        return self

    @model_validator(mode="after")
    def _proxy_has_features(self) -> "CLIPerConfig":
        if self.fusion.attention == "proxy" and self.dino is None:
            raise ValueError("fusion.attention 'proxy' needs dino.model, e.g. dino: {model: facebook/dino-vitb8}")
        return self
