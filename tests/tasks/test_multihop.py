"""Multi-hop QA on the questions in ``tests/data``: search, rewards, gold searches."""

import asyncio
import shutil

import pytest

from agent_r1 import check_env
from agent_r1.envs.gold import as_message, gold_of, in_words
from agent_r1.envs.lifecycle import make_env
from agent_r1.render.calls import parse_hermes
from agent_r1.run.transcript import transcript
from agent_r1.search.bm25 import build_index
from agent_r1.tasks.multihop.env import MultiHop
from agent_r1.tasks.multihop.scores import (
    contains,
    exact_match,
    f1_score,
    graded_reward,
    normalize_answer,
    paper_reward,
)
from agent_r1.types import Task, Trajectory
from tests import DATA_FOLDER

DATA = DATA_FOLDER / "multihop"
SETTINGS = MultiHop.Settings(path=str(DATA), datasets=("invented",), k=2)
SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call>'


def tasks():
    return [t for s in ("train", "validation", "test") for t in MultiHop.tasks(SETTINGS, s)]


def episode(task, *texts, settings=SETTINGS):
    async def play():
        env = MultiHop(settings)
        await env.reset(task, 0)
        transitions = [await env.step(parse_hermes(text)) for text in texts]
        return transitions, await env.outcome()

    return asyncio.run(play())


def gold_episode(task):
    async def play():
        env = MultiHop(SETTINGS)
        await env.reset(task, 0)
        messages = [message async for message in stepping(env)]
        return messages, await env.outcome()

    async def stepping(env):
        for said in gold_of(env):
            yield as_message(said)
            await env.step(as_message(said))

    return asyncio.run(play())


def task_of(question_id):
    return next(t for t in tasks() if t.id == question_id)


def test_contract():
    notes = check_env(MultiHop, SETTINGS, num_tasks=20)
    assert any("accepts its own gold answer in 20 of 20" in note for note in notes)


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
    assert outcome.metrics == {
        "em": 1.0,
        "f1": 1.0,
        "supporting_recall": 1.0,
        "answer_shown": 1.0,
        "answered": 1.0,
        "calls": 3.0,
    }


def test_gold_searches_hop_by_hop_then_answers():
    first, second, answer = (m for m in gold_episode(task_of("q00"))[0])
    assert first.tool_calls[0].arguments == {"query": "Larkmoor Lighthouse"}
    assert second.tool_calls[0].arguments == {"query": "Signe Halvorsen"}
    assert answer.content == "<answer>Norway</answer>"
    outcomes = [gold_episode(task)[1] for task in tasks()]
    assert all(outcome.success for outcome in outcomes)
    full = sum(o.metrics["supporting_recall"] == 1.0 for o in outcomes)
    assert full >= 18, "the gold searches find the evidence"


def test_gold_follows_a_decomposition():
    data = {**task_of("q00").data, "decomposition": ["Larkmoor Lighthouse architect", "born in"]}
    messages, _ = gold_episode(Task("q00", task_of("q00").question, "Norway", "", data))
    queries = [call.arguments["query"] for m in messages for call in m.tool_calls]
    assert queries == ["Larkmoor Lighthouse architect", "born in"]


def test_gold_begins_with_the_question_where_it_names_no_title():
    task = task_of("q00")
    vague = Task("q00", "Where was the builder of that light born?", "Norway", "", task.data)
    first = gold_episode(vague)[0][0]
    assert first.tool_calls[0].arguments == {"query": "Where was the builder of that light born"}


def test_gold_ends_with_a_memory_too():
    """A question that names no title is searched for once, however the texts are asked for."""
    data = {"name": "summary", "every": 1}
    settings = MultiHop.Settings(**{**SETTINGS.model_dump(), "memory": data})
    vague = "Where was the builder of that light born?"
    task = Task("q00", vague, "Norway", "", task_of("q00").data)

    async def play():
        env = make_env(MultiHop, settings)
        await env.reset(task, 0)
        texts = []
        for said in gold_of(env):
            texts.append(said)
            if (await env.step(as_message(said))).done:
                break
        return texts, await env.outcome()

    texts, outcome = asyncio.run(play())
    assert outcome.success
    assert sum(vague[:-1] in in_words(as_message(said)) for said in texts) == 1
    assert texts[1] == "Nothing yet.", "the summary that was asked for"


def test_an_index_of_other_passages_is_searched_and_known_by_titles(tmp_path):
    questions = tmp_path / "data"
    questions.mkdir()
    shutil.copy(DATA / "invented.jsonl", questions)
    passages = (DATA / "corpus.invented.jsonl").read_text().replace('"id": "p', '"id": "other')
    (tmp_path / "other.jsonl").write_text(passages)
    build_index([tmp_path / "other.jsonl"], tmp_path / "index")
    search = {"name": "bm25", "index": str(tmp_path / "index")}
    settings = MultiHop.Settings(path=str(questions), datasets=("invented",), search=search, k=2)
    calls = (SEARCH % "Larkmoor Lighthouse", SEARCH % "Signe Halvorsen", "<answer>Norway</answer>")
    _, outcome = episode(task_of("q00"), *calls, settings=settings)
    assert outcome.metrics["supporting_recall"] == 1.0


def test_a_worked_example_comes_as_turns_before_the_question():
    settings = SETTINGS.model_copy(update={"example": True})
    messages = asyncio.run(MultiHop(settings).reset(task_of("q00"), 0))
    roles = [message.role for message in messages]
    assert roles == ["system", "user", *["assistant", "tool"] * 2, "assistant", "user"]
    assert messages[-1].content == task_of("q00").question
    assert len(asyncio.run(MultiHop(SETTINGS).reset(task_of("q00"), 0))) == 2


def test_the_reward_by_name():
    calls = (SEARCH % "Larkmoor Lighthouse", "<tool_call>broken</tool_call>")
    expected = {"paper": (-0.5, 0.0, 1.0), "graded": (-0.3, 0.0, 1.0), "em": (0.0, 0.0, 1.0)}
    for name, (untagged, wrong, right) in expected.items():
        settings = SETTINGS.model_copy(update={"reward": name})
        texts = ("Norway", "<answer>Spain</answer>", "<answer>Norway</answer>")
        given = [
            episode(task_of("q00"), calls[0], text, settings=settings)[1].reward for text in texts
        ]
        assert given == pytest.approx([untagged, wrong, right]), name
    _, outcome = episode(task_of("q00"), *calls, "<answer>Norway</answer>")
    assert (outcome.reward, outcome.success) == (-0.5, True), "a broken call spoils the format"


def test_an_answer_without_tags_is_no_answer():
    _, outcome = episode(task_of("q00"), "Norway")
    assert (outcome.reward, outcome.metrics["answered"]) == (-0.5, 0.0)
    _, outcome = episode(task_of("q13"), "<answer>Frisian language</answer>")
    assert outcome.reward == 0.0
    assert outcome.metrics["f1"] == pytest.approx(2 / 3)


def test_a_query_without_a_known_word_finds_nothing():
    transitions, _ = episode(task_of("q00"), SEARCH % "zzzz", "x")
    assert transitions[0].messages[0].content == "Nothing found."


def test_scores_as_the_official_scripts():
    assert normalize_answer("The  U.S.A., an  Apple!") == "usa apple"
    assert exact_match("The Orla bridge", ["Orla Bridge"]) == 1.0
    assert exact_match("Oslo", ["Bergen", "oslo."]) == 1.0
    assert exact_match("Oslo", ["Bergen"]) == 0.0
    assert exact_match("", ["The"]) == 0.0
    assert f1_score("yes", ["yes it is"]) == 0.0
    assert f1_score("Mary Ann Odell", ["x", "Mary Odell"]) == pytest.approx(0.8)
    assert f1_score("", ["x"]) == 0.0
    assert contains("born in The Hague, 1901", ["Hague"])
    assert not contains("born in Delft", ["Hague"])


def test_rewards_by_hand():
    """The paper's equation 6, and the authors' first public script."""
    assert paper_reward(1.0, answer_ok=True, calls_ok=True) == 1.0
    assert paper_reward(0.0, answer_ok=True, calls_ok=True) == 0.0
    assert paper_reward(1.0, answer_ok=True, calls_ok=False) == -0.5
    assert paper_reward(0.0, answer_ok=False, calls_ok=False) == -1.0
    assert graded_reward(None, "no idea", ["Oslo"], num_calls=0) == -1.0
    assert graded_reward("in Oslo", "...", ["Oslo"], num_calls=0) == 0.5
    assert graded_reward("in Oslo", "...", ["Oslo"], num_calls=3) == 1.0
    assert graded_reward("Bergen", "not Oslo", ["Oslo"], num_calls=1) == pytest.approx(0.2)


def test_a_transcript_shows_the_calls_of_the_worked_example():
    settings = SETTINGS.model_copy(update={"example": True})
    prompt = asyncio.run(MultiHop(settings).reset(task_of("q00"), 0))
    shown = transcript(Trajectory("q00", "invented", 0, tuple(prompt)))
    assert "[assistant] -> search {'query': 'Ada Quist born'}" in shown
