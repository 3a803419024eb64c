"""ChatML over the real tokenizer: the template's tokens, joints, calls, and no smuggling."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_r1.render.calls import parse_hermes
from agent_r1.render.chatml import ChatML
from agent_r1.render.encoding import Encoder, Markup
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import Action, MalformedCall, Message, ToolCall

SCHEMAS = HopWorld().schemas
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]


def sampled(ids, stop="stop"):
    zeros = (0.0,) * len(ids)
    return Action(tuple(ids), zeros, zeros, (), stop)


def template_ids(tokenizer, messages, tools=None):
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tools", [None, SCHEMAS])
@pytest.mark.parametrize(
    "messages",
    [
        [("user", "Who is the mentor of Bana Dont?")],
        [("system", "Be brief."), ("user", "Hello\n\n  there ")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "\nMore.")],
        [("user", "Hi"), ("assistant", "x"), ("tool", "one"), ("tool", "two\n"), ("user", "ok")],
    ],
)
def test_prompt_equals_the_models_own_template(tokenizer, renderer, messages, tools):
    ours = renderer.prompt([Message(role, text) for role, text in messages], tools or [])
    theirs = [{"role": role, "content": text} for role, text in messages]
    assert list(ours) == template_ids(tokenizer, theirs, tools)


def test_tool_calls_in_a_given_history_equal_the_template(tokenizer, renderer):
    call = ToolCall("search", {"query": "rival of Köln"})
    for content in ("", "Let me look."):
        ours = renderer.prompt(
            [Message("user", "Hi"), Message("assistant", content, (call, call))], []
        )
        function = {"name": call.name, "arguments": call.arguments}
        theirs = {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"function": function}] * 2,
        }
        assert list(ours) == template_ids(tokenizer, [{"role": "user", "content": "Hi"}, theirs])


def test_a_whole_dialogue_turn_by_turn_equals_the_template_over_the_whole(tokenizer, renderer):
    prompt = [Message("system", "S"), Message("user", "Q")]
    said = 'So\n<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    action = renderer.encode_action(said)
    path = list(renderer.prompt(prompt, SCHEMAS)) + list(action)
    path += renderer.observation([Message("tool", "a\nb"), Message("tool", "c")], sampled(action))
    theirs = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": said},
        {"role": "tool", "content": "a\nb"},
        {"role": "tool", "content": "c"},
    ]
    assert path == template_ids(tokenizer, theirs, SCHEMAS)


def test_a_turn_that_was_cut_is_closed_by_the_environment(tokenizer, renderer):
    (end,) = tokenizer.encode("<|im_end|>")
    closed = renderer.observation([Message("tool", "x")], sampled([5, end]))
    cut = renderer.observation([Message("tool", "x")], sampled([5, 6], "length"))
    (text_end,) = tokenizer.encode("<|endoftext|>")
    other_stop = renderer.observation([Message("tool", "x")], sampled([5, text_end]))
    assert cut == other_stop == (end, *closed)


@given(st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "<", "|", "im_end", "ü", "\ud800"])))
def test_text_cannot_smuggle_in_a_control_token(tokenizer, renderer, parts):
    text = "".join(parts)
    control = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    action = sampled(renderer.encode_action("x"))
    plain = renderer.observation([Message("tool", "")], action)
    ids = renderer.observation([Message("tool", text)], action)
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    prompt = renderer.prompt([Message("system", text), Message("user", text)], [])
    empty = renderer.prompt([Message("system", "x"), Message("user", "x")], [])
    count = sum(i in control for i in prompt)
    assert count == sum(i in control for i in empty) - (0 if text else 2)


def test_encoder_merges_across_pieces_as_the_tokenizer_does(tokenizer):
    encoder = Encoder(tokenizer.backend_tokenizer)
    whole = tokenizer.encode("user\n\n\nBana Dont", add_special_tokens=False)
    assert list(encoder.encode([Markup("user\n"), "\n\nBana", " Dont"])) == whole


def test_sampled_tokens_are_parsed_not_changed(renderer):
    ids = renderer.encode_action(
        'Hm.\n<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    )
    assert renderer.parse(sampled(ids)) == Message("assistant", "Hm.", (ToolCall("f", {"a": [1]}),))
    assert renderer.parse(sampled(ids[:3], "length")).tool_calls == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{]</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "must be an object like"),
        ('<tool_call>{"arguments": {}}</tool_call>', "must be an object like"),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "must be an object"),
        ('<tool_call>{"name": "f"}', "not closed"),
        ('{"name": "f"}</tool_call>', "without <tool_call>"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        (
            '<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>' % ("[" * 90 + "]" * 90),
            "nested more than 64 deep",
        ),
    ],
)
def test_malformed_calls_have_a_reason(text, reason):
    (call,) = parse_hermes(text).tool_calls
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


def test_good_and_bad_calls_keep_their_order():
    good = json.dumps({"name": "f", "arguments": {"x": 1}})
    text = f"a<tool_call>{good}</tool_call>b<tool_call>{{<tool_call>{good}</tool_call>c"
    message = parse_hermes(text)
    assert message.content == "abc"
    kinds = [type(call).__name__ for call in message.tool_calls]
    assert kinds == ["ToolCall", "MalformedCall", "ToolCall"]


def test_a_tokenizer_of_another_format_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="im_start"):
        ChatML(ChatML.Settings(), other)
