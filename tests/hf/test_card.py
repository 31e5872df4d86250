"""The model card: counts by hand, and only what is known."""

from megamf.config import load_config
from megamf.hf.card import model_card, parameter_counts


def test_counts_of_the_released_models():
    # Active: published counts of experts, routers and norms, plus head and embedding (50295 x 1024 each).
    for preset, total, active in (
        ("molm-350m-4b", 4_142_526_464, 315.0),
        ("molm-700m-4b", 4_142_526_464, 617.0),
        ("molm-700m-8b", 8_182_046_720, 630.0),
    ):
        found = parameter_counts(load_config(preset=preset).model)
        assert found[0] == total
        assert round((found[1] - 2 * 50295 * 1024) / 1e6, 1) == active


def test_unknown_things_are_left_out(tiny):
    card = model_card("m", tiny(), {}, "float32", None)
    assert "training" not in card.split("| | |")[1] and "AutoTokenizer" not in card
    assert "loss" not in card
