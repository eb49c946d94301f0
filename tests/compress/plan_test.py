import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import recipe
from efflm.compress.awq import AWQ
from efflm.compress.gptq import GPTQ
from efflm.compress.magnitude import Magnitude
from efflm.compress.mixed import Mixed
from efflm.compress.plan import EMBEDDINGS, LAYERS, Plan, counted, grid_for, nearest, plan_of
from efflm.compress.qat import QAT
from efflm.compress.quantize import Quantize
from efflm.compress.sparsegpt import SparseGPT
from efflm.compress.step import Context
from efflm.compress.tuned import Tuned
from efflm.compress.wanda import Wanda
from efflm.config import InputError
from efflm.model.params import in_layer
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
        (EMBEDDINGS, Format(bits=4, group=16, super_block=256)),
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
    assert after.params["embedding"].super_block == 256
    assert record.settings["plan"]["rules"][1] == (".*/down/kernel", record.settings["plan"]["rules"][1][1])


def test_the_fields_of_a_step_make_a_plan():
    plan = plan_of(Quantize(bits=4, group=32, clip=True, activations="int8"))
    assert plan.of("block_0/attention/query/kernel") == Format(bits=4, group=32, clip=True, activations="int8")
    assert plan.of("embedding") == plan.of("unembedding") == Format(activations="int8")
    assert plan.of("block_0/attention_norm/scale") is None
    assert plan_of(GPTQ(embeddings=4)).of("embedding") == plan_of(GPTQ()).of("block_0/feedforward/up/kernel")
    assert plan_of(Quantize(embeddings=0)).of("embedding") is None


def test_bits_of_embeddings_are_bits_of_entropy_beside_layers_that_have_some():
    assert plan_of(GPTQ(bits=4, group=0, entropy=2.5, embeddings=5)).of("embedding") == Format(entropy=5.0, clip=True)
    assert plan_of(Quantize(entropy=4.5)).of("unembedding") == Format()
    assert f"{Format(entropy=2.5)}, {Format()}" == "2.5 bits of entropy, 8 bits"


def test_frequent_tokens_have_finer_scales_in_a_format_with_an_entropy(rng):
    batch = {"inputs": np.array([[7, 7, 7, 2], [7, 2, 5, 9]]), "segments": np.array([[1, 1, 1, 1], [1, 1, 2, 0]])}
    counts = counted(batch, 10)
    np.testing.assert_array_equal(counts, [0, 0, 2, 0, 0, 1, 0, 4, 0, 0])
    w, format = jnp.asarray(rng.normal(size=(10, 64)), jnp.float32), Format(entropy=3.0)
    plain, _ = grid_for("embedding", w, format)
    for path, table, of in (("embedding", w, lambda x: x), ("unembedding", w.T, jnp.transpose)):
        finer, _ = grid_for(path, table, format, counts)
        ratio = np.ravel(plain / of(finer))
        # One of ten tokens is there once, so a tenth is added to each.
        np.testing.assert_allclose(ratio, ((counts + 0.1) / 0.1) ** 0.2, rtol=1e-6)
    most = 1e9 * counts
    capped, _ = grid_for("embedding", w, format, most)
    np.testing.assert_allclose(capped[7, 0], jnp.max(jnp.abs(w[7])) / 127, rtol=1e-6)
    for path, other in (("embedding", Format(bits=4, group=32)), ("block_0/feedforward/down/kernel", format)):
        for ours, theirs in zip(grid_for(path, w, other, counts), grid_for(path, w, other)):
            np.testing.assert_array_equal(ours, theirs)
    params = nearest({"embedding": w}, Plan(((EMBEDDINGS, format),)), counts=counts)
    errors = np.mean(np.square(ops.dequantize(params["embedding"]) - w), axis=1)
    assert errors[7] < 0.5 * errors[0]


@pytest.mark.parametrize(("name", "kind"), [("nearest", Quantize), ("gptq", GPTQ), ("tuned", Tuned)])
def test_mixed_precision_makes_a_plan_that_its_rounder_follows(name, kind):
    model, mixed = tiny.model(), Mixed(bits="6,4,3", average_bits=4.5, groups="16", rows=2, rounder=name)
    after, _ = recipe.apply(model, (mixed,), CONTEXT)
    by_hand, _ = kind(plan=mixed.plan(model, CONTEXT))(model, CONTEXT)
    assert len(set(bits_of(after).values())) > 1
    for (path, w), (_, other) in zip(
        trees.flatten(after.params, inside=True), trees.flatten(by_hand.params, inside=True)
    ):
        np.testing.assert_array_equal(w, other, err_msg=path)


SHARES = Plan(((r"block_1/.*/(up|down)/kernel", None), (r".*/down/kernel", 0.25), (LAYERS, 0.5)))


@pytest.mark.parametrize("step", [Magnitude(plan=SHARES), Wanda(plan=SHARES), SparseGPT(plan=SHARES)])
def test_every_pruner_follows_a_plan_of_shares(step):
    model = tiny.model()
    after, record = step(model, CONTEXT)
    weights, before = dict(trees.flatten(after.params)), dict(trees.flatten(model.params))
    assert record.settings["plan"]["rules"][1] == (".*/down/kernel", 0.25)
    for path in filter(in_layer, weights):
        if path.startswith("block_1") and path.endswith(("up/kernel", "down/kernel")):
            assert path not in after.masks
            np.testing.assert_array_equal(weights[path], before[path])
        else:
            share = 0.25 if path.endswith("down/kernel") else 0.5
            zeros = np.count_nonzero(np.asarray(weights[path]) == 0)
            assert zeros == np.count_nonzero(~np.asarray(after.masks[path])) == share * weights[path].size, path


def test_a_pattern_is_for_the_matrices_that_have_it_in_the_plan():
    plan = Plan(((r"block_0/.*", None), (LAYERS, 0.5)))
    after, _ = Wanda(pattern="2:4", plan=plan)(tiny.model(), CONTEXT)
    assert all(path.startswith("block_1/") for path in after.masks)
    for mask in after.masks.values():
        assert np.all(np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2)


def test_plans_that_cannot_be():
    with pytest.raises(InputError, match=r"sparsity is 1\.5"):
        Wanda(plan=Plan(((LAYERS, 1.5),)))
    with pytest.raises(InputError, match=r"sparsity is 0\.25, but 2:4 removes 0\.5 of the weights"):
        SparseGPT(sparsity=0.5, pattern="2:4", plan=SHARES)
    with pytest.raises(InputError, match="scope is global, which has one threshold"):
        Magnitude(scope="global", plan=SHARES)
    for plan in ("x", RULES):
        with pytest.raises(InputError, match=r"plan is .*, but must be a compress.plan.Plan of shares"):
            Magnitude(plan=plan)
    with pytest.raises(InputError, match=r"plan is Plan.*, but must be a compress.plan.Plan of formats"):
        GPTQ(plan=SHARES)
    with pytest.raises(InputError, match="scales is matrix for layers, but QAT knows output only"):
        QAT(plan=Plan(((LAYERS, Format(scales="matrix")),)))
    with pytest.raises(InputError, match="activations is int8_static for layers, but GPTQ knows float and int8 only"):
        GPTQ(plan=Plan(((LAYERS, Format(activations="int8_static")),)))
    with pytest.raises(InputError, match="embeddings is 9: choose from 8, 7, 6, 5, 4, 3, 2, 0"):
        Quantize(embeddings=9)
    with pytest.raises(InputError, match="plan is x, but must be a"):
        Quantize(plan="x")


def test_static_scales_are_for_the_matrices_that_have_them_in_the_plan():
    plan = Plan(((r".*/up/kernel", Format(activations="int8_static")), (LAYERS, Format())))
    step = Quantize(plan=plan)
    after, _ = step(tiny.model(), CONTEXT)
    assert step.calibrates
    for path, w in trees.flatten(after.params):
        if isinstance(w, ops.QArray):
            assert w.activations == ("int8_static" if path.endswith("up/kernel") else "float")
