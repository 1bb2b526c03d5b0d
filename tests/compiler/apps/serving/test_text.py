"""Text of growing answers: whole characters, never a stop string, the same however it comes in pieces."""

import pytest
from effc.compiler.apps.serving.text import StopStrings, TextDecoder
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo_folders_by_name()["tiny-llama"])


@pytest.fixture(scope="module")
def sentences():
    """A tokenizer of the other kind: words carry their space as a mark, other characters are bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁word", "s", "▁", "日"]
    numbers = {word: i for i, word in enumerate(words)}
    own = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def pieces_of(tokenizer, ids, before=()):
    words = TextDecoder(tokenizer, before)
    return [*(words.push(token) for token in ids), words.end()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_are_the_text_and_split_no_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 2047), max_size=40))
def test_any_tokens_at_all_become_the_text_that_they_are_together(tokenizer, ids):
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids)


@given(parts=st.lists(st.sampled_from(["▁a", "▁word", "s", "▁", "日", *"é漢🎉🙂a"]), max_size=20))
def test_words_that_carry_their_space_keep_it_behind_a_prompt(sentences, parts):
    def tokens(part):
        return [sentences.convert_tokens_to_ids(part)] if part[0] in "▁s日" else [1 + byte for byte in part.encode()]

    ids, prompt = [token for part in parts for token in tokens(part)], [258, 259]
    assert "".join(pieces_of(sentences, ids)) == decoded(sentences, ids)
    found = pieces_of(sentences, ids, prompt)
    assert "".join(found) == decoded(sentences, prompt + ids)[len("words") :]
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_of_several_tokens_comes_when_its_last_one_does(tokenizer):
    ids = tokenizer("漢", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert len(ids) > 1 and pieces[: len(ids) - 1] == [""] * (len(ids) - 1)
    assert pieces[len(ids) - 1].endswith("漢") and pieces[-1] == ""


def test_bytes_that_never_become_a_character_are_told_in_the_end(tokenizer):
    ids = tokenizer("漢", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer, ids)).endswith("\ufffd")


@given(
    text=st.text("ab", max_size=14), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), data=st.data()
)
def test_text_ends_before_the_first_stop_string_however_it_comes_in_pieces(text, stops, data):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = text[: min(ends)[1]] if ends else text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    found, told = StopStrings(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        told += found.push_text(text[start:end])
        assert wanted.startswith(told)
    assert told + found.end() == wanted and found.met == bool(ends)


def test_text_that_can_be_no_stop_string_is_not_held_back():
    stops = StopStrings(["END"])
    assert [stops.push_text(text) for text in ("one", " E", "N", "!", "EN", "D more", "x")] == [
        "one",
        " ",
        "",
        "EN!",
        "",
        "",
        "",
    ]
    assert stops.met and stops.end() == ""
