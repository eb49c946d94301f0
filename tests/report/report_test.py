import re

import pytest

from efflm.report import page, plots, rows, table

ROW = rows.Row(
    name="w8a16", parameters=4_000_000, nonzeros=3_900_000, bytes=4_070_000, prefill_tokens_per_second=14000.0,
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
