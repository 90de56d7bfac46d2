"""The text of a class file, in any of the common forms, as one class per line.

Accepted: a class per line; one line of names separated by commas, tabs or semicolons; a JSON list; a list
(`- cat`, `* cat`); numbered lines (`0: cat`, `1. cat`, `1<tab>cat`) in order. Names may be in quotes. Comments and
trailing blank lines are ignored. Ambiguous text is refused.
"""

import json
import re
from collections.abc import Sequence

from cliper.model.errors import ClassListError

_NUMBERED = re.compile(r"(\d+)(?:\s*[:,\t]\s*|[.)]\s+)(.*)")
_SPACED = re.compile(r"(\d+) +(.*)")  # numbered only if the numbers go up by one
_LISTED = re.compile(r"[-*\u2022](\s|$)")
_SYNSET = re.compile(r"n\d{8}\s")  # an id of ImageNet's
LONGEST_NAME = 200
_COMMENT = re.compile(r"(^|\s)#.*$")
_QUOTED = re.compile(r"""(["'])(.*)\1""")


def class_lines(text: str, source: str) -> list[str]:
    """Return lines for `ClassList.parse`. Raises ClassListError, which names the form that was recognized."""
    if "\0" in text:
        raise ClassListError(f"{source} holds null characters: it is no UTF-8 text, but UTF-16 or binary")
    if text.lstrip().startswith(("[", "{")):
        return _from_json(text, source)
    lines = [
        _COMMENT.sub("", line).strip(" \r\v\f\u200b\ufeff")
        for line in text.splitlines()
        if not line.lstrip().startswith("#")
    ]
    while lines and not lines[-1].strip():
        lines.pop()
    filled = [line for line in lines if line.strip()]
    if filled and all(map(_LISTED.match, filled)):
        return [_named_line(line[1:].strip(), number, source) for number, line in enumerate(filled, 1)]
    numbered = [_NUMBERED.fullmatch(line) for line in filled]
    if _go_up(spaced := [_SPACED.fullmatch(line) for line in filled]):
        numbered = spaced
    if filled and all(numbered):
        return _in_order([(int(m[1]), _unquoted(m[2].strip())) for m in numbered if m], source)
    if any(numbered) or any(line.startswith("- ") for line in filled):
        raise ClassListError(
            f"{source}: only some lines are numbered or begin with '- '; write one class per line"
        )
    if len(filled) == 1:
        return [_named_line(part, 1, source) for part in _split(filled[0])]
    return [_named_line(_checked(line, number, source), number, source) for number, line in enumerate(lines, 1)]


def _go_up(spaced: Sequence[re.Match[str] | None]) -> bool:
    """Whether all of several lines begin with a number, one more than in the line before; the first is 0 or 1."""
    numbers = [int(match[1]) for match in spaced if match]
    return len(spaced) > 1 and numbers in (list(range(len(spaced))), list(range(1, len(spaced) + 1)))


def _split(line: str) -> list[str]:
    """Split the only line of a file into classes; a prompt after = may contain commas."""
    for separator in ("\t", ";", ","):
        if separator in line and "=" not in line:
            return [part.strip() for part in line.split(separator) if part.strip()]
    return [line]


def _named_line(line: str, number: int, source: str) -> str:
    """A line without quotes around the name. Raises ClassListError for one that is of another kind of file."""
    line = _unquoted(line.strip())
    name = line.partition("=")[0].strip()
    if len(name) > LONGEST_NAME:
        raise ClassListError(
            f"{source}: class {number} has {len(name):,} characters, a name at most {LONGEST_NAME}: "
            "write one class per line"
        )
    if any(mark in name for mark in "{}<>") or ": " in name or name.endswith(":") or _SYNSET.match(name):
        raise ClassListError(
            f"{source}: class {number} would be '{name}': write the name alone on its line, or 'name = word; word'"
        )
    return line


def _checked(line: str, number: int, source: str) -> str:
    """Refuse lines that may contain several classes or columns."""
    name = line.partition("=")[0]
    found = next((mark for mark in ("\t", ",", ";") if mark in name.strip()), None)
    if found is None:
        return line
    word = {"\t": "tab", ",": "comma", ";": "semicolon"}[found]
    first, _, rest = (part.strip() for part in name.partition(found))
    raise ClassListError(
        f"{source}: class {number} would be '{name.strip()}', with a {word}: write one class per line, all on "
        f"one line, or '{first} = {first}; {rest}' for one class with several words"
    )


def _in_order(pairs: Sequence[tuple[int, str]], source: str) -> list[str]:
    first = pairs[0][0]
    numbers = [number for number, _ in pairs]
    if first not in (0, 1) or numbers != list(range(first, first + len(pairs))):
        raise ClassListError(
            f"{source}: read as numbered classes, but the numbers are {str(numbers[:6])[1:-1]}, ...: they must go "
            "up by one from 0 or 1; in a mask, the first class is label 1"
        )
    return [name for _, name in pairs]


def _from_json(text: str, source: str) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ClassListError(
            f"{source}: read as JSON because of its first character, but invalid: {error}"
        ) from error
    if isinstance(content, dict) and all(key.isdigit() for key in content):
        return _in_order([(int(key), _named(name, source)) for key, name in content.items()], source)
    if not isinstance(content, list):
        raise ClassListError(f'{source}: read as JSON, but not a list; write ["cat", "dog"] or one class per line')
    return [_named(item, source) for item in content]


def _named(item: object, source: str) -> str:
    if isinstance(item, dict):
        item = item.get("name")
    if not isinstance(item, str):
        raise ClassListError(f"{source}: read as JSON; {item!r:.60} is not a class name in quotes")
    return item.strip()


def _unquoted(name: str) -> str:
    quoted = _QUOTED.fullmatch(name)
    return quoted[2] if quoted else name
