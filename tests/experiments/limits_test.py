import json

import pytest

from efflm.cli.flags import launch
from efflm.compress import recipe
from efflm.compress.step import Calibration
from efflm.config import InputError
from efflm.evaluate import tasks
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from experiments import limits


def run(folder, out, *flags):
    given = [f"--model={folder / 'model'}", f"--run_dir={out}", "--batch=7", "--length=32", "--steps=4", "--probes=2"]
    launch(
        limits.main, limits.__doc__, ["x", *given, *flags],
        run=limits.Run(), calibration=Calibration(rows=8, length=32), score=Scoring(tokens=32), task=TaskFiles(),
    )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def test_every_limit_is_in_the_report_and_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    made, apply, answer = [], recipe.apply, tasks.answering

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        recipe, "apply", lambda model, steps, context: made.append(steps) or apply(model, steps, context)
    )
    task = {"id": "1", "context": "the number", "choices": [" 7919", " 3"], "label": 0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(task) + "\n" + json.dumps(task | {"id": "2", "label": 1}))
    out, domains = tmp_path / "out", f"--domains=numbers={folder / 'numbers'} letters={folder / 'letters'}"
    flags = [domains, "--chains=gptq@3 width@0.2,distill", "--matrix", f"--tasks={tmp_path / 'mine.jsonl'}"]
    monkeypatch.setattr(tasks, "answering", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, out, *flags)
    assert len(made) == 2
    monkeypatch.setattr(tasks, "answering", answer)
    found = run(folder, out, *flags)
    assert len(made) == 4  # two chains of two domains, each made once
    before, gptq, narrow = found["rows"]
    assert before["bits_per_byte_increase"] is None
    assert gptq["domains"].keys() == {"numbers", "letters"}
    assert gptq["domains"]["numbers"]["bits_per_byte_increase"] == gptq["bits_per_byte_increase"]
    assert gptq["note"].startswith("worst on ")
    assert gptq["by_position"].keys() == {"0-15", "16-63"}
    assert 0 < gptq["by_frequency"]["100-999"]["value"] < 1
    assert before["by_frequency"]["100-999"]["value"] == 0
    assert gptq["tasks"].keys() >= {"mine", "digits", "sums", "names", "long-range copies"}
    assert before["calibration"].keys() == {"error"}
    assert narrow["calibration"].keys() == {"error", "difference"}
    grid = found["domains"]["gptq@3"]
    assert grid["numbers"]["letters"] != grid["letters"]["letters"]
    assert grid["numbers"]["numbers"][0] == pytest.approx(gptq["bits_per_byte_increase"], abs=1e-5)
    assert set(found["curves"]["width@0.2,distill"]) == {"text trained on", "calibration text", "held-out text"}
    for steps, losses in found["curves"]["width@0.2,distill"].values():
        assert steps == [1, 2, 3, 4]
        assert losses[-1] < losses[0]
    assert found["overlap"].keys() == {"numbers", "letters"}
    page = (out / "report.html").read_text()
    for words in (
        "Generality",
        "Overfitting",
        "Confidence",
        "Length",
        "along its training",
        "made from",
        "long-range copies:",
    ):
        assert words in page
    assert "gptq@3 made from letters: numbers" in capsys.readouterr().out


def test_text_that_calibration_has_seen_is_warned_of(capsys):
    read = {"inputs": [list(range(40))], "segments": [[1] * 40]}
    said = []
    shares = limits.overlaps(read, {"same": [range(40)], "other": [range(50, 90)]}, Scoring(), said.append)
    assert shares == {"same": 1.0, "other": 0.0}
    assert said == ["warning: 100.00% of the 13-token sequences of same are in the calibration text too."]


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(
            folder,
            tmp_path / "out",
            f"--domains=numbers={folder / 'numbers'} mine={tmp_path / 'empty'}",
            "--chains=w8a16",
        )
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: corpus {tmp_path / 'empty'} is empty: it holds no files\n"
    for fields, words in (
        ({"domains": "code"}, "domains holds 'code', but must be NAME=CORPUS"),
        ({"chains": " "}, "chains is ' '"),
        ({"probes": 0}, "probes is 0"),
    ):
        with pytest.raises(InputError, match=words):
            limits.Run(**fields)
