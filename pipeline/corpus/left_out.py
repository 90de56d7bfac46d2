"""Files that a listing skips, counted by ending and reason, and notices about the corpus."""

import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_KINDS = 200  # different (ending, reason) pairs kept apart
MOST_NOTES = 20
_LONGEST_ENDING = 12


@dataclass
class LeftOut:
    """Counts of files and members that are in the input and not in the corpus.

    `counts`: (ending in lower case, reason) to how many. `lookalikes`: pattern to (how many, an example) of
    labeled images whose names look like masks. `notes`: one line each on anything else worth a look.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lookalikes: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many files and members were left out."""
        return self.counts.total()

    def skip(self, name: str, reason: str, count: int = 1) -> None:
        """Count something that is left out."""
        self._count((ending(name), reason), count)

    def _count(self, key: tuple[str, str], count: int) -> None:
        if key not in self.counts and len(self.counts) >= MOST_KINDS:
            key = "other endings", key[1]
        self.counts[key] += count

    def look_alike(self, pattern: str, name: str) -> None:
        """Count a labeled image whose name looks like a mask's."""
        count, first = self.lookalikes.get(pattern, (0, name))
        self.lookalikes[pattern] = count + 1, first

    def note(self, line: str) -> None:
        """Add a line; only the first MOST_NOTES are kept."""
        if len(self.notes) < MOST_NOTES:
            self.notes.append(line)

    def add(self, other: "LeftOut") -> None:
        """Add the counts of another listing, of one of several archives for example."""
        for key, count in other.counts.items():
            self._count(key, count)
        for pattern, (count, first) in other.lookalikes.items():
            before, earlier = self.lookalikes.get(pattern, (0, first))
            self.lookalikes[pattern] = before + count, earlier
        for line in other.notes:
            self.note(line)

    def lines(self) -> list[str]:
        """The skipped files, the most frequent first, and the notes: a line each; [] for nothing."""
        left = [
            f"left out  {count:,} {suffix or 'without ending'}: {reason}"
            for (suffix, reason), count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        return [*left, *self._alike(), *(f"notice    {line}" for line in self.notes)]

    def _alike(self) -> list[str]:
        if not self.lookalikes:
            return []
        count, first = (
            sum(n for n, _ in self.lookalikes.values()),
            min(name for _, name in self.lookalikes.values()),
        )
        options = " ".join(f"--exclude '{pattern}'" for pattern in sorted(self.lookalikes))
        return [
            f"notice    names that look like masks, among the images to label: {count:,} (for example {first}); "
            f"leave them out with {options}"
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest's index."""
        return {
            "counts": [[*key, count] for key, count in sorted(self.counts.items())],
            "lookalikes": {pattern: list(found) for pattern, found in sorted(self.lookalikes.items())},
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LeftOut":
        """The inverse of `to_json`; an index without it has no counts."""
        counts = Counter({(suffix, reason): count for suffix, reason, count in content.get("counts", [])})
        alike = {pattern: (count, first) for pattern, (count, first) in content.get("lookalikes", {}).items()}
        return cls(counts, alike, list(content.get("notes", [])))


def ending(name: str) -> str:
    """A name's ending in lower case with its dot; "" without one, or if it is too long to be one."""
    found = posixpath.splitext(posixpath.basename(name) if not name.startswith(".") else f"x{name}")[1].lower()
    readable = found.encode("ascii", "replace").decode()
    return readable if len(readable) <= _LONGEST_ENDING else ""
