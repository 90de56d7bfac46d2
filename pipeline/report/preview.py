"""Preview of one image under trial settings: its mask, the scores behind it, and the config that reproduces it."""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from matplotlib import colormaps
from PIL import Image

from cliper.model.class_text import class_lines
from cliper.model.classes import ClassList
from cliper.model.errors import ClassListError, ConfigError
from cliper.model.labels import Segmentation
from cliper.model.resident import Resident
from cliper.pipeline.config import JobConfig, validate
from cliper.pipeline.corpus.decode import Decoded, decode, to_file_grid
from cliper.pipeline.label.actor import class_entries
from cliper.pipeline.report.images import OVERLAY_SIDE, colour, mask_layer, picture
from cliper.pipeline.report.page import render_page
from cliper.pipeline.run.masks import encode_png

HEAT_MAPS = 12  # of the classes with the highest presence
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
    heat: npt.NDArray[np.float32]  # [K, h, w]: the scores that compete, 0 to 1
    choice: Choice
    settings: JobConfig

    @property
    def labels(self) -> npt.NDArray[Any]:
        """The mask in the file's own pixel grid."""
        return np.ascontiguousarray(to_file_grid(self.found.labels, self.image.orientation))

    @property
    def gates(self) -> bool:
        """Whether the presence threshold affects the labels; see `segment_scores`."""
        return self.settings.model.labels.protocol == "cliper"


class Previewer:
    """The networks of a configuration, loaded once. Stateless between calls."""

    def __init__(self, config: JobConfig) -> None:
        """Load the weights. Raises ConfigError for any segmenter but CLIPer, and WeightsError."""
        if config.segmenter != "cliper":
            raise ConfigError(f"only the segmenter 'cliper' can be previewed, not '{config.segmenter}'")
        self.config = config
        self.resident = Resident(config.model)

    def label(self, data: bytes, image_id: str, choice: Choice) -> Preview:
        """Label the bytes of an image file. `image_id` seeds FGC's noise; `cliper label` uses the file's name.

        Raises ImageError, ConfigError or ClassListError.
        """
        settings = chosen_settings(self.config, choice)
        model = self.resident.segmenter(settings.model, choice.classes)
        image = decode(data, settings.max_pixels, settings.input.truncated)
        # Same batch as in `CLIPer.segment` for one image: the same sums, so the same mask.
        batch = 1 if model.device.type == "cpu" else settings.model.batch_size
        scores = model.scores([image.pixels] * batch, [image_id] * batch)
        found = model.label(scores, 0, image.pixels.shape[:2])
        return Preview(image_id, image, found, model.heat(scores).cpu().numpy(), choice, settings)


def chosen_settings(config: JobConfig, choice: Choice) -> JobConfig:
    """The configuration with the user's choice applied. Raises ConfigError, which names the wrong setting."""
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
    """The YAML for `cliper label --config`, without resources, which depend on the machine."""
    content = settings.model_dump(mode="json", exclude={"resources"})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def render_preview(preview: Preview) -> str:
    """The result as an HTML fragment with everything inline, downloads included."""
    order = np.argsort(-preview.found.presence, kind="stable").tolist()
    shown = order[:HEAT_MAPS]
    names, image = preview.choice.classes.names, preview.image
    size = image.pixels.shape[:2]
    return render_page(
        "preview.html",
        {
            "image": _layers(preview),
            "caption": f"{image.width} x {image.height}, confidence {preview.found.confidence:.2f}",
            "rows": [_class_row(preview, k) for k in order],
            "heats": [{"name": names[k], "map": _heat_map(preview.heat[k], size)} for k in shown],
            "unshown": len(order) - len(shown),
            "files": [
                ("config.yaml", _data_uri("text/yaml", config_file(preview.settings).encode())),
                ("classes.txt", _data_uri("text/plain", class_file(preview.choice.classes).encode())),
                ("mask.png", _data_uri("image/png", encode_png(preview.labels))),
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
        "presence": f"{presence:.3f}",
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


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
