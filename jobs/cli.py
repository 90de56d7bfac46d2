"""The `cliper` command.

Exit codes: 0 done; 1 the command did what it could, and what it found is not good (`verify`: a run that is not
whole; `label`: more images failed than --max-failures allows); 2 one message explains what to change; 130 stopped
with Ctrl-C; 143 stopped with SIGTERM.
"""

import sys
from collections.abc import Callable
from typing import Any

import typer

from cliper.jobs.evaluate import evaluate
from cliper.jobs.export import export
from cliper.jobs.label import label
from cliper.jobs.plan import plan
from cliper.jobs.prepare import prepare
from cliper.jobs.report import report
from cliper.jobs.retry import retry
from cliper.jobs.review import review
from cliper.jobs.serve import serve
from cliper.jobs.status import status
from cliper.jobs.verify import verify
from cliper.model.errors import CliperError
from cliper.pipeline.errors import TooManyFailuresError

app = typer.Typer(
    name="cliper",
    help="Label image corpora of any size with open-vocabulary semantic masks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Label image corpora of any size with open-vocabulary semantic masks."""


app.command()(label)
app.command()(plan)
app.command()(prepare)
app.command()(evaluate)
app.command()(verify)
app.command()(status)
app.command()(retry)
app.command()(export)
app.command()(report)
app.command()(serve)
app.add_typer(review, name="review")


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
