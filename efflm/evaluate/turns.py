"""Benchmarks whose subjects take turns, round after round: with other programs, and with and without busy processes.

What is compared was measured in the same round, so that what else the machine does meets both. Peers are commands that
print JSON lines; they run in turn with the subjects and never at once.
"""

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from efflm.cli import progress
from efflm.config import InputError, require
from efflm.evaluate import machine, throughput
from efflm.evaluate.speed import PRECISIONS, Shape

OURS = ("GLIBC_TUNABLES", "XLA_FLAGS", "PYTHONPATH")  # settings of this program that no peer is given
Best = tuple[float, str]  # the rate of a peer, and which one it is
PEER_PROMPT, PEER_CONTEXT = 512, 16  # what peers measure where their field names no length
# What the formats of peers are called, by precision.
FORMATS = {"float32": r"f(loat|p)?32", "bfloat16": r"bf(loat)?16"}
FORMATS |= {name: rf"(int|i?q|u|w|nf){name[1]}.*" for name in PRECISIONS if name[0] == "w"}


class Turn(NamedTuple):
    """What is known of a subject after some rounds: its rate in each, beside busy processes in each (none: [])."""

    subject: Hashable
    rates: list[float]
    busy: list[float]
    peers: list[Best]

    def line(self) -> dict[str, Any]:
        """The rates, what busy processes leave of them, and their ratio to the best peer's."""
        found = {"rounds": len(self.rates)} | rate(self.rates)
        if self.busy:
            found |= {"busy_tokens_per_second": _rounded(self.busy)} | compared("busy_ratio", self.busy, self.rates)
        if len(self.peers) == len(self.rates):
            theirs = [each for each, _ in self.peers]
            found |= compared("ratio", self.rates, theirs)
            found |= {"peer": self.peers[-1][1], "peer_tokens_per_second": _rounded(theirs)}
        return found


def rate(rates: list[float]) -> dict[str, float]:
    """The median of the rounds, the least and the greatest, in tokens a second."""
    return {"tokens_per_second": _rounded(rates), "low": round(min(rates), 1), "high": round(max(rates), 1)}


def _rounded(rates: list[float]) -> float:
    return round(statistics.median(rates), 1)


def compared(name: str, ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """The median of the rounds' ratios, its standard error (None of one round), the least and the greatest of them."""
    ratio, error = throughput.paired(ours, theirs)
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    found = {name: ratio, f"{name}_error": error, f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
    return {key: value if value is None else round(value, 3) for key, value in found.items()}


def taken(
    subjects: Mapping[Hashable, Callable[[], float]],
    rounds: int,
    busy: int = 0,
    peers: str = "",
    best: Callable[[list[dict[str, Any]], Any], Best | None] = lambda lines, subject: None,
) -> Iterator[Turn]:
    """Measure each subject in each round and say after each what is known of it. A subject is a function -> its rate.

    busy: processes that each keep a core busy, beside which all is measured too, in turn with none. peers: commands
    with ; between them. best: (the lines that peers printed in a round, subject) -> what the subject is compared with.
    Raises InputError for a peer that fails.
    """
    commands = [command.strip() for command in peers.split(";") if command.strip()]
    kept = {subject: Turn(subject, [], [], []) for subject in subjects}
    total = rounds * (len(subjects) * (1 + bool(busy)) + len(commands))
    ticks = itertools.count(1)
    with machine.rivals(busy) as beside_rivals, progress.bar("measuring", total, live=False) as update:
        for _ in range(rounds):
            lines = []
            for command in commands:
                lines += run_peer(command)
                update(next(ticks))
            for subject, measure in subjects.items():
                turn = kept[subject]
                turn.rates.append(measure())
                update(next(ticks))
                if busy:
                    beside_rivals(True)
                    turn.busy.append(measure())
                    beside_rivals(False)
                    update(next(ticks))
                turn.peers.extend(filter(None, [best(lines, subject)]))
                yield turn


def run_peer(command: str) -> list[dict[str, Any]]:
    """The JSON lines a peer prints, in an environment without our own settings. Raises InputError."""
    bare = {name: value for name, value in os.environ.items() if name not in OURS}
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, env=bare)
    except OSError as error:
        raise InputError(f"the peer {command!r} cannot be run ({error.strerror}): check the command") from None
    require(done.returncode == 0, f"the peer {command!r} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    require(bool(lines), f"the peer {command!r} printed no JSON lines")
    return lines


def peer_best(lines: list[dict[str, Any]], shape: Shape, precision: str) -> Best | None:
    """The highest rate among what a precision is compared with in a shape, and whose it is."""
    usual = (shape.phase, shape.context) in (("prefill", PEER_PROMPT), ("decode", PEER_CONTEXT))
    field = f"{shape.phase}_tokens_per_second" if usual else f"{shape.phase}_{shape.context}_tokens_per_second"
    named = lambda line: str(line.get("format") or line.get("dtype") or "")
    like = lambda line: shape.phase == "prefill" or re.fullmatch(FORMATS[precision], named(line), re.IGNORECASE)
    fits = [line for line in lines if field in line and line.get("batch", 1) == shape.batch and like(line)]
    return max(((line[field], f"{line.get('peer', '?')} {named(line)}") for line in fits), default=None)
