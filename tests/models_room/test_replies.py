"""What a model wrote is taken apart, and nothing of it is lost."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebbtide.errors import InputError
from ebbtide.models.replies import FORMATS, Reply, formats_of, parse_reply

TIDE = {"name": "tide", "arguments": {"harbour": "Höfn", "days": [1, 2.5], "exact": True}}
SIX = '{"harbour": "Höfn", "days": [1, 2.5], "exact": true}'


def call(name: str, arguments: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def called(reply: Reply) -> list[dict[str, Any]]:
    return [one["function"] for one in reply.tool_calls]


# Which formats


@pytest.mark.parametrize(
    ("template", "formats"),
    [
        ("", ()),
        ("{{ messages[0].content }} in JSON, with a name and parameters", ()),
        ("{{ '<think>' }}", ("think",)),
        ("{{ content.split('</think>')[-1] }}<tool_call>", ("think", "hermes")),
        ("[THINK]{{ x }}[/THINK][TOOL_CALLS]", ("think brackets", "mistral")),
        ("<|start|>assistant<|channel|>final<|message|>", ("harmony",)),
        ('Environment: ipython {"name": ..., "parameters": ...}', ("llama",)),
        ("<|python_tag|>", ("llama",)),
        ("<tool_call>\n<function=name>\n<parameter=", ("function tags", "hermes")),
        ("<tool_call>{{ name }}<arg_key>", ("argument tags", "hermes")),
        ("<|tool_call_start|>", ("pythonic",)),
        ("<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>", ("deepseek",)),
        ("<function_call>", ("function call",)),
        ("functools[...]", ("functools",)),
        ("<|tool|>{{ tools }}<|/tool|>", ("functools", "granite")),
        ("<|tool_call|>", ("granite",)),
    ],
)
def test_the_formats_are_those_of_the_template(template: str, formats: tuple[str, ...]) -> None:
    assert formats_of(template) == formats
    assert set(formats) <= set(FORMATS)
    parse_reply("", formats)


def test_every_format_is_found_by_some_template() -> None:
    (mark,) = test_the_formats_are_those_of_the_template.pytestmark
    assert {name for _, names in mark.args[1] for name in names} == set(FORMATS)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(InputError, match="Did you mean 'hermes'"):
        parse_reply("", ["hermse"])


# Reasoning


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nOne.\n</think>\n\nTwo. ", "One.", "Two."),
        ("\n<think></think> Two.", "", "Two."),
        ("One.</think>Two.", "One.", "Two."),
        ("<think>One.", "One.", ""),
        ("<think>One.</think><think>And one.</think>Two.", "One.\n\nAnd one.", "Two."),
        ("Two, not <think>.", "", "Two, not <think>."),
        ("Two <think>or</think> three.", "", "Two <think>or</think> three."),
        (" Two. ", "", " Two. "),
        ("", "", ""),
    ],
)
def test_reasoning_stands_within_its_marks(text: str, reasoning: str, content: str) -> None:
    assert parse_reply(text, ["think"]) == Reply(content, reasoning)
    brackets = re.sub("<(/?)think>", lambda found: f"[{found[1]}THINK]", text)
    expected = re.sub("<(/?)think>", lambda found: f"[{found[1]}THINK]", content)
    assert parse_reply(brackets, ["think brackets"]) == Reply(expected, reasoning)


def test_a_prompt_may_end_within_the_reasoning() -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    assert parse_reply("One.\n</think>Two.", ["think"], prompt=prompt) == Reply("Two.", "One.")
    assert parse_reply("One.", ["think"], prompt=prompt) == Reply("", "One.")
    assert parse_reply("<think>One.</think>2", ["think"], prompt=prompt) == Reply("2", "One.")
    done = prompt + "\n</think>\n\n"
    assert parse_reply("Two.", ["think"], prompt=done) == Reply("Two.")


def test_marks_of_reasoning_stay_where_the_model_knows_none() -> None:
    text = "<think>One.</think>Two."
    assert parse_reply(text) == parse_reply(text, ["hermes"]) == Reply(text)


def test_channels_are_reasoning_answers_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>Ask first.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I ask.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.tide <|constrain|>json<|message|>"
        f"{SIX}<|call|>"
        "<|start|>assistant to=functions.wind<|channel|>commentary<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>analysis<|message|>And so.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>At six.<|return|>"
    )
    reply = parse_reply(text, ["harmony"])
    assert reply.reasoning == "Ask first.\n\nAnd so."
    assert reply.content == "I ask.At six."
    assert called(reply) == [TIDE, {"name": "wind", "arguments": {}}]


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>commentary to=functions.tide<|message|>{broken<|call|>",
        "<|channel|>unknown<|message|>{}<|call|>",
        "<|start|>user<|message|>Hello",
        "At six.",
    ],
)
def test_channels_that_cannot_be_read_stay(text: str) -> None:
    assert parse_reply(text, ["harmony"]) == Reply(text)


def test_a_channel_may_be_cut_off() -> None:
    assert parse_reply("<|channel|>analysis<|message|>As", ["harmony"]) == Reply("", "As")
    assert parse_reply("<|channel|>final<|message|>As", ["harmony"]) == Reply("As")


# Calls

HERMES = f'<tool_call>\n{{"name": "tide", "arguments": {SIX}}}\n</tool_call>'
DEEPSEEK = (
    f"<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>function<\uff5ctool▁sep\uff5c>tide\n```json\n{SIX}\n```"
    "<\uff5ctool▁call▁end\uff5c><\uff5ctool▁calls▁end\uff5c>"
)
WRITTEN = {
    "hermes": HERMES,
    "llama": f'{{"name": "tide", "parameters": {SIX}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "tide", "arguments": {SIX}}}]',
    "pythonic": "<|tool_call_start|>[tide(harbour='Höfn', days=[1, 2.5], exact=True)]"
    "<|tool_call_end|>",
    "function tags": "<tool_call>\n<function=tide>\n<parameter=harbour>\nHöfn\n</parameter>\n"
    "<parameter=days>\n[1, 2.5]\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n"
    "</function>\n</tool_call>",
    "argument tags": "<tool_call>tide\n<arg_key>harbour</arg_key>\n<arg_value>Höfn</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>[1, 2.5]</arg_value>\n<arg_key>exact</arg_key>\n"
    "<arg_value>true</arg_value>\n</tool_call>",
    "deepseek": DEEPSEEK,
    "function call": f'<function_call>{{"name": "tide", "arguments": {SIX}}}</function_call>',
    "functools": f'functools[{{"name": "tide", "arguments": {SIX}}}]',
    "granite": f'<|tool_call|>[{{"name": "tide", "arguments": {SIX}}}]',
    "harmony": f"<|channel|>commentary to=functions.tide<|message|>{SIX}<|call|>",
}
VARIANTS = [
    ("hermes", HERMES.removesuffix("\n</tool_call>")),
    ("hermes", HERMES.replace("\n", "")),
    ("llama", "<|python_tag|>" + WRITTEN["llama"] + "<|eom_id|>"),
    ("llama", WRITTEN["llama"].replace("parameters", "arguments") + "<|eot_id|>"),
    ("llama", '<|python_tag|>tide.call(harbour="Höfn", days=[1, 2.5], exact=True)'),
    ("llama", f'{{"type": "function", "name": "tide", "parameters": {SIX}}}'),
    ("llama", f'{{"type": "function", "function": {{"name": "tide", "parameters": {SIX}}}}}'),
    ("mistral", f"[TOOL_CALLS]tide[ARGS]{SIX}"),
    ("mistral", WRITTEN["mistral"].replace(" ", "")),
    ("pythonic", WRITTEN["pythonic"].replace("[tide", "tide").replace(")]", ")")),
    ("pythonic", WRITTEN["pythonic"].replace("True", "true")),
    ("pythonic", f"<|tool_call_start|>[{json.dumps(TIDE)}]<|tool_call_end|>"),
    ("function tags", WRITTEN["function tags"].replace("\n", "")),
    ("function tags", WRITTEN["function tags"].replace("tool_call>", "x>")[4:-4].strip()),
    ("function tags", f"<function=tide>{SIX}</function>"),
    (
        "deepseek",
        f"<\uff5ctool▁call▁begin\uff5c>tide<\uff5ctool▁sep\uff5c>{SIX}<\uff5ctool▁call▁end\uff5c>",
    ),
    ("function call", f'<functioncall> {{"name": "tide", "arguments": {json.dumps(SIX)}}}'),
    ("granite", WRITTEN["granite"] + "<|/tool_call|>"),
]


@pytest.mark.parametrize(("name", "text"), [*WRITTEN.items(), *VARIANTS])
def test_a_call_is_read_in_every_format(name: str, text: str) -> None:
    assert parse_reply(text, [name]) == Reply("", "", (call(**TIDE),))


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "llama"])
def test_a_call_may_stand_within_an_answer_and_several_may_follow(name: str) -> None:
    reply = parse_reply(f"I ask. {WRITTEN[name]}{WRITTEN[name]}", [name])
    assert reply.content == "I ask."
    assert called(reply) == [TIDE, TIDE]


def test_several_calls_may_be_one_list() -> None:
    pair = '{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": null}, "id": "9"}'
    for name, text in {
        "mistral": f"[TOOL_CALLS][{pair}]",
        "functools": f"functools[{pair}]",
        "granite": f"<|tool_call|>[{pair}] and so on",
        "llama": pair.replace("}, {", "}; {"),
    }.items():
        reply = parse_reply(text, [name])
        assert reply.tool_calls == (call("a", {}), call("b", {"x": None}, id="9")), name
        assert reply.content == ("and so on" if name == "granite" else "")


def test_python_is_read_and_never_run() -> None:
    def calls(text: str) -> tuple[Any, ...]:
        return parse_reply(f"<|tool_call_start|>{text}<|tool_call_end|>", ["pythonic"]).tool_calls

    assert calls("[a(), b.c(x=-1, y={'k': ('v', None)})]") == (
        call("a", {}),
        call("b.c", {"x": -1, "y": {"k": ["v", None]}}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(r"a(x='\d \n \\ \' \9')") == (call("a", {"x": "\\d \n \\ ' \\9"}),)
    for text in (
        "a(1)",
        "a(**{'x': 1})",
        "a(x=1, x=2)",
        "a(x={'k': 1, 'k': 2})",
        "a(x=open('y'))",
        "a(x=y)",
        "a(x={1: 2})",
        "a(x={1, 2})",
        "a(x=b'1')",
        "a(x=1j)",
        "a(x=1e999)",
        "a(x=f'{1}')",
        "a(x=1) # lost",
        "(lambda: 1)(x=1)",
        "a",
        "[]",
        "",
        "a(x=" + "(" * 9000 + ")" * 9000 + ")",
        "a(x=" + "[" * 250 + "]" * 250 + ")",
    ):
        assert calls(text) == (), text


def test_an_argument_without_quotes_is_what_the_tool_says() -> None:
    text = "<function=a><parameter=x>\n5\n</parameter><parameter=y>5</parameter></function>"
    assert called(parse_reply(text, ["function tags"])) == [
        {"name": "a", "arguments": {"x": 5, "y": 5}}
    ]
    schema = {"name": "a", "parameters": {"properties": {"x": {"type": "string"}}}}
    for tool in (schema, {"type": "function", "function": schema}):
        reply = parse_reply(text, ["function tags"], tools=[tool])
        assert called(reply) == [{"name": "a", "arguments": {"x": "5", "y": 5}}]
    quoted = '<function=a><parameter=x>"5"</parameter></function>'
    assert called(parse_reply(quoted, ["function tags"])) == [
        {"name": "a", "arguments": {"x": '"5"'}}
    ]
    spaced = "<function=a><parameter=x>\n  a\n\n b\n\n</parameter></function>"
    assert called(parse_reply(spaced, ["function tags"])) == [
        {"name": "a", "arguments": {"x": "  a\n\n b\n"}}
    ]


def test_an_answer_in_json_is_no_call_of_a_tool_that_is_not_there() -> None:
    text = WRITTEN["llama"]
    assert parse_reply(text, ["hermes"]) == parse_reply(text) == Reply(text)
    assert parse_reply(text, ["llama"], tools=[{"name": "wind"}]) == Reply(text)
    assert parse_reply(text, ["llama"], tools=[{"name": "tide"}]).tool_calls
    for other in ('{"name": "tide"}', '{"height": 2}', "[1]", f"So: {text}", text + " So."):
        assert parse_reply(other, ["llama"]) == Reply(other)


def test_code_is_no_call() -> None:
    text = "<|python_tag|>print(1)"
    assert parse_reply(text, ["llama"]) == Reply(text)


def test_reasoning_and_calls_are_found_together() -> None:
    reply = parse_reply(f"<think>Ask.</think>\nSo:\n{HERMES}", ["think", "hermes"])
    assert reply == Reply("So:", "Ask.", (call(**TIDE),))
    inside = parse_reply(f"<think>{HERMES}</think>No.", ["think", "hermes"])
    assert inside == Reply("No.", HERMES)


@pytest.mark.parametrize(
    "body",
    [
        "{broken",
        "{}",
        "[]",
        "7",
        '{"name": ""}',
        '{"name": 7}',
        '{"name": "a", "arguments": 7}',
        '{"name": "a", "arguments": "b"}',
        '{"name": "a", "arguments": {"x": 1, "x": 2}}',
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "arguments": {"x": 1e999}}',
        '{"name": "a", "arguments": {}, "parameters": {}}',
        '{"name": "a", "more": "words"}',
        '{"name": "a", "type": "other"}',
        '{"name": "a", "id": []}',
        '{"name": "a", "arguments": ' + "[" * 99999,
    ],
)
def test_a_call_that_cannot_be_read_stays_in_the_text(body: str) -> None:
    for text in (f"So: <tool_call>{body}</tool_call> ", f"<tool_call>\n{body}"):
        assert parse_reply(text, ["hermes"]) == Reply(text)
    good = parse_reply(f"<tool_call>{body}</tool_call>{HERMES}", ["hermes"])
    assert good == Reply(f"<tool_call>{body}</tool_call>", "", (call(**TIDE),))


def test_a_call_with_words_after_its_json_stays() -> None:
    text = '<tool_call>{"name": "a"} and more</tool_call>'
    assert parse_reply(text, ["hermes"]) == Reply(text)


def test_line_ends_in_texts_are_read() -> None:
    text = '<tool_call>{"name": "a", "arguments": {"x": "b\nc"}}</tool_call>'
    assert called(parse_reply(text, ["hermes"])) == [{"name": "a", "arguments": {"x": "b\nc"}}]


# Whatever is written

NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,9}", fullmatch=True).filter(str.isidentifier)
NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(
    lambda name, arguments: {"name": f"f_{name}", "arguments": arguments},
    NAMES,
    st.dictionaries(NAMES.map("a_{}".format), VALUES, max_size=3),
)


def as_tags(one: dict[str, Any], form: str) -> str:
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in one["arguments"].items()
    }
    if form == "function tags":
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function={one['name']}>\n{inner}</function>\n</tool_call>"
    inner = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items()
    )
    return f"<tool_call>{one['name']}\n{inner}</tool_call>"


def as_python(one: dict[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in one["arguments"].items())
    return f"<|tool_call_start|>[{one['name']}({given})]<|tool_call_end|>"


def as_deepseek(one: dict[str, Any]) -> str:
    arguments = json.dumps(one["arguments"])
    inner = f"{one['name']}<\uff5ctool▁sep\uff5c>{arguments}"
    return f"<\uff5ctool▁call▁begin\uff5c>{inner}<\uff5ctool▁call▁end\uff5c>"


WRITERS = {
    "hermes": lambda one: f"<tool_call>\n{json.dumps(one, ensure_ascii=False)}\n</tool_call>",
    "mistral": lambda one: f"[TOOL_CALLS]{one['name']}[ARGS]{json.dumps(one['arguments'])}",
    "granite": lambda one: f"<|tool_call|>[{json.dumps(one)}]",
    "function call": lambda one: f"<function_call>{json.dumps(one)}</function_call>",
    "functools": lambda one: f"functools[{json.dumps(one)}]",
    "pythonic": as_python,
    "deepseek": as_deepseek,
}


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(sorted(WRITERS)))
def test_calls_that_were_written_are_read_as_they_were(
    calls: list[dict[str, Any]], name: str
) -> None:
    text = "\n".join(WRITERS[name](one) for one in calls)
    reply = parse_reply(text, [name])
    if "<|tool_call_end|>" not in json.dumps(calls):
        assert called(reply) == calls
        assert reply.content == ""


@given(CALLS, st.sampled_from(["function tags", "argument tags"]))
def test_calls_without_quotes_are_read_as_they_were(one: dict[str, Any], form: str) -> None:
    texts = {k: {"type": "string"} for k, v in one["arguments"].items() if isinstance(v, str)}
    tool = {"name": one["name"], "parameters": {"properties": texts}}
    reply = parse_reply(as_tags(one, form), [form], tools=[tool])
    if not any("<" in value for value in one["arguments"].values() if isinstance(value, str)):
        assert called(reply) == [one]


MARKS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>"),
    *("<|channel|>", "analysis", "commentary", " to=functions.", "final", "<|message|>"),
    *("<|end|>", "<|start|>", "assistant", "<|call|>", "<|constrain|>json", "<|python_tag|>"),
    *("<function=", ">", "</function>", "<parameter=", "</parameter>", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "functools"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call|>", "<function_call>", "[", "]"),
    *('{"name": "', '", "arguments": {', '"}', "}", "}}", '": "', '", "', "(", "=", ")", "'"),
    *(
        "<\uff5ctool▁call▁begin\uff5c>",
        "<\uff5ctool▁sep\uff5c>",
        "<\uff5ctool▁call▁end\uff5c>",
        "{}",
        ";",
        ",",
        "\n",
        " ",
    ),
    *(WRITTEN[name] for name in sorted(WRITTEN)),
]
WORDS = st.integers(0, 99).map("w{}w".format)


@given(
    st.lists(st.sampled_from(MARKS) | WORDS, max_size=25),
    st.lists(st.sampled_from(FORMATS), unique=True) | st.just(list(FORMATS)),
    st.sampled_from(["", "<think>", "[THINK]\n"]),
)
@example(["<|start|>", "w1w", "<|channel|>", "analysis", "w2w", "<|message|>"], ["harmony"], "")
@example(["[TOOL_CALLS]", "w1w", "[CALL_ID]", "w2w", "[ARGS]", "{}"], ["mistral"], "")
@example(["<tool_call>", "w1w", "<function=", "w2w", ">", "</function>"], ["function tags"], "")
def test_no_word_is_lost_and_none_is_made_up(
    pieces: list[str], formats: list[str], prompt: str
) -> None:
    text = "".join(pieces)
    reply = parse_reply(text, formats, prompt=prompt)
    calls = json.dumps(reply.tool_calls, ensure_ascii=False)
    found = re.findall(r"w\d+w", "|".join([reply.content, reply.reasoning, calls]))
    assert sorted(found) == sorted(re.findall(r"w\d+w", text))


@given(st.text())
def test_a_text_without_marks_stays_as_it_is(text: str) -> None:
    if not any(mark in text for mark in "<[{"):
        assert parse_reply(text, [one for one in FORMATS if one != "llama"]) == Reply(text)


def test_a_long_text_of_marks_takes_no_age() -> None:
    import time

    for mark in ("<tool_call>", "<function=a>", "<tool_call>{", "[TOOL_CALLS]a[ARGS]", "<think>"):
        began = time.thread_time()
        text = mark * 4000
        assert parse_reply(text, FORMATS).content in {text, ""}
        assert time.thread_time() - began < 10, mark


def test_the_examples_run() -> None:
    import doctest

    from ebbtide.models import replies

    done = doctest.testmod(replies)
    assert done.attempted
    assert not done.failed
