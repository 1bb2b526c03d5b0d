"""A client's session with a real `effc lsp` process."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compiler.cli.editor.conftest import SCRIPT, SECONDS

RECIPE = """effspec 1
use "./mine.effspec" as mine
param keep: ratio = 85%
model base = zoo("tiny-llama")
data calib = generated(8, length: 64)
profile laptop { threads: 2 }
pipeline lean(base) {
  slim = prune.blocks(remove: 1, score: perplexity(calib))
  thin = prune.channels(keep: keep of channels, on: "model.layers.*.mlp")
  more = mine.narrow(share: 80%)
}
expect lean { decode.p50 <= 1.5 * base on laptop }
emit lean { hf("lean", from: thin) hf("more") }
"""
MODULE = """effspec 1
param share: ratio = 75%
model any = zoo("tiny-llama")
data own = generated(4, length: 32)
pipeline narrow(any) { cut = prune.channels(keep: share of channels) }
"""


def place(text: str, word: str, after: int = 0) -> tuple[int, int]:
    """Line and column, in UTF-16, of a word in a text, `after` characters into it."""
    before = text[: text.index(word) + after]
    line = before.rpartition("\n")[2]
    return before.count("\n"), len(line.encode("utf-16-le")) // 2


def between(diagnostic: dict) -> tuple[int, int, int, int]:
    start, end = diagnostic["range"]["start"], diagnostic["range"]["end"]
    return start["line"], start["character"], end["line"], end["character"]


def written(text: str, edits: list[dict]) -> str:
    """A text with the edits of an answer put in."""
    lines = text.split("\n")
    starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines) + 1)]

    def offset(position: dict) -> int:
        start = starts[min(position["line"], len(lines))]
        line = text[start:].split("\n")[0].encode("utf-16-le")
        return start + len(line[: 2 * position["character"]].decode("utf-16-le"))

    for edit in sorted(edits, key=lambda e: offset(e["range"]["start"]), reverse=True):
        text = text[: offset(edit["range"]["start"])] + edit["newText"] + text[offset(edit["range"]["end"]) :]
    return text


@pytest.fixture(autouse=True)
def recipe_is_open(editor):
    """Each test begins with the recipe open as it is written above, whichever ran before it."""
    (editor.folder / "mine.effspec").write_text(MODULE)
    (editor.folder / "lean.effspec").write_text(RECIPE)
    assert editor.show("lean.effspec", RECIPE) == []


def test_a_sound_recipe_has_no_diagnostics_and_a_changed_one_those_of_check_in_their_places(editor):
    (found,) = editor.change("lean.effspec", RECIPE.replace("prune.blocks", "prune.bloks"))
    assert (
        found["code"] == "unknown-word" and found["severity"] == 1 and "did you mean `prune.blocks`" in found["message"]
    )
    assert between(found) == (7, 9, 7, 20)
    assert editor.change("lean.effspec", RECIPE) == []


def test_a_folder_whose_address_is_written_with_percent_signs_is_as_good_as_any(editor):
    (editor.folder / "my recipés").mkdir()
    name, text = "my recipés/lean.effspec", RECIPE.replace("./mine", "../mine")
    assert editor.open(name, text) == []
    (found,) = editor.change(name, text.replace("prune.blocks", "prune.bloks"))
    assert found["code"] == "unknown-word"
    editor.say("textDocument/didSave", {"textDocument": {"uri": editor.uri(name)}})
    assert [d["code"] for d in editor.diagnostics(name)] == ["unknown-word"]


def test_places_are_counted_in_utf_16_whatever_stands_before_them(editor):
    text = RECIPE.replace('"lean"', '"лёгкая-🙂🙂"').replace("from: thin", "from: thim")
    (found, *_) = [d for d in editor.change("lean.effspec", text) if d["code"] == "unknown-name"]
    line, column = place(text, "thim")
    assert between(found) == (line, column, line, column + 4)
    assert "\U0001f642" in text and column != text.split("\n")[line].index("thim")
    (action,) = editor.of("codeAction", "lean.effspec", range=found["range"], context={"diagnostics": [found]})
    (edits,) = action["edit"]["changes"].values()
    assert written(text, edits) == text.replace("thim", "thin")
    for end in ("\r\n", "\f\n", "\v\n", "\x85\n", "\u2028\n"):
        moved = "effspec 1 # " + end + text.partition("\n")[2]
        found = next(d for d in editor.change("lean.effspec", moved) if d["message"].startswith("no step is called"))
        assert found["range"]["start"]["line"] == line


def test_diagnostics_of_a_change_come_within_a_tenth_of_a_second_without_torch(editor):
    taken = []
    for i in range(15):
        begun = time.perf_counter()
        editor.change("lean.effspec", RECIPE + f"# {i}\n")
        taken.append(time.perf_counter() - begun)
    # The bound of the promise is 0.1 s on a machine of one's own; here others compute, so the fastest is judged.
    assert min(taken) < 0.1, [round(t, 3) for t in taken]
    assert statistics.median(taken) < 2
    mapped = Path(f"/proc/{editor.process.pid}/maps")
    assert not mapped.exists() or "libtorch" not in mapped.read_text()


def test_hover_shows_the_page_of_a_word_what_it_comes_to_here_and_what_a_name_stands_for(editor):
    page = editor.at("hover", "lean.effspec", *place(RECIPE, "prune.channels", 3))["contents"]["value"]
    assert page.startswith("**prune.channels, a pass**") and "keep: keep of channels\n" in page
    assert "align: " in page and "# default" in page
    assert "**on: " in editor.at("hover", "lean.effspec", *place(RECIPE, "on: ", 1))["contents"]["value"]
    name = editor.at("hover", "lean.effspec", *place(RECIPE, "calib))", 2))["contents"]["value"]
    assert "data calib = generated(8, length: 64)" in name and "temperature: 1    # default" in name
    assert editor.at("hover", "lean.effspec", 0, 0) is None


def labels(editor, text: str, line: int, character: int) -> dict[str, str]:
    """What is offered at a place, and the text that each puts there."""
    editor.change("lean.effspec", text)
    found = editor.at("completion", "lean.effspec", line, character)["items"]
    return {item["label"]: item["textEdit"]["newText"] for item in found}


def complete(editor, old: str, new: str) -> dict[str, str]:
    """What is offered at the `^` of a recipe in which `new` stands in place of `old`."""
    text = RECIPE.replace(old, new)
    line, character = place(text, "^")
    return labels(editor, text.replace("^", ""), line, character)


@pytest.mark.slow
def test_completion_knows_statements_words_parameters_values_and_names(editor):
    assert {"pipeline", "expect", "model"} <= set(complete(editor, "profile laptop", "^\nprofile laptop"))
    passes = complete(editor, "slim = prune.blocks(", "slim = prune.^(")
    assert {"prune.blocks", "tune.heal", "mine.narrow"} <= set(passes)
    assert "hf" in complete(editor, 'hf("more")', "^") and "gguf" in complete(editor, 'zoo("tiny-llama")', "^")
    given = complete(editor, "remove: 1, ", "remove: 1, ^, ")
    assert given["unit"] == "unit: " and "remove" not in given and "from" in given
    assert set(complete(editor, "remove: 1, ", "unit: ^, ")) >= {"branch", "layer"}
    assert {"perplexity", "params"} <= set(complete(editor, "score: perplexity(calib)", "score: ^"))
    assert {"calib", "mine.own"} <= set(complete(editor, "score: perplexity(calib)", "score: perplexity(^"))
    assert set(complete(editor, "keep: keep", "from: ^, keep: keep")) == {"slim", "base"}
    assert "channels" in complete(editor, "keep of channels", "85% of ^")
    assert "%" in complete(editor, "keep of channels", "85^")
    assert "base" in complete(editor, "1.5 * base", "1.5 * ^") and "laptop" in complete(editor, "on laptop", "on ^")
    assert {"isa", "threads"} <= set(complete(editor, "threads: 2", "^"))
    assert "lean" in complete(editor, "emit lean {", "emit ^ {")
    assert "std.text" in complete(editor, 'use "./mine.effspec" as mine', "use ^")
    assert "./mine.effspec" in complete(editor, "./mine.effspec", "^")
    assert "mine.effspec" in complete(editor, "generated(8", 'text("^"')
    assert complete(editor, "profile laptop", "# a comment ^\nprofile laptop") == {}


def test_completion_offers_the_models_own_module_paths_inside_and_outside_of_quotes(editor):
    found = complete(editor, '"model.layers.*.mlp"', '"model.^"')
    assert {"model.layers.*.mlp", "model.layers.0.mlp"} <= set(found) and "model.layers.*.self_attn" not in found
    assert '"model.layers.*.mlp"' in complete(editor, '"model.layers.*.mlp"', "^")


def test_a_definition_is_found_across_use(editor):
    own = editor.at("definition", "lean.effspec", *place(RECIPE, "thin) hf", 1))
    assert own["uri"] == editor.uri("lean.effspec") and own["range"]["start"] == {"line": 8, "character": 2}
    for word, after, line, column in (("mine.narrow", 6, 4, 9), ("share: 80%", 2, 1, 6)):
        there = editor.at("definition", "lean.effspec", *place(RECIPE, word, after))
        assert there["uri"] == editor.uri("mine.effspec")
        assert there["range"]["start"] == {"line": line, "character": column}
    assert editor.at("definition", "lean.effspec", *place(RECIPE, "mine.narrow", 1))["range"]["start"]["line"] == 1
    assert editor.at("definition", "lean.effspec", *place(RECIPE, "./mine", 3))["uri"] == editor.uri("mine.effspec")
    text = RECIPE.replace('use "./mine', 'use std.text\nuse "./mine').replace(
        "perplexity(calib))", "perplexity(text.calib))"
    )
    editor.change("lean.effspec", text)
    shipped = editor.at("definition", "lean.effspec", *place(text, "text.calib", 6))
    assert shipped["uri"].endswith("/std/text.effspec") and shipped["range"]["start"]["character"] == len("data ")
    alias = editor.at("definition", "lean.effspec", *place(text, "text.calib", 2))
    assert alias["uri"] == editor.uri("lean.effspec") and alias["range"]["start"] == {"line": 1, "character": 8}
    assert editor.at("prepareRename", "lean.effspec", *place(text, "text.calib", 6)) is None


def test_a_name_is_changed_wherever_the_recipe_has_it_and_in_recipes_that_use_it(editor):
    found = editor.at("rename", "lean.effspec", *place(RECIPE, "calib =", 1), newName="rows")
    (edits,) = found["changes"].values()
    assert written(RECIPE, edits) == RECIPE.replace("calib", "rows")
    found = editor.at("rename", "lean.effspec", *place(RECIPE, "thin =", 1), newName="narrow")["changes"]
    assert written(RECIPE, found[editor.uri("lean.effspec")]) == RECIPE.replace("thin", "narrow")
    editor.open("mine.effspec", MODULE)
    found = editor.at("rename", "mine.effspec", *place(MODULE, "narrow", 1), newName="taper")["changes"]
    assert written(RECIPE, found[editor.uri("lean.effspec")]) == RECIPE.replace("mine.narrow", "mine.taper")
    assert written(MODULE, found[editor.uri("mine.effspec")]) == MODULE.replace("narrow", "taper")
    found = editor.at("rename", "lean.effspec", *place(RECIPE, "share: 80%", 2), newName="part")["changes"]
    assert written(RECIPE, found[editor.uri("lean.effspec")]) == RECIPE.replace("share:", "part:")
    assert written(MODULE, found[editor.uri("mine.effspec")]) == MODULE.replace("share", "part")


def test_a_document_that_is_not_open_is_read_as_it_lies_on_disk(editor):
    editor.open("mine.effspec", MODULE)
    beside = editor.folder / "beside.effspec"
    beside.write_text(RECIPE)
    there = editor.at("definition", "beside.effspec", *place(RECIPE, "mine.narrow", 6))
    assert there["uri"] == editor.uri("mine.effspec") and there["range"]["start"]["line"] == 4
    beside.write_text(later := RECIPE.replace("calib", "verses"))
    found = editor.at("rename", "beside.effspec", *place(later, "verses =", 1), newName="rows")
    assert written(later, found["changes"][editor.uri("beside.effspec")]) == later.replace("verses", "rows")
    found = editor.at("rename", "mine.effspec", *place(MODULE, "narrow", 1), newName="taper")["changes"]
    assert {editor.uri("beside.effspec"), editor.uri("lean.effspec")} <= set(found)
    beside.unlink()
    where = {"textDocument": {"uri": editor.uri("beside.effspec")}, "position": {"line": 0, "character": 0}}
    assert "beside.effspec" in editor.answer("textDocument/definition", where)["error"]["message"]


def test_a_name_that_is_none_or_is_taken_is_refused_with_the_reason(editor):
    line, character = place(RECIPE, "calib =", 1)
    where = {"textDocument": {"uri": editor.uri("lean.effspec")}, "position": {"line": line, "character": character}}
    for name, said in (("base", "declared already"), ("2x", "can't be a name"), ("in", "can't be a name")):
        assert said in editor.answer("textDocument/rename", {**where, "newName": name})["error"]["message"]
    assert editor.at("prepareRename", "lean.effspec", *place(RECIPE, "prune.blocks", 2)) is None
    assert editor.at("prepareRename", "lean.effspec", *place(RECIPE, "slim", 2))["start"]["character"] == 2


def test_a_document_is_written_as_effc_fmt_writes_it_and_a_torn_one_is_left(editor):
    from effc.dsl.syntax.format import format_source
    from effc.dsl.syntax.source import Source

    loose = RECIPE.replace("  slim = ", " slim   =   ").replace("remove: 1,", "remove:1,")
    editor.change("lean.effspec", loose)
    edits = editor.of("formatting", "lean.effspec", options={"tabSize": 2, "insertSpaces": True})
    assert written(loose, edits) == format_source(Source("lean.effspec", RECIPE)) != loose
    editor.change("lean.effspec", loose.replace("remove:1", "remove 1 1"))
    assert editor.of("formatting", "lean.effspec", options={"tabSize": 2, "insertSpaces": True}) is None


def test_corrections_are_offered_sure_ones_first_and_all_at_once(editor):
    text = (
        RECIPE.replace("prune.blocks", "prune.bloks")
        .replace("prune.channels", "prune.chanels")
        .replace('hf("more")', 'native("more", group: 48)')
    )
    found = editor.change("lean.effspec", text)
    asked = {"context": {"diagnostics": []}}
    word = next(d for d in found if "prune.bloks" in d["message"])
    actions = editor.of("codeAction", "lean.effspec", range=word["range"], **asked)
    assert actions[0]["title"] == "Write `prune.blocks`" and actions[0]["isPreferred"]
    (edits,) = actions[-1]["edit"]["changes"].values()
    assert actions[-1]["kind"] == "source.fixAll"
    assert written(text, edits) == RECIPE.replace('hf("more")', 'native("more", group: 48)')
    group = next(d for d in found if d["code"] == "out-of-range")
    (offer, *_) = editor.of("codeAction", "lean.effspec", range=group["range"], **asked)
    assert offer["title"] == "Write `32`" and not offer["isPreferred"]


def test_the_outline_has_statements_and_steps_and_blocks_fold(editor):
    found = editor.of("documentSymbol", "lean.effspec")
    assert [s["name"] for s in found] == ["keep", "base", "calib", "laptop", "lean", "expect lean", "emit lean"]
    assert [s["name"] for s in found[4]["children"]] == ["slim", "thin", "more"]
    assert [(f["startLine"], f["endLine"]) for f in editor.of("foldingRange", "lean.effspec")] == [(6, 10)]


def test_faults_of_a_module_stand_at_its_use(editor):
    broken = MODULE.replace("75%", "75MB")
    editor.show("mine.effspec", broken)
    found = next(d for d in editor.change("lean.effspec", RECIPE + "# again\n") if d["code"] == "wrong-unit")
    assert found["range"]["start"]["line"] == 1
    assert found["relatedInformation"][0]["location"]["uri"] == editor.uri("mine.effspec")
    editor.change("mine.effspec", MODULE)
    assert editor.change("lean.effspec", RECIPE) == []


def test_opening_a_recipe_runs_nothing_that_it_names(editor):
    (editor.folder / "make.py").write_text("open('ran', 'w')\ndef make(config=None): open('ran', 'w')\n")
    text = RECIPE.replace('zoo("tiny-llama")', 'module("./make.py:make")')
    found = editor.open("runs.effspec", text)
    while not any(d["code"] == "remote-code" for d in found):
        found = editor.diagnostics("runs.effspec")
    assert not (editor.folder / "ran").exists()
    hub = RECIPE.replace('zoo("tiny-llama")', 'hf("nobody/nothing-at-all")')
    found = editor.open("hub.effspec", hub)
    while not any(d["code"] == "unseen-model" for d in found):  # it is looked for in the hub's cache, beside the editor
        found = editor.diagnostics("hub.effspec")


REQUESTS = (
    "hover",
    "completion",
    "definition",
    "rename",
    "prepareRename",
    "formatting",
    "codeAction",
    "documentSymbol",
    "foldingRange",
    "inlayHint",
    "references",
)


def test_every_request_with_malformed_params_is_answered_and_says_so(editor):
    for params in ({"position": 3}, {}, [], "text", {"textDocument": {"uri": 7}, "position": None}):
        for name in REQUESTS:
            answer = editor.answer(f"textDocument/{name}", params)
            assert answer["error"]["code"] in (-32602, -32603), (name, params, answer)


def test_every_request_that_is_declared_is_among_them(editor):
    declared = {name.removesuffix("Provider") for name in editor.capabilities if name.endswith("Provider")}
    asked = {"documentFormatting" if name == "formatting" else name for name in REQUESTS}
    assert declared - {"executeCommand"} <= asked, declared


def test_malformed_messages_and_odd_texts_do_not_end_the_session(editor):
    editor.send(b"{not json")
    assert "error" in editor.answer("textDocument/hover", {"position": 3})
    editor.send(b'{"jsonrpc": "2.0", "method": "textDocument/didChange", "params": {"textDocument": {}}}')
    editor.send(b"[]")
    editor.raw(b"Content-Length: nonsense\r\n\r\n")
    editor.raw(b"garbage\r\n")
    assert "error" in editor.answer("no/such/method", {})
    for text in (
        "",
        "\ufeffeffspec 1\n",
        "((((" * 100,
        '"' * 9,
        "effspec 1\nuse ",
        "pipeline",
        "\0",
        "effspec 1\r" * 3,
    ):
        editor.open("odd.effspec", text)
        editor.at("completion", "odd.effspec", 9, 9)
        editor.at("hover", "odd.effspec", 0, 3)
        editor.of("documentSymbol", "odd.effspec")
    assert editor.change("lean.effspec", RECIPE) == []


@pytest.mark.slow
def test_a_message_that_is_announced_as_longer_than_memory_is_refused_in_words(tmp_path):
    command = [sys.executable, "-X", "utf8", "-c", SCRIPT, "lsp"]
    announced = b"Content-Length: 99000000000\r\n\r\n{"
    done = subprocess.run(command, input=announced, capture_output=True, cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 2 and b"error[long-message]: a message of 92.2 GiB" in done.stderr


@pytest.mark.parametrize("address", ["file:///%00", "file:///a%00.effspec", "untitled:%00", "file:///a\0"])
def test_an_address_with_a_zero_byte_is_no_file(editor, address):
    for name in ("hover", "documentSymbol"):
        asked = {"textDocument": {"uri": address}, "position": {"line": 0, "character": 0}}
        assert editor.answer(f"textDocument/{name}", asked)["error"]["code"] == -32602
