"""What an error says to do is something that its caller can do: of a command its own flag, in Python an argument."""

import re
import sys
from pathlib import Path

import pytest

import efflm
from efflm.cli.flags import launch
from efflm.compress import recipe
from efflm.compress.step import Calibration
from efflm.data import dataset
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.model import init_params
from efflm.report.comparison import Limits
from experiments import compress, sensitivity, sweep
from tests import tiny
from tests.text.tokenizer_test import TOKENIZER

LIBRARY = Path(efflm.__file__).parent
# What only commands with such a flag reach, or what is told of commands.
OF_COMMANDS = {
    "cli/flags.py",
    "cli/help_text.py",
    "cli/run_directory.py",
    "formats/checkpoint.py",
    "train/checkpointing.py",
    "train/metrics.py",
    "data/dataset.py",
    "api/compression.py",
}
COMMANDS = {
    "compress": (
        compress,
        {"calibration": Calibration(), "task": TaskFiles(), "limits": Limits()} | recipe.STEPS,
        "--recipe=wanda50 --calibration.length=64",
    ),
    "trained": (
        compress,
        {"calibration": Calibration(), "task": TaskFiles(), "limits": Limits()} | recipe.STEPS,
        "--recipe=magnitude50_trained",
    ),
    "calibrated": (sweep, {"calibration": Calibration()} | recipe.STEPS, "--chains=wanda50 --calibration.length=64"),
    "recovery": (sweep, {"calibration": Calibration()} | recipe.STEPS, ""),
    "sensitivity": (sensitivity, {}, ""),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model, and a folder with too little text for it."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "text").mkdir()
    for i in range(70):
        (folder / "text" / f"{i}.txt").write_text(f"the river {i}\n")
    config = tiny.LLAMA.config()
    model = efflm.model.LanguageModel(config, init_params(config, 0))
    efflm.save(folder / "model", model, TOKENIZER)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_too_little_text_names_a_flag_that_the_command_has(name, short, capsys, monkeypatch, tmp_path):
    module, groups, flags = COMMANDS[name]
    monkeypatch.setattr(dataset, "cache", lambda: tmp_path / "cache")
    groups = {"run": module.Run()} | ({} if name == "sensitivity" else {"score": Scoring()}) | groups
    argv = ["x", f"--model={short / 'model'}", f"--corpus={short / 'text'}", f"--run_dir={tmp_path / 'out'}"]
    argv += flags.split() + ([] if name in ("calibrated", "sensitivity") else ["--batch=1000"])
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        launch(module.main, "", argv, **groups)
    said = capsys.readouterr().err.splitlines()[-1]
    named = re.findall(r"--([\w.]+)", said.partition("give more text")[2])
    assert named, said
    for flag in named:
        group, _, field = flag.rpartition(".")
        assert hasattr(groups[group or "run"], field), said


def test_too_little_text_names_an_argument_in_python(short, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "cache", lambda: tmp_path)
    model, tokenizer = efflm.load(short / "model")
    cases = {"wanda50": "calibration_rows or calibration_length", "magnitude50_trained": "batch or length"}
    for name, arguments in cases.items():
        with pytest.raises(efflm.InputError, match=f"give more text, or lower {arguments}$"):
            efflm.compress(model, name, short / "text", tokenizer, batch=1000)
    with pytest.raises(efflm.InputError, match="calibration_rows is 0"):
        efflm.compress(model, "wanda50", short / "text", tokenizer, calibration_rows=0)


def test_the_library_names_no_flags():
    """In its errors, where any caller can meet them."""
    found = {}
    for file in LIBRARY.rglob("*.py"):
        if str(file.relative_to(LIBRARY)) not in OF_COMMANDS:
            lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
            code = "\n".join(line.partition("  # ")[0] for line in lines)
            code = re.sub(r'""".*?"""', "", code, flags=re.S)  # docstrings tell of commands
            flags = re.findall(r"[^-\w\"](--(?!\w+=|version|quiet|no-|only-|dest|merge|remove)[a-z][\w.]+)", code)
            if flags:
                found[file.name] = flags
    assert not found
