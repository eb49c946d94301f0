"""Claims 1, 4, 5 and 6: what the memory of training is, and what makes it less."""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efflm import trees
from efflm.config import InputError, written
from efflm.config.model import ModelConfig, ModelShape
from efflm.config.train import TrainConfig
from efflm.model import Transformer, init_params, stack_blocks
from efflm.model.presets import preset
from efflm.parallel import meshes
from efflm.plan import device, work
from efflm.precision import FLOAT32
from efflm.train import aot, losses, metrics
from experiments.claimed.claim import Claim, Effect
from experiments.claimed.lab import SHORT, Lab, percent

# --- 1 ---------------------------------------------------------------------------------------------------------------


def parts(config: ModelConfig, train: TrainConfig) -> dict[str, int]:
    """Bytes of a training step, predicted: what the state holds, and what the forward pass stores for the backward."""
    state = device.state(config, train)
    stored = device.stored_bytes(config, train.length, train.policy, train.scan, train.remat)
    weights, gradients = trees.nbytes(state.trainable), 4 * trees.count(state.trainable)
    return {
        "optimizer": trees.nbytes(state.optimizer),
        "weights": weights,
        "gradients": gradients,
        "activations": stored * train.batch,
    }


def dominance(config: ModelConfig, train: TrainConfig) -> float:
    """How many times the largest other part the optimizer's state is."""
    found = parts(config, train)
    return found.pop("optimizer") / max(found.values())


@functools.cache
def dominance_of_8b() -> float:
    train = TrainConfig(batch=1, length=4096, policy="bfloat16", scan=True, remat="full")
    return dominance(preset("llama3-8b"), train)


def optimizer_state(lab: Lab, seed: int) -> dict[str, float]:
    loss = {name: lab.loss(lab.fit(seed, SHORT, optimizer=name)) for name in ("adamw8bit", "adamw")}
    state = {name: parts(lab.config, dataclasses.replace(lab.train, optimizer=name)) for name in loss}
    return {
        "state / largest other part, Llama-3-8B": dominance_of_8b(),
        "state / largest other part, this model": dominance(lab.config, lab.train),
        "8-bit state / 32-bit state": state["adamw8bit"]["optimizer"] / state["adamw"]["optimizer"],
        "8 bits: loss, %": percent(*loss.values()),
    }


# --- 4 ---------------------------------------------------------------------------------------------------------------

DEEP = ModelShape(layers=12, width=256, mlp_dim=704, vocabulary=1024, max_length=256).config()


@functools.cache
def remat_of(remat: str) -> tuple[float, int]:
    """FLOPs of a step by the plan, and bytes of temporaries by the compiler."""
    train = TrainConfig(batch=8, length=256, scan=True, remat=remat)
    step, arguments = aot.training_step(DEEP, train, meshes.make_mesh())
    temporaries = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return work.total(work.train_step(DEEP, train, train.batch, train.length)).flops, temporaries


def rematerialization(lab: Lab, seed: int) -> dict[str, float]:
    (plain, held), (flops, fewer) = remat_of("none"), remat_of("full")
    loss = [lab.loss(lab.fit(seed, SHORT / 4, remat=remat)) for remat in ("full", "none")]
    return {
        "FLOPs more, %": percent(flops, plain),
        "temporaries saved, %": -percent(fewer, held),
        "difference of the loss, %": abs(percent(*loss)),
    }


# --- 5 ---------------------------------------------------------------------------------------------------------------


def whole_loss(config: ModelConfig, scanned: bool, remat: str) -> losses.LossFn:
    """The mean cross-entropy over all targets, from logits that exist all at once."""
    model = Transformer(config, FLOAT32, scanned, remat)

    def loss(weights: Any, frozen: Any, batch: dict[str, jax.Array], rng: Any):
        logits_BTV, _ = model.apply({"params": weights}, batch["inputs"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])), {}

    return loss


@functools.cache
def logits_share(remat: str, rows: int = 4, length: int = 512) -> tuple[float, float]:
    """Of SmolLM2-135M: the float32 logits and their gradient, as a share of the temporaries of a step without and
    beside chunks; and the temporaries with chunks as a share of those without."""
    config = preset("smollm2-135m")
    weights = jax.eval_shape(lambda: stack_blocks(init_params(config, 0), config))
    batch = dict.fromkeys(aot.random_rows(1, 1, 2), jax.ShapeDtypeStruct((rows, length), jnp.int32))

    def temporaries(loss: losses.LossFn) -> int:
        gradient = jax.jit(jax.grad(lambda weights, batch: loss(weights, {}, batch, None)[0]))
        return gradient.lower(weights, batch).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries(whole_loss(config, True, remat))
    chunked = temporaries(losses.language_model_loss(config, scanned=True, remat=remat))
    return 2 * 4 * rows * length * config.vocabulary / whole, chunked / whole


def logits(lab: Lab, seed: int) -> dict[str, float]:
    weights = lab.dense(seed).params
    batch = aot.random_rows(lab.train.batch, lab.train.length, lab.config.vocabulary, seed)
    both = whole_loss(lab.config, False, "none"), losses.language_model_loss(lab.config)
    loss = [float(jax.jit(fn)(weights, {}, batch, None)[0]) for fn in both]
    return {
        "logits, layers rematerialized: % of temporaries": 100 * logits_share("full")[0],
        "logits, layers kept: % of temporaries": 100 * logits_share("none")[0],
        "logits in chunks: temporaries, % of those without": 100 * logits_share("full")[1],
        "difference of the loss, %": abs(percent(*loss)),
    }


# --- 6 ---------------------------------------------------------------------------------------------------------------

DEVICES = 8


def sharded(lab: Lab, seed: int) -> dict[str, float]:
    """Pretraining on one and on eight devices that the CPU pretends to be, each in a process of its own."""
    train = dataclasses.replace(lab.train, steps=lab.steps(SHORT / 4), log_every=1, policy="float32")
    ends = {}
    for count in (1, DEVICES):
        folder = lab.folder / f"sharded{count}-seed{seed}"
        command = [sys.executable, "-m", "experiments.pretrain", f"--run_dir={folder}", f"--seed={seed}"]
        command += [f"--corpus={lab.data.corpus.source}", "--mesh.data=1", f"--mesh.fsdp={count}"]
        command += [f"--model.{name}={written.text(value)}" for name, value in dataclasses.asdict(lab.shape).items()]
        command += [f"--train.{name}={written.text(value)}" for name, value in dataclasses.asdict(train).items()]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"pretraining on {count} devices failed: {done.stderr.strip()[-300:]}")
        ends[count] = metrics.curve(folder / "metrics.jsonl")[1][-1]
    state = device.state(lab.config, train)
    held = {n: device.held_bytes(state, device.abstract_mesh(fsdp=n)) for n in (1, 2, 4, DEVICES)}
    traffic = device.train_traffic(lab.config, train, device.abstract_mesh(fsdp=DEVICES), state.trainable)
    return {
        **{f"state of one of {n} / its part": n * held[n] / held[1] for n in (2, 4, DEVICES)},
        "difference of the last training loss, %": abs(percent(ends[DEVICES], ends[1])),
        "received in a step / weights": sum(traffic.values()) / trees.nbytes(state.trainable),
    }


CLAIMS = (
    Claim(
        number=1,
        statement="Optimizer state dominates the memory of training, and 8 bits for it do not change the loss.",
        source="Rajbhandari 2019, arXiv 1910.02054; Dettmers 2021, arXiv 2110.02861",
        question="Is AdamW's state the largest part of memory, and what does the loss pay for 8 bits?",
        protocol="Bytes as predicted by efflm.plan for one device: Llama-3-8B with one sequence of 4,096 tokens in "
        "bfloat16 with all layers rematerialized, and the model here. Loss: AdamW in 8 and in 32 bits, same weights "
        "and batches, a fifth of the steps.",
        effects=(
            Effect("state / largest other part, Llama-3-8B", above=1),
            Effect("state / largest other part, this model"),
            Effect("8-bit state / 32-bit state", below=0.3),
            Effect("8 bits: loss, %", below=1),
        ),
        minutes=3,
        measure=optimizer_state,
    ),
    Claim(
        number=4,
        statement="Rematerialization buys memory for at most a third more FLOPs.",
        source="Chen 2016, arXiv 1604.06174",
        question="What do whole layers computed again save and cost?",
        protocol="12 layers of width 256, 8 sequences of 256 tokens: FLOPs as efflm.plan counts them, bytes of "
        "temporaries as this machine's compiler reports them. Loss: a twentieth of the steps with and without.",
        effects=(
            Effect("FLOPs more, %", below=33.4),
            Effect("temporaries saved, %", above=33.4),
            Effect("difference of the loss, %", below=0.1),
        ),
        minutes=2,
        measure=rematerialization,
    ),
    Claim(
        number=5,
        statement="Logits dominate the memory of training a small model.",
        source="Wijmans 2024, arXiv 2411.09009",
        question="Which share of a step's temporaries are logits and their gradient, and what do chunks of them save?",
        protocol="SmolLM2-135M (vocabulary 49,152), 4 sequences of 512 tokens in float32: bytes of temporaries as this "
        "machine's compiler reports them, layers rematerialized as in the paper. Loss: of the model here on random "
        "tokens.",
        effects=(
            Effect("logits, layers rematerialized: % of temporaries", above=50),
            Effect("logits, layers kept: % of temporaries"),
            Effect("logits in chunks: temporaries, % of those without", below=50),
            Effect("difference of the loss, %", below=0.001),
        ),
        minutes=3,
        measure=logits,
    ),
    Claim(
        number=6,
        statement="Sharding divides the state by the number of devices and changes nothing else.",
        source="Rajbhandari 2019, arXiv 1910.02054; Zhao 2023, arXiv 2304.11277",
        question="What does one of N devices hold, and is the loss the same?",
        protocol="Bytes by the sharding table. Loss: the last of a twentieth of the steps on one and on eight devices "
        "that the CPU pretends to be (mesh.fsdp), same weights and batches.",
        effects=(
            *(Effect(f"state of one of {n} / its part", below=1.05) for n in (2, 4, DEVICES)),
            Effect("difference of the last training loss, %", below=0.1),
            Effect("received in a step / weights"),
        ),
        minutes=4,
        measure=sharded,
    ),
)
