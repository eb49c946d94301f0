"""What a checkpoint says of its arrays, compared with its config before any of them is read."""

from typing import Any

import numpy as np

from efflm.config import require
from efflm.config.model import ModelConfig
from efflm.model import params
from efflm.ops.storage import array_shapes, is_dtype_of


def arrays_of(
    config: ModelConfig, formats: dict[str, Any], leaves: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of every array. Raises InputError unless they are just those of such a model."""
    table, wanted = params.table(config), {}
    unknown = sorted(formats.keys() - table.keys())
    require(not unknown, f"{(unknown or [''])[0]:.80} is no weight of the config")
    for path, param in table.items():
        wanted |= array_shapes(path, param.shape, formats.get(path), leaves)
        wanted |= {mask: param.shape for mask in (f"masks/{path}",) if mask in leaves}
    found = {path: tuple(leaf.get("shape", ())) for path, leaf in leaves.items()}
    differ = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    first = (differ or [""])[0]
    require(
        not differ, f"{first:.80} has shape {found.get(first)!s:.80}, but the config says {wanted.get(first)!s:.80}"
    )
    out = {}
    for path, shape in wanted.items():
        weight, _, part = path.rpartition("/")
        dtype = np.dtype(leaves[path].get("dtype", "object"))
        bits = formats[weight]["bits"] if weight in formats else 0
        good = dtype.kind == "b" if path.startswith("masks/") else is_dtype_of(dtype, part, bits)
        require(good, f"{path} is stored as {dtype}, which is not what such a weight is made of")
        out[path] = shape, dtype
    return out
