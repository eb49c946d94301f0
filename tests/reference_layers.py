"""What the reference programs of GPTQ, SparseGPT and Wanda make of a small layer: writes reference_layers.npz.

    pip install llmcompressor==0.14.0.1
    python -m tests.reference_layers

The layer is surgeon.layer(0, K=160, N=16): two blocks of 128 inputs. Damping 0.01, blocks of 128; GPTQ on a symmetric
grid of min-max scales for groups of 32, with and without the order of activations. Arrays are [K, N]: codes int8, masks
bool, weights float32.
"""

from pathlib import Path

import numpy as np

from tests import surgeon

SEED, K, N, GROUP = 0, 160, 16, 32
FILE = Path(__file__).with_suffix(".npz")


def scales(w: np.ndarray, bits: int) -> np.ndarray:
    """Of groups, float32 [K / GROUP, N]."""
    return (np.abs(w).reshape(-1, GROUP, N).max(1) / (2 ** (bits - 1) - 0.5)).astype(np.float32)


def main() -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    torch.set_num_threads(1)
    x, w = surgeon.layer(SEED, K, N)
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
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.tensor(w).T.contiguous()
    for name, n, m in (("half", 0, 0), ("2:4", 2, 4)):
        hessian = {linear: gram.clone()}
        _, made = sgpt_sparsify.sparsify_weight(linear, hessian, 0.5, n, m, 128, 0.01, False)
        found[f"sparsegpt {name}"] = made.detach().numpy().T
        made = wanda_sparsify.sparsify_weight(linear, {linear: torch.diag(gram)}, 0.5, n, m)
        found[f"wanda {name}"] = made.detach().numpy().T != 0
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
