from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.intervals import wilson_interval


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [  # statsmodels.stats.proportion.proportion_confint(method="wilson")
        (0.0, 10, 0.0, 0.277533),
        (0.5, 10, 0.236593, 0.763407),
        (1.0, 10, 0.722467, 1.0),
        (0.2, 100, 0.133367, 0.288830),
        (1.0, 1, 0.206549, 1.0),
    ],
)
def test_wilson_interval(share, count, low, high):
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-5)


def test_wilson_interval_of_nothing():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_share(count, data):
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    wide = wilson_interval(share, count, z=3.0)
    assert wide[0] <= low + 1e-12
    assert high <= wide[1] + 1e-12
