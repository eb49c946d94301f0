import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from efflm.report import page, plots, rows, table

ROW = rows.Row(
    name="w8a16", precision="float32", parameters=4_000_000, nonzeros=3_900_000, bytes=4_070_000,
    prefill_tokens_per_second=14000.0,
    prefill_spread=(13000.0, 15000.0), decode_tokens_per_second=1400.0, decode_spread=(1300.0, 1500.0),
    bits_per_byte=2.2, bits_per_byte_stderr=0.07, bits_per_byte_over_dense=0.001,
    bits_per_byte_over_dense_stderr=0.0005, perplexity=12.5, perplexity_stderr=0.25,
    kl_to_dense=0.001, kl_to_dense_stderr=0.0002, top1_agreement=0.995, top1_agreement_stderr=0.001,
    note="<b>bold & free</b>",
)  # fmt: skip


def test_the_page_is_self_contained_and_escaped(tmp_path):
    plots.pareto([ROW, ROW], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    page.write(
        tmp_path / "r.html", title="A <title>", rows=[ROW], facts=["a & b"], plot=tmp_path / "p.png",
        samples={"float32": "def f():\n    return '<x>'"}, command="python -m x --y='z'", versions={"jax": "0.10"},
    )  # fmt: skip
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert "&lt;b&gt;bold &amp; free" in text
    assert "<b>bold" not in text
    assert 'name="viewport"' in text
    for entry in (
        "4.07",
        "2.2000 ± 0.0700",
        "14.0k (13.0k–15.0k)",
        "1,400 (1,300–1,500)",
        "+0.0010 ± 0.0005",
        "12.500 ± 0.250",
        "0.0010 ± 0.0002",
        "99.5% ± 0.1%",
        "jax 0.10",
    ):
        assert entry in text


def test_of_one_document_no_error_is_shown(capsys):
    fields = [field.name for field in dataclasses.fields(rows.Row) if field.name.endswith("_stderr")]
    one = dataclasses.replace(ROW, **dict.fromkeys(fields))
    table.show([one], [])
    out = capsys.readouterr().out
    assert " ± " not in out.split("w8a16", 1)[1]
    assert "+0.0010" in out
    assert json.loads(json.dumps(dataclasses.asdict(one)))["bits_per_byte_stderr"] is None


def placed(count, seed):
    """Rows at random places, many of them close together."""
    rng, out = np.random.default_rng(seed), []
    for index in range(count):
        size, speed, over = (
            rng.choice([4e6, 4.1e6, 1e7, 1.6e7]),
            rng.choice([900, 1000, 2500]),
            rng.choice([0, 1e-5, 0.01]),
        )
        out.append(dataclasses.replace(ROW, name=f"model_number_{index}", bytes=int(size), note="",
                   decode_tokens_per_second=float(speed), decode_spread=(0.9 * speed, 1.1 * speed),
                   bits_per_byte_over_dense=over * index,
                   bits_per_byte_over_dense_stderr=0.1 * over or None))  # fmt: skip
    return out


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (10, 1), (12, 2)])
def test_no_label_covers_another_or_leaves_its_panel(tmp_path, count, seed):
    labels = plots.pareto(placed(count, seed), tmp_path / "p.png")
    assert [label.get_text() for label in labels] == 2 * [f"model_number_{i}" for i in range(count)]
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


def test_the_front_is_what_nothing_beats_in_both(rng):
    for _ in range(50):
        xs, ys = rng.integers(0, 5, 8), rng.integers(0, 5, 8)
        points = set(zip(xs.tolist(), ys.tolist()))
        expected = {(x, y) for x, y in points if not any(a <= x and b <= y for a, b in points - {(x, y)})}
        found = plots._front(xs, ys)
        assert [(xs[i], ys[i]) for i in found] == sorted(expected)


def test_the_picture_has_the_error_of_the_difference(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, *args, **given: drawn.append((args, given)) or plain(axis, *args, **given)
    )
    plots.pareto([ROW, ROW], tmp_path / "p.png")
    for (_, ys), given in drawn:
        assert ys.tolist() == [0.001, 0.001]
        assert given["yerr"].tolist() == [0.0005, 0.0005]


def test_perplexities_have_the_decimals_that_make_sense():
    assert table.perplexity(12.1403, 1.018) == "12.140 ± 1.018"
    assert table.perplexity(1626.157, 223.702) == "1,626.2 ± 223.7"


def test_the_table_names_every_column_and_note(capsys):
    table.show([ROW], ["a fact [not markup]"])
    out = capsys.readouterr().out
    for word in ("bits/byte", "KL to dense", "w8a16", "bold & free", "a fact [not markup]"):
        assert word in out


@pytest.mark.parametrize(("decode", "word"), [((90, 80, 120), "within the spread"), ((50, 45, 55), "0.50x")])
def test_speed_is_claimed_only_beyond_the_spread(decode, word):
    from efflm.evaluate.cost import Rate

    said = rows._speed(Rate(*decode), Rate(100, 95, 105), "decode")
    assert word in said
    assert ("within" in said) == (word == "within the spread")
