"""One record for each number format: kernels, recipes and targets name those that there are."""

from effc.compiler.ir.layers.number_formats import BY_KERNEL, BY_NAME, DENSE, NUMBER_FORMATS
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.lowering.speed import PACES
from effc.kernels.packed import KINDS

WORDS = Registry().vocabulary


def choices(kind: str, word: str, param: str) -> tuple[str, ...]:
    return next(p.choices for p in WORDS.word(kind, word).params if p.name == param)


def test_every_kernel_of_packed_weights_has_one_record_and_a_time_at_every_level():
    assert BY_KERNEL.keys() == KINDS.keys() and len(BY_KERNEL) == len(BY_NAME) == len(NUMBER_FORMATS)
    assert all(format.nanoseconds.keys() == PACES.keys() for format in NUMBER_FORMATS)


def test_recipes_may_ask_for_every_format_by_its_name():
    assert set(choices("pass", "lower.sparse_cpu", "format")) == {"auto", *BY_NAME}
    assert set(choices("pass", "lower.mixed", "formats")) == {f.name for f in NUMBER_FORMATS if f.skips != "blocks"}


def test_the_native_target_takes_the_numbers_of_dense_formats():
    assert len(DENSE) == sum(not format.skips for format in NUMBER_FORMATS), "numbers have one dense format"
    named = {*choices("target", "native", "weights"), *choices("target", "native", "head")} - {"auto"}
    assert named == DENSE.keys() - {"int8_int16"}, "which `inputs: int16` asks for"
    assert all(not format.head or format.head in DENSE for format in NUMBER_FORMATS)
