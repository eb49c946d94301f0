"""A GGUF file as a Hugging Face model: its metadata as a config.json's values, its tensors under their names there.

So formats.translate makes the model of it, tensor by tensor, as of safetensors shards.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from efflm.config import InputError, require
from efflm.config.model import MOST_LAYERS, BlockConfig
from efflm.formats import gguf_file, gguf_keys, gguf_tokenizer
from efflm.formats.tensors import Tensors
from efflm.formats.translate import to_model
from efflm.model import LanguageModel
from efflm.text.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3", "gemma2", "gemma3")  # deci: llama, its layers of different sizes
PAIRED = ("llama", "deci")  # whose q and k have the two of each rotary pair as neighbours
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
INNER_OF_GEMMA = INNER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Where the file does not say it: every which layer has no window; of how many layers is the model whose scores are
# divided by the root of width / heads. As llama.cpp has it.
GEMMA = {"gemma2": (2, 46), "gemma3": (6, 62)}
# Sizes that differ from layer to layer in some architectures: in a BlockConfig, in a config.json.
BY_LAYER = {
    "attention.head_count": ("heads", "num_attention_heads"),
    "attention.head_count_kv": ("kv_heads", "num_key_value_heads"),
    "feed_forward_length": ("mlp_dim", "intermediate_size"),
}
ROPE_FACTORS = "rope_freqs.weight"
CAPS = (("attn_logit", 50.0), ("final_logit", 30.0))  # Gemma 2's, where the file does not say them
YARN = (("fast", 32.0), ("slow", 1.0))  # what YaRN's betas are where the file does not say so
# What Llama 3.1 and its successors scale their rotary frequencies by, besides the factor.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load(path: Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> tuple[LanguageModel, Tokenizer]:
    """The model, its weights dequantized to float32 unless another dtype is asked for, and its tokenizer.

    Raises InputError for a file that is damaged or holds what is not supported.
    """
    header = gguf_file.read_header(path)
    description, names = config_of(header), names_of(header)
    tokens = gguf_tokenizer.from_metadata(header.metadata, path)
    require(
        tokens.vocabulary <= description["vocab_size"],
        f"{path} has {tokens.vocabulary} tokens, but embeds only {description['vocab_size']}",
    )
    source = Tensors(
        {name: header.tensors[stored].shape for name, stored in names.items()},
        lambda name: read(header, names, description, name),
    )
    try:
        return to_model(description, source, dtype=dtype, mesh=mesh, blocks=blocks_of(header, description)), tokens
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def quantization(path: Path) -> str:
    """The quantized type that most weights of the file are stored in, "" if none is.

    For reports on compression: dequantized weights have only the values of that type, so rounding them to as few bits
    again costs nothing. For other weights it would cost something.
    """
    counts: dict[str, int] = {}
    for tensor in gguf_file.read_header(path).tensors.values():
        if tensor.kind not in gguf_file.FLOATS:
            counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
    return max(counts, key=counts.get, default="")


def config_of(header: gguf_file.Header) -> dict[str, Any]:
    """The values of a config.json. Raises InputError for what is missing, absurd or not supported."""
    where, metadata = header.path, header.metadata
    architecture = metadata.get("general.architecture")
    require(
        architecture in ARCHITECTURES,
        f"{where} has the architecture {architecture!r:.80}, but read are {', '.join(ARCHITECTURES)}",
    )
    require(
        metadata.get("split.count", 0) in (0, 1),
        f"{where} is one part of {metadata.get('split.count')}: join them with llama-gguf-split --merge",
    )

    def number(key: str, default: Any = None, kind: type = int) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, all alike
        elif architecture == "deci" and key in BY_LAYER and isinstance(value, np.ndarray) and value.size:
            value = value[0].item()  # blocks_of reads the others
        require(value is not None, f"{where} does not say {architecture}.{key}")
        right = (
            isinstance(value, int | kind)
            and not isinstance(value, bool)
            and 0 < value < (2**31 if kind is int else math.inf)
        )
        require(right, f"{where}: {architecture}.{key} is {value!r:.80}, but must be one positive {kind.__name__}")
        return float(str(np.float32(value))) if kind is float else value  # 1e-5, where float32 has 9.99999975e-6

    require(
        f"{architecture}.expert_count" not in metadata or metadata[f"{architecture}.expert_count"] == 0,
        f"{where} is a mixture of experts, which is not supported",
    )
    layers, width, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    require(
        layers <= min(len(header.tensors), MOST_LAYERS),
        f"{where} claims {layers} layers, but has {len(header.tensors)} tensors",
    )
    head_dim = number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        given = number(key, head_dim)
        require(given == head_dim, f"{where}: {architecture}.{key} is {given}, but must be the head's size {head_dim}")
    require("token_embd.weight" in header.tensors, f"{where} has no tensor token_embd.weight")
    gguf_keys.require_known(header, head_dim)
    config = {
        "model_type": "llama" if architecture == "deci" else architecture,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": number("rope.freq_base", 10000.0, kind=float),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    }
    if architecture in GEMMA:
        config = _gemma(architecture, metadata, config, number)
    elif metadata.get(f"{architecture}.attention.sliding_window", 0) != 0:
        require(architecture == "llama", f"{where} has a sliding window, which is supported for llama only")
        config |= {"model_type": "mistral", "sliding_window": number("attention.sliding_window")}
    scaling = _rope_scaling(header, head_dim, config["rope_theta"], number)
    return config | ({"rope_scaling": scaling} if scaling else {})


def blocks_of(header: gguf_file.Header, config: dict[str, Any]) -> tuple[BlockConfig, ...] | None:
    """The layers, where the architecture has them of different sizes. Raises InputError."""
    if header.metadata["general.architecture"] != "deci":
        return None
    sizes = {}
    for key, (ours, theirs) in BY_LAYER.items():
        value = header.metadata.get(f"deci.{key}", config[theirs])
        sizes[ours] = value.tolist() if isinstance(value, np.ndarray) else [value] * config["num_hidden_layers"]
        require(
            len(sizes[ours]) == config["num_hidden_layers"],
            f"{header.path}: deci.{key} has {len(sizes[ours])} numbers for {config['num_hidden_layers']} layers",
        )
    rows = zip(*sizes.values(), strict=True)
    return tuple(BlockConfig(**dict(zip(sizes, row, strict=True)), head_dim=config["head_dim"]) for row in rows)


def _gemma(
    architecture: str, metadata: dict[str, Any], config: dict[str, Any], number: Callable[..., Any]
) -> dict[str, Any]:
    """The values of Gemma 2's or Gemma 3's config.json. number: reads a key."""
    layers, (period, largest) = config["num_hidden_layers"], GEMMA[architecture]
    given = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(given, np.ndarray) and given.dtype == bool:
        local = given.tolist()  # one for each layer
    else:
        period = number("attention.sliding_window_pattern", period)
        local = [(i + 1) % period > 0 for i in range(layers)]
    width_of_head = config["hidden_size"] // config["num_attention_heads"]
    config = {key: value for key, value in config.items() if key != "hidden_act"} | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width_of_head if layers == largest else config["head_dim"],
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
    }
    if architecture == "gemma2":
        caps = {f"{name}_softcapping": number(f"{name}_softcapping", cap, kind=float) for name, cap in CAPS}
        return config | caps | {"sliding_window": number("attention.sliding_window", 4096)}
    local_base = number("rope.freq_base_swa", 10000.0, kind=float)
    return config | {
        "model_type": "gemma3_text",
        "sliding_window": number("attention.sliding_window"),
        "rope_local_base_freq": local_base,
        "final_logit_softcapping": metadata.get("gemma3.final_logit_softcapping"),
    }


def _rope_scaling(
    header: gguf_file.Header, head_dim: int, base: float, number: Callable[..., Any]
) -> dict[str, Any] | None:
    """Linear scaling or YaRN, or Llama 3's scaling from the divisors of the rotary frequencies that the file stores in
    place of its parameters. number: reads a key. Raises InputError for any other."""
    where, architecture = header.path, header.metadata["general.architecture"]
    kind = header.metadata.get(f"{architecture}.rope.scaling.type", "linear")
    require(
        kind in ("none", "linear", "yarn"),
        f"{where} scales rotary positions by {kind!r:.80}, but supported are linear, yarn and Llama 3's way",
    )
    scales = kind != "none" and header.metadata.get(f"{architecture}.rope.scaling.factor", 0) != 0
    factor = number("rope.scaling.factor", kind=float) if scales else 1.0
    if factor != 1:
        require(ROPE_FACTORS not in header.tensors, f"{where} scales rotary positions by {kind} and by {ROPE_FACTORS}")
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "linear":
            return scaling
        original = number("rope.scaling.original_context_length", number("context_length"))
        betas = {f"beta_{end}": number(f"rope.scaling.yarn_beta_{end}", absent, kind=float) for end, absent in YARN}
        return scaling | {"original_max_position_embeddings": original} | betas
    if ROPE_FACTORS not in header.tensors:
        return None
    shape = header.tensors[ROPE_FACTORS].shape
    require(shape == (head_dim // 2,), f"{where}: {ROPE_FACTORS} has the shape {shape}, but must have {head_dim // 2}")
    factors = gguf_file.read_tensor(header, ROPE_FACTORS)
    if (factors == 1).all():
        return None
    factor = float(factors.max())
    require(
        np.allclose(factors, llama3_divisors(head_dim, base, factor), rtol=1e-4),
        f"{where}: {ROPE_FACTORS} scales rotary positions in another way than Llama 3's, which is not supported",
    )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}


def llama3_divisors(head_dim: int, base: float, factor: float) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by [head_dim / 2]: the slow ones by `factor`, the fast ones by 1.

    In between, where a wavelength fits 1 to 4 times into the original length, frequencies are interpolated.
    """
    low, high, original = LLAMA3_SCALING.values()
    turns = original * base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def names_of(header: gguf_file.Header) -> dict[str, str]:
    """Name in a Hugging Face checkpoint -> name in the file. Raises InputError for a tensor that has none there."""
    names, inner = {}, INNER_OF_GEMMA if header.metadata["general.architecture"] in GEMMA else INNER
    for name in header.tensors:
        if name == ROPE_FACTORS:
            continue
        layer = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name)
        outer = re.fullmatch(r"(\w+)\.(weight)", name)
        if layer and layer[2] in inner:
            names[f"model.layers.{int(layer[1])}.{inner[layer[2]]}.{layer[3]}"] = name
        elif outer and outer[1] in OUTER:
            names[f"{OUTER[outer[1]]}.{outer[2]}"] = name
        else:
            require(False, f"{header.path} has the tensor {name!r:.80}, which no supported architecture has")
    return names


def read(header: gguf_file.Header, names: dict[str, str], config: dict[str, Any], name: str) -> np.ndarray:
    """The tensor of that Hugging Face name, float32, laid out as there."""
    values, architecture = gguf_file.read_tensor(header, names[name]), header.metadata["general.architecture"]
    if architecture in GEMMA and name.endswith("norm.weight"):
        return values - 1  # to which the converter has added what these norms add to their weight
    part = re.search(r"layers\.(\d+)\.self_attn\.([qk])_proj\.", name)
    if architecture in PAIRED and part:
        key = "attention.head_count" if part[2] == "q" else "attention.head_count_kv"
        given, one = header.metadata.get(f"deci.{key}"), config[BY_LAYER[key][1]]
        heads = int(given[int(part[1])]) if isinstance(given, np.ndarray) else one
        require(
            len(values) % (2 * heads) == 0,
            f"{header.path}: {names[name]} has {len(values)} rows, which {heads} heads do not divide",
        )
        values = halved(values, heads)
    return values


def halved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...] of q or k with the two of rotary pair i at i and i + H/2 of their head: as everywhere but
    in PAIRED architectures, whose converter puts them at 2i and 2i + 1."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
