"""A chat template comes with a tokenizer, from anybody: it writes a conversation within bounds, or is refused."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from effc.compiler.models.checkpoints import text_process
from effc.compiler.models.rows.chat_template import TooLong, render_template
from jinja2 import TemplateError

from tests import worlds

BIDI_CONTROLS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def written(folder, text):
    folder.mkdir(exist_ok=True)
    return render_template(worlds.tokenizer(folder, chat=text), BIDI_CONTROLS, add_generation_prompt=True)


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


TIME = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 9 ** (9 ** (9 ** 9)) }}",
    "{{ [1] | slice(9999999999) | list | length }}",
    "{{ lipsum(n=999999999) }}",
    "{% for a in range(99999) if a == range(99999) | sum %}x{% endfor %}",
]
MEMORY = [
    "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{{ 'a' * 9999999999 }}",
    "{% set n = 9999999999 %}{% set s = 'a' %}{{ s * n }}",
    "{{ '%9999999999d' % 1 }}",
    "{% set f = '{:>' ~ 9999999999 ~ '}' %}{{ f.format(1) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ '\t'.expandtabs(2000000000) }}",
    "{{ [1] | batch(999999999, 1) | list | length }}",
    "{{ 'a\n' | indent(9999999999, true) }}",
    "{{ [1] | tojson(indent=9999999999) }}",
    "{{ range(99999) | map('string') | join(range(99999) | join('x')) }}",
    "{% set s = range(99999) | join %}{{ s.replace('', s) }}",
    "{{ 'a'.zfill(20000000) }}",
    "{{ 'a' }}" * 200_000,
]


@pytest.fixture
def quick(monkeypatch):
    """Little time for a text."""
    monkeypatch.setattr(text_process, "SECONDS", 0.3)


@pytest.mark.parametrize("text", TIME)
@pytest.mark.slow
def test_templates_that_take_all_time_are_stopped(tmp_path, text, quick):
    with pytest.raises(TooLong, match=r"more than 0\.3 s"):
        written(tmp_path, text)


@pytest.mark.parametrize("text", MEMORY)
def test_templates_that_take_all_memory_are_stopped(tmp_path, text):
    with pytest.raises(TemplateError, match=r"memory|characters|too large|too long|fit|cannot"):
        written(tmp_path, text)


@pytest.mark.slow
def test_after_a_template_that_was_stopped_the_next_is_written(tmp_path, quick):
    with pytest.raises(TooLong):
        written(tmp_path / "bad", TIME[1])
    assert written(tmp_path / "good", "{{ messages[0].content }}") == "hello"


def test_many_threads_get_each_its_own_text(tmp_path):
    tokenizer = worlds.tokenizer(tmp_path, chat="{{ messages[0].content }}")
    said = [f"turn {number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: render_template(tokenizer, [{"role": "user", "content": text}]), said))
    assert found == said


@pytest.mark.slow
def test_a_process_that_was_forked_has_a_renderer_of_its_own(tmp_path):
    tokenizer = worlds.tokenizer(tmp_path, chat="{{ messages[0].content }}")
    render_template(tokenizer, BIDI_CONTROLS)
    parent = text_process.text_process(0)
    child = os.fork()
    if not child:
        fine = render_template(tokenizer, BIDI_CONTROLS) == "hello" and text_process.text_process(0) is not parent
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_text_is_that_of_transformers(tmp_path):
    chat = (
        "{{ bos_token }}{%- for m in messages -%}\n  {%- if loop.first %}{{ strftime_now('%Y') | length }}{% endif %}"
        "{%- generation %}<{{ m.role }}>{{ {'a': m.content, 'ü': '<'} | tojson }}\n{%- endgeneration %}{%- endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = worlds.tokenizer(tmp_path, chat=chat)
    turns = [*BIDI_CONTROLS, {"role": "user", "content": "\ud800 ß \U0001f600 \n\r\x00"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render_template(tokenizer, turns, add_generation_prompt=True) == expected


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
    except (TemplateError, ValueError):
        return
    assert text == ""
