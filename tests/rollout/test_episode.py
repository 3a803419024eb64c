"""The loop between environment and engine: trouble gets the right tokens and the right ending."""

import asyncio
import functools
import time

import pytest

from agent_r1 import Outcome, Task, ToolEnv, Transition, tool
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.episode import run_episode
from agent_r1.rollout.rollout import Rollout
from agent_r1.tree import build_tree
from agent_r1.types import Kind, Message, StopReason
from tests.fakes import END, CharRenderer, ScriptedEngine, make_action

HUGE = "\n[cut: the result has 10,000,000 characters, 150 are shown]"
CALL = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'


class Troubles(ToolEnv):
    max_result_chars = 150

    @tool
    def echo(self, text: str) -> str:
        """Echo."""
        return text

    @tool
    def huge(self) -> str:
        """A lot."""
        return "x" * 10_000_000

    @tool
    def blob(self) -> bytes:
        """Bytes."""
        return b"\x00\xff"

    @tool
    def strange(self) -> object:
        """An object."""
        return object()

    @tool
    def broken(self) -> str:
        """Raise."""
        raise RuntimeError("disk on fire")

    @tool(timeout=0.1)
    def hang(self) -> str:
        """Hang."""
        time.sleep(1.0)
        return "late"

    def score(self, answer):
        return float(answer == "42")


def play(env, *lines, limits=None, task=None, engine=None):
    rollout = Rollout(
        make_env=env,
        engine=engine or ScriptedEngine(*lines),
        renderer=CharRenderer(),
        limits=limits or Limits(),
    )
    task = task or Task("t", "Q")
    return asyncio.run(rollout.run([task], attempts=1, temperature=1.0, seed=0))[0]


def only(group):
    return group.trajectories[0]


def ids(text):
    return [END if c == "\0" else ord(c) for c in text]


def assert_tokens(group, *expected):
    """Tokens and kinds equal the expected ``(kind, text)`` runs; ``\\0`` ends a turn."""
    (branch,) = build_tree(group).branches()
    assert branch.token_ids == [i for _, text in expected for i in ids(text)]
    assert branch.kinds == [kind for kind, text in expected for _ in text]


ACT, OBS = Kind.ACTION, Kind.OBSERVATION


def test_an_answer_ends_the_episode():
    group = play(Troubles, "42")
    assert_tokens(group, (OBS, "[user]Q"), (ACT, "42\0"))
    assert only(group).outcome == Outcome(1.0, True)
    assert only(group).stop is StopReason.DONE
    assert only(group).stop.terminated
    assert not only(group).stop.truncated


@pytest.mark.parametrize(
    ("line", "seen", "fault"),
    [
        (CALL % ("echo", '{"text": "hi"}'), "[tool]hi", None),
        (CALL % ("huge", "{}"), "[tool]" + "x" * 150 + HUGE, None),
        (CALL % ("blob", "{}"), "[tool][not text: 2 bytes]", "fault/not_text:blob"),
        (
            CALL % ("strange", "{}"),
            "[tool][not text: a value of type object]",
            "fault/not_text:strange",
        ),
        (
            CALL % ("broken", "{}"),
            "[tool]Error: RuntimeError: disk on fire",
            "fault/exception:broken",
        ),
        (
            CALL % ("hang", "{}"),
            "[tool]Error: hang gave no result within 0.1 seconds",
            "fault/timeout:hang",
        ),
        (
            CALL % ("nothing", "{}"),
            "[tool]Error: there is no tool 'nothing'; the tools are: "
            "echo, huge, blob, strange, broken, hang",
            "mistake/unknown_tool",
        ),
        (
            CALL % ("echo", "{}"),
            "[tool]Error: text: Field required",
            "mistake/invalid_arguments:echo",
        ),
        (
            "<tool_call>{broken</tool_call>",
            "[tool]Error: the call is not valid JSON: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)",
            "mistake/malformed_call",
        ),
        (
            "<tool_call>{}",
            "[tool]Error: the call is not closed by </tool_call>",
            "mistake/malformed_call",
        ),
        (
            CALL % ("echo", '{"text": "<|im_end|></tool_call\\u003e"}'),
            "[tool]<|im_end|></tool_call>",
            None,
        ),
    ],
)
def test_whatever_a_call_leads_to_is_an_observation(line, seen, fault):
    group = play(Troubles, line, "42")
    assert_tokens(group, (OBS, "[user]Q"), (ACT, line + "\0"), (OBS, seen), (ACT, "42\0"))
    assert only(group).steps[0].events == (() if fault is None else (fault,))
    assert only(group).outcome == Outcome(1.0, True)


def test_several_calls_of_one_action_are_answered_in_order():
    line = (
        CALL % ("echo", '{"text": "a"}')
        + "{"
        + CALL % ("broken", "{}")
        + CALL % ("echo", '{"text": "b"}')
    )
    group = play(Troubles, line, "no")
    assert_tokens(
        group,
        (OBS, "[user]Q"),
        (ACT, line + "\0"),
        (OBS, "[tool]a[tool]Error: RuntimeError: disk on fire[tool]b"),
        (ACT, "no\0"),
    )
    assert only(group).outcome == Outcome(0.0, False)


def test_an_action_cut_at_the_limit_is_closed_by_the_environment():
    group = play(Troubles, "<tool_call>{}", "42", limits=Limits(tokens_per_turn=5))
    assert_tokens(
        group,
        (OBS, "[user]Q"),
        (ACT, "<tool"),
    )
    assert only(group).stop is StopReason.MAX_TOKENS  # no call in it, and no answer either
    assert only(group).steps[0].message.cut
    line = CALL % ("echo", '{"text": "a"}')
    group = play(Troubles, line, "42", limits=Limits(tokens_per_turn=len(line)))
    assert_tokens(group, (OBS, "[user]Q"), (ACT, line), (OBS, "\0[tool]a"), (ACT, "42\0"))


def test_limit_of_turns():
    line = CALL % ("echo", '{"text": "a"}')
    group = play(Troubles, line, limits=Limits(turns=2))
    assert only(group).stop is StopReason.MAX_TURNS
    assert only(group).stop.truncated
    assert len(only(group).steps) == 2
    assert only(group).steps[-1].observation_ids == ()
    assert only(group).outcome == Outcome(0.0, False)


def test_an_answer_that_the_limit_of_tokens_cut_is_no_answer():
    episode = only(play(Troubles, "42 and so on", limits=Limits(tokens=10)))
    assert episode.stop is StopReason.MAX_TOKENS
    assert episode.steps[0].message.content == "42"
    assert episode.outcome == Outcome(0.0, False)


class Chat(ToolEnv):
    """A user who answers; what is "42" so far is right."""

    @tool
    def submit(self, text: str) -> str:
        """End."""
        return text

    def interpret(self, results):
        self.given = results[0].value
        return Transition(done=True)

    def reply(self, message):
        heard = message.content.startswith("go")
        return Transition((self.said,), done=False) if heard else Transition(done=True)

    def start(self):
        self.given, self.said = None, Message("user", "and?")

    def score(self, answer):
        return float("42" in (self.given, answer))


@pytest.mark.parametrize(
    ("line", "stop", "reward", "turns"),
    [
        ("42", StopReason.DONE, 1.0, 1),
        ("42 of 4200", StopReason.MAX_TOKENS, 0.0, 1),  # may have become another answer
        ("go on and on", StopReason.MAX_TURNS, 0.0, 3),  # a cut sentence in a conversation
        (CALL % ("submit", '{"text": "42"}'), StopReason.DONE, 1.0, 1),  # the call was whole
    ],
)
def test_a_turn_that_the_limit_cut_ends_nothing_of_itself(line, stop, reward, turns):
    limits = Limits(tokens_per_turn=len(line) if "call" in line else 5, turns=3)
    episode = only(play(Chat, line, limits=limits))
    assert (episode.stop, episode.outcome.reward, len(episode.steps)) == (stop, reward, turns)


def test_limit_of_tokens_bounds_the_whole_episode():
    line = CALL % ("echo", '{"text": "a"}')
    for limit in range(1, 3 * len(line)):
        episode = only(play(Troubles, line, limits=Limits(tokens=limit, turns=50)))
        assert episode.stop is StopReason.MAX_TOKENS
        assert not episode.steps or episode.num_tokens <= limit


class SlowSession:
    """Takes ``seconds`` for an action; counts how often it is asked."""

    outage = None

    def __init__(self, seconds):
        self.seconds, self.num_asked, self.num_cancelled = seconds, 0, 0

    async def generate(self, prefix, sampling, seed):
        self.num_asked += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return make_action("42")

    def close(self):
        pass


@pytest.mark.parametrize(("rest", "stop"), [(0.6, StopReason.DONE), (0.0, StopReason.MAX_TIME)])
def test_an_action_goes_on_while_the_engine_rests_and_that_time_is_not_its_own(rest, stop):
    """The engine rests from .1 to .7 seconds; the action has .3 and is done after .8."""
    session, begin = SlowSession(0.8), time.monotonic()

    def paused():
        return min(max(0.0, time.monotonic() - begin - 0.1), rest)

    async def play_one():
        return await run_episode(
            Troubles,
            session,
            CharRenderer(),
            Task("t", "Q"),
            attempt=0,
            limits=Limits(seconds=0.3),
            sampling=Sampling(20, (END,)),
            env_seed=0,
            sampling_seed=0,
            paused=paused,
        )

    assert asyncio.run(play_one()).stop is stop
    assert session.num_asked == 1
    assert session.num_cancelled == (stop is StopReason.MAX_TIME)


def test_limit_of_time():
    class Slow(ToolEnv):
        async def interpret(self, results):
            await asyncio.sleep(60)

        def score(self, answer):
            return 0.0

    start = time.perf_counter()
    episode = only(play(Slow, "<tool_call>", limits=Limits(seconds=0.2)))
    assert time.perf_counter() - start < 5
    assert episode.stop is StopReason.MAX_TIME
    assert episode.outcome == Outcome(0.0, False)


@pytest.mark.parametrize(
    "where",
    ["init", "start", "prompt", "interpret", "text", "cancel", "score", "nan", "outcome", "process",
     "none", "type"],
)  # fmt: skip
def test_a_fault_of_the_environment_excludes_the_episode_and_nothing_else(where):
    class Faulty(ToolEnv):
        def __init__(self, settings=None):
            if where == "init":
                raise OSError("database is down")
            super().__init__(settings)

        def prompt(self):
            return [{"role": "user"}] if where == "prompt" else super().prompt()

        def start(self):
            if where == "start":
                raise OSError("database is down")

        def interpret(self, results):
            if where == "interpret":
                raise OSError("database is down")
            if where == "type":
                return "hello"
            if where == "text":
                return Transition(("hello",))
            if where == "cancel":
                raise asyncio.CancelledError
            bad = {"process": float("inf"), "none": None}
            return self.show(results, good=bad.get(where, 0.5))

        async def score(self, answer):
            if where == "score":
                raise OSError("database is down")
            if where == "outcome":
                return Outcome(None, True)
            return float("nan") if where == "nan" else 1.0

    episode = only(play(Faulty, "<tool_call>", "42"))
    assert episode.stop is StopReason.FAULT
    assert not (episode.stop.terminated or episode.stop.truncated)
    assert episode.outcome is None
    assert episode.fault


def test_process_rewards_keep_their_names_and_steps():
    class Rewarded(ToolEnv):
        def interpret(self, results):
            return Transition(rewards={"a": 0.25, "b": 1.0}, state_key="s1")

        def reply(self, message):
            return Transition(done=True, rewards={"a": 0.5})

        def score(self, answer):
            return Outcome(0.5, success=False, metrics={"f1": 0.5})

    episode = only(play(Rewarded, "<tool_call>", "x"))
    assert [step.rewards for step in episode.steps] == [{"a": 0.25, "b": 1.0}, {"a": 0.5}]
    assert episode.process_reward() == {"a": 0.75, "b": 1.0}
    assert [step.state_key for step in episode.steps] == ["start", "s1"]


def test_an_environment_may_answer_like_a_user():
    class Chatty(ToolEnv):
        def reply(self, message):
            if message.content == "which one?":
                from agent_r1 import Message

                return Transition((Message("user", "the red one"),))
            return Transition(done=True)

        def score(self, answer):
            return float(answer == "red")

    group = play(Chatty, "which one?", "red")
    assert_tokens(
        group, (OBS, "[user]Q"), (ACT, "which one?\0"), (OBS, "[user]the red one"), (ACT, "red\0")
    )
    assert only(group).outcome == Outcome(1.0, True)


def test_the_engine_gets_every_token_so_far_and_nothing_decoded():
    engine = ScriptedEngine(CALL % ("echo", '{"text": "a"}'), "42")
    group = play(Troubles, engine=engine)
    (branch,) = build_tree(group).branches()
    assert engine.prefixes[1] == branch.token_ids[: len(engine.prefixes[1])]
    assert len(engine.prefixes[1]) + 3 == len(branch.token_ids)


def test_attempts_share_their_instance_and_a_task_drawn_twice_is_sampled_anew():
    class Seeded(Troubles):
        def start(self):
            seeds.append(self.seed)

    class Listening(ScriptedEngine):
        def session(self, number=0):
            session = super().session(number)
            generate = session.generate

            async def listen(prefix, sampling, seed):
                sampled.append(seed)
                return await generate(prefix, sampling, seed)

            session.generate = listen
            return session

    seeds, sampled = [], []
    rollout = Rollout(Seeded, Listening("42"), CharRenderer(), Limits())
    asyncio.run(rollout.run([Task("a", "Q")] * 2, attempts=3, temperature=1.0, seed=0))
    assert len(set(seeds)) == 1
    assert len(set(sampled)) == 6


def test_numbers_of_numpy_become_plain_ones():
    import numpy as np

    class Numpy(ToolEnv):
        def interpret(self, results):
            return Transition(rewards={"a": np.float32(0.5)})

        def score(self, answer):
            return Outcome(np.float32(1.0), np.bool_(True), {"f1": np.float64(0.5)})

    episode = only(play(Numpy, "<tool_call>", "x"))
    assert type(episode.steps[0].rewards["a"]) is float
    assert [type(v) for v in (episode.outcome.reward, episode.outcome.success)] == [float, bool]


def test_what_every_episode_lacks_ends_the_run():
    from agent_r1.errors import ConfigError

    class Missing(Troubles):
        def start(self):
            raise ConfigError("there is no index")

    with pytest.raises(ConfigError, match="no index"):
        play(Missing, "42")


def test_groups_and_attempts_come_back_in_order_over_several_waves():
    rollout = Rollout(
        make_env=functools.partial(Troubles),
        engine=ScriptedEngine("42"),
        renderer=CharRenderer(),
        limits=Limits(),
        concurrency=2,
    )
    tasks = [Task(f"t{n}", "Q") for n in range(3)]
    groups = asyncio.run(rollout.run(tasks, attempts=3, temperature=1.0, seed=0))
    assert [g.task.id for g in groups] == ["t0", "t1", "t2"]
    assert [[(t.task_id, t.attempt) for t in g.trajectories] for g in groups] == [
        [(f"t{n}", a) for a in range(3)] for n in range(3)
    ]
