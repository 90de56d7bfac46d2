"""Self-contained HTML pages from the templates of this package; they load no other files."""

import base64
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of report/templates; every value is escaped. Raises UndefinedError for a missing value."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    loader = PackageLoader("cliper.pipeline.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["share"] = share
    environment.filters["duration"] = duration
    return environment


def data_uri(kind: str, content: str | bytes) -> str:
    """Content of a media type inline, e.g. for a link that downloads it."""
    data = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def share(value: float) -> str:
    """A fraction as a short percentage: 0.1234 is 12.3%; small values keep one significant digit."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}%" if value >= 0.001 or value == 0 else f"{100 * value:.2g}%"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 3 h 12 min, 4 min 5 s, 12 s."""
    for unit, size, smaller, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // step:.0f} {smaller}"
    return f"{seconds:.3g} s"
