import pytest

from efflm.config import InputError
from efflm.plan import hardware
from efflm.plan.hardware import HARDWARE


def test_a_topology_is_read():
    chip, topology = hardware.parse("v5p:4x4x8")
    assert (chip.name, topology, hardware.chips(topology)) == ("v5p", "4x4x8", 128)
    assert hardware.parse("h200") == (HARDWARE["h200"], "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h300", "no hardware is named 'h300': choose one of h100, h200, v5e, v5p, v6e"),
        ("h100:8", "h100 has no topology"),
        ("v5p:4x4", "v5p is a torus of 3 dimensions: give its sides as in v5p:4x4x4"),
        ("v6e:4x0", "v6e is a torus of 2 dimensions"),
        ("v5e:", "v5e is a torus of 2 dimensions"),
    ],
)
def test_bad_names_are_one_line(text, message):
    with pytest.raises(InputError, match=message) as raised:
        hardware.parse(text)
    assert "\n" not in str(raised.value)


def test_peaks_are_dense_and_agree_with_one_another():
    for chip in HARDWARE.values():
        assert chip.int8 == pytest.approx(2 * chip.bfloat16, rel=0.01)
        assert chip.peak("bfloat16") == chip.bfloat16
        assert chip.peak("float32") < chip.bfloat16 < chip.peak("int8")
        assert 150 < chip.bfloat16 / chip.bandwidth < 600  # FLOPs for each byte: Hopper and these TPUs all lie here


def test_a_group_has_the_links_it_spans():
    v5p, h100 = HARDWARE["v5p"], HARDWARE["h100"]
    assert v5p.received_a_second(tuple(range(64)), 64) == v5p.link
    assert v5p.received_a_second(tuple(range(4)), 64) == pytest.approx(v5p.link / 3)  # a line of a 4x4x4 cube
    assert v5p.received_a_second(tuple(range(16)), 64) == pytest.approx(v5p.link * 2 / 3)  # a plane
    assert h100.received_a_second(tuple(range(8)), 64) == h100.link
    assert h100.received_a_second((0, 8), 64) == h100.network
