"""`--storage-option`: settings of a store, from the command line, a file or the environment.

Values of names in TEXT are taken as they are written: a key may look like a number or begin with any character.
No message repeats a value.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cliper.jobs.session import say
from cliper.model.errors import ConfigError
from cliper.pipeline.config import parse_yaml

StorageOption = Annotated[
    list[str] | None,
    typer.Option(help="Setting of the store, or a file of them; repeat for more", metavar="KEY=VALUE|@FILE"),
]

SECRET = frozenset(
    {
        *("secret", "token", "password", "account_key", "sas_token", "connection_string", "client_secret"),
        *("passphrase", "api_key"),
    }
)
TEXT = SECRET | {
    *("key", "username", "user", "account_name", "client_id", "tenant_id", "project", "profile", "endpoint_url"),
    *("endpoint", "host", "access", "consistency", "version_aware_id", "requester_project", "proxy", "region"),
}
SWITCHES = frozenset({"anon", "use_ssl", "requester_pays", "version_aware", "encoded", "ssl", "trust_env"})
NUMBERS = frozenset({"port", "default_block_size", "max_concurrency", "timeout"})
MAPPINGS = frozenset({"headers", "client_kwargs", "config_kwargs", "s3_additional_kwargs"})
KNOWN = TEXT | SWITCHES | NUMBERS | MAPPINGS

ENVIRONMENT = "CLIPER_STORAGE_OPTION_"  # followed by the option's name in upper case


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Options of a store: those of the environment, then KEY=VALUE pairs and `@FILE`s in order; the last counts.

    A file holds one KEY=VALUE a line; lines that begin with # are comments. Raises ConfigError, which never holds
    a value.
    """
    options = _from_environment()
    for pair in pairs:
        if pair.startswith("@"):
            options |= _from_file(Path(pair[1:]).expanduser())
            continue
        name, value = _option(pair, "--storage-option")
        if name in SECRET:
            say(
                f"--storage-option {name}=... is visible to every user of this machine (ps); prefer the variable "
                f"{ENVIRONMENT}{name.upper()}, or a file: --storage-option @FILE"
            )
        options[name] = value
    return options


def _from_environment() -> dict[str, Any]:
    found = sorted(name for name in os.environ if name.startswith(ENVIRONMENT))
    pairs = (f"{name.removeprefix(ENVIRONMENT).lower()}={os.environ[name]}" for name in found)
    return dict(_option(pair, "the environment") for pair in pairs)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"--storage-option @{path}: it is not a regular file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--storage-option @{path} cannot be read: {reason}") from None
    return dict(_options(text.splitlines(), str(path)))


def _options(lines: Iterable[str], source: str) -> Iterable[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _option(line.strip(), f"{source}, line {number}")


def _option(pair: str, source: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"{source} expects KEY=VALUE, e.g. --storage-option anon=true, or @FILE")
    if name not in KNOWN:
        raise ConfigError(f"{source}: there is no storage option '{name:.40}'; known: {', '.join(sorted(KNOWN))}")
    return name, _value(name, value, source)


def _value(name: str, value: str, source: str) -> Any:
    if name in SWITCHES:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{source}: {name} is true or false")
        return value.lower() == "true"
    if name in NUMBERS:
        if not (value.isascii() and value.isdigit() and len(value) < 12):
            raise ConfigError(f"{source}: {name} is a whole number")
        return int(value)
    if name in MAPPINGS:
        return _mapping(name, value, source)
    return value


def _mapping(name: str, value: str, source: str) -> dict[str, Any]:
    try:
        content = parse_yaml(value, name)
    except ConfigError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: {name} is a mapping, e.g. {name}='{{name: value}}'") from None
    return content
