"""What a notebook shows of what was measured, as a parser reads it."""

import builtins
import dataclasses
from html.parser import HTMLParser

import pytest
from rich import jupyter
from rich.console import Console

from efflm.report import table, tasks
from efflm.report.measured import Measured
from tests.report.example import NONE, ROW, TEN, asked

HOSTILE = '<img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """Tables as lists of rows of texts (a cell that spans several columns once for each), and the items of lists."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.items, self.open, self.seen = [], [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag != "br":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.span = int(dict(attributes).get("colspan", 1))
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "th":
            self.tables[-1][-1] += self.tables[-1][-1][-1:] * (self.span - 1)

    def handle_data(self, data):
        if "li" in self.open:
            self.items[-1] += data
        elif {"td", "th"} & {*self.open}:
            row = self.tables[-1][-1]
            row[-1] = f"{row[-1]} {data}".strip()


def test_a_notebook_shows_the_table_the_notes_and_the_facts():
    unmeasured = dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"))
    rows = [ROW.but(**NONE, **unmeasured), dataclasses.replace(TEN[1].but(**unmeasured), name=HOSTILE)]
    page = Page(Measured((*rows,), (f"a fact {HOSTILE}",), None)._repr_html_())
    assert page.open == []
    assert page.seen == {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "b", "br", "small"}
    ((groups, headings, *body),) = page.tables
    columns = [column for column in table.COLUMNS if "tok/s" not in column.heading]
    assert headings == [column.heading for column in columns]
    assert groups == [column.group for column in columns]
    assert body == [[" ".join(filter(None, column.pair(row))) for column in columns] for row in rows]
    assert body[0][headings.index("KL to the original")] == "reference"
    assert body[1][0] == HOSTILE
    assert page.items == [f"{row.name}: {row.note}" for row in rows] + [f"a fact {HOSTILE}"]


def test_in_a_notebook_the_text_is_the_table_and_nothing_else_is_shown(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert Console().is_jupyter
    monkeypatch.setattr(jupyter, "display", lambda segments, text: pytest.fail(f"shown: {text}"))
    said = str(Measured((ROW,), ("a fact",), None))
    assert "4.07" in said
    assert said.endswith("a fact")


def test_each_task_has_a_table_too():
    page = Page(Measured((*asked(TEN[0], dataclasses.replace(TEN[1], name="flips")),), (), None)._repr_html_())
    _, headings, _, flips = page.tables[0]
    assert (headings[-1], flips[-1]) == ("arc", "60.0% ± 2.2% +20/-20")
    assert page.tables[1][0] == [column.heading for column in table.TASK]
    assert page.tables[1][2][:4] == ["flips", "60.0% ± 2.2%", "0.0 (-2.5 to +2.5)", "+20/-20"]
    assert page.items[-1] == tasks.READING
