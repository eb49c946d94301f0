"""The benchmark of training: what it has measured is on stdout as it goes."""

import itertools
import json

import pytest

from efflm.config import InputError
from efflm.config.model import ModelShape
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate import machine
from efflm.train.aot import TimedStep
from experiments import bench_train
from tests.experiments.bench_infer_test import rivals

POLICIES = ["float32", "bfloat16"]


def main(run):
    bench_train.main(run, ModelShape(layers=1), TrainConfig(batch=2, length=8), MeshConfig(data=1))


@pytest.fixture
def stand_ins(monkeypatch):
    """Steps that compile nothing and take 1, 2, 3, ... seconds, the first of each round to warm up."""
    seconds = lambda: (float(number) for number in itertools.count(1))
    monkeypatch.setattr(bench_train, "timed_step", lambda *settings: TimedStep(1.5, 1000, 500, seconds()))
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype, size: 1e9)


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_round_is_written_when_it_is_done(stand_ins, capsys, monkeypatch):
    peers = iter([80.0, 40.0])
    monkeypatch.setattr(
        bench_train, "run_peer", lambda command: [{"dtype": "float32", "tokens_per_second": next(peers)}]
    )
    main(bench_train.Run(policies=",".join(POLICIES), rounds=2, steps=2, peer="stand-in"))
    found = lines(capsys)
    first, second = found[:2], found[2:]
    for round_, found in enumerate((first, second), start=1):
        assert [line["name"] for line in found] == [f"train_{name}" for name in POLICIES]
        assert {line["rounds"] for line in found} == {round_}
    # 16 tokens in 2.5 seconds, then in 5.5
    assert first[0]["tokens_per_second"] == pytest.approx(16 / 2.5, abs=0.05)
    assert second[0]["tokens_per_second"] == pytest.approx((16 / 2.5 + 16 / 5.5) / 2, abs=0.05)
    assert (second[0]["ratio_min"], second[0]["ratio_max"]) == (pytest.approx(16 / 5.5 / 40, abs=1e-3), 0.08)


def test_busy_processes_run_in_turn_with_none(stand_ins, capsys, monkeypatch):
    turns = rivals(monkeypatch, 2)
    main(bench_train.Run(policies="float32", rounds=2, steps=1, busy=2))
    assert turns == [False, True, False] * 2
    first, last = lines(capsys)
    # Of 16 tokens each a step to warm up, and one of 2 seconds; then, busy, one of 4; 6; 8.
    assert (first["tokens_per_second"], first["busy_tokens_per_second"], first["busy_ratio"]) == (8, 4, 0.5)
    assert (last["busy_low"], last["busy_ratio"], last["busy_high"]) == (0.5, 0.625, 0.75)


def test_auto_is_measured_as_what_it_picked_and_compared_with_the_peers_best(
    stand_ins, auto_picks, capsys, monkeypatch
):
    auto_picks("float32")
    peer = [{"dtype": dtype, "tokens_per_second": rate} for dtype, rate in (("float32", 4.0), ("bfloat16", 8.0))]
    monkeypatch.setattr(bench_train, "run_peer", lambda command: peer)
    main(bench_train.Run(policies="float32,auto", rounds=1, steps=1, peer="stand-in"))
    out, err = capsys.readouterr()
    float32, auto = map(json.loads, out.splitlines())
    assert (auto["name"], auto["policy"]) == ("train_auto", "float32")
    assert (float32["peer_tokens_per_second"], auto["peer_tokens_per_second"]) == (4.0, 8.0)
    assert "train.policy auto: float32; " in err


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match=r"policies holds 'best': choose among float32, .*, auto"):
        bench_train.Run(policies="float32,best")


def test_an_interrupt_leaves_the_rounds_that_are_done(stand_ins, capsys, monkeypatch):
    def interrupted(command):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        return [{"dtype": "float32", "tokens_per_second": 1.0}]

    stopped = []
    monkeypatch.setattr(bench_train, "run_peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(bench_train.Run(policies=",".join(POLICIES), rounds=3, steps=1, peer="stand-in"))
    assert [(line["name"], line["rounds"]) for line in lines(capsys)] == [("train_float32", 1), ("train_bfloat16", 1)]
