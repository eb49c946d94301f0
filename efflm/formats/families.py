"""The families of models that are read and written: which of Hugging Face's tensors holds each of our leaves.

A family is an entry in FAMILIES: how config.json describes it, and a Place for each leaf. To add one, add an entry;
tests/formats/make_goldens.py then makes the file for the test that compares it with transformers.
"""

import dataclasses
import re
from typing import Any

from efflm.formats.hf_config import Described
from efflm.formats.hf_values import NEEDED


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is stored: a tensor's name, in which * stands for the layer's number and # for the expert's.

    transpose: stored as [out, in]. part: one of queries (0), keys (1) and values (2) fused along the outputs; by_head:
    these are ordered by (head, part) and not by (part, head).
    """

    name: str
    transpose: bool = False
    part: int | None = None
    by_head: bool = False

    def tensor(self, path: str) -> str:
        layer, expert = re.match(r"block_(\d+)/", path), re.search(r"/expert_(\d+)/", path)
        name = self.name.replace("*", layer[1]) if layer else self.name
        return name.replace("#", expert[1]) if expert else name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """architecture: the name of transformers' class. prefix: of all tensors but the head's, absent from some files.
    places: {leaf: Place}, where `block/` stands for each layer and `expert/` for each expert. config: see
    formats.hf_config."""

    architecture: str
    prefix: str
    config: Described
    places: dict[str, Place]

    def place(self, path: str) -> Place:
        return self.places[re.sub(r"\b(block|expert)_\d+/", r"\1/", path)]


def _linear(leaf: str, name: str, bias: bool = False, **how: Any) -> dict[str, Place]:
    """The places of a linear layer's weight and bias, `transpose` unless said otherwise."""
    kernel = {f"{leaf}/kernel": Place(f"{name}.weight", **{"transpose": True} | how)}
    vector = {name: value for name, value in how.items() if name != "transpose"}
    return kernel | ({f"{leaf}/bias": Place(f"{name}.bias", **vector)} if bias else {})


def _norm(leaf: str, name: str, bias: bool = False) -> dict[str, Place]:
    scale = {f"{leaf}/scale": Place(f"{name}.weight")}
    return scale | ({f"{leaf}/bias": Place(f"{name}.bias")} if bias else {})


_LAYER = "model.layers.*."
_LLAMA_PLACES = (
    {"embedding": Place("model.embed_tokens.weight"), "unembedding": Place("lm_head.weight", transpose=True)}
    | _norm("final_norm", "model.norm")
    | _norm("block/attention_norm", f"{_LAYER}input_layernorm")
    | _norm("block/feedforward_norm", f"{_LAYER}post_attention_layernorm")
    | _linear("block/attention/query", f"{_LAYER}self_attn.q_proj")
    | _linear("block/attention/key", f"{_LAYER}self_attn.k_proj")
    | _linear("block/attention/value", f"{_LAYER}self_attn.v_proj")
    | _linear("block/attention/output", f"{_LAYER}self_attn.o_proj")
    | _linear("block/feedforward/gate", f"{_LAYER}mlp.gate_proj")
    | _linear("block/feedforward/up", f"{_LAYER}mlp.up_proj")
    | _linear("block/feedforward/down", f"{_LAYER}mlp.down_proj")
)
_LLAMA_KEYS = {
    "vocab_size": ("vocabulary", NEEDED),
    "hidden_size": ("width", NEEDED),
    "intermediate_size": ("mlp_dim", NEEDED),
    "num_hidden_layers": ("layers", NEEDED),
    "num_attention_heads": ("heads", NEEDED),
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_length", NEEDED),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "rope_theta": ("rope_base", 10000.0),
    "tie_word_embeddings": ("tied", False),
}
_LLAMA_FIXED = {"norm": "rms", "position": "rotary"}
_SILU = ("hidden_act", {"silu": "swiglu", "swish": "swiglu"})
_QK_NORMS = _norm("block/attention/query_norm", f"{_LAYER}self_attn.q_norm") | _norm(
    "block/attention/key_norm", f"{_LAYER}self_attn.k_norm"
)
_GEMMA_FIXED = _LLAMA_FIXED | {"post_norm": True, "norm_offset": 1.0}
_GEMMA_KEYS = _LLAMA_KEYS | {
    "num_key_value_heads": ("kv_heads", 4),
    "head_dim": ("head_dim", 256),
    "tie_word_embeddings": ("tied", True),
    "query_pre_attn_scalar": ("query_scalar", 256),
}
_GEMMA_ONLY = {"attention_bias": False, "use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA_PLACES = (
    _LLAMA_PLACES
    | _norm("block/attention_post_norm", f"{_LAYER}post_attention_layernorm")
    | _norm("block/feedforward_norm", f"{_LAYER}pre_feedforward_layernorm")
    | _norm("block/feedforward_post_norm", f"{_LAYER}post_feedforward_layernorm")
)


def _experts(router: str, gate: str, up: str, down: str) -> dict[str, Place]:
    """The places of a mixture of experts in the layer."""
    places = _linear("block/feedforward/router", f"{_LAYER}{router}")
    for leaf, name in (("gate", gate), ("up", up), ("down", down)):
        places |= _linear(f"block/feedforward/expert/{leaf}", f"{_LAYER}{name}")
    return places


_MLP_EXPERTS = _experts("mlp.gate", *(f"mlp.experts.#.{name}_proj" for name in ("gate", "up", "down")))
_EXPERT_KEYS = {
    "num_experts_per_tok": ("experts_per_token", 8),
    "norm_topk_prob": ("renormalized", False),
}
_GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}

_GPT2_LAYER = "transformer.h.*."
_NEOX_LAYER = "gpt_neox.layers.*."

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED,
            keys=_LLAMA_KEYS,
            activations=_SILU,
            only={"attention_bias": False, "mlp_bias": False},
        ),
        places=_LLAMA_PLACES,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED,
            keys=_LLAMA_KEYS | {"num_key_value_heads": ("kv_heads", 8)},
            activations=_SILU,
            windows="all",
        ),
        places=_LLAMA_PLACES,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED | {"qkv_bias": True},
            keys=_LLAMA_KEYS | {"num_key_value_heads": ("kv_heads", 32)},
            activations=_SILU,
            windows="some",
        ),
        places=_LLAMA_PLACES
        | _linear("block/attention/query", f"{_LAYER}self_attn.q_proj", bias=True)
        | _linear("block/attention/key", f"{_LAYER}self_attn.k_proj", bias=True)
        | _linear("block/attention/value", f"{_LAYER}self_attn.v_proj", bias=True),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED | {"qk_norm": True},
            keys=_LLAMA_KEYS | {"num_key_value_heads": ("kv_heads", 32), "head_dim": ("head_dim", 128)},
            activations=_SILU,
            only={"attention_bias": False},
            windows="some",
        ),
        places=_LLAMA_PLACES | _QK_NORMS,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_GEMMA_FIXED,
            keys=_GEMMA_KEYS
            | {"attn_logit_softcapping": ("score_cap", 50.0), "final_logit_softcapping": ("logit_cap", 30.0)},
            activations=("hidden_activation", {"gelu_pytorch_tanh": "geglu"}),
            only=_GEMMA_ONLY,
            windows="pattern",
            pattern=2,
            scales_embedding=True,
        ),
        places=_GEMMA_PLACES,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_GEMMA_FIXED | {"qk_norm": True},
            keys=_GEMMA_KEYS
            | {
                "rope_theta": ("rope_base", 1e6),
                "rope_local_base_freq": ("local_rope_base", 10000.0),
                "sliding_window_pattern": ("pattern", 6),
                "final_logit_softcapping": ("logit_cap", None),
            },
            activations=("hidden_activation", {"gelu_pytorch_tanh": "geglu"}),
            only=_GEMMA_ONLY | {"attn_logit_softcapping": None},
            windows="pattern",
            scales_embedding=True,
        ),
        places=_GEMMA_PLACES | _QK_NORMS,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED | {"renormalized": True},
            keys=_LLAMA_KEYS
            | {
                "num_key_value_heads": ("kv_heads", 8),
                "rms_norm_eps": ("norm_epsilon", 1e-5),
                "num_local_experts": ("experts", 8),
                "num_experts_per_tok": ("experts_per_token", 2),
            },
            activations=_SILU,
            windows="all",
            window=None,
        ),
        places=_LLAMA_PLACES
        | _experts("block_sparse_moe.gate", *(f"block_sparse_moe.experts.#.{name}" for name in ("w1", "w3", "w2"))),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED | {"qk_norm": True},
            keys={key: ours for key, ours in _LLAMA_KEYS.items() if key != "intermediate_size"}
            | _EXPERT_KEYS
            | {"num_key_value_heads": ("kv_heads", 4)}
            | {"moe_intermediate_size": ("mlp_dim", 768), "num_experts": ("experts", 128)},
            activations=_SILU,
            only={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
            aliases={"num_local_experts": "num_experts"},
            passed_over=("intermediate_size",),  # of layers without experts, of which there are none
            windows="some",
        ),
        places=_LLAMA_PLACES | _QK_NORMS | _MLP_EXPERTS,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        prefix="model.",
        config=Described(
            fixed=_LLAMA_FIXED | {"qk_norm": True, "qk_norm_whole": True},
            keys=_LLAMA_KEYS | _EXPERT_KEYS | {"rms_norm_eps": ("norm_epsilon", 1e-5), "num_experts": ("experts", 64)},
            activations=_SILU,
            only={"attention_bias": False, "clip_qkv": None},
        ),
        places=_LLAMA_PLACES | _QK_NORMS | _MLP_EXPERTS,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        config=Described(
            fixed={"norm": "layer", "position": "learned", "bias": True},
            keys={
                "vocab_size": ("vocabulary", NEEDED),
                "n_embd": ("width", NEEDED),
                "n_inner": ("mlp_dim", None),
                "n_layer": ("layers", NEEDED),
                "n_head": ("heads", NEEDED),
                "n_positions": ("max_length", NEEDED),
                "layer_norm_epsilon": ("norm_epsilon", 1e-5),
                "tie_word_embeddings": ("tied", True),
            },
            activations=("activation_function", _GELUS | {"gelu": "gelu_exact"}),
            only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        ),
        places={
            "embedding": Place("transformer.wte.weight"),
            "position_embedding": Place("transformer.wpe.weight"),
            "unembedding": Place("lm_head.weight", transpose=True),
        }
        | _norm("final_norm", "transformer.ln_f", bias=True)
        | _norm("block/attention_norm", f"{_GPT2_LAYER}ln_1", bias=True)
        | _norm("block/feedforward_norm", f"{_GPT2_LAYER}ln_2", bias=True)
        | _linear("block/attention/query", f"{_GPT2_LAYER}attn.c_attn", bias=True, transpose=False, part=0)
        | _linear("block/attention/key", f"{_GPT2_LAYER}attn.c_attn", bias=True, transpose=False, part=1)
        | _linear("block/attention/value", f"{_GPT2_LAYER}attn.c_attn", bias=True, transpose=False, part=2)
        | _linear("block/attention/output", f"{_GPT2_LAYER}attn.c_proj", bias=True, transpose=False)
        | _linear("block/feedforward/up", f"{_GPT2_LAYER}mlp.c_fc", bias=True, transpose=False)
        | _linear("block/feedforward/down", f"{_GPT2_LAYER}mlp.c_proj", bias=True, transpose=False),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        config=Described(
            fixed={"norm": "layer", "position": "rotary", "bias": True},
            keys={
                "vocab_size": ("vocabulary", NEEDED),
                "hidden_size": ("width", NEEDED),
                "intermediate_size": ("mlp_dim", NEEDED),
                "num_hidden_layers": ("layers", NEEDED),
                "num_attention_heads": ("heads", NEEDED),
                "max_position_embeddings": ("max_length", NEEDED),
                "layer_norm_eps": ("norm_epsilon", 1e-5),
                "rotary_emb_base": ("rope_base", 10000.0),
                "rotary_pct": ("rotary_fraction", 0.25),
                "use_parallel_residual": ("parallel", True),
                "tie_word_embeddings": ("tied", False),
            },
            activations=("hidden_act", {"gelu": "gelu_exact"} | _GELUS),
            only={"attention_bias": True},
        ),
        places={
            "embedding": Place("gpt_neox.embed_in.weight"),
            "unembedding": Place("embed_out.weight", transpose=True),
        }
        | _norm("final_norm", "gpt_neox.final_layer_norm", bias=True)
        | _norm("block/attention_norm", f"{_NEOX_LAYER}input_layernorm", bias=True)
        | _norm("block/feedforward_norm", f"{_NEOX_LAYER}post_attention_layernorm", bias=True)
        | _linear("block/attention/query", f"{_NEOX_LAYER}attention.query_key_value", bias=True, part=0, by_head=True)
        | _linear("block/attention/key", f"{_NEOX_LAYER}attention.query_key_value", bias=True, part=1, by_head=True)
        | _linear("block/attention/value", f"{_NEOX_LAYER}attention.query_key_value", bias=True, part=2, by_head=True)
        | _linear("block/attention/output", f"{_NEOX_LAYER}attention.dense", bias=True)
        | _linear("block/feedforward/up", f"{_NEOX_LAYER}mlp.dense_h_to_4h", bias=True)
        | _linear("block/feedforward/down", f"{_NEOX_LAYER}mlp.dense_4h_to_h", bias=True),
    ),
}
