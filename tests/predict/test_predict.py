"""Python as a new user types it: any image in, labels, pictures and annotations out; one clear error otherwise."""

import doctest
import io
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cliper
from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.run.folder import Run
from tests.conftest import ROOT, S3Server
from tests.support.export_runs import scenes, scripted_run

SCENE = ROOT / "configs" / "examples" / "scene-1.jpg"
CLASSES = ["grass", "water", "kite"]


@pytest.fixture(scope="module")
def model() -> "cliper.CLIPer":
    return cliper.CLIPer.load(coarse(), CLASSES)


def coarse() -> "cliper.JobConfig":
    """The embedded model without FGC: six times faster."""
    config = cliper.load_config("tiny")
    return config.model_copy(update={"model": config.cliper.model_copy(update={"fgc": None})})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> "cliper.OpenedRun":
    given = scenes(20, hard_ids=[f"{i}.jpg" for i in range(20)])
    found: Run = scripted_run(tmp_path_factory.mktemp("opened"), given, shard={"images": 8})
    return cliper.open_run(found.uri)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """No lines in the test's output."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SCENE.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pixels() -> np.ndarray:
    return np.asarray(Image.open(SCENE).convert("RGB"))


def tensor() -> torch.Tensor:
    return torch.from_numpy(pixels().copy()).permute(2, 0, 1)


IMAGES: dict[str, Callable[[], Any]] = {
    "a path": lambda: str(SCENE),
    "a Path": lambda: SCENE,
    "a PIL image": lambda: Image.open(SCENE),
    "a gray PIL image": lambda: Image.open(SCENE).convert("L"),
    "an array": pixels,
    "a gray array": lambda: pixels()[..., 0],
    "an array with alpha": lambda: np.dstack([pixels(), np.full(pixels().shape[:2], 255, np.uint8)]),
    "an array of floats": lambda: pixels() / 255,
    "a tensor": tensor,
    "a tensor of floats": lambda: tensor() / 255,
    "the bytes of a file": SCENE.read_bytes,
}


@pytest.mark.parametrize("what", IMAGES)
def test_an_image_is_anything_that_holds_pixels(what: str, model: "cliper.CLIPer") -> None:
    result = model(IMAGES[what](), image_ids="scene-1.jpg")
    assert result.labels.shape == pixels().shape[:2]
    assert result.labels.dtype == np.uint8
    if "gray" not in what:
        assert np.array_equal(result.labels, model(SCENE).labels), "the same pixels give the same mask"


def test_addresses_and_buckets(model: "cliper.CLIPer", web: str, s3: S3Server) -> None:
    wanted = model(SCENE).labels
    assert np.array_equal(model(f"{web}/{SCENE.name}").labels, wanted)
    bucket = s3.bucket("python")
    shutil.copy(SCENE, s3.folder / "python" / SCENE.name)
    remote = cliper.CLIPer(coarse(), CLASSES, storage_options=s3.options)
    assert np.array_equal(remote(f"{bucket}/{SCENE.name}").labels, wanted)
    with pytest.raises(cliper.CliperError, match=re.escape(f"there is no image {web}/none.jpg")):
        model(f"{web}/none.jpg")


def test_a_list_and_ids(model: "cliper.CLIPer") -> None:
    found = model([SCENE, Image.open(SCENE), *[tensor()] * 2])
    assert [one.image_id for one in found] == ["scene-1.jpg", "image", "image", "image"]
    assert np.array_equal(found[1].labels, found[2].labels), "neither place nor batch matters"
    assert [one.image_id for one in model([SCENE, SCENE], image_ids=["a", "b"])] == ["a", "b"]
    assert model([]) == []
    assert [one.image_id for one in model.stream(path for path in [SCENE, SCENE])] == ["scene-1.jpg"] * 2
    assert model.segment([pixels()], ["scene-1.jpg"])[0].labels.shape == pixels().shape[:2]


def test_the_result(model: "cliper.CLIPer", tmp_path: Path) -> None:
    result = model(SCENE)
    height, width = result.labels.shape
    assert result.names == ("grass", "water", "kite") == model.classes
    assert set(result.classes) == {result.names[k - 1] for k in np.unique(result.labels) if k}
    assert sum(one.pixels for one in result.found) == result.labels.size
    assert (result.mask(result.classes[0]) == (result.labels == result.found[0].label)).all()
    assert result.overlay().size == (width, height)
    assert len(np.unique(np.asarray(result.overlay(1)).reshape(-1, 3), axis=0)) == len(result.found)
    result.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), result.labels)
    assert result.to_torch().dtype == torch.int64
    assert np.array_equal(np.asarray(result), result.labels)
    assert Image.open(io.BytesIO(result._repr_png_())).size == (width, height)
    assert f"Prediction('scene-1.jpg', {width} x {height}: " in repr(result)


def test_coco_annotations_are_read_by_pycocotools(model: "cliper.CLIPer") -> None:
    from pycocotools import mask as coco

    result = model(SCENE)
    labels = np.zeros_like(result.labels)
    for annotation in result.to_coco(image_id=7):
        assert annotation["image_id"] == 7
        assert 0 <= annotation["score"] <= 1
        labels[coco.decode(annotation["segmentation"]).astype(bool)] = annotation["category_id"]
    assert np.array_equal(labels, result.labels)


def test_masks_are_in_the_files_grid_and_pictures_upright(model: "cliper.CLIPer", tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels()[:160]).save(tmp_path / "turned.png", exif=exif)
    result = model(tmp_path / "turned.png")
    assert result.labels.shape == result.image.shape[:2] == (160, pixels().shape[1])
    assert np.array_equal(result.image, pixels()[:160])
    assert result.overlay().size == (160, pixels().shape[1])
    seen = np.ascontiguousarray(upright(pixels()[:160], 6))
    assert np.array_equal(upright(result.labels, 6), model(seen, image_ids="turned.png").labels)


def load(*args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda model: cliper.CLIPer.load(*args, **options)


def call(*args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda model: model(*args, **options)


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "did you mean tiny[?] shipped: ": load("tinny", CLASSES),
    "config is a name .* not 3": load(3, CLASSES),
    "'cat' is neither a file nor a shipped class list.*for names give a list, e.g. .'cat'.": load("tiny", "cat"),
    "classes is empty": load("tiny", []),
    "classes are names .text., not int: 1": load("tiny", [1]),
    "'a' is listed twice": load("tiny", ["a", "a"]),
    "device 'cuda': torch finds 0 CUDA devices here; use 'auto' or 'cpu'": load("tiny", CLASSES, device="cuda"),
    "device is auto, cpu, cuda or cuda:N, not 'gpu'": load("tiny", CLASSES, device="gpu"),
    "there is no image none.jpg": call("none.jpg"),
    "examples is a folder; give a list of its images": call(str(SCENE.parent)),
    "image is not an image that can be read: not_an_image": call(b"text"),
    "an image is a path .* not int": call(3),
    "an image is a path .* not NoneType": call([None]),
    "is a batch; give a list of images": call(np.zeros((2, 3, 9, 9), np.uint8)),
    "pixels are uint8, or floats from 0 to 1; these are float64 from 7 to 7": call(np.full((9, 9, 3), 7.0)),
    "an image has 1, 3 or 4 channels.* not 9": call(torch.zeros(9, 3, 9)),
    "1 image_ids for 2 images": call([SCENE, SCENE], image_ids=["a"]),
    "there is no class 'dog'; the classes are: grass, water, kite": lambda model: model(SCENE).mask("dog"),
    "opacity is a number from 0 .* not 60": lambda model: model(SCENE).overlay(60),
    "labels are saved as .png, not 'x.jpg'": lambda model: model(SCENE).save("x.jpg"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_clear_error(message: str, model: "cliper.CLIPer", monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(cliper.CliperError, match=message) as caught:
        MISTAKES[message](model)
    assert "\n" not in str(caught.value)


def test_classes_in_every_form_and_the_limit_of_the_embedded_model(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("grass\nwater = a lake\n")
    for classes in (["grass", "water = a lake"], {"grass": "grass", "water": "a lake"}, tmp_path / "mine.txt"):
        loaded = cliper.CLIPer(coarse(), classes)
        assert loaded.class_list == cliper.ClassList(("grass", "water"), ("grass", "a lake"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cliper.CLIPer(coarse()).classes) == 19
    with pytest.warns(UserWarning, match="knows 19 drawn classes; your photographs need CLIPer.load"):
        cliper.CLIPer(coarse(), ["cat"])


def test_a_run_gives_what_the_model_gives(run: "cliper.OpenedRun", tmp_path: Path) -> None:
    ids = run.table(["image_id"])["image_id"].to_pylist()
    assert len(run) == len(ids) == 20
    for image_id in (ids[2], ids[9], ids[19]):
        result = run.prediction(image_id)
        assert np.array_equal(result.labels, run.mask(image_id))
        assert result.image.shape[:2] == result.labels.shape
        assert {one.label for one in result.found} == set(np.unique(result.labels).tolist())
    assert [row["image_id"] for row in run.rows(where=f"image_id = '{ids[3]}'")] == [ids[3]]
    assert len(list(run.dataset(where="width > 60", shuffle=False))) == run.table(where="width > 60").num_rows
    done = run.export("voc", tmp_path / "voc", where="width > 60")
    assert done.images == run.table(where="width > 60").num_rows
    with pytest.raises(cliper.CliperError, match="has no mask of 'nothing'"):
        run.prediction("nothing")
    with pytest.raises(cliper.CliperError, match="no column 'widht'; did you mean width"):
        run.table(["widht"])


@pytest.mark.parametrize("name", ["predict.prediction", "predict.model", "results"])
def test_examples_of_the_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(import_module(f"cliper.pipeline.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 3
    assert found.failed == 0
