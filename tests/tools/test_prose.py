"""The project's English keeps its plain rates; `python -m tools.prose --where` lists the places."""

from tools.prose import TURNS, count

MOST = {"what <word>": 1.0}  # per 1,000 words
ELSE = 0.3


def test_the_prose_is_plain() -> None:
    words, places = count()
    assert words > 30_000
    rates = {name: 1000 * len(places[name]) / words for name in TURNS}
    assert {name: rate for name, rate in rates.items() if rate > MOST.get(name, ELSE)} == {}
