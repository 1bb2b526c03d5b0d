"""Models by lot: what is drawn, how it is made small, and what is said of it."""

import pytest
import torch
import transformers
from effc.compiler.core.architectures import parse_architecture_matrix

from tests.architectures import lot, matrix, table
from tests.architectures.lot import Drawn
from tests.architectures.small_configs import small


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


TINY = [
    *("cohere2_moe", "paligemma", "seamless_m4t_v2", "sew", "vibevoice", "wav2vec2-conformer", "align"),
    *("florence2", "textnet", "vjepa2", "convnextv2", "hunyuan_v1_moe", "wav2vec2-bert"),
    *("qwen3_5_moe", "emu3"),  # whose class is of the part that reads texts
    *("pvt", "cvt", "zaya", "blt", "glmga", "deepseek_v4", "blip-2"),  # whose numbers agree
    *("diffusion_gemma", "dots3_note", "qwen4_exp"),  # whose layers differ
]


@pytest.mark.parametrize("kind", TINY)
def test_a_config_and_those_inside_of_it_are_shrunk_until_the_model_is_tiny(kind):
    cls = lot.every_class()[kind]
    config, maker = next(small(kind, cls)), getattr(transformers, cls)
    with torch.device("meta"):
        assert sum(p.numel() for p in maker(config).parameters()) <= lot.NUMBERS


def test_the_summary_counts_what_could_be_made_and_names_the_rest():
    green, late = ("green", ""), ("late", "not done in 240 s")
    found = [
        Drawn("a", "A", dict.fromkeys(lot.WORDS, green)),
        Drawn("b", "B", {"prune.multi": ("refused", "no"), "sparsify.wanda": late}),
        Drawn("c", "C"),
    ]
    said = (
        "By lot (seed 3; late: more than 240 s of a processor): 1 of 2 types go through both recipes, `prune.multi` 1 of 2 (1 refused), "
        "`sparsify.wanda` 1 of 2 (1 late); no tiny config could be built for: c."
    )
    assert lot.summary(found, "By lot (seed 3") == said


def test_a_page_has_a_sentence_of_each_seed_behind_its_table():
    page = matrix.PAGE.read_text(encoding="utf-8")
    first = lot.put_into(page, "By lot (seed 1): none.")
    second = lot.put_into(first, "By lot (seed 2): all.")
    assert second.endswith("\n\nBy lot (seed 1): none.\n\nBy lot (seed 2): all.\n")
    assert lot.put_into(second, "By lot (seed 1): some.").endswith("(seed 2): all.\n\nBy lot (seed 1): some.\n")
    assert "By lot (seed 12): none." in lot.put_into(lot.put_into(first, "By lot (seed 12): none."), "By lot (seed 1).")
    table_of = parse_architecture_matrix()
    assert matrix.markdown_table(table_of).strip() in matrix.put_into(second, table_of)
    assert "By lot (seed 2): all." in matrix.put_into(second, table_of)


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (
            "MllamaForConditionalGeneration",
            {"vision_config.vision_output_dim": 384, "text_config.cross_attention_layers": [1] * 8},
        ),
        ("Qwen2VLForConditionalGeneration", {"text_config.rope_parameters.mrope_section": [2, 2, 4]}),
        ("ShieldGemma2ForImageClassification", {"mm_tokens_per_image": 4}),
        ("DiaForConditionalGeneration", {"decoder_config.cross_hidden_size": 64}),
    ],
)
def test_sizes_that_follow_from_others_are_shrunk_with_them(cls, sizes):
    config = next(small(getattr(transformers, cls).config_class.model_type, cls)).to_dict()
    for path, expected in sizes.items():
        value = config
        for name in path.split("."):
            value = value[name]
        assert value == expected, path


@pytest.mark.slow
def test_a_type_of_a_lot_goes_through_whole_recipes():
    kind = "granitemoe_swa"
    one = lot.alone(kind, lot.classes()[kind])
    assert one.cells == dict.fromkeys(lot.WORDS, ("green", ""))
