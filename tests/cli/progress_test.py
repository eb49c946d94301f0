import io
import sys
import time
import types
from html.parser import HTMLParser

import pytest

from efflm.cli import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """A terminal as stderr. Not a fixture: pytest sets stderr again after those."""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stderr


@pytest.mark.parametrize("live", [True, False])
def test_items_come_through_with_a_bar_on_a_terminal(monkeypatch, live):
    stderr = terminal(monkeypatch)
    assert list(progress.shown([1, 2, 3], "reading things", 6, size=float, live=live)) == [1, 2, 3]
    said = stderr.getvalue()
    assert "reading things" in said
    assert "left" in said
    if not live:  # drawn whenever it is told something
        assert [share for share in ("17%", "50%", "100%") if share in said] == ["17%", "50%", "100%"]


def test_elsewhere_nothing_is_written_of_what_is_short(capsys):
    assert list(progress.shown(range(3), "reading", 3)) == [0, 1, 2]
    with progress.bar("waiting") as update:
        update(1)
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_meanwhile_stays_on_stdout(monkeypatch):
    stderr, stdout = terminal(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    for item in progress.shown(range(2), "measuring", 2):
        print(f"result {item}")
    assert stdout.getvalue() == "result 0\nresult 1\n"
    assert "result" not in stderr.getvalue()


def test_the_bar_is_on_the_stderr_of_its_beginning(monkeypatch):
    stderr = terminal(monkeypatch)
    items = progress.shown(range(2), "preparing", 2)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    list(items)
    assert "preparing" in stderr.getvalue()


def test_a_bar_of_unknown_length_says_what_is_waited_for(monkeypatch):
    stderr = terminal(monkeypatch)
    with progress.bar("compiling"):
        pass
    assert "compiling" in stderr.getvalue()


def test_a_log_has_a_line_every_half_minute_also_of_what_is_timed(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 12.0, 30.0, 30.0, 30.0, 59.9, 61.0, 61.0, 61.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("measuring", 200, live=False, done=20) as update:
        for done in (40, 80, 100):
            update(done, "loss 2.5")
        update(140)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "measuring: 40%, 0:00:30 so far, 0:01:00 left, loss 2.5",
        "measuring: 70%, 0:01:01 so far, 0:00:30 left",
    ]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_shows_life_while_nothing_is_told_and_a_closed_one_stops_no_work(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    for title in ("compiling", "reading"):
        with progress.bar(title):
            end = time.monotonic() + 20
            while title == "compiling" and log.getvalue().count("\n") < 2 and time.monotonic() < end:
                time.sleep(0.01)
            if title == "compiling":
                said = log.getvalue()
            log.close()
            time.sleep(0.05)
    assert said.splitlines()[:2] == 2 * ["compiling: 0:00:00 so far"]


class Parts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_notebook_has_a_bar_in_the_output_of_the_cell(monkeypatch, capsys):
    drawn = []
    handle = types.SimpleNamespace(update=lambda data, raw: drawn.append((data, raw)))
    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=None))
    shown = types.SimpleNamespace(display=lambda data, raw, display_id: drawn.append((data, raw)) or handle)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    assert list(progress.shown([1, 2], "reading <b>", 4, size=float)) == [1, 2]
    assert all(raw for _, raw in drawn)
    pages = [Parts(data["text/html"]) for data, _ in drawn]
    assert [page.tags for page in pages[:-1]] == [[("progress", {"value": f"{v:.4f}"})] for v in (0, 0.25, 0.75)]
    assert pages[1].text.startswith(" reading <b>: 25%, 0:00:00 so far, 0:00:0")
    assert drawn[-1][0] == {"text/plain": "", "text/html": ""}
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    list(progress.shown([1], "reading", 1))
    assert len(drawn) == 4
