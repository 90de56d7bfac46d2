"""Every format, read back as its own tools read it, must reproduce the masks of the run."""

import ast
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from cliper.pipeline.corpus.decode import to_file_grid
from cliper.pipeline.errors import ExportError
from cliper.pipeline.export.brush import decode_brush
from cliper.pipeline.export.driver import LISTING, export
from cliper.pipeline.export.regions import boxes, components
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.run.folder import Run, class_names
from tests.support.export_runs import MANY, plan_of, scenes, scripted_run, stored_masks

Masks = dict[str, np.ndarray]
COUNTS = {"scenes": 200, "many": 12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """`scenes`: 200 images, 19 classes, PNG masks; `many`: 300 classes, so uint16, with COCO RLE masks."""
    folder = tmp_path_factory.mktemp("runs")
    many = scenes(COUNTS["many"], MANY)
    return {
        "scenes": scripted_run(folder / "scenes", scenes(COUNTS["scenes"])),
        "many": scripted_run(folder / "many", many, MANY, mask_codec="coco-rle"),
    }


def read_coco(folder: Path, run: Run) -> Masks:
    from pycocotools.coco import COCO

    found = {}
    for path in sorted((folder / "annotations").iterdir()):
        found |= coco_masks(COCO(path), path.stem.removeprefix("instances_"), run)
    return found


def coco_masks(coco: Any, split: str, run: Run) -> Masks:
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(class_names(run.identity))
    found = {}
    for image in coco.loadImgs(coco.getImgIds()):
        labels = np.zeros((image["height"], image["width"]), np.uint16)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["area"] == mask.sum()
            assert not labels[mask].any(), "classes overlap"
            labels[mask] = annotation["category_id"]
        found[image["cliper_image_id"]] = labels
    return found


def read_panoptic(folder: Path, run: Run) -> Masks:
    """By the format's rule: id = R + 256 G + 65536 B; every id but 0 is listed with its category."""
    found = {}
    for path in sorted((folder / "annotations").glob("*.json")):
        found |= panoptic_masks(json.loads(path.read_text()), path.with_suffix(""))
    return found


def panoptic_masks(content: dict[str, Any], folder: Path) -> Masks:
    ids = {image["id"]: image["cliper_image_id"] for image in content["images"]}
    found = {}
    for annotation in content["annotations"]:
        with Image.open(folder / annotation["file_name"]) as image:
            segment = np.array(image.convert("RGB")).astype(int) @ [1, 256, 65536]
        labels = np.zeros(segment.shape, np.uint16)
        for listed in annotation["segments_info"]:
            assert (segment == listed["id"]).sum() == listed["area"] > 0
            x, y, width, height = listed["bbox"]
            assert (segment[y : y + height, x : x + width] == listed["id"]).sum() == listed["area"]
            labels[segment == listed["id"]] = listed["category_id"]
        assert set(np.unique(segment)) - {0} == {one["id"] for one in annotation["segments_info"]}
        found[ids[annotation["image_id"]]] = labels
    return found


def names_to_ids(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / LISTING).read_text().splitlines()]
    rows = [row for row in rows if "left_out" not in row]
    found = {row["name"]: row["image_id"] for row in rows}
    assert len(found) == len(rows)
    return found


def read_voc(folder: Path, run: Run) -> Masks:
    import_module("cliper.model._libraries")  # torchvision may need help to import
    from torchvision.datasets import VOCSegmentation

    root = folder / "VOCdevkit" / "VOC2012"
    assert (root / "classes.txt").read_text().splitlines() == ["background", *class_names(run.identity)]
    ids, found = names_to_ids(folder), {}
    for split in ("train", "val"):
        dataset = VOCSegmentation(folder, "2012", split)
        for (image, mask), path in zip(dataset, dataset.masks, strict=True):
            assert image.size == mask.size
            found[ids[Path(path).stem]] = np.array(mask)
    return found


def read_yolo(folder: Path, run: Run) -> Masks:
    """As ultralytics does: verify_image_label's checks, then polygon2mask's integer vertices and fillPoly."""
    import cv2

    content = yaml.safe_load((folder / "data.yaml").read_text())
    assert content["names"] == dict(enumerate(class_names(run.identity)))
    ids, sizes, found = names_to_ids(folder), {k: v.shape for k, v in stored_masks(run).items()}, {}
    for split in ("train", "val", "test"):
        for path in (folder / "labels" / split).glob("*.txt"):
            height, width = sizes[ids[path.stem]]
            labels = np.zeros((height, width), np.uint16)
            for line in path.read_text().strip().splitlines():
                number, *values = line.split()
                points = np.array(values, dtype=np.float32).reshape(-1, 2)
                assert len(values) >= 6
                assert points.min() >= 0
                assert points.max() <= 1
                mask = np.zeros((height, width), np.uint8)
                cv2.fillPoly(mask, [(points * [width, height]).astype(np.int32)], color=1)
                assert not labels[mask > 0].any(), "polygons overlap"
                labels[mask > 0] = int(number) + 1
            found[ids[path.stem]] = labels
    return found


def read_webdataset(folder: Path, run: Run) -> Masks:
    import webdataset

    tars = [str(folder / part["url"]) for part in json.loads((folder / "index.json").read_text())["shardlist"]]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    few = len(class_names(run.identity)) <= 254
    raw = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil", only=["json"]))
    found = {}
    for sample, stored in zip(samples, raw, strict=True):
        with Image.open(io.BytesIO(stored["mask.png"])) as image:
            found[sample["json"]["image_id"]] = np.array(image)
        if few:  # webdataset's "pil" is RGB, of equal channels here
            assert (np.asarray(sample["mask.png"])[..., 1] == found[sample["json"]["image_id"]]).all()
        pictures = {"jpg", "png", "webp"} & set(sample)
        assert len(pictures) == 1
    assert len(found) == len(samples)
    return found


def read_huggingface(folder: Path, run: Run) -> Masks:
    from datasets import concatenate_datasets, load_dataset

    splits = load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    dataset = concatenate_datasets(list(splits.values()))
    names = ["background", *class_names(run.identity)]
    assert dataset.features["classes"].feature["class_id"].names == names
    assert json.loads((folder / "id2label.json").read_text()) == dict(
        zip(map(str, range(400)), names, strict=False)
    )
    assert type(dataset.features["mask"]).__name__ == "Image"
    assert dataset[0]["classes"][0].keys() >= {"class_id", "name", "pixels"}
    return {row["image_id"]: np.array(row["mask"]) for row in dataset}


def read_label_studio(folder: Path, run: Run) -> Masks:
    from label_studio_sdk.converter.brush import decode_rle
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((folder / "config.xml").read_text())
    names = {name: label for label, name in enumerate(class_names(run.identity), 1)}
    found = {}
    for path in sorted((folder / "tasks").iterdir()):
        for task in json.loads(path.read_text()):
            [prediction] = task["predictions"]
            assert interface.validate_prediction(prediction)
            labels = None
            for result in prediction["result"]:
                height, width = result["original_height"], result["original_width"]
                labels = np.zeros((height, width), np.uint16) if labels is None else labels
                rle = result["value"]["rle"]
                mask = decode_brush(rle, height, width)
                if len(rle) < 300:  # the library's decoder takes a microsecond per bit
                    assert np.array_equal(decode_rle(rle).reshape(height, width, 4)[..., 3] > 0, mask)
                labels[mask] = names[result["value"]["brushlabels"][0]]
            found[task["data"]["image_id"]] = labels
    return found


def read_cvat(folder: Path, run: Run) -> Masks:
    """By CVAT's rule: counts alternate between outside and inside, outside first, over the bounding box's rows."""
    from scipy.ndimage import label

    root = ElementTree.parse(folder / "annotations.xml").getroot()
    names = {name: number for number, name in enumerate(class_names(run.identity), 1)}
    assert [e.text for e in root.iterfind("meta/task/labels/label/name")] == list(names)
    assert [one["name"] for one in json.loads((folder / "labels.json").read_text())] == list(names)
    found = {}
    for image in root.iterfind("image"):
        labels = np.zeros((int(image.get("height", "")), int(image.get("width", ""))), np.uint16)
        for mask in image.iterfind("mask"):
            left, top, width, height = (int(mask.get(key, "")) for key in ("left", "top", "width", "height"))
            counts = [int(count) for count in mask.get("rle", "").split(",")]
            inside = np.repeat(np.arange(len(counts)) % 2, counts).reshape(height, width).astype(bool)
            assert label(inside, np.ones((3, 3)))[1] == 1, "one region each"
            labels[top : top + height, left : left + width][inside] = names[mask.get("label", "")]
        found[image.get("name", "")] = labels
    return found


def read_fiftyone(folder: Path, run: Run) -> Masks:
    """By the form's rules; FiftyOne reads masks with OpenCV, unchanged. With FiftyOne itself: see below."""
    import cv2

    info = json.loads((folder / "metadata.json").read_text())["info"]
    assert list(info["mask_targets"]["segmentation"].values()) == ["background", *class_names(run.identity)]
    found = {}
    for sample in json.loads((folder / "samples.json").read_text())["samples"]:
        mask = cv2.imread(str(folder / sample["segmentation"]["mask_path"]), cv2.IMREAD_UNCHANGED)
        assert (sample["metadata"]["height"], sample["metadata"]["width"]) == mask.shape
        found[sample["image_id"]] = mask
    return found


def read_coco_results(folder: Path, run: Run) -> Masks:
    """By COCO's rule: predictions with scores; image k is the k-th of the listing."""
    from pycocotools import mask as coco

    sizes, found = {k: v.shape for k, v in stored_masks(run).items()}, {}
    ids = list(names_to_ids(folder).values())
    found = {image_id: np.zeros(sizes[image_id], np.uint16) for image_id in ids}
    for one in json.loads((folder / "results.json").read_text()):
        assert 0 <= one["score"] <= 1
        found[ids[one["image_id"] - 1]][coco.decode(one["segmentation"]).astype(bool)] = one["category_id"]
    return found


def read_boxes(folder: Path, run: Run) -> Masks:
    """The boxes are those of the connected regions; returns the run's masks if all are."""
    ids, wanted = names_to_ids(folder), stored_masks(run)
    for path in (folder / "labels").rglob("*.txt"):
        labels = wanted[ids[path.stem]]
        height, width = labels.shape
        numbers, owners = components(labels)
        expected = sorted((owners[i - 1] - 1, x, y, w, h) for i, x, y, w, h, _ in boxes(numbers))
        rows = [list(map(float, line.split())) for line in path.read_text().splitlines()]
        assert all(0 <= value <= 1 for row in rows for value in row[1:])
        drawn = sorted(
            (int(k), round((x - w / 2) * width), round((y - h / 2) * height), round(w * width), round(h * height))
            for k, x, y, w, h in rows
        )
        assert drawn == expected
    return wanted


def read_labelme(folder: Path, run: Run) -> Masks:
    """By the format's rule: polygons along the edges of pixels, filled."""
    from pycocotools import mask as coco

    names = {name: label for label, name in enumerate(class_names(run.identity), 1)}
    assert (folder / "labels.txt").read_text().splitlines()[2:] == list(names)
    ids, found = names_to_ids(folder), {}
    for path in folder.glob("*.json"):
        if path.stem not in ids:
            continue
        content = json.loads(path.read_text())
        height, width = content["imageHeight"], content["imageWidth"]
        labels = np.zeros((height, width), np.uint16)
        for shape in content["shapes"]:
            [rle] = coco.frPyObjects([np.ravel(shape["points"]).tolist()], height, width)
            labels[coco.decode(rle).astype(bool)] = names[shape["label"]]
        with Image.open(folder / content["imagePath"]) as image:
            assert image.size == (width, height)
        found[ids[path.stem]] = labels
    return found


def read_datumaro(folder: Path, run: Run) -> Masks:
    """By the format's rule; with datumaro itself in test_tools.py."""
    from pycocotools import mask as coco

    found = {}
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        listed = [one["name"] for one in content["categories"]["label"]["labels"]]
        assert listed == ["background", *class_names(run.identity)]
        for item in content["items"]:
            labels = np.zeros(item["image"]["size"], np.uint16)
            for one in item["annotations"]:
                labels[coco.decode(one["rle"]).astype(bool)] = one["label_id"]
            found[item["attr"]["image_id"]] = labels
            assert (folder / "images" / path.stem / item["image"]["path"]).is_file()
    return found


def read_folders(folder: Path, run: Run) -> Masks:
    """As mmsegmentation finds files: by the configuration's prefixes and suffixes."""
    ids, found = names_to_ids(folder), {}
    settings: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        [value] = re.findall(
            rf"^{name}_dataset = (.*?)^(?=\S|\Z)", (folder / "mmseg.py").read_text() + "\n", re.M | re.S
        )
        settings[name] = ast.literal_eval(value)
    for one in settings.values():
        assert one["metainfo"]["classes"] == class_names(run.identity)
        prefix, ending = folder / one["data_prefix"]["seg_map_path"], one["seg_map_suffix"]
        for path in prefix.rglob(f"*{ending}"):
            image = folder / one["data_prefix"]["img_path"] / path.relative_to(prefix)
            assert Path(str(image).replace(ending, one["img_suffix"])).is_file()
            values = np.array(Image.open(path))
            assert values.dtype == np.uint8
            labels = values if one["reduce_zero_label"] else np.where(values == 255, 0, values + 1)
            found[ids[path.name.removesuffix(ending)]] = labels
    return found


def read_sagemaker(folder: Path, run: Run) -> Masks:
    found = {}
    for path in folder.glob("*.manifest"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert Path(row["source-ref"]).is_file()
            names = [one["class-name"] for one in row["cliper-ref-metadata"]["internal-color-map"].values()]
            assert names == ["BACKGROUND", *class_names(run.identity)]
            found[names_to_ids(folder)[Path(row["source-ref"]).stem]] = np.array(Image.open(row["cliper-ref"]))
    return found


EIGHT_BITS = ("cityscapes", "ade", "sagemaker")
READERS: dict[str, Callable[[Path, Run], Masks]] = {
    "coco": read_coco,
    "coco-panoptic": read_panoptic,
    "voc": read_voc,
    "yolo-seg": read_yolo,
    "webdataset": read_webdataset,
    "huggingface": read_huggingface,
    "label-studio": read_label_studio,
    "cvat": read_cvat,
    "fiftyone": read_fiftyone,
    "coco-results": read_coco_results,
    "yolo-detect": read_boxes,
    "labelme": read_labelme,
    "datumaro": read_datumaro,
    "cityscapes": read_folders,
    "ade": read_folders,
    "sagemaker": read_sagemaker,
}


def assert_same(found: Mapping[str, np.ndarray | None], run: Run, turned: Mapping[str, int] | None = None) -> None:
    """Equal to the run's masks; if an image has no region, some formats store no mask."""
    wanted = stored_masks(run)
    assert set(found) == set(wanted)
    for image_id, labels in found.items():
        if labels is None:
            assert not wanted[image_id].any()
            continue
        grid = to_file_grid(labels, (turned or {}).get(image_id, 1))
        assert grid.shape == wanted[image_id].shape, image_id
        assert np.array_equal(grid, wanted[image_id]), image_id


@pytest.mark.parametrize("which", COUNTS)
@pytest.mark.parametrize("name", EXPORTERS)
def test_read_back_with_images(name: str, which: str, runs: dict[str, Run], tmp_path: Path) -> None:
    run, folder = runs[which], tmp_path / "out"
    if which == "many" and name in EIGHT_BITS:
        with pytest.raises(ExportError, match="254 classes"):
            export(run, plan_of(run, name), str(folder))
        return
    done = export(run, plan_of(run, name, images=True, val_share=0.3), str(folder))
    assert (done.images, done.left_out) == (COUNTS[which], {})
    found = READERS[name](folder, run)
    if name == "cvat":  # images are known by their file names there
        ids = names_to_ids(folder)
        found = {ids[Path(key).stem]: mask for key, mask in found.items()}
    assert_same(found, run)


@pytest.mark.parametrize("name", ["label-studio", "cvat", "fiftyone"])
def test_masks_are_rotated_for_tools_that_rotate_images(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    """If images are not copied, the tool shows the file with its EXIF orientation applied."""
    run = runs["scenes"]
    export(run, plan_of(run, name), str(tmp_path / "out"))
    turned = {one.image_id: one.orientation for one in scenes(40)}
    assert len(set(turned.values())) == 8
    assert_same(READERS[name](tmp_path / "out", run), run, turned)


def test_coco_without_images_names_their_uris(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["scenes"]
    export(run, plan_of(run, "coco"), str(tmp_path / "out"))
    assert_same(read_coco(tmp_path / "out", run), run)
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert all(Path(image["file_name"]).is_file() for image in content["images"])
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize("name", ["voc", "yolo-seg", "coco"])
def test_copied_images_are_in_the_grid_of_their_masks(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    """Readers may apply EXIF or not. An image's gray is eight times its label, so a rotation is detected."""
    run = runs["scenes"]
    export(run, plan_of(run, name, images=True), str(tmp_path))
    wanted, ids = stored_masks(run), names_to_ids(tmp_path)
    folder = {"voc": "VOCdevkit/VOC2012/JPEGImages"}.get(name, "images/train")
    files = sorted((tmp_path / folder).iterdir())
    assert len(files) == COUNTS["scenes"]
    for path in files:
        labels = wanted[ids[path.stem]]
        with Image.open(path) as image:
            plain, shown = np.array(image.convert("L")), np.array(ImageOps.exif_transpose(image).convert("L"))
        assert np.array_equal(plain, shown)
        assert plain.shape == labels.shape
        assert np.abs(plain.astype(int) - labels.astype(int) * 8).mean() < 12, path.name


def test_fiftyone_itself_reads_the_folder(runs: dict[str, Run], tmp_path: Path) -> None:
    pytest.importorskip("fiftyone", reason="fiftyone is heavy and not among the test extras")
    from fiftyone.utils.data.importers import LegacyFiftyOneDatasetImporter

    run = runs["scenes"]
    export(run, plan_of(run, "fiftyone", images=True), str(tmp_path))
    found: Masks = {}
    with LegacyFiftyOneDatasetImporter(str(tmp_path)) as importer:
        assert importer.get_dataset_info()["classes"]["segmentation"] == list(class_names(run.identity))
        for sample in importer:
            assert Path(sample.filepath).is_file()
            found[sample["image_id"]] = sample["segmentation"].get_mask()
    assert_same(found, run)


def test_text_that_xml_cannot_represent_is_refused(tmp_path: Path, runs: dict[str, Run]) -> None:
    for name in ("cvat", "label-studio"):
        plan = replace(plan_of(runs["scenes"], name), run_classes=("bell \x07",))
        with pytest.raises(
            ExportError, match=r"class name 'bell \\x07' holds '\\x07', which XML cannot represent"
        ):
            export(runs["scenes"], plan, str(tmp_path / name))
        assert not (tmp_path / name).exists()


def test_split_depends_on_the_id_alone_and_meets_its_share(runs: dict[str, Run]) -> None:
    plan: Any = plan_of(runs["scenes"], "voc", val_share=0.25)
    drawn = [plan.split(f"image-{i}") for i in range(4000)]
    assert 0.22 < drawn.count("val") / 4000 < 0.28
    assert {plan_of(runs["scenes"], "voc").split(f"image-{i}") for i in range(100)} == {"train"}
    assert {plan_of(runs["scenes"], "voc", val_share=1.0).split(f"image-{i}") for i in range(100)} == {"val"}
