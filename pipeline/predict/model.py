"""CLIPer for Python users: names of classes and images in any form go in, labeled images come out."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from PIL import Image

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.errors import ClassListError, ConfigError
from cliper.pipeline.config import (
    EMBEDDED_CLASSES,
    JobConfig,
    backbone_of,
    classes_for,
    embedded_note,
    load_classes,
    load_config,
    shipped,
)
from cliper.pipeline.errors import InputError
from cliper.pipeline.predict.images import Opened, open_image
from cliper.pipeline.predict.prediction import Picture, Prediction, of_segmentation
from cliper.pipeline.storage.backend import Storage

if TYPE_CHECKING:
    import torch

    from cliper.model.segmentation import Segmentation
    from cliper.model.segmenter import CLIPer as Segmenter

    Source: TypeAlias = str | PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor
Classes: TypeAlias = ClassList | Sequence[str] | Mapping[str, str] | PathLike[str] | None


class CLIPer:
    """A resident model for one class list. Calls keep no state: the same image gives the same mask.

    >>> import cliper
    >>> from PIL import Image
    >>> model = cliper.CLIPer.load("tiny", ["grass", "water"])
    >>> model
    CLIPer(2 classes: grass, water; cpu)
    >>> result = model(Image.new("RGB", (64, 48), (60, 160, 70)))
    >>> result.labels.shape
    (48, 64)
    >>> [one.image_id for one in model([Image.new("RGB", (64, 48))] * 2, image_ids=["a", "b"])]
    ['a', 'b']
    """

    def __init__(
        self,
        config: str | PathLike[str] | CLIPerConfig | JobConfig,
        classes: Classes = None,
        *,
        device: "str | torch.device" = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """See `load`."""
        self.job = _job(config)
        self.class_list = _class_list(classes, self.job)
        where = _device(device)
        from cliper.model.segmenter import CLIPer as Loaded

        self.segmenter: Segmenter = Loaded.load(self.job.cliper, self.class_list, where)
        _warn(self.job, self.class_list)
        self.storage = Storage(dict(storage_options or {}))

    @classmethod
    def load(
        cls,
        config: str | PathLike[str] | CLIPerConfig | JobConfig,
        classes: Classes = None,
        *,
        device: "str | torch.device" = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> "CLIPer":
        """Load the weights and embed the class names.

        `config`: a shipped name ("tiny", "vit-l-14"), a YAML file, or a configuration. `classes`: names, or
        "name = prompt" lines; {name: prompt}; a class file or a shipped list ("voc20"); None for those of the
        embedded model. `device`: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N". `storage_options` are
        fsspec's, for images in buckets. Raises ConfigError, ClassListError, or WeightsError.
        """
        return cls(config, classes, device=device, storage_options=storage_options)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label k is `classes[k - 1]`, label 0 is background."""
        return self.class_list.names

    @property
    def device(self) -> "torch.device":
        """The device of the weights."""
        return self.segmenter.device

    @overload
    def __call__(  # type: ignore[overload-overlap]  # text is a sequence of text, but one image
        self, images: "Source", image_ids: str | None = None
    ) -> Prediction: ...

    @overload
    def __call__(self, images: "Iterable[Source]", image_ids: Sequence[str] | None = None) -> list[Prediction]: ...

    def __call__(self, images: Any, image_ids: Any = None) -> Prediction | list[Prediction]:
        """Label an image, or every image of a list (the results are in its order).

        An image is a path, an http(s) or bucket address, the bytes of a file, a PIL image, an array (uint8, or
        floats from 0 to 1) [H, W, 3], or a tensor [3, H, W]. `image_ids` seed the refinement's noise; a run's
        mask of an image is computed with the image's id there. By default the id is the file's name, or "image".
        Raises InputError for an image that cannot be read.
        """
        if _is_one(images):
            return self._predict([images], None if image_ids is None else [image_ids])[0]
        return self._predict(list(images), image_ids)

    def stream(self, images: "Iterable[Source]") -> Iterator[Prediction]:
        """Label any number of images, with one batch of them in memory; `images` can be a generator.

        Yields the results in order, as a call with a list returns them. Raises InputError at the first image that
        cannot be read.
        """
        waiting = iter(images)
        while batch := list(islice(waiting, self.segmenter.full_batch)):
            yield from self._predict(batch, None)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation]":
        """Label uint8 arrays [H, W, 3]: the interface of every segmenter; see cliper.model.CLIPer.segment."""
        return self.segmenter.segment(images, image_ids)

    def _predict(self, images: Sequence[Any], image_ids: Sequence[str] | None) -> list[Prediction]:
        if image_ids is not None and len(image_ids) != len(images):
            raise InputError(f"{len(image_ids)} image_ids for {len(images)} images; give one each, or none")
        opened = list(self._open(images, image_ids))
        results = self.segmenter.segment([one.pixels for one in opened], [one.image_id for one in opened])
        return [
            of_segmentation(one.image_id, Picture(one.pixels, one.orientation), self.classes, result)
            for one, result in zip(opened, results, strict=True)
        ]

    def _open(self, images: Sequence[Any], image_ids: Sequence[str] | None) -> Iterator[Opened]:
        for i, source in enumerate(images):
            found = open_image(source, self.storage, self.job.max_pixels)
            yield found if image_ids is None else Opened(found.pixels, found.orientation, image_ids[i])

    def __repr__(self) -> str:
        first = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        return f"CLIPer({len(self.classes)} classes: {first}; {self.device})"


def _is_one(images: Any) -> bool:
    if isinstance(images, str | PathLike | bytes | Image.Image | np.ndarray) or hasattr(images, "detach"):
        return True
    return not isinstance(images, Iterable)  # open_image says what is wrong


def _job(config: Any) -> JobConfig:
    if isinstance(config, JobConfig):
        found = config
    elif isinstance(config, CLIPerConfig):
        return JobConfig(model=config)
    elif isinstance(config, str | PathLike):
        found = load_config(str(config))
    else:
        raise ConfigError(f"config is a name ({', '.join(shipped('label'))}) or a YAML file, not {config!r:.80}")
    if found.segmenter != "cliper":
        raise ConfigError(f"{config} is of the segmenter '{found.segmenter}'; CLIPer loads those of 'cliper'")
    return found


def _class_list(classes: Any, job: JobConfig) -> ClassList:
    if classes is None:
        try:
            return classes_for(None, job)
        except ConfigError as error:
            message = str(error).replace("--classes is needed", "classes are needed")
            raise ConfigError(f"{message}; or names, e.g. ['cat', 'dog']") from error
    if isinstance(classes, ClassList):
        return classes
    if isinstance(classes, Mapping):
        return ClassList.parse([f"{name} = {prompt}" for name, prompt in classes.items()], "classes")
    if isinstance(classes, str | PathLike):
        try:
            return load_classes(str(classes))
        except ConfigError as error:
            raise ConfigError(f"{error}; for names give a list, e.g. ['{classes}']") from error
    names = list(classes) if isinstance(classes, Iterable) else [classes]
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise ClassListError(f"classes are names (text), not {type(strange[0]).__name__}: {strange[0]!r:.80}")
    return ClassList.parse(names, "classes")


def _warn(job: JobConfig, classes: ClassList) -> None:
    """Warn if the embedded model is asked for classes that it was not trained on."""
    note = embedded_note(backbone_of(job))
    if note is None:
        return
    unknown = [name for name in classes.names if name not in load_classes(EMBEDDED_CLASSES).names]
    if unknown:
        advice = note.replace("--config vit-l-14", 'CLIPer.load("vit-l-14", ...)')
        warnings.warn(
            f"{advice} ('{unknown[0]}' is not one of the {len(load_classes(EMBEDDED_CLASSES))})",
            stacklevel=_level_outside(),
        )


def _level_outside() -> int:
    """The stack level, seen from the caller, of the first frame outside this module: the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


def _device(device: Any) -> "str | torch.device":
    """The device, if this machine has it. Raises ConfigError."""
    import torch

    if device == "auto":
        return "auto"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device is auto, cpu, cuda or cuda:N, not {device!r:.80}") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is auto, cpu, cuda or cuda:N, not '{found}'")
    there = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= there:
        raise ConfigError(f"device '{found}': torch finds {there} CUDA devices here; use 'auto' or 'cpu'")
    return found
