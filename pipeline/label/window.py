"""How many images an actor hands to the model at once.

Large windows let images of equal size share a batch; small ones show progress and lose less when a run is stopped.
A window starts at one image and doubles up to a limit. It stops growing when it takes longer than SECONDS and a
doubled window took twice as long, i.e. when batches gain nothing, as on a CPU.
"""

SECONDS = 4.0
_LINEAR = 0.75  # of the time that twice the images would take without any gain


class Window:
    """The size of the next window, from the time the last ones took."""

    def __init__(self, most: int, image_seconds: float) -> None:
        """At most `most` images; an image that takes `image_seconds` hangs, so a window takes a third of that."""
        self.most, self.image_seconds = most, image_seconds
        self.size = 1
        self.pace = 0.0  # seconds an image took in the slowest window; the first one, which warms up, is replaced
        self._last: tuple[int, float] | None = None  # images and seconds of the last full window while it grows
        self._windows, self._grows = 0, True

    def limit(self) -> int:
        """Images for the model at once."""
        safe = int(self.image_seconds / 3 / self.pace) if self.pace else self.most
        return max(1, min(self.most, self.size, safe))

    def took(self, images: int, seconds: float) -> None:
        """Note the time of a window."""
        pace = seconds / images
        self.pace = pace if self._windows <= 1 else max(self.pace, pace)
        self._windows += 1
        if self._grows and images >= self.size:
            self._grow(images, seconds)

    def _grow(self, images: int, seconds: float) -> None:
        before, self._last = self._last, (images, seconds)
        if before is not None and seconds > SECONDS:
            share = seconds / images / (before[1] / before[0])  # 1: an image takes as long as in the last window
            if share >= _LINEAR:
                self.size, self._grows = before[0], False
                return
        self.size = min(self.most, 2 * self.size)
        self._grows = self.size < self.most
