"""`agent-r1 serve`: a run's agent in a process of its own, asked by real clients."""

import signal
import subprocess
import sys

import anthropic
import openai
import pytest

import agent_r1
from agent_r1.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    small = {"train.iterations": 1, "train.tasks": 1, "evaluation": {"every": 0, "test_tasks": 0}}
    agent_r1.train("hopworld", run=str(folder), overrides=small)
    return folder


@pytest.fixture(scope="module")
def told(run):
    """What the command prints, as variables."""
    command = [sys.executable, "-m", "agent_r1.cli", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield dict(process.stdout.readline().strip().split("=", 1) for _ in range(4))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_conversation_goes_on_with_the_tokens_that_were_sampled(told):
    client = openai.OpenAI(base_url=told["OPENAI_BASE_URL"], api_key=told["OPENAI_API_KEY"])
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "Who is the rival of Bana Dont?"}]
    for _ in range(3):
        first, again = (
            client.chat.completions.create(model="policy", messages=messages, tools=[tool])
            for _ in range(2)
        )
        assert first.choices[0].message.content == again.choices[0].message.content  # greedy
        known = first.usage.prompt_tokens_details.cached_tokens
        assert (known > 0) == (len(messages) > 1)
        messages.append(first.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "user", "content": "And hers?"})


def test_several_apps_and_interfaces_at_once(told):
    client = anthropic.Anthropic(
        base_url=told["ANTHROPIC_BASE_URL"], api_key=told["ANTHROPIC_API_KEY"]
    )
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}]}
    reply = client.messages.create(max_tokens=8, **asked)
    assert reply.usage.output_tokens <= 8
    assert client.messages.count_tokens(**asked).input_tokens > 3


def test_only_the_key_opens_it_and_nothing_is_rewarded(told):
    stranger = openai.OpenAI(base_url=told["OPENAI_BASE_URL"], api_key="no")
    with pytest.raises(openai.AuthenticationError, match="no open episode"):
        stranger.models.list()
    client = openai.OpenAI(base_url=told["OPENAI_BASE_URL"], api_key=told["OPENAI_API_KEY"])
    assert [model.id for model in client.models.list()] == ["policy"]
    with pytest.raises(openai.NotFoundError, match="no rewards"):
        client.post("/reward", body={"reward": 1.0}, cast_to=object)


def test_a_port_that_is_taken_is_named(told, run, capsys):
    port = told["OPENAI_BASE_URL"].removesuffix("/v1").rpartition(":")[2]
    assert main(["serve", str(run), "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err
