"""The page of models measured side by side: verdicts, a table whose rows open, loss against each cost, training curves,
where bytes and time go."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efflm.report import numbers, page, plots, samples, table, tasks, verdicts
from efflm.report.analysis import NAMES
from efflm.report.comparison import Comparison, protocol, times
from efflm.report.page import Bars, Detail, Section, Table
from efflm.report.plots import Chart, Point
from efflm.report.rows import Row

Record = Any  # compress.step.Record, which is not imported here

Curve = tuple[np.ndarray, np.ndarray]  # steps, losses


def write(
    path: Path, *, title: str, comparison: Comparison, details: dict[str, Detail], phases: Sequence[Row],
    facts: Sequence[str], made: dict[str, str], command: str, curves: Mapping[str, Curve] | None = None,
) -> None:  # fmt: skip
    """The page. curves: of training, by name. phases: prefill and decode of the first model, by component. How the
    verdicts judge is added to the facts."""
    rows, several = comparison.rows, len(comparison.rows) > 1
    beside = " beside the first; × is the ratio to it. Select a name for how it was made" if several else ""
    found = [
        Section(
            "The models",
            [Table(caption=f"Each model{beside}.", columns=table.columns(rows), rows=rows, details=details)],
        )
    ]
    if names := tasks.names(rows):
        found.append(Section("Tasks", [of_task(rows, task) for task in names], tasks.READING))
    if several:
        words = (
            f"Lower left is better. The line joins the models that no other one beats in both. Vertical bars are "
            f"standard errors of the difference to {rows[0].name}, horizontal ones of the ratio to its time in the "
            f"same rounds; the vertical scale is linear up to {plots.LINEAR} and logarithmic beyond."
        )
        found.append(Section("Loss against cost", tradeoffs(rows), words))
    if curves:
        figure = plots.chart(
            plots.curves(curves, "steps"),
            "Training loss against steps: "
            + "; ".join(f"{name} ends at {y[-1]:.3f}" for name, (_, y) in curves.items()),
            "Of distilled models the loss is the mixture that is minimized, so it does not compare with the others'.",
        )
        found.append(Section("Training and distillation", [figure]))
    named = lambda sizes: {NAMES.get(name, name): nbytes for name, nbytes in sizes.items()}
    of_rows = {row.name: named(row.component_bytes) for row in rows}
    coded = any(sum(row.component_bytes.values()) > row.bytes for row in rows)
    caption = "Bytes on disk, by component" + (", before entropy coding" if coded else "")
    sizes = page.bars(caption, of_rows, "MB", 1e6)
    found.append(Section("Where the bytes and the time go", [sizes, *([time_bars(phases)] if phases else [])]))
    page.write(
        path,
        title=title,
        about=f"{made['date']} · {made['processor']}, {made['cores']} cores · commit {made['commit']}",
        verdicts=verdicts.positive(comparison) if several else (),
        against=verdicts.negative(comparison) if several else (),
        sections=found,
        facts=[*facts, *([protocol(comparison)] if several else [])],
        made=made,
        command=command,
    )


def of_task(rows: Sequence[Row], task: str) -> Table:
    """The answers to one task."""
    told = tasks.rows_of(rows, task)
    return Table(caption=tasks.caption(task, told[0]), columns=table.TASK, rows=told)


def tradeoffs(rows: Sequence[Row]) -> list[Chart]:
    """Loss over the first row against bytes, and against the time of decode and of prefill as a share of its time."""
    drawn = [against_bytes(rows)]
    for phase, label in (("decode", "a decoded token"), ("prefill", "a token of prefill")):
        costs = []
        for ratio, error in (times(row, phase) for row in rows):
            error = error or 0.0
            costs.append((1 / ratio, (1 / (ratio + error), 1 / max(ratio - error, ratio / 2))))
        drawn.append(_tradeoff(rows, costs, f"time of {label}, batch 1, over that of {rows[0].name}", "times the time"))
    return drawn


def against_bytes(rows: Sequence[Row]) -> Chart:
    """Loss over the first row against bytes, also of the rows of report.swept."""
    return _tradeoff(rows, [(row.bytes / 1e6, None) for row in rows], "MB on disk", "MB")


def _tradeoff(rows: Sequence[Row], costs: Sequence[tuple[float, Any]], label: str, unit: str) -> Chart:
    """costs: of each row, and what it may be."""
    points = [
        Point(
            row.name, cost, row.bits_per_byte_increase or 0.0, _error(row),
            f"{row.name}: {cost:.3g} {unit}, {_loss(row)}", span,
        )
        for row, (cost, span) in zip(rows, costs, strict=True)
    ]  # fmt: skip
    figure, front = plots.tradeoff(points, label)
    best = "; ".join(each.tip for each in front)
    alt = f"Loss over {rows[0].name} against {label}, {len(rows)} models. Not beaten: {best}."
    return plots.chart(figure, alt, f"Not beaten, by the medians: {', '.join(each.name for each in front)}.")


def _error(row: Row) -> float | None:
    """Of its increase: of seeds too, where there were several."""
    return row.figures.get("error", row.bits_per_byte_increase_stderr)


def _loss(row: Row) -> str:
    if row.bits_per_byte_increase is None:
        return "the reference"
    words = numbers.with_error(row.bits_per_byte_increase, _error(row), sign=True)
    return " ".join(filter(None, words)) + " bits/byte"


def time_bars(phases: Sequence[Row]) -> Bars:
    """Each bar is a phase of the first model, measured in all and split as predicted."""
    measured = "; ".join(
        f"{phase.name} {1e3 * phase.measured_seconds / phase.tokens:.3g} ms a token measured, "
        f"{1e3 * phase.predicted_seconds / phase.tokens:.3g} predicted"
        for phase in phases
        if phase.measured_seconds
    )
    caption = (
        "Time of the first model by component, as its FLOPs and bytes at this machine's measured speed predict: a "
        f"lower bound. {measured}."
    )
    per_token = {phase.name: {k: v / phase.tokens for k, v in phase.parts.items()} for phase in phases}
    return page.bars(caption, per_token, "ms a token", 1e-3, each_whole=True)


def details(
    origin: str, about: dict[str, Any], records: dict[str, Sequence[Record]], written: dict[str, list[int]],
    prompt: str, tokenizer: Any, commands: dict[str, str],
) -> dict[str, Detail]:  # fmt: skip
    """What each row opens to. origin, about: of the first model. records: of the steps from it to each model. written:
    the ids that each model writes after the prompt, {} for no samples."""
    first = next(iter(commands))
    compare = lambda name: samples.compare(prompt, written[name], written[first], tokenizer)
    found = {}
    for name, command in commands.items():
        shown = {each: compare(each) for each in dict.fromkeys((first, name))} if written else {}
        found[name] = Detail(
            lineage=[*before(origin, about), *map(_step, map(dataclasses.asdict, records.get(name, ())))],
            samples=shown,
            agreement=samples.agreement(written[name], written[first], first) if written and name != first else "",
            command=command,
        )
    return found


def before(origin: str, about: dict[str, Any]) -> list[tuple[str, str]]:
    """How the first model was made, as far as it is known. about: see formats.sources.Loaded."""
    if "train.steps" not in about:
        return [("loaded", origin), *map(_step, about.get("lineage", ()))]
    words = (
        f"{about['train.steps']} steps of {about['train.batch']} × {about['train.length']} tokens of "
        f"{about['source']}, {about['train.optimizer']}, learning rate {about['train.learning_rate']}, "
        f"{about['train.policy']}; seed {about['seed']}, text {about['corpus'][:12]}, tokenizer "
        f"{about['tokenizer'][:12]}"
    )
    return [("trained", words), *map(_step, about.get("lineage", ()))]


def _step(record: dict[str, Any]) -> tuple[str, str]:
    """A step of a model's lineage (the fields of compress.step.Record) in words."""
    given = ", ".join(f"{name}={value}" for name, value in record["settings"].items())
    text = f", text {record['corpus'][:12]}, tokenizer {record['tokenizer'][:12]}" if record["corpus"] else ""
    changed = f"{len(record['leaves'])} weight{'s' * (len(record['leaves']) != 1)}"
    words = f"({given}) changed {changed}; seed {record['seed']}{text}; made from model {record['parent']}"
    return record["step"], words
