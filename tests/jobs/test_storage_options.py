"""Options of a store: what is text stays text, what is wrong is one line without the value."""

from pathlib import Path

import pytest

from cliper.jobs.storage_options import parse_options
from cliper.model.errors import ConfigError


@pytest.mark.parametrize(
    "value", ["0123456", "null", "yes", "12:30:45", "@mine", "a=b", "{x", "- y", "'quoted'", "", "1e5", "#1"]
)
@pytest.mark.parametrize("name", ["secret", "key", "token", "password"])
def test_keys_are_text(name: str, value: str) -> None:
    assert parse_options([f"{name}={value}"]) == {name: value}


def test_other_values_have_their_type() -> None:
    found = parse_options(["anon=True", "use_ssl=false", "port=99", "client_kwargs={region_name: eu-west-1}"])
    assert found == {"anon": True, "use_ssl": False, "port": 99, "client_kwargs": {"region_name": "eu-west-1"}}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("hidden", "expects KEY=VALUE"),
        ("sekret=hidden", "no storage option 'sekret'"),
        ("anon=hidden", "anon is true or false"),
        ("port=hidden", "port is a whole number"),
        ("client_kwargs=hidden", "client_kwargs is a mapping"),
        ("client_kwargs={a: @hidden", "client_kwargs is a mapping"),
        ("@/nowhere/file", "cannot be read"),
    ],
)
def test_mistakes_are_one_line_without_the_value(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_options([pair])
    assert "hidden" not in str(raised.value).replace("@hidden", "hidden")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_file_and_the_environment_hold_what_ps_must_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options").write_text("# the bucket's keys\nkey=0042\n\nsecret=@a=b\n")
    monkeypatch.setenv("CLIPER_STORAGE_OPTION_SECRET", "of the environment")
    monkeypatch.setenv("CLIPER_STORAGE_OPTION_TOKEN", "0x1")
    found = parse_options([f"@{tmp_path}/options", "anon=false"])
    assert found == {"key": "0042", "secret": "@a=b", "token": "0x1", "anon": False}
    assert capsys.readouterr().err == ""
    parse_options(["secret=typed"])
    assert "visible to every user" in (said := capsys.readouterr().err)
    assert "typed" not in said
