import json

import pytest

from efflm.cli.flags import launch
from efflm.config import InputError
from experiments import bench_speculative
from tests.experiments.calibrated_test import folder  # noqa: F401  (a fixture)


def test_it_prints_acceptance_and_a_ratio(folder, capsys):  # noqa: F811
    model = folder / "model"
    flags = [
        f"--model={model}", f"--draft={model}", f"--corpus={folder / 'numbers'}", "--ahead=2 3", "--prompts=2",
        "--prompt_tokens=8", "--max_tokens=12", "--rounds=2",
    ]  # fmt: skip
    launch(bench_speculative.main, "", ["x", *flags], run=bench_speculative.Run())
    said = capsys.readouterr().out
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [row["ahead"] for row in found] == [2, 3]
    for row in found:
        assert row["acceptance"] == 1
        assert row["tokens_per_pass"] == row["ahead"] + 1
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["alone"], rel=0.05)
        assert ("no speedup here with" in said) == any(row["ratio"] <= 1 for row in found)
    assert "2 prompts of 8 tokens, 12 new" in said


def test_what_cannot_be_is_refused():
    for fields, words in (
        ({"ahead": "2 many"}, "ahead is '2 many', but must be positive numbers"),
        ({"ahead": ""}, "ahead is empty"),
        ({"rounds": 0}, "rounds is 0"),
    ):
        with pytest.raises(InputError, match=words):
            bench_speculative.Run(**fields)
    with pytest.raises(InputError, match="--draft is missing: give a smaller model"):
        bench_speculative.main(bench_speculative.Run())
