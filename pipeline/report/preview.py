"""Preview of one image under trial settings: its mask, the scores behind it, and the config that reproduces it."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from cliper.model.class_text import class_lines
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.errors import ClassListError, ConfigError
from cliper.model.resident import Resident
from cliper.model.segmentation import Segmentation
from cliper.model.segmenter import Scores
from cliper.pipeline.config import SHARED, JobConfig, validate
from cliper.pipeline.corpus.decode import Decoded, decode, to_file_grid
from cliper.pipeline.label.heatmaps import HasHeat
from cliper.pipeline.label.segmenters import chosen
from cliper.pipeline.report.images import OVERLAY_SIDE, colour, mask_layer, picture
from cliper.pipeline.report.page import data_uri, render_page
from cliper.pipeline.run.masks import encode_png
from cliper.pipeline.run.schema import class_entries

HEAT_MAPS = 12  # of the classes with the highest presence
Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Found = tuple[Segmentation, npt.NDArray[np.float32] | None]  # with the heat maps, if there are any

KEPT_BYTES = 512 << 20  # of images and scores
_SIDE = 2 * OVERLAY_SIDE  # pixels, of the image shown


@dataclass(frozen=True)
class Choice:
    """The user's settings; thresholds from 0 to 1. `fgc` needs a configuration that has it."""

    classes: ClassList
    background_words: tuple[str, ...]
    presence_threshold: float
    background_threshold: float
    fgc: bool


@dataclass(frozen=True)
class Preview:
    """A labeled image; `labels` uint8 or uint16 [H, W] in the file's own grid, as `cliper label` writes it."""

    image_id: str
    image: Decoded
    found: Segmentation
    heat: npt.NDArray[np.float32] | None  # [K, h, w]: the scores that compete, 0 to 1; None: not shown
    choice: Choice
    settings: JobConfig

    @property
    def labels(self) -> npt.NDArray[Any]:
        """The mask in the file's own pixel grid."""
        return np.ascontiguousarray(to_file_grid(self.found.labels, self.image.orientation))

    @property
    def gates(self) -> bool:
        """Whether the presence threshold takes part in the decision; see `segment_scores`."""
        model = self.settings.model
        return isinstance(model, CLIPerConfig) and model.labels.protocol == "cliper"


@dataclass(frozen=True)
class _Scored:
    """An image and its scores, from which every threshold gives its labels."""

    image: Decoded
    scores: Scores  # of a batch of one
    heat: npt.NDArray[np.float32]  # [K, h, w]

    @property
    def bytes(self) -> int:
        tensors = (self.scores.coarse, *self.scores.refined, self.scores.presence)
        return int(
            self.image.pixels.nbytes + self.heat.nbytes + sum(t.numel() * t.element_size() for t in tensors)
        )


class _Kept:
    """The latest scores by their image and words; for several users at once."""

    def __init__(self, most: int) -> None:
        """Keep at most `most` bytes, and in any case the latest."""
        self.most, self.lock = most, Lock()
        self.found: OrderedDict[Hashable, _Scored] = OrderedDict()

    def get(self, key: Hashable) -> _Scored | None:
        with self.lock:
            if key in self.found:
                self.found.move_to_end(key)
            return self.found.get(key)

    def put(self, key: Hashable, scored: _Scored) -> None:
        with self.lock:
            self.found[key] = scored
            while len(self.found) > 1 and sum(one.bytes for one in self.found.values()) > self.most:
                self.found.popitem(last=False)


class Previewer:
    """The networks of a configuration, loaded once, and the scores of the latest images.

    Threads can share it: the networks take one image at a time.
    """

    def __init__(self, config: JobConfig) -> None:
        """Load the weights. Raises ConfigError or WeightsError.

        A segmenter other than CLIPer is loaded anew for every class list that differs from the last one.
        """
        self.kind, self.config = chosen(config)
        if isinstance(self.config.model, CLIPerConfig):
            self.resident = Resident(self.config.model)
        else:
            self.kind.identity(self.config)
        self._load = lru_cache(maxsize=1)(lambda classes: self.kind.make(self.config, classes))
        self._kept, self._networks = _Kept(KEPT_BYTES), Lock()

    def label(self, data: bytes, image_id: str, choice: Choice) -> Preview:
        """Label the bytes of an image file. `image_id` seeds FGC's noise; `cliper label` uses the file's name.

        If only the thresholds differ from a recent call, its scores are used. Raises ImageError, ConfigError or
        ClassListError.
        """
        settings = chosen_settings(self.config, choice)
        if not isinstance(settings.model, CLIPerConfig):
            image = decode(data, settings.max_pixels, settings.input.truncated)
            with self._networks:
                found, heat = self._segment(choice.classes, image.pixels, image_id)
            return Preview(image_id, image, found, heat, choice, settings)
        key = _key(data, image_id, choice)
        scored = self._kept.get(key)
        if scored is None:
            scored = self._score(settings, choice.classes, data, image_id)
            self._kept.put(key, scored)
        return self._preview(scored, image_id, choice, settings)

    def relabel(self, data: bytes, image_id: str, choice: Choice) -> Preview | None:
        """As `label`, from kept scores alone; None if there are none. Raises ConfigError."""
        scored = self._kept.get(_key(data, image_id, choice))
        if scored is None:
            return None
        return self._preview(scored, image_id, choice, chosen_settings(self.config, choice))

    def _score(self, settings: JobConfig, classes: ClassList, data: bytes, image_id: str) -> _Scored:
        image = decode(data, settings.max_pixels, settings.input.truncated)
        with self._networks:
            model = self.resident.segmenter(settings.cliper, classes)
            # The batch `CLIPer.segment` would make of one image: the same sums, so the same mask.
            batch = 1 if model.device.type == "cpu" else settings.batch_size
            scores = model.scores([image.pixels] * batch, [image_id] * batch)
            one = Scores(scores.coarse[:1].clone(), _first(scores.refined), scores.presence[:1].clone())
            return _Scored(image, one, model.heat(one).cpu().numpy())

    def _preview(self, scored: _Scored, image_id: str, choice: Choice, settings: JobConfig) -> Preview:
        model = self.resident.segmenter(settings.cliper, choice.classes)
        found = model.label(scored.scores, 0, scored.image.pixels.shape[:2])
        return Preview(image_id, scored.image, found, scored.heat, choice, settings)

    def _segment(self, classes: ClassList, image: Pixels, image_id: str) -> Found:
        segmenter = self._load(classes)
        [found] = segmenter.segment([image], [image_id])
        return found, segmenter.heat(image, image_id) if isinstance(segmenter, HasHeat) else None


def _key(data: bytes, image_id: str, choice: Choice) -> Hashable:
    """What the networks' scores depend on."""
    return hashlib.sha256(data).digest(), image_id, choice.classes, choice.background_words, choice.fgc


def _first(refined: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return refined[:1].clone() if isinstance(refined, Tensor) else refined[:1]


def chosen_settings(config: JobConfig, choice: Choice) -> JobConfig:
    """The configuration with a person's choice put in. Raises ConfigError naming what is wrong.

    Of the choice, a segmenter other than CLIPer takes the classes only.
    """
    if not isinstance(config.model, CLIPerConfig):
        return config
    content = config.model_dump(mode="json")
    model = content["model"]
    model["prompts"]["background_words"] = list(choice.background_words)
    model["labels"]["presence_threshold"] = choice.presence_threshold
    decided_by = "probability_threshold" if model["labels"]["protocol"] == "mmseg" else "background_threshold"
    model["labels"][decided_by] = choice.background_threshold
    if not choice.fgc:
        model["fgc"] = None
    elif model["fgc"] is None:
        raise ConfigError("this configuration has no FGC; serve one that has it, e.g. --config vit-l-14")
    return validate(JobConfig, content, "page")


def parse_words(text: str) -> tuple[str, ...]:
    """Split at semicolons and line ends; empty parts are dropped."""
    return tuple(word.strip() for word in text.replace("\n", ";").split(";") if word.strip())


def parse_classes(text: str) -> ClassList:
    """Class names, or `name = prompt`, separated by semicolons; or a class file's text. Raises ClassListError."""
    words = parse_words(text)
    comments = [word for word in words if word.startswith("#")]
    if comments:
        raise ClassListError(
            f"a class cannot start with '#', which marks a comment in a class file: '{comments[0]}'"
        )
    return ClassList.parse(class_lines("\n".join(words), "classes"), "classes")


def class_file(classes: ClassList) -> str:
    """The text of a class file for `cliper label --classes`."""
    pairs = zip(classes.names, classes.prompts, strict=True)
    return "".join(f"{name}\n" if name == prompt else f"{name} = {prompt}\n" for name, prompt in pairs)


def config_file(settings: JobConfig) -> str:
    """The YAML for `cliper label --config`; resources are the machine's matter and stay out."""
    doubled = SHARED & type(settings.model).model_fields.keys()  # stands in `model` as well
    content = settings.model_dump(mode="json", exclude={"resources", *doubled})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def render_preview(preview: Preview) -> str:
    """The result as an HTML fragment with everything inline, downloads included."""
    order = np.argsort(-preview.found.presence, kind="stable").tolist()
    shown, heat = order[:HEAT_MAPS], preview.heat
    names, image = preview.choice.classes.names, preview.image
    size = image.pixels.shape[:2]
    return render_page(
        "preview.html",
        {
            "image": _layers(preview),
            "caption": f"{image.width} x {image.height}, confidence {preview.found.confidence:.2f}",
            "rows": [_class_row(preview, k) for k in order],
            "over": bool(preview.found.presence.max(initial=0) > 1),
            "heats": [{"name": names[k], "map": _heat_map(heat[k], size)} for k in shown]
            if heat is not None
            else [],
            "unshown": len(order) - len(shown) if heat is not None else 0,
            "files": [
                ("config.yaml", data_uri("text/yaml", config_file(preview.settings))),
                ("classes.txt", data_uri("text/plain", class_file(preview.choice.classes))),
                ("mask.png", data_uri("image/png", encode_png(preview.labels))),
            ],
        },
    )


def _layers(preview: Preview) -> dict[str, Any]:
    """Photograph and mask for templates/figure.html, upright."""
    found, pixels = preview.found, preview.image.pixels
    return {
        "image_id": preview.image_id,
        "photo": picture(pixels, _SIDE),
        "mask": mask_layer(found.labels, _SIDE),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "labels": [
            {
                "name": entry["name"],
                "colour": colour(entry["class_id"]),
                "share": entry["pixels"] / found.labels.size,
            }
            for entry in class_entries(found, preview.choice.classes.names)
        ],
    }


def _class_row(preview: Preview, k: int) -> dict[str, Any]:
    """Class number `k`, counted from 0, in the table."""
    found, presence = preview.found, float(preview.found.presence[k])
    pixels = int(found.pixels[k + 1])
    return {
        "name": preview.choice.classes.names[k],
        "colour": colour(k + 1),
        "presence": f"{presence:.3f}" if presence <= 1 else f"{presence:.3f}, over 1",
        "gated": preview.gates and presence <= preview.choice.presence_threshold,
        "share": pixels / found.labels.size,
        "confidence": f"{found.class_confidence[k + 1]:.2f}" if pixels else "-",
    }


def _heat_map(scores: npt.NDArray[np.float32], size: tuple[int, int]) -> str:
    """Scores [h, w] from 0 to 1 as a data URI of an image with the photograph's aspect ratio."""
    colours = (colormaps["viridis"](scores)[..., :3] * 255).astype(np.uint8)
    scale = min(1.0, OVERLAY_SIDE / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return picture(np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)))
