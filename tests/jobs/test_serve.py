"""`cliper serve`: a preview equals the mask of a run with its settings, and the page works in a real browser."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cliper.jobs.serve import check_address, find_examples, serve
from cliper.model import ClassList, CLIPer, CLIPerConfig, CliperError, ConfigError
from cliper.model.errors import ClassListError
from cliper.model.resident import Resident
from cliper.pipeline.config import CONFIGS, JobConfig, load_classes, load_config
from cliper.pipeline.errors import ImageError
from cliper.pipeline.report.preview import (
    Choice,
    Previewer,
    chosen_settings,
    class_file,
    config_file,
    parse_classes,
    parse_words,
    render_preview,
)
from cliper.pipeline.run.masks import decode_png, unpack_mask
from tests.support.browser import PHONE, Watched, browser_page, needs_chromium, violations
from tests.support.direct import label_directly

CLIPER = str(Path(sys.executable).parent / "cliper")
SCENES = CONFIGS / "examples"
THINGS = ClassList.parse(["donut", "floor = wooden floor | cobblestones", "starfish"])
GROUNDS = ClassList.parse(["water", "brick wall"])


@pytest.fixture(scope="module")
def config() -> JobConfig:
    """The embedded model at half its size: a tenth of the time."""
    content = load_config("tiny").model_dump()
    content["model"]["fusion"]["short_side"], content["model"]["fgc"]["resolution"] = 96, 128
    return JobConfig.model_validate(content)


@pytest.fixture(scope="module")
def previewer(config: JobConfig) -> Previewer:
    return Previewer(config)


def forbid_loading(patch: pytest.MonkeyPatch) -> None:
    """Make every load of weights fail from here on."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded again")

    for module in ("cliper.model.resident", "cliper.model.segmenter"):
        patch.setattr(f"{module}.load_backbone", refuse)
        patch.setattr(f"{module}.DiffusionAttention", refuse)


def choice(classes: ClassList, fgc: bool = True, words: tuple[str, ...] = ("grass", "sand")) -> Choice:
    return Choice(classes, words, presence_threshold=0.05, background_threshold=0.2, fgc=fgc)


@pytest.mark.parametrize(("protocol", "fgc"), [("cliper", True), ("mmseg", False)])
def test_a_resident_model_labels_like_one_loaded_for_the_classes(
    config: JobConfig, protocol: str, fgc: bool
) -> None:
    content = config.model.model_dump()
    content["labels"]["protocol"], content["prompts"]["background_words"] = protocol, ["sand"]
    settings = CLIPerConfig.model_validate(content)
    scene = np.array(Image.open(SCENES / "scene-2.jpg"))
    resident = Resident(settings, "cpu")
    for classes in (THINGS, GROUNDS):
        wanted = settings if fgc else settings.model_copy(update={"fgc": None})
        [found] = resident.segmenter(wanted, classes).segment([scene], ["a"])
        [loaded] = CLIPer.load(wanted, classes, "cpu").segment([scene], ["a"])
        assert np.array_equal(found.labels, loaded.labels)
        assert np.array_equal(found.presence, loaded.presence)


def test_a_resident_model_refuses_other_networks(previewer: Previewer) -> None:
    model = previewer.config.model
    assert model.fgc is not None
    other_fgc = model.model_copy(update={"fgc": model.fgc.model_copy(update={"seed": 1})})
    with pytest.raises(ConfigError, match="FGC with settings other than the loaded ones"):
        previewer.resident.segmenter(other_fgc, THINGS)
    with pytest.raises(ConfigError, match="another backbone or dtype"):
        previewer.resident.segmenter(model.model_copy(update={"dtype": "bfloat16"}), THINGS)


def turned_scene() -> bytes:
    """A scene whose EXIF orientation is a quarter turn: 256 wide and 160 high in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    with Image.open(SCENES / "scene-2.jpg") as image:
        image.crop((0, 40, 256, 200)).save(buffer, format="JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(("classes", "fgc"), [(THINGS, True), (GROUNDS, True), (THINGS, False)])
def test_the_downloaded_settings_give_the_same_mask(
    previewer: Previewer, tmp_path: Path, classes: ClassList, fgc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        preview = previewer.label(turned_scene(), "turned.jpg", choice(classes, fgc))
    assert preview.image.orientation == 6
    assert preview.labels.shape == (160, 256), "the file's own grid"
    assert len(np.unique(preview.labels)) > 1
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "turned.jpg").write_bytes(turned_scene())
    (tmp_path / "config.yaml").write_text(config_file(preview.settings))
    (tmp_path / "classes.txt").write_text(class_file(classes))
    settings, names = load_config(str(tmp_path / "config.yaml")), load_classes(str(tmp_path / "classes.txt"))
    assert names == classes
    run = label_directly(str(tmp_path / "corpus"), str(tmp_path / "run"), settings, names)
    [row] = pq.read_table(f"{run.uri}/labels/shard-000000.parquet").to_pylist()
    assert np.array_equal(unpack_mask(row), preview.labels)


def test_thresholds_change_the_mask(previewer: Previewer) -> None:
    data = (SCENES / "scene-2.jpg").read_bytes()
    absent, there = ClassList.parse(["kite", "umbrella"]), ("wooden floor", "water", "donut", "brick wall")
    guessed = previewer.label(data, "a", Choice(absent, there, 0.0, 0.02, fgc=False))
    assert guessed.labels.any()
    assert guessed.found.presence.max() < 1
    gated = previewer.label(data, "a", Choice(absent, there, 1.0, 0.02, fgc=False))
    assert not gated.labels.any(), "no class is present enough"
    open_to_all = previewer.label(data, "a", Choice(THINGS, (), 0.0, 0.02, fgc=False))
    strict = previewer.label(data, "a", Choice(THINGS, (), 0.0, 0.9, fgc=False))
    assert strict.found.pixels[0] > open_to_all.found.pixels[0], "more background"
    plane = previewer.label(data, "a", Choice(THINGS, (), 1.0, 0.0, fgc=False))
    assert plane.gates and strict.gates
    shut = previewer.label(data, "a", Choice(absent, there, 1.0, 0.0, fgc=False))
    assert not shut.labels.any(), "the gate holds with the background plane too"
    assert plane.heat.shape[0] == len(THINGS)
    assert 0 <= plane.heat.min() <= plane.heat.max() <= 1


def test_thresholds_act_on_kept_scores_while_the_model_works(previewer: Previewer) -> None:
    data, loose = (SCENES / "scene-3.jpg").read_bytes(), Choice(THINGS, (), 0.0, 0.02, fgc=False)
    assert previewer.relabel(data, "kept", loose) is None, "nothing is computed"
    first = previewer.label(data, "kept", loose)
    strict = replace(loose, background_threshold=0.9)
    with previewer._networks:  # another user's image is computed
        found = previewer.relabel(data, "kept", strict)
    assert found is not None
    assert found.found.pixels[0] > first.found.pixels[0], "more background"
    fresh = Previewer(previewer.config).label(data, "kept", strict)
    assert np.array_equal(found.labels, fresh.labels)
    assert found.settings == fresh.settings
    for other in (
        replace(loose, background_words=("sand",)),
        replace(loose, classes=GROUNDS),
        replace(loose, fgc=True),
    ):
        assert previewer.relabel(data, "kept", other) is None
    assert previewer.relabel(data, "another name", loose) is None


def test_kept_scores_have_a_bound(previewer: Previewer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previewer._kept, "most", 1)
    data, some = (SCENES / "scene-3.jpg").read_bytes(), Choice(THINGS, (), 0.0, 0.02, fgc=False)
    for name in ("one", "two"):
        previewer.label(data, name, some)
    assert previewer.relabel(data, "one", some) is None
    assert previewer.relabel(data, "two", some) is not None


def test_the_result_is_escaped_and_complete(previewer: Previewer) -> None:
    hostile = ClassList.parse(["<script>alert(1)</script>", "a & b"])
    name = "<img src=x onerror=alert(1)>.jpg"
    page = render_preview(previewer.label((SCENES / "scene-1.jpg").read_bytes(), name, choice(hostile)))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count('alt="scores of') == 2
    assert set(re.findall(r'download="(.*?)"', page)) == {"config.yaml", "classes.txt", "mask.png"}


def test_words_are_split_at_semicolons() -> None:
    assert parse_words(" wall ;; grass\n sky; ") == ("wall", "grass", "sky")
    assert parse_classes("cat; cup = a cup | mug;") == ClassList.parse(["cat", "cup = a cup | mug"])
    for text, message in (
        ("", "is empty"),
        ("cat; cat", "listed twice"),
        ("cat; = x", "expected 'name'"),
        ("#cat", "'#'"),
    ):
        with pytest.raises(ClassListError, match=message):
            parse_classes(text)


def test_impossible_choices_are_refused(previewer: Previewer) -> None:
    with pytest.raises(ConfigError, match=r"model.labels.presence_threshold: .* \(got 1.5\)"):
        chosen_settings(previewer.config, Choice(THINGS, (), 1.5, 0.1, fgc=True))
    with pytest.raises(ConfigError, match="has no FGC"):
        chosen_settings(load_config("vit-b-16-clip-only"), choice(THINGS))
    with pytest.raises(ImageError, match="not one of JPEG"):
        previewer.label(b"<html>", "a", choice(THINGS))
    with pytest.raises(ConfigError, match="unknown segmenter 'mine'"):
        Previewer(JobConfig(segmenter="mine"))


def test_mistakes_are_reported_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(ConfigError, match="is not a folder"):
        find_examples(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no images in"):
        find_examples(tmp_path)
    assert [path.name for path in find_examples(None)] == ["scene-1.jpg", "scene-2.jpg", "scene-3.jpg"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1, port {port}: .*; choose another"):
            serve("tiny", "tiny", None, "127.0.0.1", port)
    check_address("127.0.0.1", port)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "cliper.jobs.serve_page", raising=False)
    with pytest.raises(CliperError, match=r"pip install 'cliper\[serve\]'"):
        serve("tiny", "tiny", None, "127.0.0.1", port)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real command with the embedded model; it must end cleanly on Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "stderr.txt"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio"))}
    command = [CLIPER, "serve", "--port", str(port)]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout is not None
    try:
        loading, note, line = (process.stdout.readline() for _ in range(3))  # empty if the process ends
        assert loading == "loading   embedded:tiny\n", log.read_text()
        assert "knows 19 drawn classes" in note, log.read_text()
        assert line == f"serving   http://127.0.0.1:{port} (Ctrl-C stops)\n", log.read_text()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def press(watched: Watched, wait_for: str) -> None:
    watched.page.get_by_role("button", name="Label", exact=True).click()
    watched.page.locator(wait_for).wait_for()


def upload(watched: Watched, path: Path) -> None:
    watched.page.locator("input[type=file]").first.set_input_files(path)
    watched.page.get_by_role("button", name="Remove Image").or_(
        watched.page.locator(".image-frame")
    ).first.wait_for()


def download(watched: Watched, name: str) -> bytes:
    with watched.page.expect_download() as started:
        watched.page.get_by_role("link", name=name).click()
    return Path(started.value.path()).read_bytes()


# Harmless console messages of Gradio's own script.
GRADIO_SAYS = ("warning: Method not implemented.",)  # of an upload's progress


def refuse_strangers(watched: Watched, address: str) -> None:
    assert [text for text in watched.errors if not text.startswith(GRADIO_SAYS)] == []
    assert watched.outside(address) == [], "nothing may be loaded from elsewhere"


@needs_chromium
def test_from_upload_to_a_run_with_the_same_mask(address: str, tmp_path: Path) -> None:
    """Type classes, download the settings, and give the files to a labeling job (on its stages, without Ray)."""
    photo = tmp_path / "corpus" / "my scene.jpg"
    photo.parent.mkdir()
    with Image.open(SCENES / "scene-2.jpg") as image:
        image.crop((40, 0, 256, 200)).save(photo, quality=95)
    with browser_page() as watched:
        watched.page.goto(address)
        upload(watched, photo)
        watched.page.get_by_role("textbox", name=re.compile("^Classes")).fill(
            "donut; floor = wooden floor; water; starfish"
        )
        watched.page.get_by_role("textbox", name=re.compile("^Background words")).fill("brick wall")
        press(watched, ".preview")
        assert violations(watched.page) == []
        table = watched.page.locator(".preview table").inner_text()
        assert {row.split()[0] for row in table.splitlines()[1:] if row.strip()} >= {"donut", "floor"}
        slider = watched.page.locator(".preview input[type=range]")
        slider.focus()
        watched.page.keyboard.press("End")
        opacity = "getComputedStyle(document.querySelector('.preview .mask')).opacity"
        assert watched.page.evaluate(opacity) == "1"
        files = {name: download(watched, name) for name in ("config.yaml", "classes.txt", "mask.png")}
        image_id = watched.page.locator(".preview .photo").get_attribute("alt")
        refuse_strangers(watched, address)
    assert image_id == photo.name, "its noise is that of a run"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    settings, names = load_config(str(tmp_path / "config.yaml")), load_classes(str(tmp_path / "classes.txt"))
    run = label_directly(str(photo.parent), str(tmp_path / "run"), settings, names)
    [row] = pq.read_table(f"{run.uri}/labels/shard-000000.parquet").to_pylist()
    mask = unpack_mask(row)
    assert np.array_equal(mask, decode_png(files["mask.png"]))
    assert len(np.unique(mask)) > 2


@needs_chromium
def test_examples_and_messages_on_a_phone_in_the_dark(address: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"<html>not found</html>")
    with browser_page(PHONE, dark=True) as watched:
        watched.page.goto(address)
        message = watched.page.locator("[role=alert]")
        press(watched, "[role=alert]")
        assert message.inner_text() == "Choose an image first."
        watched.page.get_by_role("button", name="scene-1.jpg").click()
        watched.page.locator(".image-frame img").wait_for()
        press(watched, ".preview")
        assert violations(watched.page) == []
        assert not watched.scrolls_sideways()
        rows = watched.page.locator(".preview tbody tr")
        assert not all("absent" in text for text in rows.all_inner_texts())
        watched.page.get_by_role("spinbutton", name=re.compile("Presence threshold")).fill("1")
        gone = re.compile("absent|over 1")
        for row in range(rows.count()):
            rows.nth(row).filter(has_text=gone).wait_for()  # without the button
        watched.page.get_by_role("textbox", name=re.compile("^Classes")).fill("kite; kite")
        press(watched, "[role=alert]")
        assert "'kite' is listed twice" in message.inner_text()
        assert violations(watched.page) == []
        refuse_strangers(watched, address)


@needs_chromium
def test_a_broken_upload_is_a_message(address: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"<html>not found</html>")
    with browser_page() as watched:
        watched.page.goto(address)
        upload(watched, tmp_path / "broken.jpg")
        press(watched, "[role=alert]")
        assert "not one of JPEG" in watched.page.locator("[role=alert]").inner_text()


def test_nothing_is_reported_to_gradio(address: str) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/config") as answer:
        content = answer.read().decode()
    assert '"analytics_enabled":false' in content
    assert "fonts.googleapis.com" not in content


def post(address: str, payload: Any, **headers: str) -> tuple[int, str]:
    """Press the button by the API, and wait for the answer."""
    request = urllib.request.Request(
        f"{address}/gradio_api/call/label", json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    for name, value in headers.items():
        request.add_header(name, value)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with opener.open(f"{address}/gradio_api/call/label/{event}", timeout=60) as answer:
            return 200, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


SETTINGS = ["donut", "sand", 0.05, 0.2, False]


def test_files_of_the_server_are_not_read(address: str, tmp_path: Path) -> None:
    """A path without Gradio's `meta` is not checked by Gradio."""
    (tmp_path / "secret.txt").write_text("TOP-SECRET")
    (tmp_path / "photo.jpg").write_bytes(turned_scene())
    os.mkfifo(tmp_path / "fifo.jpg")
    for name in ("secret.txt", "photo.jpg", "fifo.jpg", "nothing.jpg"):
        code, text = post(address, {"data": [{"path": str(tmp_path / name)}, *SETTINGS]})
        assert code == 200
        assert "this is not an uploaded image" in text
        assert "TOP-SECRET" not in text


def test_other_sites_and_other_hosts_are_refused(address: str) -> None:
    data = {"data": [None, *SETTINGS]}
    assert "Choose an image first" in post(address, data, Origin=address)[1]
    assert post(address, data, Origin="http://evil.example")[0] == 403
    assert post(address, data, Host="evil.example")[0] == 403


def test_a_request_that_never_ends_blocks_no_other(address: str) -> None:
    """Clients that send half a request and wait, as many as the page has workers, and another one that works."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /gradio_api/call/label HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 999\r\n\r\n{{"
    silent = [socket.create_connection((host, int(port))) for _ in range(8)]
    try:
        for client in silent:
            client.sendall(head.encode())
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: post(address, {"data": [None, *SETTINGS]}), range(4)))
        assert [code for code, _ in answers] == [200] * 4
        assert all("Choose an image first" in text for _, text in answers)
    finally:
        for client in silent:
            client.close()


def test_shipped_examples_are_small_images() -> None:
    for path in find_examples(None):
        data = path.read_bytes()
        assert len(data) < 50_000
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (256, 256)
