"""Tokenizers, chat templates and files of efflm's own that somebody made to do harm: each is read and works, or is
refused with an InputError of one line.

A thousand in all. Those that start a process or read a checkpoint each are mostly left to .ci/run.
"""

import json
import random

import jax
import pytest

from efflm.compress.quantize import quantize
from efflm.formats import checkpoint, efflm_file, manifest, sources
from efflm.infer.generate import forward
from efflm.text import chat, tokenizer
from tests import tiny
from tests.formats.fuzz_gguf_test import replaced, require_refused_or_read, small_tokenizer
from tests.formats.fuzz_test import safetensors_header, with_header
from tests.formats.huggingface_test import small_tokenizer as characters

REGEXES = (
    "(a+)+$",
    "(a|a)*$",
    "(a*)*b",
    "(?:)",
    ".{1000}{1000}",
    "(?<=a)b",
    "\\p{L}+|a",
    "(",
    "[^\\s\\S]",
    "(.)\\1*?$",
)
PATTERNS = [{"Regex": regex} for regex in REGEXES] + [{"String": text} for text in ("", "a", "\x00", "é", " ")]
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous", "Other")
WORDS = ("", "a", "▁", "😀", "ab" * 500, "\u0301", "\x00", "<unk>", 3, None)
COUNTS = (0, 1, 7, 2**31, 2**63, 2**64 - 1, -1, 1.5)
TEXTS = ("", "a" * 60 + "!", "naïve 😀\n\x00", " a  b ", "<unk><s>a")
TIMES = {"quick": 40, "rest": 160}


def stage(draw: random.Random, place: str) -> dict:
    """A stage that the library knows, with settings that nobody would choose."""
    word, count, flag = draw.choice(WORDS), draw.choice(COUNTS), draw.random() < 0.5
    replace = {"type": "Replace", "pattern": draw.choice(PATTERNS), "content": word}
    special = ["<s>", draw.choice((0, 1, 2**32 - 1, 2**32))]
    piece = {"SpecialToken": {"id": draw.choice(("<s>", "no", "")), "type_id": count}}
    kinds = {
        "pre_tokenizer": [
            {"type": "Split", "pattern": draw.choice(PATTERNS), "behavior": draw.choice(BEHAVIORS), "invert": flag},
            {"type": "Metaspace", "replacement": word, "prepend_scheme": draw.choice(("always", "never", "x"))},
            {"type": "CharDelimiterSplit", "delimiter": word},
            {"type": "FixedLength", "length": count},
            {"type": "ByteLevel", "add_prefix_space": flag, "trim_offsets": flag, "use_regex": flag},
            *({"type": kind} for kind in ("Whitespace", "UnicodeScripts", "BertPreTokenizer")),
        ],
        "normalizer": [
            replace,
            {"type": "Prepend", "prepend": word},
            {"type": "Precompiled", "precompiled_charsmap": draw.choice(("", "AAAA", "/////w==", "QUFB" * 50, "é"))},
            {"type": "Strip", "strip_left": flag, "strip_right": not flag},
            *({"type": kind} for kind in ("NFD", "NFKC", "StripAccents", "Nmt", "Lowercase", "ByteLevel")),
        ],
        "decoder": [
            replace,
            {"type": "Strip", "content": word, "start": count, "stop": draw.choice(COUNTS)},
            {"type": "CTC", "pad_token": word, "word_delimiter_token": word, "cleanup": flag},
            {"type": "WordPiece", "prefix": word, "cleanup": flag},
            {"type": "BPEDecoder", "suffix": word},
            *({"type": kind} for kind in ("ByteFallback", "Fuse", "ByteLevel")),
        ],
        "post_processor": [
            {"type": "TemplateProcessing", "single": [piece], "pair": [piece, piece], "special_tokens": {}},
            {
                "type": "RobertaProcessing",
                "sep": special,
                "cls": special,
                "trim_offsets": flag,
                "add_prefix_space": flag,
            },
            {"type": "BertProcessing", "sep": special, "cls": special},
        ],
    }
    return draw.choice(kinds[place])


def strange(whole: dict, draw: random.Random) -> dict:
    """The tokenizer with one to three other stages, added tokens or settings of its model."""
    out = json.loads(json.dumps(whole))
    for _ in range(draw.randrange(1, 4)):
        place = draw.choice(("pre_tokenizer", "normalizer", "decoder", "post_processor", "token", "model"))
        if place == "token":
            flags = {name: draw.random() < 0.5 for name in ("special", "single_word", "lstrip", "rstrip", "normalized")}
            token = {"id": draw.choice((0, 5, 300, 2**31, 2**32)), "content": draw.choice(WORDS)}
            out["added_tokens"] = [*out["added_tokens"], token | flags]
        elif place == "model":
            name = draw.choice(("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "unk_id"))
            out["model"][name] = draw.choice((True, False, None, 0.5, 1.0, -1, "a", "<unk>", 2**31, float("nan")))
        else:
            made = stage(draw, place)
            inner = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}.get(place, f"{place}s")
            out[place] = draw.choice((made, {"type": "Sequence", inner: [made, stage(draw, place)]}))
    return out


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "unigram"])
def test_strange_tokenizers(tmp_path, name):
    whole, path, draw, refused = small_tokenizer(name), tmp_path / "tokenizer.json", random.Random(name), 0
    for _ in range(160):
        path.write_text(json.dumps(strange(whole, draw)))

        def use():
            loaded = tokenizer.load(path)
            ids = [loaded.encode(text) for text in TEXTS]
            loaded.encode_batch(list(TEXTS))
            loaded.decode(ids[1])
            loaded.decode(range(loaded.vocabulary))
            loaded.stream()(ids[2], final=True)
            loaded.prompt("a")
            list(loaded.sized(TEXTS))
            loaded.stops, loaded.digest  # noqa: B018

        refused += require_refused_or_read(use, path.stat().st_size) is not None
    assert 20 < refused < 150


TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] | trim ~ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% set n = namespace(system='', i=0) %}{% if messages[0].role == 'system' %}"
    "{% set n.system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{%- for m in messages -%}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set n.i = n.i + 1 %}"
    "[{{ n.i }}] {{ n.system }} {{ m.content | tojson }}{%- endfor -%}{% generation %}{% endgeneration %}",
    "{% macro show(m, depth=0) %}{{ '#' * (depth + 1) }} {{ m.content | indent(2) }}{% endmacro %}"
    "{% for m in messages %}{{ show(m, loop.index) }}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}",
)
HARM = (
    "'a' * 4000000000",
    "messages * 100000000",
    "'%1500000000d' | format(1)",
    "'{:1500000000}'.format(1)",
    "range(99999) | list | tojson(indent=99999)",
    "('a' * 9999999) | replace('a', 'b' * 999)",
    "'a' | center(9999999999)",
    "9 ** 99999999",
    "(9 ** 9) ** (9 ** 9)",
    "range(10 ** 9)",
    "[[]] * 99999999",
    "''.__class__.__base__.__subclasses__()",
    "cycler.__init__.__globals__",
    "self",
    "lipsum(999, html=False)",
    "messages | map('attr', '__class__') | list",
    "'\\ud800'",
    "show(show)",
    "m.content[::-1] * 20000000",
    "loop",
    "'x' | wordwrap(0)",
    "messages | batch(0) | list",
    "(1, 2) | random",
    "'%s' % messages",
    "'a'.join(range(99999) | map('string'))",
    "strftime_now('%' * 999999)",
    "messages | groupby('role') | tojson",
    "raise_exception(messages * 99999)",
    "dict(a=1) | xmlattr | urlize * 9999999",
)
STATEMENTS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
    "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set messages = none %}",
    "{% filter upper %}{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfilter %}",
    "{% " + "if true %}{% " * 500,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 3000 + "1 }}",
)


def spoiled(draw: random.Random) -> str:
    """A template with an expression, a statement or a few characters put in, left out or put elsewhere."""
    text = draw.choice(TEMPLATES)
    for _ in range(draw.randrange(1, 3)):
        at, kind = draw.randrange(len(text)), draw.randrange(5)
        if kind == 0:
            text = text.replace("{{ ", f"{{{{ {draw.choice(HARM)} ~ ", 1)
        elif kind == 1:
            cut = draw.choice([i for i in range(len(text)) if text.startswith("{%", i)] or [0])
            text = text[:cut] + draw.choice(STATEMENTS) + text[cut:]
        elif kind == 2:
            text = text[:at] + text[at + draw.randrange(1, 9) :]
        elif kind == 3:
            text = text[:at] + draw.choice(("{", "}}", "%}", "'", "|", "\x00", "😀", "(", "[", "0" * 50)) + text[at:]
        else:
            other = draw.randrange(len(text))
            text = text[:at] + text[other : other + 40] + text[at:]
    return text


@pytest.mark.parametrize("part", tiny.and_combinations(TIMES, ["quick"]))
def test_spoiled_templates(part):
    draw, refused = random.Random(part), 0
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n there"}]
    for _ in range(TIMES[part]):
        template = spoiled(draw)
        use = lambda template=template: chat.render(template, told, {"bos_token": "<s>"}, True)
        refused += require_refused_or_read(use, 4 * chat.LONGEST) is not None
    assert 0.2 * TIMES[part] < refused < 0.9 * TIMES[part]


def run_once(model) -> None:
    """Trace a forward pass: what is wrong with the config or with a format is found there, if not before."""
    jax.eval_shape(lambda: forward(model, tiny.tokens(tiny.LLAMA.config(), 1, 4)))


@pytest.fixture(scope="module")
def models():
    kept = tiny.model(tiny.CONFIGS["qwen2"])
    return {"float": kept, "int8": kept.replace(params=quantize(kept.params, "int8"))}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_manifests_that_lie(tmp_path, models, kind):
    characters().save(tmp_path / "tokenizer.json")
    file, draw, refused = tmp_path / "model.safetensors", random.Random(kind), 0
    efflm_file.save(file, models[kind], {"source": "stdlib", "train.length": 64})
    raw = file.read_bytes()
    header, data = safetensors_header(raw)
    told = json.loads(header["__metadata__"]["efflm"])
    for _ in range(80):
        changed = told | {"config": json.loads(replaced(told["config"], draw))} if draw.random() < 0.7 else None
        text = json.dumps(changed) if changed else replaced(told, draw)
        file.write_bytes(with_header(header | {"__metadata__": {"efflm": text}}, data))
        read = lambda: run_once(sources.load(file).model)
        refused += require_refused_or_read(read, 10 * len(raw)) is not None
    assert 40 < refused < 80


@pytest.mark.parametrize("part", tiny.and_combinations(TIMES, ["quick"]))
def test_checkpoints_that_lie(tmp_path, models, part):
    characters().save(tmp_path / "tokenizer.json")
    folder, draw, refused = tmp_path / "checkpoint" / "3", random.Random(part), 0
    checkpoint.save(folder.parent, 3, models["int8"], {"source": "stdlib"})
    run_once(models["int8"])  # what is done once in a process is not a file's doing
    raw = (folder / "about.json").read_text()
    told = json.loads(raw)
    for _ in range(TIMES[part]):
        name = draw.choice((None, "config", "leaves", "formats", "about"))
        text = json.dumps(told | {name: json.loads(replaced(told[name], draw))}) if name else replaced(told, draw)
        (folder / "about.json").write_text(text)
        (folder / manifest.NAME).unlink()
        manifest.write(folder)
        read = lambda: run_once(sources.load(tmp_path).model)
        refused += require_refused_or_read(read, 10 * len(raw)) is not None
    assert refused > 0.4 * TIMES[part]
