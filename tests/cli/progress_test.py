import io
import sys

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


def test_elsewhere_nothing_is_written(capsys):
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
