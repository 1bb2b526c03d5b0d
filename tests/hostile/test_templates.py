"""A chat template comes with a tokenizer, from anybody: it writes a conversation within bounds, or is refused."""

import time

import pytest
from effc.compiler.rows.template import TooLong, rendered
from jinja2 import TemplateError

from tests import worlds

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def written(folder, template):
    return rendered(worlds.tokenizer(folder, chat=template), TURNS, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}", "<user>hello<assistant>hi"),
        ("{% for m in messages %}{% if loop.index0 % 2 == 0 %}{{ m['content'] }}{% endif %}{% endfor %}", "hello"),
        (
            "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{% endfor %}{{ ns.n }}",
            "12",
        ),
        ("{{ messages | map(attribute='role') | join(',') }}", "user,assistant"),
    ],
)
def test_ordinary_templates_are_rendered(tmp_path, template, text):
    assert written(tmp_path, template) == text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(99) %}{% set x = ns.s %}{% set ns.s = x + x %}{% endfor %}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9999999999 * 'a' }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a' }}" * 200_000,
    ],
)
def test_templates_that_take_all_time_or_memory_are_stopped(tmp_path, template):
    started = time.process_time()
    with pytest.raises(TooLong):
        written(tmp_path, template)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__ }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ x() }}",
        "{% import 'os' as os %}",
        "{{ ",
        "{% for %}",
    ],
)
def test_templates_reach_nothing_of_python(tmp_path, template):
    try:
        text = written(tmp_path, template)
    except (TemplateError, TypeError, ValueError):
        return
    assert text == ""
