"""Data words: rows and their laws, and what they refuse."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from effc.compiler.inputs.data.chat import Chat
from effc.compiler.inputs.data.choices import Choices, answer_index_labels_first
from effc.compiler.inputs.data.hub import Hub
from effc.compiler.inputs.data.labels import Labels
from effc.compiler.inputs.data.pairs import Pairs
from effc.compiler.inputs.data.synthetic import Synthetic
from effc.compiler.inputs.data.text import Text
from effc.compiler.inputs.data.tokens import Tokens
from effc.compiler.inputs.sources.hf import Hf
from effc.dsl.checker.values import DataRef
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests import worlds

torch.set_num_threads(1)
TEXT = "In the beginning God created the heaven and the earth. " * 20


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("home")
    worlds.tokenizer(worlds.llama(folder / "model"))
    (folder / "a.txt").write_text(TEXT)
    return folder


@pytest.fixture
def ctx(home, tmp_path):
    origin = Hf(name=str(home / "model")).resolve(worlds.context(home))
    made = worlds.context(tmp_path, origin)
    (tmp_path / "a.txt").write_text(TEXT)
    return made


def rows(word, ctx) -> torch.Tensor:
    made = torch.stack(list(word.rows(ctx.tokenizer, ctx)))
    assert made.dtype == torch.int64
    return made


def lines(path, records) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


# -- text ----------------------------------------------------------------------------------------------------


def test_rows_are_the_text_in_order_behind_the_start_token(ctx):
    made = rows(Text(path="a.txt", length=17), ctx)
    assert (made[:, 0] == ctx.tokenizer.bos_token_id).all()
    text = ctx.tokenizer.decode(made[:, 1:].flatten())
    assert TEXT.startswith(text) and len(TEXT) - len(text) < 16
    without = rows(Text(path="a.txt", length=17, start="never"), ctx)
    assert TEXT.startswith(ctx.tokenizer.decode(without.flatten()))


def test_a_tokenizer_without_the_habit_gets_no_start_token(ctx, tmp_path):
    plain = worlds.tokenizer(tmp_path, start=False)
    auto = torch.stack(list(Text(path="a.txt", length=9).rows(plain, ctx)))
    always = torch.stack(list(Text(path="a.txt", length=9, start="always").rows(plain, ctx)))
    assert auto[0, 0] != plain.bos_token_id == always[0, 0]


@given(samples=st.integers(1, 60), fewer=st.integers(1, 60), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_samples_are_distinct_windows_and_fewer_are_a_prefix_of_more(home, samples, fewer, seed):
    ctx = worlds.context(home, Hf(name=str(home / "model")).resolve(worlds.context(home)))
    everything = rows(Text(path="a.txt", length=17, start="never"), ctx)
    ids = torch.arange(len(everything))
    chosen = rows(Text(path="a.txt", length=17, start="never", samples=samples, seed=seed), ctx)
    less = rows(Text(path="a.txt", length=17, start="never", samples=min(fewer, samples), seed=seed), ctx)
    assert torch.equal(chosen[: len(less)], less) and len(chosen) == samples
    places = [ids[(everything == row).all(1)].tolist() for row in chosen]
    assert all(places)


def test_no_window_is_drawn_twice(ctx):
    (ctx.folder / "b.txt").write_text("".join(f"{i:04d}" for i in range(500)))
    chosen = rows(Text(path="b.txt", length=4, start="never", samples=500), ctx)
    assert len(chosen.unique(dim=0)) == 500


def test_the_seed_decides_and_the_runs_own_seed_is_the_default(ctx):
    one, again, other = (rows(Text(path="a.txt", length=9, samples=20, seed=s), ctx) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    ctx = replace(ctx, settings=replace(ctx.settings, seed=2))
    assert torch.equal(rows(Text(path="a.txt", length=9, samples=20), ctx), other)


def test_files_globs_and_lists_follow_each_other(ctx):
    for name, text in (("x1.txt", "one "), ("x2.txt", "two ")):
        (ctx.folder / name).write_text(text * 10)
    both = rows(Text(path=("x1.txt", "x2.txt"), length=80, start="never"), ctx)
    assert torch.equal(both, rows(Text(path="x*.txt", length=80, start="never"), ctx))
    assert ctx.tokenizer.decode(both[0]) == "one " * 10 + "two " * 10


def test_identity_follows_content_parameters_and_tokenizer(ctx, tmp_path):
    def identity(**changes):
        return Text(**{"path": "a.txt", "length": 9, "samples": 3, "seed": 1, **changes}).identity(ctx)

    first = identity()
    assert first == identity()
    assert len({first, identity(length=10), identity(samples=4), identity(seed=2), identity(start="never")}) == 5
    assert identity(samples=None, seed=1) == identity(samples=None, seed=2), "without samples the seed plays no part"
    (ctx.folder / "c.txt").write_text(TEXT)
    assert identity(path="c.txt") == first, "what counts is content, not names"
    (ctx.folder / "a.txt").write_text(TEXT + "x")
    assert identity() != first


def test_a_text_shorter_than_a_row_names_its_tokens(ctx):
    (ctx.folder / "s.txt").write_text("short")
    (found,) = worlds.refused(lambda: rows(Text(path="s.txt", length=512), ctx)).diagnostics
    assert found.slug == "too-short" and "5 tokens make 0 of 1 rows of 512" in found.message
    (found,) = worlds.refused(lambda: rows(Text(path="a.txt", length=512, samples=9), ctx)).diagnostics
    assert found.slug == "too-short" and "`samples: 2`" in found.help


def test_an_empty_file(ctx):
    (ctx.folder / "e.txt").write_text("")
    assert worlds.slug(lambda: rows(Text(path="e.txt", length=8), ctx)) == "too-short"


def test_another_encoding_is_named_with_its_byte(ctx):
    (ctx.folder / "l.txt").write_bytes(b"caf\xe9 " * 100)
    (found,) = worlds.refused(lambda: rows(Text(path="l.txt", length=8), ctx)).diagnostics
    assert found.slug == "not-utf8" and "byte 3 (0xe9)" in found.message


def test_a_byte_order_mark_is_no_token(ctx):
    (ctx.folder / "b.txt").write_bytes(b"\xef\xbb\xbfabcd")
    assert ctx.tokenizer.decode(rows(Text(path="b.txt", length=4, start="never"), ctx)[0]) == "abcd"


@pytest.mark.parametrize("path", ["b.txt", "*.md", "no/a.txt", "."])
def test_a_file_that_is_not_there(ctx, path):
    (found,) = worlds.refused(lambda: rows(Text(path=path, length=8), ctx)).diagnostics
    assert found.slug == "no-file"
    assert ("`a.txt`" in found.help) == (path == "b.txt")


@pytest.mark.parametrize("kind", [Text, Pairs, partial(Labels, classes=("x", "y"))])
def test_texts_for_a_model_without_tokenizer_are_refused(home, tmp_path, kind):
    origin = Hf(name=str(worlds.llama(tmp_path / "bare"))).resolve(worlds.context(tmp_path))
    ctx = worlds.context(home, origin)
    assert worlds.slug(lambda: rows(kind(path="a.txt", length=8), ctx)) == "no-tokenizer"


# -- rows and the model --------------------------------------------------------------------------------------


def test_rows_must_fit_the_model(ctx):
    ctx = worlds.context(
        ctx.folder,
        ctx.origin,
        {
            "long": ("text", {"path": "a.txt", "length": 65}),
            "good": ("text", {"path": "a.txt", "length": 64}),
            "high": ("tokens", {"path": "high.safetensors"}),
            "low": ("tokens", {"path": "low.safetensors"}),
        },
    )
    save_file({"ids": torch.tensor([[1, worlds.VOCABULARY]])}, ctx.folder / "high.safetensors")
    save_file({"ids": torch.tensor([[1, -1]], dtype=torch.int32)}, ctx.folder / "low.safetensors")
    assert ctx.rows(DataRef("good")) is ctx.rows(DataRef("good"))
    for name, fact in (("long", "64 positions"), ("high", "id 261"), ("low", "id -1")):
        (found,) = worlds.refused(lambda name=name: ctx.rows(DataRef(name))).diagnostics
        assert found.slug == "bad-rows" and fact in found.message


# -- tokens, synthetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_tokens_are_what_the_file_holds(ctx, dtype):
    ids = torch.arange(12, dtype=dtype).view(3, 4)
    save_file({"ids": ids}, ctx.folder / "r.safetensors")
    assert torch.equal(rows(Tokens(path="r.safetensors"), ctx), ids.long())
    assert len(rows(Tokens(path="r.safetensors", samples=2), ctx)) == 2


@pytest.mark.parametrize(
    ("tensors", "chosen", "slug"),
    [
        ({"a": torch.zeros(2, 3)}, {}, "bad-record"),
        ({"a": torch.zeros(6, dtype=torch.int64)}, {}, "bad-record"),
        ({"a": torch.zeros(2, 1, dtype=torch.int64)}, {}, "bad-rows"),
        ({"a": torch.zeros(0, 4, dtype=torch.int64)}, {}, "bad-rows"),
        ({"a": torch.zeros(2, 3, dtype=torch.int64), "b": torch.zeros(1)}, {}, "no-field"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int64)}, {"tensor": "row"}, "no-field"),
        ({"a": torch.zeros(2, 3, dtype=torch.int64)}, {"samples": 3}, "too-short"),
    ],
)
def test_token_files_that_hold_no_rows(ctx, tensors, chosen, slug):
    save_file(tensors, ctx.folder / "r.safetensors")
    assert worlds.slug(lambda: rows(Tokens(path="r.safetensors", **chosen), ctx)) == slug


def test_a_token_file_of_another_format(ctx):
    assert worlds.slug(lambda: rows(Tokens(path="a.txt"), ctx)) == "damaged-weights"


def test_synthetic_rows_follow_the_seed_and_cover_the_vocabulary(ctx):
    one, again, other = (rows(Synthetic(count=40, length=32, seed=s), ctx) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (40, 32)
    assert one.min() >= 0 and one.max() < worlds.VOCABULARY and one.max() > 200
    assert Synthetic(seed=1).identity(ctx) != Synthetic(seed=2).identity(ctx)


# -- chat ----------------------------------------------------------------------------------------------------

BIDI_CONTROLS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}]


def test_conversations_follow_each_other_each_closed_by_the_end_token(ctx):
    lines(ctx.folder / "c.jsonl", [{"messages": BIDI_CONTROLS}] * 9)
    made = rows(Chat(path="c.jsonl", length=10), ctx)
    text = "user: Who?\nassistant: I am.</s>" * 9
    assert text.startswith(ctx.tokenizer.decode(made.flatten()))


def test_the_tokenizers_template_is_used(ctx, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}</s>"
    chatty = worlds.tokenizer(tmp_path, chat=template)
    lines(ctx.folder / "c.jsonl", [{"q": "Who?", "a": "I am."}])
    made = torch.stack(list(Chat(path="c.jsonl", length=27, prompt="q", response="a").rows(chatty, ctx)))
    assert chatty.decode(made[0]) == "<user>Who?<assistant>I am.</s>"


def test_prompt_and_response_without_a_template(ctx):
    (ctx.folder / "c.csv").write_text("q,a\nWho?,I am.\n")
    made = rows(Chat(path="c.csv", length=11, prompt="q", response="a"), ctx)
    assert ctx.tokenizer.decode(made[0]) == "Who?\nI am.</s>"


MORE = [*BIDI_CONTROLS, {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
TAGGED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(("template", "said"), [(None, "I am.Here.</s>"), (TAGGED, "I am.Here.</s>")])
def test_what_assistants_say_is_known_token_by_token(ctx, tmp_path, template, said):
    tokenizer = worlds.tokenizer(tmp_path, chat=template)
    lines(ctx.folder / "c.jsonl", [{"messages": MORE}, {"messages": MORE[:3]}])
    word = Chat(path="c.jsonl", length=8)
    ids, mask = (torch.cat(list(rows(tokenizer, ctx))) for rows in (word.rows, word.assistant_masks))
    assert len(ids) == len(mask)
    assert (said + "I am.").startswith(tokenizer.decode(ids[mask.bool()]))  # the tail that fills no row is left out


def test_said_and_rows_are_chosen_alike(ctx):
    lines(
        ctx.folder / "c.jsonl",
        [{"messages": [BIDI_CONTROLS[0], {"role": "assistant", "content": "!" * n}]} for n in range(1, 30)],
    )
    word = Chat(path="c.jsonl", length=8, samples=9, seed=3)
    ids, mask = (torch.stack(list(rows(ctx.tokenizer, ctx))) for rows in (word.rows, word.assistant_masks))
    (mark,) = ctx.tokenizer("!", add_special_tokens=False)["input_ids"]
    assert torch.equal(mask.bool(), (ids == mark) | (ids == ctx.tokenizer.eos_token_id))


@pytest.mark.parametrize("template", ["{{ messages|length }}: {% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_template_that_hides_who_speaks_is_refused(ctx, tmp_path, template):
    lines(ctx.folder / "c.jsonl", [{"messages": MORE}])
    word, tokenizer = Chat(path="c.jsonl", length=8), worlds.tokenizer(tmp_path, chat=template)
    assert worlds.refused(lambda: list(word.assistant_masks(tokenizer, ctx))).diagnostics[0].slug == "no-speakers"


def test_a_conversation_that_the_template_refuses_is_told(ctx, tmp_path):
    lines(ctx.folder / "c.jsonl", [{"messages": BIDI_CONTROLS}])
    strict = worlds.tokenizer(tmp_path, chat="{{ raise_exception('only system here') }}")
    (found,) = worlds.refused(lambda: list(Chat(path="c.jsonl", length=8).rows(strict, ctx))).diagnostics
    assert found.slug == "bad-record" and "only system here" in found.message


@pytest.mark.parametrize(
    ("text", "args", "slug", "fact"),
    [
        ('{"messages": []}\n', {}, "bad-record", "record 1"),
        ('{"messages": [{"role": "user"}]}\n', {}, "bad-record", "record 1"),
        ('{"message": []}\n', {}, "no-field", "`messages`"),
        ('{"q": 1}\n{"a": 2}\n', {"prompt": "q"}, "no-field", "record 2"),
        ('{"q": [1]}\n', {"prompt": "q"}, "bad-record", "`q`"),
        ('{"q": "x"}\n\nnot json\n', {"prompt": "q"}, "bad-record", "line 3"),
        ("3\n", {}, "bad-record", "record 1"),
        ("", {}, "bad-record", "no records"),
    ],
)
def test_records_that_are_none(ctx, text, args, slug, fact):
    (ctx.folder / "c.jsonl").write_text(text)
    (found,) = worlds.refused(lambda: rows(Chat(path="c.jsonl", length=8, **args), ctx)).diagnostics
    assert found.slug == slug and fact in found.message


def test_a_missing_field_names_the_nearest(ctx):
    lines(ctx.folder / "c.jsonl", [{"message": BIDI_CONTROLS}])
    assert "`message`" in worlds.refused(lambda: rows(Chat(path="c.jsonl", length=8), ctx)).diagnostics[0].help


# -- choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "args"),
    [
        ({"question": "Q", "options": ["no", "yes"], "answer": 1}, {}),
        ({"question": "Q", "options": ["no", "yes"], "answer": "1"}, {}),
        ({"question": "Q", "options": ["no", "yes"], "answer": "B"}, {}),
        ({"question": "Q", "options": ["no", "yes"], "answer": "yes"}, {}),
        (
            {"question": "Q", "choices": {"text": ["no", "yes"], "label": ["1", "2"]}, "key": "2"},
            {"options": "choices", "answer": "key"},
        ),
        ({"question": "Q", "a": "no", "b": "yes", "answer": "b"}, {"options": ("a", "b")}),
        ({"question": "Q", "answer": "yes"}, {"fixed": ("no", "yes")}),
    ],
)
def test_every_layout_of_choices_means_the_same(ctx, record, args):
    lines(ctx.folder / "q.jsonl", [record])
    (item,) = Choices(path="q.jsonl", **args).tokenize_questions(ctx.tokenizer, ctx)
    assert item.answer == 1 and item.lengths == (2, 3)
    front, back = item.rows[1][: item.starts[1]], item.rows[1][item.starts[1] :]
    assert ctx.tokenizer.decode(front) == "<s>Question: Q\nAnswer:" and ctx.tokenizer.decode(back) == " yes"


def test_true_and_false_are_answers():
    assert answer_index_labels_first(True, ["false", "true"], []) == 1
    assert [answer_index_labels_first(answer, ["x", "y"], []) for answer in ("C", -1)] == [None, None]
    assert answer_index_labels_first("3", ["3", "2"], []) == 0, "a text wins over a number"


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Q", "options": ["no", "yes"], "answer": 2},
        {"question": "Q", "options": ["no"], "answer": 0},
        {"question": "Q", "options": "no", "answer": 0},
        {"question": "Q", "options": ["no", 3], "answer": 0},
        {"question": None, "options": ["no", "yes"], "answer": 0},
        {"question": "Q", "options": ["", "x"], "answer": 0},
    ],
)
def test_questions_that_are_none(ctx, record):
    lines(ctx.folder / "q.jsonl", [record])
    assert worlds.slug(lambda: Choices(path="q.jsonl").tokenize_questions(ctx.tokenizer, ctx)) == "bad-record"


def test_choices_as_rows_hold_the_right_answers(ctx):
    lines(ctx.folder / "q.jsonl", [{"question": "Q", "options": ["no", "yes"], "answer": 1}] * 20)
    made = rows(Choices(path="q.jsonl", length=40), ctx)
    assert "Answer: yes\n\nQuestion" in ctx.tokenizer.decode(made[0])


# -- hub -----------------------------------------------------------------------------------------------------


def test_local_files_of_every_format_give_the_same_rows(ctx, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(ctx.folder / "datasets"))
    records = [{"text": f"Line {i} of it."} for i in range(9)]
    lines(ctx.folder / "d.jsonl", records)
    (ctx.folder / "d.json").write_text(json.dumps(records))
    table = datasets.Dataset.from_list(records)
    (ctx.folder / "d.csv").write_text("text\n" + "".join(f"{r['text']}\n" for r in records))
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.data.table, ctx.folder / "d.parquet")
    words = [Hub(name=f"./d.{ending}", length=16) for ending in ("jsonl", "json", "csv", "parquet")]
    made = [rows(w, ctx) for w in words]
    assert all(torch.equal(m, made[0]) for m in made)
    assert len({w.identity(ctx) for w in words}) == 1
    assert ctx.tokenizer.decode(made[0][0, 1:]) == "Line 0 of it.\n\n"


def test_what_the_hub_word_refuses(ctx, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(ctx.folder / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    lines(ctx.folder / "d.jsonl", [{"text": "x", "number": 1}])
    cases = [
        ({"name": "d.jsonl", "field": "txt"}, "no-field"),
        ({"name": "d.jsonl", "field": "number"}, "bad-record"),
        ({"name": "d.jsonl", "split": "test"}, "bad-dataset"),
        ({"name": "./none.jsonl"}, "no-file"),
        ({"name": "./a.md"}, "no-file"),
        ({"name": "no/such-data-of-effc-tests"}, "data-unreachable"),
    ]
    for args, slug in cases:
        assert worlds.slug(lambda args=args: rows(Hub(length=8, **args), ctx)) == slug, args
