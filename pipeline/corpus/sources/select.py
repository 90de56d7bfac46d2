"""Which of the names in an input belong to the corpus; every other one is counted with its reason."""

import posixpath
import re
from collections.abc import Sequence

from fsspec.utils import glob_translate

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.formats import SUFFIXES, why_left_out
from cliper.pipeline.corpus.left_out import LeftOut, ending
from cliper.pipeline.corpus.sources.entry import is_unicode

# Copies and caches that operating systems and tools put beside the files.
_SYSTEM = re.compile(
    r"(^|/)(\._[^/]*|\.ipynb_checkpoints|@eaDir|__MACOSX|\.Trash[^/]*|\.thumbnails|\.AppleDouble|\$RECYCLE\.BIN"
    r"|\.DS_Store|Thumbs\.db|desktop\.ini)(/|$)",
    re.IGNORECASE,
)
_MASK_FOLDER = re.compile(
    r"(?:^|/)(masks?|annotations?|labels?|segmentations?|SegmentationClass|SegmentationObject|gt|gtFine|gtCoarse)/",
    re.IGNORECASE,
)
_MASK_NAME = re.compile(
    r"([._-](?:seg|mask|masks|label|labels|labelIds|labelTrainIds|instanceIds|depth|matte|trimap|gt|annotation)"
    r"\.[A-Za-z0-9]+)$",
    re.IGNORECASE,
)


class Selection:
    """The rules of one listing: system copies, endings, `include` and `exclude`."""

    def __init__(self, config: InputConfig, left_out: LeftOut) -> None:
        self.left_out, self.any_name = left_out, config.any_name
        self.include, self.exclude = _compile(config.include), _compile(config.exclude)

    def image(self, name: str, image_id: str | None = None, any_name: bool = False) -> bool:
        """Whether a file or an archive's member is an image to label; `any_name`: whatever its ending."""
        if not self._usable(name):
            return False
        if not (any_name or self.any_name or name.lower().endswith(SUFFIXES)):
            self.left_out.skip(name, why_left_out(ending(name)))
            return False
        return self.row(name if image_id is None else image_id)

    def container(self, name: str, suffixes: Sequence[str], kind: str) -> bool:
        """Whether a file among others is one to look into, by its ending."""
        if not self._usable(name):
            return False
        if not name.lower().endswith(tuple(suffixes)):
            self.left_out.skip(name, f"not a {kind} ({', '.join(suffixes)})")
            return False
        return True

    def row(self, image_id: str) -> bool:
        """Whether an image is wanted, by `include` and `exclude`; notices names of masks."""
        if self.include and not _matches(self.include, image_id):
            self.left_out.skip(image_id, "not matched by --include")
            return False
        if _matches(self.exclude, image_id):
            self.left_out.skip(image_id, "matched by --exclude")
            return False
        pattern = mask_pattern(image_id)
        if pattern is not None and not self.include:
            self.left_out.look_alike(pattern, image_id)
        return True

    def _usable(self, name: str) -> bool:
        if not is_unicode(name):
            self.left_out.skip(name, "the name is not UTF-8; rename the file")
            return False
        if _SYSTEM.search(name):
            self.left_out.skip(name, "a system's or tool's copy")
            return False
        return True


def mask_pattern(name: str) -> str | None:
    """A glob for names like this one, if it looks like a mask's rather than an image's."""
    if folder := _MASK_FOLDER.search(name):
        return f"**/{folder[1]}/**"
    suffix = _MASK_NAME.search(name)
    return f"*{suffix[1]}" if suffix else None


def _compile(patterns: Sequence[str]) -> list[tuple[re.Pattern[str], bool]]:
    """(regular expression, whether it has a slash and is for the whole id, not its last part) of globs."""
    return [(re.compile(glob_translate(pattern)), "/" in pattern) for pattern in patterns]


def _matches(patterns: Sequence[tuple[re.Pattern[str], bool]], image_id: str) -> bool:
    last = posixpath.basename(image_id)
    return any(pattern.match(image_id if whole else last) for pattern, whole in patterns)
