"""Llama 3 and the fallback from a chat template, each against the template itself."""

import pytest

from agent_r1.errors import ConfigError
from agent_r1.render.chatml import ChatML
from agent_r1.render.llama3 import Llama3
from agent_r1.render.template import ChatTemplate
from agent_r1.types import Action, MalformedCall, Message, ToolCall
from tests.chat_formats import LLAMA3_CONTROL, as_rows, small_tokenizer, template, turn_by_turn

SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "description": 'Search the facts for "é".',
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
        },
    },
}
CALL = Message("assistant", "", (ToolCall("search", {"query": "Wien <|eot_id|>"}),))
CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "Where is “it”?"),
    CALL,
    Message("tool", 'Found: "it"\nis <|eot_id|> here <|im_end|>.'),
    CALL,
    Message("tool", "Nothing."),
    Message("assistant", "Which one?"),
    Message("user", "The red one."),
]


def make_tokenizer(control, template):
    return small_tokenizer(control, template, repr(CONVERSATION) + repr(SCHEMA))


@pytest.fixture(scope="module")
def llama3():
    return make_tokenizer(LLAMA3_CONTROL, template("llama3_1"))


def without_control(messages):
    """The template itself would let control tokens in; our rendering does not."""

    def clean(text):
        return text.replace("<|eot_id|>", "").replace("<|im_end|>", "")

    call = Message("assistant", "", (ToolCall("search", {"query": "Wien"}),))
    return [call if m is CALL else Message(m.role, clean(m.content)) for m in messages]


@pytest.mark.parametrize("tools", [[SCHEMA], [], [SCHEMA, SCHEMA]])
def test_llama3_equals_its_template_token_by_token(llama3, tools):
    renderer = Llama3(Llama3.Settings(), llama3)
    messages = without_control(CONVERSATION)
    expected = llama3.apply_chat_template(
        as_rows(messages), tools=tools or None, add_generation_prompt=True, tokenize=False
    )
    ids = turn_by_turn(renderer, messages, tools)
    assert llama3.decode(ids) == expected
    assert list(ids) == llama3.encode(expected, add_special_tokens=False)


def test_llama3_text_cannot_become_a_control_token(llama3):
    renderer = Llama3(Llama3.Settings(), llama3)
    ids = turn_by_turn(renderer, CONVERSATION, [SCHEMA])
    end = llama3.convert_tokens_to_ids("<|eot_id|>")
    assert ids.count(end) == len(CONVERSATION)  # the turns' own ends


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [ToolCall("f", {"a": 1})]),
        ('<|python_tag|>{"name": "f", "arguments": {}}', [ToolCall("f", {})]),
        ('{"name": "f", "parameters": {}}; {"name": "g"}', [ToolCall("f", {}), ToolCall("g", {})]),
        ('{"answer": 3}', []),
        ("The answer is {3}.", []),
    ],
)
def test_llama3_reads_calls(llama3, text, calls):
    renderer = Llama3(Llama3.Settings(), llama3)
    ids = renderer.encode_action(text)
    message = renderer.parse(Action(ids, (0.0,) * len(ids), (0.0,) * len(ids), (), "stop"))
    assert list(message.tool_calls) == calls
    assert bool(message.content) != bool(calls)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "f", "parameters": {', "not valid JSON"),
        ('{"name": 3, "parameters": {}}', "must be an object"),
        ('{"name": "f", "parameters": [1]}', "must be an object"),
    ],
)
def test_llama3_says_why_a_call_is_malformed(llama3, text, reason):
    renderer = Llama3(Llama3.Settings(), llama3)
    ids = renderer.encode_action(text)
    (call,) = renderer.parse(
        Action(ids, (0.0,) * len(ids), (0.0,) * len(ids), (), "stop")
    ).tool_calls
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


def test_llama3_needs_its_tokens(tokenizer):
    with pytest.raises(ConfigError, match=r"has no .*eot_id"):
        Llama3(Llama3.Settings(), tokenizer)


def test_the_fallback_finds_chatml_by_itself(tokenizer, renderer):
    """The tiny base's own template is the Hermes one; the fallback must come to the same ids."""
    derived = ChatTemplate(ChatTemplate.Settings(), tokenizer)
    assert isinstance(renderer, ChatML)
    assert set(derived.stop_token_ids) <= set(renderer.stop_token_ids)
    for tools in ([SCHEMA], []):
        for messages in (CONVERSATION, CONVERSATION[1:]):
            ids = turn_by_turn(derived, messages, tools)
            assert ids == turn_by_turn(renderer, messages, tools)
    ids = renderer.encode_message(CALL)
    action = Action(ids, (0.0,) * len(ids), (0.0,) * len(ids), (), "stop")
    assert derived.parse(action) == renderer.parse(action)
    cut = Action(ids[:-1], (0.0,) * (len(ids) - 1), (0.0,) * (len(ids) - 1), (), "length")
    answer = [Message("tool", "x")]
    assert derived.observation(answer, cut) == renderer.observation(answer, cut)


STRIPPING = """
{%- if tools %}{{- '<s>system\\n' + (tools | tojson) + '<e>' }}{% endif %}
{%- for m in messages %}
{{- '<s>' + m.role + '\\n' + m.content | trim }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}{{- '<e>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{% endif %}"""


def test_the_fallback_follows_a_template_that_strips_contents():
    fast = make_tokenizer(["<s>", "<e>", "<pad>"], STRIPPING)
    derived = ChatTemplate(ChatTemplate.Settings(), fast)
    messages = [
        Message(m.role, f" {m.content}\n" if m.content else "", m.tool_calls) for m in CONVERSATION
    ]
    expected = fast.apply_chat_template(
        as_rows(messages), tools=[SCHEMA], add_generation_prompt=True, tokenize=False
    )
    ids = turn_by_turn(derived, messages, [SCHEMA])
    assert list(ids) == fast.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("m.content | trim", "('' if loop.revindex > 4 else m.content) | trim", "a turn is added"),
        ("m.content | trim", "(m.content | tojson)", "begin as the generation prompt"),
        ("'<s>assistant\\n'", "'<s>assistant\\n<think>'", "generation prompt"),
        ("{%- endfor %}{{- '<e>' }}", "{%- endfor %}{{- '\\n' }}", "token of its own"),
        ("{%- if tools %}", "{%- if false %}", "does not show tools"),
        ("'<tool_call>\\n'", "'[CALLS]'", "not known here"),
        ("{%- for m in", "{{- raise_exception('no') }}{%- for m in", "fails on a sample"),
    ],
)
def test_the_fallback_refuses_what_it_cannot_prove(old, new, reason):
    assert old in STRIPPING
    fast = make_tokenizer(["<s>", "<e>", "<pad>"], STRIPPING.replace(old, new))
    with pytest.raises(ConfigError, match=reason):
        ChatTemplate(ChatTemplate.Settings(), fast)


def test_the_fallback_refuses_a_tokenizer_without_template():
    with pytest.raises(ConfigError, match="has none"):
        ChatTemplate(ChatTemplate.Settings(), make_tokenizer(["<s>", "<e>", "<pad>"], ""))
