"""SmolLM2-135M in OpenVINO GenAI on the CPU, a peer of `experiments.bench --what=infer`.

    pip install openvino-genai openvino-tokenizers "optimum[openvino]" nncf
    python openvino_infer.py --model=DIR --converted=FOLDER

DIR is a float32 Hugging Face folder (`experiments.export --model=smollm2 --format=huggingface --out=DIR`), which is
converted first, for four minutes; --converted keeps that for the next run. Prints a JSON line for each of int8, int4
(groups of 64) and f32 weights: peer, format, prefill_tokens_per_second (of --prompt tokens), decode_tokens_per_second
(after 16 tokens), decode_1024_tokens_per_second; medians of --repeats.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import openvino
import openvino_genai

FORMATS = {"int8": "int8", "int4": "int4", "f32": "fp32"}  # name -> weight format of the conversion


def convert(source: str, weights: str, out: pathlib.Path) -> None:
    command = [pathlib.Path(sys.executable).parent / "optimum-cli", "export", "openvino", "-m", source]
    command += ["--task", "text-generation-with-past", "--weight-format", weights, out]
    if weights == "int4":
        command += ["--group-size", "64", "--sym"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def rates(folder: pathlib.Path, given: argparse.Namespace) -> dict[str, float]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 1, 8192, False
    options = {"INFERENCE_NUM_THREADS": given.threads, "INFERENCE_PRECISION_HINT": "f32", "scheduler_config": scheduler}
    # Paged attention is its faster backend: twice the prefill of SDPA.
    pipe = openvino_genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="PA", **options)

    def generate(prompt: int, new: int):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        tokens = openvino.Tensor((np.arange(prompt) % 251)[None].astype(np.int64))
        return pipe.generate(tokens, config).perf_metrics

    generate(given.prompt, 2)
    generate(16, 8)
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "decode_1024": []}
    for _ in range(given.repeats):
        found["prefill"].append(1e3 * given.prompt / generate(given.prompt, 2).get_ttft().mean)
        found["decode"].append(1e3 / generate(16, given.new + 1).get_tpot().mean)
        found["decode_1024"].append(1e3 / generate(1024, given.new + 1).get_tpot().mean)
    return {f"{name}_tokens_per_second": round(statistics.median(each), 1) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the Hugging Face folder")
    parser.add_argument("--converted", help="a folder that keeps the conversions for the next run")
    for name, value in {"prompt": 512, "new": 64, "repeats": 5, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name, weights in FORMATS.items():
            folder = pathlib.Path(given.converted or scratch) / name
            if not (folder / "openvino_model.bin").exists():
                convert(given.model, weights, folder)
            print(json.dumps({"peer": "openvino", "format": name} | rates(folder, given)), flush=True)


if __name__ == "__main__":
    main()
