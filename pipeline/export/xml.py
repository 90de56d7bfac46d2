"""What XML cannot hold."""

import re

from pipeline.errors import ExportError

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def refuse_unprintable(text: str, what: str) -> None:
    """Raise ExportError for a character that XML 1.0 has no way to write."""
    found = _FORBIDDEN.search(text)
    if found is not None:
        raise ExportError(f"the {what} {text!r} holds {found[0]!r}, which XML cannot; choose another format")
