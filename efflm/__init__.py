"""efflm: train language models in JAX, make them smaller, and measure what that bought and what it cost.

What it offers by itself, each explained by help(efflm.api):

load, compress, measure, generate, stream, save

What it consists of:

api         these functions
config      frozen dataclasses: what a run is told
trees       paths, selection, counting and bytes of trees of weights
precision   which dtype weights, matmuls and results have
malloc      freed memory of this process given back to the system
cli         command lines: flags, --help, standard streams, signals, progress bars, run directories
text        text to token ids and back, chat templates
parallel    meshes of devices, attention over split sequences, several processes that run one program
ops         how a weight is used, whatever its format
model       the Transformer, how its weights are sharded over a mesh, and the fastest precision on this machine
data        corpora, packing, the order of sequences
train       losses, the optimizer, the step, the loop, checkpoints
infer       prefill, decode, sampling, speculative decoding, streaming
compress    steps from a model to a model, and recipes that chain them
serve       OpenAI's API as an ASGI application
evaluate    quality and cost
plan        what a run would need and take on hardware that is not here
formats     models on disk
report      the table, the plot, the page
model_files what is looked at before a file of a model is read
user_cache  the folder of what can be made again

Importing it starts nothing, and is quick: JAX is imported when one of the functions is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efflm.api import compress, generate, load, measure, save, stream
    from efflm.config import InputError

__all__ = ["InputError", "compress", "generate", "load", "measure", "save", "stream"]


def __getattr__(name: str) -> Any:
    if name == "InputError":
        from efflm.config import InputError

        return InputError
    if name in __all__:
        from efflm import api

        return getattr(api, name)
    raise AttributeError(f"module 'efflm' has no attribute {name!r}: it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
