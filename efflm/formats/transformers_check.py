"""Whether transformers computes with a directory that was written what the model computes. It runs in a process of its
own: efflm itself imports no torch."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from efflm import trees
from efflm.config import require
from efflm.formats import gguf_check
from efflm.model import LanguageModel
from efflm.ops import QArray
from efflm.text.tokenizer import Tokenizer

SAME = 1e-4  # of the logits' standard deviation, the root of their mean squared difference at most
PYTHON = sys.executable
PROGRAM = """
import sys, numpy, torch, transformers
folder, tokens, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    numpy.save(out, model(torch.from_numpy(numpy.load(tokens)).long()).logits.numpy())
"""


def in_transformers(folder: Path, model: LanguageModel, tokens: Tokenizer) -> str:
    """How far the logits that transformers computes of a text are from the model's, in words. model: as it is read from
    the folder. Raises InputError where it does not load the folder, or the logits are further off than float32 is; of a
    model that rounds activations they are told alone, since transformers rounds them otherwise."""
    quantized = [leaf for _, leaf in trees.flatten(model.params) if isinstance(leaf, QArray)]
    if any(leaf.zeros is not None for leaf in quantized):
        return "transformers did not try it: version 5.24 does not load zero points"
    needed = ("torch", "transformers") + ("compressed_tensors",) * bool(quantized)
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f"transformers did not try it: there is no {', '.join(absent)}"
    ids_BT = np.array([tokens.encode(gguf_check.TEXT)[: min(gguf_check.TOKENS, model.config.max_length)]], np.int32)
    with tempfile.TemporaryDirectory(prefix="efflm-") as home:
        given, made = Path(home) / "tokens.npy", Path(home) / "logits.npy"
        np.save(given, ids_BT)
        command = [PYTHON, "-c", PROGRAM, str(folder), str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        why = (done.stderr.strip().splitlines() or [""])[-1]
        require(done.returncode == 0, f"transformers does not load what was written: {why:.300}")
        found_TV = np.load(made)[0]
    logits_TV = np.asarray(gguf_check.logits(model, ids_BT))[0]
    differ = found_TV - logits_TV
    share, same = differ.std() / logits_TV.std(), (found_TV.argmax(-1) == logits_TV.argmax(-1)).mean()
    rounds = any(leaf.activations != "float" for leaf in quantized)
    require(
        rounds or bool(share <= SAME),
        f"transformers' logits differ from the model's by {share:.2%} of their standard deviation, more than "
        f"the {SAME:.2%} of float32; with check set to false they are not compared",
    )
    otherwise = " (it rounds activations, which these of the model do not)" if rounds else ""
    return (
        f"transformers' logits after {ids_BT.size} tokens differ by {share:.2g} of their standard deviation, at most "
        f"by {np.abs(differ).max():.2g}; the likeliest token is the same for {same:.0%}{otherwise}"
    )
