"""Class lists: names, text prompts, and labels in a mask."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliper.model.errors import ClassListError

MAX_CLASSES = 65_534  # labels are uint16; 0 is background and 65,535 the ignore value


@dataclass(frozen=True)
class ClassList:
    """The foreground classes. Class k (1-based) is `names[k - 1]`, and its text prompt `prompts[k - 1]`.

    A prompt with ``;`` or ``|`` holds several words for one class; the best-matching word determines its score.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The text prompts of every class, one or more."""
        return tuple(tuple(_words(prompt)) for prompt in self.prompts)

    @classmethod
    def parse(cls, lines: Sequence[str], source: str = "class list") -> "ClassList":
        """Parse one class per line: ``name``, ``name = prompt`` or ``name = word; word``; # starts a comment.

        Raises ClassListError for an empty list, a blank line, an empty prompt, a duplicate name or more than
        65,534 classes.
        """
        numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if not line.startswith("#")]
        blank = [i for i, line in numbered if not line]
        if blank:
            raise ClassListError(f"{source}: line {blank[0]} is blank; remove it (one class per line)")
        pairs = [_parse_line(i, line, source) for i, line in numbered]
        names = tuple(name for name, _ in pairs)
        _check_names(names, source)
        return cls(names, tuple(prompt for _, prompt in pairs))


def _parse_line(number: int, line: str, source: str) -> tuple[str, str]:
    name, separator, prompt = (part.strip() for part in line.partition("="))
    words = prompt if separator else name
    if not name or not all(_words(words)):
        raise ClassListError(
            f"{source}: line {number} is '{line}'; expected 'name', 'name = prompt' or 'name = word; word'"
        )
    return name, prompt or name


def _words(prompt: str) -> list[str]:
    """The words of a prompt, separated by ; or |."""
    return [word.strip() for word in prompt.replace("|", ";").split(";")]


def _check_names(names: tuple[str, ...], source: str) -> None:
    if not names:
        raise ClassListError(f"{source} is empty: write one class name per line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ClassListError(f"{source}: '{twice[0]}' is listed twice; every class name must be unique")
    if len(names) > MAX_CLASSES:
        raise ClassListError(f"{source}: {len(names)} classes; at most {MAX_CLASSES} fit a 16-bit mask")


def mask_dtype(classes: int) -> type[np.unsignedinteger[Any]]:
    """uint8 if 0 (background), all classes and 255 (ignore) fit, else uint16."""
    return np.uint8 if classes <= 254 else np.uint16


def ignore_value(classes: int) -> int:
    """The label that is never written, for pixels that trainers should skip: the largest of the mask's type."""
    return int(np.iinfo(mask_dtype(classes)).max)
