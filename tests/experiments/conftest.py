import pytest

from efflm.evaluate import machine
from efflm.evaluate.machine import Roofline
from efflm.model import autotune


@pytest.fixture(autouse=True, scope="module")
def known_machine():
    """A machine of 1 TFLOP/s and 1 GB/s: to measure it takes seconds, and no test depends on what comes out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine, "measure", lambda dtypes: Roofline(dict.fromkeys(dtypes, 1e12), 1e9))
        yield


@pytest.fixture
def auto_picks(tmp_path, monkeypatch):
    """A function after which auto picks the precision it was given, and nothing is kept of what was measured before."""

    def pick(name):
        seconds = dict.fromkeys(autotune.CANDIDATES, 2.0) | {name: 1.0}
        monkeypatch.setattr(autotune, "measured", lambda parts: {"layers": seconds})
        monkeypatch.setattr(autotune, "_file", lambda: tmp_path / f"autotune-{name}.json")

    return pick
