"""The keys of a GGUF file's metadata: each is read, changes nothing, says what is done anyway, or is refused.

Names and meanings are those of ggml's docs/gguf.md and of the `gguf` library. NAME stands for the architecture.
"""

import math
import re
from typing import Any

import numpy as np

from efflm.config import require
from efflm.formats.gguf_file import Header

_READ = """
    general.architecture general.alignment split.count NAME.context_length NAME.embedding_length NAME.block_count
    NAME.feed_forward_length NAME.expert_count NAME.attention.head_count NAME.attention.head_count_kv
    NAME.attention.key_length NAME.attention.value_length NAME.attention.layer_norm_rms_epsilon
    NAME.attention.sliding_window NAME.rope.dimension_count NAME.rope.freq_base NAME.rope.scaling.type
    NAME.rope.scaling.factor NAME.rope.scaling.yarn_beta_fast NAME.rope.scaling.yarn_beta_slow
    tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.ggml.scores
    tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id
    tokenizer.ggml.eom_token_id tokenizer.ggml.unknown_token_id tokenizer.ggml.padding_token_id
    tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix tokenizer.chat_template
"""
READ = frozenset(_READ.split())
# What these architectures have beside.
READ_OF = {
    "gemma2": {"NAME.attn_logit_softcapping", "NAME.final_logit_softcapping", "NAME.attention.sliding_window_pattern"},
    "gemma3": {"NAME.final_logit_softcapping", "NAME.attention.sliding_window_pattern", "NAME.rope.freq_base_swa"},
}
# What a file says of where it comes from and how it was quantized and split; names of tokens that nothing here writes;
# the length that Llama 3's frequencies, which the file stores themselves, were made from.
HARMLESS = re.compile(
    r"general\.(?!type$|architecture$|alignment$)[\w.]+|split\.(no|tensors\.count)|quantize\.[\w.]+|mradermacher\.[\w.]+"
    r"|tokenizer\.ggml\.((seperator|separator|mask|cls|prefix|suffix|middle|fim_\w{3})_token_id|token_type_count)"
    r"|tokenizer\.chat_templates|tokenizer\.chat_template\.\w+|tokenizer\.huggingface\.json"
    r"|NAME\.(tensor_data_layout|rope\.scaling\.(original_context_length|finetuned))"
)
# What says that something is not there, or is as the supported architectures have it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "NAME.use_parallel_residual": (False,),
    "NAME.attention.causal": (True,),
    "NAME.logit_scale": (0, 1),
    "NAME.residual_scale": (0, 1),
    "NAME.embedding_scale": (0, 1),
    "NAME.rope.scale_linear": (0, 1),
    "NAME.rope.scaling.attn_factor": (0, 1),
    "NAME.rope.scaling.yarn_ext_factor": (1,),
    "NAME.rope.scaling.yarn_attn_factor": (1,),
    "NAME.rope.scaling.yarn_log_multiplier": (0,),
} | dict.fromkeys(
    (
        "NAME.pooling_type",
        "NAME.leading_dense_block_count",
        "NAME.nextn_predict_layers",
        "NAME.attention.max_alibi_bias",
        "NAME.attention.clamp_kqv",
        "NAME.attn_logit_softcapping",
        "NAME.final_logit_softcapping",
    ),
    (0,),
)


def require_known(header: Header, head_dim: int) -> None:
    """Raise InputError for a key that may change what is computed and is not read."""
    architecture, where = header.metadata["general.architecture"], header.path
    rows = header.tensors["token_embd.weight"].shape[0]
    for key, value in header.metadata.items():
        name = f"NAME{key.removeprefix(architecture)}" if key.startswith(f"{architecture}.") else key
        if name in READ or name in READ_OF.get(architecture, ()) or HARMLESS.fullmatch(name):
            continue
        plain = isinstance(value, bool | int | float | str)
        if name == "NAME.vocab_size":
            good = plain and value in (rows, len(header.metadata.get("tokenizer.ggml.tokens") or ()))
        elif name == "NAME.attention.scale":  # 0: one over the root of the head's size
            good = plain and (value == 0 or math.isclose(value, head_dim**-0.5, rel_tol=1e-5))
        elif ".expert_" in name:
            good = not np.any(value)
        else:
            good = plain and value in NEUTRAL.get(name, ())
        require(
            good,
            f"{where}: {key:.80} is {value!r:.80}, which is not supported, so that the model would compute something "
            "else; if it changes nothing, take it out (gguf-new-metadata --remove-metadata)",
        )
