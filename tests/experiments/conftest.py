import pytest

from efflm.evaluate import machine
from efflm.evaluate.machine import Roofline


@pytest.fixture(autouse=True, scope="module")
def known_machine():
    """A machine of 1 TFLOP/s and 1 GB/s: to measure it takes seconds, and no test depends on what comes out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine, "measure", lambda dtypes: Roofline(dict.fromkeys(dtypes, 1e12), 1e9))
        yield
