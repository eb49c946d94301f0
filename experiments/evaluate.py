"""Measure a model: likelihood of text, divergence from a reference, size, and speed on this machine.

    bash launch/run.sh experiments.evaluate --model=runs/quickstart
    bash launch/run.sh experiments.evaluate --model=runs/quickstart/models/w8a8.safetensors --reference=runs/quickstart
    bash launch/run.sh experiments.evaluate --models="smollm2 someone/gptq-int4 runs/w4a16"
    bash launch/run.sh experiments.evaluate --model=smollm2 --text=~/notes --score.documents=0 --score.tokens=0
    bash launch/run.sh experiments.evaluate --model=smollm2 --tasks=arc_easy,data/own.jsonl --task.items=500
    bash launch/run.sh experiments.evaluate --model=smollm2 --harness=arc_easy,gsm8k --task.items=100

Expect a table with the protocol below it; with --run_dir also results.json in that directory. Text is read and scored
as a stream: memory does not grow with it.
"""

import dataclasses
import math
import shlex
import sys

import jax

from efflm import user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.config import at_home, flag, require
from efflm.config.parallel import MeshConfig
from efflm.data import dataset
from efflm.evaluate import lm_eval, machine, scoring, task_files
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import sources
from efflm.model import require_same_tokenizer
from efflm.parallel import meshes
from efflm.report import analysis, compared, measured, rows, table
from efflm.report.comparison import Limits
from efflm.report.journal import Journal
from efflm.report.page import Detail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    text: str = flag("", "file or folder of UTF-8 text, scored whole; default: the test split of --corpus", path=True)
    models: str = flag("", "several models in place of --model, spaces between them; the first is the reference")
    tasks: tuple[str, ...] = flag((), task_files.ASKED)
    harness: tuple[str, ...] = flag(
        (),
        "tasks of lm-eval, which fetches them, or of .yaml files in --task.folder, for its table too; it is an "
        "optional package: pip install lm-eval",
    )
    reference: str = flag("", "what divergence is from, given like --model; default: the model itself", path=True)
    run_dir: str = flag("", "where to write results.json and report.html; default: nowhere", path=True)


@run_directory.locked
def main(run: Run, score: Scoring, task: TaskFiles, mesh: MeshConfig, limits: Limits) -> None:
    log = Journal(run.run_dir, command_line("experiments.evaluate", sys.argv))
    if run.run_dir:
        run_directory.require_writable(log.folder, needs=1_000_000)
    asked_tasks = task_files.read(run.tasks, task)
    if run.harness:
        lm_eval.tasks_of(run.harness, task.folder)  # before the models are loaded
    any_rows = 2 * jax.device_count() * math.prod(abs(size) for size in dataclasses.asdict(mesh).values())
    devices = meshes.mesh_for(mesh, any_rows, any_rows)
    require(not (run.models and run.reference), "reference goes with --model: of --models the first is the reference")
    asked = [at_home(each) for each in shlex.split(run.models)] or [*filter(None, [run.reference]), run.model]
    loaded = [sources.load(each, precision=run.precision, mesh=devices) for each in asked]
    first, tokens, about = loaded[0].model, loaded[-1].tokenizer, loaded[-1].about
    for each in loaded[1:]:
        require_same_tokenizer(first, each.model, "reference", "model")
    text = dataset.to_score(run.text, run.corpus, about, tokens, dataset.cache(), run.strict)
    if text.left_out:
        print(text.left_out)
    score = score.within(
        min(each.model.config.max_length for each in loaded), about.get("train.length", 0), text.unbroken
    )
    user_cache.use_compilation_cache()
    names = rows.names(asked)
    models = {name: each.model for name, each in zip(names, loaded)}
    sizes = {name: each.nbytes for name, each in zip(names, loaded)}
    notes = {name: rows.origin(source, each.about) for name, source, each in zip(names, asked, loaded)}
    found = measured.of(models, sizes, notes, scoring.side_by_side(models, text, tokens, score, asked=asked_tasks))
    facts = [*found.facts, *rows.cautions(asked[-1], about, text.known)]
    asked_for = lambda model: lm_eval.evaluate(model, tokens, run.harness, task.folder, task.items)
    harness = {name: asked_for(model) for name, model in models.items()} if run.harness else {}
    if run.run_dir:
        of_harness = {"lm_eval": {name: each["results"] for name, each in harness.items()}} if harness else {}
        log.results(facts, rows=found.rows, **of_harness)
    table.show(found.rows, facts)
    for name, each in harness.items():
        print(f"{name} by lm-eval:", lm_eval.table(each), sep="\n")
    if run.run_dir:
        roofline = machine.measure((first.config.precision,))
        histories = {name: compared.before(notes[name], each.about) for name, each in zip(names, loaded)}
        log.report(
            facts,
            compared.write,
            title=f"{asked[-1]} measured" + (f" beside {', '.join(asked[:-1])}" if asked[1:] else ""),
            comparison=found.comparison(limits),
            details={name: Detail(lineage=lineage) for name, lineage in histories.items()},
            phases=analysis.inference(first, found.figures.protocol, found.figures.rates[names[0]], roofline),
        )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), score=Scoring(), task=TaskFiles(), mesh=MeshConfig(data=1), limits=Limits())
