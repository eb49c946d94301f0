"""The benchmark of inference: its lines, what they are compared with, and one real run of a tiny model."""

import contextlib
import dataclasses
import functools
import json
import sys

import pytest

from efflm.config import InputError
from efflm.evaluate import machine
from efflm.evaluate.speed import Answer, Shape
from efflm.formats import efflm_file
from experiments import bench_infer
from tests import tiny
from tests.formats.huggingface_test import small_tokenizer

PEER = """
import json
for format, prefill, decode in ("int8", 2000.0, 100.0), ("Q4_K_M", 1000.0, 200.0), ("f32", 500.0, 50.0):
    rates = dict(prefill_tokens_per_second=prefill, decode_tokens_per_second=decode)
    print(json.dumps(dict(peer="stand-in", format=format) | rates))
"""


@pytest.fixture
def stand_ins(monkeypatch):
    """A machine of 1 GB/s, and processes whose runs of a shape take the seconds that a test says, turn by turn."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 1e9)
    asked, rounds = [], []

    @contextlib.contextmanager
    def worker(load, shapes, portable):
        def ask(shape, wanted):
            asked.append((wanted, shape))
            if wanted == "measure":
                return Answer(rounds.pop(0), 2e6, 5000, "avx2")

        yield ask

    monkeypatch.setattr(bench_infer, "worker", worker)
    return asked, rounds


@pytest.fixture
def peer(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    return f"{sys.executable} {script}"


def rivals(monkeypatch, expected):
    """In place of busy processes: when they are told to run."""
    turns = []

    @contextlib.contextmanager
    def stand_in(count):
        assert count == expected
        yield turns.append

    monkeypatch.setattr(machine, "rivals", stand_in)
    return turns


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def narrow(**changes):
    return bench_infer.Run(**{"precisions": "w8a8", "batches": "1", "contexts": "16", "prompts": "512"} | changes)


def test_each_measurement_is_written_when_it_is_done_and_compared_with_the_peer(stand_ins, peer, capsys):
    asked, rounds = stand_ins
    rounds += [[[1.0, 4.0, 1.0]], [[1.0]], [[0.5]], [[2.0]]]  # decode, prefill; decode, prefill
    bench_infer.main(narrow(rounds=2, peer=f"{peer}; {peer}"))
    decode, prefill = Shape("decode", 1, 16, 64), Shape("prefill", 1, 512)
    turns = ["warm", "measure", "warm", "measure", "measure", "measure"]
    assert asked == list(zip(turns, [decode, decode, prefill, prefill, decode, prefill]))
    found = lines(capsys)
    assert [(line["phase"], line["rounds"]) for line in found] == [
        ("decode", 1), ("prefill", 1), ("decode", 2), ("prefill", 2)
    ]  # fmt: skip
    last = found[2]
    assert (last["tokens_per_second"], last["low"], last["high"]) == (96, 64, 128)
    assert (last["bytes_per_token"], last["resident_bytes"]) == (2_000_000, 5000)
    assert last["bandwidth_fraction"] == pytest.approx(96 * 2e6 / 1e9)
    assert (last["ratio"], last["ratio_min"], last["ratio_max"]) == (0.96, 0.64, 1.28)  # of the peer's int8
    assert found[3]["peer"] == "stand-in int8"
    assert found[3]["ratio"] == pytest.approx((512 + 256) / 2 / 2000)


def test_busy_processes_run_in_turn_with_none(stand_ins, capsys, monkeypatch):
    asked, rounds = stand_ins
    rounds += [[[1.0]], [[2.0]], [[0.5]], [[2.0]]]  # quiet, busy, quiet, busy
    turns = rivals(monkeypatch, 3)
    bench_infer.main(narrow(rounds=2, phases="decode", busy=3))
    assert [wanted for wanted, _ in asked] == ["warm", *["measure"] * 4]
    assert turns == [True, False] * 2
    last = lines(capsys)[-1]
    assert (last["tokens_per_second"], last["busy_tokens_per_second"]) == (96, 32)
    assert (last["busy_ratio"], last["busy_low"], last["busy_high"]) == (0.375, 0.25, 0.5)


def test_an_interrupt_leaves_what_is_done(stand_ins, capsys, monkeypatch):
    _, rounds = stand_ins
    rounds += [[[1.0]]]

    def interrupted(shape, found, *rest):
        if shape.phase == "prefill":
            raise KeyboardInterrupt
        return original(shape, found, *rest)

    original = bench_infer.line
    monkeypatch.setattr(bench_infer, "line", interrupted)
    rounds += [[[1.0]]]
    with pytest.raises(KeyboardInterrupt):
        bench_infer.main(narrow())
    assert [line["phase"] for line in lines(capsys)] == ["decode"]


def test_the_portable_path_is_compared_beyond_the_noise_of_equal_runs():
    shape = Shape("decode", 1, 128, 60)
    # seconds of native, portable, native, portable: the two halves of the portable path differ by a fifth
    one = [Answer([[1.0], [1.2], [1.0], [1.0]], 1, None, "avx2")]
    found = bench_infer.against_portable(shape, one)
    assert found["portable_ratio"] == pytest.approx(1.1)
    assert found["noise"] == pytest.approx(0.2)
    slower = bench_infer.against_portable(shape, [Answer([[2.0], [1.0], [2.2], [1.0]], 1, None, "avx2")])
    assert (slower["portable_ratio"], slower["not_slower"]) == (pytest.approx(1 / 2.1, abs=1e-3), False)
    assert bench_infer.against_portable(shape, [Answer([[1.0]], 1, None, "avx2")]) == {}


def test_what_a_peer_is_compared_with():
    line = lambda format, **rates: {"peer": "p", "format": format, **rates}
    theirs = [
        line("int8", decode_tokens_per_second=10.0, prefill_tokens_per_second=7.0),
        line("Q8_0", decode_tokens_per_second=11.0, decode_1024_tokens_per_second=9.0),
        line("IQ4_NL", decode_tokens_per_second=20.0),
        line("BF16", decode_tokens_per_second=5.0, prefill_tokens_per_second=8.0),
        {"peer": "p", "dtype": "float32", "decode_tokens_per_second": 4.0},
        line("int8", batch=4, decode_tokens_per_second=30.0),
    ]
    best = lambda precision, *shape: bench_infer.peer_best(theirs, Shape(*shape), precision)
    after_16 = {"float32": 4.0, "bfloat16": 5.0, "w8a16": 11.0, "w8a8": 11.0, "w4a16": 20.0, "w4a8": 20.0}
    for precision, rate in after_16.items():
        assert best(precision, "decode", 1, 16, 64)[0] == rate
        assert best(precision, "prefill", 1, 512) == (8.0, "p BF16")
    assert best("w8a8", "decode", 1, 1024, 64) == (9.0, "p Q8_0")
    assert best("w8a8", "decode", 4, 16, 16) == (30.0, "p int8")
    assert best("float32", "decode", 1, 1024, 64) is None
    assert best("w8a8", "prefill", 1, 128) is None


def test_shapes():
    found = bench_infer.shapes(bench_infer.Run(peer="some"))
    decode = [(shape.batch, shape.context, shape.new) for shape in found if shape.phase == "decode"]
    assert decode == [
        (1, 16, 64),
        (1, 128, 64),
        (1, 1024, 64),
        (4, 128, 16),
        (4, 1024, 16),
        (16, 128, 4),
        (16, 1024, 4),
    ]
    assert [shape.context for shape in found[len(decode) :]] == [128, 512, 2048]
    assert Shape("decode", 1, 16, 64) not in bench_infer.shapes(bench_infer.Run())
    assert {shape.phase for shape in bench_infer.shapes(bench_infer.Run(phases="prefill"))} == {"prefill"}


def test_what_is_refused():
    for changes, words in [
        ({"precisions": "int8"}, "precisions holds 'int8': choose among float32"),
        ({"batches": "1,"}, "batches is '1,', but must be positive numbers"),
        ({"rounds": 0}, "rounds is 0"),
        ({"busy": -1}, "busy is -1"),
    ]:
        with pytest.raises(InputError, match=words):
            narrow(**changes)


def test_a_peer_that_fails_is_named(stand_ins):
    with pytest.raises(InputError, match=r"the peer 'false' failed"):
        bench_infer.main(narrow(peer="false"))


def test_a_tiny_model_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 1e9)
    monkeypatch.chdir(tmp_path)  # where the compiled programs are kept
    efflm_file.save(tmp_path / "tiny.safetensors", tiny.model(), {})
    small_tokenizer().save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(bench_infer, "worker", functools.partial(bench_infer.worker, least=0.0))
    small = narrow(model=str(tmp_path / "tiny.safetensors"), precisions="w4a8", prompts="24", batches="2", new=8)
    bench_infer.main(dataclasses.replace(small, rounds=1, portable="both"))
    decode, prefill = lines(capsys)
    assert (decode["phase"], decode["batch"], decode["context"]) == ("decode", 2, 16)
    assert (prefill["phase"], prefill["batch"], prefill["context"]) == ("prefill", 1, 24)
    for line in decode, prefill:
        assert {"portable_ratio", "noise", "not_slower"} <= set(line)
        assert 0 < line["low"] <= line["tokens_per_second"] <= line["high"]
    assert decode["resident_bytes"] is None or decode["resident_bytes"] > 0
