"""What experiments.compress calls its models and where it writes them."""

import json

import pytest

import efflm
from efflm.cli.flags import launch
from efflm.compress import grammar, recipe
from efflm.compress.finetune import Finetune
from efflm.compress.magnitude import Magnitude
from efflm.compress.step import Calibration
from efflm.config import InputError
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.report.comparison import Limits
from efflm.text import tokenizer
from experiments import compress
from tests import tiny

TOKENS = tokenizer.train(["the cat sat on the mat\n" * 50], 290)


@pytest.fixture
def model(tmp_path):
    efflm.save(tmp_path / "model", tiny.model(), TOKENS)
    (tmp_path / "t.txt").write_text("the cat sat on the mat\n" * 40)
    return tmp_path / "model"


def run(model, out, *flags):
    flags = ["x", f"--model={model}", f"--text={model.parent / 't.txt'}", f"--run_dir={out}", "--score.documents=1",
             "--score.tokens=12", "--prompt=", *flags]  # fmt: skip
    launch(compress.main, "", flags, run=compress.Run(), calibration=Calibration(), score=Scoring(), task=TaskFiles(),
           limits=Limits(), **recipe.STEPS)  # fmt: skip


def test_a_recipe_with_other_settings_has_another_name():
    name = lambda recipes, changes: list(grammar.with_settings(grammar.chains(recipes), changes))
    assert name("magnitude50", {Magnitude: {"sparsity": 0.3}}) == ["magnitude@0.3"]
    assert name("magnitude50", {Magnitude: {"sparsity": 0.5}}) == ["magnitude50"]  # as the recipe has it
    assert name("w8a16 magnitude50,w8a16", {Magnitude: {"sparsity": 0.3}}) == ["w8a16", "magnitude@0.3,quantize"]
    both = {Magnitude: {"scope": "2:4"}, Finetune: {"steps": 3}}
    assert name("magnitude50_trained", both) == ["magnitude@2:4,finetune[steps=3,learning_rate=0.0002]"]
    with pytest.raises(InputError, match="sparsity set for Magnitude, which is not in this recipe"):
        name("w8a8", {Magnitude: {"sparsity": 0.25}})


def test_the_command_for_one_recipe_of_several_has_the_settings_of_its_own_steps():
    argv = ["x", "--recipe", "w8a16 magnitude50", "--magnitude.sparsity=0.3", "--seed=1", "--magnitude.scope", "2:4"]
    assert compress.command_for("w8a16", argv).endswith("experiments.compress --seed=1 --recipe=w8a16")
    argv = ["x", "--noquantize.symmetric", "--batch", "2", "--recipe=a", "--quantize.clip", "--prompt="]
    assert compress.command_for("wanda@2:4", argv).endswith(
        "experiments.compress --batch 2 --prompt= --recipe=wanda@2:4"
    )


def test_changed_settings_do_not_replace_the_recipes_own_model(model, tmp_path):
    out = tmp_path / "out"
    run(model, out, "--recipe=magnitude50")
    own = (out / "magnitude50.safetensors").read_bytes()
    run(model, out, "--recipe=magnitude50", "--magnitude.sparsity=0.3")
    assert (out / "magnitude50.safetensors").read_bytes() == own
    assert (out / "recipe.toml").read_text() == '"magnitude@0.3" = "magnitude@0.3"\n'
    assert "Chains (recipe.toml): " in (out / "report.html").read_text()
    changed, _ = efflm.load(out / "magnitude@0.3.safetensors")
    assert changed.about["lineage"][0]["settings"]["sparsity"] == 0.3
    assert json.loads((out / "results.json").read_text())["rows"][1]["name"] == "magnitude@0.3"


def test_models_of_another_tokenizer_are_not_written_beside(model, tmp_path, capsys):
    """Their files would decode wrongly. It is found before any work."""
    out = tmp_path / "out"
    other = tokenizer.train(["def f(x):\n    return x\n" * 50], 290)
    efflm.save(out / "theirs.safetensors", tiny.model(), other)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit):
        run(model, out, "--recipe=w8a16")
    assert "holds theirs.safetensors, whose tokenizer is another one: give another --run_dir" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_leaves_no_models(model, tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "out", compress.efflm_file.save

    def full(path, *given):
        if path.name != compress.BEFORE:
            return save(path, *given)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress.efflm_file, "save", full)
    with pytest.raises((SystemExit, InputError)):
        run(model, out, "--recipe=w8a16")
    assert "No space left on device" in capsys.readouterr().err
    assert not [path.name for path in out.rglob("*") if path.is_file()]
