import pytest

from efflm.evaluate import machine
from efflm.evaluate.machine import Roofline
from efflm.formats import efflm_file
from efflm.model import autotune
from efflm.text import tokenizer as tokenizers
from tests import tiny


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model, and two corpora of which it knows nothing."""
    root = tmp_path_factory.mktemp("models")
    for name, word in (("numbers", "number"), ("letters", "letter")):
        (root / name).mkdir()
        for i in range(30):
            (root / name / f"{i}.txt").write_text(f"the {word} {i * 7919} stands after {i * 7907}\n" * 12)
    (root / "model").mkdir()
    efflm_file.save(root / "model" / "model.safetensors", tiny.model(), {})
    texts = [file.read_text() for name in ("numbers", "letters") for file in (root / name).iterdir()]
    tokenizers.train(texts, 300).save(root / "model" / "tokenizer.json")
    return root
