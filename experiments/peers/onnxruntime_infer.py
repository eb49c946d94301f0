"""SmolLM2-135M in ONNX Runtime GenAI on the CPU, a peer of `experiments.bench --what=infer`.

    pip install onnxruntime-genai onnxruntime onnx onnx-ir torch transformers
    python onnxruntime_infer.py --model=DIR

DIR is a float32 Hugging Face folder (`experiments.export --model=smollm2 --format=huggingface --out=DIR`), which is
converted first. Prints a JSON line for each of int8 and int4 weights: peer, format, prefill_tokens_per_second (of
--prompt tokens), decode_tokens_per_second (after 16 tokens); medians of --repeats.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime_genai


def convert(source: str, kind: str, out: pathlib.Path) -> None:
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        source,
        "-o",
        out,
        "-p",
        kind,
        "-e",
        "cpu",
    ]
    command += ["-c", out / "cache", "--extra_options", "int4_accuracy_level=4"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def rates(folder: pathlib.Path, given: argparse.Namespace) -> dict[str, float]:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = given.threads
    path.write_text(json.dumps(config))
    model = onnxruntime_genai.Model(str(folder))

    def seconds(read: int, new: int) -> tuple[float, float]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=read + new + 2, min_length=read + new + 2, do_sample=False, batch_size=1)
        generator = onnxruntime_genai.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens((np.arange(read) % 251).astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    seconds(given.prompt, 1)
    seconds(16, 8)
    found = {
        "prefill": [given.prompt / seconds(given.prompt, 1)[0] for _ in range(given.repeats)],
        "decode": [given.new / seconds(16, given.new)[1] for _ in range(given.repeats)],
    }
    return {f"{name}_tokens_per_second": round(statistics.median(each), 1) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the Hugging Face folder")
    for name, value in {"prompt": 512, "new": 64, "repeats": 5, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("int8", "int4"):
            folder = pathlib.Path(scratch) / kind
            convert(given.model, kind, folder)
            print(json.dumps({"peer": "onnxruntime-genai", "format": kind} | rates(folder, given)), flush=True)


if __name__ == "__main__":
    main()
