"""Training on a run: every row once, for any number of workers and ranks; on disk, S3, tars and Parquet."""

import io
import logging
import multiprocessing
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from cliper.model.segmentation import Segmentation
from cliper.pipeline.corpus.decode import decode, to_file_grid, upright
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.dataset import Example, MaskDataset, PadBatch, RandomCrop, Share, split
from cliper.pipeline.errors import FilterError, InputError, RunError
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.rows import RowFilter
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PHOTOS, S3Server
from tests.support.fakes import Brightness, brightness_labels, write_corpus
from tests.support.jobs import fake_job, label_here

LOCAL = Storage()


class Doubtful(Brightness):
    """Brightness whose class 2 has mean confidence 0.4 and 10th percentile 0.1."""

    def segment(self, images: Any, image_ids: Any) -> list[Segmentation]:
        found = super().segment(images, image_ids)
        return [
            replace(item, class_confidence=_low(item, 0.4), class_confidence_p10=_low(item, 0.1)) for item in found
        ]


def _low(item: Segmentation, value: float) -> np.ndarray:
    changed = item.class_confidence.copy()
    changed[2] = value if item.pixels[2] else np.nan
    return changed


def make_run(
    corpus: str, output: str, storage: Storage = LOCAL, segmenter: Any = Brightness, **settings: Any
) -> tuple[Run, Manifest]:
    """A run made by the actor's own code without Ray, so that loaders and ranks may fork."""
    job = fake_job(corpus, output, storage, segmenter, **({"shard": {"images": 5}} | settings))
    label_here(job)
    return job.run, job.manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """38 good images and 5 broken ones in 9 shards."""
    folder = tmp_path_factory.mktemp("dataset")
    write_corpus(folder / "images", 43, broken_each=1)
    return make_run(str(folder / "images"), str(folder / "run"))[0]


def ids(examples: Iterator[Example] | MaskDataset) -> list[str]:
    return [example.image_id for example in examples]


def whole_batch(examples: list[Example]) -> list[Example]:
    return examples


def test_images_and_masks_are_those_of_the_run(run: Run) -> None:
    examples = list(MaskDataset(run, shuffle=False))
    assert len(examples) == 38
    assert ids(iter(examples)) == sorted(ids(iter(examples)))
    for example in examples:
        source = Path(run.identity["input_uri"]) / example.image_id
        pixels = decode(source.read_bytes(), 10**8).pixels
        assert example.image.dtype == torch.uint8
        assert example.mask.dtype == torch.int64
        assert np.array_equal(example.image.numpy(), pixels.transpose(2, 0, 1))
        assert np.array_equal(example.mask.numpy(), brightness_labels(pixels))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (3, 0), (4, 2)])
def test_every_row_once_over_ranks_and_workers(run: Run, world: int, workers: int) -> None:
    shares = []
    for rank in range(world):
        dataset = MaskDataset(run, rank=rank, world_size=world, seed=7)
        assert dataset.rows == 38
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=whole_batch)
        shares.append([example.image_id for batch in loader for example in batch])
    assert Counter(Counter(chain(*shares)).values()) == {1: 38}
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_seed_and_epoch_alone(run: Run) -> None:
    dataset = MaskDataset(run, seed=1, shuffle_buffer=8)
    first, again = ids(dataset), ids(dataset)
    assert first == again == ids(MaskDataset(run, seed=1, shuffle_buffer=8))
    dataset.set_epoch(1)
    assert ids(dataset) != first
    assert ids(MaskDataset(run, seed=2, shuffle_buffer=8)) != first
    assert set(ids(dataset)) == set(first)


def test_workers_that_outlive_an_epoch_see_the_next(run: Run) -> None:
    dataset = MaskDataset(run)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=whole_batch
    )
    first = [example.image_id for batch in loader for example in batch]
    dataset.set_epoch(1)
    second = [example.image_id for batch in loader for example in batch]
    assert first != second
    assert set(first) == set(second)


def as_rank(rank: int, run: Run, meeting: Path, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    results.put(ids(MaskDataset(run)))
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_torch_distributed(run: Run, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=as_rank, args=(rank, run, tmp_path / "meeting", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    shares = [results.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    assert [len(share) for share in shares] == [19, 19]
    assert len({*shares[0], *shares[1]}) == 38


def test_a_filter_chooses_rows(run: Run) -> None:
    wanted = {e.image_id for e in MaskDataset(run) if (e.mask == 3).double().mean() >= 0.1}
    assert 0 < len(wanted) < 38
    bright = MaskDataset(run, RowFilter(classes=("bright",), min_area=0.1))
    assert bright.rows == len(wanted)
    assert set(ids(bright)) == wanted
    with pytest.raises(FilterError, match="the run has no class 'cat'"):
        MaskDataset(run, RowFilter(classes=("cat",)))
    with pytest.raises(FilterError, match="must be between 0 and 1, not 2"):
        MaskDataset(run, min_confidence=2)


def test_doubtful_classes_become_the_ignore_value(tmp_path: Path) -> None:
    write_corpus(tmp_path / "images", 6)
    run, _ = make_run(str(tmp_path / "images"), str(tmp_path / "run"), segmenter=Doubtful)
    plain = {example.image_id: example.mask for example in MaskDataset(run)}
    for bound, column, ignored in [(0.5, "mean", True), (0.3, "mean", False), (0.3, "p10", True)]:
        for example in MaskDataset(run, min_confidence=bound, confidence=column):
            mask = plain[example.image_id]
            assert torch.equal(example.mask, torch.where(mask == 2, 255, mask) if ignored else mask)
    assert any((mask == 2).any() for mask in plain.values())


def test_the_grid_is_the_files_or_upright(tmp_path: Path) -> None:
    run, _ = make_run(str(PHOTOS), str(tmp_path / "run"))
    turned = {e.image_id: e for e in MaskDataset(run)}["coffee.jpg"]
    seen = decode((PHOTOS / "coffee.jpg").read_bytes(), 10**8)
    assert turned.image.shape == (3, 600, 400)
    assert turned.mask.shape == (600, 400)
    assert np.array_equal(turned.image.numpy().transpose(1, 2, 0), to_file_grid(seen.pixels, 6))
    standing = {e.image_id: e for e in MaskDataset(run, upright=True)}["coffee.jpg"]
    assert np.array_equal(standing.image.numpy().transpose(1, 2, 0), seen.pixels)
    assert np.array_equal(standing.mask.numpy(), upright(turned.mask.numpy(), 6))


def test_transform_and_batches(run: Run) -> None:
    def crop(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image[:, :32, :32], mask[:32, :32]

    batch = next(iter(DataLoader(MaskDataset(run, transform=crop), batch_size=6)))
    assert batch.image.shape == (6, 3, 32, 32)
    assert batch.mask.shape == (6, 32, 32)
    assert len(batch.image_id) == 6


def test_a_missing_or_changed_image_raises_or_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("cliper.pipeline.dataset")
    monkeypatch.setattr(log, "disabled", False)  # a library of another test may have configured logging
    caplog.set_level(logging.WARNING, log.name)
    write_corpus(tmp_path / "images", 6)
    run, _ = make_run(str(tmp_path / "images"), str(tmp_path / "run"))
    (tmp_path / "images" / "part0" / "photo-00000.jpg").unlink()
    Image.new("RGB", (5, 5)).save(tmp_path / "images" / "part1" / "photo-00001.jpg")
    assert len(list(MaskDataset(run, on_error="skip"))) == 4
    assert "left out part0/photo-00000.jpg" in caplog.text
    assert re.search(r"left out part1/photo-00001.jpg: [\d,]+ bytes; [\d,]+ were listed", caplog.text)
    with pytest.raises(InputError, match=r"image 'part0/photo-00000.jpg' cannot be read"):
        list(MaskDataset(run, shuffle=False))
    loader: DataLoader[Any] = DataLoader(MaskDataset(run, shuffle=False), num_workers=1)
    with pytest.raises(InputError, match=r"image 'part0/photo-00000.jpg' cannot be read"):
        list(loader)


def test_an_unfinished_run_is_refused_unless_shards_are_named(run: Run, tmp_path: Path) -> None:
    write_corpus(tmp_path / "images", 12)
    part, _ = make_run(str(tmp_path / "images"), str(tmp_path / "run"))
    (tmp_path / "run" / "labels" / "shard-000001.parquet").unlink()
    with pytest.raises(RunError, match="is not finished: 1 of 3 shards are not labeled"):
        MaskDataset(part)
    assert MaskDataset(part, shards=[0, 2]).rows == 7
    with pytest.raises(ValueError, match="give rank and world_size, or neither"):
        MaskDataset(run, rank=1)


@pytest.mark.parametrize(("context", "workers"), [("spawn", 1), ("fork", 2)])
def test_s3_with_workers(tmp_path: Path, s3: S3Server, context: str, workers: int) -> None:
    """By fork too: the parent has read from S3, and its connections are not the workers'."""
    bucket = s3.bucket(f"train-{context}")
    write_corpus(s3.folder / f"train-{context}" / "images", 12)
    run, _ = make_run(f"{bucket}/images", f"{bucket}/run", Storage(s3.options))
    dataset = MaskDataset(run)
    first = next(iter(dataset))
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=2, num_workers=workers, collate_fn=whole_batch, multiprocessing_context=context
    )
    seen = [example.image_id for batch in loader for example in batch]
    assert len(seen) == len(set(seen)) == 12
    assert first.image_id in seen


def test_length_is_of_the_rank(run: Run) -> None:
    assert len(MaskDataset(run)) == 38
    assert [len(MaskDataset(run, rank=rank, world_size=3)) for rank in range(3)] == [12, 13, 13]
    assert len(DataLoader(MaskDataset(run), batch_size=5)) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("epoch", "batches"), [(0, 3), (1, 1), (1, 8), (2, 0)])
def test_a_stateful_loader_resumes_inside_any_epoch(run: Run, workers: int, epoch: int, batches: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> tuple[MaskDataset, Any]:
        dataset = MaskDataset(run, shuffle_buffer=6, seed=3)
        return dataset, StatefulDataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=whole_batch)

    def names(batch: list[Example]) -> list[str]:
        return [example.image_id for example in batch]

    dataset, whole = loader()
    epochs = []
    for number in range(epoch + 2):
        dataset.set_epoch(number)
        epochs.append([names(batch) for batch in whole])
    dataset, stopped = loader()
    dataset.set_epoch(epoch)
    passing = iter(stopped)
    seen = [names(next(passing)) for _ in range(batches)]
    state = stopped.state_dict()
    _, resumed = loader()
    resumed.load_state_dict(state)
    seen += [names(batch) for batch in resumed]
    assert seen == epochs[epoch]
    resumed.dataset.set_epoch(epoch + 1)
    assert [names(batch) for batch in resumed] == epochs[epoch + 1], "the next epoch is whole"


def test_a_resumed_pass_reads_only_what_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from cliper.pipeline import dataset as module

    loaded: list[str] = []

    def counted(storage: Storage, shard: int, entries: Any, column: str) -> Any:
        loaded.extend(entry.image_id for entry in entries)
        return load_entries(storage, shard, entries, column)

    load_entries = module.load_entries
    dataset = MaskDataset(run, shuffle_buffer=4)
    passing = iter(dataset)
    first = [next(passing).image_id for _ in range(30)]
    monkeypatch.setattr(module, "load_entries", counted)
    dataset.load_state_dict(dataset.state_dict())
    rest = ids(dataset)
    assert sorted(loaded) == sorted(rest)
    assert Counter(first + rest) == Counter(ids(MaskDataset(run)))
    with pytest.raises(RunError, match="the loader's state is of other rows, or of another seed"):
        MaskDataset(run, seed=1).load_state_dict(dataset.state_dict())


def test_crops_and_padded_batches(run: Run) -> None:
    ignored = MaskDataset(run).ignore_value
    cropped = MaskDataset(run, transform=RandomCrop(20, ignored))
    images, masks, names = next(iter(DataLoader(cropped, batch_size=4)))
    assert (images.shape, masks.shape, len(names)) == ((4, 3, 20, 20), (4, 20, 20), 4)
    one, other = list(MaskDataset(run, shuffle=False))[:2]
    large = Example(torch.ones(3, 60, 50, dtype=torch.uint8), torch.ones(60, 50, dtype=torch.int64), "large")
    images, masks, names = PadBatch(ignored)([one, large, other])
    height, width = (max(60, one.mask.shape[0]), max(50, one.mask.shape[1]))
    assert images.shape == (3, 3, height, width)
    assert torch.equal(masks[0, : one.mask.shape[0], : one.mask.shape[1]], one.mask)
    assert (masks[1, 60:] == ignored).all()
    image, mask = RandomCrop(90, ignored)(large.image, large.mask)
    assert (image.shape, int((mask == 1).sum()), int((mask == ignored).sum())) == ((3, 90, 90), 3000, 5100)


def test_tar_members_and_parquet_rows(tmp_path: Path) -> None:
    contents = write_corpus(tmp_path / "images", 7)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pq.write_table(
        pa.table({"image_id": list(contents), "image": list(contents.values())}), tmp_path / "set.parquet"
    )
    plain = make_run(str(tmp_path / "images"), str(tmp_path / "a"))[0]
    tar = make_run(str(tmp_path / "set.tar"), str(tmp_path / "b"))[0]
    parquet = make_run(str(tmp_path / "set.parquet"), str(tmp_path / "c"), input={"format": "parquet"})[0]
    wanted = sorted(example.image.sum().item() for example in MaskDataset(plain))
    for other in (tar, parquet):
        assert sorted(example.image.sum().item() for example in MaskDataset(other)) == wanted


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 6))
def test_a_split_covers_everything_once_and_evenly(sizes: list[int], parts: int) -> None:
    shares = [Share(shard, 0, size) for shard, size in enumerate(sizes)]
    found = [
        [(s.shard, row) for s in split(shares, k, parts) for row in range(s.first, s.end)] for k in range(parts)
    ]
    assert list(chain(*found)) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert max(map(len, found)) - min(map(len, found)) <= 1
