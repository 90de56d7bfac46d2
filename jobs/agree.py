"""`cliper agree`: compare the masks of runs over the same images."""

import os
from typing import Annotated

import typer

from cliper.jobs.options import Verbose
from cliper.jobs.storage_options import StorageOption, parse_options


def agree(
    runs: Annotated[list[str], typer.Argument(help="Two or more run folders of the same input", metavar="RUN...")],
    storage_option: StorageOption = None,
    verbose: Verbose = False,
) -> None:
    """Compare the masks of runs over the same images: IoU per image and class, and confusions between classes.

    Writes RUN/agreement/ in the first run. Shards are counted in this process, or on Ray if RAY_ADDRESS is set.
    The same command continues, and counts later shards. `cliper review pick --agreement` uses the result.
    """
    from cliper.pipeline.evaluate.agree import count_agreement, open_agreement, read_agreement, write_agreement
    from cliper.pipeline.run.folder import read_run
    from cliper.pipeline.storage.backend import Storage

    storage = Storage(parse_options(storage_option or []))
    agreement = open_agreement([read_run(run, storage) for run in runs])
    if os.environ.get("RAY_ADDRESS") and agreement.uncounted_shards():
        from cliper.jobs.session import clean_stop, ray_session
        from cliper.pipeline.flow import over_tasks

        with clean_stop(agreement.folder), ray_session(verbose, 0) as session:
            session.connect()
            for _ in count_agreement(agreement, over_tasks):
                pass
    for _ in count_agreement(agreement):
        pass
    print(write_agreement(agreement, read_agreement(agreement)))
    print(agreement.folder)
