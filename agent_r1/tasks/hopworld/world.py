"""HopWorld: invented people, facts about them, and questions that need one search per hop.

A world has 20 people and 5 relations, hence 100 one-sentence documents ("The rival of Bana Dont is
Miri Teck."). First and last names come from pools of 96 and 96, of which a world uses 10 and 10, so
that names overlap and distract. A question of two hops, "Who is the friend of the rival of Bana
Dont?", cannot be answered by one search. Worlds are built from the task's seed; no world is in two
splits.

Worlds come in two families: in one of *namesakes* all names come from 5 and 5, so that nearly every
document that a search finds is about somebody of the same first or last name.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agent_r1.types import Task, derive_seed

_ONSETS = "BDFGHKLMNPRT"
_FIRST_RIMES = ("ana", "elo", "iri", "omu", "uke", "avi", "eda", "ost")
_LAST_RIMES = ("arn", "eck", "ild", "ont", "ush", "amp", "erg", "iff")
FIRST_NAMES = [onset + rime for onset in _ONSETS for rime in _FIRST_RIMES]
LAST_NAMES = [onset + rime for onset in _ONSETS for rime in _LAST_RIMES]
RELATIONS = ["mentor", "rival", "cousin", "friend", "neighbor"]
NUM_PEOPLE = 20
NUM_NAMES = {"people": 10, "namesakes": 5}
"""First names, and last names, of a world, by family."""
NUM_TASKS = 100_000
"""Tasks in a split; worlds are built when asked for, so this costs nothing."""


@dataclass(frozen=True)
class Fact:
    """One document: the ``relation`` of ``subject`` is ``object``."""

    subject: str
    relation: str
    object: str

    @property
    def text(self) -> str:
        return f"The {self.relation} of {self.subject} is {self.object}."

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """Weight of a match of each word: 2 for subject and relation, else 1."""
        own = {*self.subject.lower().split(), self.relation}
        return {word: 2.0 if word in own else 1.0 for word in _words(self.text)}


@dataclass(frozen=True)
class World:
    """All facts, in corpus order, and a question about them. ``chain`` is the facts that answer
    it, in order.
    """

    facts: list[Fact]
    chain: list[Fact]

    @property
    def question(self) -> str:
        return f"Who is {self.remaining(0)}?"

    @property
    def answer(self) -> str:
        return self.chain[-1].object

    def remaining(self, hops_done: int) -> str:
        """The question left after some hops: ``"the friend of the rival of Bana Dont"``."""
        relations = [fact.relation for fact in reversed(self.chain[hops_done:])]
        return "".join(f"the {r} of " for r in relations) + self.chain[hops_done].subject


def build_world(seed: int, num_hops: int, family: str = "people") -> World:
    """The world of a seed with a question of that many hops, whose people are all different."""
    rng = random.Random(seed)
    num_names = NUM_NAMES[family]
    firsts, lasts = rng.sample(FIRST_NAMES, num_names), rng.sample(LAST_NAMES, num_names)
    people = rng.sample([f"{first} {last}" for first in firsts for last in lasts], NUM_PEOPLE)
    facts = {
        (subject, relation): Fact(
            subject, relation, rng.choice([other for other in people if other != subject])
        )
        for subject in people
        for relation in RELATIONS
    }
    chain: list[Fact] = []
    seen = {rng.choice(people)}
    subject = next(iter(seen))
    while len(chain) < num_hops:
        choices = [facts[subject, r] for r in RELATIONS if facts[subject, r].object not in seen]
        chain.append(rng.choice(choices))
        subject = chain[-1].object
        seen.add(subject)
    corpus = list(facts.values())
    rng.shuffle(corpus)
    return World(corpus, chain)


def search_facts(facts: Sequence[Fact], query: str, k: int = 3) -> list[Fact]:
    """The k best facts by idf of the shared words, the subject's counting double, in corpus order.

    Corpus order, because the rank must not give the answer away.
    """
    idf = {}
    for word in sorted(set(_words(query))):  # sorted: a sum of floats depends on the order
        if frequency := sum(word in fact.weights for fact in facts):
            idf[word] = math.log(len(facts) / frequency)

    def score(index: int) -> float:
        weights = facts[index].weights
        return sum(value * weights[word] for word, value in idf.items() if word in weights)

    best = sorted(range(len(facts)), key=lambda index: (-score(index), index))[:k]
    return [facts[index] for index in sorted(best)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def make_task(
    seed: int, split: str, hops: Sequence[int], families: Sequence[str], index: int
) -> Task:
    """A task of a split; it depends on (seed, split, index) and the cycles only."""
    num_hops = hops[index % len(hops)]
    world_seed = derive_seed("hopworld", seed, split, index)
    family = families[index // len(hops) % len(families)]
    world = build_world(world_seed, num_hops, family)
    return Task(
        id=f"hopworld-{seed}-{split}-{index}",
        question=world.question,
        answer=world.answer,
        category=str(num_hops) if len(families) == 1 else f"{num_hops} {family}",
        data={"seed": world_seed, "hops": num_hops, "family": family},
    )
