"""The benchmarks: their lines, what they are compared with, and real runs of tiny models."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys

import pytest

from efflm.config import InputError
from efflm.config.model import ModelShape
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate import machine, turns
from efflm.evaluate.speed import Answer, Shape
from efflm.formats import efflm_file
from efflm.train.aot import TimedStep
from experiments import bench
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
        def ask(shape):
            asked.append(shape)
            return Answer(rounds.pop(0), 2e6, 5000, "avx2")

        yield ask

    monkeypatch.setattr(bench, "worker", worker)
    return asked, rounds


@pytest.fixture
def peer(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    return f"{sys.executable} {script}"


def rivals(monkeypatch, expected):
    """In place of busy processes: when they are told to run."""
    told = []

    @contextlib.contextmanager
    def stand_in(count):
        assert count == expected
        yield told.append

    monkeypatch.setattr(machine, "rivals", stand_in)
    return told


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def narrow(**changes):
    return bench.Infer(**{"precisions": ("w8a8",), "batches": (1,), "contexts": (16,), "prompts": (512,)} | changes)


def test_each_measurement_is_written_when_it_is_done_and_compared_with_the_peer(stand_ins, peer, capsys, tmp_path):
    asked, rounds = stand_ins
    rounds += [[[1.0, 4.0, 1.0]], [[1.0]], [[0.5]], [[2.0]]]  # decode, prefill; decode, prefill
    bench.infer(narrow(rounds=2, peer=f"{peer}; {peer}", run_dir=str(tmp_path / "run")))
    decode, prefill = Shape("decode", 1, 16, 64), Shape("prefill", 1, 512)
    assert asked == [decode, prefill] * 2
    found = lines(capsys)
    assert [(line["phase"], line["rounds"]) for line in found] == [
        ("decode", 1), ("prefill", 1), ("decode", 2), ("prefill", 2)
    ]  # fmt: skip
    last = found[2]
    assert (last["tokens_per_second"], last["low"], last["high"]) == (96, 64, 128)
    assert (last["bytes_per_token"], last["resident_bytes"]) == (2_000_000, 5000)
    assert last["bandwidth_fraction"] == pytest.approx(96 * 2e6 / 1e9)
    assert (last["ratio"], last["ratio_min"], last["ratio_max"]) == (0.96, 0.64, 1.28)  # of the peer's int8
    assert last["ratio_error"] > 0
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kept["rows"][0] == {"name": "w8a8, decode after 16"} | last | {"note": ""}
    assert kept["rows"][1] == {"name": "w8a8, prefill of 512"} | found[3] | {"note": ""}
    assert found[3]["peer"] == "stand-in int8"
    assert found[3]["ratio"] == pytest.approx((512 + 256) / 2 / 2000)


def test_busy_processes_run_in_turn_with_none(stand_ins, capsys, monkeypatch):
    asked, rounds = stand_ins
    rounds += [[[1.0]], [[2.0]], [[0.5]], [[2.0]]]  # quiet, busy, quiet, busy
    told = rivals(monkeypatch, 3)
    bench.infer(narrow(rounds=2, phases=("decode",), busy=3))
    assert len(asked) == 4
    assert told == [True, False] * 2
    last = lines(capsys)[-1]
    assert (last["tokens_per_second"], last["busy_tokens_per_second"]) == (96, 32)
    assert (last["busy_ratio"], last["busy_ratio_min"], last["busy_ratio_max"]) == (0.375, 0.25, 0.5)


def test_an_interrupt_leaves_what_is_done(stand_ins, capsys):
    _, rounds = stand_ins
    rounds += [[[1.0]]]
    with pytest.raises(IndexError):  # no second measurement
        bench.infer(narrow(rounds=1))
    assert [line["phase"] for line in lines(capsys)] == ["decode"]


def test_the_portable_path_is_compared_by_pairs_of_turns():
    shape = Shape("decode", 1, 128, 60)
    # seconds of native, portable, native, portable
    found = bench.against_portable(shape, [Answer([[1.0], [1.2], [2.0], [2.0]], 1, None, "avx2")])
    assert (found["portable_ratio"], found["portable_ratio_min"], found["portable_ratio_max"]) == (1.1, 1.0, 1.2)
    assert found["portable_tokens_per_second"] == pytest.approx((60 / 1.2 + 60 / 2) / 2)
    assert bench.against_portable(shape, [Answer([[1.0]], 1, None, "avx2")]) == {}


def test_a_ratio_is_that_of_the_same_rounds():
    """A machine that gets slower makes no ratio of medians wrong here."""
    found = turns.compared("ratio", [8.0, 4.0, 2.0, 1.0], [4.0, 2.0, 1.0, 0.5])
    assert found == {"ratio": 2.0, "ratio_error": 0.0, "ratio_min": 2.0, "ratio_max": 2.0}
    assert turns.compared("ratio", [3.0], [2.0])["ratio_error"] is None


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
    best = lambda precision, *shape: turns.peer_best(theirs, Shape(*shape), precision)
    after_16 = {"float32": 4.0, "bfloat16": 5.0, "w8a16": 11.0, "w8a8": 11.0, "w4a16": 20.0, "w4a8": 20.0}
    for precision, rate in after_16.items():
        assert best(precision, "decode", 1, 16, 64)[0] == rate
        assert best(precision, "prefill", 1, 512) == (8.0, "p BF16")
    assert best("w8a8", "decode", 1, 1024, 64) == (9.0, "p Q8_0")
    assert best("w8a8", "decode", 4, 16, 16) == (30.0, "p int8")
    assert best("float32", "decode", 1, 1024, 64) is None
    assert best("w8a8", "prefill", 1, 128) is None


def test_shapes():
    found = bench.shapes(bench.Infer(peer="some"))
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
    assert Shape("decode", 1, 16, 64) not in bench.shapes(bench.Infer())
    assert {shape.phase for shape in bench.shapes(bench.Infer(phases=("prefill",)))} == {"prefill"}


def test_what_is_refused():
    for changes, words in [
        ({"batches": (1, 0)}, "batches is 1,0, but must be positive"),
        ({"rounds": 0}, "rounds is 0"),
        ({"busy": -1}, "busy is -1"),
    ]:
        with pytest.raises(InputError, match=words):
            narrow(**changes)


def test_a_peer_that_fails_is_named(stand_ins):
    with pytest.raises(InputError, match=r"the peer 'false' failed"):
        bench.infer(narrow(peer="false"))


def test_a_tiny_model_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 1e9)
    monkeypatch.chdir(tmp_path)  # where the compiled programs are kept
    efflm_file.save(tmp_path / "tiny.safetensors", tiny.model(), {})
    small_tokenizer().save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(bench, "worker", functools.partial(bench.worker, least=0.0))
    small = narrow(model=str(tmp_path / "tiny.safetensors"), precisions=("w4a8",), prompts=(24,), batches=(2,), new=8)
    bench.infer(dataclasses.replace(small, rounds=1, portable="both"))
    decode, prefill = lines(capsys)
    assert (decode["phase"], decode["batch"], decode["context"]) == ("decode", 2, 16)
    assert (prefill["phase"], prefill["batch"], prefill["context"]) == ("prefill", 1, 24)
    for line in decode, prefill:
        assert {"portable_ratio", "portable_ratio_error"} <= set(line)
        assert 0 < line["low"] <= line["tokens_per_second"] <= line["high"]
    assert decode["resident_bytes"] is None or decode["resident_bytes"] > 0


# --- training --------------------------------------------------------------------------------------------------------

POLICIES = ["float32", "bfloat16"]


def train(run):
    bench.train(run, ModelShape(layers=1), TrainConfig(batch=2, length=8), MeshConfig(data=1))


@pytest.fixture
def stand_in_steps(monkeypatch):
    """Steps that compile nothing and take 1, 2, 3, ... seconds, the first of each round to warm up."""
    seconds = lambda: (float(number) for number in itertools.count(1))
    monkeypatch.setattr(bench, "timed_step", lambda *settings: TimedStep(1.5, 1000, 500, seconds()))
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype, size: 1e9)


def test_each_round_of_training_is_written_when_it_is_done(stand_in_steps, capsys, monkeypatch):
    peers = iter([80.0, 40.0])
    monkeypatch.setattr(turns, "run_peer", lambda command: [{"dtype": "float32", "tokens_per_second": next(peers)}])
    train(bench.Train(policies=tuple(POLICIES), rounds=2, steps=2, peer="stand-in"))
    found = lines(capsys)
    first, second = found[:2], found[2:]
    for round_, found in enumerate((first, second), start=1):
        assert [line["name"] for line in found] == [f"train_{name}" for name in POLICIES]
        assert {line["rounds"] for line in found} == {round_}
    # 16 tokens in 2.5 seconds, then in 5.5
    assert first[0]["tokens_per_second"] == pytest.approx(16 / 2.5, abs=0.05)
    assert second[0]["tokens_per_second"] == pytest.approx((16 / 2.5 + 16 / 5.5) / 2, abs=0.05)
    assert (second[0]["ratio_min"], second[0]["ratio_max"]) == (pytest.approx(16 / 5.5 / 40, abs=1e-3), 0.08)


def test_steps_beside_busy_processes_take_turns(stand_in_steps, capsys, monkeypatch):
    told = rivals(monkeypatch, 2)
    train(bench.Train(policies=("float32",), rounds=2, steps=1, busy=2))
    assert told == [True, False] * 2
    first, last = lines(capsys)
    # Of 16 tokens each a step to warm up, and one of 2 seconds; then, busy, one of 4; 6; 8.
    assert (first["tokens_per_second"], first["busy_tokens_per_second"], first["busy_ratio"]) == (8, 4, 0.5)
    assert (last["busy_ratio_min"], last["busy_ratio"], last["busy_ratio_max"]) == (0.5, 0.625, 0.75)


def test_auto_is_measured_as_what_it_picked_and_compared_with_the_peers_best(
    stand_in_steps, auto_picks, capsys, monkeypatch
):
    auto_picks("float32")
    peer = [{"dtype": dtype, "tokens_per_second": rate} for dtype, rate in (("float32", 4.0), ("bfloat16", 8.0))]
    monkeypatch.setattr(turns, "run_peer", lambda command: peer)
    train(bench.Train(policies=("float32", "auto"), rounds=1, steps=1, peer="stand-in"))
    out, err = capsys.readouterr()
    float32, auto = map(json.loads, out.splitlines())
    assert (auto["name"], auto["policy"]) == ("train_auto", "float32")
    assert (float32["peer_tokens_per_second"], auto["peer_tokens_per_second"]) == (4.0, 8.0)
    assert "train.policy auto: float32; " in err


def test_an_interrupt_leaves_the_rounds_that_are_done(stand_in_steps, capsys, monkeypatch):
    def interrupted(command):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        return [{"dtype": "float32", "tokens_per_second": 1.0}]

    stopped = []
    monkeypatch.setattr(turns, "run_peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(bench.Train(policies=tuple(POLICIES), rounds=3, steps=1, peer="stand-in"))
    assert [(line["name"], line["rounds"]) for line in lines(capsys)] == [("train_float32", 1), ("train_bfloat16", 1)]


# --- a draft that proposes tokens ------------------------------------------------------------------------------------


def test_a_draft_has_an_acceptance_and_a_ratio(folder, capsys):
    model = folder / "model"
    bench.main([
        "x", "--what=speculative", f"--model={model}", f"--draft={model}", f"--corpus={folder / 'numbers'}",
        "--ahead=2,3", "--prompts=2", "--prompt_tokens=8", "--max_tokens=12", "--rounds=2",
    ])  # fmt: skip
    said = capsys.readouterr().out
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(row["ahead"], row["rounds"]) for row in found] == [(0, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2)]
    alone = found[3]
    for row in found[4:]:
        assert row["acceptance"] == 1
        assert row["tokens_per_pass"] == row["ahead"] + 1
        # The median of two rounds is their mean.
        assert row["ratio"] == pytest.approx((row["low"] / alone["low"] + row["high"] / alone["high"]) / 2, rel=0.5)
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert "2 prompts of 8 tokens, 12 new" in said


def test_what_a_draft_cannot_be_is_refused():
    for fields, words in (
        ({"ahead": (2, 0)}, "ahead is 2,0, but must be positive"),
        ({"rounds": 0}, "rounds is 0"),
        ({"peer": "x"}, "peer is for --what=train"),
    ):
        with pytest.raises(InputError, match=words):
            bench.Speculative(**fields)
    with pytest.raises(InputError, match="--draft is missing: give a smaller model"):
        bench.draft(bench.Speculative())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--what is '', but must be train, infer or speculative"),
        (["--what=all"], "--what is 'all', but must be one of train, infer, speculative"),
        (["--what", "train", "--phases=decode"], "unknown flag --phases"),
        (["--what=train", "--policies=float32,best"], "--policies is 'best', but must be one of float32, "),
        (["--what=infer", "--precisions=int8"], "--precisions is 'int8', but must be one of float32, "),
        (["--what=infer", "--batches=1,"], "--batches is '', but must be a whole number"),
        (["--what=speculative", "--ahead="], "--ahead is '', but must be a whole number"),
    ],
)
def test_what_decides_the_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(["x", *flags])
    assert message in capsys.readouterr().err
