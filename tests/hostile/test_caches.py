"""A cache is read as it was written, or its damage is said: nothing that was edited decides what a compile gives."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from effc.compiler.analysis.planning import skeleton_store
from effc.compiler.core import hashes
from effc.compiler.core.cache import Cache, canonical_json_sha256, tensor_hash
from effc.compiler.core.sealed_json import sealed_json_bytes
from effc.compiler.ir.step_results import StepResults
from effc.dsl.checker.skeleton import Skeleton
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save

from tests.stored.test_stored import origin_in
from tests.worlds import refused

torch.set_num_threads(1)
STORED = Path(__file__).parents[1] / "stored" / "8d012cb.tar.xz"


def unpacked(folder: Path) -> Path:
    """What `8d012cb` stored, its steps with seals."""
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    for path in (folder / "8d012cb" / "cache" / "steps").iterdir():
        path.write_bytes(sealed_json_bytes(json.loads(path.read_bytes())))
    return folder / "8d012cb"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return unpacked(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def world(written, tmp_path):
    shutil.copytree(written, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.store_value({"metric": "perplexity", "of": "base"}, 34.0)
    parts = {"step": {"word": "prune.blocks"}, "seed": 0}
    cache.write_step_record(
        canonical_json_sha256(parts),
        parts,
        {"tensors": {"w": cache.store_tensor(torch.ones(8))}, "borrowed": {}, "edits": {}, "notes": {}},
    )
    return cache


def only(cache, folder) -> Path:
    (path,) = (p for p in (cache.folder / folder).rglob("*") if p.is_file())
    return path


def damage_of(call) -> str:
    found = refused(call).diagnostics[0]
    assert found.slug in ("cache-damaged", "odd-file")
    return found.message


def test_a_blob_that_was_edited_is_not_used(cache):
    blob = only(cache, "blobs")
    blob.write_bytes(save({"t": torch.full((8,), 2.0)}))
    assert "another tensor than its name says" in damage_of(
        lambda: cache.load_verified_tensor(tensor_hash(torch.ones(8)))
    )
    assert [path for path, _ in cache.damaged_files_with_faults()] == [blob]


def test_a_skeleton_that_was_edited_or_is_another_ones_is_found_again(cache):
    folder = cache.folder / "skeletons"
    skeleton_store.store_skeleton(folder, "one", Skeleton("x", (), ()))
    path = folder / "one.json"
    whole = path.read_bytes()
    assert skeleton_store.load_skeleton(folder, "one") == Skeleton("x", (), ()) and not list(
        cache.damaged_files_with_faults()
    )
    (folder / "two.json").write_bytes(whole)
    path.write_bytes(whole.replace(b'"x"', b'"y"'))
    assert skeleton_store.load_skeleton(folder, "one") is None and skeleton_store.load_skeleton(folder, "two") is None
    assert [found.name for found, _ in cache.damaged_files_with_faults()] == ["one.json", "two.json"]


def test_a_remembered_hash_that_was_edited_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    path, folder = tmp_path / "f", tmp_path / "kept"
    path.write_bytes(b"one")
    right = hashes.cached_file_hash(path, folder)
    (kept,) = (p for p in folder.rglob("*") if p.is_file())
    for text in (right[::-1], kept.read_text().replace(right, right[::-1])):
        kept.write_text(text)
        assert hashes.cached_file_hash(path, folder) == right


def test_a_measured_value_that_was_edited_is_not_used(cache):
    path = only(cache, "values")
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"value": 340.0}))
    assert "was changed" in damage_of(lambda: cache.read_value({"metric": "perplexity", "of": "base"}))
    assert [found for found, _ in cache.damaged_files_with_faults()] == [path]


def test_a_value_in_anothers_place_is_not_used(cache):
    path, other = only(cache, "values"), {"metric": "perplexity", "of": "other"}
    shutil.copy(path, path.with_name(f"{canonical_json_sha256(other)}.json"))
    assert "of something else" in damage_of(lambda: cache.read_value(other))


def test_a_step_without_a_seal_is_computed_again(cache):
    path = only(cache, "steps")
    body = json.loads(path.read_text())
    body.pop("seal")
    path.write_text(json.dumps(body))
    assert cache.read_complete_step(path.stem) is None and not cache.finished_steps()
    assert [found for found, _ in cache.damaged_files_with_faults()] == [path]


def test_a_step_in_anothers_place_is_not_used(cache):
    path, other = only(cache, "steps"), canonical_json_sha256({"other": 1})
    body = json.loads(path.read_text())
    body.pop("seal")
    path.with_name(f"{other}.json").write_text(json.dumps(body | {"key": other}))
    assert "no record of a finished step" in damage_of(lambda: cache.read_complete_step(other))


@pytest.mark.slow
def test_every_flipped_bit_of_a_kept_hash_is_seen_and_none_is_believed(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    (tmp_path / "file").write_text("content")
    right = hashes.cached_file_hash(tmp_path / "file", cache.folder)
    (kept,) = cache.folder.glob("hashes/*/*")
    assert not list(cache.damaged_files_with_faults())
    whole = kept.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            kept.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            assert [path for path, _ in cache.damaged_files_with_faults()] == [kept], (at, bit)
            if bit == at % 8:
                assert hashes.cached_file_hash(tmp_path / "file", cache.folder) == right and kept.read_bytes() == whole
    kept.write_bytes(whole)
    other = kept.with_name("0" * 64)
    other.write_bytes(whole)
    assert [path for path, _ in cache.damaged_files_with_faults()] == [other]
    other.write_text(right)  # as caches of before there were seals have it: not used, and no damage
    assert not list(cache.damaged_files_with_faults())


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", '"x"', "", "{", '{"tensors": []}', "[" * 50_000, "\udcff"])
@pytest.mark.parametrize("folder", ["steps", "values"])
def test_files_of_another_form_are_said_to_be_damaged(cache, folder, text):
    path = only(cache, folder)
    path.write_bytes(text.encode(errors="surrogateescape"))
    cache.finished_steps()
    if (folder, text) != ("values", "{}") and (folder, text) != ("values", '{"tensors": []}'):
        assert path in [found for found, _ in cache.damaged_files_with_faults()]
        damage_of(
            lambda: (
                cache.read_complete_step(path.stem)
                if folder == "steps"
                else cache.read_value({"metric": "perplexity", "of": "base"})
            )
        )


def test_a_step_without_a_seal_whose_key_is_of_a_number_beyond_floats_is_said_to_be_damaged(cache):
    path = only(cache, "steps")
    body = json.loads(path.read_text())
    body.pop("seal")
    path.write_text(json.dumps(body | {"parts": {"seed": 0.5}}).replace("0.5", "1e999"))
    assert not cache.finished_steps()
    assert path in [found for found, _ in cache.damaged_files_with_faults()]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", 3, "a" * 63])
def test_a_tensor_is_named_by_a_hash(cache, name):
    path = only(cache, "steps")
    body = json.loads(path.read_text())
    body.pop("seal")
    path.write_text(json.dumps(body | {"tensors": {"w": name}}))
    assert "no record of a finished step" in damage_of(lambda: cache.read_complete_step(path.stem))


@pytest.mark.parametrize("folder", ["steps", "values", "blobs"])
@pytest.mark.parametrize("leads", ["/dev/zero", "pipe", "outside"])
def test_links_and_devices_are_not_read(cache, tmp_path, folder, leads):
    path = only(cache, folder)
    inside = path.read_bytes()
    path.unlink()
    if leads == "pipe":
        os.mkfifo(path)
    elif leads == "outside":
        (tmp_path / "elsewhere").write_bytes(inside)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.symlink_to(leads)
    assert path in [found for found, _ in cache.damaged_files_with_faults()]
    cache.finished_steps()


@pytest.mark.parametrize("place", ["work", "work/k", "work/k/scores.jsonl", "work/k/layers/a.safetensors"])
@pytest.mark.parametrize("leads", ["thesis", "nowhere"])
def test_no_step_writes_through_a_link_that_lies_in_the_cache(cache, tmp_path, place, leads):
    (tmp_path / "thesis").write_text("years of work")
    shutil.rmtree(cache.folder / "work", ignore_errors=True)
    (cache.folder / place).parent.mkdir(parents=True, exist_ok=True)
    (cache.folder / place).symlink_to(tmp_path / leads)
    assert refused(lambda: cache.make_checked_scratch("k")).diagnostics[0].slug == "odd-file"
    assert (tmp_path / "thesis").read_text() == "years of work" and not (tmp_path / "nowhere").exists()


def test_a_remembered_hash_that_is_a_device_is_none(tmp_path):
    (tmp_path / "file").write_text("a")
    os.utime(tmp_path / "file", (0, 0))
    found = hashes.cached_file_hash(tmp_path / "file", tmp_path / "cache")
    (kept,) = (f for f in (tmp_path / "cache").rglob("*") if f.is_file())
    kept.unlink()
    kept.symlink_to("/dev/zero")
    with pytest.raises(Reject, match="no ordinary file"):
        hashes.cached_file_hash(tmp_path / "file", tmp_path / "cache")
    kept.unlink()
    assert hashes.cached_file_hash(tmp_path / "file", tmp_path / "cache") == found


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the system has no owners")
@pytest.mark.parametrize("folder", [".", "steps", "values", "rttc"])
def test_a_folder_that_others_can_write_to_is_refused(cache, folder):
    (cache.folder / folder).mkdir(exist_ok=True)
    os.chmod(cache.folder / folder, 0o777)
    found = refused(lambda: Cache(cache.folder)).diagnostics[0]
    assert found.slug == "cache-open" and "written to by others" in found.message
    os.chmod(cache.folder / folder, 0o755)
    Cache(cache.folder)


def edited(world, change):
    """The cache of `world` with the step that packed its weights changed; its key."""
    cache = Cache(world / "cache")
    key = next(e.key for e in cache.finished_steps() if e.parts["step"]["word"] == "lower.sparse_cpu")
    path = world / "cache" / "steps" / f"{key}.json"
    body = json.loads(path.read_text())
    change(body["edits"])
    path.write_bytes(sealed_json_bytes(body))
    return cache, key


def graph_calls(target):
    def change(edits):
        graph = next(iter(edits["graphs"].values()))["graph"]
        next(n for n in graph["nodes"] if n["op"] == "call_module")["target"] = target

    return change


@pytest.mark.parametrize(
    "change",
    [
        graph_calls("from_pretrained"),
        graph_calls("save_pretrained"),
        graph_calls("mlp.register_forward_hook"),
        lambda e: next(iter(e["swapped"].values())).update({"class": "os:system"}),
        lambda e: next(iter(e["swapped"].values())).update({"class": "compiler.store.cache:Cache"}),
        lambda e: e["attributes"].update({"config._attn_implementation": "org/kernel"}),
        lambda e: e["attributes"].update({"config.auto_map": {"AutoModel": "evil.Evil"}}),
        lambda e: e["attributes"].update({"config.quantization_config": {"quant_method": "evil"}}),
        lambda e: e.update(graphs=None),
        lambda e: e.update(format=9),
        lambda e: e["slots"].update({"model": 10**9}),
    ],
    ids=lambda change: "",
)
def test_a_step_is_read_by_the_rules_for_artifacts(world, change):
    cache, key = edited(world, change)
    with pytest.raises(Reject) as reject:
        StepResults(cache, origin_in(world)).load_outcome(key)
    assert reject.value.diagnostics[0].slug in ("refused-edits", "refused-graph")
