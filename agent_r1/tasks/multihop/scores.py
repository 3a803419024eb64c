"""Scores of a short answer as the data sets' official scripts compute them, and rewards made of
them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = set(string.punctuation)
_WHOLE = {"yes", "no", "noanswer"}


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as HotpotQA's and SQuAD's official
    scripts.
    """
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(given: str, accepted: Sequence[str]) -> float:
    """1.0 if an accepted answer normalises to the same text, which is not empty."""
    given = normalize_answer(given)
    return float(bool(given) and given in map(normalize_answer, accepted))


def f1_score(given: str, accepted: Sequence[str]) -> float:
    """F1 of the words, after normalisation, with the nearest of the accepted answers; yes, no and
    noanswer must match whole (HotpotQA's script).
    """
    return max(_f1(normalize_answer(given), normalize_answer(gold)) for gold in accepted)


def _f1(given: str, gold: str) -> float:
    if given != gold and {given, gold} & _WHOLE:
        return 0.0
    words, gold_words = given.split(), gold.split()
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0


def contains(text: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer stands somewhere in the text, both normalised (substring match, as
    it is usual in this field: it may begin within a word).
    """
    text = normalize_answer(text)
    return any(gold in text for gold in map(normalize_answer, accepted) if gold)


def paper_reward(em: float, *, answer_ok: bool, calls_ok: bool) -> float:
    """EM if the format is right, else the format's score - 1, which is the mean of whether the
    answer's format and the calls' syntax are right (Agent-R1, arXiv 2511.14460, equation 6).
    """
    return em if answer_ok and calls_ok else (answer_ok + calls_ok) / 2 - 1.0


def graded_reward(
    answer: str | None, last: str, accepted: Sequence[str], *, num_calls: int
) -> float:
    """The reward of the authors' first public scripts: -1, plus half a point for each well-formed
    call and half for answer tags, at most 1 for both; with at least half a point, plus 1 for an
    accepted answer within the tags, or .2 if only the last message contains one. The scripts also
    ask for a thought before each, which is left out here.
    """
    points = min(1.0, 0.5 * num_calls + 0.5 * (answer is not None))
    if points < 0.5:
        return points - 1.0
    if answer is not None and contains(answer, accepted):
        return points
    return points - 1.0 + 0.2 * contains(last, accepted)
