"""Asks transformers for its ids on the lines of tests/text/tokenizer_lines.py, and writes golden_tokenizers/.

    python tests/text/tokenizer_golden.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Needs transformers, sentencepiece, gguf, jinja2 and torch in an environment of its own; efflm is not imported. Written
are two small tokenizer.json files, one byte-level and one of SentencePiece's kind, the scores of the latter, and for
each way to load a tokenizer six hexadecimal digits a line: the SHA-256 of the line's ids as transformers has them.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
import transformers
from tokenizer_lines import lines
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

OUT = Path(__file__).parent / "golden_tokenizers"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def digests(encode) -> str:
    return "".join(hashlib.sha256(json.dumps(encode(line)).encode()).hexdigest()[:6] for line in lines())


def plain(loaded):
    return lambda line: loaded.encode(line, add_special_tokens=False)


def wrapped(core) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def train_byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(lines(400, seed=1), trainer)
    return core


def train_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    (folder / "text").write_text("\n".join(line.replace("\x00", "") for line in lines(400, seed=1)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<code>"],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def as_llama2(pieces: list[tuple[str, float]]) -> tokenizers.Tokenizer:
    """As the tokenizer.json of Llama 2 has it: the space before a text is put there by a normalizer."""
    core = LlamaTokenizer(
        vocab={piece: index for index, (piece, _) in enumerate(pieces)},
        merges=transformers.tokenization_utils_base.generate_merges(
            {piece: index for index, (piece, _) in enumerate(pieces)}, dict(pieces)
        ),
    )._tokenizer
    described = json.loads(core.to_str())
    described["pre_tokenizer"] = None
    described["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    core = tokenizers.Tokenizer.from_str(json.dumps(described))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_tokens([tokenizers.AddedToken("<code>", normalized=False)])
    return core


def through_gguf(folder: Path, core: tokenizers.Tokenizer, pre: str):
    """transformers' own reading of a GGUF file with a byte-level vocabulary that is split in the way `pre`."""
    described = json.loads(core.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


def digits_alone(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The published tokenizer.json of SmolLM2: single digits first, then byte-level."""
    core = tokenizers.Tokenizer.from_str(core.to_str())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return core


def main(smollm2: Path | None) -> None:
    golden = {}
    byte_level = train_byte_level()
    (OUT / "byte_level.json").write_text(byte_level.to_str())
    golden["byte_level"] = digests(
        plain(transformers.PreTrainedTokenizerFast(tokenizer_file=str(OUT / "byte_level.json")))
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = train_sentencepiece(Path(folder))
        pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())]
        core = as_llama2(pieces)
        (OUT / "sentencepiece.json").write_text(core.to_str())
        (OUT / "scores.json").write_text(json.dumps([score for _, score in pieces]))
        loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(OUT / "sentencepiece.json"))
        golden["sentencepiece"] = digests(plain(loaded))
        # sentencepiece treats special tokens in a text otherwise, and refuses the character 0
        ordinary = [
            line for line in lines() if not any(odd in line for odd in ("<s>", "</s>", "<unk>", "<code>", "\x00"))
        ]
        same = sum(trained.encode(line) == plain(loaded)(line) for line in ordinary)
        print(f"sentencepiece itself agrees with transformers on {same} of {len(ordinary)} ordinary lines")
    for pre in ("gpt-2", "llama-bpe"):
        with tempfile.TemporaryDirectory() as folder:
            golden[f"gguf_{pre}"] = digests(plain(through_gguf(Path(folder), byte_level, pre)))
    model = json.loads(byte_level.to_str())["model"]
    qwen2 = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    qwen2.add_special_tokens({"additional_special_tokens": SPECIAL})
    golden["gguf_qwen2"] = digests(plain(qwen2))
    golden["gguf_smollm"] = digests(plain(wrapped(digits_alone(byte_level))))
    if smollm2:
        theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
        published = wrapped(digits_alone(theirs._tokenizer))
        golden["smollm2"] = digests(plain(published))
        # They differ in the space before a number: it passes over what the file says of splitting digits off.
        same = sum(plain(theirs)(line) == plain(published)(line) for line in lines())
        print(f"transformers' reading of the GGUF file agrees with the published splitting on {same} of 1000 lines")
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        golden["smollm2_chat"] = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    about = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    (OUT / "digests.json").write_text(json.dumps(about | golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
