"""Published tables are those of their results.json, to the byte."""

import json

import numpy as np
import pytest

from efflm.config import InputError
from efflm.evaluate import answers
from efflm.evaluate.answers import Answers
from efflm.report import published
from efflm.report.journal import Journal

VERSIONS = {"date": "2026-11-30 01:20 UTC", "commit": "adbe7ce", "cpu": "AMD EPYC (avx2)", "cores": "2"}
RESULTS = {
    "rows": [
        {"name": "before", "bytes": 16_000_000, "loss": 2.19712345, "loss_stderr": None, "steps": 1200, "note": "x"},
        {"name": "half | 2:4", "bytes": 4_000_000, "loss": 2.20345678, "loss_stderr": 0.01234, "steps": None},
        {"name": "gptq@4", "bytes": 2_930_000, "loss": 2.5, "loss_stderr": 0.004, "loss_spread": None, "steps": 7},
    ],
    "protocol": ["One text.", "Two documents."],
    "command": "bash launch/run.sh experiments.sweep",
    "versions": VERSIONS,
    "seeds": 3,
}
WHERE = (
    "Machine: AMD EPYC (avx2), 2 cores; commit: adbe7ce; date: 2026-11-30 01:20 UTC; seeds: 3; command: "
    "`bash launch/run.sh experiments.sweep`.\n"
)


@pytest.fixture
def filled(tmp_path):
    """What stands between the marks for these choices and fields of results.json."""

    def fill(choices="", **fields):
        (tmp_path / "made.json").write_text(json.dumps(RESULTS | fields))
        text = f"before\n<!-- results: made.json{choices} -->\nstale\n<!-- end -->\nafter\n"
        made = published.fill(text, tmp_path)
        assert published.fill(made, tmp_path) == made
        head, tail = f"before\n<!-- results: made.json{choices} -->\n", "<!-- end -->\nafter\n"
        assert made.startswith(head)
        assert made.endswith(tail)
        return made.removeprefix(head).removesuffix(tail)

    return fill


@pytest.mark.parametrize("file", published.marked_files(), ids=lambda file: str(file.relative_to(published.ROOT)))
def test_no_table_is_stale(file):
    text = file.read_text()
    assert published.fill(text) == text, "run `bash launch/run.sh experiments.report --publish`"


def test_every_result_is_small_and_in_a_table():
    quoted = "".join(file.read_text() for file in published.marked_files())
    for file in published.FOLDER.glob("*.json"):
        assert f"<!-- results: experiments/results/{file.name}" in quoted, file.name
        assert file.stat().st_size < 50_000, file.name


def test_a_table_says_where_it_is_from_and_has_the_digits_that_errors_allow(filled):
    assert filled() == (
        f"{WHERE}\n"
        "| name | MB | loss | steps |\n"
        "|---|---:|---:|---:|\n"
        "| `before` | 16.00 | 2.197 | 1,200 |\n"
        r"| half \| 2:4 | 4.00 | 2.203 ± 0.012 | — |" + "\n"
        "| `gptq@4` | 2.93 | 2.500 ± 0.004 | 7 |\n"
        "\nProtocol: One text. Two documents.\n"
    )


def test_rows_columns_and_ratios_are_chosen_and_the_file_has_the_headings(filled):
    columns = {"name": "recipe", "bytes": "MB", "loss": "test loss"}
    made = filled("; rows=gptq@4; columns=MB × | test loss; protocol=none", columns=columns)
    table = "| recipe | MB × | test loss |\n|---|---:|---:|\n| `gptq@4` | 0.18× | 2.500 ± 0.004 |\n"
    assert made == f"{WHERE}\n{table}"
    renamed = filled(
        "; rows=gptq@4 as small: `gptq@4`; columns=MB × as size | test loss; protocol=none", columns=columns
    )
    assert renamed == made.replace("MB ×", "size").replace("`gptq@4`", "small: `gptq@4`")


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        ({"recovered_share": 0.48}, "48%"),
        ({"top1_agreement": 0.9641234, "top1_agreement_stderr": 0.0021}, "96.41% ± 0.21%"),
        ({"bits_per_byte_increase": 0.126, "bits_per_byte_increase_deviation": 0.004}, "+0.126 ± 0.004"),
        ({"bits_per_byte_increase": 0.0}, "0"),
        ({"speed_ratio": 1.5}, "1.5×"),
        ({"speed_ratio": 1.23456, "speed_ratio_stderr": 0.0345}, "1.235× ± 0.035"),
        ({"speed": 669.1, "speed_spread": [641.0, 681.0]}, "670 (640–680)"),
        ({"perplexity": 1035.512}, "1,036"),
        ({"perplexity": 18.6}, "18.6"),
        ({"note_of_it": "none"}, "none"),
    ],
)
def test_a_figure_is_written_by_what_its_name_ends_with(filled, figure, shown):
    assert filled("; protocol=none", rows=[{"name": "a"} | figure]).splitlines()[-1] == f"| `a` | {shown} |"


def test_models_have_the_columns_of_the_report_but_those_that_were_not_measured_then(filled):
    figures = {"parameters": 4_000_000, "bytes": 4_070_000, "bits_per_byte": 2.19, "bits_per_byte_stderr": 0.069}
    figures |= {"bits_per_byte_increase": None, "seconds_of_old": 3.0}
    assert filled("; protocol=none", rows=[{"name": "before"} | figures]).splitlines()[2:] == [
        "| model | parameters | MB on disk | bits/byte | increase over the original |",
        "|---|---:|---:|---:|---:|",
        "| `before` | 4.00 M | 4.07 | 2.190 ± 0.069 | reference |",
    ]


def test_a_task_has_a_table_of_its_own(filled):
    told = {"items": 50, "kind": "choices", "by": "bytes", "accuracy": 0.5, "accuracy_stderr": 0.071, "changed": None}
    none = ("accuracy_difference", "interval", "flips_to_right", "flips_to_wrong", "mcnemar_p", "changed_by_rounding")
    told |= {"calibration_error": 0.1, "minimum_detectable": None} | dict.fromkeys((*none, "kl", "kl_by_rounding"))
    shown = filled("; task=arc; columns=accuracy | flips", rows=[{"name": "before", "tasks": {"arc": told}}])
    assert shown.splitlines()[4] == "| `before` | 50.0% ± 7.1% | reference |"
    assert (
        "Protocol: arc: 50 items; right is what has the largest log-likelihood divided by its bytes. One text." in shown
    )
    with pytest.raises(InputError, match="has no task 'boolq', only arc"):
        filled("; task=boolq", rows=[{"name": "before", "tasks": {"arc": told}}])


def test_tasks_have_columns_under_their_names(filled):
    figures = {"parameters": 4_000_000, "bytes": 4_070_000, "bits_per_byte": 2.19, "bits_per_byte_increase": None}
    labels, ones, likely = np.arange(20) % 2, np.ones((20, 2), int), np.linspace(-9, -1, 40).reshape(20, 2)
    of = lambda logs: Answers(
        "choices", logs, ones, ones, ones > 1, np.zeros(20), np.full(20, 0.5), labels == 1, labels
    )
    first, other = of(likely), of(np.where(np.arange(20)[:, None] < 3, -likely, likely))  # chosen: 1; in three items 0
    told = {"a": answers.figures(first, first), "b": answers.figures(other, first)}
    rows = [{"name": name, "tasks": {"arc_easy": each}} | figures for name, each in told.items()]
    made = filled("; columns=arc_easy: accuracy | arc_easy: flips as flips; protocol=none", rows=rows)
    assert made.splitlines()[2:] == [
        "| model | arc_easy: accuracy | flips |",
        "|---|---:|---:|",
        "| `a` | 50% ± 11% | reference |",
        "| `b` | 55% ± 11% | +2/-1 |",
    ]


@pytest.mark.parametrize(
    ("choices", "fields", "said"),
    [
        ("; rows=w8a8", {}, r"made.json has no row 'w8a8', only before \| half \| 2:4 \| gptq@4"),
        ("; columns=speed", {}, r"made.json has no column 'speed', only MB \| MB × \| loss"),
        ("; sort=loss", {}, "made.json: sort is no choice"),
        ("", {"versions": VERSIONS | {"commit": "adbe7ce, changed"}}, "of commit 'adbe7ce, changed'"),
        ("", {"versions": VERSIONS | {"commit": "adbe7ce and ef4d56a"}, "transcribed": "from prose"}, "of commit"),
        ("", {"versions": VERSIONS | {"cpu": ""}}, "made.json has no cpu"),
        ("", {"versions": VERSIONS | {"commit": "not recorded"}}, "of commit 'not recorded'"),
        ("", {"rows": []}, "made.json has no rows"),
        ("", {"command": ""}, "made.json has no command"),
    ],
)
def test_what_cannot_be_published_is_refused(filled, choices, fields, said):
    with pytest.raises(InputError, match=said):
        filled(choices, **fields)


def test_a_table_must_end(tmp_path):
    with pytest.raises(InputError, match="1 tables begin"):
        published.fill("<!-- results: made.json -->\n", tmp_path)


def test_what_prose_did_not_say_is_not_recorded(filled):
    unknown = dict.fromkeys(("date", "commit", "cpu", "cores"), published.UNKNOWN)
    made = filled(versions=unknown, command=published.UNKNOWN, transcribed="from README.md at commit adbe7ce")
    assert made.startswith("Seeds: 3; machine, commit, date, command: not recorded; transcribed.\n")


def test_the_results_of_a_run_are_kept_without_what_no_table_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "versions", VERSIONS)
    rows = [{"name": "a", "loss": 1.5, "component_bytes": {"embeddings": 3}}]
    Journal(str(tmp_path / "run"), "command").results(["fact"], rows=rows, seed=3, samples={"a": "text"})
    assert published.keep(str(tmp_path / "run"), tmp_path) == tmp_path / "run.json"
    kept = json.loads((tmp_path / "run.json").read_text())
    how = {"protocol": ["fact"], "command": "command", "versions": VERSIONS, "seed": 3}
    assert kept == how | {"rows": [{"name": "a", "loss": 1.5}]}
