import dataclasses
import json

import numpy as np

from efflm.evaluate.quality import Quality
from efflm.evaluate.throughput import Rate
from efflm.report import rows, table
from tests import tiny
from tests.report.example import NONE, ROW, asked


def test_the_table_names_every_column_and_note(capsys):
    table.show([ROW], ["a fact [not markup]"])
    out = capsys.readouterr().out
    for word in ("bits/byte", "KL to the original", "w8a16", "<b>bold & free</b>", "a fact [not markup]"):
        assert word in out
    for figure in (
        "4.07",
        "8.14",
        "2.200 ± 0.070",
        "14,000 (13,000–15,000)",
        "1,400 (1,300–1,500)",
        "+0.00100 ± 0.00050",
    ):
        assert figure in out


def test_of_one_document_no_error_is_shown(capsys):
    one = ROW.but(**dict.fromkeys(name for name in ROW.figures if name.endswith("_stderr")))
    table.show([one], [])
    out = capsys.readouterr().out
    assert " ± " not in out
    assert "+0.0010" in out
    assert json.loads(json.dumps(one.json()))["bits_per_byte_stderr"] is None


def test_the_first_model_is_the_reference_and_has_no_difference_to_itself(capsys):
    table.show([ROW.but(**NONE)], [])
    out = capsys.readouterr().out
    assert out.count("reference") == 3
    assert out.count(" ± ") == 2


def test_notes_with_brackets_are_shown_as_they_are(capsys):
    table.show([dataclasses.replace(ROW, note="Magnitude(scope=[bold])")], [])
    assert "Magnitude(scope=[bold])" in capsys.readouterr().out


def test_a_note_says_the_ratio_of_the_same_rounds():
    documents = Quality(*np.ones((5, 3)))
    load = np.array([1.0, 0.5, 0.25])  # of a machine that is ever busier: medians and quartiles of both overlap
    own, base = (Rate(*np.quantile(each, (0.5, 0.25, 0.75)), tuple(each)) for each in (200 * load, 100 * load))
    made = rows.make("a", tiny.model(), 1, "small", documents, (own, own), (documents, (base, base)))
    assert made.note == "small; prefill 2.00× ± <0.01 the first row's; decode 2.00× ± <0.01 the first row's"
    assert (made.prefill_speedup, made.decode_speedup_stderr) == (2.0, 0.0)
    alone = rows.make("a", tiny.model(), 1, "dense", documents, (own, own), None)
    assert (alone.note, alone.prefill_speedup) == ("dense", None)


def test_each_of_several_texts_has_its_columns_under_its_own_heading():
    one = {"bits_per_byte": 2.123456, "bits_per_byte_stderr": 0.01, "kl_to_original": None}
    rows = [ROW.but(domains={"wiki": one}), ROW.but(domains={"wiki": one, "code": one}), ROW.but(domains=None)]
    columns = table.of_texts(rows)
    assert [(each.group, each.heading) for each in columns] == [
        ("text: wiki", "bits/byte"),
        ("text: code", "bits/byte"),
    ]
    assert [column.pair(row)[0] for row in rows for column in columns] == ["2.123", "—", "2.123", "2.123", "—", "—"]
    named = ("domains.code.bits_per_byte", "domains.code.bits_per_byte_stderr")
    assert columns[1].data(rows[1]) == dict(zip(named, (2.123456, 0.01)))
    assert columns[1].data(rows[0]) == dict.fromkeys(named)
    assert table.labels(columns) == ["text: wiki: bits/byte", "text: code: bits/byte"]
    assert "text: code: bits/byte" in " ".join(table.text(rows, [], columns).replace("┃", " ").split())


def test_tasks_have_a_column_and_a_table_of_their_own(capsys):
    noise = {"kl_to_original": 0.00012, "kl_to_original_stderr": 0.00001}
    noise |= {"top1_agreement": 0.999, "top1_agreement_stderr": 0.001}
    first, *others = (dataclasses.replace(ROW, name=name) for name in ("float32", "flips", "loses"))
    compared = asked(first.but(**NONE, noise=noise), *others)
    table.show(compared, ["a fact"])
    lines = capsys.readouterr().out.splitlines()
    cells = lambda name: [
        [cell.strip() for cell in line.split("│")[1:]] for line in lines if line.startswith(f"│{name}")
    ]
    whole, task = cells("loses")
    assert whole[-2:] == ["48.0% ± 2.2% +0/-60", ""]
    assert task[:6] == ["loses", "48.0% ± 2.2%", "-12.0 (-14.8 to -9.1)", "+0/-60", "1.7e-18", "60"]
    assert task[6:] == ["0.02000 ± <0.00001", "0.200 → 0.320", "4.4", ""]
    assert cells("float32")[1][5:8] == ["reference (rounding alone: 2)", "reference (rounding alone: 0.02000)", "0.200"]
    text = "\n".join(lines)
    for words in (
        "99.90%)",
        "0.00012)",
        "  arc: 500 items; right is what",
        "  a fact\n  +a/-b:",
    ):
        assert words in text
    assert "tasks.arc.flips_to_wrong" in table.columns(compared)[-1].data(compared[1])
