"""A teacher's distributions on disk, so that it runs once, before the training and beside no student.

Kinds, by what is kept for each token:

- full: all probabilities, float16.
- top_k: the K largest, divided by their sum. A student of them is too sure: the rest of the distribution is missing
  (Anshumann 2025, arXiv 2503.16870).
- sampled: K tokens sampled from the distribution, with replacement, each with the probability 1 / K: an unbiased
  estimate of the distribution, so of the gradient of forward KL too (the same paper, with its proposals
  sampled from the teacher itself).
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efflm import ops
from efflm.cli import progress, run_directory
from efflm.compress.step import Context, digest
from efflm.config import require
from efflm.model import LanguageModel, Transformer
from efflm.parallel import sharding
from efflm.precision import policy_for
from efflm.train.step import place
from efflm.train.trainer import Batches

Kind = Literal["full", "top_k", "sampled"]
HEADER = "cache.json"
FILES = (HEADER, f".{HEADER}.*", "p.npy", "ids.npy", "hashes.npy")  # all that is written
READ = ("inputs", "targets", "segments", "positions")  # of a batch: what tells it from others


@functools.partial(jax.jit, static_argnames=("kind", "entries"))
def distributions(
    model: LanguageModel, batch: dict[str, jax.Array], key: jax.Array, kind: Kind, entries: int
) -> dict[str, jax.Array]:
    """Of every token of a batch, the ids [B, T, K] and probabilities float16 [B, T, K] that are kept: of "full" no ids
    and K = V, of "sampled" no probabilities. Logits exist for one sequence at a time."""
    transformer = Transformer(model.config, policy_for(model.config))
    inputs = {name: batch[name] for name in ("segments", "positions")}
    with sharding.mesh_of(model.params):
        x_BTD, _ = transformer.apply(
            {"params": model.params}, batch["inputs"], **inputs, method=Transformer.final_states
        )

        def one(given):
            x_TD, key = given
            logits_1TV = transformer.apply({"params": model.params}, x_TD[None], method=Transformer.unembed)
            logits_TV = ops.possible(logits_1TV[0].astype(jnp.float32), model.config.unused)
            p_TV = jax.nn.softmax(logits_TV, axis=-1)
            if kind == "full":
                return {"p": p_TV.astype(jnp.float16)}
            if kind == "top_k":
                p_TK, ids_TK = lax.top_k(p_TV, entries)
                p_TK = p_TK / jnp.sum(p_TK, axis=-1, keepdims=True)
                return {"ids": ids_TK, "p": p_TK.astype(jnp.float16)}
            # By the inverse of the cumulative distribution: as exact as its float32 sums.
            sums_TV = jnp.cumsum(p_TV, axis=-1)
            u_TK = jax.random.uniform(key, (len(p_TV), entries)) * sums_TV[:, -1:]
            find = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
            return {"ids": jnp.minimum(find(sums_TV, u_TK), p_TV.shape[-1] - 1)}

        return lax.map(one, (x_BTD, jax.random.split(key, len(x_BTD))))


def hash_of(batch: Mapping[str, np.ndarray]) -> int:
    out = hashlib.sha256()
    for name in READ:
        out.update(np.ascontiguousarray(batch[name], np.int32))
    return int.from_bytes(out.digest()[:8], "little")


def described(context: Context, teacher: LanguageModel, steps: int, kind: Kind, entries: int) -> dict[str, Any]:
    """What a cache says of itself, by which it is known again."""
    vocabulary = teacher.config.tokens
    rows, length = context.batches(0)["inputs"].shape
    return {
        "kind": kind,
        "entries": vocabulary if kind == "full" else entries,
        "vocabulary": vocabulary,
        "rows": rows,
        "length": length,
        "steps": steps,
        "seed": context.seed,
        "tokenizer": context.tokenizer,
        "corpus": context.corpus,
        "teacher": digest(teacher),
    }


def dtypes(header: Mapping[str, Any]) -> dict[str, np.dtype]:
    """{name: dtype} of what is kept of a token."""
    ids = np.dtype(np.uint16 if header["vocabulary"] <= 1 << 16 else np.uint32)
    return {"full": {"p": np.dtype(np.float16)}, "sampled": {"ids": ids}}.get(
        header["kind"], {"ids": ids, "p": np.dtype(np.float16)}
    )


def bytes_per_token(header: Mapping[str, Any]) -> int:
    return header["entries"] * sum(dtype.itemsize for dtype in dtypes(header).values())


def write(folder: Path, teacher: LanguageModel, context: Context, header: Mapping[str, Any]) -> None:
    """Run the teacher over the batches of all steps. An interrupt leaves nothing that `read` would take."""
    require(jax.process_count() == 1, "a teacher's cache is written by one process: distill without cache on several")
    partial = folder.with_name(f"{folder.name}.partial")
    run_directory.discard(partial, FILES)
    size = header["steps"] * header["rows"] * header["length"] * bytes_per_token(header)
    run_directory.require_writable(partial, needs=size + run_directory.SMALL_FILES, remedy="distill without cache")
    partial.mkdir(parents=True, exist_ok=True)
    shape = (header["steps"], header["rows"], header["length"], header["entries"])
    kept = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, dtype in dtypes(header).items()
    }
    hashes = np.zeros(header["steps"], np.uint64)
    for step in progress.shown(range(header["steps"]), "writing the teacher's cache", header["steps"]):
        batch = context.batches(step)
        hashes[step] = hash_of(batch)
        key = jax.random.fold_in(jax.random.key(header["seed"]), step)
        here = place({name: np.asarray(batch[name]) for name in READ}, context.mesh)
        found = distributions(teacher, here, key, kind=header["kind"], entries=header["entries"])
        for name, array in kept.items():
            array[step] = np.asarray(found[name])
    for array in kept.values():
        array.flush()
    np.save(partial / "hashes.npy", hashes)
    run_directory.write_json(partial / HEADER, dict(header))
    run_directory.discard(folder, FILES)
    partial.replace(folder)


def read(folder: Path, wanted: Mapping[str, Any], batches: Batches) -> Batches:
    """The batches with what the teacher gave for them: "teacher_p" float [B, T, K] and, but of "full", "teacher_ids".

    wanted: see `described`. Raises InputError for a cache that is not of that teacher, tokenizer, text and kind.
    """
    header = json.loads((folder / HEADER).read_text())
    for name, value in wanted.items():
        have = header.get(name)
        enough = name == "steps" and isinstance(have, int) and have >= value
        require(
            have == value or enough,
            f"the teacher's cache in {folder} has {name} {have!r:.40}, but {value!r:.40} is needed: remove it, and "
            "it is written anew, or give another folder",
        )
    kept = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in dtypes(header)}
    hashes = np.load(folder / "hashes.npy")

    def at(step: int) -> dict[str, np.ndarray]:
        batch = batches(step)
        require(
            hash_of(batch) == hashes[step],
            f"the teacher's cache in {folder} was made for other text than that of step {step}: remove it, and it "
            "is written anew, or give another folder",
        )
        more = {f"teacher_{name}": np.asarray(array[step]) for name, array in kept.items()}
        if header["kind"] == "sampled":
            ids = more["teacher_ids"]
            more["teacher_p"] = np.full(ids.shape, 1 / ids.shape[-1], np.float32)
        return {name: np.asarray(array) for name, array in batch.items()} | more

    return at


def batches_with(
    folder: Path, teacher: LanguageModel, context: Context, steps: int, kind: Kind, entries: int
) -> tuple[Batches, int]:
    """The batches of the context with what is kept of the teacher, which is written first where it is not there, and
    the bytes of a token. Raises InputError."""
    require(
        kind == "full" or 0 < entries <= teacher.config.tokens,
        f"entries is {entries}, but must be from 1 to the vocabulary, {teacher.config.tokens}",
    )
    header = described(context, teacher, steps, kind, entries)
    if not (folder / HEADER).exists():
        require(
            not folder.exists() or not any(folder.iterdir()),
            f"{folder} holds something that is no teacher's cache: give another folder",
        )
        write(folder, teacher, context, header)
    return read(folder, header, context.batches), bytes_per_token(header)
