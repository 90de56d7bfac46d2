"""Image files."""

from collections.abc import Iterable, Iterator

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry
from cliper.pipeline.corpus.sources.files import Found
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.storage.backend import Storage


def list_images(
    storage: Storage, files: Iterable[Found], config: InputConfig, left_out: LeftOut
) -> Iterator[Entry]:
    """A file, those of a folder or prefix (recursive; files with an image's ending), or all matches of a glob."""
    selection = Selection(config, left_out)
    for found in files:
        if selection.image(found.name, any_name=found.how != "in folder"):
            yield Entry(found.name, found.uri, found.size, stamp=found.stamp)
