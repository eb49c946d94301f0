"""Plan a run for hardware that is not here: one device's memory, traffic and time, from the real program.

    python -m experiments.plan --model=llama3-8b --mesh.fsdp=64
    python -m experiments.plan --model=llama3-70b --hardware=v5p:8x8x8
    python -m experiments.plan --model=llama3-8b --hardware=h200 --devices=64 --search
    python -m experiments.plan --model=llama3-70b --hardware=h100 --phase=decode --int8 --mesh.fsdp=1 --mesh.tensor=8

Expect, in about a minute, tables of what each device holds (what is exact beside the compiler's figure), of the
collectives in the compiled step, and of the times that compute, memory and network take at the least on the named
hardware; and whether it fits. The step that is compiled is the one that trains, for the mesh asked for, and no weights
are allocated. With a TPU topology and libtpu installed (pip install libtpu==0.0.42 for jax 0.10.2; no TPU is needed) it
is the TPU's compiler that says so, else the CPU's, for as many fake devices; the output says which. --search ranks
meshes, remat policies and batches by FLOPs and bytes, then compiles the first ones, at most --tried, until one fits. In
the run directory: report.html and plan.json.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efflm.cli import progress, run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress.quantize import quantize
from efflm.config import flag, require
from efflm.config.model import ModelConfig
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.infer import aot as infer_ahead
from efflm.model import LanguageModel, init_params
from efflm.model.presets import preset
from efflm.parallel import meshes
from efflm.plan import collectives, device, hardware, prediction, search, work
from efflm.plan.device import Held
from efflm.plan.hardware import Hardware
from efflm.plan.work import Work
from efflm.precision import POLICIES, cast
from efflm.report import numbers, page, planned, table
from efflm.report.page import Section, Table
from efflm.train import aot as train_ahead

BFLOAT16 = POLICIES["bfloat16_pure"]  # of served models
LIBTPU = "pip install libtpu==0.0.42 (for jax 0.10.2) to ask the TPU's own compiler; no TPU is needed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(run_directory.ROOT / "plan"), "where plan.json is written", path=True)
    model: str = flag("llama3-8b", "a published model by name, such as llama3-70b, llama3.2-1b, smollm2-135m, gpt2-xl")
    hardware: str = flag("v5p", "h100, h200, v5e, v5p or v6e; a TPU with its topology too, as in v5p:4x4x4")
    devices: int = flag(0, "how many; 0: as many as the topology has, or the mesh asks for")
    phase: Literal["train", "prefill", "decode"] = flag("train", "what is planned")
    search: bool = flag(False, "rank meshes, remat policies and batches by FLOPs and bytes")
    compile: bool = flag(True, "compile; with --search, the first candidates until one fits")
    shown: int = flag(8, "candidates of the search that are shown")
    tried: int = flag(3, "candidates of the search that are compiled at most")
    rows: int = flag(64, "sequences that are prefilled or decoded at a time, over all devices")
    cache_length: int = flag(4096, "tokens of the prompt that is prefilled, or positions in the cache while decoding")
    int8: bool = flag(False, "weights in int8 for prefill and decode, in place of bfloat16")
    activations: Literal["float", "int8"] = flag("float", "int8: the activations too (W8A8), where the weights are")

    def __post_init__(self):
        require(self.devices >= 0, f"devices is {self.devices}, but must be positive, or 0 for what the mesh asks for")
        for name in ("shown", "tried", "rows", "cache_length"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        require(self.phase == "train" or not self.search, f"search knows training only: leave out --phase={self.phase}")
        require(
            self.phase != "train" or not self.int8, "int8 is for --phase=prefill and decode: weights train in float"
        )
        require(self.int8 or self.activations == "float", "activations in int8 need weights in int8: add --int8")


TRAIN = TrainConfig(batch=512, length=4096, policy="bfloat16", scan=True, remat="full")
MESH = MeshConfig(data=1, fsdp=-1)


@run_directory.locked
def main(run: Run, mesh: MeshConfig, train: TrainConfig) -> None:
    began, config, run_dir = time.perf_counter(), preset(run.model), Path(run.run_dir)
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
    run_directory.require_writable(run_dir, needs=run_directory.SMALL_FILES)
    if run.compile:
        start(devices)
    out: dict[str, Any] = {"model": run.model, "hardware": dataclasses.asdict(chip), "devices": devices}
    tables, facts, tried = [], [], [(mesh, train)]
    if run.search:
        found = search.search(config, train, chip, devices)
        require(
            len(found) > 0,
            f"no mesh of {devices} devices divides a batch of {train.batch} rows of {train.length} and the widths of "
            f"{run.model}: change one of them",
        )
        shown, fit = found[: run.shown], sum(each.fits for each in found)
        facts += [
            f"{len(found)} candidates, {fit} of which fit into the {numbers.size(chip.memory)} of a {chip.name}, as "
            "far as state, gradients and stored activations tell: a compiler may need more, or less."
        ]
        ranked, columns = planned.ranked(shown), planned.SEARCH_COLUMNS
        tables.append(Table(caption="The fastest candidates.", columns=columns, rows=ranked))
        table.show(ranked, facts, columns)
        more = f"more devices than {devices}, or a smaller train.batch than {train.batch}, may"
        require(fit > 0, f"nothing fits: {more}")
        out["search"] = [dataclasses.asdict(each) for each in shown]
        tried = [(MeshConfig(**each.sizes), each.train) for each in found[: run.tried]]
    for each, settings in tried if run.compile else []:
        result, made, words = compiled(run, config, settings, each, chip, topology)
        for one in made:
            table.show(one.rows, words if one is made[-1] else [], one.columns)
        if result["fits"]:
            break
    if run.compile:
        out, tables, facts = out | result, tables + made, facts + words
    versions, command = run_directory.machine(), command_line("experiments.plan", sys.argv)
    out |= {"facts": facts, "seconds": time.perf_counter() - began, "versions": versions, "command": command}
    run_directory.write_json(run_dir / "plan.json", out)
    page.write(
        run_dir / "report.html",
        title=f"{run.model} on {devices} × {chip.name}: memory, collectives and times, predicted",
        sections=[Section("The plan", tables)],
        facts=facts,
        made=page.made(versions, total_time=page.duration(out["seconds"])),
        command=command,
    )
    print(f"[{out['seconds']:4.0f} s] done: open {run_dir / 'report.html'}, or read plan.json beside it")


def how_many(run: Run, mesh: MeshConfig, topology: str) -> int:
    """Devices, by the topology, the flag or the mesh."""
    asked = {name: size for name, size in dataclasses.asdict(mesh).items() if size != -1}
    fixed = math.prod(asked.values())
    if not topology:
        require(
            bool(run.devices) or len(asked) == 4 or fixed > 1,
            "the number of devices is not known: give --devices, sizes of the mesh, or a topology as in "
            "--hardware=v5p:4x4x4",
        )
        return run.devices or fixed
    count = hardware.chips(topology)
    require(run.devices in (0, count), f"devices is {run.devices}, but {run.hardware} has {count}: leave out --devices")
    require(
        run.search or len(asked) < 4 or fixed == count,
        f"the mesh has {fixed} devices, but {run.hardware} has {count}: make the product of its axes {count}",
    )
    return count


# --- compiling -------------------------------------------------------------------------------------------------------


def start(devices: int) -> None:
    """As many fake CPU devices, and no other backend: before JAX has started. A test has started it already."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        require(jax.device_count() >= devices, f"{devices} devices are asked for, but JAX started with fewer")


def mesh_of(run: Run, sizes: MeshConfig, rows: tuple[int, ...], chip: Hardware, topology: str) -> tuple[Mesh, str]:
    """The mesh to compile for, and who compiles."""
    by_tpu = bool(topology) and importlib.util.find_spec("libtpu") is not None
    mesh = meshes.mesh_for(sizes, *rows)
    if by_tpu:
        mesh = meshes.make_mesh(**mesh.shape, devices=hardware.tpu_devices(chip, topology))
        return mesh, f"the TPU's compiler (libtpu {importlib.metadata.version('libtpu')}), for {run.hardware}"
    how = f"the CPU's compiler, for {mesh.size} fake devices"
    example = f"--hardware={chip.name}:{'x'.join('4' * chip.torus)}"
    hint = LIBTPU if topology else f"a topology, as in {example}, asks the TPU compiler"
    return mesh, f"{how} ({hint})" if chip.torus else how


def compiled(
    run: Run, config: ModelConfig, train: TrainConfig, sizes: MeshConfig, chip: Hardware, topology: str
) -> tuple[dict[str, Any], list[Table], list[str]]:
    """Compile, and return the results, the tables and what is to be said."""
    began, training = time.perf_counter(), run.phase == "train"
    batch, length = (train.batch, train.length) if training else (run.rows, run.cache_length)
    mesh, how = mesh_of(run, sizes, (batch, length, train.accumulate if training else 1), chip, topology)
    with progress.bar("tracing the step"):
        lowered, held, mine, dtype = trained(config, train, mesh) if training else served(run, config, mesh)
    print(f"[{time.perf_counter() - began:4.0f} s] traced", flush=True)
    with progress.bar("compiling the step"):
        program, refused = compile_or_why_not(lowered)
    print(f"[{time.perf_counter() - began:4.0f} s] compiled by {how}", flush=True)
    stats, found = program and program.memory_analysis(), collectives.collectives(program.as_text()) if program else []
    if training and not program:
        found = prediction.train_traffic(config, train, device.abstract_mesh(**mesh.shape))
    predicted = prediction.predict(mine, found, chip, dtype, mesh.size)
    rate = batch * (1 if run.phase == "decode" else length) / predicted.seconds
    needed = planned.on_device(stats) if stats else held.total
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    weights = f"weights in {'int8' if run.int8 else 'bfloat16'}"
    weights += ", activations too" * (run.activations == "int8")
    settings = f"{train.policy}, remat {train.remat}, {train.optimizer}" if training else weights
    facts = [
        f"{run.model}, {sum(work.parameters(config).values()) / 1e9:.2f} B parameters, on {mesh.size} x {chip.name} "
        f"({axes}): {run.phase}, {batch:,} sequences of {length:,}, {settings}.",
        f"Compiled by {how}.",
        f"The step takes {numbers.seconds(predicted.seconds)} or more, bound by {predicted.bound} "
        f"({numbers.seconds(predicted.unhidden)} if nothing overlaps): at most {rate:,.0f} tokens/s.",
        planned.fits(needed, chip) if program else f"It does NOT fit: {refused}",
    ]
    if training:
        used = work.train_flops(config, train.batch, train.length) / mesh.size / predicted.seconds
        facts.append(f"Model FLOP utilization: at most {used / chip.peak(dtype):.0%}.")
    if how.startswith("the CPU"):
        facts.append(
            "The CPU's compiler keeps its loops in float32 and attention's scores in memory, and so needs more "
            f"temporaries than that of a {chip.name}."
        )
    rows, traffic = planned.holdings(held, stats), planned.traffic(found, chip, mesh.size)
    times = planned.times(predicted, chip, dtype)
    tables = [
        Table(caption="Bytes on one device.", columns=planned.BYTES_COLUMNS, rows=rows),
        Table(caption="Collectives of one step.", columns=planned.TRAFFIC_COLUMNS, rows=traffic),
        Table(caption="The least time of one step.", columns=planned.TIME_COLUMNS, rows=times),
    ]
    result = {
        "mesh": dict(mesh.shape),
        "train": dataclasses.asdict(train) if training else None,
        "phase": run.phase,
        "compiler": how,
        "bytes": [row.json() for row in rows],
        "needed_bytes": needed,
        "fits": bool(program) and needed <= chip.memory,
        "traffic": [row.json() for row in traffic],
        "collectives": [dataclasses.asdict(each) for each in found],
        "prediction": dataclasses.asdict(predicted) | {"seconds": predicted.seconds, "bound": predicted.bound},
        "work": dataclasses.asdict(mine),
        "tokens_a_second": rate,
        "compile_seconds": time.perf_counter() - began,
    }
    return result, tables, facts


def trained(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> tuple[Any, Held, Work, str]:
    """The lowered training step; what a device holds and computes in it; the dtype of its matmuls."""
    step, arguments = train_ahead.training_step(config, train, mesh)
    abstract, dtype = device.abstract_mesh(**mesh.shape), POLICIES[train.policy].compute
    held, mine = device.held(config, train, abstract), prediction.train_work(config, train, abstract)
    return step.lower(*arguments), held, mine, dtype


def served(run: Run, config: ModelConfig, mesh: Mesh) -> tuple[Any, Held, Work, str]:
    """The same of prefill or decode, in bfloat16, or in int8 with scales in bfloat16."""

    def stored() -> Any:
        params = cast(init_params(config, 0), jnp.bfloat16)
        return quantize(params, run.activations) if run.int8 else params

    model = LanguageModel(dataclasses.replace(config, precision=BFLOAT16.compute), jax.eval_shape(stored))
    of_call = (run.phase, run.rows, run.cache_length, BFLOAT16, device.abstract_mesh(**mesh.shape))
    held = device.served(model.params, config, *of_call)
    mine = prediction.infer_work(config, *of_call, held.arguments["weights"])
    lower = infer_ahead.prefill if run.phase == "prefill" else infer_ahead.decode
    dtype = "int8" if run.activations == "int8" else BFLOAT16.compute
    return lower(model, run.rows, run.cache_length, mesh), held, mine, dtype


def compile_or_why_not(lowered: Any) -> tuple[Any, str]:
    """The program; or None and the line with which the TPU's compiler refuses one that does not fit."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).strip().splitlines()[0]


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), mesh=MESH, train=TRAIN)
