"""Settings of unknown origin: whatever is in them ends within a second, in one line."""

import time
from pathlib import Path

import pytest

from cliper.model.errors import ConfigError
from cliper.pipeline.config import load_config, parse_yaml, shipped

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "[" * 30_000,
        "{a: " * 10_000,
        "- " * 30_000,
        "a: &a [*a]",
        "x: 2020-13-45",
        "x: " + "1" * 60_000,
        "? [a]\n: b",
        "x: !!python/object/apply:os.system [id]",
        "a: b\n" * 100_000,
        "a: [" + "x," * 25_000 + "]",
        "\0",
    ],
)
def test_bombs_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(ConfigError) as raised:
        load_config(str(tmp_path / "bomb.yaml"))
    assert time.perf_counter() - began < 2
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_aliases_of_a_sane_size_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: [*a, *a]", "here") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": [{"x": 1}] * 2,
    }


def test_shipped_settings_are_far_below_the_limits() -> None:
    assert all(path.stat().st_size < 10_000 for path in shipped("label").values())
