"""Archives and containers that are not read, with the command that converts them."""

import json
import posixpath
import shlex
from pathlib import Path

from cliper.pipeline.storage.uris import is_local

_GZIP, _BZIP2, _XZ = "gunzip --keep {file}", "bunzip2 --keep {file}", "unxz --keep {file}"
_ARROW = (
    'python -c "import sys, datasets; datasets.Dataset.from_file(sys.argv[1]).to_parquet(sys.argv[2])" {file} '
    "{stem}.parquet"
)
_FEATHER = (
    'python -c "import sys, pyarrow.feather as f, pyarrow.parquet as p; '
    'p.write_table(f.read_table(sys.argv[1]), sys.argv[2])" {file} {stem}.parquet'
)
_SAVED = (
    'python -c "import sys, datasets; datasets.load_from_disk(sys.argv[1]).to_parquet(sys.argv[2])" {file} '
    "{stem}.parquet"
)
_UNPACK = {
    **dict.fromkeys((".tar.gz", ".tgz", ".gz"), _GZIP),
    **dict.fromkeys((".tar.bz2", ".tbz2", ".bz2"), _BZIP2),
    **dict.fromkeys((".tar.xz", ".txz", ".xz"), _XZ),
    **dict.fromkeys((".tar.zst", ".zst"), "unzstd {file}"),
    ".zip": "python -m zipfile -e {file} {stem}",
    ".7z": "7z x -o{stem} {file}",
    ".rar": "unrar x {file} {stem}/",
}
_CONVERT = {".arrow": _ARROW, ".feather": _FEATHER}
_NO_READER = (".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".h5", ".hdf5", ".npz", ".beton", ".mds")
_ALL = sorted((*_UNPACK, *_CONVERT, *_NO_READER), key=len, reverse=True)


def refusal(uri: str) -> str | None:
    """Why a file is not read, by its name, and the command that converts it; None for a file that is read."""
    name = uri.partition("?")[0] if uri.startswith("http") else uri
    suffix = next((suffix for suffix in _ALL if name.lower().endswith(suffix)), None)
    if suffix is None:
        return None
    place = name if is_local(name) else posixpath.basename(name)
    first = "" if place == name else "copy it to a disk; "
    if suffix in _NO_READER:
        return (
            f"{uri}: {suffix} is not read; write its images to a folder, a .tar, or Parquet with a column of bytes"
        )
    stem = place[: -len(suffix)]
    command = (_UNPACK | _CONVERT)[suffix].format(file=shlex.quote(place), stem=shlex.quote(stem))
    if suffix in _CONVERT:
        return f"{uri}: {suffix} is not read; {first}convert it: {command}; then --format parquet"
    return f"{uri}: {suffix} is not read, for its members have no byte ranges; {first}unpack it: {command}"


def saved_dataset(uri: str) -> str | None:
    """How to convert a local folder that `datasets` wrote with save_to_disk; None for another folder."""
    folder = Path(uri)
    if not is_local(uri) or not folder.is_dir():
        return None
    splits = _splits(folder / "dataset_dict.json")
    if not splits and not (folder / "state.json").is_file():
        return None
    chosen = str(folder / splits[0] if splits else folder)
    command = _SAVED.format(file=shlex.quote(chosen), stem=shlex.quote(chosen))
    also = f"; its splits are {', '.join(splits)}" if len(splits) > 1 else ""
    then = f"--input {shlex.quote(chosen)}.parquet --format parquet"
    return f"a folder of save_to_disk; convert it: {command}; then {then}{also}"


def _splits(file: Path) -> list[str]:
    """The splits that dataset_dict.json names; [] without the file."""
    try:
        found = json.loads(file.read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(split) for split in found] if isinstance(found, list) else []
