"""Heat maps of single images: the scores of every class in the mask, as grayscale images in the run folder.

heatmaps/IMAGE_ID/003-cat.png   8-bit, the size of the image file; 255 is a score of 1
"""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from cliper.pipeline.corpus.decode import Decoded, to_file_grid
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.uris import join

if TYPE_CHECKING:
    from cliper.model.segmentation import Segmentation


@runtime_checkable
class HasHeat(Protocol):
    """A segmenter that also returns the scores behind its labels."""

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """Scores of every class for one uint8 RGB image [H, W, 3]: [K, h, w], 0 to 1."""
        ...


def write_heatmaps(
    run: Run,
    image_id: str,
    image: Decoded,
    heat: npt.NDArray[np.float32],
    found: "Segmentation",
    names: Sequence[str],
) -> None:
    """Write one image for each class that has pixels in the mask. Raises StorageError."""
    for k in np.flatnonzero(found.pixels[1:]).tolist():
        slug = re.sub(r"[^\w-]+", "-", names[k]).strip("-")
        target = join(run.uri, f"heatmaps/{image_id}/{k + 1:03d}-{slug}.png")
        run.storage.write(target, _picture(heat[k], image))


def _picture(scores: npt.NDArray[np.float32], image: Decoded) -> bytes:
    """Encode scores [h, w] as a PNG in the image file's own pixel grid."""
    height, width = image.pixels.shape[:2]
    full = np.asarray(Image.fromarray(scores).resize((width, height), Image.Resampling.BILINEAR))
    grey = (full.clip(0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(to_file_grid(grey, image.orientation))).save(buffer, format="PNG")
    return buffer.getvalue()
