"""Models by lot: what is drawn, how it is made small, and what is said of it."""

import pytest
import torch
import transformers

from tests.architectures import lot, table
from tests.architectures.lot import Drawn


def test_no_type_that_a_row_of_the_matrix_names_is_drawn_and_no_part_of_another():
    pool = lot.classes()
    assert (
        len(pool) > 100
        and not {"llama", "bert", "t5", "clip_text_model"} & pool.keys()
        and not pool.keys() & set(table.ROWS)
    )


def test_equal_seeds_draw_equal_types_and_others_draw_others():
    pool = lot.classes()
    assert lot.shuffled(pool, 7) == lot.shuffled(pool, 7) != lot.shuffled(pool, 8)
    assert sorted(lot.shuffled(pool, 7)) == sorted(pool)


@pytest.mark.parametrize("kind", ["cohere2_moe", "paligemma", "seamless_m4t_v2"])
def test_a_config_and_those_inside_of_it_are_shrunk_until_the_model_is_tiny(kind):
    config, maker = next(lot.small(kind)), getattr(transformers, lot.classes()[kind])
    with torch.device("meta"):
        assert sum(p.numel() for p in maker(config).parameters()) <= lot.NUMBERS


def test_the_summary_counts_what_could_be_made_and_names_the_rest():
    green, late = ("green", ""), ("late", "not done in 240 s")
    found = [
        Drawn("a", "A", dict.fromkeys(lot.WORDS, green)),
        Drawn("b", "B", {"prune.multi": ("refused", "no"), "sparsify.wanda": late}),
        Drawn("c", "C"),
    ]
    said = "By lot (seed 3): `prune.multi` 1 of 2 (1 refused), `sparsify.wanda` 1 of 2 (1 late); not made small: c."
    assert lot.summary(found, 3) == said


@pytest.mark.slow
def test_a_type_of_a_lot_goes_through_whole_recipes():
    kind = "granitemoe_swa"
    one = lot.alone(kind, lot.classes()[kind])
    assert one.cells == dict.fromkeys(lot.WORDS, ("green", ""))
