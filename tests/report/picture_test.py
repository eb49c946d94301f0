"""Pictures are of the results that are kept."""

import json
import struct

import pytest

from efflm.report import picture, plots

VERSIONS = {"date": "2026-11-30 01:20 UTC", "commit": "adbe7ce", "cpu": "AMD EPYC (avx2)", "cores": "2"}


def row(name, nbytes, increase, error):
    return {"name": name, "bytes": nbytes, "bits_per_byte_increase": increase, "bits_per_byte_increase_stderr": error}


def test_it_is_drawn_anew_for_other_results_and_not_for_the_same(tmp_path):
    results, png = tmp_path / "quickstart.json", tmp_path / "quickstart.png"
    verdict = {"heading": "Smallest", "name": "w8a16", "words": "4× smaller; loss +0.1% ± 0.2%. As good: none."}
    found = {
        "rows": [row("float32", 16_000_000, None, None), row("w8a16", 4_000_000, 0.002, 0.001)],
        "verdicts": [verdict] * 9,  # more than there is room for
        "protocol": [], "command": "bash launch/quickstart.sh", "versions": VERSIONS,
    }  # fmt: skip
    results.write_text(json.dumps(found))
    assert picture.renew(tmp_path, tmp_path) == [png]
    assert struct.unpack(">II", png.read_bytes()[16:24]) == (1200, 600)
    assert picture.renew(tmp_path, tmp_path) == []
    results.write_text(json.dumps(found | {"versions": VERSIONS | {"commit": "c4d405e"}}))
    assert picture.renew(tmp_path, tmp_path) == [png]


def test_programs_are_compared_by_the_files_that_none_of_their_own_beats(tmp_path, monkeypatch):
    of = lambda name, program, bits, kl: {
        "name": name, "program": program, "calibrated": "no", "bits_a_weight": bits,
        "kl_to_original": kl, "kl_to_original_stderr": kl / 50,
    }  # fmt: skip
    rows = [
        of("a", "efflm", 4.5, 0.1),
        of("b", "efflm", 5.0, 0.2),
        of("c", "efflm", 8.0, 0.01),
        of("d", "another", 4, 0.4),
    ]
    found = {"rows": rows, "protocol": [], "command": "python it", "versions": VERSIONS}
    (tmp_path / "bytes.json").write_text(json.dumps(found))
    seen = []
    sweeps = plots.sweeps
    monkeypatch.setattr(plots, "sweeps", lambda found, *how: seen.append(found) or sweeps(found, *how))
    assert picture.renew(tmp_path, tmp_path) == [tmp_path / "bytes.png"]
    (shown,) = seen
    assert {name: xs.tolist() for name, (xs, _, _) in shown.items()} == {"another": [4.0], "efflm": [4.5, 8.0]}
    assert list(shown) == ["efflm", "another"]  # always, so that a program has the same colour in all pictures


@pytest.mark.parametrize("run", [run for run, _ in picture.drawn()], ids=lambda run: run.name)
def test_no_picture_is_stale(run):
    stale = "run `bash launch/run.sh experiments.report --publish`"
    assert picture.is_of(run, picture.FOLDER / f"{run.name}.png"), stale
