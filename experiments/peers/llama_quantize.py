"""A float32 GGUF file in the types of llama.cpp's own quantizer, to compare with files of the same bytes.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python      # compiles, 10 minutes on 2 cores
    python llama_quantize.py f32.gguf OUT_DIR

Writes OUT_DIR/Q8_0.gguf and so on, and prints a JSON line for each: file, bytes.
"""

import ctypes
import json
import pathlib
import sys

import llama_cpp

TYPES = {"Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "Q4_K_M": 15, "Q3_K_M": 12}


def main(source: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    llama_cpp.llama_backend_init()
    for name, kind in TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = kind, True
        out = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(source.encode(), str(out).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not write {out}")
        print(json.dumps({"file": str(out), "bytes": out.stat().st_size}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
