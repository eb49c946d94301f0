"""Depth pruning: a student with some layers of its teacher (DistilBERT, Sanh 2019, arXiv 1910.01108) or fresh ones."""

import dataclasses
from typing import Literal

from efflm.compress.step import Context, record
from efflm.config import flag, require
from efflm.model import LanguageModel, init_params


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """Indices of `keep` of `layers` layers, the first and the last among them when keep > 1."""
    return [0] if keep == 1 else [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


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
class Shrink:
    """Fewer layers, evenly spaced over the model's."""

    layers: int = flag(0, "layers to keep; 0 keeps half")
    init: Literal["teacher", "random"] = flag("teacher", "start from the kept layers' weights, or from fresh ones")

    def __call__(self, model: LanguageModel, context: Context):
        have = len(model.config.blocks)
        keep = self.layers or max(1, have // 2)
        require(0 < keep <= have, f"shrink.layers is {keep}, but the model has {have} layers: keep 1 to {have}")
        after = keep_layers(model, evenly_spaced(have, keep))
        if self.init == "random":
            after = LanguageModel(after.config, init_params(after.config, context.seed))  # without masks
        return after, record(self, model, after, context)
