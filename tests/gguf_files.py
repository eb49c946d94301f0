"""Tiny GGUF files, written by the gguf library, and the values of every quantized type, worked out one by one."""

import gguf
import numpy as np

from efflm.formats.gguf_file import KINDS

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 256, 512, 8, 4, 2
ALPHABET = [*map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)])]
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "Ġt", "he", "Ġthe", "in"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n"]


def weights(rng, architecture="llama", tied=True, width=WIDTH, hidden=HIDDEN, layers=LAYERS, head=0):
    """float32 weights by their Hugging Face names, in their layout there, [out, in]."""
    draw = lambda *shape: rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
    head = head or width // HEADS
    made = {"model.embed_tokens.weight": draw(len(TOKENS), width), "model.norm.weight": 1 + 0.1 * draw(width)}
    if not tied:
        made["lm_head.weight"] = draw(len(TOKENS), width)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            made[f"{at}self_attn.{name}_proj.weight"] = draw(rows, width)
            if architecture == "qwen2":
                made[f"{at}self_attn.{name}_proj.bias"] = draw(rows)
        if architecture in ("qwen3", "gemma3"):
            made[f"{at}self_attn.q_norm.weight"] = 1 + draw(head)
            made[f"{at}self_attn.k_norm.weight"] = 1 + draw(head)
        made[f"{at}self_attn.o_proj.weight"] = draw(width, HEADS * head)
        gemma = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if architecture in GEMMA else ()
        for name in ("input_layernorm", "post_attention_layernorm", *gemma):
            made[f"{at}{name}.weight"] = 1 + 0.1 * draw(width)
        made[f"{at}mlp.gate_proj.weight"] = draw(hidden, width)
        made[f"{at}mlp.up_proj.weight"] = draw(hidden, width)
        made[f"{at}mlp.down_proj.weight"] = draw(width, hidden)
    return made


GEMMA = ("gemma2", "gemma3")
NAMES = {name: gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 6) for name in ("qwen3", *GEMMA)}


def ggml_name(name, architecture):
    """model.layers.1.self_attn.q_proj.weight -> blk.1.attn_q.weight, by the library's own table."""
    table = NAMES.get(architecture, NAMES["qwen3"])
    return table.get_name(name, try_suffixes=(".weight", ".bias"))


def interleaved(rows, heads):
    """As the converter of llama orders the rows of q and k: of each head row i, then row i + H/2, for each i."""
    size = len(rows) // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write(path, tensors, architecture="llama", kind="F32", metadata=None, tokenizer=True, extra=None):
    """A model file; matrices are stored as `kind`. metadata: values to set over those of the tiny model, or None to
    leave one out."""
    writer = gguf.GGUFWriter(path, architecture)
    width = tensors["model.embed_tokens.weight"].shape[1]
    window = {"attention.sliding_window": 16} if architecture in GEMMA else {}
    values = window | {
        "block_count": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers")),
        "context_length": 128,
        "embedding_length": width,
        "feed_forward_length": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 20000.0,
        **(metadata or {}),
    }
    for name, value in values.items():
        key = name if name.startswith(("general", "split", "tokenizer", "something")) else f"{architecture}.{name}"
        if value is None:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for name, array in tensors.items():
        if architecture in ("llama", "deci") and (".q_proj" in name or ".k_proj" in name):
            array = interleaved(array, HEADS if ".q_proj" in name else KV_HEADS)
        if architecture in GEMMA and name.endswith("norm.weight"):
            array = array + 1  # as the converter of Gemma stores them
        if array.ndim == 2 and kind != "F32":
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(ggml_name(name, architecture), gguf.quants.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(ggml_name(name, architecture), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where the float16 numbers of a block lie, of the types that have other places than its first two or four bytes.
HALVES = {name: [0] for name in ("Q4_0", "Q5_0", "Q8_0", "F16", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ2_S", "IQ3_S")}
HALVES |= {"IQ2_XXS": [0], "IQ2_XS": [0], "IQ3_XXS": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}
HALVES |= {"TQ1_0": [52], "TQ2_0": [64], "F32": [], "BF16": [], "MXFP4": [], "NVFP4": [], "IQ1_M": []}


def random_blocks(rng, kind, count):
    """Blocks of `kind`, every bit drawn but those of scales, which are of ordinary size: uint8 [count, bytes]."""
    width = next(width for name, _, width in KINDS.values() if name == kind)
    blocks = rng.integers(0, 256, (count, width), np.uint8)
    for at in HALVES.get(kind, [0, 2]):
        blocks[:, at : at + 2] = rng.normal(0, 0.1, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == "BF16":
        blocks[:, 1] &= 0xBF  # exponents below 2: neither infinite nor not a number
    if kind == "F32":
        blocks[:] = rng.normal(size=(count, 1)).astype(np.float32).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(100, 130, count)  # a power of two
    if kind == "IQ1_M":  # a float16 of ordinary size, in the upper halves of the last four pairs of bytes
        blocks[:, 49::2] &= 0x0F
        blocks[:, 49::2] |= np.array([0x00, 0x80, 0x20, 0x20], np.uint8)
    return blocks


# The types with a table of points, which `value` does not know.
POINTS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # the magnitudes of a float of four bits


def value(kind, block, e):
    """Element e of one block, uint8 [bytes], in Python's own arithmetic, from the layouts in ggml-common.h."""
    b = [int(byte) for byte in block]
    half = lambda at: float(np.array(b[at : at + 2], np.uint8).view(np.float16)[0])
    nibble = lambda at: (b[at + e % 16] >> (4 * (e // 16))) & 15
    bit = lambda at: (b[at + e // 8] >> (e % 8)) & 1
    signed = lambda byte: byte - 256 if byte > 127 else byte
    if kind == "F32":
        return float(np.array(b, np.uint8).view(np.float32)[0])
    if kind == "F16":
        return half(0)
    if kind == "BF16":
        return float(np.array([0, 0, *b], np.uint8).view(np.float32)[0])
    if kind == "Q4_0":
        return half(0) * (nibble(2) - 8)
    if kind == "Q4_1":
        return half(0) * nibble(4) + half(2)
    if kind == "Q5_0":
        return half(0) * (nibble(6) + 16 * bit(2) - 16)
    if kind == "Q5_1":
        return half(0) * (nibble(8) + 16 * bit(4)) + half(2)
    if kind == "Q8_0":
        return half(0) * signed(b[2 + e])
    if kind == "IQ4_NL":
        return half(0) * IQ4[nibble(2)]
    if kind == "MXFP4":
        return 2.0 ** (b[0] - 127) * E2M1[nibble(1) & 7] * (-1 if nibble(1) & 8 else 1)
    part, lane = e // 32, e % 32
    if kind == "NVFP4":
        part, lane = e // 16, e % 16
        code, scale = (b[4 + 8 * part + lane % 8] >> (4 * (lane // 8))) & 15, b[part]
        exponent, mantissa = (scale >> 3) & 15, scale & 7
        scale = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
        return (0 if b[part] == 127 else scale) * E2M1[code & 7] * (-1 if code & 8 else 1)
    if kind == "IQ4_XS":
        scale = (b[4 + part // 2] >> (4 * (part % 2))) & 15
        scale += 16 * (((b[2] + 256 * b[3]) >> (2 * part)) & 3)
        code = (b[8 + 16 * part + lane % 16] >> (4 * (lane // 16))) & 15
        return half(0) * (scale - 32) * IQ4[code]
    if kind in ("Q2_K", "Q3_K", "TQ2_0"):
        at = {"Q2_K": 16, "Q3_K": 32, "TQ2_0": 0}[kind]
        low = (b[at + 32 * (e // 128) + lane] >> (2 * (part % 4))) & 3
        if kind == "TQ2_0":
            return half(64) * (low - 1)
        group = e // 16
        if kind == "Q2_K":
            return half(80) * (b[group] & 15) * low - half(82) * (b[group] >> 4)
        scale = (b[96 + group % 8] >> (4 * (group // 8))) & 15
        scale += 16 * ((b[104 + group % 4] >> (2 * (group // 4))) & 3)
        return half(108) * (scale - 32) * (low - (0 if (b[lane] >> part) & 1 else 4))
    if kind == "TQ1_0":  # each byte is a number in base three, of five digits or at the end four, times 256 / 243
        if e < 160:
            byte, digit = b[e % 32], e // 32
        elif e < 240:
            byte, digit = b[32 + (e - 160) % 16], (e - 160) // 16
        else:
            byte, digit = b[48 + (e - 240) % 4], (e - 240) // 4
        return half(52) * ((byte * 3**digit % 256) * 3 // 256 - 1)
    if kind == "Q6_K":
        side, quarter = e // 128, part % 4
        low = (b[64 * side + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2))) & 15
        high = (b[128 + 32 * side + lane] >> (2 * quarter)) & 3
        return half(208) * signed(b[192 + e // 16]) * (low + 16 * high - 32)
    scales = b[4:16]
    if part < 4:
        scale, least = scales[part] & 63, scales[part + 4] & 63
    else:
        scale = (scales[part + 4] & 15) + 16 * (scales[part - 4] >> 6)
        least = (scales[part + 4] >> 4) + 16 * (scales[part] >> 6)
    at = {"Q4_K": 16, "Q5_K": 48}[kind]
    quantum = (b[at + 32 * (part // 2) + lane] >> (4 * (part % 2))) & 15
    if kind == "Q5_K":
        quantum += 16 * ((b[16 + lane] >> part) & 1)
    return half(0) * scale * quantum - half(2) * least
