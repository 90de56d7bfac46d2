"""The `cliper` command. A command's module is imported when the command is called, which keeps `--help` fast.

Exit codes: 0 success; 1 a negative result (`verify`: an incomplete run; `label`: more images failed than
--max-failures allows); 2 an expected error, with one message; 130 stopped with Ctrl-C; 143 stopped with SIGTERM.
"""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cliper.model.errors import CliperError
from cliper.pipeline.errors import TooManyFailuresError

# Name of a command, and of its module in jobs/: its line in `cliper --help`.
COMMANDS = {
    "label": "Label every image below INPUT and write masks and metadata to OUTPUT.",
    "plan": "Label a sample of INPUT here and estimate time, output and cost of the whole.",
    "prepare": "Convert a downloaded benchmark to the form that `cliper evaluate` reads.",
    "evaluate": "Measure masks against a benchmark's ground truth: mIoU and other metrics.",
    "agree": "Compare the masks of runs over the same images, without ground truth.",
    "verify": "Check that every image of RUN is in exactly one row, as it was written.",
    "status": "Show the progress of RUN: images done, rate, failures and time left.",
    "retry": "Label the failed images of RUN again and replace their rows.",
    "export": "Write the masks of RUN to OUTPUT in another tool's format.",
    "report": "Write a self-contained HTML page on RUN.",
    "view": "Open a page with all images of RUN: filter, sort and enlarge them.",
    "serve": "Open a page to try classes and thresholds on single images.",
    "review": "Export the masks that most need review to Label Studio, and import the corrections.",
}
SETTINGS = {"help_option_names": ["-h", "--help"]}
_LISTING = "cliper.listing"  # set in the context while `cliper --help` is formatted


class Commands(TyperGroup):
    """The commands by name, each imported on its first use."""

    def __init__(self, **settings: Any) -> None:
        names = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}
        super().__init__(**settings | {"commands": names})

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or a stub with its help line while `--help` is formatted; None for an unknown name."""
        known = self.commands.get(cmd_name)
        return known if known is None or _LISTING in ctx.meta else load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands without importing them."""
        ctx.meta[_LISTING] = True
        super().format_help(ctx, formatter)


def load(name: str) -> Any:
    """Import a command of COMMANDS: the function or group of that name in its module."""
    from cliper.jobs.options import ungrouped

    command = getattr(import_module(f"cliper.jobs.{name}"), name)
    if isinstance(command, typer.Typer):
        return unbroken(get_command(command))
    alone = typer.Typer(add_completion=False)
    alone.command(name, context_settings=SETTINGS)(ungrouped(command))
    return unbroken(get_command(alone))


def unbroken(command: Any) -> Any:
    """Join the lines of each paragraph of the help texts, which rich would print as they are in the docstring."""
    command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "")
    for part in getattr(command, "commands", {}).values():
        unbroken(part)
    return command


app = typer.Typer(
    name="cliper",
    cls=Commands,
    help="Label image corpora of any size with open-vocabulary semantic masks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import cliper

        print(f"cliper {cliper.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Label image corpora of any size with open-vocabulary semantic masks."""


def run(command: Callable[..., Any]) -> None:
    """Run a command line; an expected error is its message on stderr and exit code 2 or 1, never a traceback."""
    try:
        command()
    except CliperError as error:
        print(f"cliper: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, TooManyFailuresError) else 2)


def main() -> None:
    """Entry point of the `cliper` script."""
    run(app)


if __name__ == "__main__":
    main()
