"""The baseline Naive RAG: one retrieval with the question, then the answer."""

import asyncio

from agent_r1 import check_env
from agent_r1.render.chatml import ChatML
from agent_r1.tasks.hopworld.env import HopWorld, gold_actions
from agent_r1.tasks.hopworld.world import search_facts
from agent_r1.tasks.naive_rag import HopWorldRAG, MultiHopRAG
from agent_r1.types import Message
from tests.tasks.test_multihop import SETTINGS as MULTIHOP


def reset(env, task):
    return asyncio.run(env.reset(task, 0))


def test_hopworld_shows_what_a_search_for_the_question_finds(renderer):
    settings = HopWorldRAG.Settings(test_hops=(2,))
    assert check_env(HopWorldRAG, settings)
    task = HopWorldRAG.tasks(settings, "test")[0]
    env = HopWorldRAG(settings)
    *opening, call, result = reset(env, task)
    assert opening == reset(HopWorld(settings), task)
    assert call.tool_calls[0].arguments == {"query": task.question}
    found = [fact.text for fact in search_facts(env.world.facts, task.question)]
    assert result.content.split("\n") == found
    # As if the model had asked: the very tokens of an episode in which it does.
    assert renderer.prompt([*opening, call, result], env.schemas)


def test_there_is_no_second_retrieval():
    settings = HopWorldRAG.Settings(test_hops=(2,))
    task = HopWorldRAG.tasks(settings, "test")[0]
    env = HopWorldRAG(settings)
    reset(env, task)
    *_, answer = gold_actions(env.world)

    async def ends(text):
        transition = await env.step(Message("assistant", text))
        return transition.done, (await env.outcome()).success

    assert asyncio.run(ends("So who? I search again.")) == (True, False)
    assert asyncio.run(ends(answer)) == (True, True)


def test_multihop_puts_the_passages_before_the_question(tokenizer):
    settings = MultiHopRAG.Settings(**{**MULTIHOP.model_dump(), "name": "multihop-rag"})
    assert check_env(MultiHopRAG, settings)
    task = MultiHopRAG.tasks(settings, "train")[0]
    env = MultiHopRAG(settings)
    system, user = reset(env, task)
    assert "search" not in system.content
    assert user.content.endswith(f"Question: {task.question}")
    assert ": " in user.content.split("\n\n")[0], "a passage: title and text"
    assert list(env.schemas) == []
    text = tokenizer.decode(ChatML(ChatML.Settings(), tokenizer).prompt([system, user], []))
    assert "<tools>" not in text


def test_its_worked_example_shows_passages_and_an_answer_but_no_tool():
    settings = MultiHopRAG.Settings(
        **{**MULTIHOP.model_dump(), "name": "multihop-rag", "example": True}
    )
    env = MultiHopRAG(settings)
    task = MultiHopRAG.tasks(settings, "train")[0]
    system, asked, answered, question = reset(env, task)
    assert [m.role for m in (system, asked, answered, question)] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    assert "The Blue Mill: " in asked.content and "Denmark" in asked.content
    assert "\n\nQuestion: In which country" in asked.content
    assert answered.content == "<answer>Denmark</answer>" and not answered.tool_calls
    assert "The Blue Mill" not in question.content
    assert question.content.endswith(f"Question: {task.question}")
