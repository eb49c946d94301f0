"""Training of a small GPT in PyTorch on the CPU, a peer of `experiments.bench --what=train`.

    pip install torch==2.14.0 numpy
    python torch_train.py --layers=6 --width=384

Prints a JSON line for each of float32 and bfloat16 (autocast), eager and compiled: peer, dtype, compiled,
tokens_per_second (median of --steps steps). bfloat16 is left out where the processor only emulates it.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD):
        b, t, d = x_BTD.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x_BTD)).split(d, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x_BTD = x_BTD + self.out(mixed)
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh"))


class GPT(nn.Module):
    """Pre-norm GPT with learned positions and tied embeddings; the result is the loss."""

    def __init__(self, shape: argparse.Namespace):
        super().__init__()
        self.embed, self.pos = nn.Embedding(shape.vocab, shape.width), nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens_BT, targets_BT):
        x_BTD = self.embed(tokens_BT) + self.pos.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.norm(x_BTD) @ self.embed.weight.T
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


def tokens_per_second(shape: argparse.Namespace, bfloat16: bool, compiled: bool) -> float:
    torch.manual_seed(0)
    model = GPT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(shape.vocab, (shape.batch, shape.length))
    times = []
    for _ in range(shape.warmup + shape.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = run(tokens, tokens.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return tokens.numel() / statistics.median(times[shape.warmup :])


def emulated(shape: argparse.Namespace, best: float) -> bool:
    """Whether bfloat16 takes minutes a step here: a matmul is slow, or one layer slower than all of them in float32."""
    x = torch.randn(512, 512, dtype=torch.bfloat16)
    start = time.perf_counter()
    x @ x
    if time.perf_counter() - start > 0.2:
        return True
    probe = argparse.Namespace(**{**vars(shape), "layers": 1, "steps": 1, "warmup": 0})
    return tokens_per_second(probe, bfloat16=True, compiled=False) < best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "width": 384, "heads": 6, "vocab": 4096, "length": 256, "batch": 16, "steps": 7, "warmup": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    shape, best = parser.parse_args(), 0.0
    for dtype in ("float32", "bfloat16"):
        for compiled in (False, True):
            if dtype == "bfloat16" and emulated(shape, best):
                continue
            rate = tokens_per_second(shape, dtype == "bfloat16", compiled)
            best = max(best, rate)
            line = {"peer": "torch", "dtype": dtype, "compiled": compiled, "tokens_per_second": round(rate, 1)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
