"""Write docs/CLI.md from the commands themselves.

python -m tools.cli_reference
"""

import re
from pathlib import Path

import click
from typer.cli import get_docs_for_click
from typer.main import get_command

from cliper.jobs.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "CLI.md"
HEAD = "<!-- Written by `python -m tools.cli_reference`; do not edit. -->\n\n"


def reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=click.Context(command), name="cliper")
    for name, summary in summaries(command).items():  # typer cuts them short
        text = re.sub(rf"^\* `{name}`: .*\.\.\.$", lambda _, s=summary, n=name: f"* `{n}`: {s}", text, flags=re.M)
    return HEAD + text.strip() + "\n"


def summaries(group: click.Command) -> dict[str, str]:
    """The first paragraph of each command's help, subcommands included."""
    found: dict[str, str] = {}
    for name, command in getattr(group, "commands", {}).items():
        found |= {name: " ".join((command.help or "").split("\n\n")[0].split())} | summaries(command)
    return found


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
