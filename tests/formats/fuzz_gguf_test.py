"""Damaged GGUF and tokenizer files: each is read or refused with an InputError, in little time and memory."""

import faulthandler
import json
import random
import resource
import time
import tracemalloc

import numpy as np
import pytest

from efflm.config import InputError
from efflm.formats import gguf_model
from efflm.text import tokenizer
from tests import gguf_files
from tests.text.tokenizer_golden_test import GOLDEN

NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD = (
    None,
    True,
    -1,
    2**63,
    10**400,
    1e308,
    "",
    "x" * 5000,
    "\ud800",
    "\x00",
    [],
    {},
    [[[]]],
    {"type": "Sequence"},
    [1] * 50,
)
COUNT = 250  # files a test
MINUTE = 60
MEGABYTE = 1 << 20


def damaged(raw: bytes, draw: random.Random, header: int) -> bytes:
    """The file with one or more things wrong, most of them in its first `header` bytes."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = draw.randrange(header if draw.random() < 0.9 else len(raw))
        kind = draw.randrange(6)
        if kind == 0:
            return bytes(raw[:at])
        if kind == 1:
            raw[at : at + 1] = bytes([raw[at] ^ 1 << draw.randrange(8)]) if at < len(raw) else b""
        elif kind == 2:
            raw[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, "little")
        elif kind == 3:
            raw[at : at + 4] = (draw.choice(NUMBERS) % 2**32).to_bytes(4, "little")
        elif kind == 4:
            raw[at:at] = raw[at : at + draw.randrange(100)]
        else:
            del raw[at : at + draw.randrange(1, 40)]
    return bytes(raw)


def misnumbered(raw: bytes, draw: random.Random, header: int) -> bytes:
    """One of the numbers of the header, wherever it is, made absurd: positions before small values are likely ones."""
    small = [at for at in range(4, header - 8) if 0 < int.from_bytes(raw[at : at + 8], "little") < 2**16]
    at = draw.choice(small)
    return raw[:at] + draw.choice(NUMBERS).to_bytes(8, "little") + raw[at + 8 :]


def places(value, path=()):
    """Every path into a JSON value, of long lists only the ends."""
    yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    for key, below in items[:8] + items[-8:]:
        yield from places(below, (*path, key))


def replaced(value, draw: random.Random):
    """A JSON value with one part of it gone, doubled, renamed or of another kind, as text."""
    value = json.loads(json.dumps(value))
    path = draw.choice([path for path in places(value) if path])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.randrange(5)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(path[-1], parent[draw.randrange(len(parent))])
    elif kind == 2 and isinstance(parent, dict):
        parent[draw.choice(("type", "id", "content", "vocab", "\x00", "x" * 1000))] = parent.pop(path[-1])
    else:
        parent[path[-1]] = draw.choice(ODD)
    return json.dumps(value)


def require_refused_or_read(read, size: int) -> str | None:
    """The message, if it is refused. Nothing may take long, nor twice the file and a little more of Python's memory."""
    faulthandler.dump_traceback_later(MINUTE, exit=True)  # what hangs outside Python cannot be stopped otherwise
    tracemalloc.start()
    start = time.monotonic()
    try:
        read()
        return None
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        return message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - start < 20
        assert peak < 2 * size + 8 * MEGABYTE, peak


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def watched(tmp_path):
    """A folder beside which nothing may appear; memory outside Python counts too."""
    folder = tmp_path / "inside"
    folder.mkdir()
    before = resident()
    yield folder
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert resident() - before < 400 * MEGABYTE


@pytest.mark.parametrize("harm", [damaged, misnumbered])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "Q8_0"), ("qwen3", "MXFP4"), ("deci", "TQ2_0")])
def test_damaged_gguf_files(watched, architecture, kind, harm):
    path = watched / "a.gguf"
    width = 256 if kind == "TQ2_0" else 64
    weights = gguf_files.weights(np.random.default_rng(0), architecture, width=width, hidden=width)
    by_layer = {"attention.head_count": [8, 8], "attention.head_count_kv": [4, 4], "feed_forward_length": [width] * 2}
    metadata = by_layer if architecture == "deci" else {}
    whole = gguf_files.write(path, weights, architecture, kind=kind, metadata=metadata).read_bytes()
    gguf_model.load(path)
    header = whole.index(b"token_embd") + 2000
    draw, refused = random.Random(architecture), 0
    for _ in range(COUNT):
        path.write_bytes(harm(whole, draw, header))
        refused += require_refused_or_read(lambda: gguf_model.load(path), len(whole)) is not None
        assert [found.name for found in watched.iterdir()] == ["a.gguf"]
    assert refused > COUNT // 2


def small_tokenizer(name):
    """A golden tokenizer's first 300 tokens, or the same as Unigram: small, so that not only the vocabulary is hit."""
    whole = json.loads((GOLDEN / f"{name.replace('unigram', 'sentencepiece')}.json").read_text())
    kept = {token: index for token, index in whole["model"]["vocab"].items() if index < 300}
    if name == "unigram":
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        vocabulary = [[token, -float(index)] for token, index in kept.items()]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": True}
        return whole | {"normalizer": None, "pre_tokenizer": space, "decoder": space, "model": model}
    merges = [pair for pair in whole["model"]["merges"] if all(token in kept for token in (*pair, "".join(pair)))]
    return whole | {"model": whole["model"] | {"vocab": kept, "merges": merges}}


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("textual", [False, True])
def test_damaged_tokenizers(watched, name, textual):
    whole = small_tokenizer(name)
    path = watched / "tokenizer.json"
    path.write_text(json.dumps(whole))
    tokenizer.load(path)
    draw, refused = random.Random(name), 0
    for _ in range(COUNT):
        if textual:
            path.write_bytes(damaged(json.dumps(whole).encode(), draw, 3000))
        else:
            path.write_text(replaced(whole, draw))

        def read():
            loaded = tokenizer.load(path)
            loaded.encode_batch(["a 1 \u00e9 😀", ""])
            loaded.decode(range(20))
            list(loaded.sized(["a 1 \u00e9 😀", "b"]))

        refused += require_refused_or_read(read, path.stat().st_size) is not None
    assert refused > COUNT // 10


def test_damaged_files_beside_a_tokenizer(watched):
    (watched / "tokenizer.json").write_text((GOLDEN / "sentencepiece.json").read_text())
    names = {key: {"content": token, "special": True} for key, token in (("bos_token", "<s>"), ("eos_token", "</s>"))}
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] | trim }}{% endfor %}"
    whole = {
        "tokenizer_config": {
            **names,
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": template}],
        },
        "special_tokens_map": names,
        "generation_config": {"eos_token_id": [2, 1], "bos_token_id": 1},
        "config": {"eos_token_id": 2},
    }
    draw, refused = random.Random(0), 0
    for index in range(COUNT):
        harmed = draw.choice(list(whole))
        for stem, value in whole.items():
            text = json.dumps(value)
            if stem == harmed:
                text = replaced(value, draw) if draw.random() < 0.7 else damaged(text.encode(), draw, len(text))
            (watched / f"{stem}.json").write_bytes(text if isinstance(text, bytes) else text.encode())

        def read(render=index % 10 == 0):  # each has a process of its own
            loaded = tokenizer.load(watched)
            if loaded.template is not None and render:
                loaded.chat([{"role": "user", "content": "hi"}])

        refused += require_refused_or_read(read, 100_000) is not None
    assert refused > COUNT // 4
