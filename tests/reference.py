"""The Transformer once more, in float64 numpy with loops, from the papers' equations and sharing no code with efflm."""

import math

import numpy as np


def _rms(params, config, x):
    return (config.norm_offset + params["scale"]) * x / np.sqrt((x * x).mean() + config.norm_epsilon)


def _norm(config, params, x):
    if config.norm == "rms":
        return _rms(params, config, x)
    return params["scale"] * (x - x.mean()) / np.sqrt(x.var() + config.norm_epsilon) + params["bias"]


def _linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def _frequency(config, window, i, rotated):
    """Llama 3.1's, by its three bands of wavelengths; or divided by a factor."""
    if window and config.local_rope_base:
        return config.local_rope_base ** (-2 * i / rotated)
    frequency, scaling = config.rope_base ** (-2 * i / rotated), config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_length / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_max_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _rotate(config, window, x, position):
    rotated = int(len(x) * config.rotary_fraction)
    half = rotated // 2
    out = x.copy()
    for i in range(half):
        angle = position * _frequency(config, window, i, rotated)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _attend(config, block, params, xs):
    size = block.head_dim
    split = lambda y: y.reshape(-1, size)
    queries, keys, values = ([split(_linear(params[name], x)) for x in xs] for name in ("query", "key", "value"))
    if config.qk_norm_whole:
        whole = lambda rows, name: [_rms(params[name], config, row.reshape(-1)).reshape(row.shape) for row in rows]
        queries, keys = whole(queries, "query_norm"), whole(keys, "key_norm")
    elif config.qk_norm:
        by_head = lambda rows, name: [np.stack([_rms(params[name], config, head) for head in row]) for row in rows]
        queries, keys = by_head(queries, "query_norm"), by_head(keys, "key_norm")
    if config.position == "rotary":
        turn = lambda rows: [
            np.stack([_rotate(config, block.window, head, t) for head in row]) for t, row in enumerate(rows)
        ]
        queries, keys = turn(queries), turn(keys)
    out = []
    for t in range(len(xs)):
        heads = []
        for h in range(block.heads):
            shared = h * block.kv_heads // block.heads
            seen = range(max(0, t + 1 - block.window) if block.window else 0, t + 1)
            scores = np.array([queries[t][h] @ keys[s][shared] for s in seen]) / math.sqrt(config.query_scalar or size)
            scores = _capped(scores, config.score_cap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(weight * values[s][shared] for s, weight in zip(seen, weights)))
        out.append(_linear(params["output"], np.concatenate(heads)))
    return out


def _mixed(config, block, params, x):
    """Of a mixture of experts: expert by expert, by the probabilities of the few that are chosen."""
    logits = _linear(params["router"], x)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[: block.experts_per_token]
    total = p[chosen].sum() if config.renormalized else 1.0
    return sum(p[e] / total * _feedforward(config, params[f"expert_{e}"], x) for e in chosen)


def _feedforward(config, params, x):
    if config.feedforward == "swiglu":
        gate = _linear(params["gate"], x)
        return _linear(params["down"], gate / (1 + np.exp(-gate)) * _linear(params["up"], x))
    if config.feedforward == "geglu":
        return _linear(params["down"], _gelu(_linear(params["gate"], x)) * _linear(params["up"], x))
    up = _linear(params["up"], x)
    if config.feedforward == "gelu_exact":
        return _linear(params["down"], up * (1 + np.array([math.erf(u / math.sqrt(2)) for u in up])) / 2)
    return _linear(params["down"], _gelu(up))


def _gelu(x):
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def streams(config, params, tokens):
    """The residual stream [T, D] in float64 of one row of tokens: before the first layer, and after each."""
    widen = lambda node: {k: widen(v) for k, v in node.items()} if isinstance(node, dict) else np.float64(node)
    params = widen(params)
    xs = [config.embedding_scale * params["embedding"][token] for token in tokens]
    if config.position == "learned":
        xs = [x + params["position_embedding"][t] for t, x in enumerate(xs)]
    found = [np.stack(xs)]
    for i, block in enumerate(config.blocks):
        layer = params[f"block_{i}"]
        attended = _attend(config, block, layer["attention"], [_norm(config, layer["attention_norm"], x) for x in xs])
        post = lambda name, x, layer=layer: _norm(config, layer[name], x) if config.post_norm else x
        middle = [x + post("attention_post_norm", a) for x, a in zip(xs, attended)]
        read = [_norm(config, layer["feedforward_norm"], x) for x in (xs if config.parallel else middle)]
        apply = lambda r, block=block, own=layer["feedforward"]: (
            _mixed(config, block, own, r) if block.experts else _feedforward(config, own, r)
        )
        added = [apply(r) for r in read]
        xs = [x + post("feedforward_post_norm", a) for x, a in zip(middle, added)]
        found.append(np.stack(xs))
    return found


def forward(config, params, tokens):
    """Logits [T, V] in float64 of one row of tokens."""
    norm = {name: np.float64(leaf) for name, leaf in params["final_norm"].items()}
    head = np.float64(params["embedding"]).T if config.tied else np.float64(params["unembedding"])
    logits = [_norm(config, norm, x) @ head for x in streams(config, params, tokens)[-1]]
    return _capped(np.stack(logits), config.logit_cap)
