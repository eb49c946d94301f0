"""Which matrices of a model need their bits: what it costs to round each one alone, in each format.

    bash launch/run.sh experiments.sensitivity --model=runs/quickstart
    bash launch/run.sh experiments.sensitivity --model=smollm2 --bits=4,3 --unit=layer --run_dir=runs/layers

Expect, after a bar with the time left, a table whose first rows cost most loss for each byte that they save: the
increase of the mean next-token loss over calibration text when that matrix alone is rounded, the divergence of the
outputs from the model's, and what the Fisher information predicts of it. The increase has the noise of the text; the
divergence has far less of it. In the run directory: results.json and report.html, with the divergence layer by layer.
The step mixed gives each matrix its bits by the predicted divergence.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from efflm import api, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.compress import recipe, sensitivity
from efflm.compress.mixed import Mixed
from efflm.compress.sensitivity import Unit
from efflm.compress.step import Calibration
from efflm.config import flag, require, require_seed
from efflm.data import dataset
from efflm.formats import sources
from efflm.ops import Format
from efflm.parallel import meshes
from efflm.report import numbers, page, rows, table
from efflm.report.journal import Journal
from efflm.report.page import Section
from efflm.report.rows import Row
from efflm.report.table import figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    bits: str = flag("8,4,3", "bits of a weight to try")
    groups: str = flag("32", "inputs that share a scale, to try; 0: all of an output")
    symmetric: bool = flag(True, "codes around zero; false: a zero point for each scale")
    clip: bool = flag(True, "choose the range of each scale by the least squared error")
    unit: Unit = flag("matrix", "what is rounded together: a matrix, those that read the same input, or a layer")
    rows: int = flag(16, "sequences of the training split that the model reads")
    length: int = flag(512, "tokens in each; no more than the model reads")
    show: int = flag(40, "rows of the table that are printed; 0: all. The report has them all")
    seed: int = flag(0, "seed of which sequences these are")
    run_dir: str = flag(str(run_directory.ROOT / "sensitivity"), "where everything is written", path=True)

    def __post_init__(self):
        require_seed(self.seed)
        require(self.show >= 0, f"show is {self.show}, but must be positive, or 0 for all rows")
        self.step  # noqa: B018  (which checks the format)

    @property
    def step(self) -> Mixed:
        """The step that would choose among these formats."""
        names = ("bits", "groups", "symmetric", "clip", "unit", "rows")
        return Mixed(**{name: getattr(self, name) for name in names})


def shown_row(row: sensitivity.Row) -> Row:
    figures = {name: getattr(row, name) for name in ("loss", "bits", "divergence", "predicted", "saved")}
    return Row(row.name, figures | {"format": str(row.format), "per_megabyte": row.loss / row.saved * 1e6})


six = functools.partial(numbers.fixed, places=6)
six_signed = functools.partial(six, sign=True)
COLUMNS = (
    figure("rounded alone", "name", str),
    figure("format", "format", str),
    figure("loss, nats/token", "loss", six_signed),
    figure("bits/token", "bits", six_signed),
    figure("divergence", "divergence", six),
    figure("predicted", "predicted", six),
    figure("MB saved", "saved", lambda nbytes: numbers.fixed(nbytes / 1e6, 3)),
    figure("nats for a MB", "per_megabyte", six_signed),
)


def by_layer(found: Sequence[sensitivity.Row], format: Format) -> page.Bars:
    """The divergence of each layer's matrices in one format, a bar a layer."""
    values: dict[str, dict[str, float]] = {}
    for row in found:
        block, _, name = row.name.partition("/")
        if row.format == format and block.startswith("block_"):
            values.setdefault(block.replace("_", " "), {})[name or "the layer"] = max(row.divergence, 0.0)
    caption = (
        f"Divergence from the model, each rounded alone to {format}: a bar a layer, stacked though they do not add"
    )
    return page.bars(f"{caption} up exactly.", values, "millinats a token", 1e-3)


@run_directory.locked
def main(run: Run) -> None:
    log = Journal(run.run_dir, command_line("experiments.sensitivity", sys.argv))
    run_directory.require_writable(log.folder, needs=run_directory.SMALL_FILES)
    mesh = meshes.data_parallel(run.rows)
    loaded = sources.load(run.model, precision=run.precision, mesh=mesh)
    recipe.require_finite(loaded.model)
    calibration = Calibration(rows=run.rows, length=run.length)
    context = api.context_for(
        [run.step], dataset.source_of(run.corpus, loaded.about), dataset.cache(), loaded.model, loaded.tokenizer,
        batch=run.rows, length=run.length, calibration=calibration, seed=run.seed, lower=("--rows or --length",) * 2,
        strict=run.strict,
    )  # fmt: skip
    user_cache.use_compilation_cache()
    how = {"rows": run.rows, "unit": run.unit, "seed": run.seed}
    found = sensitivity.sensitivity(loaded.model, context.calibration, run.step.formats, context.mesh, **how)
    ordered = sorted(found.rows, key=lambda row: row.loss / row.saved, reverse=True)
    shown = [shown_row(row) for row in ordered]
    facts = [
        f"Loss of the model as it is: {found.loss:.4f} nats a token, over {found.tokens:,} tokens of the training "
        f"split ({run.rows} sequences, seed {run.seed}). Each row: one {run.unit} alone is rounded.",
        "The increase of the loss has the noise of this text; the divergence, KL(model || rounded) in nats a token, is "
        "what it would be on text as the model expects it. Predicted: the divergence by the Fisher information.",
        *rows.cautions(run.model, loaded.about, seen=""),
    ]
    kept = [dataclasses.asdict(row) | {"bits_per_token": row.bits} for row in ordered]
    log.results(facts, loss=found.loss, tokens=found.tokens, rows=kept, seed=run.seed)
    table.show(shown[: run.show or None], facts, COLUMNS)
    if 0 < run.show < len(shown):
        print(f"  {len(shown) - run.show} more rows are in the report.")
    log.report(
        facts,
        title=f"{run.model}: which matrices need their bits",
        sections=[
            Section("Where it hurts", [by_layer(found.rows, run.step.coarsest)]),
            Section("Each alone", [page.Table(caption="Most loss for a byte first.", columns=COLUMNS, rows=shown)]),
        ],
        made={"seed": run.seed},
    )


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
