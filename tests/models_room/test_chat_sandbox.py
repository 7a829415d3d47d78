"""No chat template can do harm: what reaches too far is refused, what has no end is stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ebbtide.errors import InputError, UnsupportedModelError
from ebbtide.models import chat_sandbox
from ebbtide.models.chat import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def own(template: str) -> ChatTemplate:
    return ChatTemplate({"default": template}, model="tide")


_A = "'a' * 100000"
_NS = "{% set n = namespace(x=START) %}{% for i in range(99999) %}{% set n.x = STEP %}{% endfor %}"


def grown(start: str, step: str) -> str:
    return _NS.replace("START", start).replace("STEP", step)


ENDLESS = {
    "loops": "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3,
    "loops that choose": "{% for i in range(100000) if false %}{% endfor %}" * 3000,
    "loops that are left": "{% for i in range(99999) %}{% for j in range(9) %}{% break %}"
    "{% endfor %}{% continue %}{% endfor %}" * 99,
    "recursive loops": "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro a() %}{{ caller() }}{% endmacro %}"
    "{% macro b() %}{% call a() %}{{ b() }}{% endcall %}{% endmacro %}{{ b() }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a recursive block": "{% block x %}{{ self.x() }}{% endblock %}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a long list": "{{ [1] * 10**9 }}",
    "a power": "{{ 9**9**9 }}",
    "a large product": "{{ (" + "9" * 4000 + ") * (" + "9" * 4000 + ") }}",
    "texts joined": grown("'aa'", "n.x ~ n.x"),
    "texts added": grown("'aa'", "n.x + n.x"),
    "texts written": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "lists added": grown("[1]", "n.x + n.x"),
    "lists in lists": grown("[1]", "[n.x, n.x]") + "{{ n.x }}",
    "dicts in dicts": grown("1", "{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    "deep lists": grown("(1,)", "(n.x,)") + "{{ {n.x: 1} }}",
    "filters of filters": grown("range(9)", "n.x | map('upper')"),
    "many texts": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    f"{{% set n.x = n.x + [{_A} ~ i] %}}{{% endfor %}}",
    "padding by %": "{{ '%1000000000d' % 1 }}",
    "padding by % and *": "{{ '%*d' % (1000000000, 1) }}",
    "padding by format": "{{ '{:1000000000}'.format(1) }}",
    "padding by format twice": "{{ '{:{}}'.format(1, 1000000000) }}",
    "padding by a filter": "{{ 'a' | center(1000000000) }}",
    "padding by methods": "{{ 'a'.ljust(1000000000) }}",
    "zeros": "{{ 'a'.zfill(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "filled often": "{{ ('%(a)s' * 99999) % {'a': 'b' * 99999} }}",
    "formatted often": "{{ ('{a}' * 99999).format(a='b' * 99999) }}",
    "replaced by a method": f"{{{{ ({_A}).replace('a', {_A}) }}}}",
    "replaced by a filter": f"{{{{ {_A} | replace('a', {_A}) }}}}",
    "joined by a method": f"{{{{ ({_A}).join('a ' * 99999) }}}}",
    "joined by a filter": f"{{{{ ('a ' * 99999).split() | join({_A}) }}}}",
    "indented": "{{ 'a\nb' | indent(1000000000) }}",
    "indented JSON": "{{ messages | tojson(indent=1000000000) }}",
    "marks of JSON": f"{{{{ range(99999) | list | tojson(separators=({_A} * 9, ':')) }}}}",
    "sums of lists": "{{ [[1]] * 9 | sum(start=[]) }}",
    "rounding": "{{ 1.5 | round(100000000, 'floor') }}",
    "batches": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slices": "{{ [1] | slice(1000000000) | list }}",
    "searching": "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}" * 99,
    "searching backwards": f"{{{{ ({_A} * 9).rfind('b' ~ {_A} * 5) }}}}",
    "stripping": f"{{{{ ({_A} * 9).strip('b' * 999999) }}}}",
    "comparing": "{{ (range(99999) | list) == (range(99999) | list) }}" * 3000,
    "copies": "{% set x = ('a' * 999999)[1:] %}" * 999,
    "namespaces": "{{ namespace(range(9)) }}{{ cycler(*range(99999)) }}" * 5000,
    "much that is as it is": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "a long date": "{{ strftime_now('%Y' * 99999) }}",
    "too long": "a" * 300_000,
    "brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "sums": "{{ 1" + "+1" * 60000 + " }}",
    "attributes": "{{ x" + ".a" * 60000 + " }}",
    "branches": "{% if 0 %}" + "{% elif 0 %}" * 14000 + "{% endif %}",
    "a long number": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "_SECONDS", 0.3)
    began = time.thread_time()
    with pytest.raises((InputError, UnsupportedModelError)) as caught:
        own(ENDLESS[name]).render(HELLO)
    assert time.thread_time() - began < 15, "seconds, many times what it may take"
    assert len(str(caught.value)) < 900


def test_a_template_has_two_seconds_of_its_own() -> None:
    began = time.thread_time()
    with pytest.raises(UnsupportedModelError, match="more than 2 seconds"):
        own(ENDLESS["loops"]).render(HELLO)
    assert time.thread_time() - began >= 2


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ['']| map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ {}.copy.__self__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ messages | attr('clear')() }}",
        "{{ {}.fromkeys(range(9)) }}",
        "{{ ''.encode() }}",
        "{{ path.unlink() }}",
        "{{ path() }}",
        "{{ kind('x') }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
    ],
)
def test_a_template_that_reaches_too_far_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(UnsupportedModelError, match=r"tide cannot be used.*chat_template="):
        own(template).render(HELLO, path=tmp_path / "kept", kind=Path)
    assert (tmp_path / "kept").exists()


def test_the_one_who_passed_a_template_is_told_so() -> None:
    with pytest.raises(InputError, match="that was passed cannot be used: it includes another"):
        own("x").render(HELLO, template="{% include 'x' %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% nonsense %}",
        "{{ x | nofilter }}",
        "{{ x is notest }}",
        "{% for %}",
        "{{ 'a",
        "{% if 1 %}",
    ],
)
def test_a_template_with_a_mistake_is_refused(template: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be used"):
        own(template).render(HELLO)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ a.b.c }}", "{{ lipsum() }}", "{{ 1 + '' }}"]
)
def test_a_template_that_fails_says_how(template: str) -> None:
    with pytest.raises(InputError, match=r"fails on these messages \(\w+Error: .*chat_template="):
        own(template).render(HELLO)


def test_what_a_template_says_is_passed_on() -> None:
    with pytest.raises(InputError, match="does not take these messages: Only of tides"):
        own("{{ raise_exception('Only of tides!') }}").render(HELLO)


def test_calls_in_several_threads_have_bounds_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    chat = own("{{ 'a' * 12000000 if messages | length == 1 else 'b' }}")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: chat.render(HELLO * (1 + n % 2)), range(8)))
    assert [len(text) for text in texts] == [12000000, 1] * 4
