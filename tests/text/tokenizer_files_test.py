"""What stands beside a tokenizer.json is read as transformers 4.57 and 5.24 read it, which the values are of."""

import itertools
import json

import pytest

from efflm.config import InputError
from efflm.text import tokenizer
from tests.text.tokenizer_test import added, folder_of, sentencepiece_like

SIZE = 266  # of the vocabulary, added tokens included
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def read(path, core=None, **files):
    return tokenizer.load(folder_of(path, core or sentencepiece_like(), **files))


def flags(loaded):
    """The flags of each token that is added, without those of sentencepiece_like."""
    tokens = loaded.core.get_added_tokens_decoder().items()
    named = lambda token: [
        flag for flag in ("single_word", "lstrip", "rstrip", "normalized", "special") if getattr(token, flag)
    ]
    return {index: (token.content, named(token)) for index, token in tokens if index > 264 and index != 265}


def entry(content, **more):
    return {name: value for name, value in added(0, content).items() if name != "id"} | more


@pytest.mark.parametrize(
    ("files", "expected"),
    {
        "a list with ids, in no order": (
            {"tokenizer_config": {"added_tokens_decoder": {"267": entry("<b>"), "266": entry("<a>", lstrip=True)}}},
            {266: ("<a>", ["lstrip", "special"]), 267: ("<b>", ["special"])},
        ),
        "flags": (
            {"tokenizer_config": {"added_tokens_decoder": {"266": entry("<a>", special=False, single_word=True)}}},
            {266: ("<a>", ["single_word"])},
        ),
        "names and lists without ids": (
            {"tokenizer_config": FAST | {"additional_special_tokens": ["<a>"], "pad_token": "<p>", "eos_token": "<e>"},
             "config": {"vocab_size": 300}},
            {266: ("<e>", ["special"]), 267: ("<p>", ["special"]), 268: ("<a>", ["special"])},
        ),
        "version 5": (
            {"tokenizer_config": {"extra_special_tokens": ["<a>"]}},
            {266: ("<a>", ["special"])},
        ),
        "model's own names": (
            {"tokenizer_config": {"extra_special_tokens": {"image_token": "<a>"}}},
            {266: ("<a>", ["special"])},
        ),
        "older files": (
            {"special_tokens_map": {"eos_token": {"content": "<e>"}, "additional_special_tokens": ["<a>"]},
             "added_tokens": {"<n>": 267, "<e>": 266}, "config": {"vocab_size": 300}},
            {266: ("<e>", ["special"]), 267: ("<n>", ["normalized"]), 268: ("<a>", ["special"])},
        ),
        "older files are not looked at": (
            {"tokenizer_config": {"added_tokens_decoder": {}}, "added_tokens": {"<n>": 266}},
            {},
        ),
        "a name that the model has no room for": (
            {"tokenizer_config": {"pad_token": "<p>"}, "config": {"vocab_size": SIZE}},
            {},
        ),
    }.values(),
)  # fmt: skip
def test_tokens_that_only_the_settings_have_are_whole(tmp_path, files, expected):
    loaded = read(tmp_path, **files)
    assert flags(loaded) == expected
    for index, (content, said) in expected.items():
        assert loaded.encode(f"hi {content} hi").count(index) == 1
        assert len(loaded.stream()([index]).encode()) == (0 if "special" in said else len(content))
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert again.same(loaded)
    assert flags(again) == expected


def test_flags_of_the_settings_go_before_those_of_the_tokenizer(tmp_path):
    strips = {"added_tokens_decoder": {"265": entry("<code>", lstrip=True, rstrip=True, special=True)}}
    plain, stripped = read(tmp_path), read(tmp_path, tokenizer_config=strips)
    assert plain.encode("hi <code> hi") == [264, 259, 265, 259, 264]
    assert stripped.encode("hi <code> hi") == [264, 265, 264]
    assert [len(each.stream()([265]).encode()) for each in (plain, stripped)] == [6, 0]


def test_a_token_with_a_name_is_special_and_whole(tmp_path):
    core = sentencepiece_like()
    core["added_tokens"] = core["added_tokens"][3:]  # <s> and </s> are in the vocabulary alone
    loaded = read(tmp_path, core, tokenizer_config={"eos_token": "</s>", "bos_token": "<code>"})
    assert loaded.encode("</s>")[-1] == 2
    assert loaded.decode([264, 2, 265]) == "hi"
    assert read(tmp_path, core, tokenizer_config={}).encode("</s>")[-1] != 2


def test_null_is_a_name_for_nothing(tmp_path):
    """An id in config.json is what the model was trained with; a chat or an export without BOS gets none by it."""
    config = {"bos_token_id": 1, "eos_token_id": 2}
    template = "{{ bos_token or '' }}{{ messages[0]['content'] }}"
    for settings in ({"bos_token": None}, {"add_bos_token": True, "bos_token": None}, FAST):
        loaded = read(tmp_path, config=config, tokenizer_config=settings | {"chat_template": template})
        assert loaded.bos is None
        assert loaded.chat([{"role": "user", "content": "hi"}]) == "hi"
        assert loaded.prompt("hi") == [264]
        assert loaded.stops == (2,)
        assert loaded.separator == 2
        assert json.loads(loaded.files()["tokenizer_config.json"])["bos_token"] is None


@pytest.mark.parametrize(
    ("settings", "model", "names"),
    [
        (
            {"tokenizer_class": "LlamaTokenizerFast"},
            "",
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        ),
        ({"model_max_length": 9}, "mistral", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        (
            {"tokenizer_class": "LlamaTokenizer", "bos_token": None},
            "llama",
            {"eos_token": "</s>", "unk_token": "<unk>"},
        ),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "llama", {}),  # its tokens are not in this vocabulary
        (FAST, "llama", {}),
    ],
)
def test_names_that_a_class_has_by_itself(tmp_path, settings, model, names):
    assert read(tmp_path, tokenizer_config=settings, config={"model_type": model}).names == names


def post_processor(before, after):
    piece = lambda token: {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    table = {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in (("<s>", 1), ("</s>", 2))}
    single = [*map(piece, before), text, *map(piece, after)]
    return {"type": "TemplateProcessing", "single": single, "pair": [text, text], "special_tokens": table}


CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast", "")
SAYS = {"bos": (["<s>"], []), "eos": ([], ["</s>"]), "both": (["<s>"], ["</s>"]), "neither": ([], [])}


@pytest.mark.parametrize("kind", [*SAYS, "null", "bytes"])
def test_what_stands_around_a_text(tmp_path, kind):
    """The post-processor counts, for all classes and settings. Where it says nothing of tokens, classes that look at
    the settings have them; a folder of a model without config.json, as saved here, too."""
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    own = post_processor(*SAYS[kind]) if kind in SAYS else bytes_alone if kind == "bytes" else None
    core = sentencepiece_like() | {"post_processor": own}
    said = [None, False, True]
    for name, bos, eos, foreign in itertools.product(CLASSES, said, said, (True, False)):
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos}
        settings |= {"tokenizer_class": name} if name else {}
        model = {"config": {"model_type": "llama"}} if foreign else {}
        loaded = read(tmp_path, core, tokenizer_config=settings, **model)
        (tmp_path / "config.json").unlink(missing_ok=True)
        heeds = not foreign or name in ("LlamaTokenizer", "GemmaTokenizerFast", "")
        expected = ("<s>" in SAYS[kind][0], "</s>" in SAYS[kind][1]) if kind in SAYS else (heeds and bos, heeds and eos)
        sides = ((1,) if expected[0] else (), (2,) if expected[1] else ())
        assert (loaded.before, loaded.after) == sides, (name, bos, eos, foreign)
        assert loaded.prompt("hi") == [*sides[0], 264]  # which goes on, so no EOS
        # An export says it in the one place where every version of transformers looks.
        assert loaded.core.encode("hi").ids == [*sides[0], 264, *sides[1]]
        written = json.loads(loaded.files()["tokenizer_config.json"])
        assert (written["add_bos_token"], written["add_eos_token"]) == tuple(map(bool, sides))


def test_other_post_processors_and_classes(tmp_path):
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True}
    roberta["add_prefix_space"] = True
    outer, bytes_alone = post_processor(["<s>"], ["</s>"]), {"type": "ByteLevel", "trim_offsets": True}
    bytes_alone |= {"add_prefix_space": True, "use_regex": True}
    several = {"type": "Sequence", "processors": [bytes_alone, post_processor(["<s>", "</s>"], [])]}
    for own, before, after in ((roberta, (1,), (2,)), (several, (1, 2), ())):
        loaded = read(tmp_path, sentencepiece_like() | {"post_processor": own})
        assert (loaded.before, loaded.after) == (before, after)
        assert loaded.core.encode("hi").ids == [*before, 264, *after]
    core = sentencepiece_like() | {"post_processor": outer}
    loaded = read(tmp_path, core, tokenizer_config={"bos_token": "</s>"})  # which is not what stands before a text
    assert (loaded.prompt("hi"), loaded.separator) == ([1, 264], 1)
    neox = {"tokenizer_class": "GPTNeoXTokenizerFast", "bos_token": "<s>"}
    assert read(tmp_path, core, tokenizer_config=neox).prompt("hi") == [264]
    assert read(tmp_path, core, tokenizer_config=neox | {"add_bos_token": True}).prompt("hi") == [1, 264]


def test_spaces_before_a_text_are_kept_by_an_export(tmp_path):
    """Version 4 makes them what the settings say, or not at all."""
    for before in (True, False):
        split = {"type": "ByteLevel", "add_prefix_space": before, "trim_offsets": True, "use_regex": True}
        loaded = read(tmp_path, sentencepiece_like() | {"pre_tokenizer": split})
        assert json.loads(loaded.files()["tokenizer_config.json"])["add_prefix_space"] is before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": {"300": entry("<a>")}}}, r"<a>' has the id 300, but .* get 266"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": entry("<a>")}}}, "an id that is no whole number"),
        ({"tokenizer_config": {"added_tokens_decoder": {"266": 3}}}, "added_tokens_decoder is 3, but must be a string"),
        ({"tokenizer_config": {"added_tokens_decoder": [3]}}, r"added_tokens_decoder is \[3\], but must be a list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"266": entry("<a>", lstrip=1)}}}, "lstrip of '<a>' is 1"),
        (
            {"tokenizer_config": {"additional_special_tokens": "<a>"}},
            "additional_special_tokens is '<a>', but must be a",
        ),
        ({"tokenizer_config": {"additional_special_tokens": [""]}}, "additional_special_tokens is '', but must be a"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens is True, which is not supported"),
        ({"tokenizer_config": {"add_eos_token": "yes"}}, "add_eos_token is 'yes', but must be a bool"),
        ({"added_tokens": {"<a>": 266, "<b>": 266}}, "an id of its own for each token"),
        (
            {"tokenizer_config": {"eos_token": "<e>"}, "config": {"vocab_size": SIZE}},
            "eos_token '<e>' is not in the voc",
        ),
    ],
)
def test_tokens_that_cannot_be_what_the_settings_say_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, **files)
    assert "\n" not in str(error.value)
