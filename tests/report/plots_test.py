import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from efflm.report import colors, plots
from efflm.report.plots import Point


def drawn(count, seed, names=None):
    """Models at random places, many of them close together."""
    rng = np.random.default_rng(seed)
    names = names or [f"model_number_{index}" for index in range(count)]
    sizes = rng.choice([4.0, 4.1, 10.0, 16.0], count)
    losses = rng.choice([0, 1e-5, 0.01], count) * np.arange(count)
    given = zip(names, sizes, losses, 0.1 * losses, names, [(0.9 * x, 1.1 * x) for x in sizes], strict=True)
    return plots.tradeoff([Point(*each) for each in given], "MB")


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (10, 1), (12, 2)])
def test_no_label_covers_another_or_leaves_its_panel(count, seed):
    figure, _ = drawn(count, seed)
    labels = figure.axes[0].texts
    shown = [name for label in labels for name in label.get_text().split("\n")]
    assert sorted(shown) == sorted(f"model_number_{i}" for i in range(count))
    renderer = FigureCanvasAgg(labels[0].figure).get_renderer()
    for label in labels:
        label.update_positions(renderer)
    boxes = [Text.get_window_extent(label, renderer) for label in labels]  # without the line to its point
    for one, two in itertools.combinations(boxes, 2):
        assert not one.overlaps(two)
    for label, box in zip(labels, boxes):
        panel = label.axes.get_window_extent(renderer)
        assert panel.x0 <= box.x0
        assert box.x1 <= panel.x1
        assert panel.y0 <= box.y0
        assert box.y1 <= panel.y1


def test_of_many_models_the_first_and_the_front_are_named():
    figure, front = drawn(plots.MOST_NAMES + 4, 1)
    shown = {name for label in figure.axes[0].texts for name in label.get_text().split("\n")}
    assert shown == {"model_number_0", *(each.name for each in front)}


@pytest.mark.parametrize(("values", "named"), [([3.0, 9.0], True), ([3.0, 3000.0], False)])
def test_ticks_between_powers_of_ten_are_named_where_there_is_room(values, named):
    figure = plots.sweeps({"a": (np.array([0.3, 0.5]), np.array(values), np.zeros(2))}, "share", "perplexity", 3.0)
    figure.canvas.draw()
    assert any(tick.get_text() for tick in figure.axes[0].get_yticklabels(minor=True)) == named


def test_the_front_is_what_nothing_beats_in_both(rng):
    for _ in range(50):
        xs, ys = rng.integers(0, 5, 8), rng.integers(0, 5, 8)
        points = set(zip(xs.tolist(), ys.tolist()))
        expected = {(x, y) for x, y in points if not any(a <= x and b <= y for a, b in points - {(x, y)})}
        found = plots._front(xs, ys)
        assert [(xs[i], ys[i]) for i in found] == sorted(expected)


def test_the_picture_has_the_error_of_the_difference(monkeypatch):
    from matplotlib.axes import Axes

    given, plain = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, *args, **how: given.append((args, how)) or plain(axis, *args, **how)
    )
    first, second = Point("a", 1.0, 0.0, 0.0, "a", (0.9, 1.2)), Point("b", 2.0, 0.001, 0.0005, "b", (1.9, 2.2))
    plots.tradeoff([first, second], "MB")
    ((_, ys), how) = given[0]
    assert ys.tolist() == [0.0, 0.001]
    assert how["yerr"].tolist() == [0.0, 0.0005]
    assert np.allclose(how["xerr"], [[0.1, 0.1], [0.2, 0.2]])


def test_the_svg_takes_the_page_s_colors_and_escapes_names():
    hostile = '<script>alert("1")</script> $x^2$ & co'
    text = plots.svg(drawn(2, 0, [hostile, "b"])[0])
    assert text.startswith("<svg")
    assert "<script" not in text
    assert "$x^2$" in text  # not set as mathematics
    assert "var(--ink)" in text
    assert not [color for color in colors.VARIABLES if color in text]
    assert "http" not in text
    assert text.count('class="mark"') == 2
    assert 'data-row="&lt;script&gt;alert(&quot;1&quot;)' in text


def test_what_is_not_finite_is_not_drawn():
    nan, inf, xs = float("nan"), float("inf"), np.arange(5.0)
    for span in (None, (1.0, 2.0)):
        given = zip("abcd", [1.0, 2.0, 3.0, 4.0], [0.0, nan, -0.1, inf], [0.0, nan, 0.01, inf], "abcd", strict=True)
        figure, front = plots.tradeoff([Point(*each, span) for each in given], "MB")
        assert [each.name for each in front] == ["a", "c"]
        assert plots.svg(figure).count('class="mark"') == 2
    for losses in ([3.0, 2.0, nan, nan, nan], [nan] * 5):
        plots.svg(plots.curves({"a": (xs, np.array(losses)), "b": (xs, xs)}, "steps"))
    for before in (3.0, inf):
        values = np.array([9.0, inf, nan, 1e300, 4.0])
        assert plots.svg(plots.sweeps({"a": (xs, values, xs)}, "bits", "perplexity", before)).count('class="mark"') == 2


def test_curves_are_named_at_their_ends_and_files_are_png(tmp_path):
    xs = np.arange(20.0)
    found = {f"run {i}": (xs, 3 - 0.05 * xs + 1e-4 * i) for i in range(9)}  # more than there are colors
    figure = plots.curves(found, "steps")
    plots.save(figure, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    heights = sorted(text.xy[1] for text in figure.axes[0].texts)
    assert len(heights) == 9
    assert min(np.diff(heights)) > 0
