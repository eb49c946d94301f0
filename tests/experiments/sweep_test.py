"""Chains swept over seeds, on a tiny model: their rows, charts and order, and what is written as they are made."""

import json

import pytest

from efflm.cli.flags import launch
from efflm.compress import grammar, recipe
from efflm.compress.adapt import Adapt
from efflm.compress.distill import Distill
from efflm.compress.step import Calibration
from efflm.config import InputError
from efflm.evaluate.windows import Scoring
from experiments import sweep

ROWS = 7  # of a batch: for one device, whose programs later runs of the tests find compiled
GROUPS = {
    "run": sweep.Run(), "calibration": Calibration(rows=6, length=32), "score": Scoring(tokens=32), **recipe.STEPS
}  # fmt: skip


def run(folder, out, *flags):
    """The table of results.json."""
    given = [f"--model={folder / 'model'}", f"--corpus={folder / 'numbers'}", f"--run_dir={out}", "--nospeed"]
    given += [f"--batch={ROWS}", *flags]
    launch(sweep.main, sweep.__doc__, ["x", *given], **GROUPS)
    found = json.loads((out / "results.json").read_text())
    return {row["name"]: row for row in found["rows"]}


def test_every_method_has_a_row_and_every_family_a_curve(folder, tmp_path, capsys):
    out, chains = tmp_path / "runs" / "out", ["quantize@4", "gptq@3", "wanda@0.5", "w8a16"]
    rows = run(folder, out, "--seeds=2", f"--chains={' '.join(chains)}")
    before, *made = rows.values()
    assert before["bits_per_byte_increase"] is None
    assert [row["name"] for row in made] == chains
    assert {name: row["seeds"] for name, row in rows.items() if row["seeds"] > 1} == {"gptq@3": 2, "wanda@0.5": 2}
    for row in made:
        assert row["saved"] == pytest.approx(1 - row["bytes"] / before["bytes"])
        assert row["cost"] == pytest.approx(row["bits_per_byte_increase"] / row["saved"])
        assert (row["bits_per_byte_increase_deviation"] is None) == (row["seeds"] == 1)
        assert row["passes"] > 0
    said = capsys.readouterr().out
    assert "13-token sequences of the test text" in said
    assert "prefill" not in said
    page = (out / "report.html").read_text()
    for words in ("Perplexity against bits", "Perplexity against sparsity", "Loss over before against MB on disk"):
        assert words in page
    assert grammar.parts(str(out / "recipe.toml"))["w8a16"] == ["quantize"]


def assert_recovered(row, before):
    """The share of what the chain before it lost, where that lost anything."""
    lost = before["bits_per_byte_increase"]
    assert row["recovered"] == (pytest.approx(1 - row["bits_per_byte_increase"] / lost) if lost > 0 else None)


def test_chains_share_what_they_begin_with_and_say_what_recovers_them(
    folder, tmp_path, monkeypatch, capsys, auto_picks
):
    ran, steps_run = [], recipe.apply
    monkeypatch.setattr(
        recipe, "apply", lambda model, steps, context: ran.append(steps) or steps_run(model, steps, context)
    )
    auto_picks("bfloat16")
    rows = run(
        folder, tmp_path / "out", "--seeds=2", "--steps=4", "--length=32", "--learning_rate=3e-3",
        "--distill.weight=1.0", "--distill.entries=9", "--adapt.rank=3", "--calibration_error", "--precision=auto",
        "--chains=width@0.2 width@0.2,finetune width@0.2,distill width@0.2,finetune@seconds "
        "width@0.2,distill[cache=top_k] depth@0.5,depth@0.001[init=random],finetune@0.5 "
        "quantize@2[group=16] quantize@2[group=16],adapt",
        "--orders=w8a16 distill",
    )  # fmt: skip
    first, *_ = rows.values()
    assert list(rows)[-2:] == ["w8a16,distill", "distill,w8a16"]
    rests = ("", ",finetune", ",distill", ",finetune@seconds")
    pruned, text, distilled, longer = (rows[f"width@0.2{rest}"] for rest in rests)
    for row in (text, distilled, longer):
        assert (row["parameters"], row["seeds"]) == (pruned["parameters"], 2)
        assert_recovered(row, pruned)
        assert row["bits_per_byte_increase_deviation"] > 0
        assert row["memory"] >= pruned["memory"] > 0
        assert row["passes"] > pruned["passes"]
    assert text["tokens"] == distilled["tokens"] == 4 * ROWS * 32
    assert pruned["parameters"] < 0.85 * first["parameters"]
    assert pruned["seconds"] == 0 < text["seconds"]
    adapted, rounded = rows["quantize@2[group=16],adapt"], rows["quantize@2[group=16]"]
    assert adapted["tokens"] == text["tokens"]
    assert_recovered(adapted, rounded)
    assert {steps[0].rank for steps in ran if type(steps[0]) is Adapt} == {3}
    assert all(0 < row["calibration"] < 1 for row in rows.values())
    assert rows["width@0.2,distill[cache=top_k]"]["tokens"] == text["tokens"]
    fresh = rows["depth@0.5,depth@0.001[init=random],finetune@0.5"]
    assert (fresh["tokens"], fresh["recovered"]) == (2 * ROWS * 32, None)
    assert rows["w8a16,distill"]["bytes"] == rows["distill,w8a16"]["bytes"] < first["bytes"] / 2
    assert sum(type(steps[0]).__name__ == "Width" for steps in ran) == 2  # one a seed
    assert {steps[0].weight for steps in ran if type(steps[0]) is Distill} == {1.0}
    scaled = [steps[0].steps for steps in ran if type(steps[0]).__name__ == "Finetune"]
    assert (scaled[:2], scaled[4:]) == ([4, 4], [2, 2])  # those between are of @seconds, which measures how many
    chains = grammar.chains(str(tmp_path / "out" / "recipe.toml"))
    assert list(chains) == list(rows)[1:]
    made = "depth@0.5,depth@0.001[init=random],finetune[steps=2,learning_rate=0.003]"
    assert grammar.write(chains["depth@0.5,depth@0.001[init=random],finetune@0.5"]) == made
    said = capsys.readouterr().out
    for words in (
        "precision auto: bfloat16; the matmuls of a training step are 2.00x",
        "matmuls in bfloat16",
        "recovered",
    ):
        assert words in said
    assert "against MB on disk" in (tmp_path / "out" / "report.html").read_text()


def test_a_part_that_does_not_exist_is_refused():
    for chains, words in (
        ("width@0.3,best", "there is no step or recipe 'best'"),
        ("width", "width: parameters is 0.0, bytes is 0.0, latency is 0.0: set one of them"),
        ("width@2", "width@2: parameters is 2.0, but must be between 0 and 1"),
        ("quantize@9", "quantize@9: bits is '9'"),
        ("wanda@half", "wanda@half: sparsity is 'half', but must be a number"),
        ("distill@2", r"distill@2: a share of its steps must be in \(0, 1\]"),
        ("width@0.3,finetune@seconds width@0.3,finetune", "from width@0.3,finetune and width@0.3,distill: list"),
        ("", "chains and orders are empty"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.Run(chains=chains)
    assert len(sweep.Run(chains="", orders="width@0.3 distill w8a16").parts) == 6


def test_too_little_calibration_text_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", "--chains=gptq3", "--calibration.rows=5000")
    assert "rows of 32 tokens where 5000 are asked for: give more text" in capsys.readouterr().err


def test_settings_that_no_part_would_heed_are_refused():
    given = sweep.Run(chains="width@0.3,distill[cache=full] shrink30_distill,adapt")
    defaults = sweep.defaults_of(given, {"distill": {"weight": 1.0}, "adapt": {"rank": 3}})
    assert (defaults[Distill]["weight"], defaults[Adapt]) == (1.0, {"steps": given.steps, "rank": 3})
    with pytest.raises(InputError, match=r"--distill\.weight is of the step distill, which no chain names"):
        sweep.defaults_of(sweep.Run(chains="shrink30_distill"), {"distill": {"weight": 1.0}})
