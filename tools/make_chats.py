r"""Write down what `transformers` makes of chats: the goldens of the chat templates' tests.

What it makes
    tests/goldens/chat/cases.json      {"tokens": the special tokens of every tokenizer,
                                        "cases": {name: {"messages", "options" of the call}}}
    tests/goldens/chat/<family>.json   {"template": the text, or {name: text},
                                        "answers": {case: {"text": what is rendered,
                                                           or "error": what is said instead}}}
    tests/goldens/chat/schemas.json    {"source": functions, "schemas": {function: JSON schema}}

    The templates below are written for the tests, in the manner of families of models: each does
    with its own marks what the family's does, and takes the constructs of Jinja that it takes.

How to run it
    pip install "transformers==4.57.6" "jinja2>=3.1" tokenizers
    python tools/make_chats.py

    No network is used, and no model. Run twice, it writes the same bytes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import get_json_schema

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens" / "chat"

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou answer in one line.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LINES = """\
{% for message in messages %}
<{{ message.role }}>
    {% if message.content is string %}
{{ message.content }}
    {% else %}
        {% for part in message.content %}
            {% if part.type == 'image' %}
[image]
            {% elif part.type == 'text' %}
{{ part.text }}
            {% endif %}
        {% endfor %}
    {% endif %}
</{{ message.role }}>

{% endfor %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "1 Jan 2025" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system }}
{%- if tools is not none %}
    {{- "Answer a call as {\\"name\\": ..., \\"parameters\\": ...}.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs have 9 characters!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are known!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

PHI = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}\
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}\
{% generation %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endgeneration %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}\
{{ eos_token }}{% endif %}"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nCall as <tool_call>{\\"name\\": ..., \\"arguments\\": ...}</tool_call>" }}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(several_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.several_step and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool_response>')
                    and message.content.endswith('</tool_response>')) %}
        {%- set ns.several_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HARMONY = """\
{#- Types of arguments, as TypeScript has them: a macro that calls itself. -#}
{%- macro kind(spec) -%}
    {%- if spec.type == "array" -%}
        {{ kind(spec['items']) if spec['items'] else 'any' }}[]
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{ spec.type | join(' | ') }}
    {%- elif spec.enum is defined -%}
        {{ '"' + spec.enum|join('" | "') + '"' }}
    {%- elif spec.type == "object" and spec.properties -%}
        {{ '{' }}
        {%- for name, one in spec.properties|dictsort -%}
            {{ name }}{{ '' if name in (spec.required or []) else '?' }}: {{ kind(one) }}
            {%- if not loop.last %}, {% endif -%}
        {%- endfor -%}
        {{ '}' }}
    {%- elif spec.type in ('integer', 'number') -%}
        number
    {%- else -%}
        {{ spec.type | default('any', true) }}
    {%- endif -%}
{%- endmacro -%}
{%- macro tagged(role, channel=none) -%}
    <|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{{ caller() -}}
    <|end|>
{%- endmacro -%}
{%- call tagged('system') -%}
    Reasoning: {{ reasoning_effort | default("medium") }}
    {%- filter upper %} of {{ messages | length }} messages{% endfilter %}
{%- endcall -%}
{%- if tools -%}
    {%- call tagged('developer') -%}
        {%- for tool in tools -%}
            {%- set f = tool.function %}
// {{ f.description | replace('\\n', '\\n// ') }}
type {{ f.name }} = (_: {{ kind(f.parameters) }}) => {{ kind(f['return'] or {}) }};
        {%- endfor -%}
    {%- endcall -%}
{%- endif -%}
{%- set last = namespace(answer=-1) -%}
{%- for m in messages if m.role == 'assistant' -%}{%- set last.answer = loop.index -%}{%- endfor -%}
{%- for m in messages -%}
    {%- if m.role == 'note' -%}{%- continue -%}{%- endif -%}
    {%- if m.role == 'stop' -%}{%- break -%}{%- endif -%}
    {%- set text -%}
        {{ m.content or '' }}
        {%- if m.when is defined %}
            {{- ' (%04d, ' % m.when }}{{ "{:>4})".format(m.when) }}
        {%- endif -%}
    {%- endset -%}
    {%- if loop.previtem is defined and loop.previtem.role == m.role %}
{# the same again #}
    {%- endif -%}
    {%- with channel = loop.cycle('analysis', 'final') if m.role == 'assistant' else none -%}
        {%- call tagged(m.role, channel) %}{{ text | trim | indent(2) }}{% endcall -%}
    {%- endwith -%}
{%- else -%}
    nothing
{%- endfor -%}
{%- for d in documents or [] %}
[{{ loop.index }}/{{ loop.length }}] {{ d.title | title -}}
: {{ d.text | truncate(20, true, '...', 0) }}
{%- endfor %}
{{- last.answer ~ '/' ~ (messages | map(attribute='content') | select('string') | list | length) }}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

FAMILIES: dict[str, str | dict[str, str]] = {
    "chatml": CHATML,
    "lines": LINES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "qwen": QWEN,
    "harmony": HARMONY,
    "several": {"default": CHATML, "tool_use": QWEN, "short": "{{ messages | length }}"},
}


def said(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A chat of a user and an assistant in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "tide", "arguments": {"harbour": 'Höfn "north"', "days": [1, 2.5]}},
}
CALLED = [
    *said("When is high tide?", system="You know <tides> & winds."),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '"At six."', "name": "tide"},
]
TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "When the water is high,\nin a harbour.",
        "parameters": {
            "type": "object",
            "properties": {
                "harbour": {"type": "string", "description": "Where <it> is & when: 'now'"},
                "days": {"type": "array", "items": {"type": "number"}},
                "unit": {"type": "string", "enum": ["m", "ft"]},
                "more": {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}},
            },
            "required": ["harbour"],
        },
        "return": {"type": "string"},
    },
}
TURNS = said("Is it windy? ", "  Very — 風が強い 🌊.\n", "And\n\nnow?", system="You are brief.")

CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": (said("Hello"), {}),
    "no prompt": (said("Hello", "Good day."), {"add_generation_prompt": False}),
    "turns": (TURNS, {}),
    "turns without a system": (TURNS[1:], {}),
    "two of a user": (said("Hello")[:1] * 2, {}),
    "tools": (said("When is high tide?"), {"tools": [TIDE]}),
    "two tools": (TURNS, {"tools": [TIDE, {**TIDE, "type": "other"}]}),
    "no tools": (TURNS, {"tools": []}),
    "called": (CALLED, {"tools": [TIDE]}),
    "called and answered": ([*CALLED, *said("", "At six.")[1:]], {"tools": [TIDE]}),
    "continued": (said("Write a line.", "The tide "), {"continue_final_message": True}),
    "continued, not trimmed": (said("Write.", "  The tide"), {"continue_final_message": True}),
    "thought": (said("Two?", "<think>\nOne and one.\n</think>\n\nTwo.", "And three?"), {}),
    "thought last": (said("Two?", "<think>\nOne and one.\n</think>\n\nTwo."), {}),
    "no thinking": (said("Two?"), {"enable_thinking": False}),
    "documents": (said("What?"), {"documents": [{"title": "on tides", "text": "Twice " * 9}]}),
    "a date": (said("Today?"), {"date_string": "3 Mar 2031", "reasoning_effort": "high"}),
    "parts": (
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What's it?"}]}],
        {},
    ),
    "parts continued": (
        [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}]}],
        {"continue_final_message": True},
    ),
    "odd roles": (
        [
            {"role": "user", "content": "Now\nthen", "when": 7},
            {"role": "note", "content": "left out"},
            {"role": "user", "content": "again"},
            {"role": "stop", "content": "left out"},
            {"role": "user", "content": "never"},
        ],
        {},
    ),
}

FUNCTIONS = '''
def plain(harbour: str, days: int, exact: bool, height: float = 1.5):
    """When the water is high.

    It is asked of the harbour's office,
    which knows.

    Args:
        harbour: Where, in a word
            or two.
        days: How many.

        exact: To the minute?
        height: How high: in metres.

    Returns:
        The hours.

    Raises:
        ValueError: Never.
    """

def nothing() -> None:
    """Does nothing."""

def returned(a: list[int]) -> dict[str, float]:
    """Give something back.

    Args:
        a: Numbers

    Returns:
        What they
        are called.
    """
    return {}

def nested(
    a: list[list[str]],
    b: dict[str, list[int]],
    c: list[Any],
    d: dict,
    e: tuple[int, str],
    f: Any,
    g: dict[str, dict[str, bool]],
) -> Any:
    """All sorts.

    Args:
        a: First
        b: Second
        c: Third
        d: Fourth
        e: Fifth
        f: Sixth
        g: Seventh
    """

def either(
    a: Optional[int],
    b: Union[int, str],
    c: int | None = None,
    d: str | float | None = None,
    e: Optional[list[str]] = None,
    f: Union[list[int], str, None] = None,
):
    """Either.

    Args:
        a: First
        b: Second
        c: Third
        d: Fourth
        e: Fifth
        f: Sixth
    """

def chosen(
    a: Literal["m", "ft"],
    b: Literal[1, "two", None],
    c: str,
    d: Optional[Literal[1, 2]] = 1,
):
    """Chosen.

    Args:
        a: A unit
        b: Any
        c: A drink (choices: ["tea ", "coffee"])
        d: A number
    """
'''


def rendered(family: str, name: str) -> dict[str, Any]:
    """What comes of one case of a family."""
    messages, options = CASES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        **TOKENS,
    )
    tokenizer.chat_template = FAMILIES[family]
    asked = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    try:
        # As Ebbtide has it, no tools are the same as none given.
        asked["tools"] = asked.get("tools") or None
        return {"text": tokenizer.apply_chat_template(messages, tokenize=False, **asked)}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}
    except (TypeError, ValueError) as error:
        return {"error": type(error).__name__}


def write(name: str, content: object) -> None:
    path = GOLDENS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    cases = {name: {"messages": chat, "options": asked} for name, (chat, asked) in CASES.items()}
    made_by = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    write("cases", {"made_by": made_by, "tokens": TOKENS, "cases": cases})
    for family, template in FAMILIES.items():
        answers = {name: rendered(family, name) for name in CASES}
        write(family, {"template": template, "answers": answers})
    source = "from typing import Any, Literal, Optional, Union\n" + FUNCTIONS
    space: dict[str, Any] = {"__name__": "tools"}
    exec(source, space)
    functions = {name: one for name, one in space.items() if inspect.isfunction(one)}
    schemas = {name: get_json_schema(one) for name, one in functions.items()}
    write("schemas", {"source": source, "schemas": schemas})


if __name__ == "__main__":
    main()
