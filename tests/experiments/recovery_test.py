"""The experiment on recovery, on a tiny model: its chains, their order, and what it writes as it goes."""

import json

import pytest

from efflm.cli.flags import launch
from efflm.compress.adapt import Adapt
from efflm.compress.distill import Distill
from efflm.compress.step import Calibration
from efflm.config import InputError
from efflm.evaluate.windows import Scoring
from experiments import recovery
from tests.experiments.calibrated_test import folder  # noqa: F401  (a fixture)

GROUPS = {
    "run": recovery.Run(), "calibration": Calibration(rows=6, length=32), "score": Scoring(tokens=32),
    "distill": Distill, "adapt": Adapt,
}  # fmt: skip


def test_every_chain_has_a_row_and_shares_what_came_before(folder, tmp_path, monkeypatch, capsys, auto_picks):  # noqa: F811
    out, ran = tmp_path / "runs" / "out", []
    run = recovery.recipe.run
    monkeypatch.setattr(
        recovery.recipe, "run", lambda model, steps, context: ran.append(steps) or run(model, steps, context)
    )
    auto_picks("bfloat16")
    flags = [
        f"--model={folder / 'model'}", f"--corpus={folder / 'numbers'}", f"--run_dir={out}", "--seeds=2", "--steps=4",
        "--length=32", "--learning_rate=3e-3", "--distill.weight=1.0", "--speed=false", "--calibration_error",
        "--distill.entries=9",
        "--chains=width@0.2 width@0.2,finetune width@0.2,distill width@0.2,finetune@seconds "
        "width@0.2,distill[cache=top_k] "
        "depth@0.5,fresh,finetune@0.5 w3a16 w3a16,adapt",
        "--adapt.rank=3", "--precision=auto", "--orders=w8a16 distill",
    ]  # fmt: skip
    launch(recovery.main, "", ["x", *flags], **GROUPS)
    first, *rows = json.loads((out / "results.json").read_text())["rows"]
    found = {row["name"]: row for row in rows}
    assert list(found)[-2:] == ["w8a16,distill", "distill,w8a16"]
    rests = ("", ",finetune", ",distill", ",finetune@seconds")
    pruned, text, distilled, longer = (found[f"width@0.2{rest}"] for rest in rests)
    for row in (text, distilled, longer):
        assert (row["parameters"], row["seeds"]) == (pruned["parameters"], 2)
        lost = pruned["over_dense"]
        assert row["recovered"] == (pytest.approx(1 - row["over_dense"] / lost) if lost > 0 else None)
        assert row["deviation"] > 0
        assert row["memory"] > 0
    assert text["tokens"] == distilled["tokens"] == 4 * 8 * 32
    assert pruned["parameters"] < 0.85 * first["parameters"]
    assert (pruned["seconds"], pruned["memory"]) == (0, None)
    adapted, rounded = found["w3a16,adapt"], found["w3a16"]
    assert adapted["tokens"] == text["tokens"]
    assert adapted["recovered"] == pytest.approx(1 - adapted["over_dense"] / rounded["over_dense"])
    assert {steps[0].rank for steps in ran if type(steps[0]) is Adapt} == {3}
    assert all(0 < row["calibration"] < 1 for row in (first, *rows))
    assert found["width@0.2,distill[cache=top_k]"]["tokens"] == text["tokens"]
    assert found["depth@0.5,fresh,finetune@0.5"]["tokens"] == 2 * 8 * 32
    assert found["depth@0.5,fresh,finetune@0.5"]["recovered"] is None
    assert found["w8a16,distill"]["bytes"] == found["distill,w8a16"]["bytes"] < first["bytes"] / 2
    of_width = [steps for steps in ran if type(steps[0]).__name__ == "Width"]
    assert len(of_width) == 2  # one a seed
    assert {steps[0].weight for steps in ran if type(steps[0]) is Distill} == {1.0}
    scaled = [steps[0].steps for steps in ran if type(steps[0]).__name__ == "Finetune"]
    assert (scaled[:2], scaled[4:]) == (
        [4, 4],
        [2, 2],
    )  # those between are of @seconds, which measures how many
    said = capsys.readouterr().out
    assert "precision auto: bfloat16; the matmuls of a training step are 2.00x" in said
    assert "matmuls in bfloat16" in said
    assert "recovered" in said
    assert "Loss against bytes" in (out / "report.html").read_text()


def test_a_part_that_does_not_exist_is_refused():
    for chains, words in (
        ("width@0.3,best", "there is no step or recipe 'best'"),
        ("width", "width: parameters is 0.0, bytes is 0.0, latency is 0.0: set one of them"),
        ("width@2", "width@2: parameters is 2.0, but must be between 0 and 1"),
        ("distill@2", r"distill@2: a share of its steps must be in \(0, 1\]"),
        (
            "width@0.3,finetune@seconds width@0.3,finetune",
            "from width@0.3,finetune and width@0.3,distill: list",
        ),
        ("", "chains and orders are empty"),
    ):
        with pytest.raises(InputError, match=words):
            recovery.Run(chains=chains)
    assert len(recovery.Run(chains="", orders="width@0.3 distill w8a16").names) == 6


def test_settings_that_no_part_would_heed_are_refused():
    run = recovery.Run(chains="width@0.3,distill[cache=full] shrink30_distill,adapt")
    defaults = recovery.defaults_of(run, {"weight": 1.0}, {"rank": 3})
    assert (defaults[Distill]["weight"], defaults[Adapt]) == (1.0, {"steps": run.steps, "rank": 3})
    with pytest.raises(InputError, match=r"--distill\.steps is for experiments.compress: give --steps"):
        recovery.defaults_of(run, {"steps": 9}, {})
    with pytest.raises(InputError, match=r"--adapt\.steps is for"):
        recovery.defaults_of(run, {}, {"steps": 9})
    with pytest.raises(InputError, match=r"--distill\.weight is of the step distill, which no chain has"):
        recovery.defaults_of(recovery.Run(chains="shrink30_distill"), {"weight": 1.0}, {})
