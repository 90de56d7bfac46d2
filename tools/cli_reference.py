"""Generate docs/CLI.md from the commands' help texts.

python -m tools.cli_reference
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from typer.cli import get_docs_for_click
from typer.main import get_command

from cliper.jobs.cli import COMMANDS, app, load

PAGE = Path(__file__).parent.parent / "docs" / "CLI.md"
HEAD = "<!-- Written by `python -m tools.cli_reference`; do not edit. -->\n\n"


def reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    command = get_command(app)
    context: Any = click.Context(command)  # type: ignore[arg-type]  # typer has a click of its own inside
    text = get_docs_for_click(obj=command, ctx=context, name="cliper")
    for name, summary in summaries({name: load(name) for name in COMMANDS}).items():  # typer truncates them
        line = f"* `{name}`: {summary}".replace("\\", r"\\")
        text = re.sub(rf"^\* `{name}`: .*\.\.\.$", line, text, flags=re.M)
    return HEAD + text.strip() + "\n"


def summaries(commands: Mapping[str, Any]) -> dict[str, str]:
    """The first paragraph of each command's help, subcommands included."""
    found: dict[str, str] = {}
    for name, command in commands.items():
        found |= {name: " ".join((command.help or "").split("\n\n")[0].split())}
        found |= summaries(getattr(command, "commands", {}))
    return found


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
