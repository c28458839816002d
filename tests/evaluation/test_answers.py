"""What a text claims as its answer."""

from __future__ import annotations

import pytest

from specextend.evaluation.answers import claimed_answer, is_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so 12 and \boxed{204}.", "204"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        ("the total is 1,204 in 3 steps: 17", "17"),
        ("it is 3.5.", "3.5"),
        ("nothing here", None),
    ],
)
def test_last_box_or_last_number_is_the_answer(text, answer):
    assert claimed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "right"), [(r"\boxed{025}", True), (r"\boxed{$25$}", True), ("25 or 26", False), ("", False)]
)
def test_right_is_the_same_number_however_it_is_written(text, right):
    assert is_right(text, "25") == right
