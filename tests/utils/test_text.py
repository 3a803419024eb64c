"""Values of others as text."""

import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from pydantic import BaseModel

from agent_r1.errors import NotTextError
from agent_r1.utils.text import as_text, clean, clean_json, describe


class Weather(BaseModel):
    day: datetime.date
    degrees: decimal.Decimal


@dataclasses.dataclass
class Pair:
    left: int
    right: frozenset[str]


class Colour(enum.Enum):
    RED = "red"


DAY = datetime.date(2024, 2, 29)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (["one", "two"], "one\ntwo"),
        (None, "null"),
        (np.int64(7), "7"),
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        ({"when": DAY, "n": np.float32(0.5)}, '{"when": "2024-02-29", "n": 0.5}'),
        (DAY, "2024-02-29"),
        (decimal.Decimal("1.10"), "1.10"),
        (Weather(day=DAY, degrees="3.5"), '{"day": "2024-02-29", "degrees": "3.5"}'),
        (Pair(1, frozenset("ba")), '{"left": 1, "right": ["a", "b"]}'),
        ({3, 1, 2}, "[1, 2, 3]"),
        (Colour.RED, "red"),
        (fractions.Fraction(1, 3), "1/3"),
        (pathlib.PurePosixPath("/tmp/x"), "/tmp/x"),
        (b"bytes that are text", "bytes that are text"),
        ({"key": float("inf")}, '{"key": Infinity}'),
        ("half \ud83d, whole \ud83d\ude00, nul \x00", "half \ufffd, whole \U0001f600, nul "),
    ],
)
def test_any_ordinary_value_is_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize("value", [object(), b"\x89PNG\x00", {"x": object()}, lambda: 1])
def test_what_has_no_text_says_so(value):
    with pytest.raises(NotTextError):
        as_text(value)


def test_a_set_is_the_same_text_in_every_process():
    code = (
        "from agent_r1.utils.text import as_text\n"
        "print(as_text({'x': [{'pear', 'fig', 'plum', 'kiwi'}]}))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert texts == {'{"x": [["fig", "kiwi", "pear", "plum"]]}\n'}


def test_clean_text_can_be_encoded_and_clean_text_stays():
    assert clean("\udfff\x00a").encode() == "\ufffda".encode()
    text = "z\u00fcrich \U0001f600"
    assert clean(text) is text
    assert clean_json({"\ud83d": ["\ud83d", 1, None]}) == {"\ufffd": ["\ufffd", 1, None]}


def test_an_exception_whose_words_fail_is_described_all_the_same():
    class BrokenError(Exception):
        def __str__(self):
            raise ValueError

    assert describe(BrokenError()) == "BrokenError: (its text cannot be read)"
    assert describe(KeyError()) == "KeyError"
