"""The errors a user can cause. Every message names what is wrong, the value, what is allowed, and what to do."""


class CliperError(Exception):
    """Base of all expected errors: the commands print the message alone and exit with code 2."""


class ConfigError(CliperError):
    """A setting is unknown, of the wrong type, or impossible together with another."""


class WeightsError(CliperError):
    """Weights are missing, unreadable, or do not fit the architecture that was asked for."""


class ClassListError(CliperError):
    """A class list is empty, has duplicates or blank lines, or is too long for the mask's integers."""
