"""Somebody else's words become one line that can be printed, stored and logged."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from npd.errors import foreign


@given(st.text(st.characters(codec=None), max_size=400) | st.binary(max_size=80), st.integers(1, 60))
def test_one_safe_line_of_bounded_length(value: object, limit: int) -> None:
    said = foreign(value, limit)
    assert said.isprintable()
    said.encode()
    assert len(said) <= limit + len("… (4000 characters)")


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=200))
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert foreign(text) == text


def test_what_is_left_out_is_told() -> None:
    assert foreign("a\x1b[31m\n\tb\u202ec\ud800d\x07") == "a[31m bcd"
    assert foreign("x" * 1000, 10) == "xxxxxxxxxx… (1000 characters)"
    assert foreign("y" * 100_000, 3) == "yyy… (100000 characters)"


def test_what_cannot_be_shown_is_named() -> None:
    assert "int that can't be shown" in foreign(10 ** (sys.get_int_max_str_digits() + 1))
