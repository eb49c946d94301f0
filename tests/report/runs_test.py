"""Several results.json in one table: which rows are compared with which, and what is refused."""

import dataclasses
import json

import pytest

from efflm.cli.flags import launch
from efflm.report import page, runs, swept, table
from efflm.report.comparison import EXACT
from efflm.report.rows import Row
from experiments import report
from tests.report.example import TEN, asked

VERSIONS = {"date": "2026-01-02 03:04 UTC", "cpu": "a processor", "cores": "2", "device": "1 x cpu", "commit": "abc"}
FACTS = ["Quality: 5 of 5 documents of text. Divergence: from float32.", "Speed: batch 1."]
CHAINS = [
    Row(name, {**dict.fromkeys((*swept.OVER, *swept.TOOK)), "bytes": size, "parameters": 9, "seeds": 1,
               "bits_per_byte": 2.0 + (over or 0), "perplexity": 4.0, "perplexity_deviation": None, "saved": 0.0,
               "tokens": 0, "seconds": 0.0, "bits_per_byte_increase": over})
    for name, size, over in (("before", 16_000_000, None), ("gptq@4", 3_000_000, 0.25))
]  # fmt: skip


def written(folder, name, rows=TEN[:3], facts=FACTS, **versions):
    found = {"rows": [row.json() for row in rows], "protocol": facts, "command": f"run {name}"}
    (folder / name).mkdir()
    text = json.dumps(found | {"versions": VERSIONS | versions})
    (folder / name / "results.json").write_text(text.replace("NaN", "null"))
    return str(folder / name)


def both(*sources):
    found = runs.read(sources)
    return found, *runs.side_by_side(found)


def test_a_row_is_compared_with_the_first_of_its_own_run(tmp_path):
    half = [row.but(bytes=row.bytes // 2) for row in TEN[:3]]
    found, rows, columns = both(written(tmp_path, "a"), written(tmp_path, "b", half, cpu="another"))
    whole = page.Table(caption="c", columns=columns, rows=rows)
    disk = next(column for column in columns if column.heading == "MB on disk")
    assert [whole.cell(disk, row).ratio for row in rows] == 2 * ["1×", "0.50×", "0.26×"]
    assert [row.run for row in rows] == 3 * ["a"] + 3 * ["b"]
    assert "the runs differ in processor, and their speeds" in runs.facts(found)[0]
    assert len(runs.comparable(found)) == 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"commit": "def"}, "differ in commit,"),
        ({"facts": ["Quality: 4 of 5 documents of text. Divergence: from float32."]}, "differ in what was scored,"),
        ({"rows": [row.but(bits_per_byte=row.bits_per_byte + 0.001) for row in TEN[:3]]}, "first model or text,"),
        ({}, "of another run: their speeds are of different rounds"),
        ({"facts": ["Quality: 5 of 5 documents of text. Smaller is better. More."]}, "of another run: their speeds"),
        ({"rows": [row.but(bits_per_byte=row.bits_per_byte + EXACT / 9) for row in TEN[:3]]}, "another run: their"),
    ],
)
def test_losses_are_comparable_only_where_nothing_differs(tmp_path, other, words):
    found = runs.read([written(tmp_path, "a"), written(tmp_path, "b", **other)])
    assert words in runs.facts(found)[0]
    same = words.startswith(("of another", "another"))
    assert len(runs.comparable(found)) == (1 if same else 2)


def test_comparable_losses_are_in_one_plot_and_others_in_their_own(tmp_path):
    sources = [written(tmp_path, "a"), written(tmp_path, "b"), written(tmp_path, "c", commit="def")]
    plots = next(each.blocks for each in runs.sections(*both(*sources)) if each.heading == "Loss against bytes")
    assert [plot.alt.partition(" models")[0] for plot in plots] == [
        f"{names}: Loss over float32 against MB on disk, {count}" for names, count in (("a, b", 5), ("c", 3))
    ]


def test_chains_of_a_sweep_stand_beside_what_was_measured(tmp_path, capsys):
    broken = TEN[2].but(bits_per_byte=float("nan"), bits_per_byte_increase=float("nan"), perplexity=float("inf"))
    sources = [written(tmp_path, "chains", CHAINS), written(tmp_path, "models", [*TEN[:2], broken])]
    _, rows, columns = both(*sources)
    cells = {(row.name, column.heading): column.pair(row)[0] for row in rows for column in columns}
    assert cells["gptq@4", "increase over the original"] == "+0.2500"
    assert cells["gptq@4", "decode tok/s"] == cells["gptq@4", "same top-1"] == cells["w8a16", "bytes saved"] == "—"
    assert cells["before", "increase over the original"] == cells["float32", "same top-1"] == "reference"
    assert (cells["w8a16", "bits/byte"], cells["w8a16", "perplexity"]) == ("nan", "> 1e308")
    assert len({column.figures[0] for column in columns}) == len(columns)
    out = tmp_path / "out"
    launch(report.main, report.__doc__, ["x", *sources, f"--run_dir={out}"], run=report.Run())
    said = capsys.readouterr().out
    assert (
        said.index("chains: 2026") < said.index("gptq@4") < said.index("float32") < said.index("Each row is compared")
    )
    text = (out / "report.html").read_text()
    assert [text.count(f'class="run" data-run="{name}"') for name in ("chains", "models", "")] == [1, 1, 0]


def test_tasks_have_a_table_a_run_and_a_first_model_may_have_no_finite_loss(tmp_path):
    rows = asked(TEN[0], dataclasses.replace(TEN[1], name="flips"))
    broken = [row.but(bits_per_byte=float("nan")) for row in rows]
    found, rows, columns = both(written(tmp_path, "a", rows), written(tmp_path, "b", broken))
    assert "differ in first model or text," in runs.facts(found)[0]
    sections = {each.heading: each.blocks for each in runs.sections(found, rows, columns)}
    assert [each.caption.partition(";")[0] for each in sections["Tasks"]] == ["a: arc: 500 items", "b: arc: 500 items"]
    (arc,) = [column for column in columns if column.heading == "arc"]
    told = sections["The rows"][0].cell(arc, rows[1]).figures
    figures = dict(zip(json.loads(sections["The rows"][0].names(arc)), json.loads(told), strict=True))
    assert (figures["tasks.arc.accuracy"], figures["tasks.arc.flips_to_right"]) == (0.6, 20)
    assert len(figures["tasks.arc.interval"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("{", "is not JSON (Expecting property name"),
        (9999 * "[", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ("[]", "lacks protocol, command, versions or rows"),
        ('{"rows": [1], "protocol": [], "command": "c", "versions": {}}', "lacks protocol, command, versions or rows"),
        ('{"rows": [{"name": "a", "loss": 1}], "protocol": [], "command": "c 1", "versions": {}}', "(it is of: c 1)"),
        ('{"rows": [{"name": "a", "bytes": "x"}], "protocol": [], "command": "c 1", "versions": {}}', "it is of: c 1"),
        ('{"rows": [], "protocol": [1], "command": "c 1", "versions": {}}', "lacks protocol"),
        ('{"components": [], "protocol": [], "command": "c 1", "versions": {}}', "holds no rows of models"),
        ('{"rows": [{"name": "a", "over_dense": 1}], "protocol": [], "command": "c 1", "versions": {}}', "again: c 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text, "latin-1")
    with pytest.raises(SystemExit):
        launch(report.main, "", ["x", str(file), f"--run_dir={tmp_path / 'out'}"], run=report.Run())
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "words"), [([], "nothing to read"), (["a", "--run_dir=a"], "own report this would")])
def test_nothing_to_read_and_no_report_in_the_place_of_a_runs_own(tmp_path, monkeypatch, capsys, given, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "a")
    with pytest.raises(SystemExit):
        launch(report.main, "", ["x", "--run_dir=out", *given], run=report.Run())
    assert words in capsys.readouterr().err


def test_columns_of_both_kinds_name_their_figures():
    assert all(column.figures for column in (*table.COLUMNS, *swept.COLUMNS))
