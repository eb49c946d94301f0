"""Compress a trained model by a recipe, and show before and after side by side.

    python -m experiments.compress --model=runs/quickstart --recipe=w8a8
    python -m experiments.compress --model=runs/quickstart --recipe=masks50,w8a16 --prune.sparsity=0.3

Expect a table of both models, and in the run directory the compressed model as `<recipe>.safetensors`, its
tokenizer, `results.json` and `report.html`.
"""

import dataclasses
import sys
from pathlib import Path

from efflm import rundir
from efflm.compress import recipe
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.prune import Prune
from efflm.compress.quantize import Quantize
from efflm.compress.shrink import Shrink
from efflm.compress.step import Context
from efflm.config import flag, require
from efflm.data import dataset
from efflm.evaluate.cost import Protocol
from efflm.flags import command_line, launch
from efflm.formats import safetensors
from efflm.model import sharding
from efflm.report import page, plots, rows, table
from experiments.evaluate import cache_of, load_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(rundir.ROOT / "quickstart"), "directory of a training run, or a .safetensors file of efflm's")
    recipe: str = flag("w8a16", f"one of {', '.join(recipe.RECIPES)}; or several joined by commas, one after another")
    corpus: str = flag("", "file or folder of UTF-8 text, or 'stdlib'; default: the text the model was trained on")
    run_dir: str = flag(str(rundir.ROOT / "compress"), "where everything is written")
    batch: int = flag(8, "rows in a batch, where a step trains")
    length: int = flag(256, "tokens in a row")
    seed: int = flag(0, "seed of whatever a step draws")

    def __post_init__(self):
        recipe.named(self.recipe)
        for name in ("batch", "length"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


def main(run: Run, quantize: dict, prune: dict, finetune: dict, distill: dict, shrink: dict) -> None:
    changes = {Quantize: quantize, Prune: prune, Finetune: finetune, Distill: distill, Shrink: shrink}
    steps = recipe.override(recipe.named(run.recipe), changes)
    run_dir, mesh = Path(run.run_dir), sharding.data_parallel(run.batch)
    rundir.require_writable(run_dir, needs=50_000_000)
    dense, tokens, about, _ = load_source(run.model, mesh)
    data = dataset.prepare(
        run.corpus or about["source"],
        cache_of(run.model),
        vocabulary=dense.config.vocabulary,
        length=run.length,
        batch=run.batch,
        tokenizer=tokens,
    )
    context = Context(batches=data.batches(run.batch, run.seed), seed=run.seed, mesh=mesh)
    compressed, records = recipe.run(dense, steps, context)

    name = run.recipe.replace(",", "+")
    run_dir.mkdir(parents=True, exist_ok=True)
    models = {"before": dense, name: compressed}
    sizes = {key: safetensors.save(run_dir / f"{key}.safetensors", model, about) for key, model in models.items()}
    tokens.save(run_dir / "tokenizer.json")
    protocol = Protocol().within(dense.config.context)
    measured, _ = rows.collect(
        models,
        sizes,
        {"before": f"from {run.model}", name: ", then ".join(map(repr, steps))},
        data.test[:],
        tokens.token_bytes,
        dense,
        protocol,
    )
    facts = [f"Quality: {data.protocol}.", f"Speed: {protocol}."]
    table.show(measured, facts)
    plots.pareto(measured, run_dir / "pareto.png")
    versions, command = rundir.machine(), command_line("experiments.compress", sys.argv)
    page.write(
        run_dir / "report.html",
        title=f"efflm: {name}",
        rows=measured,
        facts=facts,
        plot=run_dir / "pareto.png",
        samples={},
        command=command,
        versions=versions,
    )
    rundir.write_json(
        run_dir / "results.json",
        {
            "rows": [dataclasses.asdict(row) for row in measured],
            "records": [dataclasses.asdict(record) for record in records],
            "protocol": facts,
            "command": command,
            "versions": versions,
        },
    )
    print(f"{run_dir / f'{name}.safetensors'} and {run_dir / 'report.html'}")


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), quantize=Quantize, prune=Prune, finetune=Finetune, distill=Distill, shrink=Shrink)
