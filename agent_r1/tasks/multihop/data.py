"""Questions and passages of the multi-hop data sets.

A data folder holds ``<dataset>.jsonl`` (fields ``id``, ``question``, ``answer``; optionally
``aliases``, ``supporting``, ``supporting_ids``, ``decomposition``, ``type``) and
``corpus.<dataset>.jsonl`` (``id``, ``title``, ``text``), each also as ``.jsonl.gz``; its questions
are dealt to the splits by a hash of their id. A folder of official files, or the path ``hub``,
is converted to that form once, see ``convert.py``; then test is the official dev split, and
validation a share of train.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.tasks.multihop.convert import HUB, OFFICIAL, converted, official_files
from agent_r1.tasks.row_file import BadRows, RowFile
from agent_r1.tasks.splits import deal
from agent_r1.types import Task
from agent_r1.utils.scope import kept

LISTS = ("aliases", "supporting", "supporting_ids")


def load_split(
    path: str,
    datasets: Sequence[str],
    split: str,
    holdout: float,
    bad_rows: BadRows = "error",
) -> list[Task]:
    """The tasks of a split, one of each data set in turn. In training, smaller sets are repeated
    up to the size of the largest: equal shares, as in the paper.
    """
    sets = [
        _of_split(load_questions(path, name, bad_rows), name, split, holdout) for name in datasets
    ]
    owner: dict[str, str] = {}
    for name, tasks in zip(datasets, sets, strict=True):
        for task in tasks:
            if owner.setdefault(task.id, name) != name:
                raise ConfigError(
                    f"env.datasets: the id {task.id!r} stands in {owner[task.id]!r} and in {name!r}"
                )
    if split == "train":
        longest = max(map(len, sets))
        sets = [list(itertools.islice(itertools.cycle(tasks), longest)) for tasks in sets]
    return [task for turn in itertools.zip_longest(*sets) for task in turn if task is not None]


def _of_split(tasks: Sequence[Task], dataset: str, split: str, holdout: float) -> Sequence[Task]:
    if tasks[0].data["part"] is None:
        return deal(tasks, split, holdout)
    part = "dev" if split == "test" else "train"
    official = [task for task in tasks if task.data["part"] == part]
    if not official:
        names = " or ".join(OFFICIAL[dataset][part])
        raise ConfigError(f"env.datasets: of {dataset!r} there is no {part} file ({names})")
    if split == "test":
        return official
    held_out = {task.id for task in deal(official, "validation", holdout)}
    return [task for task in official if (task.id in held_out) == (split == "validation")]


def corpus_files(path: str, datasets: Sequence[str]) -> tuple[Path, ...]:
    """The passage files of the data sets."""
    return tuple(_file(path, dataset, f"corpus.{dataset}") for dataset in datasets)


@kept
def load_questions(path: str, dataset: str, bad_rows: BadRows = "error") -> list[Task]:
    """The questions of a data set, in the file's order."""
    rows = RowFile(_file(path, dataset, dataset), bad_rows)
    tasks = []
    lines: dict[str, int] = {}
    for line, row in rows:
        try:
            task = _task(row, dataset)
        except ValueError as error:
            rows.bad(line, str(error))
            continue
        if (first := lines.setdefault(task.id, line)) != line:
            rows.bad(line, f"the id {task.id!r} is that of line {first}, too")
            continue
        tasks.append(task)
    if not tasks:
        raise ConfigError(f"{rows.file} has no questions")
    return tasks


def _task(row: dict[str, Any], dataset: str) -> Task:
    """A row's task; a ``ValueError`` says what is wrong with the row."""
    for field in ("id", "question", "answer"):
        if not isinstance(row.get(field), str):
            raise ValueError(f"needs the text field {field!r}")
    data: dict[str, Any] = {}
    for field in LISTS:
        value = row.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{field!r} must be a list of texts")
        data[field] = value
    try:
        data["decomposition"] = _queries(row.get("decomposition") or [])
    except (KeyError, TypeError) as error:
        raise ValueError(
            "'decomposition' must be a list of objects with 'question' and 'answer'"
        ) from error
    data |= {"type": str(row.get("type", "")), "part": row.get("part")}
    return Task(row["id"], row["question"], row["answer"], dataset, data)


def _queries(steps: list[dict[str, Any]]) -> list[str]:
    """MuSiQue's sub-questions with the answers that they refer to (``#1``) put in."""
    answers = [str(step["answer"]) for step in steps]

    def known(reference: re.Match[str]) -> str:
        number = int(reference[1])
        return answers[number - 1] if 0 < number <= len(answers) else reference[0]

    queries = (re.sub(r"#(\d+)", known, str(step["question"])) for step in steps)
    return [" ".join(query.replace(">>", " ").rstrip("? ").split()) for query in queries]


@kept
def _file(path: str, dataset: str, name: str) -> Path:
    """The file of that name in the data folder, or in the converted data set."""
    folder = Path(path).expanduser()
    files = () if path == "hub" else official_files(folder, dataset)
    if path == "hub" and dataset not in HUB:
        raise ConfigError(
            f"env.datasets: {dataset!r} is not known on the hub; known: {', '.join(HUB)}"
        )
    if folder.is_file():
        raise ConfigError(f"env.path = {path!r}: name the folder, not a file in it")
    choices = [folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"]
    if found := next((choice for choice in choices if choice.exists()), None):
        return found
    if path == "hub" or files:
        return converted(dataset, files) / f"{name}.jsonl"
    raise ConfigError(
        f"env.path = {path!r}: there is no {choices[0].name} or {choices[1].name} in it, and no "
        f"official files of {dataset!r}; env.datasets names the data sets, env.path the folder"
    )
