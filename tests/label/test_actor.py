"""The actor, without Ray: out-of-memory errors, lost devices, and the bound on work ahead."""

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.decode import Truncated
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.label import actor as segment
from cliper.pipeline.label import fallback as memory
from cliper.pipeline.label.fallback import CarefulSegmenter, out_of_memory
from cliper.pipeline.label.segmenters import CLIPerSegmenter
from cliper.pipeline.label.window import Window
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import CLASSES, Brightness, jpeg, write_corpus
from tests.support.labeled import label_small, rows_of

Images, Ids = Sequence[np.ndarray], Sequence[str]


class Small(Brightness):
    """A device with room for `fits` images of `side` pixels at most."""

    fits, side = 2, 10_000

    def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
        if len(images) > self.fits or any(max(image.shape) > self.side for image in images):
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return super().segment(images, image_ids)


class SmallWithSpare(Small):
    """The same, with a spare whose masks have confidence 0.5."""

    side, spares = 100, 0

    def spare(self) -> Brightness:
        type(self).spares += 1
        return Marked(JobConfig(), CLASSES)


class Marked(Brightness):
    def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
        if any(max(image.shape) > 300 for image in images):
            raise MemoryError("no room on the host either")
        return [Segmentation(**vars(s) | {"confidence": 0.5}) for s in super().segment(images, image_ids)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", 12, broken_each=1)
    return tmp_path / "corpus"


def test_a_batch_that_does_not_fit_is_split(corpus: Path, tmp_path: Path) -> None:
    expected = rows_of(label_small(corpus, tmp_path / "large"))
    assert rows_of(label_small(corpus, tmp_path / "small", factory=Small)) == expected


def test_an_image_that_does_not_fit_goes_to_the_spare_or_becomes_a_row(corpus: Path, tmp_path: Path) -> None:
    (corpus / "wide.jpg").write_bytes(jpeg(1, (200, 40)))
    (corpus / "zide.jpg").write_bytes(jpeg(2, (220, 40)))
    (corpus / "huge.jpg").write_bytes(jpeg(3, (400, 40)))
    SmallWithSpare.spares = 0
    rows = {row["image_id"]: row for row in rows_of(label_small(corpus, tmp_path / "run", factory=SmallWithSpare))}
    assert SmallWithSpare.spares == 1, "loaded once, for two shards"
    assert [name for name, row in rows.items() if row["confidence"] == 0.5] == ["wide.jpg", "zide.jpg"]
    huge = rows["huge.jpg"]
    assert (huge["status"], huge["error_type"], huge["stage"]) == ("failed", "out_of_memory", "segment")
    assert "no room on the host either" in huge["error_message"]
    assert (huge["width"], huge["height"]) == (400, 40)
    assert sum(row["status"] == "ok" for row in rows.values()) == 9


def test_without_a_spare_the_row_says_out_of_memory(corpus: Path, tmp_path: Path) -> None:
    (corpus / "huge.jpg").write_bytes(jpeg(3, (400, 40)))

    class Tight(Small):
        side = 100

    rows = {row["image_id"]: row for row in rows_of(label_small(corpus, tmp_path / "run", factory=Tight))}
    assert (rows["huge.jpg"]["error_type"], rows["huge.jpg"]["mask"]) == ("out_of_memory", None)
    assert "CUDA out of memory" in rows["huge.jpg"]["error_message"]


def test_a_spare_that_cannot_be_loaded_costs_only_the_image(capfd: pytest.CaptureFixture[str]) -> None:
    class Hopeless(Small):
        side = 1

        def spare(self) -> Brightness:
            raise OSError("weights are gone")

    careful = CarefulSegmenter(Hopeless(JobConfig(), CLASSES))
    for _ in range(2):
        [result] = careful.segment([np.zeros((4, 4, 3), np.uint8)], ["a"])
        assert isinstance(result, RuntimeError)
        assert out_of_memory(result)
    assert capfd.readouterr().err.count("weights are gone") == 1


def test_out_of_memory_errors_are_recognized() -> None:
    import torch

    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
    assert all(out_of_memory(error) for error in (cuda, host, MemoryError()))
    assert not any(out_of_memory(error) for error in (RuntimeError("shape"), OSError("out of memory of disks")))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)


def test_uris_that_cannot_be_opened_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "folder.jpg").mkdir()
    uris = [
        f"{tmp_path}/a.jpg",
        "foo://x/y.jpg",
        f"{tmp_path}/folder.jpg",
        "nul\0.jpg",
        f"file://{tmp_path}/a.jpg",
    ]
    entries = [Entry(str(i), uri) for i, uri in enumerate(uris)]
    loaded = load_entries(Storage(), 0, entries, "image").to_pylist()
    assert [row["error_type"] for row in loaded] == [None, "unreadable", "unreadable", "unreadable", None]
    assert "foo:// is not read" in loaded[1]["error_message"]


@settings(max_examples=50, deadline=None)
@given(bad=st.sets(st.integers(0, 30)), count=st.integers(1, 31))
def test_every_image_gets_its_own_outcome(bad: set[int], count: int) -> None:
    class Picky(Brightness):
        def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
            wrong = [name for name in image_ids if int(name) in bad]
            if wrong:
                raise ValueError(" ".join(wrong))
            return super().segment(images, image_ids)

    images = [np.full((1, 1, 3), 8 * i, np.uint8) for i in range(count)]
    results = CarefulSegmenter(Picky(JobConfig(), CLASSES)).segment(images, [str(i) for i in range(count)])
    for i, result in enumerate(results):
        if i in bad:
            assert isinstance(result, ValueError)
            assert str(result) == str(i)
            assert result.__traceback__ is None
        else:
            assert isinstance(result, Segmentation)
            assert result.labels == images[i][..., 0] >> 6


def test_a_process_whose_gpu_is_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a GPU fault every call fails; the images of the next shards must not become failed rows one by one."""
    import torch

    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    monkeypatch.setattr(memory.os, "_exit", leave)
    small = Small(JobConfig(), CLASSES)
    with pytest.raises(Left, match=str(memory.DEVICE_LOST)):
        CarefulSegmenter(small).segment([np.zeros((1, 1, 3), np.uint8)] * 3, ["a", "b", "c"])


def test_clipers_spare_is_for_gpus_alone(tiny_clip: Path) -> None:
    model = {"backbone": {"model": f"local-dir:{tiny_clip}"}, "fusion": {"short_side": 64}, "fgc": None}
    segmenter = CLIPerSegmenter(JobConfig.model_validate({"model": model}), CLASSES)
    if segmenter.model.device.type == "cpu":
        assert segmenter.spare() is None


@pytest.mark.gpu
def test_clipers_spare_agrees_with_the_gpu(tiny_clip: Path, photos: list[np.ndarray]) -> None:
    model = {"backbone": {"model": f"local-dir:{tiny_clip}"}, "fusion": {"short_side": 64}, "fgc": None}
    segmenter = CLIPerSegmenter(JobConfig.model_validate({"model": model}), CLASSES)
    spare = segmenter.spare()
    assert spare is not None
    for one, other in zip(segmenter.segment(photos, "abc"), spare.segment(photos, "abc"), strict=True):
        assert (one.labels == other.labels).mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(prices=st.lists(st.integers(0, 12), max_size=30), ahead=st.integers(1, 6), threads=st.integers(1, 3))
def test_work_ahead_is_in_order_and_within_its_budget(prices: list[int], ahead: int, threads: int) -> None:
    budget, lock, held, most = 20, threading.Lock(), [0], [0]

    def work(price: int) -> int:
        with lock:
            held[0] += price
            most[0] = max(most[0], held[0])
        return price

    done = []
    with ThreadPoolExecutor(threads) as pool:
        for price in map_ahead(pool, work, prices, ahead, lambda price: price, budget):
            done.append(price)
            with lock:
                held[0] -= price
    assert done == prices
    assert most[0] <= budget + max(prices, default=0), "the consumed one and the waiting ones"


def test_large_images_are_not_decoded_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images, each as large as a window: at any time only a few are decoded."""
    buffer = io.BytesIO()
    Image.new("L", (1000, 1000)).save(buffer, format="PNG")
    (tmp_path / "corpus").mkdir()
    for i in range(10):
        (tmp_path / "corpus" / f"{i}.png").write_bytes(buffer.getvalue())
    alive, most = [0], [0]

    class Counted(segment.Decoded):
        def __post_init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    def counted(data: bytes, max_pixels: int, truncated: Truncated) -> Any:
        return Counted(**vars(decode(data, max_pixels, truncated)))

    decode = segment.decode
    monkeypatch.setattr(segment, "decode", counted)
    monkeypatch.setattr(segment, "WINDOW_PIXELS", 1_000_000)
    label_small(tmp_path / "corpus", tmp_path / "run", shard={"images": 10})
    assert alive[0] <= 1  # the loop variable of the last window
    assert most[0] <= 5, "one waiting, one or two at work, one or two being encoded"


def windows(sizes: list[int], most: int) -> Iterator[list[int]]:
    items = [segment.Item({"i": i}, segment.Decoded(np.zeros(0), size, 1, 1)) for i, size in enumerate(sizes)]
    for window in segment.cut_windows(items, lambda: most):
        yield [item.row["i"] for item in window]


def test_windows_close_at_a_count_or_at_pixels() -> None:
    assert list(windows([1] * 5, 2)) == [[0, 1], [2, 3], [4]]
    assert list(windows([1, segment.WINDOW_PIXELS, 1], 8)) == [[0, 1], [2]]


class Stopped(Brightness):
    """Counts its images, and stops the command, as Ctrl-C does, at image number `at`."""

    at, seen = 0, 0

    def segment(self, images: Images, image_ids: Ids) -> list[Segmentation]:
        type(self).seen += len(images)
        if self.seen > self.at:
            raise KeyboardInterrupt
        return super().segment(images, image_ids)


def test_finished_images_of_a_stopped_shard_are_taken_over(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of 12, of which 5 are broken, stopped at its 6th image; the second attempt goes on from there."""
    whole = {"shard": {"images": 12}, "batch_size": 1}
    expected = rows_of(label_small(corpus, tmp_path / "whole", **whole))
    monkeypatch.setattr("cliper.pipeline.run.attempts.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("cliper.pipeline.run.attempts.KEEP_SHARE", 1e9)
    monkeypatch.setattr(Stopped, "at", 5)
    monkeypatch.setattr(Stopped, "seen", 0)
    with pytest.raises(KeyboardInterrupt):
        label_small(corpus, tmp_path / "run", factory=Stopped, **whole)
    assert not list((tmp_path / "run").glob("labels/*"))
    monkeypatch.setattr(Stopped, "at", 100)
    monkeypatch.setattr(Stopped, "seen", 0)
    assert rows_of(label_small(corpus, tmp_path / "run", factory=Stopped, **whole)) == expected
    assert 1 <= Stopped.seen <= 6, "of seven images with a mask"
    assert not list((tmp_path / "run" / "attempts").iterdir())


@pytest.mark.parametrize(
    ("image", "batch", "settled"),
    [
        (15.0, 0.0, 1),  # a slow CPU: batches gain nothing
        (0.5, 0.0, 8),  # a window of 16 takes 8 s: too long
        (0.02, 0.0, 32),  # fast: the limit
        (0.0, 6.0, 8),  # a batch of 8 takes 6 s, however full it is: a full one
    ],
)
def test_windows_grow_while_batches_gain_or_are_quick(image: float, batch: float, settled: int) -> None:
    window = Window(32, image_seconds=600)
    sizes = []
    for _ in range(12):
        sizes.append(window.limit())
        window.took(sizes[-1], sizes[-1] * image + batch * -(-sizes[-1] // 8))
    assert sizes[0] == 1
    assert sizes[-3:] == [settled] * 3


def test_a_window_takes_a_third_of_the_time_after_which_an_image_hangs() -> None:
    window = Window(32, image_seconds=30)
    window.took(1, 20.0)  # the first one warms up
    window.took(2, 4.0)
    for _ in range(6):
        window.took(window.limit(), 0.1)
    assert window.limit() == 5
