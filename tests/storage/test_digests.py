"""JSON files with a digest: any flipped bit is noticed, and files of before without a digest are read."""

import json

import pytest

from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.sealed import DamagedFileError

CONTENT = {"run": "runs/ä", "images": 12, "iou": 0.1875, "classes": [{"name": "cat"}], "none": None}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("required", [True, False])
def test_any_flipped_bit_is_noticed(indent: int | None, required: bool) -> None:
    written = with_digest(CONTENT, indent)
    assert checked(written, required) == CONTENT
    for place in range(len(written)):
        for bit in range(8):
            damaged = written[:place] + bytes([written[place] ^ (1 << bit)]) + written[place + 1 :]
            try:
                assert checked(damaged, required) == CONTENT, damaged  # e.g. a space of the indentation
            except DamagedFileError:
                continue


def test_a_file_without_a_digest_is_read_unless_one_is_required() -> None:
    assert checked(json.dumps(CONTENT).encode(), required=False) == CONTENT
    with pytest.raises(DamagedFileError):
        checked(json.dumps(CONTENT).encode())
