import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import recipe
from efflm.compress.awq import AWQ
from efflm.compress.gptq import GPTQ
from efflm.compress.mixed import Mixed
from efflm.compress.plan import EMBEDDINGS, LAYERS, Plan, nearest, plan_of
from efflm.compress.qat import QAT
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.tuned import Tuned
from efflm.config import InputError
from efflm.ops import Format
from efflm.parallel import meshes
from tests import tiny

CONTEXT = Context(
    mesh=meshes.make_mesh(),
    batches=lambda step: tiny.batch(tiny.LLAMA.config(), seed=step),
    calibration=tiny.batch(tiny.LLAMA.config()),
)
RULES = Plan(
    (
        (r"block_1/.*/(up|down)/kernel", None),
        (r".*/down/kernel", Format(bits=8)),
        (LAYERS, Format(bits=3, group=8)),
        (r"block_0/.*", Format(bits=4)),
        (EMBEDDINGS, Format(bits=4, group=16)),
    )
)


def bits_of(model):
    return {path: getattr(w, "bits", None) for path, w in trees.flatten(model.params) if w.ndim == 2}


def wanted(path):
    """The bits of RULES, of which the first that fits counts."""
    if path == "embedding":
        return 4
    if path.startswith("block_1") and path.endswith(("up/kernel", "down/kernel")):
        return None
    return 8 if path.endswith("down/kernel") else 3


@pytest.mark.parametrize(
    "step",
    [
        Quantize(plan=RULES),
        AWQ(plan=RULES, grid=2),
        GPTQ(plan=RULES),
        Tuned(plan=RULES, steps=1),
        QAT(plan=RULES, steps=1, distill=False),
    ],
    ids=lambda step: type(step).__name__,
)
def test_every_rounder_follows_a_plan(step):
    after, record = step(tiny.model(), CONTEXT)
    found = bits_of(after)
    assert found == {path: wanted(path) for path in found}
    assert record.settings["plan"]["rules"][1] == (".*/down/kernel", record.settings["plan"]["rules"][1][1])


def test_the_fields_of_a_step_make_a_plan():
    plan = plan_of(Quantize(bits=4, group=32, clip=True, activations="int8"))
    assert plan.of("block_0/attention/query/kernel") == Format(bits=4, group=32, clip=True, activations="int8")
    assert plan.of("embedding") == plan.of("unembedding") == Format(activations="int8")
    assert plan.of("block_0/attention_norm/scale") is None
    assert plan_of(GPTQ(embeddings=4)).of("embedding") == plan_of(GPTQ()).of("block_0/feedforward/up/kernel")
    assert plan_of(Quantize(embeddings=0)).of("embedding") is None


def test_mixed_precision_makes_a_plan_that_another_rounder_follows():
    model, mixed = tiny.model(), Mixed(average_bits=4.0, rows=2)
    plan = mixed.plan(model, CONTEXT)
    after, _ = recipe.run(model, (mixed,), CONTEXT)
    by_hand = nearest(model.params, plan)
    for (path, w), (_, other) in zip(trees.flatten(after.params, inside=True), trees.flatten(by_hand, inside=True)):
        np.testing.assert_array_equal(w, other, err_msg=path)
    gptq, _ = recipe.run(model, (Mixed(average_bits=4.0, rows=2, rounder=GPTQ()),), CONTEXT)
    assert bits_of(gptq) == bits_of(after)
    path = "block_0/feedforward/down/kernel"
    assert np.any(dict(trees.flatten(gptq.params))[path].values != dict(trees.flatten(after.params))[path].values)


def test_plans_that_cannot_be():
    with pytest.raises(InputError, match="symmetric is False for layers, but QAT knows True only"):
        QAT(plan=Plan(((LAYERS, Format(symmetric=False)),)))
    with pytest.raises(InputError, match="activations is int8_static for layers, but GPTQ knows float and int8 only"):
        GPTQ(plan=Plan(((LAYERS, Format(activations="int8_static")),)))
    with pytest.raises(InputError, match="embeddings is 5, but must be one of 8, 4, 3, 0"):
        Quantize(embeddings=5)
    with pytest.raises(InputError, match="plan is x, but must be a"):
        Quantize(plan="x")
    with pytest.raises(InputError, match="rounder is x"):
        Mixed(rounder="x")


def test_static_scales_are_for_the_matrices_that_have_them_in_the_plan():
    plan = Plan(((r".*/up/kernel", Format(activations="int8_static")), (LAYERS, Format())))
    step = Quantize(plan=plan)
    after, _ = step(tiny.model(), CONTEXT)
    assert step.calibrates
    for path, w in trees.flatten(after.params):
        if isinstance(w, ops.QArray):
            assert w.activations == ("int8_static" if path.endswith("up/kernel") else "float")
