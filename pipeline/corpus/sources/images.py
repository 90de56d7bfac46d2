"""Image files."""

from collections.abc import Iterator

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry
from cliper.pipeline.corpus.sources.files import find
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.storage.backend import Storage


def list_images(storage: Storage, uri: str, config: InputConfig, left_out: LeftOut) -> Iterator[Entry]:
    """A file, a folder or prefix (recursive; files with an image's ending), or a glob (all it matches)."""
    selection = Selection(config, left_out)
    for found in find(storage, uri, left_out):
        if selection.image(found.name, any_name=found.how != "in folder"):
            yield Entry(found.name, found.uri, found.size, stamp=found.stamp)
