"""What the reference programs of AWQ, GPTQ, SparseGPT and Wanda make of a small layer: writes reference_layers.npz.

    pip install llmcompressor==0.14.0.1                                        # in one environment
    python -m tests.reference_layers gptq sparsegpt wanda
    pip install autoawq==0.2.9 torch==2.6.0 transformers==4.51.3               # in another
    python -m tests.reference_layers awq

The layer is surgeon.layer(0, K=160, N=16): two blocks of 128 inputs. Damping 0.01, blocks of 128; GPTQ on a symmetric
grid of min-max scales for groups of 32, with and without the order of activations; AWQ on one with zero points, without
its search of clipping. Arrays are [K, N]: codes int8, masks bool, weights float32; scales of AWQ float32 [K].
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests import surgeon

SEED, K, N, GROUP = 0, 160, 16, 32
FILE = Path(__file__).with_suffix(".npz")


def scales(w: np.ndarray, bits: int) -> np.ndarray:
    """Of groups, float32 [K / GROUP, N]."""
    return (np.abs(w).reshape(-1, GROUP, N).max(1) / (2 ** (bits - 1) - 0.5)).astype(np.float32)


def gptq(x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    gram, found = torch.tensor(x).T @ torch.tensor(x), {}
    for bits in (3, 4):
        scale = torch.tensor(scales(w, bits)).T.contiguous()
        for order in ("", "weight"):
            args = QuantizationArgs(
                num_bits=bits, symmetric=True, strategy="group", group_size=GROUP, actorder=order or None
            )
            weights, zeros = torch.tensor(w).T.contiguous(), torch.zeros_like(scale, dtype=torch.int8)
            made, _, fallback = quantize_weight(
                weights[None], gram.clone()[None], scale[None], zeros[None], None, args, blocksize=128, percdamp=0.01
            )
            assert not fallback.any()
            codes = made[0] / scale.repeat_interleave(GROUP, dim=1)
            found[f"gptq{bits}{order}"] = codes.round().to(torch.int8).numpy().T
    return found


def linear_layer(w: np.ndarray) -> Any:
    import torch

    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.tensor(w).T.contiguous()
    return linear


def sparsegpt(x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify

    linear, gram, found = linear_layer(w), torch.tensor(x).T @ torch.tensor(x), {}
    for name, n, m in (("half", 0, 0), ("2:4", 2, 4)):
        _, made = sgpt_sparsify.sparsify_weight(linear, {linear: gram.clone()}, 0.5, n, m, 128, 0.01, False)
        found[f"sparsegpt {name}"] = made.detach().numpy().T
    return found


def wanda(x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    linear, squares, found = linear_layer(w), torch.diag(torch.tensor(x).T @ torch.tensor(x)), {}
    for name, n, m in (("half", 0, 0), ("2:4", 2, 4)):
        made = wanda_sparsify.sparsify_weight(linear, {linear: squares}, 0.5, n, m)
        found[f"wanda {name}"] = made.detach().numpy().T != 0
    return found


def awq(x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    found = {}
    for bits in (3, 4):
        program, linear = AwqQuantizer.__new__(AwqQuantizer), linear_layer(w).requires_grad_(False)
        program.w_bit, program.group_size, program.zero_point, program.duo_scaling = bits, GROUP, True, True
        program.max_chunk_memory, program.n_parallel_calib_samples = 1 << 30, None
        copied = {"weight": linear.weight.clone()}
        linear.state_dict = lambda copied=copied: copied  # on a CPU its own would be the weights that the search scales
        whole = torch.nn.Sequential(linear)
        _, _, s = program._search_best_scale(whole, linear, [linear], torch.tensor(x), linear)
        made = program.pseudo_quantize_tensor(linear.weight * s)[0] / s
        found |= {f"awq{bits} scales": s.numpy(), f"awq{bits}": made.numpy().T}
    return found


if __name__ == "__main__":
    known = dict(np.load(FILE)) if FILE.exists() else {}
    for name in sys.argv[1:]:
        known |= {"awq": awq, "gptq": gptq, "sparsegpt": sparsegpt, "wanda": wanda}[name](*surgeon.layer(SEED, K, N))
    np.savez_compressed(FILE, **known)
