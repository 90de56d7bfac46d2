"""Heat maps of the first images: those of the classes that are in the mask, in the file's own grid."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from cliper.pipeline.config import JobConfig, load_classes
from cliper.pipeline.run.masks import unpack_mask
from tests.conftest import ROOT
from tests.support.direct import label_directly

SCENES = ROOT / "configs" / "examples"


def turned(source: Path, target: Path) -> None:
    """The same scene, stored rotated by a quarter turn."""
    image = Image.open(source)
    exif = image.getexif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(target, exif=exif, quality=95)


def test_the_first_images_have_heat_maps(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, scene in enumerate(sorted(SCENES.glob("*.jpg"))):
        turned(scene, tmp_path / "in" / f"{number}.jpg")
    labels = {"presence_threshold": 0.3, "background_threshold": 0.3}
    settings = {"model": {"fgc": None, "labels": labels}, "resources": {"keep_heatmaps": 2}}
    config = JobConfig.model_validate(settings)
    run = label_directly(str(tmp_path / "in"), str(tmp_path / "run"), config, load_classes("tiny"))
    rows = pq.read_table(f"{run.uri}/labels/shard-000000.parquet").to_pylist()
    kept = tmp_path / "run" / "heatmaps"
    assert sorted(path.name for path in kept.iterdir()) == [row["image_id"] for row in rows[:2]]
    for row in rows[:2]:
        mask, present = unpack_mask(row), [c for c in row["classes"] if c["class_id"]]
        assert present
        files = sorted((kept / row["image_id"]).iterdir())
        assert [file.name for file in files] == [
            f"{c['class_id']:03d}-{c['name'].replace(' ', '-')}.png" for c in present
        ]
        for entry, file in zip(present, files, strict=True):
            heat = np.asarray(Image.open(file))
            assert (heat.dtype, heat.shape) == (np.uint8, mask.shape)
            assert heat[mask == entry["class_id"]].min() >= 255 * (0.3 - 0.06)  # the threshold, up to the scale


def test_none_are_written_by_default(tmp_path: Path) -> None:
    run = label_directly(
        str(SCENES),
        str(tmp_path / "run"),
        JobConfig.model_validate({"model": {"fgc": None}}),
        load_classes("tiny"),
    )
    assert not Path(run.uri, "heatmaps").exists()
