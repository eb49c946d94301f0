"""The six functions of `import efflm`, as a careful and as a careless user calls them."""

import dataclasses
import json
from importlib import import_module

import jax
import numpy as np
import pytest

import efflm
from efflm import ops
from efflm.cli.flags import launch
from efflm.compress.finetune import Finetune
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import digest
from efflm.config.parallel import MeshConfig
from efflm.data import dataset
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import sources
from efflm.model import LanguageModel
from efflm.report.comparison import Limits
from efflm.report.rows import Row
from efflm.text import tokenizer as tokenizers
from experiments import evaluate
from tests import gguf_files

SHORT = {"documents": 3, "tokens": 24, "window": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", weights, kind="Q4_1")


@pytest.fixture(scope="module")
def loaded(source):
    return efflm.load(source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(70):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["the", "thing", "in", "tin", "ünd", "\n"], 60)))
    return folder


def same(one, other):
    return digest(one) == digest(other)


def test_load_takes_names_and_paths_and_knows_where_a_model_is_from(source, loaded, monkeypatch):
    model, tokenizer = loaded
    assert isinstance(model, LanguageModel)
    assert model.about == {"dequantized": "Q4_1", "token_ids": tokenizer.ids_digest}
    monkeypatch.setenv("HOME", str(source.parent))
    again, _ = efflm.load(f"~/{source.name}")
    assert same(again, model)
    half, _ = efflm.load(str(source), dtype="bfloat16")
    assert half.params["embedding"].dtype == "bfloat16"


def test_what_is_known_of_a_model_is_no_part_of_its_value(loaded):
    model, _ = loaded
    assert model.replace(masks=None).about == {}
    assert jax.tree.map(lambda leaf: leaf, model).about == {}
    assert jax.tree.structure(model) == jax.tree.structure(model.with_about({"other": 1}))


@pytest.mark.parametrize(
    ("steps", "name", "kinds"),
    [
        ("w8a8", "w8a8", ["Quantize"]),
        ("magnitude50, w8a16", "magnitude50+w8a16", ["Magnitude", "Quantize"]),
        (Magnitude(sparsity=0.25), "magnitude@0.25", ["Magnitude"]),
        (["magnitude24", Quantize()], "magnitude24+quantize", ["Magnitude", "Quantize"]),
    ],
)
def test_compress_takes_names_steps_and_both(loaded, steps, name, kinds):
    small = efflm.compress(loaded[0], steps)
    assert small.about["recipe"] == name
    assert small.about["dequantized"] == "Q4_1"
    assert [step["step"] for step in small.about["lineage"]] == kinds
    assert loaded[0].about.keys() == {"dequantized", "token_ids"}


def test_compress_takes_a_file_of_a_chain(loaded, tmp_path):
    (tmp_path / "chain.toml").write_text('small = "magnitude@0.5,quantize"\nother = "w8a8"')
    small = efflm.compress(loaded[0], f"{tmp_path / 'chain.toml'}:small")
    assert small.about["recipe"] == "small"
    assert same(small, efflm.compress(loaded[0], "magnitude50,w8a16"))
    with pytest.raises(efflm.InputError, match="is 2 chains"):
        efflm.compress(loaded[0], str(tmp_path / "chain.toml"))


def test_compressing_further_continues_the_lineage(loaded):
    twice = efflm.compress(efflm.compress(loaded[0], "magnitude50"), "w8a16")
    assert same(twice, efflm.compress(loaded[0], "magnitude50,w8a16"))
    assert [step["step"] for step in twice.about["lineage"]] == ["Magnitude", "Quantize"]
    assert twice.about["lineage"][0]["parent"] == digest(loaded[0])


def test_steps_that_train_are_given_text(loaded, folder):
    model, tokenizer = loaded
    step = Finetune(steps=2)
    trained = efflm.compress(model, step, text=folder, tokenizer=tokenizer, batch=2, length=16)
    assert trained.about["lineage"][0]["tokenizer"] == tokenizer.digest
    assert not same(trained, model)
    assert {device for leaf in jax.tree.leaves(trained) for device in leaf.devices()} == {jax.devices()[0]}
    assert same(trained, efflm.compress(model, [step], str(folder), tokenizer, batch=2, length=16))
    # What needs no text ignores it.
    assert same(efflm.compress(model, "w8a8", text=folder), efflm.compress(model, "w8a8"))


def test_training_keeps_the_masks_and_a_step_of_ones_own_gets_the_text(loaded, folder):
    model, tokenizer = loaded
    seen = []

    class Own(Magnitude):
        def __call__(self, model, context):
            seen.append(context.batches)
            return super().__call__(model, context)

    steps = [Own(sparsity=0.5), Finetune(steps=1)]
    trained = efflm.compress(model, steps, folder, tokenizer, batch=2, length=16)
    assert trained.about["recipe"] == "own@0.5+finetune[steps=1]"
    assert trained.masks
    efflm.compress(model, Own(sparsity=0.5), folder, tokenizer, batch=2, length=16)
    efflm.compress(model, Own(sparsity=0.5))
    assert [batches is not None for batches in seen] == [True, True, False]


def test_measure_gives_the_figures_and_the_table_of_the_command(source, loaded, folder, tmp_path, capsys):
    model, tokenizer = loaded
    small = efflm.compress(model, "magnitude50,w8a8")
    task = tmp_path / "nouns.jsonl"
    task.write_text('{"id": 1, "context": "the", "choices": [" tin", " thing"], "label": 1}\n' * 2)
    settings = SHORT | {"held_out": False, "speed": False, "tasks": task, "task_items": 1}
    found = efflm.measure({"dense": model, "small": small}, tokenizer, folder, **settings)
    assert [row.name for row in found] == ["dense", "small"]
    assert isinstance(found["small"], Row)
    assert found["small"] is found[1] is found.rows[1]
    with pytest.raises(KeyError, match="the rows are dense, small"):
        found["smal"]
    efflm.save(tmp_path / "small", small, tokenizer)
    flags = [f"--score.{name}={value}" for name, value in SHORT.items()]
    launch(evaluate.main, "", ["x", f"--model={tmp_path / 'small'}", f"--reference={source}", f"--text={folder}",
           f"--run_dir={tmp_path / 'out'}", f"--tasks={task}", "--task.items=1", *flags],
           run=evaluate.Run(), score=Scoring(), task=TaskFiles(), mesh=MeshConfig(data=1), limits=Limits())  # fmt: skip
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    row = next(row for row in results["rows"] if row["name"] == "small")
    for field in ("bits_per_byte", "bits_per_byte_stderr", "perplexity", "nonzeros", "precision"):
        assert row[field] == getattr(found["small"], field), field
    assert row["tasks"]["nouns"]["accuracies"] == found["small"].tasks["nouns"]["accuracies"]
    assert row["tasks"]["nouns"]["items"] == 1
    assert row["bytes"] == pytest.approx(found["small"].bytes, rel=0.01, abs=1 << 16)
    table = str(found)
    assert repr(found) == table
    assert results["protocol"][0].partition("; ")[0] in table
    noise, row = found["dense"].noise, results["rows"][0]
    assert 0 < noise["kl_to_original"] < found["small"].kl_to_original / 10
    assert row["noise"] == pytest.approx(noise)
    assert f"(rounding alone: {noise['kl_to_original']:.5f}" in " ".join(table.split())
    assert "Float rounding alone (the first model computed in bfloat16): divergence" in found.facts[0]
    done = "magnitude@0.5,quantize[activations=int8]; "
    for words in ("bits/byte", done, "multiplies its zeros too", "are dequantized Q4_1"):
        assert words in table
    assert ("tok/s" in shown, "tok/s" in table, "Speed:" in table) == (True, False, False)
    assert found["small"].prefill_tokens_per_second is None


def test_measure_takes_one_model_and_the_same_one_twice(loaded, folder):
    model, tokenizer = loaded
    alone = efflm.measure(model, tokenizer, str(folder), **SHORT, speed=False)
    twice = efflm.measure({"a": model, "b": model}, tokenizer, folder, **SHORT, speed=False)
    assert len(alone) == 1
    assert alone["model"].bits_per_byte == twice["a"].bits_per_byte == twice["b"].bits_per_byte
    whole = efflm.measure(model, tokenizer, folder, **SHORT, speed=False, held_out=False)
    assert "3 of 7 test documents" in alone.facts[0]
    assert "3 of 70 documents" in whole.facts[0]


def test_what_is_measured_is_not_what_compress_reads(loaded, folder, monkeypatch):
    (model, tokenizer), read, scored = loaded, [], []
    prepare, to_score = dataset.prepare, dataset.to_score
    monkeypatch.setattr(dataset, "prepare", lambda *a, **k: read.append(prepare(*a, **k)) or read[-1])
    monkeypatch.setattr(dataset, "to_score", lambda *a, **k: scored.append(to_score(*a, **k)) or scored[-1])
    efflm.compress(model, "wanda50", folder, tokenizer, calibration_rows=2, calibration_length=16)
    efflm.measure(model, tokenizer, folder, **SHORT, speed=False)
    trained_on = {name for name, _ in read[0].corpus.train}
    assert scored[0].parts
    assert not trained_on & {part.name for part in scored[0].parts}


def test_a_short_file_is_scored_whole_unless_a_model_has_read_it(loaded, tmp_path):
    (model, tokenizer), file = loaded, tmp_path / "short.txt"
    file.write_text("the thing in tin " * 60)
    assert "1 of" in efflm.measure(model, tokenizer, file, speed=False, tokens=0).facts[0].partition("documents")[0]
    small = efflm.compress(model, "wanda50", file, tokenizer, calibration_rows=2, calibration_length=16)
    assert "test documents" in efflm.measure(small, tokenizer, file, speed=False).facts[0]
    assert "test documents" not in efflm.measure(model, tokenizer, file, speed=False).facts[0]


def test_speed_is_measured_unless_it_is_not_asked_for(loaded, folder):
    found = efflm.measure(loaded[0], loaded[1], folder, **SHORT)
    assert found["model"].decode_tokens_per_second > 0
    assert "tok/s" in str(found)
    assert "Speed: batch 1" in found.facts[1]


def test_a_draft_may_have_the_same_tokens_in_another_file(loaded, tmp_path):
    model, tokenizer = loaded
    described = json.loads(tokenizer.core.to_str())
    described["normalizer"] = {"type": "NFC"}
    other = dataclasses.replace(tokenizer, core=tokenizers.from_description(described, "another file"))
    assert other.digest != tokenizer.digest
    efflm.save(tmp_path / "ours", model, tokenizer)
    efflm.save(tmp_path / "theirs", model, other)
    (ours, _), (theirs, _) = efflm.load(tmp_path / "ours"), efflm.load(tmp_path / "theirs")
    one = efflm.generate(ours, tokenizer, "the thing", max_tokens=4)
    assert efflm.generate(ours, tokenizer, "the thing", max_tokens=4, draft=theirs) == one


def test_generate_lays_a_model_out_once(loaded, monkeypatch):
    model, tokenizer = efflm.compress(loaded[0], "w8a8"), loaded[1]
    made, prepare = [], ops.prepare
    spy = lambda given, platform: made.append(given) or prepare(given, platform)
    monkeypatch.setattr(import_module("efflm.ops.prepare"), "prepare", spy)
    first = efflm.generate(model, tokenizer, "the thing", max_tokens=4)
    assert efflm.generate(model, tokenizer, "the thing", max_tokens=4, draft=model) == first
    assert [given is model for given in made] == [True]
    efflm.generate(model.replace(), tokenizer, "the thing", max_tokens=4)  # another value, to be laid out by itself
    assert len(made) == 2


def test_generate_goes_on_from_one_prompt_or_several(loaded):
    model, tokenizer = loaded
    one = efflm.generate(model, tokenizer, "the thing", max_tokens=8)
    assert isinstance(one, str)
    assert one
    assert efflm.generate(model, tokenizer, ["the thing", "in"], max_tokens=8)[0] == one
    stop = one[len(one) // 2]
    assert efflm.generate(model, tokenizer, "the thing", max_tokens=8, stop=stop) == one.partition(stop)[0]
    assert efflm.generate(model, tokenizer, "the thing", max_tokens=8, draft=model, ahead=2) == one
    known, foreign = (model.with_about({"tokenizer": name}) for name in ("ours", "theirs"))
    with pytest.raises(efflm.InputError, match="the draft's tokenizer is 'theirs', the model's 'ours'"):
        efflm.generate(known, tokenizer, "the thing", draft=foreign)
    with pytest.raises(efflm.InputError, match=r"ahead is 0\.5, but must be a positive whole number"):
        efflm.generate(model, tokenizer, "the thing", max_tokens=8, draft=model, ahead=0.5)
    drawn = [efflm.generate(model, tokenizer, "in", max_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_saved_is_loaded_again(loaded, tmp_path):
    model, tokenizer = loaded
    small = efflm.compress(model, "magnitude50,w8a8")
    folder = tmp_path / "new" / "small"
    assert efflm.save(str(folder), small, tokenizer) == folder / "model.safetensors"
    again, its_tokenizer = efflm.load(folder)
    assert same(again, small)
    assert its_tokenizer.digest == tokenizer.digest
    assert again.about["recipe"] == "magnitude50+w8a8"
    steps = again.about["lineage"]
    assert [step["step"] for step in steps] == ["Magnitude", "Quantize"]
    assert steps[-1]["actual_bytes"] == pytest.approx(steps[-1]["predicted_bytes"], rel=0.01)
    assert sources.load(tmp_path / "new" / "small").about == again.about
    file = efflm.save(tmp_path / "file.safetensors", again, its_tokenizer)
    assert efflm.load(file)[0].about == again.about
    coded = efflm.save(tmp_path / "coded", small, tokenizer, format="coded")
    assert same(efflm.load(coded)[0], small)
    assert coded.stat().st_size < file.stat().st_size
    efflm.save(tmp_path / "new" / "small", model, tokenizer)  # in place of the one before
    assert same(efflm.load(tmp_path / "new" / "small")[0], model)


def test_a_model_is_written_as_a_hugging_face_folder(loaded, tmp_path, capsys):
    (model, tokenizer), folder = loaded, tmp_path / "theirs"
    assert efflm.save(folder, model, tokenizer, format="huggingface") == folder / "model.safetensors"
    assert (folder / "config.json").exists()
    again, words = efflm.load(folder)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    text = "the thing in the tin 1 ünd 😀"
    assert words.encode(text) == tokenizer.encode(text)
    with pytest.raises(efflm.InputError, match="exists already"):  # never over what is there
        efflm.save(folder, model, tokenizer, format="huggingface")
    small = efflm.compress(model, "w8a8")
    efflm.save(tmp_path / "floats", small, tokenizer, format="huggingface")
    file = efflm.save(tmp_path / "int8", small, tokenizer, format="compressed-tensors")
    assert "embedding: written as float32, " in capsys.readouterr().err
    assert file.stat().st_size < (tmp_path / "floats" / "model.safetensors").stat().st_size
    rounded = efflm.load(tmp_path / "int8")[0].params["block_0"]["feedforward"]["up"]["kernel"]
    np.testing.assert_array_equal(rounded.values, small.params["block_0"]["feedforward"]["up"]["kernel"].values)


def careless(loaded, folder, tmp_path):
    """(call, what its error says)."""
    model, tokenizer = loaded
    return {
        "a number for a source": (lambda: efflm.load(5), "source is 5"),
        "nothing for a source": (lambda: efflm.load(""), "source is ''"),
        "no such model": (lambda: efflm.load("/nowhere"), "no model at /nowhere"),
        "no such precision": (lambda: efflm.load(folder, precision="int8"), "precision is 'int8'"),
        "no such dtype": (lambda: efflm.load(folder, dtype="int8"), "int8"),
        "both of what load returns": (lambda: efflm.compress(loaded, "w8a8"), "model, tokenizer = efflm.load"),
        "no steps": (lambda: efflm.compress(model), "steps is None: give a chain such as 'gptq@3,distill@0.5'"),
        "no step in the list": (lambda: efflm.compress(model, []), "there is no step: give a chain such as"),
        "no such recipe": (lambda: efflm.compress(model, "w8a9"), "there is no step or recipe 'w8a9': did you mean"),
        "a number for steps": (lambda: efflm.compress(model, 8), "steps is 8"),
        "a class for a step": (lambda: efflm.compress(model, Quantize), "class Quantize"),
        "tokenizer for text": (lambda: efflm.compress(model, Finetune(), tokenizer, tokenizer), "text is Tokenizer"),
        "training without text": (lambda: efflm.compress(model, "magnitude50_trained"), "which needs text: give text="),
        "training without tokenizer": (lambda: efflm.compress(model, Finetune(), folder), "but there is none"),
        "no such text": (lambda: efflm.compress(model, Finetune(), "/nowhere", tokenizer), "/nowhere does not exist"),
        "no batch": (lambda: efflm.compress(model, Finetune(), folder, tokenizer, batch=0), "batch is 0"),
        "a list of models": (lambda: efflm.measure([model], tokenizer, folder), "several by name"),
        "models by number": (lambda: efflm.measure({1: model}, tokenizer, folder), "several by name"),
        "a path among models": (lambda: efflm.measure({"a": "smollm2"}, tokenizer, folder), "model is 'smollm2'"),
        "tokenizer forgotten": (lambda: efflm.measure(model, str(folder)), "give tokenizer=tokenizer"),
        "model for tokenizer": (lambda: efflm.measure(model, model, folder), "tokenizer is LanguageModel"),
        "text forgotten": (lambda: efflm.measure(model, tokenizer), "measuring needs text: give a file or folder"),
        "a number for text": (lambda: efflm.measure(model, tokenizer, 7), "text is 7, but must be a file or folder"),
        "no such folder": (lambda: efflm.measure(model, tokenizer, "/nowhere"), "/nowhere does not exist"),
        "too long a window": (lambda: efflm.measure(model, tokenizer, folder, window=10**6), "window is 1000000"),
        "no tokenizer to generate": (lambda: efflm.generate(model, "the"), "tokenizer is 'the'"),
        "no prompt": (lambda: efflm.generate(model, tokenizer), "prompt is None"),
        "a number for a prompt": (lambda: efflm.generate(model, tokenizer, 3), "prompt is 3"),
        "no tokens": (lambda: efflm.generate(model, tokenizer, "the", max_tokens=0), "max_tokens is 0"),
        "half a token": (lambda: efflm.generate(model, tokenizer, "the", max_tokens=0.5), "max_tokens is 0.5"),
        "half a character": (lambda: efflm.generate(model, tokenizer, "a\ud83d"), "'\\ud83d' at character 1"),
        "half of one in a list": (lambda: efflm.generate(model, tokenizer, ["a", "\udc00"]), "prompt 1 has '\\udc00'"),
        "half of one to stop": (lambda: efflm.generate(model, tokenizer, "a", stop="\ud83d"), "stop has '\\ud83d'"),
        "half of one told": (lambda: efflm.generate(model, tokenizer, "a", system="\ud83d", chat=True), "system has"),
        "a number to stop": (lambda: efflm.generate(model, tokenizer, "a", stop=3), "stop is 3"),
        "none of it": (lambda: efflm.compress(model, "wanda50", folder, tokenizer, calibration_rows=0), "rows is 0"),
        "too much calibration": (lambda: efflm.compress(model, "wanda50", folder, tokenizer), "lower calibration_rows"),
        "no chat template": (lambda: efflm.generate(model, tokenizer, "the", chat=True), "no chat template"),
        "path and model swapped": (lambda: efflm.save(model, tmp_path / "x"), "path is LanguageModel"),
        "no model to save": (lambda: efflm.save(tmp_path / "x"), "model is None"),
        "no tokenizer to save": (lambda: efflm.save(tmp_path / "x", model), "saving needs the tokenizer"),
        "no such format": (lambda: efflm.save(tmp_path, model, tokenizer, format="x"), "format is 'x': choose efflm"),
        "a file for a folder": (lambda: efflm.save(folder / "0.txt", model, tokenizer), "cannot write"),
    }  # fmt: skip


def test_what_is_given_wrongly_is_told_in_one_line(loaded, folder, tmp_path):
    for name, (call, words) in careless(loaded, folder, tmp_path).items():
        with pytest.raises(efflm.InputError) as error:
            call()
        assert words in str(error.value), name
        assert "\n" not in str(error.value), name
        assert "--" not in str(error.value), name
    assert not list(tmp_path.iterdir())


def test_saving_replaces_no_other_model_and_no_others_tokenizer(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(efflm.InputError, match="holds another model"):
        efflm.save(tmp_path / "theirs", model, tokenizer)
    efflm.save(tmp_path / "a.safetensors", model, tokenizer)
    efflm.save(tmp_path / "b.safetensors", model, tokenizer)
    other = tokenizers.train(["some other text"], 257)
    with pytest.raises(efflm.InputError, match="whose tokenizer is another one"):
        efflm.save(tmp_path / "c.safetensors", model, other)
    narrower = model.replace(config=dataclasses.replace(model.config, vocabulary=tokenizer.vocabulary - 1))
    with pytest.raises(efflm.InputError, match="was loaded with this model"):
        efflm.save(tmp_path / "c.safetensors", narrower, tokenizer)
