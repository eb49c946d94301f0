import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from efflm.report import compared, page
from efflm.report.comparison import Comparison
from efflm.report.page import Detail, Section, Table
from efflm.report.rows import Row
from efflm.report.samples import Sample
from efflm.report.table import COLUMNS, Column
from tests.report.browser import look, needs_browser
from tests.report.example import ROW, TEN, asked

HOSTILE = '<img src=x onerror="alert(1)"> {{ 7 * 7 }} $x$'
MADE = {"date": "2026-01-02 03:04 UTC", "processor": "a processor", "cores": "2", "commit": "abc1234", "seed": "0"}


def phase(name):
    parts = {"attention": 0.0004, "feed-forward": 0.0006}
    return Row(name, {"tokens": 1, "predicted_seconds": 0.001, "measured_seconds": 0.002, "parts": parts})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of ten models and one whose name and texts are an attacker's."""
    rows = [*TEN, dataclasses.replace(TEN[-1], name=HOSTILE, note=HOSTILE)]
    first, flips = (row.tasks["arc"] for row in asked(TEN[0], dataclasses.replace(TEN[0], name="flips")))
    rows = [row.but(tasks={f"arc {HOSTILE}": flips if index else first}) for index, row in enumerate(rows)]
    sample = Sample("def f", "(x):\n    return 1")
    details = {
        row.name: Detail(
            lineage=[("trained", HOSTILE)],
            samples={"float32": sample, row.name: Sample("def f", "(x):", " pass", HOSTILE)},
            agreement="The first 3 tokens are those of float32.",
            command=f"run --recipe={row.name}",
        )
        for row in rows
    }
    path = tmp_path_factory.mktemp("page") / "report.html"
    compared.write(
        path, title=f"A {HOSTILE}", comparison=Comparison(rows), details=details,
        curves={row.name: (np.arange(5.0), np.linspace(3, 2, 5)) for row in rows[:4]},
        phases=[phase("prefill"), phase("decode")], facts=[HOSTILE], made=MADE, command=f"run '{HOSTILE}'",
    )  # fmt: skip
    return path


def test_the_page_is_self_contained_and_escaped(report):
    text = report.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "<img" not in text
    assert text.count("{{ 7 * 7 }}") > 5
    assert text.count("&lt;img src=x onerror=") > 5
    assert "<h2>Tasks</h2>" in text
    assert "Bytes on disk, by component, before entropy coding" in text  # of a row with fewer bytes than its components
    for figure in (
        "+20/-20",
        "(-2.5 to +2.5)",
        "0.200 → 0.200",
        "(rounding alone: 2)",
        "answers changed, 20 from right",
    ):
        assert figure in text
    for figure in ("2.000", "± 0.070", "14,000", "(13,600–14,400)", "+0.00500", "3.45×", "abc1234", "a processor"):
        assert figure in text
    assert "-0.0000 " not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_a_table_of_notes_alone_opens_too(tmp_path):
    table = Table(caption="One", columns=COLUMNS, rows=[ROW])
    page.write(tmp_path / "r.html", title="t", sections=[Section("s", [table])], facts=[], made={}, command="c")
    text = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;bold &amp; free&lt;/b&gt;" in text
    assert "×" not in text  # of a single row there is no ratio


def test_what_is_not_finite_sorts_as_a_number_or_comes_last():
    values = {"a": 1.5, "b": float("inf"), "c": -float("inf"), "d": float("nan"), "e": None}
    named = [dataclasses.replace(ROW, name=name) for name in values]
    column = Column("figure", lambda row: str(values[row.name]), lambda row: values[row.name])
    table = Table(caption="One", columns=[column], rows=named)
    assert [table.cell(column, row).sort for row in named] == ["1.5", "Infinity", "-Infinity", "", ""]


def test_a_bar_of_nothing_or_of_what_is_not_finite_has_no_length():
    bars = page.bars("c", {"one": {"a": float("nan"), "b": 0.0}}, "MB", 1e6)
    assert [share for share, _ in bars.bars[0].pieces] == [0.0, 0.0]


def test_a_bar_s_pieces_are_its_parts():
    bars = page.bars("c", {"one": {"a": 3e6, "b": 1e6}, "two": {"b": 2e6}}, "MB", 1e6)
    assert bars.parts == ["a", "b"]
    assert [[share for share, _ in bar.pieces] for bar in bars.bars] == [[75, 25], [0, 50]]
    assert bars.bars[0].pieces[0][1] == "one, a: 3.00 MB (75%)"
    assert [bar.total for bar in bars.bars] == ["4.00 MB", "2.00 MB"]


USE = """(() => {
  const models = document.querySelector(".cards"), headings = [...models.querySelectorAll("thead th")];
  const heading = (words) => headings.find((th) => th.textContent.trim() === words);
  const names = () => [...models.querySelectorAll("tbody")].map((body) => body.dataset.row);
  const sort = (words) => {
    heading(words).querySelector("button").click();
    return [heading(words).ariaSort, names()];
  };
  const before = names();
  const sorts = [sort("MB on disk"), sort("MB on disk"), sort("increase over the original"), sort("model")];
  const details = [...document.querySelectorAll(".detail")], closed = details.every((row) => row.hidden);
  const open = document.querySelector(".open");
  open.click();
  const opened = [!open.closest("tbody").querySelector(".detail").hidden, open.ariaExpanded];
  const marks = [...document.querySelectorAll("svg .mark")], tip = document.getElementById("tip");
  marks[3].dispatchEvent(new PointerEvent("pointerenter"));
  const hovered = [tip.hidden, tip.textContent, document.querySelector(".pointed").dataset.row];
  marks[3].dispatchEvent(new PointerEvent("pointerleave"));
  const left = tip.hidden;
  marks[4].dispatchEvent(new MouseEvent("click"));
  const marked = document.querySelectorAll("mark").length;
  return { before, sorts, closed, opened, hovered, left, tapped: tip.textContent, marked };
})()"""


@needs_browser
def test_in_a_browser_it_sorts_opens_and_tells(report, tmp_path):
    result = look(report, USE, tmp_path)
    assert (result["wrong"], result["requests"], result["overflow"]) == ([], [], 0)
    found, rows = result["found"], [*TEN, dataclasses.replace(TEN[-1], name=HOSTILE)]
    names = [row.name for row in rows]
    by = lambda key: [row.name for row in sorted(rows, key=key)]
    assert found["before"] == names
    assert found["sorts"][0] == ["ascending", by(lambda row: row.bytes)]
    assert found["sorts"][1][0] == "descending"
    assert found["sorts"][1][1][0] == "float32"
    assert found["sorts"][2][1] == by(lambda row: row.bits_per_byte_increase or 0.0)
    assert found["sorts"][3][1] == sorted(names)
    assert found["closed"]
    assert found["opened"] == [True, "true"]
    assert found["hovered"] == [False, "w8a8: 4.1 MB, +0.00010 ± 0.00005 bits/byte", "w8a8"]
    assert found["left"]
    assert found["tapped"].startswith("magnitude50: 10.5 MB")
    assert found["marked"] == len(names)


TOOLS = """(() => {
  const tools = document.querySelector(".tools"), filter = tools.querySelector("[type=search]"), kept = [];
  HTMLAnchorElement.prototype.click = function () { kept.push([this.download, decodeURIComponent(this.href)]); };
  const get = (kind) => { tools.querySelector(`[data-as=${kind}]`).click(); return kept.pop(); };
  const type = (words) => { filter.value = words; filter.dispatchEvent(new InputEvent("input")); };
  const seen = (cells) => [...document.querySelectorAll(cells)].filter((each) => each.offsetParent);
  const names = () => seen(".data.cards tbody").map((body) => [body.dataset.run, body.dataset.row]);
  const labels = [...tools.querySelectorAll("label")];
  const box = (words) => labels.find((each) => each.textContent.trim() === words).firstChild;
  const headings = () => seen(".cards thead tr:last-child th").map((th) => th.textContent.trim());
  const groups = () => seen(".cards .groups th").map((th) => [th.textContent, th.colSpan]);
  const all = [get("csv"), get("json"), headings().length, groups()];
  type(" W8, scratch,");
  const filtered = [names(), tools.querySelector("[role=status]").textContent, get("json")[1]];
  type("nothing of this name");
  const none = [names(), get("csv")[1]];
  type("");
  box("perplexity").click();
  const one = [box("quality, ± standard error").indeterminate, headings().length, groups()];
  box("speed").click();
  box("size").click();
  box("size").click();
  const some = [headings(), groups(), get("csv")[1].split("\\r\\n")[0]];
  document.querySelector(".cards .sort").click();
  return { all, filtered, none, one, some, sorted: names() };
})()"""


@needs_browser
def test_in_a_browser_rows_are_filtered_columns_hidden_and_what_is_shown_downloaded(tmp_path):
    rows = [row.but(run=run) for run in ("a", "b") for row in TEN]
    table = Table(caption="c", columns=COLUMNS, rows=rows, headings={"a": "on a machine", "b": "on another"})
    page.write(tmp_path / "r.html", title="t", sections=[Section("s", [table])], facts=[], made={}, command="c")
    result = look(tmp_path / "r.html", TOOLS, tmp_path)
    assert (result["wrong"], result["requests"], result["overflow"]) == ([], [], 0)
    found = result["found"]
    (file, text), (json_file, json_text), count, groups = found["all"]
    assert (file, json_file) == ("table.csv", "table.json")
    assert (count, groups) == (12, [["", 1], ["size", 3], ["speed", 3], ["quality, ± standard error", 5]])
    downloaded = json.loads(json_text.partition(",")[2])
    assert len(downloaded) == 20
    for told, row in zip(downloaded, rows, strict=True):
        names = [name for column in COLUMNS for name in column.figures]
        assert told == {name: json.loads(json.dumps(row.at(name))) for name in ["run", *names]}
    lines = [*csv.DictReader(io.StringIO(text.partition(",")[2]))]
    for told, row in zip(lines, rows, strict=True):
        low, high = row.prefill_spread
        assert (told["run"], told["name"], float(told["prefill_spread_low"])) == (row.run, row.name, low)
        for name, value in {
            "bytes": row.bytes,
            "kl_to_original": row.kl_to_original,
            "prefill_spread_high": high,
        }.items():
            assert told[name] == "" if value is None else float(told[name]) == value
    eight, heading = ["w8a16", "w8a8", "student_scratch"], [None]
    assert found["filtered"][:2] == [[[run, name] for run in "ab" for name in [*heading, *eight]], "6 of 20 rows"]
    assert [row["name"] for row in json.loads(found["filtered"][2].partition(",")[2])] == 2 * eight
    assert found["none"] == [[], "data:text/csv;charset=utf-8,\r\n"]
    assert found["one"] == [True, 11, [*groups[:3], [groups[3][0], 4]]]
    quality = ["bits/byte", "increase over the original", "KL to the original", "same top-1"]
    assert found["some"][:2] == [
        ["model", "parameters", "MB on disk", "bits a weight", *quality],
        [groups[0], groups[1], [groups[3][0], 4]],
    ]
    assert "perplexity" not in found["some"][2]
    assert "decode" not in found["some"][2]
    order = sorted(row.name for row in TEN)
    assert found["sorted"] == [[run, name] for run in "ab" for name in [*heading, *order]]


# Every text with the color behind it: their contrast by WCAG 2.1, and what lacks 4.5.
CONTRAST = """(() => {
  document.querySelectorAll(".open").forEach((button) => button.click());
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (color) => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, style, [hidden]")) continue;
    const style = getComputedStyle(element), svg = element.closest("svg");
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(behind(element))];
    seen += 1;
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${node.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  const nameless = ["img:not([alt])", ".charts figure:not([aria-label])", ".mark:not([aria-label])"];
  const unnamed = document.querySelectorAll(nameless.join());
  const tables = [...document.querySelectorAll("table")];
  return { seen, poor, unnamed: unnamed.length, captions: tables.every((t) => t.caption.textContent.trim()),
    scopes: [...document.querySelectorAll(".data tbody th")].every((th) => th.scope === "row"),
    paper: getComputedStyle(document.body).backgroundColor };
})()"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_it_fits_and_can_be_read(report, tmp_path, width, dark):
    result = look(report, CONTRAST, tmp_path, width=width, dark=dark)
    assert (result["wrong"], result["requests"], result["overflow"]) == ([], [], 0)
    found = result["found"]
    assert found["seen"] > 300
    assert (found["poor"], found["unnamed"]) == ([], 0)
    assert found["captions"]
    assert found["scopes"]
    assert found["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
