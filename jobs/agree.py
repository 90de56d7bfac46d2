"""`cliper agree`: compare the masks of runs over the same images."""

from typing import Annotated

import typer

from cliper.jobs.session import clean_stop
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption, started


def agree(
    runs: Annotated[list[str], typer.Argument(help="Two or more run folders of the same input", metavar="RUN...")],
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Compare the masks of runs over the same images: IoU per image and class, and confusions between classes.

    Writes RUN/agreement/ in the first run. The same command continues, and counts later shards.
    `cliper review pick --agreement` uses the result.
    """
    from cliper.pipeline.evaluate.agree import count_agreement, open_agreement, read_agreement, write_agreement
    from cliper.pipeline.run.folder import read_run
    from cliper.pipeline.storage.backend import Storage

    storage = Storage(parse_options(storage_option or []))
    agreement = open_agreement([read_run(run, storage) for run in runs])
    with clean_stop(agreement.folder), started(workers) as counters:
        for _ in count_agreement(agreement, counters):
            pass
    print(write_agreement(agreement, read_agreement(agreement)))
    print(agreement.folder)
