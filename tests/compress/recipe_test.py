import dataclasses
import itertools

import numpy as np
import pytest
from safetensors import safe_open

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.adapt import Adapt
from efflm.compress.awq import AWQ
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.generated import Generated
from efflm.compress.gptq import GPTQ
from efflm.compress.gradual import Gradual
from efflm.compress.magnitude import Magnitude
from efflm.compress.mixed import Mixed
from efflm.compress.qat import QAT
from efflm.compress.quantize import Quantize, quantize
from efflm.compress.step import Context, digest, record
from efflm.compress.structured.depth import Depth, evenly_spaced, keep_layers
from efflm.compress.tuned import Tuned
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.parallel import meshes
from tests import tiny

CONFIG = tiny.LLAMA.config()
CONTEXT = Context(
    mesh=meshes.make_mesh(), batches=lambda step: tiny.batch(CONFIG, seed=step), calibration=tiny.batch(CONFIG)
)
ONE = dataclasses.replace(tiny.LLAMA, layers=1)
THREE = dataclasses.replace(tiny.LLAMA, layers=3)
STEPS = (Depth(layers=1), Magnitude(sparsity=0.5), Distill(steps=1), Quantize())


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::8])
def test_steps_chain_in_any_order(order):
    after, records = recipe.apply(tiny.model(), [STEPS[i] for i in order], CONTEXT)
    assert len(after.config.blocks) == 1
    assert ops.nonzeros(after.params) < 0.85 * trees.count(after.params)
    logits = tiny.logits(after, tiny.tokens(after.config, 1, 4))
    assert np.all(np.isfinite(logits))
    assert [record.step for record in records] == [type(STEPS[i]).__name__ for i in order]


def test_fields_are_overridden_only_where_the_step_is_in_the_chain():
    steps = recipe.override(
        grammar.chain("magnitude50_trained"), {Magnitude: {"sparsity": 0.25}, Finetune: {"steps": 3}}
    )
    assert (steps[0].sparsity, steps[1].steps) == (0.25, 3)
    assert recipe.override(grammar.chain("w8a8"), {Magnitude: {"sparsity": 0.25}}) == grammar.chain("w8a8")


def test_an_override_changes_one_step():
    for name, kind in (("w4a16", Quantize), ("gptq4", GPTQ), ("awq4", AWQ), ("qat4", QAT)):
        (step,) = recipe.override(grammar.chain(name), {kind: {"bits": 3}})
        assert (step.bits, step.embeddings) == (3, 8)
    for names, kind, fields in (
        ("magnitude50,magnitude70", Magnitude, {"sparsity": 0.3}),
        ("w4a16,w8a8", Quantize, {"bits": 3}),
        ("depth50_distill,shrink30_distill", Distill, {"steps": 3}),
        ("gptq4,gptq3", GPTQ, {"bits": 3}),
    ):
        with pytest.raises(InputError, match=rf"{kind.__name__} would change 2 steps .* by one recipe after the other"):
            recipe.override(grammar.chain(names), {kind: fields})
    assert recipe.override(grammar.chain("magnitude50,magnitude70"), {Magnitude: {}}) == grammar.chain(
        "magnitude50,magnitude70"
    )


def test_shrinking_keeps_evenly_spaced_layers_and_the_same_function_of_them():
    assert [evenly_spaced(6, k) for k in (1, 2, 3, 6)] == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]
    model = tiny.model(THREE)
    small = keep_layers(model, [0, 2])
    for name in ("attention", "feedforward"):
        pair = small.params["block_1"][name], model.params["block_2"][name]
        assert pair[0] is pair[1]
    assert small.config.blocks == model.config.blocks[:2]
    same = keep_layers(model, [0, 1, 2])
    tokens = tiny.tokens(model.config, 1, 5)
    np.testing.assert_array_equal(tiny.logits(same, tokens), tiny.logits(model, tokens))


def test_too_many_layers_are_refused():
    with pytest.raises(InputError, match=r"depth\.layers is 3, but the model has 2"):
        Depth(layers=3)(tiny.model(), CONTEXT)


def of_new_kinds() -> list[str]:
    """Recipes with a kind of step that no earlier one has; what two kinds do together is in pairs_test.py."""
    seen: set[type] = set()
    found = []
    for name in recipe.RECIPES:
        kinds = {*map(type, grammar.chain(name))}
        if not kinds <= seen:
            found.append(name)
        seen |= kinds
    return found


@pytest.mark.parametrize("names", [of_new_kinds(), tiny.combination(sorted({*recipe.RECIPES} - {*of_new_kinds()}))])
def test_every_named_recipe_is_stored_as_predicted_and_read_back_as_it_was(tmp_path, names):
    short = {kind: {"steps": 1} for kind in (Finetune, Distill, QAT, Tuned, Adapt)}
    short |= {Mixed: {"rows": 2, "groups": "32"}}
    short |= {Gradual: {"steps": 3, "every": 1}, Generated: {"steps": 1, "prompt": 4, "new": 4}}
    tokens = tiny.tokens(CONFIG, 2, 8)
    for name in names:
        steps = grammar.chain(name)
        model = tiny.model(tiny.LLAMA if Depth in map(type, steps) else ONE)
        after, records = recipe.apply(model, recipe.override(steps, short), CONTEXT)
        assert records[-1].predicted_bytes == ops.stored_nbytes(after.params, after.masks), name
        assert records[-1].leaves, name
        file = tmp_path / f"{name}.safetensors"
        size = efflm_file.save(file, after, {}, records)
        assert size == file.stat().st_size, name
        assert abs(size - records[-1].predicted_bytes) <= 0.01 * size + 65536, name
        with safe_open(file, "numpy") as stored:
            floats = [key for key in sorted(stored.keys()) if stored.get_slice(key).get_dtype() in ("F32", "BF16")]
        if any(isinstance(leaf, ops.QArray) for _, leaf in trees.flatten(after.params)):
            # Of a quantized matrix no float original is in the file, only its scales.
            matrices = {path for path, leaf in trees.flatten(after.params) if isinstance(leaf, ops.QArray)}
            assert {key for key in floats if key in matrices} == set(), name
        again = efflm_file.load(file)[0]
        np.testing.assert_array_equal(tiny.logits(again, tokens), tiny.logits(after, tokens), err_msg=name)


def test_masks_of_weights_that_are_not_there_are_refused():
    model = tiny.model()
    kept = np.ones((32, 32), bool)
    with pytest.raises(InputError, match="masks names block_7/attention/query/kernel, which the model does not have"):
        recipe.apply(model.replace(masks={"block_7/attention/query/kernel": kept}), (Quantize(),), CONTEXT)
    with pytest.raises(InputError, match=r"the mask of block_0/feedforward/up/kernel has shape \(32, 32\), the weight"):
        recipe.apply(model.replace(masks={"block_0/feedforward/up/kernel": kept}), (Quantize(),), CONTEXT)


def test_a_step_that_changes_only_the_config_is_a_change():
    model = tiny.model()
    longer = dataclasses.replace(model.config, max_length=128)
    done = record(Quantize(), model, model.replace(config=longer), CONTEXT)
    assert done.leaves == ()
    with pytest.raises(InputError, match="changed nothing"):
        record(Quantize(), model, model, CONTEXT)


def test_records_name_text_and_the_model_before():
    context = dataclasses.replace(CONTEXT, corpus="text", tokenizer="tokens", seed=7)
    after, (pruned, trained) = recipe.apply(tiny.model(), (Magnitude(sparsity=0.5), Finetune(steps=1)), context)
    assert (pruned.corpus, trained.corpus, trained.tokenizer, trained.seed) == ("", "text", "tokens", 7)
    assert pruned.parent == digest(tiny.model()) != trained.parent != digest(after)
    assert trained.settings == {"steps": 1, "learning_rate": 2e-3}


def test_weights_that_are_not_finite_are_not_compressed():
    """Not as they come, and not as the scales of weights that are quantized already."""
    model = tiny.model()
    kernel = model.params["block_1"]["feedforward"]["up"]
    kernel["kernel"] = kernel["kernel"].at[3, 4].set(np.nan)
    with pytest.raises(InputError, match=r"^1 of the numbers in block_1/feedforward/up/kernel is infinite or NaN"):
        recipe.apply(model, (Quantize(),), CONTEXT)
    model = tiny.model()
    model = model.replace(params=quantize(model.params, "int8"))
    kernel = model.params["block_0"]["attention"]["key"]
    kernel["kernel"] = kernel["kernel"].replace(scale=kernel["kernel"].scale.at[0, 1:].set(np.inf))
    with pytest.raises(InputError, match=r"^15 of the numbers in block_0/attention/key/kernel/scale are infinite"):
        recipe.apply(model, (Magnitude(sparsity=0.5),), CONTEXT)


def test_a_step_that_rounds_again_says_so(capsys):
    quantized, _ = recipe.apply(tiny.model(), (Quantize(),), CONTEXT)
    three, _ = recipe.apply(tiny.model(THREE), (Quantize(),), CONTEXT)
    recipe.apply(three, (Depth(layers=2),), CONTEXT)
    assert capsys.readouterr().err == ""
    recipe.apply(quantized, (Distill(steps=1),), dataclasses.replace(CONTEXT, teacher=tiny.model(seed=1)))
    told = capsys.readouterr().err
    assert "warning: Distill changed 15 matrices that were quantized already: it worked on their dequantized" in told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interrupted:
    """A step that the user stops."""

    number: int = 0

    def __call__(self, model, context):
        raise KeyboardInterrupt


def test_an_interrupted_chain_goes_on_with_the_step_it_was_in(monkeypatch):
    model, first, files = tiny.model(), (Magnitude(sparsity=0.5), Distill(steps=1)), []
    kept = recipe.Kept(lambda *made: files.append(made), lambda: files[-1] if files else None)
    with pytest.raises(KeyboardInterrupt):
        recipe.apply(model, (*first, Interrupted()), CONTEXT, kept)
    assert [len(records) for _, records, _ in files] == [1, 2]

    whole, records = recipe.apply(model, (*first, Quantize()), CONTEXT)
    monkeypatch.setattr(Magnitude, "__call__", None)
    monkeypatch.setattr(Distill, "__call__", None)
    resumed, same = recipe.apply(model, (*first, Quantize()), CONTEXT, kept)
    assert digest(resumed) == digest(whole)
    assert same == records
    assert len(files) == 2  # what the last step makes is for the caller to keep

    other_text = dataclasses.replace(CONTEXT, batches=lambda step: tiny.batch(CONFIG, seed=step + 9))
    for change in (
        (tiny.model(seed=5), first, CONTEXT),
        (model, (Magnitude(sparsity=0.25), first[1]), CONTEXT),
        (model, first, dataclasses.replace(CONTEXT, seed=1)),
        (model, first, dataclasses.replace(CONTEXT, teacher=tiny.model(seed=5))),
        (model, first, dataclasses.replace(CONTEXT, calibration=tiny.batch(CONFIG, seed=3))),
        (model, first, other_text),
    ):
        with pytest.raises(TypeError, match="not callable"):  # it begins anew
            recipe.apply(change[0], (*change[1], Quantize()), change[2], kept)
