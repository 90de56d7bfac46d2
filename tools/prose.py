"""Rates per 1,000 words of some turns of phrase that make English prose hard to read.

python -m tools.prose          print the rates
python -m tools.prose --where  print every place as well

Prose is Markdown without its code, and the docstrings, comments and longer texts of Python files.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cliper_model", "jobs", "tools", "benchmarks", "examples", "tests")

# Noun clauses ("what was labeled is kept") instead of nouns; questions and "what to do" are not counted.
TURNS = {
    "what <word>": r"\bwhat (?!to\b|it\b|is wrong|happened|happens|changed|can|if\b)[a-z]+",
    "beside": r"\bbeside\b",
    "says so/why/what": r"\bsays? (?:so|why|what|which|where|how|otherwise)\b",
    "where there/it/they": r"\bwhere (?:there|it|they|that|one)\b",
    "of its/their own": r"\bof (?:its|their|his|ours?|one's) own\b",
    "nobody/somebody": r"\b(?:no|some|any|every)body(?:'s)?\b",
}
_CODE = re.compile(r"```.*?```|`[^`\n]*`|^(?: {4}|\t)[^\n]*$|\]\([^)]*\)|<!--.*?-->|^\|[-: |]+\|$", re.S | re.M)
_LONG = 5  # words from which a string literal counts as prose


def markdown(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and prose of each paragraph."""
    text = _CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text(encoding="utf-8"))
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", text):
        if paragraph.strip():
            yield line, paragraph
        line += paragraph.count("\n")


def python(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of docstrings, comments and longer strings."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#! ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) >= _LONG:
            yield node.lineno, re.sub(r"`[^`\n]*`", " ", node.value)


def prose() -> Iterator[tuple[Path, int, str]]:
    """Every piece of prose: file, line, text. Skips the log, which is history, and the generated CLI page."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cliper_model/weights/*/*.md")]:
        if path.name not in ("LOG.md", "CLI.md", "LICENSE.md"):
            yield from ((path, line, text) for line, text in markdown(path))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "prose.py":
                yield from ((path, line, text) for line, text in python(path))


def count() -> tuple[int, dict[str, list[str]]]:
    """The number of words, and the places of each turn of TURNS."""
    words, places = 0, defaultdict(list)
    for path, line, text in prose():
        words += len(text.split())
        for name, pattern in TURNS.items():
            for found in re.finditer(pattern, text, re.IGNORECASE):
                at = line + text[: found.start()].count("\n")
                around = " ".join(text[max(0, found.start() - 40) : found.end() + 40].split())
                places[name].append(f"{path.relative_to(ROOT)}:{at}: ...{around}...")
    return words, places


def main() -> None:
    """Print the rates, and with --where the places of each turn."""
    words, places = count()
    print(f"{words} words")
    for name in TURNS:
        print(f"{1000 * len(places[name]) / words:5.2f}  {name}")
        if "--where" in sys.argv:
            print("\n".join(places[name]))


if __name__ == "__main__":
    main()
