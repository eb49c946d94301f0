"""Depth pruning: a student with some layers of its teacher (DistilBERT, Sanh 2019, arXiv 1910.01108) or random
weights.

The layers are evenly spaced, or those that change the residual stream most (ShortGPT, Men 2024, arXiv 2403.03853).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efflm.compress import calibrate
from efflm.compress.calibrate import Layer
from efflm.compress.step import Context, record
from efflm.compress.structured import allocation
from efflm.compress.structured.target import Target
from efflm.config import flag, require
from efflm.model import LanguageModel, init_params


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Indices of `keep` of `layers` layers, the first and the last among them when keep > 1."""
    return [0] if keep == 1 else [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def block_influence(model: LanguageModel, rows: Mapping[str, Any] | None, mesh: Mesh) -> np.ndarray:
    """Of each layer, 1 - the mean over tokens of the cosine between its input and its output, both of the residual
    stream: ShortGPT, section 3. Padding does not count; one layer's inputs are held at a time. Raises InputError."""

    def one(layer: Layer, _: calibrate.States) -> tuple[Layer, float]:
        chunks = zip(layer.rows, layer.wanted, strict=True)
        found = [jax.block_until_ready(_distances(x, after, segments)) for (x, _, segments), after in chunks]
        total, tokens = np.sum(np.asarray(found, np.float64), axis=0)
        require(tokens > 0, "the calibration text holds no tokens, only padding: give another corpus")
        return layer, total / tokens

    return np.array(calibrate.walk(model, rows, one, mesh=mesh, title="block influence", reference=True)[1])


@jax.jit
def _distances(x_BTD: jax.Array, y_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens of 1 - cos(x, y), and their number. A zero vector has cosine 0 with all others."""
    counted_BT = segments_BT > 0
    dot_BT, xx_BT, yy_BT = (jnp.sum(a * b, axis=-1) for a, b in ((x_BTD, y_BTD), (x_BTD, x_BTD), (y_BTD, y_BTD)))
    lengths_BT = jnp.sqrt(xx_BT) * jnp.sqrt(yy_BT)
    cosine_BT = dot_BT / jnp.where(lengths_BT > 0, lengths_BT, 1)
    return jnp.sum(jnp.where(counted_BT, 1 - cosine_BT, 0.0)), jnp.sum(counted_BT)


def keep_layers(model: LanguageModel, indices: list[int]) -> LanguageModel:
    """The model of the given layers, renumbered from 0; embeddings and norms stay."""
    blocks = {f"block_{new}": model.params[f"block_{old}"] for new, old in enumerate(indices)}
    rest = {name: leaf for name, leaf in model.params.items() if not name.startswith("block_")}
    kept = tuple(model.config.blocks[i] for i in indices)
    masks = model.masks and {path: mask for path, mask in model.masks.items() if not path.startswith("block_")}
    for new, old in enumerate(indices if model.masks else ()):
        inside = f"block_{old}/"
        masks |= {f"block_{new}/{p.removeprefix(inside)}": m for p, m in model.masks.items() if p.startswith(inside)}
    return LanguageModel(dataclasses.replace(model.config, blocks=kept), rest | blocks, masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Target):
    """Fewer layers: evenly spaced over the model's, or those of the largest block influence, found in one pass.

    How many is said by `layers` or `share`, or by a target, which as many layers meet as come nearest to it; else half
    stay.
    """

    layers: int = flag(0, "layers to keep, in place of a target; without either half stay")
    share: float = flag(0.0, "in place of it, share of the layers to remove; at least one stays")
    importance: Literal["spaced", "block_influence"] = flag(
        "spaced", "evenly spaced, or the layers whose output differs most in direction from their input"
    )
    init: Literal["teacher", "random"] = flag("teacher", "start from the kept layers' weights, or from random ones")

    def __post_init__(self):
        super().__post_init__()
        given = {name: value for name, value in (("layers", self.layers), ("share", self.share)) if value} | self.given
        found = " and ".join(f"{name} is {value}" for name, value in given.items())
        require(len(given) < 2, f"{found}: set one of them, or none to keep half of the layers")
        require(0 <= self.share < 1, f"share is {self.share}, but must be in [0, 1)")
        require(
            not self.calibrates or self.init == "teacher",
            "importance is block_influence, but with init=random no layer's weights are kept: choose spaced",
        )

    at = "share"

    @property
    def calibrates(self) -> bool:
        return self.importance == "block_influence"

    def __call__(self, model: LanguageModel, context: Context):
        have = len(model.config.blocks)
        stay = round(have * (1 - self.share)) if self.share else have // 2
        keep, removed = self.layers or max(1, stay), {}
        require(0 < keep <= have, f"depth.layers is {keep}, but the model has {have} layers: keep 1 to {have}")
        influence = block_influence(model, context.calibration, context.mesh) if self.calibrates else None

        def kept(keep: int) -> LanguageModel:
            best = evenly_spaced(have, keep) if influence is None else np.argsort(-influence, kind="stable")[:keep]
            return keep_layers(model, sorted(int(index) for index in best))

        if self.given:
            keep, removed = self.searched(model, kept)
        after = kept(keep)
        if self.init == "random":
            after = LanguageModel(after.config, init_params(after.config, context.seed))  # without masks
        return after, record(self, model, after, context, removed=removed)

    def searched(
        self, model: LanguageModel, kept: Callable[[int], LanguageModel]
    ) -> tuple[int, dict[str, int | float]]:
        """How many layers stay for the target, and what then goes of it."""
        ((name, target),), have, measure = self.given.items(), len(model.config.blocks), self.saving(model)

        @functools.cache
        def of_layers(gone: int) -> float:
            saved = measure(kept(have - gone))
            print(f"depth pruning: {gone} of {have} layers fewer save {saved:.1%} of {name}", flush=True)
            return saved

        removed = lambda share: of_layers(round(share * have)) if round(share * have) else 0.0
        largest, candidates = (have - 1) / have, have.bit_length() + 2
        share, found = allocation.search(removed, target, largest, name, tolerance=0.0, candidates=candidates)
        gone = round(share * have)
        require(gone > 0, f"{name} is {target}, but whole layers make it 0: ask for more")
        return have - gone, {"layers": gone, name: found}
