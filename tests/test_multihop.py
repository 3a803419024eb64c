"""Multi-hop QA on the questions in ``tests/data``: search, scores, rewards, bad files."""

import asyncio
import gzip
import shutil
from pathlib import Path

import pytest

from agent_r1 import check_env
from agent_r1.config import ConfigError
from agent_r1.render.chatml import parse_hermes
from agent_r1.tasks.multihop import MultiHop, exact_match, f1_score, load_index, normalize_answer

DATA = Path(__file__).parent / "data" / "multihop"
SETTINGS = MultiHop.Settings(path=str(DATA), dataset="invented", k=2)
SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call>'


def tasks():
    return [t for s in ("train", "validation", "test") for t in MultiHop.tasks(SETTINGS, s)]


def episode(task, *texts):
    async def play():
        env = MultiHop(SETTINGS)
        await env.reset(task, 0)
        transitions = [await env.step(parse_hermes(text)) for text in texts]
        return transitions, await env.outcome()

    return asyncio.run(play())


def task_of(question_id):
    return next(t for t in tasks() if t.id == question_id)


def test_contract():
    notes = check_env(MultiHop, SETTINGS, num_tasks=20)
    assert any("accepts its own gold answer in 20 of 20" in note for note in notes)


def test_splits_are_disjoint_and_complete():
    assert len(tasks()) == 20
    assert len({t.id for t in tasks()}) == 20


def test_search_finds_both_hops_and_pays_for_each_once():
    transitions, outcome = episode(
        task_of("q00"),
        SEARCH % "Larkmoor Lighthouse architect",
        SEARCH % "Larkmoor Lighthouse architect",
        SEARCH % "Signe Halvorsen born",
        "<answer>kingdom of Norway.</answer>",
    )
    assert "Signe Halvorsen" in transitions[0].messages[0].content
    assert transitions[1].rewards == {"format": 0.0, "supporting": 0.0}
    assert sum(t.rewards.get("supporting", 0.0) for t in transitions) == 1.0
    assert [t.rewards["format"] for t in transitions] == [0.5, 0.0, 0.0, 0.5]
    assert outcome.success
    assert outcome.metrics == {"em": 1.0, "f1": 1.0, "supporting_recall": 1.0, "answered": 1.0}


def test_a_worked_example_comes_as_turns_before_the_question():
    settings = SETTINGS.model_copy(update={"example": True})
    messages = asyncio.run(MultiHop(settings).reset(task_of("q00"), 0))
    roles = [message.role for message in messages]
    assert roles == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert messages[-1].content == task_of("q00").question
    assert len(asyncio.run(MultiHop(SETTINGS).reset(task_of("q00"), 0))) == 2


def test_an_answer_without_tags_scores_nothing():
    _, outcome = episode(task_of("q00"), "Norway")
    assert (outcome.reward, outcome.metrics["answered"]) == (0.0, 0.0)
    _, outcome = episode(task_of("q13"), "<answer>Frisian language</answer>")
    assert outcome.reward == 0.0
    assert outcome.metrics["f1"] == pytest.approx(2 / 3)


def test_a_query_without_a_known_word_finds_nothing():
    transitions, _ = episode(task_of("q00"), SEARCH % "zzzz", "x")
    assert transitions[0].messages[0].content == "Nothing found."


def test_scores_as_the_official_scripts():
    assert normalize_answer("The  U.S.A., an  Apple!") == "usa apple"
    assert exact_match("The Orla bridge", "Orla Bridge") == 1.0
    assert f1_score("yes", "yes it is") == 0.0
    assert f1_score("Mary Ann Odell", "Mary Odell") == pytest.approx(0.8)
    assert f1_score("", "x") == 0.0


def test_gzip_is_read_too(tmp_path):
    for name in ("invented.jsonl", "corpus.invented.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((DATA / name).read_bytes()))
    settings = MultiHop.Settings(path=str(tmp_path), dataset="invented")
    assert len(MultiHop.tasks(settings, "train")) == len(MultiHop.tasks(SETTINGS, "train"))
    assert load_index(str(tmp_path), "invented").search("Mount Velen", 1)[0].title == "Mount Velen"


def test_bad_files_are_named(tmp_path):
    settings = MultiHop.Settings(path=str(tmp_path), dataset="invented")
    with pytest.raises(ConfigError, match=r"env\.path.*invented\.jsonl"):
        MultiHop.tasks(settings, "train")
    shutil.copy(DATA / "corpus.invented.jsonl", tmp_path / "invented.jsonl")
    with pytest.raises(ConfigError, match=r"invented\.jsonl, line 1.*'question'"):
        MultiHop.tasks(settings, "train")
    (tmp_path / "invented.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(ConfigError, match=r"invented\.jsonl, line 1: not valid JSON"):
        MultiHop.tasks(settings, "train")
