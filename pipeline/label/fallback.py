"""Segment within the memory there is, and let an image cost no more than its own row.

What raises together is tried again in halves, down to single images. A single image that does not fit the device
goes to the segmenter's spare, if it has one: CLIPer's is a copy on the CPU, in float32, whose scores are those of
the GPU but for rounding. An image that fits nowhere becomes a row of type `out_of_memory`. Whether an image fits
is decided by its shape and the kind of device, so the same image still gets the same mask on the same devices.
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
    from cliper.model.labels import Segmentation

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
    """A segmenter that knows another one, slower, which needs none of its device's memory."""

    def spare(self) -> Segmenter | None:
        """Load the other segmenter; None if there is none to help."""
        ...


class CarefulSegmenter:
    """Calls a segmenter so that every image gets a result: its segmentation, or the exception it alone raises."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self._spare: Segmenter | None = None
        self._asked_for_spare = False

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> "list[Segmentation | Exception]":
        """Segment together; what raises, in halves."""
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
        """The segmenter's spare, loaded when it is first needed and then kept."""
        if not self._asked_for_spare and isinstance(self.segmenter, HasSpare):
            self._asked_for_spare = True
            try:
                self._spare = self.segmenter.spare()
            except Exception as error:  # then large images stay rows without a mask, and the log says why
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
    """Whether an error says that the device's or the host's memory did not suffice."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in _SIGNS)


def _release_memory() -> None:
    """Give what the failed attempt held back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _leave_if_the_device_is_lost(failure: Exception) -> None:
    """End the process if its GPU is beyond use: after a fault every call fails, and so would every later image.

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
