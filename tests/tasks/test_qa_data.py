"""Where questions come from: our files, the official ones, the hub; and what is wrong with them."""

import asyncio
import gzip
import json
import shutil

import pytest

from agent_r1.envs.gold import as_message, gold_of
from agent_r1.errors import ConfigError
from agent_r1.tasks.multihop.convert import HUB
from agent_r1.tasks.multihop.data import corpus_files, load_questions, load_split
from agent_r1.tasks.multihop.env import MultiHop
from tests import DATA_FOLDER

DATA = DATA_FOLDER / "multihop"
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hotpot(number, question="Who wrote it?"):
    return {
        "_id": f"h{number}",
        "question": f"{question} {number}",
        "answer": "Ann",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [["Ann", 0], ["It", 1], ["Ann", 1]],
        "context": [
            ["It", ["It is a book. ", " By Ann."]],
            [f"No {number}", ["x"]],
            ["Ann", ["A."]],
        ],
    }


def musique(number):
    return {
        "id": f"2hop__{number}",
        "question": "When did the maker of It die?",
        "answer": "1901",
        "answer_aliases": ["in 1901"],
        "answerable": True,
        "paragraphs": [
            {"idx": 0, "title": "It", "paragraph_text": "Made by Ann.", "is_supporting": True},
            {"idx": 1, "title": "Bo", "paragraph_text": "A dog.", "is_supporting": False},
            {"idx": 2, "title": "Ann", "paragraph_text": "Died 1901.", "is_supporting": True},
        ],
        "question_decomposition": [
            {"id": 1, "question": "It >> maker", "answer": "Ann", "paragraph_support_idx": 0},
            {"id": 2, "question": "When did #1 die?", "answer": "1901", "paragraph_support_idx": 2},
        ],
    }


def test_splits_are_disjoint_complete_and_in_turn():
    parts = [load_split(str(DATA), ["invented"], split, 0.2) for split in SPLITS]
    ids = [task.id for part in parts for task in part]
    assert len(ids) == len(set(ids)) == 20
    assert parts == [load_split(str(DATA), ["invented"], split, 0.2) for split in SPLITS]


def test_training_takes_equal_shares_of_the_data_sets(tmp_path):
    lines = (DATA / "invented.jsonl").read_text().splitlines(keepends=True)
    few = "".join(lines[:8]).replace('"id": "q', '"id": "f')
    (tmp_path / "few.jsonl").write_text(few)
    (tmp_path / "many.jsonl").write_text("".join(lines))
    train = load_split(str(tmp_path), ["few", "many"], "train", 0.3)
    assert [task.category for task in train[:4]] == ["few", "many", "few", "many"]
    of_few = [task.id for task in train if task.category == "few"]
    assert len(of_few) == len(train) / 2 > len(set(of_few)), "the smaller set begins again"
    test = load_split(str(tmp_path), ["few", "many"], "test", 0.3)
    assert len({task.id for task in test}) == len(test)


def test_gzip_is_read_too(tmp_path):
    for name in ("invented.jsonl", "corpus.invented.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((DATA / name).read_bytes()))
    assert load_questions(str(tmp_path), "invented") == load_questions(str(DATA), "invented")
    assert corpus_files(str(tmp_path), ["invented"]) == (tmp_path / "corpus.invented.jsonl.gz",)


def play_gold(settings, task):
    async def play():
        env = MultiHop(settings)
        await env.reset(task, 0)
        for said in gold_of(env):
            await env.step(as_message(said))
        return await env.outcome()

    return asyncio.run(play())


def test_official_hotpotqa_files(tmp_path):
    (tmp_path / "hotpot_train_v1.1.json").write_text(json.dumps([hotpot(n) for n in range(30)]))
    dev = [hotpot(n, "Who?") for n in range(100, 105)]
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(dev))
    train, validation, test = (load_split(str(tmp_path), ["hotpotqa"], s, 0.2) for s in SPLITS)
    assert [task.id for task in test] == [f"h{n}" for n in range(100, 105)], (
        "the official dev split"
    )
    assert len(train) + len(validation) == 30
    assert 0 < len(validation) < 15
    settings = MultiHop.Settings(path=str(tmp_path), datasets=("hotpotqa",), k=2)
    assert test[0].data["supporting"] == ["Ann", "It"]
    (file,) = corpus_files(str(tmp_path), ["hotpotqa"])
    passages = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(passages) == 2 + 35, "a passage that came with several questions is there once"
    assert passages[0] == {"id": "hotpotqa-0", "title": "It", "text": "It is a book. By Ann."}
    assert play_gold(settings, test[0]).metrics["supporting_recall"] == 1.0


def test_official_musique_files_in_a_folder_of_their_own(tmp_path):
    folder = tmp_path / "musique"
    folder.mkdir()
    for part, numbers in (("train", range(30)), ("dev", range(50, 53))):
        rows = "".join(json.dumps(musique(n)) + "\n" for n in numbers)
        (folder / f"musique_ans_v1.0_{part}.jsonl").write_text(rows)
    test = load_split(str(tmp_path), ["musique"], "test", 0.1)
    assert len(test) == 3
    assert test[0].data["decomposition"] == ["It maker", "When did Ann die"]
    assert test[0].data["aliases"] == ["in 1901"]
    settings = MultiHop.Settings(path=str(tmp_path), datasets=("musique",), k=2)
    assert play_gold(settings, test[0]).metrics["supporting_recall"] == 1.0


def test_the_hub_by_the_library_datasets(tmp_path, monkeypatch):
    """A data set in the hub's form, read by the real library from a folder instead of the hub."""
    import datasets

    def row(number):
        row = hotpot(number)
        facts, context = row.pop("supporting_facts"), row.pop("context")
        return {
            **{key: row[key] for key in ("question", "answer", "type", "level")},
            "id": row["_id"],
            "supporting_facts": {"title": [t for t, _ in facts], "sent_id": [i for _, i in facts]},
            "context": {"title": [t for t, _ in context], "sentences": [s for _, s in context]},
        }

    folder = tmp_path / "hotpot_qa"
    folder.mkdir()
    for split, numbers in (("train", range(20)), ("validation", range(50, 53))):
        table = datasets.Dataset.from_list([row(n) for n in numbers])
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setitem(HUB, "hotpotqa", (str(folder), None))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    test = load_split("hub", ["hotpotqa"], "test", 0.2)
    assert [task.id for task in test] == ["h50", "h51", "h52"]
    assert test[0].data["supporting"] == ["Ann", "It"]
    monkeypatch.setitem(HUB, "musique", (str(tmp_path / "none"), None))
    with pytest.raises(ConfigError, match=r"env\.path = 'hub': .*none.* cannot be loaded"):
        load_questions("hub", "musique")
    with pytest.raises(ConfigError, match=r"'squad' is not known on the hub; known: hotpotqa"):
        load_questions("hub", "squad")


def test_bad_files_are_named(tmp_path):
    def load(line):
        (tmp_path / "invented.jsonl").write_text(line + "\n")
        return load_questions(str(tmp_path), "invented")

    with pytest.raises(ConfigError, match=r"env\.path.*invented\.jsonl.*env\.datasets"):
        load_questions(str(tmp_path), "invented")
    shutil.copy(DATA / "corpus.invented.jsonl", tmp_path / "corpus.jsonl")
    with pytest.raises(ConfigError, match=r"invented\.jsonl, line 1.*'question'"):
        load('{"id": "a", "title": "b"}')
    with pytest.raises(ConfigError, match=r"invented\.jsonl, line 1: not valid JSON"):
        load('{"id": "a"')
    row = {"id": "a", "question": "b", "answer": "c"}
    with pytest.raises(ConfigError, match=r"line 1: 'aliases' must be a list of texts"):
        load(json.dumps({**row, "aliases": "d"}))
    with pytest.raises(ConfigError, match=r"line 1: 'decomposition' must be"):
        load(json.dumps({**row, "decomposition": ["d"]}))
    with pytest.raises(ConfigError, match=r"name the folder, not a file in it"):
        load_questions(str(tmp_path / "invented.jsonl"), "mine")
    assert MultiHop.Settings(path="x", datasets="mine").datasets == ("mine",)
    assert load(json.dumps(row))[0].data["supporting"] == []
    with pytest.raises(ConfigError, match=r"env\.holdout = 0\.1: none of 1 tasks .*'validation'"):
        load_split(str(tmp_path), ["invented"], "validation", 0.1)


def test_official_files_that_are_not_as_they_should_be(tmp_path):
    file = tmp_path / "hotpot_train_v1.1.json"
    file.write_text(json.dumps([hotpot(0), {"_id": "h1"}]))
    with pytest.raises(ConfigError, match=r"hotpot_train_v1\.1\.json, question 2: .*context"):
        load_questions(str(tmp_path), "hotpotqa")
    file.write_text("[")
    with pytest.raises(ConfigError, match=r"hotpot_train_v1\.1\.json: not valid JSON"):
        load_questions(str(tmp_path), "hotpotqa")


def test_one_official_file_is_not_enough(tmp_path):
    rows = json.dumps([hotpot(n) for n in range(9)])
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(rows)
    assert len(load_split(str(tmp_path), ["hotpotqa"], "test", 0.2)) == 9
    with pytest.raises(ConfigError, match=r"'hotpotqa' there is no train file \(hotpot_train"):
        load_split(str(tmp_path), ["hotpotqa"], "train", 0.2)


def test_an_id_given_twice_is_an_error(tmp_path):
    row = json.dumps({"id": "a", "question": "b", "answer": "c"}) + "\n"
    (tmp_path / "twice.jsonl").write_text(row * 2)
    with pytest.raises(ConfigError, match=r"twice\.jsonl, line 2: the id 'a' is that of line 1"):
        load_questions(str(tmp_path), "twice")
