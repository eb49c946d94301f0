"""The Transformer once more, in float64 numpy with loops, from the papers' equations and sharing no code with efflm."""

import math

import numpy as np


def _norm(config, params, x):
    if config.norm == "rms":
        return params["scale"] * x / np.sqrt((x * x).mean() + config.norm_epsilon)
    return params["scale"] * (x - x.mean()) / np.sqrt(x.var() + config.norm_epsilon) + params["bias"]


def _linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def _rotate(x, position, base):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def _attend(config, block, params, xs):
    size = block.head_dim
    split = lambda y: y.reshape(-1, size)
    queries, keys, values = ([split(_linear(params[name], x)) for x in xs] for name in ("query", "key", "value"))
    if config.position == "rotary":
        turn = lambda rows: [np.stack([_rotate(h, t, config.rope_base) for h in row]) for t, row in enumerate(rows)]
        queries, keys = turn(queries), turn(keys)
    out = []
    for t in range(len(xs)):
        heads = []
        for h in range(block.heads):
            shared = h * block.kv_heads // block.heads
            scores = np.array([queries[t][h] @ keys[s][shared] / math.sqrt(size) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(weight * values[s][shared] for s, weight in enumerate(weights)))
        out.append(_linear(params["output"], np.concatenate(heads)))
    return out


def _feedforward(config, params, x):
    if config.feedforward == "swiglu":
        gate = _linear(params["gate"], x)
        return _linear(params["down"], gate / (1 + np.exp(-gate)) * _linear(params["up"], x))
    up = _linear(params["up"], x)
    return _linear(params["down"], 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))))


def forward(config, params, tokens):
    """Logits [T, V] in float64 of one row of tokens."""
    widen = lambda node: {k: widen(v) for k, v in node.items()} if isinstance(node, dict) else np.float64(node)
    params = widen(params)
    xs = [params["embedding"][token] for token in tokens]
    if config.position == "learned":
        xs = [x + params["position_embedding"][t] for t, x in enumerate(xs)]
    for i, block in enumerate(config.blocks):
        layer = params[f"block_{i}"]
        attended = _attend(config, block, layer["attention"], [_norm(config, layer["attention_norm"], x) for x in xs])
        xs = [x + a for x, a in zip(xs, attended)]
        xs = [x + _feedforward(config, layer["feedforward"], _norm(config, layer["feedforward_norm"], x)) for x in xs]
    head = params["embedding"].T if config.tied else params["unembedding"]
    return np.stack([_norm(config, params["final_norm"], x) @ head for x in xs])
