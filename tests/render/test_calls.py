"""Calls as models write them: what is read, and what is told about the rest."""

import json

import pytest

from agent_r1.render.calls import parse_hermes, parse_llama3
from agent_r1.types import MalformedCall, ToolCall


def hermes(body):
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    "text", ["</tool_call>", "<tool_call>{", "a <think> b </think> c", "</think>", '"}</tool_call>']
)
def test_tags_may_stand_in_an_argument(text):
    """What our own renderer writes, our parser reads."""
    body = json.dumps({"name": "write", "arguments": {"text": text, "n": 1}})
    message = parse_hermes(f"So. {hermes(body)} Then. {hermes(body)}")
    assert message.tool_calls == (ToolCall("write", {"text": text, "n": 1}),) * 2
    assert message.content == "So.  Then."


@pytest.mark.parametrize("parse", [lambda b: parse_hermes(hermes(b)), parse_llama3])
@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ('""', {}),
        ("null", {}),
        ('"  "', {}),
        ('"{\\"city\\": \\"Oslo\\"}"', {"city": "Oslo"}),
        ('{"a": "\\ud83d", "\\ud83d": "\\u0000x"}', {"a": "\ufffd", "\ufffd": "x"}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    ],
)
def test_arguments_as_models_write_them(parse, given, arguments):
    (call,) = parse(f'{{"name": "f", "arguments": {given}}}').tool_calls
    assert call == ToolCall("f", arguments)


@pytest.mark.parametrize("given", ["[1]", "7", '"Oslo"', '"[1]"'])
def test_arguments_that_are_no_object_are_malformed(given):
    (call,) = parse_hermes(hermes(f'{{"name": "f", "arguments": {given}}}')).tool_calls
    assert isinstance(call, MalformedCall)
    assert "must be an object" in call.reason


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ('<tool_call>{"name": "f"} x</tool_call>', ["more after its end"]),
        ('<tool_call>{"name": "f"}', ["not closed"]),
        ('<tool_call>{"name": "f"}<tool_call>{"name": "g"}</tool_call>', ["not closed", None]),
        ('<tool_call>{"na</tool_call> said', ["Unterminated"]),
        ("<tool_call></tool_call>", ["not valid JSON"]),
        ("<tool_call>" + "[" * 100_000, ["not closed"]),
    ],
)
def test_what_is_no_call_has_a_reason_once(text, reasons):
    calls = parse_hermes(text).tool_calls
    assert len(calls) == len(reasons)
    for call, reason in zip(calls, reasons, strict=True):
        assert reason in call.reason if reason else isinstance(call, ToolCall)


@pytest.mark.parametrize("between", [", ", "; ", "\n", ",\n"])
def test_llama3_several_calls(between):
    one, two = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}'
    expected = (ToolCall("f", {"a": 1}), ToolCall("g", {}))
    assert parse_llama3(one + between + two).tool_calls == expected
    assert parse_llama3(f"[{one}, {two}]").tool_calls == expected
    broken = parse_llama3(one + between + two[:-4]).tool_calls
    assert broken[0] == expected[0]
    assert isinstance(broken[1], MalformedCall)


def test_llama3_a_broken_call_is_not_the_answer_and_an_answer_no_call():
    (call,) = parse_llama3('{"type": "function", "name": "f", "parameters": {"a": ').tool_calls
    assert isinstance(call, MalformedCall)
    for answer in ('{"temperature": 3}', '[{"temperature": 3}]', "{curly}", "[1, 2]"):
        message = parse_llama3(answer)
        assert (message.content, message.tool_calls) == (answer, ())
