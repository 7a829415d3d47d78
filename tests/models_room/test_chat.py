"""Chats are rendered as `transformers` renders them, and no template can do harm."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.errors import InputError, LoadError, UnsupportedModelError
from ebbtide.hub import ModelFiles
from ebbtide.models.chat import ChatTemplate
from ebbtide.models.chat_tools import schema

GOLDENS = Path(__file__).parent.parent / "goldens" / "chat"
HELLO = [{"role": "user", "content": "Hello"}]


def golden(name: str) -> Any:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


ASKED = golden("cases")
FAMILIES = sorted(path.stem for path in GOLDENS.glob("*.json"))
FAMILIES = [name for name in FAMILIES if name not in {"cases", "schemas"}]


def chat_of(family: str) -> ChatTemplate:
    template = golden(family)["template"]
    several = template if isinstance(template, dict) else {"default": template}
    return ChatTemplate(several, ASKED["tokens"], model=family)


def own(template: str) -> ChatTemplate:
    return ChatTemplate({"default": template}, model="tide")


def folder(path: Path, **files: object) -> ModelFiles:
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ModelFiles(name="tide", folder=path)


# As transformers has it


@pytest.mark.parametrize("family", FAMILIES)
def test_every_chat_is_rendered_as_transformers_renders_it(family: str) -> None:
    chat, answers = chat_of(family), golden(family)["answers"]
    for name, asked in ASKED["cases"].items():
        answer = answers[name]
        if "text" in answer:
            assert chat.render(asked["messages"], **asked["options"]) == answer["text"], name
        else:
            with pytest.raises(InputError) as caught:
                chat.render(asked["messages"], **asked["options"])
            if not answer["error"].endswith("Error"):
                assert answer["error"].rstrip(".") in str(caught.value), name


def test_the_goldens_hold_texts_and_errors_of_every_family() -> None:
    assert len(FAMILIES) == 9
    answers = [one for family in FAMILIES for one in golden(family)["answers"].values()]
    assert sum("text" in one for one in answers) > 140
    assert sum("error" in one for one in answers) > 10


def test_a_function_is_described_as_transformers_describes_it() -> None:
    known = golden("schemas")
    space: dict[str, Any] = {"__name__": "tools"}
    exec(known["source"], space)
    assert len(known["schemas"]) == 6
    for name, expected in known["schemas"].items():
        assert schema(space[name]) == expected, name
        assert list(schema(space[name])["function"]["parameters"]["properties"]) == list(
            expected["function"]["parameters"]["properties"]
        )


# Which template


def test_a_model_without_a_template_says_to_pass_one(tmp_path: Path) -> None:
    chat = ChatTemplate.read(ModelFiles(name="tide", folder=tmp_path))
    assert chat.templates == {}
    with pytest.raises(UnsupportedModelError, match="chat_template=") as caught:
        chat.render(HELLO)
    assert caught.value.model == "tide"
    assert chat.render(HELLO, template="{{ messages[0].content }}!") == "Hello!"


def test_the_template_and_the_tokens_are_read_from_the_configuration(tmp_path: Path) -> None:
    files = folder(
        tmp_path,
        tokenizer_config_DOT_json={
            "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "pad_token": None,
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": 8,
        },
        special_tokens_map_DOT_json={"bos_token": "no", "pad_token": "<p>", "unk_token": "<u>"},
    )
    chat = ChatTemplate.read(files)
    assert chat.render(HELLO) == "<s></s><image>"
    assert chat.render(HELLO, template="{{ unk_token }}{{ model_max_length }}") == "<u>"
    assert chat.render(HELLO, bos_token="!") == "!</s><image>"


def test_several_templates_have_names(tmp_path: Path) -> None:
    listed = [{"name": one, "template": f"{one} {{{{ bos_token }}}}"} for one in ("a", "tool_use")]
    chat = ChatTemplate.read(
        folder(tmp_path, tokenizer_config_DOT_json={"chat_template": listed, "bos_token": "<s>"})
    )
    assert chat.render(HELLO, template="a") == "a <s>"
    tool = {"type": "function", "function": {"name": "tide"}}
    assert chat.render(HELLO, tools=[tool]) == "tool_use <s>"
    with pytest.raises(InputError, match="no default one: pass one of a, tool_use"):
        chat.render(HELLO)
    with pytest.raises(InputError, match="Did you mean 'tool_use'"):
        chat.render(HELLO, template="tool_usw")
    with pytest.raises(InputError, match="not int"):
        chat.render(HELLO, template=1)  # type: ignore[arg-type]


def test_a_file_of_its_own_is_read_before_the_configuration(tmp_path: Path) -> None:
    files = folder(
        tmp_path,
        tokenizer_config_DOT_json={"chat_template": "old"},
        chat_template_DOT_json={"chat_template": "oldest"},
        chat_template_DOT_jinja="new\n",
        additional_chat_templates__tool_use_DOT_jinja="tools",
        additional_chat_templates__brief_DOT_jinja="brief",
    )
    chat = ChatTemplate.read(files)
    assert chat.templates == {"default": "new\n", "tool_use": "tools", "brief": "brief"}
    assert chat.text() == "new\n"
    assert chat.text(tools=True) == "tools"
    assert chat.text("brief") == "brief"


def test_the_oldest_file_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    files = folder(tmp_path, chat_template_DOT_json={"chat_template": "oldest"})
    assert ChatTemplate.read(files).templates == {"default": "oldest"}


def test_line_ends_of_other_systems_are_not_told_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\r\nb\rc")
    assert ChatTemplate.read(ModelFiles(name="m", folder=tmp_path)).text() == "a\nb\nc"


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(LoadError, match=r"chat_template\.jinja is no UTF-8"):
        ChatTemplate.read(ModelFiles(name="m", folder=tmp_path))


# What is given


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "an empty one"),
        ("Hello", "not str"),
        ({"role": "user", "content": "Hello"}, "not dict"),
        (None, "not an empty one"),
        ([HELLO], "no dict with role and content, but list"),
        ([*HELLO, "Hello"], "Message 1 of the chat is no dict"),
        ([{"content": "Hello"}], "has no role"),
        ([{"role": "", "content": "Hello"}], "has no role"),
        ([{"role": 1, "content": "Hello"}], "has no role"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": None, "tool_calls": []}], "has no content"),
        ([{"role": "user", "content": 7}], "but int"),
        ([{"role": "user", "content": [7]}], "has a part that is no dict"),
        ([{"role": "user", "content": "a", "tool_calls": "b"}], "tool_calls that are no list"),
        ([{"role": "user", "content": "a", "tool_calls": ["b"]}], "tool_calls that are no list"),
    ],
)
def test_what_is_no_chat_is_refused(messages: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        own("x").render(messages)


def test_a_chat_that_holds_itself_is_refused() -> None:
    parts: list[Any] = [{"type": "text", "text": "a"}]
    parts[0]["parts"] = parts
    with pytest.raises(InputError, match="holds itself"):
        own("x").render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tools": "tide"}, "tools takes a list"),
        ({"tools": {"a": 1}}, "tools takes a list"),
        ({"tools": ["tide"]}, "a JSON schema or a function, not str"),
        ({"tools": [int]}, "a JSON schema or a function, not type"),
        ({"documents": "tide"}, "documents takes a list of dicts"),
        ({"documents": ["tide"]}, "documents takes a list of dicts"),
    ],
)
def test_tools_and_documents_that_are_none_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        own("x").render(HELLO, **options)


def test_what_is_given_stays_as_it_is() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    text = own("{{ messages[0].content[0].text }}").render(messages, continue_final_message=True)
    assert text == "a"
    assert json.dumps(messages) == before


def test_a_message_may_have_calls_and_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a"}}]}
    assert own("{{ messages[0].tool_calls[0].function.name }}").render([message]) == "a"
    assert own("{{ messages[0].content is none }}").render([message]) == "True"


def test_a_last_message_that_cannot_be_continued_is_refused() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    image = {"role": "user", "content": [{"type": "image"}]}
    for message in (call, image):
        with pytest.raises(InputError, match="with a text to continue"):
            own("x").render([message], continue_final_message=True)
    with pytest.raises(InputError, match="does not write the last message as it is"):
        own("x").render(HELLO, continue_final_message=True)


def test_the_last_message_is_continued_and_no_answer_is_begun() -> None:
    chat = chat_of("chatml")
    text = chat.render(HELLO, continue_final_message=True, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello")


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text()}
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_text_is_in_the_prompt_as_it_was_said(messages: list[dict[str, str]]) -> None:
    chat = own("{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}")
    expected = "".join(f"[{one['role']}]{one['content']}" for one in messages)
    assert chat.render(messages) == expected
    assert chat.render(messages, continue_final_message=True) == expected


def test_json_is_written_as_transformers_writes_it() -> None:
    def written(form: str, value: object) -> str:
        return own("{{ value | tojson" + form + " }}").render(HELLO, value=value)

    assert written("", {"b": "<é & 'x'>", "a": 1}) == '{"b": "<é & \'x\'>", "a": 1}'
    assert written("(ensure_ascii=true)", "é") == '"\\u00e9"'
    assert written("(indent=2)", [1]) == "[\n  1\n]"
    assert written("(separators=(',', ':'), sort_keys=true)", {"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_the_date_is_at_hand() -> None:
    text = own("{{ strftime_now('%Y-%m-%d') }}").render(HELLO)
    assert text in {time.strftime("%Y-%m-%d"), time.strftime("%Y-%m-%d", time.localtime())}
    assert own("{{ strftime_now('%Y') }}").render(HELLO, strftime_now=lambda _: "1894") == "1894"


# Functions as tools


def tide(harbour: str, unit: Annotated[str, "of height"] = "m") -> float:
    """How high the water is.

    Args:
        harbour (str): Its name.
        unit: Of length.
    """
    return 0.0


def test_a_function_is_given_to_the_template_as_a_schema() -> None:
    chat = own("{{ tools | tojson }}")
    assert json.loads(chat.render(HELLO, tools=[tide])) == [schema(tide)]
    assert schema(tide)["function"] == {
        "name": "tide",
        "description": "How high the water is.",
        "parameters": {
            "type": "object",
            "properties": {
                "harbour": {"type": "string", "description": "Its name."},
                "unit": {"type": "string", "description": "Of length."},
            },
            "required": ["harbour"],
        },
        "return": {"type": "number"},
    }


def test_a_method_is_a_tool_without_its_object() -> None:
    class Harbour:
        def height(self, hour: int) -> None:
            """How high the water is.

            Args:
                hour: When.
            """

    assert list(schema(Harbour().height)["function"]["parameters"]["properties"]) == ["hour"]


def test_an_enumeration_is_a_choice() -> None:
    class Unit(enum.Enum):
        METRES = "m"
        FEET = "ft"

    def height(unit: Any) -> None:
        """How high the water is.

        Args:
            unit: Of length: m
            or: ft
        """

    height.__annotations__["unit"] = Unit
    properties = schema(height)["function"]["parameters"]["properties"]
    assert properties["unit"]["enum"] == ["m", "ft"]
    assert properties["unit"]["type"] == "string"


def _undocumented(a: int) -> None: ...


def _unhinted(a) -> None:  # type: ignore[no-untyped-def]
    """Do.

    Args:
        a: One
    """


def _undescribed(a: int, b: int) -> None:
    """Do.

    Args:
        a: One
    """


def _many(*a: int) -> None:
    """Do."""


def _unknown(a: Nothing) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Do."""


def _odd(a: Callable[[int], int]) -> None:
    """Do.

    Args:
        a: One
    """


def _choices(a: str) -> None:
    """Do.

    Args:
        a: One (choices: [a, b])
    """


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_undocumented, "_undocumented has no docstring: write what it does"),
        (_unhinted, "The argument a of the tool _unhinted has no type hint: add one"),
        (_undescribed, "The argument b of the tool _undescribed is not in its docstring: add"),
        (_many, r"takes \*a: give each argument a name"),
        (_unknown, "A type hint of the tool _unknown cannot be read"),
        (_odd, "none that JSON has"),
        (_choices, "The choices of a of the tool _choices are no JSON list"),
    ],
)
def test_a_function_that_says_too_little_is_refused(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        schema(function)


def test_a_bare_list_is_an_array_and_a_sequence_too() -> None:
    def height(a: list, b: Sequence[str], c: tuple[int, ...], d: object) -> None:  # type: ignore[type-arg]
        """How high the water is.

        Args:
            a: First
            b: Second
            c: Third
            d: Fourth
        """

    properties = schema(height)["function"]["parameters"]["properties"]
    assert [one.get("type") for one in properties.values()] == ["array"] * 3 + ["object"]
    assert properties["b"]["items"] == {"type": "string"}
    assert properties["c"]["items"] == {"type": "integer"}


def test_a_long_chat_stays_within_the_bounds() -> None:
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": f"<think>{n}</think>" + "tide " * 49}
        for n in range(1000)
    ]
    for family in FAMILIES:
        if family not in {"gemma", "mistral"}:
            assert len(chat_of(family).render(messages)) > 1000
    assert len(chat_of("gemma").render(messages)) > 1000
    assert len(chat_of("mistral").render(messages)) > 1000


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ebbtide.models import chat_sandbox

    chat = own("{{ messages | length }}")
    assert chat.render(HELLO) == "1"
    monkeypatch.setattr(chat_sandbox, "environment", lambda: pytest.fail("compiled again"))
    assert chat.render(HELLO * 2) == "2"


def test_jinja_is_imported_by_the_first_chat_only(fresh_process: Callable[..., str]) -> None:
    fresh_process("""
        import sys
        from ebbtide.models.chat import ChatTemplate
        assert "jinja2" not in sys.modules
        chat = ChatTemplate({"default": "{{ messages[0].content }}"})
        assert chat.render([{"role": "user", "content": "a"}]) == "a"
        assert "jinja2" in sys.modules
    """)


def test_the_examples_run() -> None:
    import doctest

    from ebbtide.models import chat, chat_tools

    for module in (chat, chat_tools):
        done = doctest.testmod(module)
        assert done.attempted
        assert not done.failed


def test_mappings_are_taken_for_dicts() -> None:
    class Message(Mapping[str, str]):
        def __init__(self) -> None:
            self.held = {"role": "user", "content": "a"}

        def __getitem__(self, key: str) -> str:
            return self.held[key]

        def __iter__(self) -> Any:
            return iter(self.held)

        def __len__(self) -> int:
            return len(self.held)

    assert own("{{ messages[0] | tojson }}").render([Message()]) == (
        '{"role": "user", "content": "a"}'
    )
