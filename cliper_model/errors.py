"""Errors that users can cause. Messages name the problem, the value, the allowed values and the next step."""


class CliperError(Exception):
    """Base of all expected errors: the commands print the message alone and exit with code 2."""


class ConfigError(CliperError):
    """A setting is unknown, of the wrong type, or impossible together with another."""


class WeightsError(CliperError):
    """Weights are missing, unreadable, or do not fit the requested architecture."""


class ClassListError(CliperError):
    """A class list is empty, has duplicates or blank lines, or is too long for the mask's integers."""
