"""The experiments from their flags to their files, on models small enough for a test."""

import dataclasses
import fcntl
import html
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

import efflm
from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.compress import grammar, recipe
from efflm.compress.distill import Distill
from efflm.compress.quantize import Quantize
from efflm.compress.step import Calibration
from efflm.config.model import ModelShape
from efflm.config.parallel import MeshConfig
from efflm.config.train import Optimizer, TrainConfig
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import checkpoint
from efflm.parallel import meshes
from efflm.report import samples
from efflm.report.comparison import Limits
from efflm.train import aot, trainer
from efflm.train.checkpointing import Checkpointing, TrainingRun
from experiments import compress, evaluate, pretrain, quickstart
from tests import tiny

TINY = [  # seven rows are for one device, whose programs later runs of the tests find compiled
    "--model.layers=2", "--model.width=32", "--model.mlp_dim=48", "--model.vocabulary=300", "--model.max_length=64",
    "--train.steps=6", "--train.warmup=2", "--train.length=16", "--train.batch=7", "--train.log_every=2",
]  # fmt: skip
ON_EIGHT = [*TINY, "--train.batch=8"]
NAMES = [
    "float32", "bfloat16", "w8a16", "w8a8", "w4a16", "gptq4", "magnitude50", "magnitude24", "magnitude50_trained",
    "magnitude70", "sparsegpt70", "student_scratch", "student_distilled", "shrink_distill_int8",
]  # fmt: skip
FIELDS = {
    "name", "parameters", "nonzeros", "bytes", "bits_a_weight", "prefill_tokens_per_second", "decode_tokens_per_second",
    "bits_per_byte", "bits_per_byte_stderr", "kl_to_original", "top1_agreement", "note",
}  # fmt: skip


def run(module, *argv):
    groups = {
        quickstart: {
            "run": quickstart.RUN, "model": ModelShape(), "train": TrainConfig(), "score": Scoring(),
            "limits": Limits(),
        },
        pretrain: {
            "run": pretrain.Run(), "model": ModelShape(), "train": TrainConfig(), "score": Scoring(),
            "mesh": MeshConfig(),
        },
        compress: {
            "run": compress.Run(), "calibration": Calibration(), "score": Scoring(), "task": TaskFiles(),
            "limits": Limits(), **recipe.STEPS,
        },
        evaluate: {
            "run": evaluate.Run(), "score": Scoring(), "task": TaskFiles(), "mesh": MeshConfig(data=1),
            "limits": Limits(),
        },
    }[module]  # fmt: skip
    launch(module.main, module.__doc__, ["x", *argv], **groups)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "for", "while", "return", "(", ")", "\n"]
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 200)))
    return folder


@pytest.fixture(scope="module")
def short_recipes():
    """Every named recipe with few training steps."""
    kept = dict(recipe.RECIPES)
    few = {"steps": 3, "every": 1}
    fewer = lambda step: dataclasses.replace(step, **{field: few[field] for field in few if hasattr(step, field)})
    recipe.RECIPES.update({name: grammar.write(map(fewer, grammar.chain(name))) for name in kept})
    yield
    recipe.RECIPES.update(kept)


@pytest.fixture(scope="module")
def trained(corpus, short_recipes, tmp_path_factory):
    """A run directory with a finished quickstart in it."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    run(quickstart, f"--run_dir={folder}", f"--corpus={corpus}", *TINY)
    return folder


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_quickstart_leaves_the_whole_evidence(trained):
    rows = rows_of(trained)
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert set(row) >= FIELDS
        assert row["bytes"] == (trained / "models" / f"{row['name']}.safetensors").stat().st_size
        assert row["prefill_tokens_per_second"] > 0
    by = {row["name"]: row for row in rows}
    assert by["float32"]["kl_to_original"] is None  # the reference
    for row in rows:
        written = sum(row["component_bytes"].values())
        assert row["bytes"] - 5000 - 70 * 40 < written < row["bytes"], row["name"]
    assert by["w8a16"]["bytes"] < 0.5 * by["float32"]["bytes"]
    assert by["magnitude50"]["nonzeros"] == by["magnitude24"]["nonzeros"] == by["magnitude50_trained"]["nonzeros"]
    assert by["student_scratch"]["parameters"] < by["float32"]["parameters"]
    for name in ("magnitude50", "magnitude24"):
        assert "no faster" in by[name]["note"]
    for name in ("report.html", "metrics.jsonl", "tokenizer.json", "checkpoint/6"):
        assert (trained / name).exists(), name
    assert [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]


def written_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_space_asked_for_is_that_of_the_files(trained, tmp_path, monkeypatch):
    """Of a whole run, which is small, and of the checkpoints of one that is larger."""
    asked = []
    monkeypatch.setattr(run_directory, "require_writable", lambda path, needs: asked.append(needs))
    shape = ModelShape(layers=2, width=32, mlp_dim=48, vocabulary=300, max_length=64)
    train = TrainConfig(steps=6, length=16)
    config = pretrain.saved_config(shape, train)
    pretrain.check(pretrain.Run(), config, train, models=quickstart.MODELS)
    assert written_in(trained) < asked[-1] < 2.5 * written_in(trained) + 4e6

    config = pretrain.saved_config(ModelShape(layers=2, width=128, mlp_dim=352), train)
    for name in get_args(Optimizer):
        train = TrainConfig(steps=10, optimizer=name, policy="bfloat16_pure" if name == "lion" else "float32")
        run = pretrain.Run(run_dir=str(tmp_path / name), checkpoint_every=3)
        rng = np.random.default_rng(0)
        noise = lambda x, rng=rng: (rng.standard_normal(x.shape) * 100).astype(x.dtype)
        state = jax.device_put(jax.tree.map(noise, aot.training_step(config, train, meshes.make_mesh())[1][0]))
        with TrainingRun(dataclasses.replace(run.checkpointing({}), keep=9)) as saved:
            for step in (3, 6, 9):  # two that are kept, and the one being written
                saved.save(step, state)
        pretrain.check(run, config, train, models=0)
        assert 1 < asked[-1] / written_in(tmp_path / name) < 2.5, name


@pytest.mark.parametrize(
    ("policy", "steps", "most"),
    [({}, 10, 1), ({"every": 3}, 10, 3), ({"every": 3}, 4, 2), ({"every": 3, "keep": 1}, 10, 2),
     ({"every": 2, "keep": 1, "keep_period": 4}, 16, 6), ({"every": 1, "keep": 1}, 10**12, 2)],
)  # fmt: skip
def test_the_checkpoints_on_disk_at_once_are_known_before(policy, steps, most):
    assert Checkpointing(directory=Path("x"), **policy).most(steps) == most


def test_a_second_run_in_the_same_directory_is_refused(trained, corpus, capsys):
    with run_directory.held(trained):
        lock = json.loads((trained / run_directory.LOCK).read_text())
    (trained / run_directory.LOCK).write_text(json.dumps(lock | {"pid": 4711}))
    with (trained / run_directory.LOCK).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for module, flags in ((quickstart, TINY), (pretrain, TINY), (compress, [f"--model={trained}"])):
            with pytest.raises(SystemExit) as stopped:
                run(module, f"--run_dir={trained}", *flags, *([f"--corpus={corpus}"] if module != compress else []))
            assert stopped.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "process 4711" in line
    (trained / run_directory.LOCK).unlink()


def test_a_second_quickstart_reuses_the_checkpoint_and_agrees(trained, corpus, capsys):
    before = rows_of(trained)
    run(quickstart, f"--run_dir={trained}", f"--corpus={corpus}", *TINY)
    assert "not training again" in capsys.readouterr().out
    timed = {name for name in before[0] if name.startswith(("prefill", "decode")) or name == "note"}
    for old, new in zip(before, rows_of(trained), strict=True):
        assert {k: v for k, v in old.items() if k not in timed} == {k: v for k, v in new.items() if k not in timed}


def test_a_fresh_run_with_the_same_seed_gives_the_same_model(trained, corpus, tmp_path):
    run(pretrain, f"--run_dir={tmp_path / 'again'}", f"--corpus={corpus}", *TINY)
    losses = lambda folder: [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses(tmp_path / "again") == losses(trained)
    run(pretrain, f"--run_dir={tmp_path / 'other'}", f"--corpus={corpus}", "--seed=1", *TINY)
    assert losses(tmp_path / "other") != losses(trained)


def test_a_stopped_run_goes_on_by_the_same_command(corpus, tmp_path, monkeypatch, capsys):
    flags = [f"--corpus={corpus}", *TINY, "--checkpoint_every=2", "--train.log_every=1"]
    metrics = lambda name: [
        tiny.repeatable(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    run(pretrain, f"--run_dir={tmp_path / 'calm'}", *flags)
    calm, placed = capsys.readouterr().out.splitlines()[-2], []
    with monkeypatch.context() as patched:
        place = trainer.place
        told = lambda batch, mesh: (placed.append(0), len(placed) == 3 and os.kill(os.getpid(), signal.SIGTERM))
        patched.setattr(trainer, "place", lambda batch, mesh: told(batch, mesh) and place(batch, mesh))
        run(pretrain, f"--run_dir={tmp_path / 'stopped'}", *flags)  # no SystemExit: exit code 0
    assert "stopped at step 3 of 6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(pretrain, f"--run_dir={tmp_path / 'stopped'}", *flags, "--train.clip=2")
    assert "train.clip=1.0, but this run asks for 2.0" in capsys.readouterr().err
    run(pretrain, f"--run_dir={tmp_path / 'stopped'}", *flags, "--train.on_nan=skip")
    out = capsys.readouterr().out
    assert "going on from step 3 of 6" in out
    assert out.splitlines()[-2] == calm
    without_skipped = lambda lines: [{key: line[key] for key in line if key != "skipped"} for line in lines]
    for stopped, undisturbed in zip(without_skipped(metrics("stopped")), metrics("calm"), strict=True):
        # train.on_nan=skip is another program, which may round differently.
        assert stopped == pytest.approx(undisturbed, rel=1e-6)
    assert list((tmp_path / "stopped" / "tensorboard").glob("events*"))


def test_auto_is_settled_once_and_what_it_picked_is_recorded(corpus, tmp_path, auto_picks, capsys):
    flags = [f"--run_dir={tmp_path / 'run'}", f"--corpus={corpus}", *TINY, "--train.policy=auto"]
    auto_picks("bfloat16")
    run(pretrain, *flags)
    assert "train.policy auto: bfloat16; the matmuls of a training step are 2.00x" in capsys.readouterr().out
    for kept in ("checkpoint", "state"):
        assert checkpoint.recorded(tmp_path / "run" / kept)["train.policy"] == "bfloat16"
    auto_picks("float32")
    run(pretrain, *flags)
    out = capsys.readouterr().out
    assert "train.policy auto: bfloat16, which this run began with" in out
    assert "not training again" in out
    settled = lambda: pretrain.settled(
        pretrain.Run(run_dir=str(tmp_path / "run")), tiny.LLAMA.config(), TrainConfig(policy="auto")
    )
    shutil.rmtree(tmp_path / "run" / "checkpoint")  # a run that was stopped
    assert settled().policy == "bfloat16"
    for about in (tmp_path / "run" / "state").glob("*/about.json"):
        about.write_text("{")
    assert settled().policy == "float32"


def test_init_from_starts_where_another_run_ended(trained, corpus, tmp_path):
    run(pretrain, f"--run_dir={tmp_path / 'next'}", f"--corpus={corpus}", f"--init_from={trained}", *TINY)
    first = lambda folder: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first(tmp_path / "next") < first(trained)


@pytest.mark.parametrize("family", tiny.and_combinations(["llama", "gpt2"], ["gpt2"]))
def test_scanned_pretraining_leaves_an_unstacked_checkpoint(corpus, tmp_path, family, capsys):
    flags = [f"--corpus={corpus}", *ON_EIGHT, f"--model.family={family}", "--train.scan", "--train.policy=bfloat16"]
    run(pretrain, f"--run_dir={tmp_path / 'run'}", *flags)
    run(evaluate, f"--model={tmp_path / 'run'}", "--score.window=16", f"--run_dir={tmp_path / 'out'}")
    assert rows_of(tmp_path / "out")[0]["top1_agreement"] is None  # nothing to compare with
    assert "bits per byte" in capsys.readouterr().out


def test_compress_and_evaluate_a_trained_run(trained, tmp_path, monkeypatch, capsys):
    out, asked, require = tmp_path / "out", [], run_directory.require_writable
    monkeypatch.setattr(
        run_directory, "require_writable", lambda path, needs: asked.append(needs) or require(path, needs)
    )
    begun, write = [], samples.write
    monkeypatch.setattr(samples, "write", lambda *given: begun.append(given[2]) or write(*given))
    items = [{"id": i, "context": f"The {i}", "choices": [" river", " sky"], "label": i % 2} for i in range(3)]
    (tmp_path / "nouns.jsonl").write_text("\n".join(map(json.dumps, items)))
    flags = ["--score.window=16", "--tasks=nouns", f"--task.folder={tmp_path}"]
    run(compress, f"--model={trained}", "--recipe=magnitude50,w8a8", "--magnitude.sparsity=0.25", *flags, "--sample=4",
        "--format=coded", f"--run_dir={out}")  # fmt: skip
    before, after = rows_of(out)
    tokenizer = efflm.load(trained)[1]
    assert begun == [[tokenizer.separator, *tokenizer.encode("The capital of France is")]] * 2  # as the text it read
    assert written_in(out) < asked[-1] < 2.5 * written_in(out) + 4e6
    assert after["name"] == "magnitude@0.25+quantize[activations=int8]"  # another file than that of the recipe itself
    assert (
        f"Size: a safetensors file, uncompressed, but entropy-coded of {after['name']};"
        in (out / "results.json").read_text()
    )
    assert after["bits_a_weight"] == 8 * after["bytes"] / after["parameters"]
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert before["nonzeros"] - after["nonzeros"] >= layers // 4
    run(evaluate, f"--model={out / after['name']}.safetensors", f"--reference={trained}", *flags,
        f"--run_dir={tmp_path / 'seen'}")  # fmt: skip
    reference, seen = rows_of(tmp_path / "seen")
    assert reference["bits_per_byte"] == before["bits_per_byte"]
    for field in ("bits_per_byte", "kl_to_original", "top1_agreement_stderr", "perplexity", "nonzeros", "bytes"):
        assert seen[field] == after[field], field
    assert (seen["tasks"]["nouns"], reference["tasks"]) == (after["tasks"]["nouns"], before["tasks"])
    assert (after["tasks"]["nouns"]["items"], before["tasks"]["nouns"]["changed"]) == (3, None)
    assert "Tasks: nouns, 3 items, multiple choice. " in (out / "results.json").read_text()
    with pytest.raises(SystemExit):
        run(evaluate, f"--model={trained}", "--tasks=nouns,verbs", f"--task.folder={tmp_path}")
    assert f"there is no task 'verbs' in {tmp_path}: there are nouns" in capsys.readouterr().err


def test_any_number_of_models_in_one_report(trained, tmp_path, capsys):
    """Such as other tools made: here compressed-tensors and floats of one model, which are measured alike."""
    model, tokenizer = efflm.load(trained)
    small = efflm.compress(model, "quantize[bits=4,group=16,embeddings=0]")
    for format in ("compressed-tensors", "huggingface"):
        efflm.save(tmp_path / f"their {format}", small, tokenizer, format=format)
    models = f"{trained} '{tmp_path / 'their compressed-tensors'}' '{tmp_path / 'their huggingface'}'"
    flags = ["--score.window=16", "--score.documents=4", f"--corpus={model.about['source']}"]
    run(evaluate, f"--models={models}", *flags, f"--run_dir={tmp_path / 'out'}")
    first, packed, floats = rows_of(tmp_path / "out")
    assert [packed["name"], floats["name"]] == ["their compressed-tensors", "their huggingface"]
    assert first["kl_to_original"] is None
    assert packed["bits_per_byte"] == pytest.approx(floats["bits_per_byte"], rel=1e-6) != first["bits_per_byte"]
    assert packed["nonzeros"] == floats["nonzeros"] < first["nonzeros"]
    assert packed["bytes"] < floats["bytes"]
    with pytest.raises(SystemExit):
        run(evaluate, f"--models={models}", f"--reference={trained}")
    assert "of --models the first is the reference" in capsys.readouterr().err


def test_several_recipes_in_one_report(trained, corpus, tmp_path):
    """Those that train read the corpus of the model's own run; what is scored is the text given."""
    out, text = tmp_path / "out", tmp_path / "text"
    text.mkdir()
    for i in range(3):
        (text / f"{i}.txt").write_text((corpus / f"{i}.txt").read_text())
    run(compress, f"--model={trained}", "--recipe=w8a16 magnitude24 student_scratch", "--depth.layers=1",
        f"--text={text}", "--score.window=32", "--score.stride=8", "--batch=7", "--length=16", "--sample=4",
        f"--run_dir={out}")  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    names = ["w8a16", "magnitude24", "depth[layers=1,init=random]+finetune[steps=3]"]
    assert [row["name"] for row in results["rows"]] == ["before", *names]
    before, w8a16, magnitude24, student = results["rows"]
    assert 0 < w8a16["kl_to_original"] < magnitude24["kl_to_original"] < student["kl_to_original"]
    assert before["top1_agreement"] is None
    assert student["parameters"] < before["parameters"]
    quality = results["protocol"][0]
    assert "windows of 32 tokens, 8 apart" in quality
    assert str(text) in quality
    assert set(results["samples"]) == {row["name"] for row in results["rows"]}
    prompt = "The capital of France is"
    assert results["samples"]["before"] == prompt + efflm.generate(*efflm.load(trained), prompt, max_tokens=4)
    assert set(results["records"]) == set(names)
    page = (out / "report.html").read_text()
    assert "windows of 32 tokens" in page
    assert "of the original's loss" in html.unescape(page)
    assert page.count('class="detail"') == 4
    assert "training loss" in page  # of the student
    assert "--recipe=depth[layers=1,init=random],finetune[steps=3]" in html.unescape(page).replace("'", "")
    for row in results["rows"]:
        assert row["bytes"] == (out / f"{row['name']}.safetensors").stat().st_size
    with pytest.raises(SystemExit):  # one of several recipes cannot be: nothing is left behind
        run(compress, f"--model={trained}", "--recipe=student_scratch", f"--run_dir={tmp_path / 'not'}",
            "--depth.layers=9", "--length=16")  # fmt: skip
    assert not (tmp_path / "not").exists()


def test_a_stopped_compression_goes_on_by_the_same_command(trained, tmp_path, monkeypatch, capsys):
    flags = [f"--model={trained}", "--recipe=shrink_distill_int8", "--batch=7", "--length=16", "--score.window=32",
             "--prompt="]  # fmt: skip
    run(compress, *flags, f"--run_dir={tmp_path / 'whole'}")
    whole = rows_of(tmp_path / "whole")[1]
    quantize, out = Quantize.__call__, tmp_path / "out"

    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Quantize, "__call__", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(compress, *flags, f"--run_dir={out}")
    monkeypatch.setattr(Quantize, "__call__", quantize)
    monkeypatch.setattr(Distill, "__call__", stopped)
    capsys.readouterr()
    run(compress, *flags, f"--run_dir={out}")
    assert "the model after Depth, then Distill: kept by an earlier run" in capsys.readouterr().out
    assert rows_of(out)[1]["bits_per_byte"] == whole["bits_per_byte"]
    records = json.loads((out / "results.json").read_text())["records"]["shrink_distill_int8"]
    assert [each["step"] for each in records] == ["Depth", "Distill", "Quantize"]
    assert not list(out.glob("*.unfinished*"))


def test_files_that_are_not_text_are_left_out_or_with_strict_refused(trained, corpus, tmp_path, capsys):
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    (text / "picture.png").write_bytes(b"\x89PNG\0")
    (text / "latin.txt").write_bytes(b"caf\xe9")
    flags = [f"--model={trained}", f"--text={text}", "--score.window=16", "--score.documents=2"]
    run(evaluate, *flags, f"--run_dir={tmp_path / 'out'}")
    words = "2 of 82 files left out, which are not UTF-8 text: latin.txt, picture.png"
    assert capsys.readouterr().out.startswith(words)
    assert words in json.loads((tmp_path / "out" / "results.json").read_text())["protocol"][0]
    trains = [f"--run_dir={tmp_path / 'new'}", f"--corpus={text}", *ON_EIGHT]
    for module, given in (
        (evaluate, flags),
        (compress, [*flags, f"--run_dir={tmp_path / 'new'}"]),
        (pretrain, trains),
        (quickstart, trains),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(module, *given, "--strict")
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "latin.txt is not UTF-8 (byte 0xe9 at offset 3); picture.png is binary" in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_model_on_a_mesh_is_measured_the_same(trained, tmp_path):
    def measured(name, *flags):
        run(
            evaluate,
            f"--model={trained}",
            "--score.window=16",
            "--score.documents=4",
            f"--run_dir={tmp_path / name}",
            *flags,
        )
        return rows_of(tmp_path / name)[0]

    one, spread = measured("one"), measured("spread", "--mesh.fsdp=2", "--mesh.tensor=2")
    assert spread["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    assert spread["nonzeros"] == one["nonzeros"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus=/nowhere"], "corpus /nowhere does not exist"),
        (["--model.width=30"], "width 30 is not divisible by model.heads 4"),
        (["--nonsense=1"], "unknown flag --nonsense"),
        (["--train.length=100"], "train.length 100 is longer than model.max_length 64"),
        (["--train.batch=400000"], "too small"),
        (["--profile_steps=3"], "give two step numbers"),
        (["--profile_steps=3,10"], "beyond the last step"),
        (["--init_from=/nowhere"], "no checkpoint in /nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(quickstart, f"--run_dir={tmp_path / 'runs' / 'q'}", f"--corpus={corpus}", *TINY, *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "q").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.layers=3"], "made with"),
        (["--seed=5"], "made with seed=0, but this run asks for 5"),
        (["--train.learning_rate=1"], "made with train.learning_rate=0.002"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(trained, corpus, capsys, flags, message):
    before = (trained / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as stopped:
        run(quickstart, f"--run_dir={trained}", f"--corpus={corpus}", *TINY, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe=w3a3"], "no step or recipe 'w3a3'"),
        (["--recipe=magnitude50", "--magnitude.sparsity=1.0"], "sparsity is 1.0"),
        (["--recipe=w8a8", "--magnitude.sparsity=0.3"], "not in this recipe"),
        (["--recipe=w8a8 magnitude50", "--distill.steps=3"], "steps set for Distill, which is not in this recipe"),
        (["--recipe= "], "recipe is ' '"),
        (["--model=/nowhere"], "no model at /nowhere"),
        (["--text=/nowhere"], "/nowhere does not exist"),
        (["--score.window=65"], "window is 65, but the model's max_length is 64"),
        (["--score.window=16", "--score.stride=17"], "stride is 17"),
    ],
)
def test_bad_recipes_are_refused(trained, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(compress, f"--model={trained}", f"--run_dir={tmp_path / 'out'}", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_from_main_to_the_first_matmul_of_a_step_are_at_most_twelve_calls(corpus, tmp_path, monkeypatch):
    """The functions of ours on the stack, but for comprehensions: what someone reads who follows a step."""

    class Reached(Exception):
        pass

    def reached(*given, dot_general=jax.lax.dot_general, **named):
        ours, frame = [], sys._getframe(1)
        while frame.f_code is not pretrain.main.__wrapped__.__code__:
            if re.search("/(efflm|experiments)/", frame.f_code.co_filename) and "comp>" not in frame.f_code.co_name:
                ours.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        if any(name.startswith("step.make_step") for name in ours):
            raise Reached(ours)
        return dot_general(*given, **named)

    monkeypatch.setattr(jax.lax, "dot_general", reached)
    shape, train = ModelShape(layers=1, width=32, mlp_dim=48, vocabulary=300, max_length=64), TrainConfig(length=16)
    with pytest.raises(Reached) as end:
        pretrain.main(
            pretrain.Run(run_dir=str(tmp_path), corpus=str(corpus)), shape, train, score=Scoring(), mesh=MeshConfig()
        )
    assert len(end.value.args[0]) <= 12, end.value.args[0]
