"""GPTQ (Frantar 2022, arXiv 2210.17323) by GPTQModel on a Hugging Face directory, in an environment with gptqmodel.

    PYTHON gptqmodel_quantize.py FLOATS OUT ROWS.npy BITS GROUP SEED

ROWS.npy: calibration text, token ids int32 [rows, length]. All else is as the program has it by default.
"""

import os
import sys

import numpy as np
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one, and its loader then asks for two
from gptqmodel import GPTQModel, QuantizeConfig

if __name__ == "__main__":
    source, out, rows, *numbers = sys.argv[1:]
    bits, group, seed = map(int, numbers)
    torch.manual_seed(seed)
    config = QuantizeConfig(bits=bits, group_size=group, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(source, config, dtype=torch.float32)
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in np.load(rows).tolist()], batch_size=4
    )
    model.save(out)
