"""llama.cpp's own quantizer on a float32 GGUF file, in an environment with llama-cpp-python.

    PYTHON llama_quantize.py FLOATS.gguf OUT.gguf Q4_K_M [IMPORTANCE.npz]

IMPORTANCE.npz has for each matrix, by its name in the file, the mean square of each input over calibration text: what
llama.cpp's imatrix program gathers.
"""

import ctypes
import sys

import llama_cpp as llama
import numpy as np

# llama_ftype
KINDS = {"Q8_0": 7, "Q6_K": 18, "Q5_0": 8, "Q5_1": 9, "Q5_K_M": 17, "Q4_0": 2, "Q4_1": 3, "IQ4_NL": 25, "IQ4_XS": 30}
KINDS |= {"Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}

if __name__ == "__main__":
    source, out, kind, *importance = sys.argv[1:]
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = KINDS[kind], 2
    if importance:
        held = {name: np.ascontiguousarray(x, np.float32) for name, x in np.load(importance[0]).items()}
        pointer = lambda x: x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries = [(name.encode(), pointer(x), x.size) for name, x in held.items()]
        params.imatrix = (llama.llama_model_imatrix_data * (len(entries) + 1))(
            *entries
        )  # the last has no name: the end
    if llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not write {out}")
