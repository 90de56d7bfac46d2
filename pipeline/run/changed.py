"""Images of finished shards that were replaced in the corpus and are to be labeled again.

changed/shard-000000.json    the images of a shard, as they are listed now

Written by `cliper label --extend --relabel`, before the manifest is; removed when the shard's file holds the new
rows. So an interruption anywhere costs work and nothing else: what is left in the folder is labeled by the next
command.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict

from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.uris import join

_NAME = re.compile(r"shard-(\d{6,})\.json")


def changed_file(shard: int) -> str:
    """The file of a shard, relative to the run folder."""
    return f"changed/shard-{shard:06d}.json"


def changed_shards(run: Run) -> list[int]:
    """The shards with images to label again, in order. Lists names only."""
    try:
        names = [name for name, _ in run.storage.list_files(join(run.uri, "changed"))]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read_changed(run: Run, shard: int) -> dict[str, Entry]:
    """The images of a shard to label again, by id; none without a file. Raises RunError for a damaged one."""
    place = join(run.uri, changed_file(shard))
    try:
        content = json.loads(run.storage.read(place))
        if content["digest"] != _digest(content["images"]):
            raise ValueError
        return {image["image_id"]: Entry(**image) for image in content["images"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{place} is damaged; remove it and run 'cliper label --extend --relabel changed' again"
        ) from error


def write_changed(run: Run, shard: int, images: Mapping[str, Entry]) -> None:
    """Note images of a finished shard to label again, by id."""
    content = [asdict(entry) for entry in images.values()]
    run.storage.write_json(join(run.uri, changed_file(shard)), {"images": content, "digest": _digest(content)})


def forget_changed(run: Run, shard: int) -> None:
    """Remove a shard's file: its label file holds the new rows."""
    with suppress(FileNotFoundError):
        run.storage.remove(join(run.uri, changed_file(shard)))


def _digest(images: object) -> str:
    return hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()
