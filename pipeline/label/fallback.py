"""Segment within the available memory; an image that fails affects only its own row.

A failing batch is split and retried, down to single images. A single image that does not fit the device is passed
to the segmenter's spare, if it has one: CLIPer's is a copy on the CPU, in float32, whose scores equal those of the
GPU up to rounding. An image that does not fit the spare either becomes a row of type `out_of_memory`. Whether an
image fits depends on its shape and the kind of device, so the same image still gets the same mask on the same
devices.
"""

import gc
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from cliper.pipeline.errors import ImageError, text_of

if TYPE_CHECKING:
    from cliper.model.segmentation import Segmentation

DEVICE_LOST = 70  # exit code of a process whose GPU answers nothing any more

# Torch raises RuntimeError for both kinds of memory; these are the words of its allocators and of cuBLAS.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class Segmenter(Protocol):
    """Anything that turns images into label maps; the one seam that tests fake."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation]":
        """Label uint8 RGB images [H, W, 3] of any sizes; same order and length."""
        ...


@runtime_checkable
class HasSpare(Protocol):
    """A segmenter with a slower spare that needs no memory on its device."""

    def spare(self) -> Segmenter | None:
        """Load the spare segmenter; None if there is none."""
        ...


class CarefulSegmenter:
    """Calls a segmenter and returns a result for every image: its segmentation, or the exception it raises."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self._spare: Segmenter | None = None
        self._asked_for_spare = False

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation | Exception]":
        """Segment the images as one batch; if that fails, split the batch and retry."""
        outcome = attempt(self.segmenter, images, image_ids)
        if not isinstance(outcome, Exception):
            return outcome
        if len(images) > 1:
            half = len(images) // 2
            return self.segment(images[:half], image_ids[:half]) + self.segment(images[half:], image_ids[half:])
        spare = self._load_spare() if out_of_memory(outcome) else None
        if spare is not None:
            outcome = attempt(spare, images, image_ids)
        return [outcome] if isinstance(outcome, Exception) else outcome

    def _load_spare(self) -> Segmenter | None:
        """The segmenter's spare, loaded on first use and then kept."""
        if not self._asked_for_spare and isinstance(self.segmenter, HasSpare):
            self._asked_for_spare = True
            try:
                self._spare = self.segmenter.spare()
            except Exception as error:  # then large images stay rows without a mask, with the reason in the log
                print(f"no spare segmenter for images that do not fit the device: {error}", file=sys.stderr)
        return self._spare


def attempt(
    segmenter: Segmenter, images: Sequence[np.ndarray], image_ids: Sequence[str]
) -> "list[Segmentation | Exception] | Exception":
    """The segmentations, or the exception without its traceback: that would keep the tensors of its frames.

    What is no Exception (a panic of a Rust library, an exit) is one here: it costs its images, not the run.
    """
    failure: Exception
    try:
        found = [*itertools.islice(segmenter.segment(images, image_ids), len(images) + 1)]
        if len(found) == len(images):
            return [*found]
        count = "more" if len(found) > len(images) else str(len(found))
        failure = ImageError("wrong_result", f"the segmenter returned {count} results for {len(images)} images")
    except Exception as error:
        failure = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failure = ImageError(type(error).__name__, text_of(error))
    failure.__traceback__ = failure.__context__ = failure.__cause__ = None
    _leave_if_the_device_is_lost(failure)
    if out_of_memory(failure):
        _release_memory()
    return failure


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that the device or the host ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in _SIGNS)


def _release_memory() -> None:
    """Return the failed attempt's memory to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _leave_if_the_device_is_lost(failure: Exception) -> None:
    """Exit the process if its GPU is unusable: after a fault every call fails, and so would every later image.

    Ray starts another actor with the same shard; run/attempts.py finds the image if it was one.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the GPU is lost: {error}, after {text_of(failure)}", file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)
