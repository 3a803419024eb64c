"""Small databases and questions about them, made from a seed: the generated part of ``database``.

A database has people, things and links between them (customers order products, readers borrow
books, patients see doctors), and a table or two that no question is about. Questions need one, two
or three tables.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_FIRST = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ines", "Jan", "Kira", "Leo")
_LAST = ("Moss", "Reed", "Hale", "Stone", "Vogel", "Blum", "Costa", "Dahl", "Ek", "Frey")
_CITIES = ("Lyon", "Oslo", "Porto", "Turin", "Ghent", "Graz")


@dataclass(frozen=True)
class Domain:
    """The words of one kind of database.

    Attributes:
        people, things, links: Names of the tables.
        person, thing: Names of the columns in ``links`` that point to them.
        amount: The whole number that a thing has, e.g. its price.
        count: The whole number that a link has, e.g. a quantity.
        names: Names of things.
        verb: Verb for what a person does with a thing, plain form.
        others: Further tables, with one column of text.
    """

    people: str
    things: str
    links: str
    person: str
    thing: str
    amount: str
    count: str
    names: tuple[str, ...]
    verb: str
    others: tuple[str, ...]


DOMAINS = (
    Domain(
        "customers", "products", "orders", "customer_id", "product_id", "price", "quantity",
        ("lamp", "chair", "desk", "vase", "rug", "clock", "shelf", "mirror"),
        "order", ("suppliers", "warehouses"),
    ),
    Domain(
        "readers", "books", "loans", "reader_id", "book_id", "pages", "days",
        ("Dune", "Emma", "Ulysses", "Walden", "Ivanhoe", "Dracula", "Candide", "Faust"),
        "borrow", ("branches", "publishers"),
    ),
    Domain(
        "patients", "treatments", "visits", "patient_id", "treatment_id", "cost", "minutes",
        ("massage", "x-ray", "vaccination", "check-up", "dressing", "blood test"),
        "receive", ("rooms", "insurers"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question and the SQL that answers it with one value."""

    text: str
    sql: str
    tables: int


def build_database(seed: int, num_tables: int) -> tuple[str, Question]:
    """The SQL script of a database, and a question that needs ``num_tables`` of its tables."""
    rng = random.Random(seed)
    domain = rng.choice(DOMAINS)
    people = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 12)
    things = rng.sample(domain.names, 6)
    amounts = rng.sample(range(5, 95), len(things))  # all different: the highest is unique
    links = [
        (rng.randrange(1, 13), rng.randrange(1, len(things) + 1), rng.randrange(1, 10))
        for _ in range(30)
    ]
    tables = [
        _table(
            domain.people,
            ("name TEXT", "city TEXT"),
            [(name, rng.choice(_CITIES)) for name in people],
        ),
        _table(
            domain.things,
            ("title TEXT", f"{domain.amount} INTEGER"),
            list(zip(things, amounts, strict=True)),
        ),
        _table(
            domain.links,
            (
                f"{domain.person} INTEGER REFERENCES {domain.people}(id)",
                f"{domain.thing} INTEGER REFERENCES {domain.things}(id)",
                f"{domain.count} INTEGER",
            ),
            links,
        ),
        *(
            _table(other, ("name TEXT",), [(rng.choice(_CITIES),)])
            for other in rng.sample(domain.others, rng.randint(1, 2))
        ),
    ]
    rng.shuffle(tables)
    person = people[rng.choice(links)[0] - 1]  # one who has done something
    return "\n".join(tables), _question(rng, domain, num_tables, person, rng.choice(things))


def _table(name: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    values = ",\n  ".join(
        f"({number}, {', '.join(map(_literal, row))})" for number, row in enumerate(rows, 1)
    )
    head = f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, {', '.join(columns)});"
    return f"{head}\nINSERT INTO {name} VALUES\n  {values};"


def _literal(value: object) -> str:
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def _question(rng: random.Random, d: Domain, num_tables: int, person: str, thing: str) -> Question:
    city = rng.choice(_CITIES)
    at = f"JOIN {d.people} p ON p.id = l.{d.person}"
    of = f"JOIN {d.things} t ON t.id = l.{d.thing}"
    choices = {
        1: [
            (f"How many {d.people} are from {city}?",
             f"SELECT COUNT(*) FROM {d.people} WHERE city = '{city}'"),
            (f"Which city is {person} from?",
             f"SELECT city FROM {d.people} WHERE name = '{person}'"),
            (f"What is the {d.amount} of {thing}?",
             f"SELECT {d.amount} FROM {d.things} WHERE title = '{thing}'"),
            (f"Which of the {d.things} has the highest {d.amount}?",
             f"SELECT title FROM {d.things} ORDER BY {d.amount} DESC LIMIT 1"),
        ],
        2: [
            (f"How many {d.links} does {person} have?",
             f"SELECT COUNT(*) FROM {d.links} l {at} WHERE p.name = '{person}'"),
            (f"How many {d.links} are there of {thing}?",
             f"SELECT COUNT(*) FROM {d.links} l {of} WHERE t.title = '{thing}'"),
            (f"What is the sum of {d.count} over the {d.links} of {person}?",
             f"SELECT SUM(l.{d.count}) FROM {d.links} l {at} WHERE p.name = '{person}'"),
        ],
        3: [
            (f"How many different {d.things} did {person} {d.verb}?",
             f"SELECT COUNT(DISTINCT t.title) FROM {d.links} l {at} {of} "
             f"WHERE p.name = '{person}'"),
            (f"What is the highest {d.amount} among the {d.things} that {person} did {d.verb}?",
             f"SELECT MAX(t.{d.amount}) FROM {d.links} l {at} {of} WHERE p.name = '{person}'"),
            (f"How many {d.people} from {city} did {d.verb} {thing}?",
             f"SELECT COUNT(DISTINCT p.id) FROM {d.links} l {at} {of} "
             f"WHERE p.city = '{city}' AND t.title = '{thing}'"),
        ],
    }  # fmt: skip
    text, sql = rng.choice(choices[num_tables])
    return Question(text, sql, num_tables)
