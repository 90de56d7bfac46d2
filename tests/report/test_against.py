"""`cliper report --against` and `cliper view`: two runs joined image by image, and all images page by page."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cliper.jobs.report import report
from cliper.jobs.view import make_server, view
from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.errors import RunError
from cliper.pipeline.report.against import chosen, join_runs, read_pairs
from cliper.pipeline.report.browse import PER_PAGE, Browser, Query
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.storage.backend import Storage
from tests.conftest import S3Server
from tests.report.test_run_page import CLASSES, CONFIG, HOSTILE, Unsure
from tests.support.browser import PHONE, browser_page, needs_chromium, open_file, violations
from tests.support.direct import label_directly
from tests.support.fakes import jpeg, write_corpus
from tests.support.head import free_ports

TURNED = ClassList.parse(["a & b", "<script>alert(1)</script>", "$x_1$", "never"])  # the first two change places


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs over one corpus: other shards, and the names of two classes swapped."""
    folder = tmp_path_factory.mktemp("against")
    write_corpus(folder / "corpus", 40, broken_each=1)
    (folder / "corpus" / f"{HOSTILE}.jpg").write_bytes(jpeg(99))
    first = label_directly(str(folder / "corpus"), str(folder / "a"), CONFIG, CLASSES, Unsure)
    config = JobConfig(shard=ShardConfig(images=11))
    return first, label_directly(str(folder / "corpus"), str(folder / "b"), config, TURNED, Unsure)


def masks_of(run: Run) -> dict[str, np.ndarray]:
    """The class names of every pixel, by image id."""
    names = np.array(["background", *(CLASSES if run.uri.endswith("a") else TURNED).names])
    rows = [row for path in sorted(Path(run.uri, "labels").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {row["image_id"]: names[unpack_mask(row)] for row in rows if row["status"] == "ok"}


def test_images_are_joined_by_id_and_classes_by_name(runs: tuple[Run, Run]) -> None:
    joined = join_runs(*runs, 10**6)
    first, second = map(masks_of, runs)
    assert len(joined.moved) == 41
    ids = [joined.first.index.ids[row].as_py() for row in joined.first.rows.tolist()]
    assert ids == [joined.second.index.ids[row].as_py() for row in joined.second.rows.tolist()]
    for name, moved in zip(ids, joined.moved.tolist(), strict=True):
        if name not in first:
            assert np.isnan(moved)
            continue
        areas = [np.mean(first[name] == c) - np.mean(second[name] == c) for c in ("background", *CLASSES.names)]
        assert moved == pytest.approx(0.5 * np.abs(areas).sum(), abs=1e-9)
    pairs = [(title, read_pairs(joined, rows)) for title, rows in chosen(joined)]
    assert [title for title, _ in pairs] == ["largest differences"], "all of this small run"
    for pair in pairs[0][1]:
        name = pair.first.image_id
        assert pair.second.image_id == name
        assert pair.difference == pytest.approx(np.mean(first[name] != second[name]))
    differences = [pair.difference for pair in pairs[0][1]]
    assert differences == sorted(differences, reverse=True) and differences[0] > 0


def test_runs_without_a_common_image_are_refused(runs: tuple[Run, Run], tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "other.jpg").write_bytes(jpeg(1))
    other = label_directly(str(tmp_path / "corpus"), str(tmp_path / "c"), CONFIG, CLASSES, Unsure)
    with pytest.raises(RunError, match="have no image in common"):
        report(runs[0].uri, against=other.uri)


@needs_chromium
def test_the_comparison_works_in_a_browser(runs: tuple[Run, Run]) -> None:
    report(runs[0].uri, against=runs[1].uri)
    with browser_page(PHONE, dark=True) as watched:
        open_file(watched, Path(runs[0].uri, "report", "against-b.html"))
        opened = watched.page
        assert "different class lists" in opened.inner_text("main")
        assert not watched.scrolls_sideways()
        opened.locator("#sort").select_option("difference 1")
        values = "[...document.querySelectorAll('figure')].map((f) => +f.dataset.difference)"
        assert opened.evaluate(values) == sorted(opened.evaluate(values))
        assert opened.locator("figure").first.locator(".mask").count() == 2
        slider = opened.locator("figure input[type=range]").first
        slider.focus()
        opened.keyboard.press("Home")
        masks = "[...document.querySelector('figure').querySelectorAll('.mask')]"
        opacity = f"{masks}.map((m) => +getComputedStyle(m).opacity)"
        assert opened.evaluate(opacity) == [0, 0], "one slider moves both"
        assert violations(opened) == []
        assert (watched.errors, watched.outside("file://")) == ([], [])


@pytest.fixture(scope="module")
def browser(runs: tuple[Run, Run]) -> Browser:
    return Browser(runs[0], 10**6)


def ids_of(browser: Browser, **query: str) -> list[str]:
    return [browser.index.ids[row].as_py() for row in browser.find(Query.parse(query)).tolist()]


def test_searches_find_the_rows_of_the_run(browser: Browser, runs: tuple[Run, Run]) -> None:
    files = sorted(Path(runs[0].uri, "labels").iterdir())
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert ids_of(browser) == [row["image_id"] for row in rows]
    assert ids_of(browser, status="failed") == [row["image_id"] for row in rows if row["status"] == "failed"]
    assert ids_of(browser, find="PART1") == [row["image_id"] for row in rows if "part1" in row["image_id"]]
    assert ids_of(browser, sort="name-") == sorted((row["image_id"] for row in rows), reverse=True)
    holds = {
        row["image_id"]: e["mean_confidence"] for row in rows for e in row["classes"] or () if e["class_id"] == 2
    }
    assert ids_of(browser, label="a & b", sort="confidence-") == sorted(holds, key=lambda name: -holds[name])
    low = [row["image_id"] for row in rows if row["status"] == "ok" and row["confidence"] <= 0.5]
    assert ids_of(browser, most="0.5") == low
    assert ids_of(browser, label="no such class") == []
    assert ids_of(browser, sort="nonsense", most="nan", page="-7") == ids_of(browser)
    assert set(ids_of(browser, sort="margin")[-5:]) == set(ids_of(browser, status="failed")), (
        "without a value, last"
    )


@pytest.fixture(scope="module")
def address(browser: Browser) -> Iterator[tuple[str, int]]:
    with make_server(browser, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "127.0.0.1", server.server_address[1]
        server.shutdown()
        thread.join()


def get(address: tuple[str, int], path: str, **headers: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read()


def test_only_this_machine_gets_pages_and_files(address: tuple[str, int], browser: Browser) -> None:
    assert get(address, "/")[0] == 200
    assert get(address, "/", Host="evil.example")[0] == 403
    assert get(address, "/", Origin="http://evil.example")[0] == 403
    for path in ("/../etc/passwd", "/file//etc/passwd", "/file/99999", "/file/-1", "/file/x", "/nothing"):
        assert get(address, path)[0] == 404
    place = ids_of(browser).index("part0/photo-00000.jpg")
    assert get(address, f"/file/{place}") == (200, "image/jpeg", jpeg(0))
    broken = ids_of(browser).index("broken/not_an_image-0.jpg")
    assert get(address, f"/file/{broken}")[1] == "application/octet-stream", "an HTML file is no page"


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        view(str(tmp_path), port=free_ports(1)[0])


@needs_chromium
def test_all_images_are_paged_through_in_a_browser(address: tuple[str, int]) -> None:
    with browser_page() as watched:
        opened = watched.page
        opened.goto("http://{}:{}".format(*address))
        assert opened.locator("figure").count() == PER_PAGE
        seen = opened.evaluate("[...document.querySelectorAll('figure')].map((f) => f.dataset.name)")
        opened.get_by_role("link", name="next").first.click()
        assert opened.locator("figure").count() == 41 - PER_PAGE
        seen += opened.evaluate("[...document.querySelectorAll('figure')].map((f) => f.dataset.name)")
        assert len(set(seen)) == 41
        opened.locator("select[name=label]").select_option("a & b")
        opened.wait_for_url("**label=a*")
        assert "of 41 images" in opened.inner_text("output")
        opened.locator(".zoom").first.click()
        opened.keyboard.press("ArrowRight")
        assert opened.evaluate("document.querySelector('#large .photo').naturalWidth") > 0
        assert violations(opened) == []
        assert watched.errors == []


def test_a_run_on_s3_is_shown(s3: S3Server, tmp_path: Path) -> None:
    write_corpus(s3.folder / "viewed", 3)
    storage = Storage(s3.options)
    output = f"{s3.bucket('views')}/run"
    label_directly("s3://viewed", output, CONFIG, CLASSES, Unsure, storage)
    page = Browser(read_run(output, Storage(s3.options)), 100).page(Query())
    assert page.count("data:image/webp") == page.count("data:image/png") == 3
    assert s3.secret not in page
