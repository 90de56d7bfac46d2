"""Exports opened by the tools themselves. They are heavy: CLIPER_TOOLS names a Python that has some of them.

The results with their versions are in docs/EXPORT.md.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cliper.pipeline.export.driver import export, make_plan
from cliper.pipeline.export.options import Options
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.rows import LABELED, RowFilter
from tests.support.export_runs import scenes, scripted_run, stored_masks

PYTHON = os.environ.get("CLIPER_TOOLS", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="CLIPER_TOOLS names no Python with datumaro, labelformat, ...")

# Prints JSON: pixels of each label of each image, by the name of the item.
DATUMARO = """
import json, sys
from collections import Counter
import numpy as np
from datumaro.components.dataset import Dataset
from datumaro.components.annotation import AnnotationType
folder, form = sys.argv[1:]
dataset, found = Dataset.import_from(folder, form), {}
names = [label.name for label in dataset.categories()[AnnotationType.label]]
for item in dataset:
    pixels = Counter()
    for one in item.annotations:
        if one.type == AnnotationType.mask:
            pixels[names[one.label]] += int(np.count_nonzero(one.image))
        if one.type == AnnotationType.polygon:
            pixels[names[one.label]] += int(round(one.get_area()))
    found[item.id.rsplit('/')[-1]] = dict(pixels)
print(json.dumps(found))
"""
LABELFORMAT = """
import json, sys
from pathlib import Path
from labelformat.formats import COCOInstanceSegmentationInput
label_input = COCOInstanceSegmentationInput(Path(sys.argv[1]))
found = {}
for one in label_input.get_labels():
    found[Path(one.image.filename).stem] = len(one.objects)
print(json.dumps(found))
"""

# Prints JSON: pixels of each value of each mask, by image id.
CROISSANT = """
import json, sys
from pathlib import Path
import mlcroissant, numpy as np
dataset, found = mlcroissant.Dataset(jsonld=Path(sys.argv[1]) / "croissant.json"), {}
for records in dataset.metadata.record_sets:
    for record in dataset.records(records.id):
        values, counts = np.unique(np.array(record[f"{records.id}/mask"]), return_counts=True)
        assert record[f"{records.id}/image"].size == record[f"{records.id}/mask"].size
        image_id = record[f"{records.id}/image_id"].decode()
        found[image_id] = dict(zip(map(str, values), counts.tolist()))
print(json.dumps(found))
"""
# The same, by the configuration that the export writes. mmcv-lite has no compiled operators; none is called here.
MMSEG = """
import json, sys, types
from pathlib import Path
import numpy as np
class Operators(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *a, **k: None
sys.modules["mmcv._ext"] = Operators("mmcv._ext")
from mmengine import Config
from mmengine.registry import init_default_scope
import mmseg.datasets
from mmseg.registry import DATASETS
init_default_scope("mmseg")  # as mmengine's Runner does
config, found = Config.fromfile(Path(sys.argv[1]) / "mmseg.py"), {}
for split in ("train", "val"):
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    content = config[f"{split}_dataset"].to_dict() | {"data_root": sys.argv[1], "pipeline": steps}
    for item in DATASETS.build(content):
        assert item["gt_seg_map"].shape == item["img"].shape[:2]
        values, counts = np.unique(item["gt_seg_map"], return_counts=True)
        name = Path(item["img_path"]).stem.removesuffix("_leftImg8bit")
        found[name + ".jpg"] = dict(zip(map(str, values), counts.tolist()))
print(json.dumps(found))
"""


def require_tool(module: str) -> None:
    """Skip the test if the Python of CLIPER_TOOLS lacks a module."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    if subprocess.run([PYTHON, "-c", code], check=False).returncode:
        pytest.skip(f"the Python of CLIPER_TOOLS has no {module}")


def run_tool(code: str, *arguments: str) -> dict[str, dict[str, int]]:
    done = subprocess.run([PYTHON, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    given = scenes(30, hard_ids=[f"image-{i}.jpg" for i in range(30)])
    return scripted_run(tmp_path_factory.mktemp("tools"), given, shard={"images": 16})


CASES = {
    "voc_segmentation": ("voc", {}, "VOCdevkit/VOC2012"),
    "coco": ("coco", {"segmentation": "polygon", "val_share": 0.3}, ""),
    "coco_panoptic": ("coco-panoptic", {}, ""),
    "datumaro": ("datumaro", {"val_share": 0.3}, ""),
    "cvat": ("cvat", {}, ""),
}


@pytest.mark.parametrize("form", CASES)
def test_datumaro_reads_the_masks(form: str, run: Run, tmp_path: Path) -> None:
    require_tool("datumaro")
    to, options, below = CASES[form]
    plan = make_plan(run, to, LABELED, True, Options(**options))
    export(run, plan, str(tmp_path))
    found = run_tool(DATUMARO, str(tmp_path / below), form)
    masks = stored_masks(run)
    names = {image_id.removesuffix(".jpg"): mask for image_id, mask in masks.items()}
    assert set(found) == set(names)
    for name, mask in names.items():
        wanted = {n.replace(":", "_"): int((mask == k).sum()) for k, n in enumerate(plan.class_names, 1)}
        counted = {
            n.replace(":", "_"): pixels for n, pixels in found[name].items() if n != "background" and pixels
        }
        assert counted == {n: pixels for n, pixels in wanted.items() if pixels}


def test_labelformat_reads_polygons(run: Run, tmp_path: Path) -> None:
    require_tool("labelformat")
    export(run, make_plan(run, "coco", LABELED, True, Options(segmentation="polygon")), str(tmp_path))
    found = run_tool(LABELFORMAT, str(tmp_path / "annotations/instances_train.json"))
    assert len(found) == 30


def test_mlcroissant_reads_masks_and_images(run: Run, tmp_path: Path) -> None:
    require_tool("mlcroissant")
    export(run, make_plan(run, "huggingface", LABELED, True, Options(val_share=0.3)), str(tmp_path))
    assert run_tool(CROISSANT, str(tmp_path)) == {name: values(mask) for name, mask in stored_masks(run).items()}


@pytest.mark.parametrize("to", ["ade", "cityscapes"])
def test_mmsegmentation_reads_the_layouts_by_their_configuration(to: str, run: Run, tmp_path: Path) -> None:
    """Train ids: class k is k - 1, background is ignored (255). It squeezes masks: sides of a pixel are lost."""
    require_tool("mmseg")
    keep = RowFilter(where="width > 1 AND height > 1")
    export(run, make_plan(run, to, keep, True, Options(val_share=0.3)), str(tmp_path))
    masks = {name: mask for name, mask in stored_masks(run).items() if 1 not in mask.shape}
    wanted = {name: values(np.where(mask == 0, 255, mask - 1)) for name, mask in masks.items()}
    assert run_tool(MMSEG, str(tmp_path)) == wanted


def values(mask: np.ndarray) -> dict[str, int]:
    return {str(k): int(n) for k, n in zip(*np.unique(mask, return_counts=True), strict=True)}
