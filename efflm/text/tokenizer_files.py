"""What stands beside a tokenizer.json, put into what it describes, as transformers does when it reads a folder.

tokenizer_config.json can have tokens of its own, other flags for tokens, and settings for BOS and EOS; older folders
have special_tokens_map.json and added_tokens.json. A token that only they have is cut into pieces by tokenizer.json
alone.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from efflm import model_files
from efflm.cli.run_directory import to_json
from efflm.config import InputError, require
from efflm.text import encoding
from efflm.text.tokenizer_json import require_sound

# What a folder may hold of a tokenizer beside tokenizer.json and tokenizer_config.json.
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
NEEDED = ("bos_token", "eos_token", "unk_token")
NAMES = (*NEEDED, "sep_token", "pad_token", "cls_token", "mask_token")  # in the order in which they are added
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What a class of transformers takes for a name that a folder says nothing of.
_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_QWEN2 = {"eos_token": _END, "unk_token": _END, "pad_token": _END}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
CLASSES = {"Llama": _LLAMA, "CodeLlama": _LLAMA, "GPT2": _GPT2, "GPTNeoX": _GPT2, "Qwen2": _QWEN2, "Gemma": _GEMMA}
MODELS = {
    "llama": "Llama",
    "mistral": "Llama",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
}
# Classes that look at add_bos_token and add_eos_token nowhere. GPTNeoX looks at nothing else.
HEEDLESS = ("PreTrained", "GPT2", "Qwen2")


def read(beside: Callable[[str], dict[str, Any]], file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """What the folder of a tokenizer.json describes, all told; the settings beside it, if any; the special tokens by
    name. beside: a file's name -> the object in it, empty where there is none. Raises InputError."""
    described, model = beside(file.name), beside("config.json")
    require_sound(described, file)
    where, room = file.with_name(f"{file.stem}_config.json"), model.get("vocab_size")
    config = settings(beside, where)
    kind = config.get("tokenizer_class") or MODELS.get(str(model.get("model_type"))) or ""
    kind = str(kind).removesuffix("Fast").removesuffix("Tokenizer")
    known = ids_of(described, file)
    defaults = {name: token for name, token in CLASSES.get(kind, {}).items() if token in known} if config else {}
    described, names = with_tokens(described, defaults | config, room if type(room) is int else 0, where)
    ids = ids_of(described, file)
    adds = []
    for end in ("bos", "eos"):
        name, said = f"{end}_token", config.get(f"add_{end}_token")
        require(said is None or isinstance(said, bool), f"{where}: add_{name} is {said!r:.80}, but must be a bool")
        heeded = said and name in names and not (model and kind in HEEDLESS)
        adds.append({names[name]: ids[names[name]]} if heeded else {})
    if kind == "GPTNeoX" and _says(described.get("post_processor")):
        described = described | {"post_processor": None}
    return with_ends(described, *adds), config, names


def settings(beside: Callable[[str], dict[str, Any]], file: Path) -> dict[str, Any]:
    """The settings of the file, and where it has no list of tokens with their ids, what older files say, which goes
    first."""
    config = beside(file.name)
    if "added_tokens_decoder" in config:
        return config
    older = beside("special_tokens_map.json")
    lists = {key: [each.get(key) for each in (config, older) if each.get(key)] for key in LISTS}
    lists = {
        key: [token for each in parts for token in each]
        for key, parts in lists.items()
        if parts and all(isinstance(each, list) for each in parts)
    }
    added = beside("added_tokens.json")
    require(
        all(type(index) is int for index in added.values()) and len(set(added.values())) == len(added),
        f"{file.parent / 'added_tokens.json'} must hold an id of its own for each token: fetch the model again",
    )
    decoder = {"added_tokens_decoder": {str(index): token for token, index in added.items()}} if added else {}
    return config | older | lists | decoder


def ids_of(described: Mapping[str, Any], where: Any) -> dict[str, int]:
    """The id of each token that a tokenizer.json has, as the library gives them: an added token has the one of the
    vocabulary, else the next free one, whatever the file says. Raises InputError."""
    vocabulary, added = described["model"].get("vocab"), described.get("added_tokens") or []
    if isinstance(vocabulary, list):
        pairs = enumerate(vocabulary)
        vocabulary = {str(pair[0]): index for index, pair in pairs if isinstance(pair, list) and pair}
    sound = isinstance(vocabulary, dict) and isinstance(added, list)
    sound = sound and all(
        isinstance(each, dict) and isinstance(each.get("content"), str) and type(each.get("id")) is int
        for each in added
    )
    sound = sound and all(type(index) is int for index in vocabulary.values())
    require(sound, f"{where} is not a tokenizer: it has no list of tokens")
    ids, taken = dict(vocabulary), []
    for token in added:
        taken.append(ids.setdefault(token["content"], _free(described, taken)))
    return ids


def _free(described: Mapping[str, Any], taken: Iterable[int]) -> int:
    """The id of the next token that is added, after those that have these ids."""
    return max(len(described["model"]["vocab"]), max(taken, default=-1) + 1)


def with_tokens(
    described: dict[str, Any], config: Mapping[str, Any], room: int, where: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a tokenizer.json describes with the tokens and flags of the settings, which go before its own; and the
    special tokens by name. room: how many ids the model has; a name for a token without an id gets one of these.

    Raises InputError for what is no token, and for a token that would get another id than the settings say.
    """
    split = config.get("split_special_tokens")
    require(not split, f"{where}: split_special_tokens is {split!r:.80}, which is not supported: remove it")
    ids = ids_of(described, where)
    named = {name: _token(config[name], f"{where}: {name}") for name in NAMES if config.get(name) is not None}
    listed = [
        _token(each, f"{where}: {key}")
        for key in LISTS
        for each in _values(config.get(key), f"{where}: {key}", list, dict)
    ]
    special = {each["content"] for each in (*named.values(), *listed)}
    decoder = config.get("added_tokens_decoder") or {}
    what = f"{where}: added_tokens_decoder"
    _values(decoder, what, dict)
    numbers = {index for index in decoder if index.isdecimal() and len(index) < 11}
    require(len(numbers) == len(decoder), f"{what} has an id that is no whole number")
    given = [_token(decoder[index], what) for index in sorted(numbers, key=int)]
    stated = {_token(decoder[index], what)["content"]: int(index) for index in numbers}

    added = {each["content"]: each for each in described.get("added_tokens") or []}
    for token, forced in [(each, True) for each in given] + [(each, False) for each in (*named.values(), *listed)]:
        content = token["content"]
        if content in added and not forced:
            added[content] = added[content] | {"special": True}
            continue
        if content not in ids:
            free = _free(described, [ids[each] for each in added])
            if not forced and free >= room and token not in listed:
                continue
            require(
                stated.get(content, free) == free,
                f"{what} says that {content!r:.80} has the id {stated.get(content)}, but it would get {free}: fetch "
                "the model again",
            )
            ids[content] = free
        is_special = token.get("special", False) or content in special
        plain = dict.fromkeys(FLAGS, False) | {"normalized": not is_special}
        added[content] = plain | token | {"id": ids[content], "special": is_special}
    for name, token in named.items():
        known = token["content"] in ids
        require(known or name not in NEEDED, f"{where}: {name} {token['content']!r:.80} is not in the vocabulary")
    names = {name: token["content"] for name, token in named.items() if token["content"] in ids}
    # In the order of their ids, as the library gives new ones.
    return described | {"added_tokens": sorted(added.values(), key=lambda each: each["id"])}, names


def with_ends(described: dict[str, Any], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """What a tokenizer.json describes, with these tokens, and their ids, before and after each text. Where its
    post-processor says something of such tokens it stays as it is: that counts."""
    own = described.get("post_processor")
    if _says(own) or not (before or after):
        return described
    piece = lambda token, part=0: {"SpecialToken": {"id": token, "type_id": part}}
    text = lambda name, part: [
        *(piece(token, part) for token in before),
        {"Sequence": {"id": name, "type_id": part}},
        *(piece(token, part) for token in after),
    ]
    table = {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in (before | after).items()}
    new = {"type": "TemplateProcessing", "single": text("A", 0), "pair": text("A", 0) + text("B", 1)}
    new["special_tokens"] = table
    together = {"type": "Sequence", "processors": [own, new]}
    return described | {"post_processor": new if own is None else together}


def _says(post_processor: Any) -> bool:
    """Whether a post-processor says which tokens stand before and after a text, be it none."""
    if not isinstance(post_processor, dict):
        return False
    inner = post_processor.get("processors") if post_processor.get("type") == "Sequence" else None
    if isinstance(inner, list):
        return any(map(_says, inner))
    return post_processor.get("type") != "ByteLevel"


def _values(value: Any, what: str, *kinds: type) -> list[Any]:
    """The elements of a list, or the values of an object; none of nothing."""
    require(value is None or isinstance(value, kinds), f"{what} is {value!r:.80}, but must be a list of tokens")
    return list(value.values()) if isinstance(value, dict) else list(value or ())


def _token(value: Any, what: str) -> dict[str, Any]:
    """A token and those of its flags that are said."""
    token = value if isinstance(value, dict) else {"content": value}
    content = token.get("content")
    if not isinstance(content, str) or not content:
        raise InputError(f"{what} is {value!r:.80}, but must be a string, or a token with its flags")
    flags = {flag: token[flag] for flag in FLAGS if token.get(flag) is not None}
    for flag, said in flags.items():
        require(isinstance(said, bool), f"{what}: {flag} of {content!r:.80} is {said!r:.80}, but must be a bool")
    return {"content": content} | flags


def ids_in(core: Any, value: Any, what: str) -> list[int]:
    """The tokens among an id, a list of ids or nothing: small models carry the ids of their family's large ones.

    Raises InputError for what is no whole number.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    for index in values:
        require(type(index) is int, f"{what} is {index!r:.80}, but must be a whole number")
    return [index for index in values if 0 <= index < 2**32 and core.id_to_token(index) is not None]


def template(file: Path, config: dict[str, Any]) -> str | None:
    separate = "chat_template.jinja"
    inside = config.get("chat_template")
    value = model_files.read_text(file.parent, separate) if model_files.exists(file.parent, separate) else inside
    if isinstance(value, list):  # several, by name
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    require(value is None or isinstance(value, str), f"{file}: chat_template must be text")
    return value


def written(tokens: Any, stem: str) -> dict[str, str]:
    """The text of each file that says what the tokenizer.json of a Tokenizer does not hold, as it is read above and by
    transformers."""
    # Named transformers classes build a tokenizer of their own kind; this one takes the file as it is, but for
    # add_prefix_space in version 4. What is not named here would be looked for elsewhere.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": None, **tokens.names}
    config |= {"add_bos_token": bool(tokens.before), "add_eos_token": bool(tokens.after)}
    config["clean_up_tokenization_spaces"] = False
    split = encoding.plain(tokens.core.pre_tokenizer)
    config |= {name: split[name] for name in ("add_prefix_space",) if name in split}
    if tokens.template is not None:
        config["chat_template"] = tokens.template
    out = {f"{stem}_config.json": to_json(config, indent=1) + "\n"}
    if tokens.extra_stops:
        out["generation_config.json"] = to_json({"eos_token_id": tokens.ends}, indent=1) + "\n"
    return out
