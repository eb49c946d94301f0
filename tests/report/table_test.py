import dataclasses
import json

import pytest

from efflm.evaluate.cost import Rate
from efflm.report import rows, table
from tests.report.example import NONE, ROW


def test_the_table_names_every_column_and_note(capsys):
    table.show([ROW], ["a fact [not markup]"])
    out = capsys.readouterr().out
    for word in ("bits/byte", "KL to dense", "w8a16", "<b>bold & free</b>", "a fact [not markup]"):
        assert word in out
    for figure in ("4.07", "2.200 ± 0.070", "14,000 (13,000–15,000)", "1,400 (1,300–1,500)", "+0.00100 ± 0.00050"):
        assert figure in out


def test_of_one_document_no_error_is_shown(capsys):
    fields = [field.name for field in dataclasses.fields(rows.Row) if field.name.endswith("_stderr")]
    one = dataclasses.replace(ROW, **dict.fromkeys(fields))
    table.show([one], [])
    out = capsys.readouterr().out
    assert " ± " not in out
    assert "+0.0010" in out
    assert json.loads(json.dumps(dataclasses.asdict(one)))["bits_per_byte_stderr"] is None


def test_the_first_model_is_the_reference_and_has_no_difference_to_itself(capsys):
    table.show([dataclasses.replace(ROW, **NONE)], [])
    out = capsys.readouterr().out
    assert out.count("reference") == 3
    assert out.count(" ± ") == 2


def test_notes_with_brackets_are_shown_as_they_are(capsys):
    table.show([dataclasses.replace(ROW, note="Prune(scope=[bold])")], [])
    assert "Prune(scope=[bold])" in capsys.readouterr().out


@pytest.mark.parametrize(("decode", "word"), [((90, 80, 120), "within the spread"), ((50, 45, 55), "0.50x")])
def test_speed_is_claimed_only_beyond_the_spread(decode, word):
    said = rows._speed(Rate(*decode), Rate(100, 95, 105), "decode")
    assert word in said
    assert ("within" in said) == (word == "within the spread")
