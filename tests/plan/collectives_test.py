"""Collectives read from programs compiled for eight devices, and from lines as other compilers write them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efflm.parallel import meshes, sharding
from efflm.plan.collectives import collectives

LAYERS, WIDTH, ROWS = 5, 64, 16
MESH = meshes.make_mesh(fsdp=8)


def arguments(dtype=jnp.float32):
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, spec))
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
    assert (gather.group, gather.dtype, gather.trips, gather.known) == (tuple(range(8)), "f32", LAYERS, True)


def test_gradients_are_scattered_though_the_compiler_writes_all_reduce():
    w, x = arguments()
    operations = found(jax.grad(lambda w, x: jnp.sum(layers(w, x))), w, x, out_shardings=w.sharding)
    count, nbytes = total(operations, "reduce-scatter")
    assert (count, nbytes) == (LAYERS, LAYERS * 7 / 8 * 4 * WIDTH * WIDTH)
    assert all(each.disguised for each in operations if each.kind == "reduce-scatter")
    assert total(operations, "all-reduce") == (0, 0)


def test_a_sum_that_all_devices_keep_is_an_all_reduce():
    _, x = arguments()
    (operation,) = found(lambda x: jnp.sum(x, axis=0), x, out_shardings=NamedSharding(MESH, PartitionSpec()))
    assert (operation.kind, operation.disguised, operation.trips) == ("all-reduce", False, 1)
    assert operation.nbytes == 2 * 7 / 8 * 4 * WIDTH


def test_bfloat16_that_travels_as_float32_counts_as_bfloat16():
    w, x = arguments(jnp.bfloat16)
    operations = found(layers, w, x)
    assert total(operations, "all-gather") == (LAYERS, LAYERS * 7 / 8 * 2 * WIDTH * WIDTH)
    assert {each.dtype for each in operations} == {"bf16"}


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
    ("groups", "group"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([8]) {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", (0, 1, 2, 3)),
    ],
)
def test_groups_are_read_in_every_form(groups, group):
    line = f"  ROOT %g = f32[16,8]{{1,0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}\n"
    (operation,) = collectives(program(line))
    assert operation.group == group
    assert operation.nbytes == 3 * 2 * 8 * 4


def test_a_form_that_is_not_known_is_no_group_of_nothing():
    with pytest.raises(ValueError, match="in a form that is not known"):
        collectives(program("  ROOT %g = f32[16,8]{1,0} all-gather(%x), replica_groups=new(8), dimensions={0}\n"))


def test_zeros_with_a_slice_written_into_them_are_gathered():
    lines = """  %zero = f32[] constant(0)
  %zeros = f32[16,8]{1,0} broadcast(%zero), dimensions={}
  %slot = s32[] constant(0)
  %own = f32[16,8]{1,0} dynamic-update-slice(%zeros, %x, %slot, %slot)
  ROOT %r = f32[16,8]{1,0} all-reduce(%own), replica_groups=[1,8]<=[8], to_apply=%add
"""
    (operation,) = collectives(program(lines))
    assert (operation.kind, operation.disguised) == ("all-gather", True)
    assert operation.nbytes == 7 / 8 * 16 * 8 * 4


def test_a_loop_of_unknown_trips_is_marked():
    def until(x):
        body = lambda x: jax.lax.with_sharding_constraint(
            x / jnp.sum(jnp.square(x)), NamedSharding(MESH, sharding.BATCH)
        )
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, body, x)

    assert not any(each.known for each in found(until, arguments()[1]) if each.kind == "all-reduce")
