"""Options in Python are compared with what they may be before anything is read."""

from pathlib import Path

import pytest
import torch
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.api import Options
from effc.dsl.syntax.diagnostics import Reject

RECIPE = 'effspec 1\nmodel m = zoo("tiny-llama")\npipeline p(m) { s = prune.channels(keep: 50% of channels) }\n'

UNFIT = [
    ("seed", "x"),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", True),
    ("seed", 1.5),
    ("device", "tpu"),
    ("device", 1.5),
    ("offline", "no"),
    ("trust_remote_code", "false"),
    ("max_memory", "2 gigs"),
    ("max_memory", 0),
    ("max_memory", 2.5),
    ("max_time", "30"),
    ("max_time", 0),
    ("max_time", float("nan")),
    ("threads", 0),
    ("threads", 10**9),
    ("threads", "two"),
    ("undecided", "maybe"),
    ("locked", 1),
    ("workers", -3),
    ("workers", "two"),
    ("workers", 2.0),
    ("cache_dir", 3),
    ("on_event", 3),
    ("set", "keep=80%"),
    ("set", {1: 2}),
    ("set", 5),
    ("params", 5),
    ("settings", 5),
]


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "r.effspec"
    file.write_text(RECIPE)
    return file


@pytest.mark.parametrize(("name", "value"), UNFIT)
@pytest.mark.parametrize("verb", [api.check, api.plan, api.compile])
def test_a_value_that_an_option_can_not_have_is_refused_by_its_name(recipe, verb, name, value):
    with pytest.raises(Reject) as refused:
        verb(recipe, **{name: value})
    (diagnostic,) = refused.value.diagnostics
    assert (diagnostic.slug, diagnostic.exit) == ("bad-option", 2)
    assert f"`{name}" in diagnostic.message and diagnostic.help


def test_all_options_that_mean_nothing_are_named_at_once(recipe):
    with pytest.raises(Reject) as refused:
        api.check(recipe, seed="x", threads=0, undecided="maybe")
    assert len(refused.value.diagnostics) == 3


@pytest.mark.parametrize(
    ("arguments", "options"), [((None,), {}), ((3,), {}), (("r", 5), {}), (("r",), {"force": "x"})]
)
def test_paths_and_flags_of_the_verbs_are_checked_as_well(arguments, options):
    with pytest.raises(Reject, match="bad-option"):
        api.compile(*arguments, **options)


def test_sizes_and_times_may_be_texts_as_on_the_command_line(tmp_path):
    settings = Settings(tmp_path, max_memory="2GiB", max_time="30m")
    assert (settings.max_memory, settings.max_time) == (2 << 30, 1800.0)


def test_all_options_may_be_one_dict(recipe, tmp_path):
    options = Options(seed=3, max_memory="1GiB", set={"a": 1}, cache_dir=str(tmp_path / "cache"))
    opened = api.open_session(recipe, settings=options)
    assert (opened.settings.seed, opened.settings.max_memory, opened.set) == (3, 1 << 30, {"a": 1})
    assert opened.settings.cache_dir == Path(tmp_path / "cache")


@pytest.mark.parametrize("settings", [Options(seed=1), Settings(Path("cache"))])
def test_options_beside_settings_are_refused(recipe, settings):
    with pytest.raises(Reject, match="bad-option"):
        api.plan(recipe, settings=settings, seed=3)


def test_a_device_that_is_not_here_is_refused_before_anything_is_planned(recipe, tmp_path):
    with pytest.raises(Reject, match="device-missing"):
        api.plan(recipe, device="hpu", cache_dir=tmp_path)


@pytest.mark.parametrize("value", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_that_names_one_device_is_the_device(tmp_path, value):
    (tmp_path / "r.effspec").write_text(RECIPE)
    assert api.open_session(tmp_path / "r.effspec", device_map=value).settings.device == "cpu"
    assert api.open_session(tmp_path / "r.effspec", settings={"device_map": value}).settings.device == "cpu"


def test_a_numbered_device_of_a_map_is_of_cuda(tmp_path):
    for value in (1, {"": 1}, "cuda:1"):
        assert api.open_session(tmp_path / "r.effspec", device_map=value).settings.device == "cuda:1"


SPLITS = [{"model": 0, "lm_head": "cpu"}, {"model": 0, "lm_head": "disk"}, "balanced", "sequential", {"": "disk"}]


@pytest.mark.parametrize("value", [*SPLITS, {}, "tpu", 1.5, True, -1])
def test_a_device_map_that_splits_a_model_or_names_no_device_is_refused(tmp_path, value):
    for call in (api.check, api.load):
        with pytest.raises(Reject) as caught:
            call(tmp_path / "nowhere", device_map=value)
        (diagnostic,) = caught.value.diagnostics
        assert (diagnostic.slug, diagnostic.exit) == ("bad-option", 2) and "`device_map=" in diagnostic.message
        assert (value in SPLITS) == ("splits a model" in diagnostic.message)


def test_an_old_name_of_an_option_warns_and_is_refused_beside_the_new_one(tmp_path):
    for old, new in (("steady", "batch_invariant"), ("sequences", "max_sequences")):
        with pytest.warns(DeprecationWarning, match=f"`{old}` is `{new}`"), pytest.raises(Reject, match="yes"):
            api.load(tmp_path / "nowhere", **{old: "yes"})
    with pytest.raises(Reject, match="`steady` and `batch_invariant`"):
        api.load(tmp_path / "nowhere", steady=True, batch_invariant=True)


def test_a_device_beside_a_device_map_is_refused(tmp_path):
    with pytest.raises(Reject, match="`device` and `device_map`"):
        api.load(tmp_path / "nowhere", device="cpu", device_map="cpu")
