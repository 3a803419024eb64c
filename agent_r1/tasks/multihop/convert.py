"""Converts the data sets' official files, or their copies on the hub, to the one form that is read
here: questions, and in a separate file their passages, each once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.utils.cache_folder import cache_folder, make_folder
from agent_r1.utils.text import clean_json

Row = dict[str, Any]
OFFICIAL: dict[str, dict[str, tuple[str, ...]]] = {
    "hotpotqa": {
        "train": ("hotpot_train_v1.1.json",),
        "dev": ("hotpot_dev_distractor_v1.json", "hotpot_dev_fullwiki_v1.json"),
    },
    "2wikimultihopqa": {"train": ("train.json",), "dev": ("dev.json",)},
    "musique": {
        "train": ("musique_ans_v1.0_train.jsonl",),
        "dev": ("musique_ans_v1.0_dev.jsonl",),
    },
}
"""Names of the official files, in the data folder or in one in it that is named as the data set."""
HUB: dict[str, tuple[str, str | None]] = {
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor"),
    "2wikimultihopqa": ("framolfese/2WikiMultihopQA", None),
    "musique": ("dgslibisey/MuSiQue", None),
}
"""Name and configuration on the hub."""
FORMAT = "1"
"""Version of the converted files."""
HUB_PARTS = {"train": "train", "dev": "validation"}


def official_files(folder: Path, dataset: str) -> tuple[tuple[str, Path], ...]:
    """The official files that exist, each with its part, ``train`` or ``dev``."""
    found = []
    for part, names in OFFICIAL.get(dataset, {}).items():
        places = [place / name for place in (folder / dataset, folder) for name in names]
        found += [(part, place) for place in places if place.is_file()][:1]
    return tuple(found)


def converted(dataset: str, files: tuple[tuple[str, Path], ...]) -> Path:
    """The folder in the cache with the data set in our form, made on first use: from official
    files, or without any from the hub.
    """
    source = [f"{part} {file.name}" for part, file in files] or [repr(HUB[dataset])]
    folder = cache_folder("multihop", [file for _, file in files], FORMAT, dataset, *source)
    if folder.is_dir():
        return folder

    def build(folder: Path) -> None:
        _write(dataset, {p: _read(f) for p, f in files} or _from_hub(dataset), folder)

    return make_folder(folder, build)


def _read(file: Path) -> Iterator[Row]:
    try:
        with file.open(encoding="utf-8") as text:
            rows = map(json.loads, text) if file.suffix == ".jsonl" else iter(json.load(text))
            for number, row in enumerate(rows, 1):
                try:
                    yield _whole(_in_our_form(clean_json(row)))
                except (KeyError, TypeError, IndexError, ValueError) as error:
                    raise ConfigError(
                        f"{file}, question {number}: not as the official files are: "
                        f"{type(error).__name__}: {error}"
                    ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON in UTF-8: {error}") from error


def _whole(row: Row) -> Row:
    """Checks the fields that every question needs."""
    for field in ("id", "question", "answer"):
        if not isinstance(row[field], str):
            raise TypeError(f"{field} is {row[field]!r:.60}, not text")
    return row


def _from_hub(dataset: str) -> dict[str, Iterable[Row]]:
    name, config = HUB[dataset]
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ConfigError(
            "env.path = 'hub' needs the library datasets: pip install 'agent-r1[hub]'"
        ) from error
    try:
        loaded = {p: load_dataset(name, config, split=split) for p, split in HUB_PARTS.items()}
    except Exception as error:  # of many kinds: no network, no such data set, a broken file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"env.path = 'hub': {name!r} cannot be loaded ({reason}); with the official files in a "
            "folder, name that folder"
        ) from error
    return {part: map(_in_our_form, rows) for part, rows in loaded.items()}


def _in_our_form(row: Row) -> Row:
    """A question with ``passages``, pairs of title and text, and the indices of the gold ones."""
    if "paragraphs" in row:
        return _from_musique(row)
    context, facts = row["context"], row["supporting_facts"]
    if isinstance(context, dict):  # the hub's form
        context = list(zip(context["title"], context["sentences"], strict=True))
        facts = list(zip(facts["title"], facts["sent_id"], strict=True))
    titles = list(dict.fromkeys(title for title, _ in facts))
    passages = [(title, " ".join(s.strip() for s in sentences)) for title, sentences in context]
    return {
        "id": row.get("_id") or row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "type": row["type"],
        "passages": passages,
        "gold": [i for t in titles for i, (title, _) in enumerate(passages) if title == t],
    }


def _from_musique(row: Row) -> Row:
    paragraphs, steps = row["paragraphs"], row["question_decomposition"]
    return {
        "id": row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "aliases": list(row["answer_aliases"]),
        "type": row["id"].split("__")[0],
        "decomposition": [{k: step[k] for k in ("question", "answer")} for step in steps],
        "passages": [(p["title"], p["paragraph_text"]) for p in paragraphs],
        "gold": [i for i, p in enumerate(paragraphs) if p["is_supporting"]],
    }


def _write(dataset: str, parts: dict[str, Iterable[Row]], folder: Path) -> None:
    ids: dict[tuple[str, str], str] = {}
    with (
        (folder / f"{dataset}.jsonl").open("w", encoding="utf-8") as questions,
        (folder / f"corpus.{dataset}.jsonl").open("w", encoding="utf-8") as corpus,
    ):
        for part, row in _of_all(parts):
            own = []
            for title, text in map(tuple, row.pop("passages")):
                if (title, text) not in ids:
                    ids[title, text] = f"{dataset}-{len(ids)}"
                    passage = {"id": ids[title, text], "title": title, "text": text}
                    corpus.write(json.dumps(passage, ensure_ascii=False) + "\n")
                own.append((ids[title, text], title))
            gold = [own[index] for index in row.pop("gold")]
            row |= {"supporting_ids": [i for i, _ in gold], "supporting": [t for _, t in gold]}
            questions.write(json.dumps({**row, "part": part}, ensure_ascii=False) + "\n")


def _of_all(parts: dict[str, Iterable[Row]]) -> Iterator[tuple[str, Row]]:
    return itertools.chain.from_iterable(((p, row) for row in rows) for p, rows in parts.items())
