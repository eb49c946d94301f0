import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm.config import InputError
from efflm.text import tokenizer

TOKENIZER = tokenizer.train(["the cat sat on the mat\n" * 50, "def f(x):\n    return x\n" * 50], 300)


def added(index, content, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, "special": special, **flags}


def sentencepiece_like():
    """A tokenizer.json with bytes to fall back on, as Llama 2's: <unk> <s> </s>, 256 bytes, a few pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "é", "▁h", "▁hi"]
    return {
        "version": "1.0",
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(265, "<code>", special=False)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [["▁", "h"], ["▁h", "i"]],
        },
    }


def folder_of(path, core, **files):
    """A directory with tokenizer.json and, by their stems, other files."""
    (path / "tokenizer.json").write_text(json.dumps(core))
    for stem, value in files.items():
        suffix = ".jinja" if stem == "chat_template" else ".json"
        (path / (stem + suffix)).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@given(st.text())
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.separator not in ids or tokenizer.SEPARATOR in text


@given(st.text(), st.integers(1, 5))
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(text, step):
    ids, write = TOKENIZER.encode(text), TOKENIZER.stream()
    parts = [write(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert "".join(parts) + write([], final=True) == TOKENIZER.decode(ids)


def test_a_character_that_never_ends_is_shown_at_the_end():
    ids, write = TOKENIZER.encode("😀"), TOKENIZER.stream()
    assert len(ids) == 4
    assert write(ids[:3]) == ""
    assert write([], final=True) == "\ufffd"


def test_training_is_deterministic_and_merges():
    again = tokenizer.train(["the cat sat on the mat\n" * 50, "def f(x):\n    return x\n" * 50], 300)
    assert again.digest == TOKENIZER.digest
    assert TOKENIZER.vocabulary <= 300
    assert len(TOKENIZER.encode("the cat sat")) < 8


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    again = tokenizer.load(tmp_path / "t.json")
    assert again.digest == TOKENIZER.digest
    assert (again.separator, again.eos, again.stops) == (TOKENIZER.separator, TOKENIZER.separator, TOKENIZER.stops)
    with pytest.raises(InputError, match="no tokenizer at"):
        tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is not a tokenizer: it has no model"):
        tokenizer.load(tmp_path / "t.json")


def test_pieces_with_bytes_to_fall_back_on(tmp_path):
    loaded = tokenizer.load(folder_of(tmp_path, sentencepiece_like()))
    ids = loaded.encode("hi é😀<code>")
    emoji = [3 + byte for byte in "😀".encode()]
    assert ids == [264, 259, 262, *emoji, 265]
    assert loaded.decode(ids) == "hi é😀<code>"
    write = loaded.stream()
    assert [write([index]) for index in [264, *emoji, 2]] == [" hi", "", "", "", "😀", ""]


def test_what_stands_beside_the_tokenizer_is_read_and_written_back(tmp_path):
    files = {
        "tokenizer_config": {"bos_token": {"content": "<s>"}, "add_bos_token": True, "chat_template": "old"},
        "special_tokens_map": {"eos_token": "</s>", "unk_token": "<unk>"},
        "generation_config": {"eos_token_id": [2, 0]},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    }
    first = tokenizer.load(folder_of(tmp_path, sentencepiece_like(), **files))
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    for loaded in (first, tokenizer.load(tmp_path / "again")):
        assert (loaded.bos, loaded.eos, loaded.stops, loaded.separator) == (1, 2, (0, 2), 1)
        assert loaded.prompt("hi") == [1, 264]
        assert loaded.encode("hi") == [264]
        assert loaded.chat([{"role": "user", "content": "hi"}]) == "<s>hi</s>"


def test_whether_a_text_begins_with_bos(tmp_path):
    core = sentencepiece_like()
    one = {"Sequence": {"id": "A", "type_id": 0}}
    core["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, one],
        "pair": [one, one],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    said = lambda **more: tokenizer.load(folder_of(tmp_path, core, tokenizer_config=names | more))
    assert said().before
    assert said(add_bos_token=False).before  # what the post-processor says counts
    core["post_processor"] |= {"single": [one], "special_tokens": {}}
    assert not said(add_bos_token=True).before
    del core["post_processor"]
    assert said(add_bos_token=True).prompt("hi") == [1, 264]
    assert not said(add_bos_token=False).before
    assert said(add_bos_token=False).separator == 2
    assert TOKENIZER.prompt("cat") == TOKENIZER.encode("cat")


def test_ids_in_config_json_name_the_tokens_that_nothing_else_names(tmp_path):
    loaded = tokenizer.load(folder_of(tmp_path, sentencepiece_like(), config={"bos_token_id": 1, "eos_token_id": [2]}))
    assert (loaded.bos, loaded.eos, loaded.stops) == (1, 2, (2,))
    others = {"bos_token_id": -1, "eos_token_id": [2**63, 50256, 1]}
    loaded = tokenizer.load(folder_of(tmp_path, sentencepiece_like(), config=others))
    assert (loaded.bos, loaded.eos, loaded.stops) == (None, 1, (1,))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<end>"}}, "eos_token '<end>' is not in the vocabulary"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token is 3, but must be a string"),
        ({"tokenizer_config": {"add_bos_token": 1, "bos_token": "<s>"}}, "add_bos_token is 1, but must be a bool"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template must be text"),
        ({"tokenizer_config": "[1]"}, "must hold a JSON object"),
        ({"tokenizer_config": '{"a"'}, "is not JSON"),
        ({"tokenizer_config": "[" * 100_000}, "is not JSON"),
        ({"tokenizer_config": '{"bos_token": "\\ud800"}'}, "is not JSON .*surrogates"),
        ({"generation_config": {"eos_token_id": [2, "3"]}}, "eos_token_id is '3', but must be a whole number"),
    ],
)
def test_what_is_wrong_beside_the_tokenizer_is_said(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        tokenizer.load(folder_of(tmp_path, sentencepiece_like(), **files))


def test_a_vocabulary_with_absurd_ids_is_refused(tmp_path):
    core = sentencepiece_like()
    core["model"]["vocab"]["▁hi"] = 2**32 - 1
    with pytest.raises(InputError, match="id 4294967295 in a vocabulary of 266 tokens"):
        tokenizer.load(folder_of(tmp_path, core))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "type 'WordPiece', but read are BPE and Unigram"),
        # The library cuts merged tokens at this many bytes, inside a character, and aborts the process.
        ({"continuing_subword_prefix": "\x00"}, "continuing_subword_prefix, .*not supported"),
        ({"unk_token": 3}, "is not a tokenizer"),
        ({"merges": [["h", "nothing"]]}, "is not a tokenizer"),
        ({"vocab": {"a": -1}}, "is not a tokenizer"),
    ],
)
def test_a_model_that_is_not_sound_is_refused(tmp_path, change, message):
    core = sentencepiece_like()
    core["model"] = change.get("model", core["model"] | change)
    with pytest.raises(InputError, match=message):
        tokenizer.load(folder_of(tmp_path, core))


def test_text_that_would_grow_without_bounds_is_refused(tmp_path):
    core = sentencepiece_like()
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    core["normalizer"]["normalizers"] = [double] * 10
    tokenizer.load(folder_of(tmp_path, core))
    core["normalizer"]["normalizers"] = [double] * 20
    with pytest.raises(InputError, match="over 10,000 times as long"):
        tokenizer.load(folder_of(tmp_path, core))


def test_padding_and_truncation_of_a_file_are_left_out(tmp_path):
    core = sentencepiece_like()
    core["padding"] = {"strategy": {"Fixed": 2**20}, "direction": "Right", "pad_to_multiple_of": None}
    core["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    core["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert tokenizer.load(folder_of(tmp_path, core)).encode("hi hi") == [264, 264]


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FILES += ("generation_config.json", "config.json")


@pytest.mark.parametrize("name", FILES)
def test_only_files_of_the_folder_itself_are_read(tmp_path, name):
    """No links out, no links in a circle, no pipes that never end, no more bytes than such a file can need."""
    home = tmp_path / "model"
    home.mkdir()
    folder_of(home, sentencepiece_like())
    (tmp_path / "secret").write_bytes((home / "tokenizer.json").read_bytes())
    (home / name).unlink(missing_ok=True)
    (home / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=rf"{name} links out of its folder, to .*secret: copy the file in"):
        tokenizer.load(home)
    (home / name).unlink()
    (home / name).symlink_to(home / name)
    with pytest.raises(InputError, match=f"has no {name}"):
        tokenizer.load(home)
    (home / name).unlink()
    os.mkfifo(home / name)
    with pytest.raises(InputError, match=f"{name} is not a file"):
        tokenizer.load(home)
    (home / name).unlink()
    (home / name).touch()
    os.truncate(home / name, 3_000_000_000)
    with pytest.raises(InputError, match=f"{name} has 3,000,000,000 bytes, too many"):
        tokenizer.load(home)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "a").write_text(json.dumps(sentencepiece_like()))
    (blobs / "b").write_text("{{ messages[0]['content'] }}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/a")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/b")
    assert tokenizer.load(snapshot).chat([{"role": "user", "content": "hi"}]) == "hi"


BACKTRACKS = {"Regex": "(a+)+$"}
HARD = "a" * 40 + "!"


def test_a_regular_expression_that_backtracks_for_ever_is_one_line(tmp_path):
    """The library panics on it, which is no Exception."""
    core = sentencepiece_like()
    core["pre_tokenizer"] = {"type": "Split", "pattern": BACKTRACKS, "behavior": "Isolated", "invert": False}
    loaded = tokenizer.load(folder_of(tmp_path, core))
    assert loaded.encode("hi") == [264]
    for encode in (loaded.encode, loaded.prompt, lambda text: loaded.encode_batch([text, text])):
        with pytest.raises(InputError, match=r"tokenizer\.json cannot .* this text: .*retry-limit-in-match") as error:
            encode(HARD)
        assert "\n" not in str(error.value)
    core = sentencepiece_like()
    core["decoder"] = {"type": "Replace", "pattern": BACKTRACKS, "content": "b"}
    core["model"]["vocab"][HARD] = 265
    loaded = tokenizer.load(folder_of(tmp_path, core))
    with pytest.raises(InputError, match=r"tokenizer\.json cannot .* these ids: .*retry-limit-in-match"):
        loaded.decode([265])


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError, TypeError])
def test_only_the_librarys_own_failures_are_the_files_fault(raised):
    class Core:
        def encode(self, *_, **__):
            raise raised

    with pytest.raises(raised):
        tokenizer.Tokenizer(Core()).encode("a")


def test_errors_of_a_chat_template_name_the_model(tmp_path):
    loaded = tokenizer.load(folder_of(tmp_path, sentencepiece_like(), chat_template="{{ 1 / 0 }}"))
    with pytest.raises(InputError, match=rf"the chat template of {tmp_path}/tokenizer\.json fails"):
        loaded.chat([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmenter": {"type": "New"}}, "holds 'segmenter', which is not known and may change its tokens"),
        ({"normalizer": {"type": "NFC", "version": 9}}, "holds 'version' in its normalizer"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace", "new": 1}]}},
            "'new' in its pre_",
        ),
        ({"model": {"greedy": True}}, "holds 'greedy'"),
        ({"model": {"dropout": 0.1}}, "splits words at random .dropout 0.1."),
        ({"added_tokens": [{"id": 0, "content": "a", "special": True, "regex": True}]}, "holds 'regex'"),
    ],
)
def test_what_a_tokenizer_json_says_beyond_what_is_read_is_refused(change, message):
    described = json.loads(tokenizer.train(["the cat sat on the mat\n" * 9], 300).core.to_str())
    described |= {key: described[key] | value if key == "model" else value for key, value in change.items()}
    with pytest.raises(InputError, match=message):
        tokenizer.from_description(described, "here")
