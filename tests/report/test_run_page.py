"""`cliper report`: its figures equal plain counting, and its page works in a real browser."""

import base64
import html
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cliper.jobs.report import report
from cliper.model.classes import ClassList
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.corpus.manifest import Manifest, Part, read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.evaluate.page import write_report
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.results import Setting, summarise
from cliper.pipeline.report.images import mask_layer, palette_index
from cliper.pipeline.report.page import duration, share
from cliper.pipeline.report.run_images import read_pictures
from cliper.pipeline.report.run_page import write_run_report
from cliper.pipeline.report.run_stats import BINS, PICKS, SAMPLED, choose_shards, collect
from cliper.pipeline.report.svg import bars, sparkline
from cliper.pipeline.report.throughput import throughput
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.storage.backend import Storage
from tests.conftest import S3Server
from tests.support import benchmark_trees as trees
from tests.support.browser import PHONE, Watched, browser_page, needs_chromium, open_file, violations
from tests.support.direct import label_directly
from tests.support.fakes import Brightness, brightness_labels, jpeg, write_corpus

STORAGE = Storage()
HOSTILE = "<img src=x onerror=alert(1)>"
CLASSES = ClassList.parse(["<script>alert(1)</script>", "a & b", "$x_1$", "never"])
CONFIG = JobConfig(shard=ShardConfig(images=8))


class Unsure(Brightness):
    """Labels by brightness; the confidence of every label is a number that depends on the image alone."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        return [self._unsure(image) for image in images]

    def _unsure(self, image: np.ndarray) -> Segmentation:
        found = Segmentation.of(brightness_labels(image), self.classes)
        confidence = ((np.arange(self.classes + 1) * 0.13 + image.mean() / 90) % 1).astype(np.float32)
        values = np.where(found.pixels > 0, confidence, np.nan).astype(np.float32)
        mean = float(confidence[1])
        return Segmentation(found.labels, found.presence, found.pixels, values, values, values, mean, mean, mean)


def turned_photo() -> bytes:
    """A photograph of 80 x 48 with a quarter turn in EXIF; in the file it brightens to the right."""
    pixels = np.repeat(np.repeat(np.array([[20, 120, 150, 240]], np.uint8), 48, 0), 20, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(buffer, format="JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    write_corpus(folder / "corpus", 40, broken_each=1)
    (folder / "corpus" / f"{HOSTILE}.jpg").write_bytes(jpeg(99))
    (folder / "corpus" / f"{HOSTILE}-broken.jpg").write_bytes(b"<script>alert(2)</script>")
    (folder / "corpus" / "turned.jpg").write_bytes(turned_photo())
    return label_directly(str(folder / "corpus"), str(folder / "run"), CONFIG, CLASSES, Unsure)


def rows_of(run: Run) -> list[dict[str, object]]:
    tables = [pq.read_table(path) for path in sorted(Path(run.uri, "labels").iterdir())]
    return pa.concat_tables(tables).to_pylist()


def entries_of(run: Run, label: int) -> list[tuple[float, int, int]]:
    """(confidence, shard, place) of every image that holds a label."""
    return [
        (entry["mean_confidence"], shard, place)
        for shard in sorted(run.done_shards())
        for place, row in enumerate(pq.read_table(f"{run.uri}/labels/shard-{shard:06d}.parquet").to_pylist())
        for entry in row["classes"] or ()
        if entry["class_id"] == label
    ]


def test_figures_are_those_of_the_rows(run: Run) -> None:
    collected = collect(run, 10**6)
    stats, rows = collected.stats, rows_of(run)
    assert (stats.rows, len(collected.read)) == (43, 6)
    assert stats.statuses == Counter(row["status"] for row in rows)
    causes = Counter((row["error_type"], row["stage"]) for row in rows if row["status"] != "ok")
    assert {cause: found.images for cause, found in stats.failures.items()} == dict(causes)
    shown = [example for found in stats.failures.values() for example in found.examples]
    assert {(row["image_id"], row["error_message"]) for row in rows if row["status"] != "ok"} == set(shown)
    for label in range(len(CLASSES) + 1):
        entries = [e for row in rows for e in row["classes"] or () if e["class_id"] == label]
        assert stats.images[label] == len(entries)
        assert stats.pixels[label] == sum(entry["pixels"] for entry in entries)
        if entries:
            values = [entry["mean_confidence"] for entry in entries]
            assert stats.mean_confidence()[label] == pytest.approx(np.mean(values), abs=1e-6)
            assert stats.class_confidence[label].tolist() == np.histogram(values, BINS, (0, 1))[0].tolist()
    images = [row["confidence"] for row in rows if row["status"] == "ok"]
    assert stats.confidence.tolist() == np.histogram(images, BINS, (0, 1))[0].tolist()


@pytest.mark.parametrize("label", [1, 2, 3])
def test_images_to_show_are_the_extremes_and_some_between(run: Run, label: int) -> None:
    picks = collect(run, 10**6).stats.picks(label)
    entries = entries_of(run, label)
    assert len(entries) > 2 * PICKS
    assert len({(pick.shard, pick.place) for pick in picks}) == len(picks), "each once"
    by_kind = {kind: {(p.shard, p.place) for p in picks if p.kind == kind} for kind in SAMPLED}
    highest = sorted(entries, key=lambda entry: (-entry[0], *entry[1:]))[:PICKS]
    lowest = sorted(entries)[:PICKS]
    assert by_kind["most confident"] == {place[1:] for place in highest}
    assert by_kind["least confident"] == {place[1:] for place in lowest}
    assert by_kind["random"] <= {entry[1:] for entry in entries}
    assert {pick.kind for pick in picks[:3]} == {kind for kind in SAMPLED if by_kind[kind]}, "first one of each"
    assert picks == collect(run, 10**6).stats.picks(label), "the same page every time"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 500), st.data())
def test_a_sample_has_the_requested_size(images: list[int], sample: int, data: st.DataObject) -> None:
    manifest = Manifest([Part("part", 0, images)])
    done = data.draw(st.lists(st.sampled_from(range(len(images))), min_size=1, unique=True))
    chosen = choose_shards(manifest, sorted(done), sample)
    read = [images[shard] for shard in chosen]
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(done)
    assert sum(read) >= min(sample, sum(images[shard] for shard in done))
    assert sum(read) - max(read) < sample, "one shard less would not be enough"


def test_a_large_run_is_sampled_with_a_note(run: Run, tmp_path: Path) -> None:
    collected = write_run_report(run, str(tmp_path / "page.html"), 10)
    assert (len(collected.read), len(collected.done)) == (2, 6)
    page = (tmp_path / "page.html").read_text()
    assert f"those of {collected.stats.rows} images, 2 of the 6 finished shards" in page
    assert "<b>43</b><span>images done" in page, "totals are those of the whole run"


def test_throughput_is_that_of_the_files_without_the_pauses(run: Run, tmp_path: Path) -> None:
    manifest = read_manifest(STORAGE, run.uri)
    assert manifest is not None
    starts = [0, 10, 20, 7220, 7230, 7240]  # two hours between the third and the fourth
    for shard, when in enumerate(starts):
        os.utime(f"{run.uri}/labels/shard-{shard:06d}.parquet", (1e9 + when, 1e9 + when))
    found = throughput(run, manifest)
    assert found is not None
    assert (found.seconds, found.pauses, found.paused_seconds) == (40.0, 1, 7200.0)
    assert found.images == 43 - 8, "the first shard starts the clock"
    assert sum(found.rates) * 40 / len(found.rates) == pytest.approx(found.images)
    write_run_report(run, str(tmp_path / "page.html"), 100)
    text = (tmp_path / "page.html").read_text()
    assert "35 images in 40 s, 0.875 images/s on average; 1 pauses, 2 h 0 min in total, are not counted" in text


def pixels_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.array(image)


def test_a_turned_photograph_and_its_mask_are_shown_upright(run: Run) -> None:
    manifest = read_manifest(STORAGE, run.uri)
    assert manifest is not None
    [(shard, place)] = [
        (shard, place)
        for shard in range(manifest.shards)
        for place, entry in enumerate(manifest.read_shard(STORAGE, run.uri, shard))
        if entry.image_id == "turned.jpg"
    ]
    shown = read_pictures(run, manifest, [(shard, place)])[shard, place]
    [row] = [row for row in rows_of(run) if row["image_id"] == "turned.jpg"]
    mask = unpack_mask(row)
    assert mask.shape == (48, 80)
    assert (shown.width, shown.height) == (48, 80)
    assert np.array_equal(pixels_of(shown.mask), upright(mask, 6))
    assert shown.photo is not None
    brightness = brightness_labels(pixels_of(shown.photo))
    assert brightness.shape == (80, 48)
    assert (brightness == upright(mask, 6)).mean() > 0.95


def test_masks_above_255_classes_keep_a_colour() -> None:
    labels = np.array([[0, 1, 255, 256, 511, 65534]], dtype=np.uint16)
    assert palette_index(labels).tolist() == [[0, 1, 255, 1, 1, 254]]
    assert np.array_equal(pixels_of(mask_layer(labels)), palette_index(labels))


def test_a_missing_source_image_leaves_its_mask_and_a_note(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 6)
    run = label_directly(str(tmp_path / "corpus"), str(tmp_path / "run"), CONFIG, CLASSES, Unsure)
    gone, other = sorted((tmp_path / "corpus").rglob("*.jpg"))[:2]
    gone.unlink()
    other.write_bytes(jpeg(3, (20, 20)))
    write_run_report(run, str(tmp_path / "page.html"), 100)
    page = (tmp_path / "page.html").read_text()
    assert "No photograph: missing: FileNotFoundError" in page
    assert "No photograph: changed: " in page
    assert page.count('class="mask"') > page.count('class="photo"') > 0


def test_an_unfinished_run_has_a_note(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    started = label_directly(str(tmp_path / "corpus"), str(tmp_path / "run"), CONFIG, CLASSES, Unsure, shards=[])
    with pytest.raises(RunError, match="has no finished shard yet"):
        write_run_report(started, str(tmp_path / "page.html"), 100)
    label_directly(str(tmp_path / "corpus"), str(tmp_path / "run"), CONFIG, CLASSES, Unsure, shards=[1])
    report(str(tmp_path / "run"), None, 100, None)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Not finished: 1 of 3 shards are done" in page
    assert "At least two shards are needed." in page


def test_mistakes_are_one_message(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        report(str(tmp_path), None, 100, None)
    write_corpus(tmp_path / "corpus", 8)
    damaged = label_directly(str(tmp_path / "corpus"), str(tmp_path / "run"), CONFIG, CLASSES, Unsure)
    (tmp_path / "run" / "labels" / "shard-000000.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(RunError, match=r"labels/shard-000000.parquet of .* is damaged"):
        write_run_report(damaged, str(tmp_path / "page.html"), 100)


def test_reports_go_from_s3_to_s3(s3: S3Server, tmp_path: Path) -> None:
    write_corpus(s3.folder / "photos", 10)
    storage = Storage(s3.options)
    output = f"{s3.bucket('runs')}/run"
    run = label_directly("s3://photos", output, CONFIG, CLASSES, Unsure, storage)
    write_run_report(read_run(output, Storage(s3.options)), f"{run.uri}/report/index.html", 100)
    page = (s3.folder / "runs" / "run" / "report" / "index.html").read_text()
    assert page.count('class="photo"') == page.count('class="mask"') > 0
    assert s3.secret not in page
    assert "images/s" in page, "the store's own times"


@given(st.lists(st.floats(0, 1e9), max_size=60))
def test_bars_stay_in_their_chart(values: list[float]) -> None:
    drawn = bars(values, "label", "a", "b", "unit")
    for top, height in re.findall(r'y="([\d.-]+)" width="[\d.]+" height="([\d.]+)"', drawn):
        assert float(top) >= 9.9
        assert float(top) + float(height) <= 158.2


def test_words_in_charts_are_escaped() -> None:
    for drawn in (bars([1], HOSTILE, HOSTILE, HOSTILE, HOSTILE), sparkline([1], HOSTILE)):
        assert "<img" not in drawn
        assert html.escape(HOSTILE) in drawn


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0%"), (1.0, "100.0%"), (0.123, "12.3%"), (0.00012, "0.012%"), (float("nan"), "-")]
)
def test_shares_are_short(value: float, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (59, "59 s"), (65, "1 min 5 s"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_run_report(run, str(path), 100)
    return path


def colour_of(watched: Watched, selector: str, name: str) -> str:
    return str(watched.page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}"))


@needs_chromium
def test_the_page_works_in_a_browser(page: Path) -> None:
    with browser_page() as watched:
        open_file(watched, page)
        assert violations(watched.page) == []
        slider = watched.page.locator("figure input[type=range]").first
        opacity = (
            "() => [...document.querySelectorAll('figure .mask')].map((mask) => +getComputedStyle(mask).opacity)"
        )
        assert set(watched.page.evaluate(opacity)) == {0.5}
        slider.focus()
        watched.page.keyboard.press("End")
        first, *others = watched.page.evaluate(opacity)
        assert (first, set(others)) == (1.0, {0.5}), "a slider moves its own image"
        watched.page.keyboard.press("Home")
        assert watched.page.evaluate(opacity)[0] == 0.0
        watched.page.locator("#all").focus()
        watched.page.keyboard.press("End")
        assert set(watched.page.evaluate(opacity)) == {1.0}, "the one above moves all"
        last = watched.page.locator("details > summary").last
        last.focus()
        watched.page.keyboard.press("Enter")
        assert watched.page.locator("pre").is_visible()
        assert watched.page.locator("script").count() == 2, "names are text"
        text = watched.page.inner_text("body")
        for name in (HOSTILE, "<script>alert(1)</script>", "a & b", "$x_1$"):
            assert name in text
        assert watched.errors == []
        assert watched.outside(page.as_uri()) == []


@needs_chromium
def test_images_are_found_sorted_enlarged_and_unmasked(page: Path) -> None:
    with browser_page() as watched:
        open_file(watched, page)
        view = watched.page
        shown = "[...document.querySelectorAll('.group figure')].filter((f) => f.checkVisibility())"
        every = view.evaluate("[...document.querySelectorAll('.group figure')].map((f) => f.dataset.name)")
        assert len(view.evaluate(shown)) == 6, "of the first group, before more are asked for"
        view.locator(".more").first.click()
        assert len(view.evaluate(shown)) > 6
        view.locator("#find").fill(every[0])
        chosen = view.evaluate(f"{shown}.map((f) => f.dataset.name)")
        assert 0 < len(chosen) < len(every)
        assert set(chosen) == {name for name in every if every[0].lower() in name.lower()}
        view.locator("#find").fill("")
        view.locator("#status").select_option("failed")
        assert set(view.evaluate(f"{shown}.map((f) => f.dataset.status)")) == {"failed"}
        assert "No mask: corrupt" in view.inner_text(".group:not([hidden])")
        view.locator("#status").select_option("")
        view.locator("#class").select_option("a & b")
        assert view.evaluate(f"[...new Set({shown}.map((f) => f.closest('.group').dataset.name))]") == ["a & b"]
        view.locator("#sort").select_option("margin -1")
        margins = view.evaluate(f"{shown}.map((f) => +f.dataset.margin)")
        assert margins == sorted(margins, reverse=True)
        view.evaluate("byId('confidence').value = 0.3; apply()")
        assert all(value <= 0.3 for value in view.evaluate(f"{shown}.map((f) => +f.dataset.confidence)"))
        view.evaluate("byId('confidence').value = 1; apply()")
        view.locator(".group:not([hidden]) .zoom").first.click()
        assert view.locator("#large").is_visible()
        before = view.locator("#large figure").inner_text()
        view.keyboard.press("ArrowRight")
        assert view.locator("#large figure").count() == 1
        assert view.locator("#large figure").inner_text() != before
        width = "document.querySelector('#large .stack').offsetWidth"
        small = view.evaluate(width)
        view.keyboard.press("+")
        assert view.evaluate(width) > small
        assert violations(view) == []
        view.keyboard.press("Escape")
        assert not view.locator("#large").is_visible()
        view.keyboard.press("h")
        assert colour_of(watched, "figure .mask", "visibility") == "hidden"
        view.keyboard.press("h")
        assert colour_of(watched, "figure .mask", "visibility") == "visible"
        view.get_by_role("button", name="mean confidence").click()
        sure = view.evaluate("[...document.querySelectorAll('td:nth-child(5)')].map((c) => +c.textContent)")
        assert sure == sorted(sure, reverse=True)
        assert watched.errors == []


@needs_chromium
def test_the_page_fits_a_phone_in_the_dark(page: Path) -> None:
    with browser_page(PHONE, dark=True) as watched:
        open_file(watched, page)
        watched.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert not watched.scrolls_sideways()
        assert violations(watched.page) == []
        assert colour_of(watched, "body", "backgroundColor") == "rgb(18, 23, 29)"
        assert colour_of(watched, "svg rect", "fill") == "rgb(122, 178, 238)"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_the_evaluation_page_is_accessible(tmp_path: Path, dark: bool) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    truths = trees.folder(root, shape=(24, 32), images=4)
    prepared = prepare("folder", root, str(tmp_path / "out"), STORAGE)
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, truths), prepared)
    evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    counts = evaluation.read()
    results = summarise(counts, evaluation.identity, Setting("cliper", "cliper"), prepared.expected)
    path = Path(write_report(evaluation, counts, results))
    with browser_page(PHONE, dark) as watched:
        open_file(watched, path)
        assert violations(watched.page) == []
        assert not watched.scrolls_sideways()
        assert watched.errors == []
        assert watched.outside(path.as_uri()) == []
