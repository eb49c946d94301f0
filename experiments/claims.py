"""Which claims of the literature hold here? Sixteen of them, each with a rule that was written before the run.

    bash launch/run.sh experiments.claims                          # an hour on two quiet cores
    bash launch/run.sh experiments.claims --claims=8,10 --budget=20m
    bash launch/run.sh experiments.claims --list

Expect a line for each seed of each claim, a table at the end, and in the run directory results.json, which is written
anew after each seed, and report.html. A run that was interrupted goes on where it stopped, if the same command is given
again; more --claims and --seeds may be asked for then. On an accelerator give larger sizes: --model.width=768
--model.layers=12 --model.heads=12 --train.steps=20000 --train.batch=64, and --mesh.* for several.

Protocol: a claim is a few effects, most with a bound. An effect is supported if the interval of 95% of its mean over
seeds lies beyond the bound on the claimed side, not supported if it lies on the other, else undecided
(experiments/claimed/claim.py). A claim is supported if all its effects are, not supported if one is not. A seed is that
of weights, batches and calibration text. What a run began with, rules and sizes, cannot be changed in it afterwards.
"""

import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from efflm import user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.config import InputError, flag, require, require_positive, require_seed
from efflm.config.model import ModelShape
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.data import corpora, dataset
from efflm.evaluate.windows import Scoring
from efflm.model import autotune
from efflm.parallel import meshes
from efflm.report import numbers, table
from efflm.report.journal import Journal
from efflm.report.page import Detail, Section, Table
from efflm.report.rows import Row
from efflm.report.table import figure
from efflm.report.verdicts import Verdict
from experiments.claimed import claim, distillation, memory, optimization, pruning, quantization
from experiments.claimed.claim import Claim
from experiments.claimed.lab import Lab

FILES = (memory, optimization, quantization, pruning, distillation)
CLAIMS = dict(sorted((each.number, each) for file in FILES for each in file.CLAIMS))
MODEL = ModelShape(layers=4, width=128, mlp_dim=352, vocabulary=1024, max_length=256, tied=False)
TRAIN = TrainConfig(steps=1600, length=128, learning_rate=4e-3)
LEAST_STEPS = 40
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    claims: tuple[int, ...] = flag((), "numbers of the claims to test, as in 8,10; default: all")
    list: bool = flag(False, "only say what the claims and their rules are")
    budget: str = flag("", "the time after which nothing more is begun, as in 90s, 20m or 2h; empty: none")
    seeds: int = flag(3, "seeds of each claim, at least 3 for a verdict")
    seed: int = flag(0, "the first of them")
    corpus: str = flag(corpora.DEFAULT, corpora.KINDS, path=True)
    split: Literal["test", "validation"] = flag("test", "which held-out text is scored")
    run_dir: str = flag(str(run_directory.ROOT / "claims"), "where everything is written", path=True)

    def __post_init__(self):
        require_positive(self, "seeds")
        require_seed(self.seed)
        require_seed(self.seed + self.seeds)
        unknown = [number for number in self.claims if number not in CLAIMS]
        known = "; ".join(f"{number} {each.statement}" for number, each in CLAIMS.items())
        require(not unknown, f"claims holds {unknown[:1]}, but the claims are {known}")
        _ = self.seconds

    @property
    def chosen(self) -> Sequence[Claim]:
        return [CLAIMS[number] for number in self.claims or CLAIMS]

    @property
    def seconds(self) -> float:
        """Of the budget."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", self.budget)
        require(bool(found) or not self.budget, f"budget is {self.budget!r}, but must be a time, as in 90s, 20m or 2h")
        return float(found[1]) * UNITS[found[2]] if found else float("inf")


def mean(value: float, deviation: float | None) -> tuple[str, str]:
    """Of seeds that all gave the same no deviation says how many digits count."""
    return (f"{value:.4g}", "exactly") if deviation == 0 else numbers.with_error(value, deviation)


COLUMNS = (
    figure("effect", "name", str),
    figure("mean ± s.d. of seeds", "effect", mean, "effect_sd"),
    figure("rule", "rule", str),
    figure("detectable", "detectable", numbers.three_digits),
    figure("seeds", "seeds", str),
    figure("verdict", "verdict", str),
    figure("the claim", "claim", str),
    figure("minutes", "minutes", "{:.1f}".format),
    figure("a verdict would take", "a_verdict_would_take", str),
)


@run_directory.locked
def main(run: Run, model: ModelShape, train: TrainConfig, score: Scoring, mesh: MeshConfig) -> None:
    if run.list:
        return show_list(run)
    log = Journal(run.run_dir, command_line("experiments.claims", sys.argv))
    began = {"corpus": run.corpus, "split": run.split, "model": dataclasses.asdict(model)}
    began |= {"train": dataclasses.asdict(train), "score": dataclasses.asdict(score)}
    found = resumed(log.folder / "results.json", began)
    lab = prepared(run, model, train, score, mesh)
    names = [str(seed) for seed in range(run.seed, run.seed + run.seeds)]
    for each in run.chosen:  # the rules are in the file before the first figure is
        found.setdefault(str(each.number), {"rules": each.rules, "seeds": {}, "minutes": 0.0})
    todo = [(each, seed) for each in run.chosen for seed in names if seed not in found[str(each.number)]["seeds"]]
    tell = functools.partial(write, log, run, found, began)
    tell()
    spent, expected, left_out = 0.0, 0.0, []
    for index, (each, seed) in enumerate(todo):
        pace = spent / expected if expected else 1.0
        if time.perf_counter() - log.began + pace * cost(each) > run.seconds:
            left_out.append(f"{each.number} (seed {seed})")
            continue
        rest = pace * sum(cost(other) for other, _ in todo[index:])
        log.say(f"claim {each.number}, seed {seed}: {each.statement} About {rest / 60:.0f} min left of all.")
        start = time.perf_counter()
        try:
            figures = each.measure(lab, int(seed))
        except InputError as error:  # the other claims go on, and the next run tries again
            log.say(f"claim {each.number}, seed {seed}, failed: {error}")
            continue
        took = time.perf_counter() - start
        require(figures.keys() == each.rules.keys(), f"claim {each.number} gave {list(figures)}: name its effects")
        mine = found[str(each.number)]
        mine["seeds"][seed], mine["minutes"] = figures, mine["minutes"] + took / 60
        spent, expected = spent + took, expected + cost(each)
        tell()
    if left_out:
        log.say(f"left out for the budget of {run.budget}: claims {', '.join(left_out)}")
    report(log, run, *tell())


def cost(each: Claim) -> float:
    """Seconds of a seed at the default sizes."""
    return 60 * each.minutes / claim.LEAST_SEEDS


def resumed(file: Path, began: dict[str, Any]) -> dict[str, Any]:
    """{number: rules, figures of each seed, minutes} of what was measured. Raises InputError where a run of other sizes
    or rules wrote it."""
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text())
        found, before = known["claims"], known["began"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not of this experiment: give another --run_dir") from None
    mine = json.loads(run_directory.to_json(began))
    other = [name for name in mine if mine[name] != before.get(name)]
    require(not other, f"{file.parent} was begun with another {', '.join(other)}: give another --run_dir")
    for number, each in found.items():
        known = number.isdigit() and int(number) in CLAIMS
        require(
            known and each["rules"] == CLAIMS[int(number)].rules,
            f"the rules of claim {number} are not those that {file.parent} was begun with: give another --run_dir",
        )
    return found


def prepared(run: Run, model: ModelShape, train: TrainConfig, score: Scoring, mesh: MeshConfig) -> Lab:
    train.require_within(model.max_length)
    require(train.steps >= LEAST_STEPS, f"train.steps is {train.steps}, but runs of a share of it need {LEAST_STEPS}")
    run_directory.require_writable(Path(run.run_dir), needs=run_directory.SMALL_FILES)
    train = autotune.training(model.config(), train)
    sizes = {"vocabulary": model.vocabulary, "length": train.length, "batch": train.batch}
    data = dataset.prepare(run.corpus, dataset.cache(), **sizes)
    user_cache.use_compilation_cache()
    print(data.corpus.describe())
    text = getattr(data, run.split)
    score = score.within(model.max_length, train.length, text.unbroken)
    devices = meshes.mesh_for(mesh, train.batch, train.length, train.accumulate)
    return Lab(model, train, data, text, score, devices, Path(run.run_dir) / "models")


# --- what is shown ---------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """A row for each effect, and {number: verdict} of the claims."""
    rows, verdicts = [], {}
    for number, mine in sorted(found.items(), key=lambda each: int(each[0])):
        each, seeds = CLAIMS[int(number)], mine["seeds"]
        judged = claim.findings(each, seeds)
        verdicts[number] = claim.concluded([one.verdict for one in judged.values()])
        for index, (effect, one) in enumerate(zip(each.effects, judged.values(), strict=True), 1):
            figures = {
                "effect": one.mean,
                "effect_sd": one.deviation,
                "rule": effect.rule or table.NONE,
                "detectable": one.detectable,
                "seeds": len(seeds),
                "verdict": one.verdict,
                "claim": verdicts[number],
                "minutes": round(mine["minutes"], 1),
                "a_verdict_would_take": one.takes or table.NONE,
                "by_seed": {seed: values[effect.name] for seed, values in seeds.items()},
            }
            rows.append(Row(f"{number}.{index} {effect.name}", figures))
    return rows, verdicts


def facts_of(run: Run, found: dict[str, Any], verdicts: dict[str, str]) -> list[str]:
    tested = sum(bool(rule) for number in found for rule in CLAIMS[int(number)].rules.values())
    chance = (1 - claim.CONFIDENCE) / 2
    return [
        *(f"Claim {number}: {verdict}. {CLAIMS[int(number)].statement}" for number, verdict in verdicts.items()),
        f"Supported: the {claim.CONFIDENCE:.0%} interval of the mean over seeds (Student's t) lies beyond the bound; "
        "not supported: it lies on the other side; else undecided. Rules were written before the run.",
        f"Of {tested} rules about {chance * tested:.1f} would be met, and as many missed, by chance alone if every "
        "effect were just at its bound.",
        "Detectable: how far from its bound an effect must be for these seeds to find it with a chance of "
        f"{claim.POWER:.0%}.",
        f"One small model, trained on {corpora.name_of(run.corpus)}: a claim that holds here may fail for larger ones, "
        "and one that fails here may hold for them.",
    ]


def write(
    log: Journal, run: Run, found: dict[str, Any], began: dict[str, Any]
) -> tuple[list[Row], list[str], dict[str, str]]:
    """Write results.json. Gives the rows, what is said of them, and the verdicts."""
    rows, verdicts = rows_of(found)
    facts = facts_of(run, found, verdicts)
    log.results(facts, rows=rows, claims=found, began=began, verdicts=verdicts)
    return rows, facts, verdicts


def report(log: Journal, run: Run, rows: list[Row], facts: list[str], verdicts: dict[str, str]) -> None:
    table.show(rows, facts, COLUMNS)
    details = {row.name: detail(CLAIMS[int(row.name.partition(".")[0])], row) for row in rows}
    caption = "Each effect beside its rule; select one for its claim, protocol and seeds."
    words = {}
    for number, verdict in verdicts.items():
        words.setdefault(verdict, []).append(f"{number}. {CLAIMS[int(number)].statement}")
    log.report(
        facts,
        title="Which claims of the literature hold here",
        verdicts=[Verdict(each, f"{len(said)} of {len(verdicts)}", " ".join(said)) for each, said in words.items()],
        sections=[Section("The effects", [Table(caption=caption, columns=COLUMNS, rows=rows, details=details)])],
        made={"seeds": run.seeds},
    )


def detail(each: Claim, row: Row) -> Detail:
    parts = {
        "Claim": f"{each.statement} ({each.source})",
        "Question": each.question,
        "Protocol": each.protocol,
        "By seed": "; ".join(
            f"{seed}: {value if value is None else f'{value:.5g}'}" for seed, value in row.by_seed.items()
        ),
    }
    return Detail(
        lineage=list(parts.items()), command=command_line("experiments.claims", ["", f"--claims={each.number}"])
    )


def show_list(run: Run) -> None:
    for each in run.chosen:
        print(f"{each.number:2} {each.statement} ({each.minutes:g} min; {each.source})")
        for effect in each.effects:
            print(f"     {effect.name} {effect.rule or '(for the record)'}")
    print(f"about {sum(each.minutes for each in run.chosen):.0f} min on two quiet cores, at the default sizes")


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), model=MODEL, train=TRAIN, score=Scoring(), mesh=MeshConfig())
