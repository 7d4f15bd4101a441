"""Tables and numbers for people."""

from pipeline.text import between, columns, figure, shorten


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "images/s", ""), ("日本", "9.5", "x"), ("a", "12470.0", "")]
    assert columns(rows, "<>") == ["name  images/s", "日本       9.5  x", "a      12470.0"]
    assert columns([("a", "b"), ("cc", "d")], gap=1) == ["a  b", "cc d"]


def test_a_name_cannot_break_the_table() -> None:
    assert columns([("a\x1b[31m\nb", "c")]) == ["a?[31m?b  c"]
    assert shorten("日本語の名前", 6) == "日本…"
    assert shorten("short", 5) == "short"


def test_figures_say_what_is_not_known() -> None:
    assert [figure(None), figure(1234), figure(0.5), figure(9.0, ".0f")] == ["-", "1,234", "0.5000", "9"]
    assert between([0.981, 1.02], ".2f") == "0.98 to 1.02"
