"""Plan a run for hardware that is not here: one device's memory, traffic and time, from the real program.

    bash launch/run.sh experiments.plan --model=llama3-8b --mesh.fsdp=64
    bash launch/run.sh experiments.plan --model=llama3-70b --hardware=v5p:8x8x8
    bash launch/run.sh experiments.plan --model=llama3-8b --hardware=h200 --devices=64 --search
    bash launch/run.sh experiments.plan --model=llama3-70b --hardware=h100 --phase=decode --int8 --mesh.tensor=8

Expect, in about a minute, tables of what each device holds, of the collectives in the compiled step, and of the times
that compute, memory and network take at the least on the named hardware; and whether it fits. The step that is compiled
is the one that trains, for the mesh asked for, and no weights are allocated. With a TPU topology and libtpu installed
(pip install libtpu==0.0.42 for jax 0.10.2; no TPU is needed) it is the TPU's compiler that says so, else the CPU's, for
as many fake devices; the output says which. --search ranks meshes, remat policies and batches by FLOPs and bytes, then
compiles the first ones, at most --tried, until one fits. In the run directory: report.html and results.json.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efflm.cli import progress, run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress.quantize import quantize
from efflm.config import flag, require, require_positive
from efflm.config.model import ModelConfig
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.infer import aot as infer_ahead
from efflm.model import LanguageModel, init_params
from efflm.model.presets import preset
from efflm.parallel import meshes
from efflm.plan import device, hardware, search, work
from efflm.plan.collectives import collectives
from efflm.plan.hardware import Hardware
from efflm.precision import POLICIES, cast
from efflm.report import numbers, planned, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table
from efflm.train import aot as train_ahead

BFLOAT16 = POLICIES["bfloat16_pure"]  # of served models
OF_TPU = "for the TPU's give a topology, as in v5p:4x4x4, and pip install libtpu==0.0.42 (jax 0.10.2); no TPU is needed"
SHOWN = 8  # candidates of a search
# The pass makes float32 sums of those in bfloat16, as others do too, and aborts at sums made inside of shard_map.
OF_CPU = {"xla_disable_hlo_passes": "all-reduce-promotion"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(run_directory.ROOT / "plan"), "where everything is written", path=True)
    model: str = flag("llama3-8b", "a published model by name, such as llama3-70b, llama3.2-1b, smollm2-135m, gpt2-xl")
    hardware: str = flag("v5p", "h100, h200, v5e, v5p or v6e; a TPU with its topology too, as in v5p:4x4x4")
    devices: int = flag(0, "how many; 0: as many as the topology has, or the mesh asks for")
    phase: Literal["train", "prefill", "decode"] = flag("train", "what is planned")
    search: bool = flag(False, "rank meshes, remat policies and batches by FLOPs and bytes")
    tried: int = flag(3, "candidates of the search that are compiled at most, until one fits; 0: only rank them")
    rows: int = flag(64, "sequences that are prefilled or decoded at a time, over all devices")
    cache_length: int = flag(4096, "tokens of the prompt that is prefilled, or positions in the cache while decoding")
    int8: bool = flag(False, "weights in int8 for prefill and decode, in place of bfloat16")
    activations: Literal["float", "int8"] = flag("float", "int8: the activations too (W8A8), where the weights are")

    def __post_init__(self):
        require(self.devices >= 0, f"devices is {self.devices}, but must be positive, or 0 for what the mesh asks for")
        require(self.tried >= 0, f"tried is {self.tried}, but must be positive, or 0 to compile none")
        require_positive(self, "rows", "cache_length")
        training = self.phase == "train"
        require(training or not self.search, f"search knows training only: leave out --phase={self.phase}")
        require(not training or not self.int8, "int8 is for --phase=prefill and decode: weights train in float")
        require(self.int8 or self.activations == "float", "activations in int8 need weights in int8: add --int8")


TRAIN = TrainConfig(batch=512, length=4096, policy="bfloat16", scan=True, remat="full")
MESH = MeshConfig(data=1, fsdp=-1)


@run_directory.locked
def main(run: Run, mesh: MeshConfig, train: TrainConfig) -> None:
    config, log = preset(run.model), Journal(run.run_dir, command_line("experiments.plan", sys.argv))
    require(
        train.policy != "auto",
        "train.policy is auto, which is measured on the machine that trains: to plan for another give float32 or "
        "bfloat16",
    )
    chip, topology = hardware.parse(run.hardware)
    name, length = ("train.length", train.length) if run.phase == "train" else ("cache_length", run.cache_length)
    require(
        length <= config.max_length,
        f"{name} {length} is longer than the max_length of {run.model}, {config.max_length}: lower {name}",
    )
    devices = how_many(run, mesh, topology)
    run_directory.require_writable(log.folder, needs=run_directory.SMALL_FILES)
    if run.tried or not run.search:
        start(devices)
    out: dict[str, Any] = {"model": run.model, "hardware": dataclasses.asdict(chip), "devices": devices}
    tables, facts, tried = [], [], [(mesh, train)]
    if run.search:
        found = search.search(config, train, chip, devices)
        fit, change = sum(each.fits for each in found), f"a batch of {train.batch} rows of {train.length}"
        require(
            len(found) > 0, f"no mesh of {devices} devices divides {change} and the widths of {run.model}: change one"
        )
        tables.append(planned.ranked(found[:SHOWN]))
        facts.append(
            f"{len(found)} candidates, {fit} of which fit into the {numbers.size(chip.memory)} of a {chip.name}, as "
            "far as state, gradients and stored activations tell: a compiler may need more, or less."
        )
        table.show(tables[0].rows, facts, tables[0].columns)
        require(fit > 0, f"nothing fits: more devices than {devices}, or a smaller train.batch than {train.batch}, may")
        out["search"] = [dataclasses.asdict(each) for each in found[:SHOWN]]
        tried = [(MeshConfig(**each.sizes), each.train) for each in found[: run.tried]]
    result, made, words = {}, [], []
    for sizes, settings in tried:
        result, made, words = compiled(run, config, settings, sizes, chip, topology, log)
        table.show(made[0].rows, words, made[0].columns)
        if result["fits"]:
            break
    log.results(facts + words, **out, **result)
    log.report(
        facts + words,
        title=f"{run.model} on {devices} × {chip.name}: memory, collectives and times, predicted",
        sections=[Section("The plan", tables + made)],
    )


def how_many(run: Run, mesh: MeshConfig, topology: str) -> int:
    """Devices, by the topology, the flag or the mesh."""
    sizes = [size for size in dataclasses.astuple(mesh) if size != -1]
    known, asked = hardware.chips(topology) if topology else run.devices, math.prod(sizes)
    require(
        not topology or run.devices in (0, known),
        f"devices is {run.devices}, but {run.hardware} has {known}: leave out --devices",
    )
    require(
        known > 0 or len(sizes) == 4 or asked > 1,
        "the number of devices is not known: give --devices, sizes of the mesh, or a topology as in "
        "--hardware=v5p:4x4x4",
    )
    require(
        run.search or len(sizes) < 4 or asked == (known or asked),
        f"the mesh has {asked} devices, but {run.hardware if topology else '--devices'} has {known}: make the product "
        f"of its axes {known}",
    )
    return known or asked


# --- compiling -------------------------------------------------------------------------------------------------------


def start(devices: int) -> None:
    """As many fake CPU devices, and no other backend: before JAX has started. A test has started it already."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        require(jax.device_count() >= devices, f"{devices} devices are asked for, but JAX started with fewer")


def trained(
    config: ModelConfig, train: TrainConfig, mesh: Mesh
) -> tuple[Any, dict[str, Any], work.Work, device.Traffic, str]:
    """The lowered training step; its arguments by kind; what a device computes and receives; the dtype of matmuls."""
    step, (state, frozen, batch) = train_ahead.training_step(config, train, mesh)
    given = {"weights": state.trainable, "optimizer state": state.optimizer, "batch": batch}
    mine = device.train_work(config, train, mesh, state)
    traffic = device.train_traffic(config, train, mesh, state.trainable)
    return step.lower(state, frozen, batch), given, mine, traffic, POLICIES[train.policy].compute


def served(run: Run, config: ModelConfig, mesh: Mesh) -> tuple[Any, dict[str, Any], work.Work, device.Traffic, str]:
    """The same of prefill or decode, in bfloat16, or in int8 with scales in bfloat16."""

    def stored() -> Any:
        params = cast(init_params(config, 0), jnp.bfloat16)
        return quantize(params, run.activations) if run.int8 else params

    model = LanguageModel(dataclasses.replace(config, precision=BFLOAT16.compute), jax.eval_shape(stored))
    prefilling, rows, length = run.phase == "prefill", run.rows, run.cache_length
    step, arguments = (infer_ahead.prefill if prefilling else infer_ahead.decode)(model, rows, length, mesh)
    given = {"weights": arguments[0].params} | ({} if prefilling else {"keys and values": arguments[1].cache.layers})
    weights = device.part_bytes(given["weights"])
    mine = device.infer_work(config, run.phase, rows, length, BFLOAT16, mesh, weights)
    traffic = device.infer_traffic(config, rows * (length if prefilling else 1), mesh, model.params)
    return step.lower(*arguments), given, mine, traffic, "int8" if run.activations == "int8" else BFLOAT16.compute


def compiled(
    run: Run, config: ModelConfig, train: TrainConfig, sizes: MeshConfig, chip: Hardware, topology: str, log: Journal
) -> tuple[dict[str, Any], list[Table], list[str]]:
    """Compile, and return the results, their table and what is to be said."""
    training = run.phase == "train"
    shared = (train.batch, train.length, train.accumulate) if training else (run.rows, run.cache_length)
    mesh, options = meshes.mesh_for(sizes, *shared), OF_CPU
    how = f"the CPU's compiler, for {mesh.size} fake devices" + f" ({OF_TPU})" * (chip.torus > 0)
    if topology and importlib.util.find_spec("libtpu"):
        mesh, options = meshes.make_mesh(**mesh.shape, devices=hardware.tpu_devices(chip, topology)), {}
        how = f"the TPU's compiler (libtpu {importlib.metadata.version('libtpu')}), for {run.hardware}"
    with progress.bar("tracing the step"):
        lowered, given, mine, traffic, dtype = trained(config, train, mesh) if training else served(run, config, mesh)
    log.say("traced")
    with progress.bar("compiling the step"):
        program, refused = compile_or_why_not(lowered, options)
    log.say(f"compiled by {how}")
    seconds = device.seconds(mine, traffic, chip, dtype, mesh)
    held, sent = planned.holdings(given, program), collectives(program.as_text()) if program else []
    rows = [*held, *planned.sendings(sent), *planned.bounds(seconds, mine.nbytes, sum(traffic.values()), chip, dtype)]
    least = max(seconds.values())
    rate = shared[0] * (1 if run.phase == "decode" else shared[1]) / least
    needed, count = held[-1].nbytes, sum(work.parameters(config).values()) / 1e9
    fits = bool(program) and needed <= chip.memory
    share = f"{numbers.size(needed)} of the {numbers.size(chip.memory)} of a {chip.name} ({needed / chip.memory:.0%})"
    settings = f"{train.policy}, remat {train.remat}, {train.optimizer}"
    if not training:
        settings = f"weights in {'int8' if run.int8 else 'bfloat16'}"
        settings += ", activations too" * (run.activations == "int8")
    facts = [
        f"{run.model}, {count:.2f} B parameters, on {mesh.size} x {chip.name} ({planned.axes(mesh.shape)}): "
        f"{run.phase}, {shared[0]:,} sequences of {shared[1]:,}, {settings}.",
        f"Compiled by {how}.",
        f"The step takes {numbers.seconds(least)} or more, bound by {planned.bound(seconds)} "
        f"({numbers.seconds(sum(seconds.values()))} if nothing overlaps): at most {rate:,.0f} tokens/s.",
        f"It {'fits' if fits else 'does NOT fit'}: {share if program else refused}.",
    ]
    if training:
        used = work.train_flops(config, train.batch, train.length) / mesh.size / least
        facts.append(f"Model FLOP utilization: at most {used / chip.peak(dtype):.0%}.")
    if options == OF_CPU:
        facts.append(
            "The CPU's compiler keeps its loops in float32 and attention's scores in memory, and so needs more "
            f"temporaries than that of a {chip.name}. It sends float32 for bfloat16, and whole sums (all-reduce) where "
            "a slice is read (reduce-scatter): up to four times the bytes."
        )
    result = {
        "mesh": dict(mesh.shape),
        "train": dataclasses.asdict(train) if training else None,
        "compiler": how,
        "fits": fits,
        "rows": [each.json() for each in rows],
        "collectives": [dataclasses.asdict(each) for each in sent],
        "bound": planned.bound(seconds),
        "seconds_a_step": least,
        "tokens_a_second": rate,
    }
    return result, [Table(caption="One device and one step.", columns=planned.COLUMNS, rows=rows)], facts


def compile_or_why_not(lowered: Any, options: dict[str, str]) -> tuple[Any, str]:
    """The program; or None and the line with which the TPU's compiler refuses one that does not fit."""
    try:
        return lowered.compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).strip().splitlines()[0]


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), mesh=MESH, train=TRAIN)
