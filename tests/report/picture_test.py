"""The picture of the front page is of the results that are kept."""

import json
import struct

from efflm.report import picture, runs

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
    assert picture.renew(results, png) == [png]
    assert struct.unpack(">II", png.read_bytes()[16:24]) == (1200, 600)
    assert picture.renew(results, png) == []
    results.write_text(json.dumps(found | {"versions": VERSIONS | {"commit": "c4d405e"}}))
    assert picture.renew(results, png) == [png]


def test_the_picture_of_the_front_page_is_not_stale():
    (run,) = runs.read([str(picture.RESULTS)])
    assert "verdicts" not in run.more or picture.is_of(run, picture.PICTURE), (
        "run `bash launch/run.sh experiments.report --publish`"
    )
