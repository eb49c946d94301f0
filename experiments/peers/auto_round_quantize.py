"""AutoRound (Cheng 2023, arXiv 2309.05516) on a Hugging Face directory, in an environment with auto-round.

    PYTHON auto_round_quantize.py FLOATS OUT ROWS.npy BITS GROUP ITERATIONS SEED

ROWS.npy: calibration text, token ids int32 [rows, length]. All else is as the program has it by default: symmetric
grids, batches of 8 rows, what is outside the layers left as it is. OUT is written in the format of GPTQ.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    source, out, rows, *numbers = sys.argv[1:]
    bits, group, iterations, seed = map(int, numbers)
    ids = torch.from_numpy(np.load(rows)).long()
    AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        scheme={"bits": bits, "group_size": group, "sym": True, "data_type": "int", "act_bits": 16},
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        iters=iterations,
        seed=seed,
        device_map="cpu",
    ).quantize_and_save(f"{out}-parts", format="auto_gptq")
    (folder,) = Path(f"{out}-parts").iterdir()  # which it calls by the model and the format
    folder.rename(out)
