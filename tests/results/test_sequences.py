"""Sequences whose elements are made when they are asked for."""

import pytest

from sparseprune.results.fields import Made


def test_what_is_made_is_a_sequence() -> None:
    made = Made(range(5), str)
    assert (len(made), made[0], made[-1], list(made)) == (5, "0", "4", ["0", "1", "2", "3", "4"])
    assert [list(part) for part in (made[1:3], made[::-2], made[7:])] == [["1", "2"], ["4", "2", "0"], []]
    assert made == ["0", "1", "2", "3", "4"]
    assert "3" in made
    assert made != ["0"]
    assert made != 5
    with pytest.raises(IndexError):
        made[5]
