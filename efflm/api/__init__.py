"""What `import efflm` offers: load, compress, measure, generate, stream and save, thin names over the packages below.

    model, tokenizer = efflm.load("smollm2")
    small = efflm.compress(model, "w8a8")
    print(efflm.measure({"before": model, "w8a8": small}, tokenizer, "stdlib"))
    print(efflm.generate(small, tokenizer, "The capital of France is"))
    efflm.save("runs/small", small, tokenizer)

A model is a LanguageModel. One that `load` or `compress` returned knows where it is from and what was done to it
(model.about), which `save` writes down. What is given wrongly raises InputError, in one line with the remedy.
"""

from efflm.api.compression import FLAGS, compress, context_for
from efflm.api.files import FORMATS, load, save
from efflm.api.measuring import measure
from efflm.api.writing import generate, stream

__all__ = ["FLAGS", "FORMATS", "compress", "context_for", "generate", "load", "measure", "save", "stream"]
