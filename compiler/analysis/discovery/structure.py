"""The skeleton of a model that a recipe names: shipped beside its weights, kept from before, or found on its graphs."""

import json
import re

from ....dsl.checker.skeleton import Skeleton
from ...core.settings import Settings
from ...models.checkpoints.origin import Origin


def shipped_skeleton(origin: Origin) -> Skeleton | None:
    """The skeleton that lies beside a zoo model's weights."""
    path = origin.folder / "skeleton.json" if origin.folder else None
    if path is None or not path.is_file() or not origin.label.startswith("zoo("):
        return None
    return Skeleton.from_json(json.loads(path.read_bytes()))


def cached_skeleton(origin: Origin, settings: Settings) -> Skeleton | None:
    from ..planning import skeleton_store

    return skeleton_store.load_skeleton(settings.cache_dir / "skeletons", skeleton_key_of(origin))


def cache_skeleton(origin: Origin, settings: Settings, skeleton: Skeleton) -> None:
    from ..planning import skeleton_store

    skeleton_store.store_skeleton(settings.cache_dir / "skeletons", skeleton_key_of(origin), skeleton)


def discover_skeleton_without_weights(origin: Origin) -> Skeleton:
    """Capture a model without weights and look at its graphs."""
    from ...ir.capture.meta_capture import capture_on_meta
    from .streams import skeleton_with_stream

    return skeleton_with_stream(capture_on_meta(origin))


def skeleton_key_of(origin: Origin) -> str:
    """Key of a model's skeleton, in cache folders and in a process."""
    from importlib.metadata import version

    from ..planning import skeleton_store

    return skeleton_store.skeleton_key(
        {"structure": origin.fingerprint, "dtype": origin.dtype}, version("transformers")
    )


def refuse_weights_unlike_skeleton(origin: Origin, skeleton: Skeleton) -> None:
    """Refuse weights that lack tensors that the config asks for, or have other shapes, by their headers.

    Tensors that go by another name in the file are left to loading, which knows what each architecture renames.
    """
    from ...models.checkpoints.weights import INDEX, SINGLE, read_weight_headers

    if origin.folder is None or not any((origin.folder / name).is_file() for name in (INDEX, SINGLE)):
        return
    from ...models.checkpoints.checkpoint import refuse_mismatched_weights

    expected = skeleton.shapes()
    slots = read_weight_headers(origin.folder, origin.label).slots
    mismatched = [
        (name, slot.shape, expected[name])
        for name, slot in slots.items()
        if name in expected and slot.shape != expected[name]
    ]
    missing = () if origin.code else _missing_tensors(origin, skeleton, set(slots))
    refuse_mismatched_weights(
        {"mismatched_keys": mismatched, "missing_keys": missing, "unexpected_keys": ()}, origin.label
    )


# What modules keep beside parameters, which skeletons don't list.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _missing_tensors(origin: Origin, skeleton: Skeleton, file_tensors: set[str]) -> list[str]:
    """Tensors that the file lacks by any name: all that it has is known, so nothing of it is to be renamed."""
    from ...models.checkpoints.checkpoint import HARMLESS, config_and_model_class

    expected = set(skeleton.shapes())
    if any(not name.endswith((*_BUFFERS, *HARMLESS)) for name in file_tensors - expected):
        return []
    same = {name: group for group in skeleton.tied for name in group}
    missing = [name for name in expected - file_tensors if file_tensors.isdisjoint(same.get(name, ()))]
    free = (config_and_model_class(origin.config)[1]._keys_to_ignore_on_load_missing or ()) if missing else ()
    return [name for name in missing if not any(re.search(pattern, name) for pattern in free)]
