"""What speed is measured of: models in every precision, the bytes that a token moves, memory."""

import contextlib
import dataclasses
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from efflm import trees
from efflm.config import InputError
from efflm.evaluate import machine, speed
from efflm.evaluate.speed import Shape
from efflm.model.params import is_matrix
from efflm.ops.qarray import QArray, dequantize
from tests import tiny

# One layer, so that the bytes can be written down: width 32, 4 heads and 2 key-value heads of 8, MLP 48.
ONE = dataclasses.replace(tiny.LLAMA, layers=1)
ENTRIES = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # of the matrices of the layer
COLUMNS = 32 + 32 + 2 * 16 + 2 * 48 + 32  # of these matrices


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "w8a16", "w4a16", "w3a8", "w2a16"])
def test_the_bytes_that_a_decoded_token_moves(precision):
    model = speed.in_precision(tiny.model(ONE), precision)
    batch, slots = 2, 12
    itemsize = 2 if precision == "bfloat16" else 4
    # The operands and float32 results of the seven matmuls and the logits, of each sequence.
    inputs, outputs = 32 * 3 + 32 + 2 * 32 + 48 + 32, COLUMNS + 300
    cache = 2 * slots * 16 * itemsize + 32 * itemsize + 32 * 4  # keys, values; query; result
    weights = {
        "float32": 4 * (ENTRIES + 300 * 32),
        "bfloat16": 2 * (ENTRIES + 300 * 32),
        "w8": ENTRIES + 2 * COLUMNS + 300 * (32 + 2),
    }
    for bits in (4, 3, 2):  # a scale of float16 for each 32 along the contracted axis, of which 48 has two
        weights[f"w{bits}"] = ENTRIES * bits // 8 + 2 * (COLUMNS + 32) + 300 * (4 * bits + 2)
    held = weights.get(precision) or weights[precision[:2]]
    expected = held / batch + inputs * itemsize + outputs * 4 + cache
    assert speed.bytes_per_token(model, Shape("decode", batch, 8, 4)) == pytest.approx(expected)


def test_every_matrix_is_in_the_bits_of_the_precision():
    dense = tiny.model()
    for precision, format in speed.QUANTIZED.items():
        model = speed.in_precision(dense, precision)
        for (path, leaf), (_, was) in zip(trees.flatten(model.params), trees.flatten(dense.params)):
            assert isinstance(leaf, QArray) == is_matrix(path)
            if is_matrix(path):
                assert (leaf.bits, leaf.activations) == (format.bits, format.activations)
                assert leaf.group in (0, format.group)
                assert np.abs(np.asarray(dequantize(leaf)) - was).max() <= np.abs(was).max() / -format.low * 1.001
        with pytest.raises(InputError, match="quantized already"):
            speed.in_precision(model, "float32")


def test_memory_is_the_peak_of_what_runs():
    def touch(size):
        """Pages of the system's own, given back at once: malloc may have as much at hand from what was freed."""
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)

    if speed.peak_bytes(lambda: None) is None:
        pytest.skip("the system does not tell")
    held = [speed.peak_bytes(work) for work in 3 * (lambda: None, lambda: touch(1 << 26))]
    grown = np.median(np.subtract(held[1::2], held[::2]))  # another thread may free memory meanwhile
    assert 0.7 * (1 << 26) <= grown < 1 << 28  # the kernel counts in batches of pages


def test_the_bandwidth_counts_what_is_read(monkeypatch):
    monkeypatch.setattr(machine, "_fastest", lambda read, repeats: read() and 2.0)
    assert machine.read_bandwidth(nbytes=1 << 24) == pytest.approx((1 << 24) / 2, rel=0.2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_rivals_keep_cores_busy_while_they_are_told_to():
    def used(parent):
        """How many processes this one has started, and the seconds of processor time that they used."""
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                stats.append(path.read_text().rpartition(") ")[2].split())
        mine = [stat for stat in stats if int(stat[1]) == parent and stat[0] != "Z"]
        return len(mine), sum(int(stat[11]) + int(stat[12]) for stat in mine) / os.sysconf("SC_CLK_TCK")

    others, _ = used(os.getpid())
    with machine.rivals(1) as run:
        run(True)
        while used(os.getpid())[1] < 0.1:
            time.sleep(0.01)
        run(False)
        time.sleep(0.05)  # a signal takes a moment
        stopped = used(os.getpid())
        time.sleep(0.1)
        assert used(os.getpid()) == stopped
        assert stopped[0] == others + 1
    assert used(os.getpid())[0] == others


def test_a_shape_must_fit_the_model():
    speed.require_within([Shape("decode", 1, 60, 4), Shape("prefill", 1, 64)], 64)
    with pytest.raises(InputError, match="decode of 65 tokens is longer than the model's max_length of 64"):
        speed.require_within([Shape("decode", 1, 61, 4)], 64)
