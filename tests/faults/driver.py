"""The `cliper` command with test segmenters, fast or harmful: `python -m tests.faults.driver label ...`.

The rest of the command is unchanged. Name a segmenter in the config (`segmenter: brightness`).
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cliper.model.segmentation import Segmentation
from cliper.pipeline.label.segmenters import SEGMENTERS
from tests.support.fakes import Brightness, kind


def segfault() -> None:
    ctypes.string_at(0)


def exhaust_memory() -> None:
    np.zeros(2**47, np.uint8)  # 128 TiB: refused at once, as by a limit on the process


def raise_error() -> None:
    raise RuntimeError("cannot segment this image")


DEADLY: dict[str, Callable[[], object]] = {  # by the first word of the file's name
    "segfault": segfault,
    "exit": lambda: os._exit(1),
    "abort": os.abort,
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),  # the signal of the kernel's out-of-memory killer
    "sigbus": lambda: signal.raise_signal(signal.SIGBUS),  # a truncated memory map; to this thread, not any
}
HARMFUL = DEADLY | {"hang": partial(time.sleep, 10**6), "memory": exhaust_memory, "raise": raise_error}


class Harmful(Brightness):
    """Misbehaves as named by the file under `poison/`."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        for image_id in image_ids:
            folder, _, name = image_id.rpartition("/")
            if folder == "poison":
                HARMFUL.get(name.split("-")[0], lambda: None)()
        return super().segment(images, image_ids)


class Steady(Brightness):
    """5 ms an image, or STEADY_SECONDS of the environment: long enough for something to happen to a run."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        time.sleep(float(os.environ.get("STEADY_SECONDS", "0.005")) * len(images))
        return super().segment(images, image_ids)


if __name__ == "__main__":
    from cliper.jobs.cli import main

    SEGMENTERS |= {"brightness": kind(Brightness), "steady": kind(Steady), "harmful": kind(Harmful)}
    main()
