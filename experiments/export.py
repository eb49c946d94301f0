"""Write a model from any source as a Hugging Face directory, which transformers and others load unchanged.

    python -m experiments.export --model=runs/pretrain --out=runs/exported
    python -m experiments.export --model=smollm2 --out=runs/smollm2 --dtype=bfloat16

Expect config.json, model.safetensors, tokenizer.json and what belongs to them in the new directory. Models of floats of
every family that is read can be written; compressed ones have efflm's own format (see experiments.compress).
"""

import dataclasses
from pathlib import Path
from typing import Literal

from efflm import trees
from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.config import flag
from efflm.formats import huggingface, sources
from efflm.formats.sources import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag("smollm2", f"{KINDS}; or smollm2", path=True)
    out: str = flag(
        str(run_directory.ROOT / "exported"), "the directory to write, which must not hold anything yet", path=True
    )
    dtype: Literal["", "float32", "bfloat16", "float16"] = flag("", "of all weights; default: as they are stored")


def main(run: Run) -> None:
    model, tokens = sources.load_model(run.model, dtype=run.dtype or None)
    size, out = trees.nbytes(model.params), Path(run.out)
    run_directory.require_writable(out, needs=size + 10 * run_directory.SMALL_FILES, remedy="give another --out")
    huggingface.save(out, model, tokens)
    print(f"{run.model}: {trees.count(model.params) / 1e6:.1f} M parameters, {size / 1e6:.1f} MB, now in {out}")


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
