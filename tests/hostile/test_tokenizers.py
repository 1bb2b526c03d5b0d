"""Tokenizers of strangers: no file takes all memory or ends the process, and no text either."""

import base64
import copy
import json
import os
import pickle
import shutil

import pytest
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.models.checkpoints import tokenizer_checks, tokenizer_pieces
from effc.compiler.models.checkpoints.tokenizer import load_checked_tokenizer
from effc.dsl.syntax.diagnostics import Reject
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.worlds import tokenizer

DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BACKTRACKS = {"Regex": "(a+)+$"}
LONG = "a" * 45 + "b!"


def forms(table: bytes) -> dict:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}}


def several(kind: str, plural: str, steps: list) -> dict:
    return {kind: {"type": "Sequence", plural: steps}}


REFUSED = {
    "doubles": several("normalizer", "normalizers", [DOUBLED] * 40),
    "doubles by turns": several(
        "normalizer",
        "normalizers",
        [
            {"type": "Replace", "pattern": {"String": old}, "content": new}
            for old, new in [("a", "bb"), ("b", "aa")] * 20
        ],
    ),
    "doubles below": several("normalizer", "normalizers", [several("x", "normalizers", [DOUBLED] * 20)["x"]] * 2),
    "bytes of bytes": several("normalizer", "normalizers", [{"type": "ByteLevel"}] * 40),
    "bytes of bytes of words": several(
        "pre_tokenizer",
        "pretokenizers",
        [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 40,
    ),
    "puts in pages": several("normalizer", "normalizers", [{"type": "Prepend", "prepend": "a" * 200}] * 200),
    "puts in a page": {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 5000}},
    "doubles what it says": several("decoder", "decoders", [DOUBLED] * 40),
    "cuts before the start": {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}},
    "a text a thousand times": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
            "pair": [],
            "special_tokens": {},
        }
    },
    "pads": {
        "padding": {
            "strategy": {"Fixed": 2**31},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
    "pads to multiples": {
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": 2**31,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
    "steps back": {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}},
    "pieces of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a table without an end": forms(b"\xff\xff\xff\xff"),
    "a table that is none": forms(bytes(12)),
    "a table of pages": forms((4).to_bytes(4, "little") + bytes(4) + b"a" * 5000 + b"\0"),
    "no steps beside a step": {"normalizer": {**DOUBLED, "normalizers": []}},
    "no steps beside steps": {
        "normalizer": {"type": "Sequence", "normalizers": [{**DOUBLED, "content": "a" * 2000, "normalizers": []}]}
    },
    "no type": {"normalizer": {"prepend": "a" * 200}},
    "no type of a sequence": {"normalizer": {"normalizers": [DOUBLED]}},
    "a type of another part": {"normalizer": {"type": "FixedLength", "length": 0}},
    "a type that is none": {"pre_tokenizer": {"type": "Endless"}},
    "a field of another step": {"normalizer": {"type": "NFC", "content": "a"}},
    "steps that are none": {"normalizer": {"type": "Sequence", "normalizers": {"type": "NFC"}}},
    "a list of another part": {"normalizer": {"type": "Sequence", "pretokenizers": [DOUBLED] * 40}},
    "a part that is none": {"endless": {}},
    "a model that is none": {"model": 3},
    "a model of another type": {"model": {"type": "Endless", "vocab": {}}},
    "a word without an end": {"model": {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 1 << 40}},
    "an id beyond all tables": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}},
    "an id that is none": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": "c"}, "unk_token": "a"}},
    "a step that is none": {"normalizer": 7},
    "no numbers": {"padding": {"strategy": {"Fixed": "x"}}},
}


@pytest.fixture
def folder(tmp_path):
    tokenizer(tmp_path)
    return tmp_path


def changed(folder, change: dict) -> None:
    body = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(body | change))


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_any_memory_or_breaks_is_refused_before_the_library_reads_it(folder, name):
    changed(folder, REFUSED[name])
    with pytest.raises(Reject, match="describes no tokenizer that is taken"):
        load_checked_tokenizer(folder, "m")


def test_an_added_token_of_the_librarys_own_file_prints_no_line_of_its_own(folder, capfd):
    """transformers reads it from there where the config has none."""
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text())
    body["added_tokens"][0]["\x1b[2J::set-output"] = False
    path.write_text(json.dumps(body))
    with pytest.raises(Reject, match="describes no tokenizer that is taken"):
        load_checked_tokenizer(folder, "a")
    assert "set-output" not in capfd.readouterr().out


@pytest.mark.parametrize("place", ["added_tokens_decoder", "unk_token", "additional_special_tokens"])
def test_an_added_token_prints_no_line_of_its_own(folder, capfd, place):
    token = {"content": "<x>", "special": True, "x\nok: fake": True}
    said = {"added_tokens_decoder": {"300": token}, "unk_token": token, "additional_special_tokens": [token]}[place]
    path = folder / "tokenizer_config.json"
    body = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**body, place: said}))
    with pytest.raises(Reject, match=r"tokenizer_config\.json describes no tokenizer"):
        load_checked_tokenizer(folder, "m")
    assert "fake" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "table", [b"\xff\xff\xff\xff", (4).to_bytes(4, "little") + bytes(4) + b"a" * 5000], ids=["endless", "pages"]
)
def test_a_table_of_sentencepiece_is_looked_at_too(folder, table):
    inner = b"\x12" + bytes([len(table) & 127 | 128, len(table) >> 7]) + table
    piece = b"\x0a\x03\x0a\x01a"
    (folder / "tokenizer.model").write_bytes(piece + b"\x1a" + bytes([len(inner) & 127 | 128, len(inner) >> 7]) + inner)
    with pytest.raises(Reject, match=r"tokenizer\.model describes no tokenizer"):
        load_checked_tokenizer(folder, "m")


LARGE = base64.b64encode(b"ab" * 600_000)
PIECE = b"a" * 2000
CONVERTED = {
    "tiktoken.model": LARGE + b" 0\n",
    "qwen.tiktoken": b"YQ== 0\n" + LARGE + b" 1\n",
    "tekken.json": json.dumps(
        {"config": {"pattern": "a"}, "vocab": [{"rank": 0, "token_bytes": LARGE.decode()}]}
    ).encode(),
    "tekken_240911.json": json.dumps({"config": {"pattern": "(a" * 5000}, "vocab": []}).encode(),
    "tokenizer.model": b"\x0a\xd3\x0f\x0a\xd0\x0f" + PIECE,
    "source.spm": b"\x0a\xd3\x0f\x0a\xd0\x0f" + PIECE,
    "tokenizer.model.v3": b"\x0a\xd3\x0f\x0a\xd0\x0f" + PIECE,
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_piece_that_would_be_cut_in_all_ways_for_days_is_refused(folder, name):
    (folder / name).write_bytes(CONVERTED[name])
    with pytest.raises(Reject, match=r"describes no tokenizer that is taken"):
        load_checked_tokenizer(folder, "m")


def test_vocabularies_of_ordinary_pieces_are_taken():
    lines = b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256))
    tokenizer_pieces.refuse_unbounded_tiktoken(lines)
    tokenizer_pieces.refuse_unbounded_tekken(
        {
            "config": {"pattern": r"\s+"},
            "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
            "special_tokens": [{"token_str": "<s>"}],
        }
    )
    tokenizer_pieces.refuse_unbounded_sentencepiece(b"\x0a\x03\x0a\x01a")


@pytest.mark.parametrize("key", ["gguf_file", "fast_tokenizer_files", "tokenizer_object", "init_inputs"])
def test_a_field_that_leads_to_other_files_is_refused(folder, tmp_path, key):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: ["../secret.gguf"]}))
    with pytest.raises(Reject, match=f"has a `{key}`"):
        load_checked_tokenizer(folder, "m")


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "spm_file", "added_tokens_file"])
def test_files_that_a_config_names_are_not_opened(folder, tmp_path_factory, key):
    """A pipe that nobody writes to would hold up whoever opens it."""
    outside = tmp_path_factory.mktemp("outside") / "pipe"
    os.mkfifo(outside)
    path = folder / "tokenizer_config.json"
    expected = load_checked_tokenizer(folder, "m")("and it came")["input_ids"]
    path.write_text(json.dumps({**json.loads(path.read_text()), key: str(outside)}))
    assert load_checked_tokenizer(folder, "m")("and it came")["input_ids"] == expected


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/x.jinja", "chat_template.jinja", "merges.txt", "vocab.json"]
)
def test_a_file_of_a_tokenizer_that_is_a_link_to_outside_is_refused(folder, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("a secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(Reject, match="odd-file"):
        load_checked_tokenizer(folder, "m")


def steps_of(part: str, module) -> list[dict]:
    """Steps as the library itself writes them, of each of its classes that is made of these arguments."""
    whole, written = Tokenizer(models.BPE()), []
    arguments = [(), ("a", "b"), ("a",), ("a", "isolated"), (("a", 1), ("b", 2))]
    for kind in (k for k in vars(module).values() if isinstance(k, type)):
        for given in arguments:
            try:
                setattr(whole, part, kind(*given))
            except Exception:
                continue
            written.append(json.loads(whole.to_str()))
            break
    return written


@pytest.mark.parametrize(
    ("part", "module", "least"),
    [
        ("normalizer", normalizers, 11), ("pre_tokenizer", pre_tokenizers, 11), ("decoder", decoders, 9),
        ("post_processor", processors, 4),
    ],
)  # fmt: skip
def test_steps_as_the_library_writes_them_are_taken(part, module, least):
    written = steps_of(part, module)
    assert len(written) >= least
    for body in written:
        tokenizer_checks.refuse_unbounded_tokenizer_json(body)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": BACKTRACKS, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", "pattern": BACKTRACKS, "content": "x"}},
    ],
    ids=["split", "replace"],
)
def test_an_expression_that_backtracks_is_a_diagnostic(folder, change):
    changed(folder, change)
    made = load_checked_tokenizer(folder, "m")
    assert made("b")["input_ids"]
    for call in (lambda: made(LONG), lambda: made([LONG]), lambda: made.encode(LONG), lambda: made.tokenize(LONG)):
        with pytest.raises(Reject, match="breaks at a text"):
            call()


def test_a_decoder_that_panics_is_one(folder):
    changed(folder, {"decoder": {"type": "Strip", "content": "a", "start": 900, "stop": 900}})
    made = load_checked_tokenizer(folder, "m")
    with pytest.raises(Reject, match="breaks at a text"):
        made.decode(made("ab")["input_ids"])


def test_a_tokenizer_that_is_watched_is_as_it_was(folder, tmp_path):
    made = load_checked_tokenizer(folder, "m")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other("and it came")["input_ids"] == made("and it came")["input_ids"]
    made.save_pretrained(tmp_path / "saved")
    assert load_checked_tokenizer(tmp_path / "saved", "m").get_vocab() == made.get_vocab()
    name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == name


def test_what_real_tokenizers_do_is_taken():
    replaced = [
        {"type": "Replace", "pattern": {"String": old}, "content": new}
        for old, new in (
            ("…", "..."),
            ("½", "1/2"),
            ("™", "(tm)"),
            ("``", '"'),
            ("''", '"'),
            ("№", "No."),
            ("«", "<<"),
            ("»", ">>"),
        )
    ]
    albert = [
        *replaced,
        {"type": "NFKD"},
        {"type": "Precompiled", "precompiled_charsmap": None},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    cut = [
        {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
    }
    tokenizer_checks.refuse_unbounded_tokenizer_json(
        {
            **several("normalizer", "normalizers", albert),
            **several("pre_tokenizer", "pretokenizers", cut),
            "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]},
            "padding": None,
            "truncation": {"max_length": 512, "stride": 0},
            "model": {"max_input_chars_per_word": 100},
        }
    )


def test_the_zoo_opens(tmp_path):
    for name, folder in zoo_folders_by_name().items():
        if (folder / "tokenizer.json").exists():
            shutil.copytree(folder, tmp_path / name)
            assert load_checked_tokenizer(tmp_path / name, name)("a")["input_ids"]
