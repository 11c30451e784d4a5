"""The panels of a figure, and what all of them share."""

from __future__ import annotations

import pytest

from tenslora.harness.results.figures.by_parameters import score_by_parameters
from tenslora.harness.results.figures.learning_curves import learning_curves
from tenslora.harness.results.figures.panels import colour_of, name_of, score_limits
from tenslora.harness.results.figures.style import COLOURS, INK
from tenslora.harness.results.table import Row
from tests.drawn import axes_by_title, only_axes, panels, texts
from tests.tables import COLA, DTD, make_run, make_table, sample_table


def test_there_is_a_panel_for_every_strategy_and_column() -> None:
    titles = [f"{c} · {s}" for s in ("isoparameters", "isorank") for c in ("dtd · vit_base", "cola · minilm")]
    sample = panels(sample_table(seeds=1, epochs=1))
    assert [panel.title for panel in sample] == titles
    assert list(axes_by_title(learning_curves(sample))) == titles
    assert [panel.title for panel in panels(sample_table((DTD,), ("isorank",)))] == ["dtd · vit_base · isorank"]
    assert [panel.title for panel in panels(make_table([make_run("lora")]))] == ["dtd · vit_base"]


def test_rows_without_a_strategy_are_in_every_panel() -> None:
    for panel in panels(sample_table((DTD,))):
        modes = [row.tensor_mode for row in panel.cells]
        assert (modes[0], modes[-1], len(modes)) == ("lora", "head_only", 9)


def test_a_panel_without_a_score_does_not_hinder_the_others() -> None:
    table = make_table([make_run("lora", epochs=[0.5]), make_run("lora", column=COLA)])
    for draw in (score_by_parameters, learning_curves):
        axes = axes_by_title(draw(panels(table)))
        assert texts(axes["cola · minilm"]) == ["no finished run yet"]
        assert "no finished run yet" not in texts(axes["dtd · vit_base"])


def test_reference_rows_far_off_do_not_stretch_the_axis() -> None:
    lora, att, full = Row("lora"), Row("att", "isorank"), Row("full")
    assert score_limits([(lora, 70, 72), (att, 75, 80), (full, 30, 32)]) == pytest.approx((69.4, 80.6))
    assert score_limits([(lora, 70, 72), (att, 75, 80), (full, 82, 84)]) == pytest.approx((69.16, 84.84))
    assert score_limits([(full, 50, 50)]) == (49, 51)


def test_a_row_has_the_colour_of_its_construction_and_lora_has_the_inks() -> None:
    assert colour_of(Row("lora")) == INK
    assert colour_of(Row("att", "isorank", ("a=1",))) == colour_of(Row("att", "explicit")) == COLOURS["att"]
    assert colour_of(Row("head_only")) not in (INK, *COLOURS.values())


@pytest.mark.parametrize("modes", [("qkv", "depth"), ("lora",)])
def test_a_name_of_any_length_leaves_room_for_the_scores(modes: tuple[str, ...]) -> None:
    variants = [(f"optimizer.betas=[0.9,0.999{'0' * 60}{end}]",) for end in (1, 2)]
    rows = [Row(mode, "isorank", variant) for mode in modes for variant in variants]
    table = make_table(make_run(row.tensor_mode, row.strategy, variant=row.variant, epochs=[0.5, 0.6]) for row in rows)
    assert len({name_of(row) for row in rows}) == len(rows), "the ends of a long name tell rows apart"
    for draw in (score_by_parameters, learning_curves):
        axes = only_axes(draw(panels(table)))
        assert axes.get_position().width > 0.2
        assert {*texts(axes), *(label.get_text() for label in axes.get_yticklabels())} >= {name_of(row) for row in rows}
