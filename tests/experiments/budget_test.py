"""A budget on a tiny model that knows its text: a step that learns the selection text by heart is refused."""

import dataclasses
import json

import numpy as np
import pytest

from efflm import trees
from efflm.cli.flags import launch
from efflm.compress import grammar, recipe
from efflm.compress.finetune import Finetune
from efflm.compress.step import Calibration, Context
from efflm.config import InputError
from efflm.config.train import TrainSettings
from efflm.data import dataset
from efflm.evaluate import scoring, throughput, windows
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.throughput import Rate
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file
from efflm.parallel import meshes
from efflm.text import tokenizer as tokenizers
from experiments import budget
from tests import tiny

ROWS, LENGTH = 7, 64  # of a batch: for one device


class Memorize(TrainSettings):
    """Training on the very text that candidates are selected by."""

    text = None

    def __call__(self, model, context):
        how = Scoring(window=LENGTH).within(LENGTH)
        rows = next(windows.blocks(self.text.validation.sized(), self.text.tokenizer.separator, how))
        step = Finetune(steps=60, learning_rate=1e-2)
        return step(model, dataclasses.replace(context, batches=lambda step: rows))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Random words, which nothing foretells but how often each is used, and a model that has learned that."""
    root, rng = tmp_path_factory.mktemp("budget"), np.random.default_rng(0)
    (root / "text").mkdir()
    for i in range(120):
        drawn = rng.choice(["one", "two", "three", "four", "five", "six"], 60)
        (root / "text" / f"{i}.txt").write_text(" ".join(drawn) + "\n")
    tokens = tokenizers.train([file.read_text() for file in (root / "text").iterdir()], 300)
    how = {"vocabulary": 300, "length": LENGTH, "batch": ROWS, "tokenizer": tokens}
    text = Memorize.text = dataset.prepare(str(root / "text"), dataset.cache(), **how)
    context = Context(batches=text.batches(ROWS, 0), mesh=meshes.data_parallel(ROWS))
    model, _ = Finetune(steps=40, learning_rate=1e-2)(tiny.model(), context)
    (root / "model").mkdir()
    efflm_file.save(root / "model" / "model.safetensors", model, {})
    tokens.save(root / "model" / "tokenizer.json")
    return root


def run(words, out, *flags):
    given = [f"--model={words / 'model'}", f"--corpus={words / 'text'}", f"--run_dir={out}", f"--batch={ROWS}"]
    given += [f"--length={LENGTH}", "--minutes=60", *flags]
    launch(
        budget.main, budget.__doc__, ["x", *given],
        run=budget.Run(), calibration=Calibration(rows=6, length=32), score=Scoring(), task=TaskFiles(),
    )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def test_what_learned_the_selection_text_by_heart_is_refused_and_a_search_goes_on(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipe.STEPS, "memorize", Memorize)
    made, apply = [], recipe.apply
    monkeypatch.setattr(
        recipe, "apply", lambda model, steps, context: made.append(steps) or apply(model, steps, context)
    )
    out, chains = tmp_path / "out", "--chains=w8a16 memorize,w8a16 quantize@3"
    found = run(words, out, "--loss=2%", chains, f"--check={words / 'text'}")
    tests, rows = {test["name"]: test for test in found["tests"]}, {row["name"]: row for row in found["rows"]}
    learned = tests["memorize,w8a16"]
    assert rows["memorize,w8a16"]["selection_share"] < -0.2  # it looks far better than the first model
    assert found["tests"][0] is learned
    assert learned["increase"][0] > 0.02
    assert not learned["accepted"]
    assert found["best"]["name"] in ("w8a16", "quantize@3")
    assert found["best"]["bound"] <= 0.02
    best, _ = efflm_file.load(out / "model.safetensors")
    kept, _ = efflm_file.load(out / "candidates" / f"{found['best']['name']}.safetensors")
    assert trees.equal(best.params["embedding"].values, kept.params["embedding"].values)
    assert 0 <= found["check"]["held"] <= 1
    said = capsys.readouterr().out
    assert "refused memorize,w8a16: on unseen text" in said
    assert f"the best accepted is {found['best']['name']}" in said
    page = (out / "report.html").read_text()
    assert "Not beaten there: " in page
    assert len(made) == 3
    again = run(words, out, "--loss=2%", chains)
    assert (again["best"], len(made)) == (found["best"], 3)
    loose = run(words, out, "--loss=0.02%", "--chains=quantize@3")  # what it knows of the other chains counts too
    assert loose["tests"] != found["tests"]
    with pytest.raises(SystemExit):
        run(words, out, "--chains=w8a16", "--score.tokens=8")
    assert "is of another model, text or settings" in capsys.readouterr().err


def test_an_interrupted_search_leaves_the_best_so_far_and_goes_on(words, tmp_path, monkeypatch, capsys):
    calls, measure = [], scoring.measure

    def stopped(*given):
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(scoring, "measure", stopped)
    chains = "--chains=w8a16 quantize@4"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(words, tmp_path / "out", "--bytes=40kB", chains)
    assert efflm_file.load(tmp_path / "out" / "model.safetensors")[0].params["embedding"].ndim == 2  # as it was
    whole = run(words, tmp_path / "out", "--bytes=40kB", chains)
    assert whole["best"]["name"] in ("w8a16", "quantize@4")
    assert len(calls) == 7 + 4 + 2 * 4 - 6  # each text once for each model
    with pytest.raises(SystemExit) as error:
        run(words, tmp_path / "out", "--bytes=1kB", chains)
    assert error.value.code == 2
    assert "bytes is 1kB, but the smallest candidate, quantize@4, takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "-1%"}, "loss is '-1%', but must not be negative"),
        ({"loss": "much"}, "loss is 'much', but must be a number"),
        ({"bytes": "0MB"}, "bytes is '0MB', but must be positive"),
        ({"loss": "1%", "bytes": "60MB"}, "loss and bytes are both given"),
        ({"bytes": "60MB", "target": "latency"}, "bytes goes with target=bytes"),
        ({"chains": "w9"}, "there is no step or recipe 'w9'"),
        ({"minutes": 0.0}, "minutes is 0.0"),
    ],
)
def test_bad_input_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        budget.Run(**fields)


def test_shares_and_bytes_as_they_are_written():
    assert budget.Run(loss="0.5%").allowed == budget.Run(loss="0.005").allowed == pytest.approx(0.005)
    assert budget.Run(bytes="60MB").most == budget.Run(bytes="0.06 GB").most == 60e6


def test_what_is_to_be_small(monkeypatch):
    model = tiny.model()
    (small, _) = recipe.apply(model, grammar.chain("w8a16"), Context(mesh=meshes.make_mesh()))
    of = lambda target, each: budget.cost_of(budget.Run(target=target, context_length=32), each, model)
    assert of("bytes", model) == trees.nbytes(model.params)
    cache = 2 * 2 * 2 * 8 * 32 * 4  # keys and values of two layers, two heads of 8, 32 positions, float32
    assert of("memory", model) == trees.nbytes(model.params) + cache
    assert cache < of("memory", small) < 0.5 * of("memory", model)
    rate = lambda *rounds: Rate(0.0, 0.0, 0.0, rounds)
    timing = throughput.protocol_for(model)
    rates = {"": (rate(64.0, 32.0), rate(16.0, 16.0)), budget.FIRST: (rate(32.0, 16.0), rate(8.0, 8.0))}
    monkeypatch.setattr(throughput, "rates", lambda models, timing: (rates, None))
    assert (timing.prompt, timing.new) == (64, 48)
    assert of("latency", small) == pytest.approx(0.5)
    assert of("latency", model) == 1.0
