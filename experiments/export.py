"""Write a model in the format of another program, and try the file there.

    bash launch/run.sh experiments.export --model=runs/quickstart/models/w4a16.safetensors --out=runs/w4a16.gguf
    bash launch/run.sh experiments.export --model=smollm2 --out=runs/smollm2-q8.gguf --kind=Q8_0
    bash launch/run.sh experiments.export --model=runs/mine --out=runs/mine-hf --format=huggingface --push=org/name

Expect the path on stdout, a model card in or beside what is written, and on stderr what that has not of the model, how
far its numbers and the logits that the other program computes with it are from the model's, and its bytes. Weights are
written as they are compressed; where a format cannot hold them the command says so and writes nothing.
"""

import dataclasses
import sys
from pathlib import Path

from efflm import api
from efflm.cli.flags import command_line, launch
from efflm.config import flag, require
from efflm.formats import gguf_blocks, hub, sources
from efflm.formats.sources import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag("smollm2", KINDS, path=True)
    out: str = flag("", "where to write: a name that ends in .gguf, else a folder; nothing may be there", path=True)
    format: str = flag("gguf", f"one of {', '.join(api.FORMATS)}")
    kind: str = flag(
        "",
        f"with gguf: what every matrix is rounded to, of {', '.join(gguf_blocks.ROUNDED_TO)}; default: each keeps its "
        "numbers, or is refused",
    )
    check: bool = flag(True, "compute with the file in the program that it is for, where that is installed")
    push: str = flag("", "send it to this model, org/name, of the Hugging Face hub")

    def __post_init__(self):
        require(self.format in api.FORMATS, f"format is {self.format!r}: choose {', '.join(api.FORMATS)}")
        if self.push:
            hub.require_name(self.push)


def main(run: Run) -> None:
    require(bool(run.out), "out is empty: give --out, where to write")
    loaded = sources.load(run.model)
    model = loaded.model.with_about({**loaded.about, "command": command_line("experiments.export", sys.argv)})
    print(api.save(run.out, model, loaded.tokenizer, format=run.format, kind=run.kind, check=run.check))
    if run.push:
        print(hub.push(Path(run.out), run.push))


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
