"""Collectives read from programs compiled for eight devices, and from lines as other compilers write them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efflm.parallel import meshes, sharding
from efflm.plan.collectives import Collective, collectives

LAYERS, WIDTH, ROWS = 5, 64, 16
MESH = meshes.make_mesh(fsdp=8)


def arguments():
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))
    return place((LAYERS, WIDTH, WIDTH), PartitionSpec(None, "fsdp")), place((ROWS, WIDTH), sharding.BATCH)


def layers(w, x):
    """A product with each of the layers, whose weights are cut along the contracted axis, in a loop."""
    rows = NamedSharding(MESH, sharding.BATCH)

    def one(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

    return jax.lax.scan(one, x, w)[0]


def found(fn, *args, **settings):
    return collectives(jax.jit(fn, **settings).lower(*args).compile().as_text())


def total(operations, kind):
    some = [each for each in operations if each.kind == kind]
    return sum(each.trips for each in some), sum(each.nbytes for each in some)


def test_a_gather_in_a_loop_counts_once_a_layer():
    operations = found(layers, *arguments())
    assert total(operations, "all-gather") == (LAYERS, LAYERS * 7 / 8 * 4 * WIDTH * WIDTH)
    (gather,) = (each for each in operations if each.kind == "all-gather")
    assert (gather.group, gather.dtype, gather.trips, gather.known) == (8, "f32", LAYERS, True)


def test_gradients_are_counted_as_the_compiler_writes_them():
    """The CPU's writes all-reduce where a reduce-scatter would do: twice the bytes."""
    w, x = arguments()
    operations = found(jax.grad(lambda w, x: jnp.sum(layers(w, x))), w, x, out_shardings=w.sharding)
    assert total(operations, "all-reduce") == (LAYERS, LAYERS * 2 * 7 / 8 * 4 * WIDTH * WIDTH)


def test_a_sum_that_is_scattered_is_a_reduce_scatter():
    scatter = lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True)
    shared = jax.shard_map(
        scatter, mesh=MESH, in_specs=PartitionSpec(), out_specs=PartitionSpec("fsdp"), check_vma=False
    )
    (operation,) = found(shared, jnp.ones((ROWS, WIDTH)))
    assert operation == Collective("reduce-scatter", 8, "f32", 7 / 8 * 4 * ROWS * WIDTH)


def test_a_sum_that_all_devices_keep_is_an_all_reduce():
    _, x = arguments()
    (operation,) = found(lambda x: jnp.sum(x, axis=0), x, out_shardings=NamedSharding(MESH, PartitionSpec()))
    assert operation == Collective("all-reduce", 8, "f32", 2 * 7 / 8 * 4 * WIDTH)


HEADER = """HloModule written

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""


def program(body):
    return HEADER + "ENTRY %main (x: f32[2,8]) -> f32[16,8] {\n  %x = f32[2,8]{1,0} parameter(0)\n" + body + "}\n"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[4,2]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("mesh['a'=8,'b'=2] {'a':(2)2,'b'}", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("mesh['a'=2,'b'=4], device_ids=([8]) {'a'}", 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", 4),
    ],
)
def test_groups_are_read_in_every_form(groups, size):
    line = f"  ROOT %g = f32[16,8]{{1,0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}\n"
    (operation,) = collectives(program(line))
    assert operation == Collective("all-gather", size, "f32", (size - 1) * 2 * 8 * 4)


def test_a_form_that_is_not_known_is_no_group_of_nothing():
    with pytest.raises(ValueError, match="in a form that is not known"):
        collectives(program("  ROOT %g = f32[16,8]{1,0} all-gather(%x), replica_groups=new(8), dimensions={0}\n"))


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("pred", 8), ("f32", 32)])
def test_bytes_are_those_of_the_dtype_and_of_operations_that_start(dtype, bits):
    """As the TPU's compiler writes them: several arrays together, and done later."""
    lines = f"""  %y = {dtype}[2,8]{{1,0:T(8,128)}} copy(%x)
  %z = {dtype}[64]{{0}} copy(%x)
  %s = (({dtype}[2,8]), {dtype}[8,8]) all-gather-start(%y, %z), replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %g = {dtype}[8,8]{{1,0}} all-gather-done(%s)
"""
    assert collectives(program(lines)) == [Collective("all-gather", 4, dtype, 3 * (16 + 64) * bits / 8)]


def test_a_loop_of_unknown_trips_is_marked():
    def until(x):
        body = lambda x: jax.lax.with_sharding_constraint(
            x / jnp.sum(jnp.square(x)), NamedSharding(MESH, sharding.BATCH)
        )
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, body, x)

    assert not any(each.known for each in found(until, arguments()[1]) if each.kind == "all-reduce")


@pytest.mark.parametrize(("limits", "trips", "known"), [((7,), 7, True), ((7, 9), 1, False)])
def test_trips_are_those_of_the_condition_where_the_compiler_notes_none(limits, trips, known):
    """As in programs of the TPU's compiler."""
    constants = "".join(f"  %limit{number} = s32[] constant({number})\n" for number in limits)
    lines = f"""%condition (p: f32[2,8]) -> pred[] {{
  %p = f32[2,8]{{1,0}} parameter(0)
{constants}  ROOT %less = pred[] compare(%p, %limit7), direction=LT
}}

%body (b: f32[2,8]) -> f32[2,8] {{
  %b = f32[2,8]{{1,0}} parameter(0)
  ROOT %sum = f32[2,8]{{1,0}} all-reduce(%b), replica_groups=[2,4]<=[8], to_apply=%add
}}

"""
    loop = "  ROOT %loop = f32[2,8]{1,0} while(%x), condition=%condition, body=%body\n"
    nbytes = trips * 2 * 3 / 4 * 2 * 8 * 4
    assert collectives(lines + program(loop)) == [Collective("all-reduce", 4, "f32", nbytes, trips, known)]


def test_an_all_reduce_that_the_tpu_fuses_with_its_slice_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.1.clone (p: f32[2,8]) -> f32[2,2] {
  %p = f32[2,8]{1,0} parameter(0)
  %sum = f32[2,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[2,2]{1,0} dynamic-slice(%sum, %zero, %start), dynamic_slice_sizes={2,2}
}

"""
    fusion = "  ROOT %f = f32[2,2]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone\n"
    (operation,) = collectives(fused + program(fusion))
    assert operation == Collective("reduce-scatter", 4, "f32", 3 / 4 * 2 * 8 * 4)
