"""Text to token ids and back: tokenizers trained here, and those that models bring along.

What is trained here is a byte-level BPE (Sennrich 2016, arXiv 1508.07909; bytes as in GPT-2). What is read is any
tokenizer.json of the `tokenizers` library, with the files that stand beside it in a Hugging Face directory.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from efflm import model_files
from efflm.cli.run_directory import to_json, write_together
from efflm.config import InputError, require
from efflm.text import chat, encoding, tokenizer_files
from efflm.text.tokenizer_json import require_all_read, require_sound

FILE = "tokenizer.json"
SEPARATOR = "<|endoftext|>"
BYTES = 257  # entries of a vocabulary that has a token for each byte, a separator and nothing else
TRIAL = "Does it read? 12 naïve\n\tcafés 😀\x00 " + SEPARATOR


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    names: bos_token, eos_token, unk_token and so on, each in the vocabulary, which text holds whole. What stands before
    and after every text is what the core's post-processor says. extra_stops: ids beside `eos` that end an answer.
    template: see text.chat. where: the file it is from. limit: entries of the model's vocabulary, where tokens were
    added beyond them; reader: what text is then read with, without these (see text.fitted).
    encode, encode_batch and decode raise InputError for what the tokenizer of a bad file cannot do, the first two for
    half of a surrogate pair too.
    """

    core: tokenizers.Tokenizer
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    extra_stops: tuple[int, ...] = ()
    template: str | None = None
    where: Any = "this tokenizer"
    limit: int | None = None
    reader: tokenizers.Tokenizer | None = None

    def __post_init__(self) -> None:
        if self.names:
            special = {token.content for token in self.core.get_added_tokens_decoder().values() if token.special}
            self.core.add_special_tokens([token for token in self.names.values() if token not in special])

    @functools.cached_property
    def vocabulary(self) -> int:
        """One more than the largest id that the model has."""
        return max((i for i in self.core.get_vocab().values() if self._has(i)), default=-1) + 1

    def _has(self, index: int) -> bool:
        return self.limit is None or index < self.limit

    def _id(self, token: str | None) -> int | None:
        index = None if token is None else self.core.token_to_id(token)
        return index if index is not None and self._has(index) else None

    @property
    def bos(self) -> int | None:
        return self._id(self.names.get("bos_token"))

    @property
    def eos(self) -> int | None:
        return self._id(self.names.get("eos_token"))

    @property
    def before(self) -> tuple[int, ...]:
        """The ids that the model expects before every text."""
        return self._sides[0]

    @property
    def after(self) -> tuple[int, ...]:
        """The ids that stand after a whole text. A prompt goes on, so it has none of them."""
        return self._sides[1]

    @functools.cached_property
    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.core.post_processor is None:
            return (), ()
        with _panics_of(self.where, "cannot tokenize a text"):
            ids, text = self.core.encode(TRIAL).ids, self.core.encode(TRIAL, add_special_tokens=False).ids
        starts = [start for start in range(len(ids) + 1) if ids[start : start + len(text)] == text]
        require(bool(starts), f"{self.where}: its post_processor leaves out the text: fetch the model again")
        sides = ids[: starts[0]], ids[starts[0] + len(text) :]
        return tuple(tuple(filter(self._has, side)) for side in sides)

    @property
    def separator(self) -> int:
        """The id that stands between documents and before the first: what the model expects before a text, else
        <|endoftext|>, which pretraining puts there even where instruction tuning gave `bos` and `eos` other uses,
        else what ends a text. Raises InputError if the tokenizer has none of them.
        """
        choices = [*self.before[-1:], self._id(SEPARATOR), self.eos, *self.extra_stops, self.bos]
        found = [choice for choice in choices if choice is not None]
        require(bool(found), f"the tokenizer has neither {SEPARATOR} nor a bos or eos token to stand between documents")
        return found[0]

    @property
    def ends(self) -> list[int]:
        """The ids that end an answer, `eos` first."""
        return [end for end in (self.eos, *self.extra_stops) if end is not None]

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end an answer or a document."""
        return tuple(sorted({*self.ends, self._id(SEPARATOR)} - {None}))

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        self._check(text)
        with _panics_of(self.where, "cannot tokenize this text"):
            return (self.reader or self.core).encode(text, add_special_tokens=False)

    def _check(self, text: str) -> None:
        """Raise InputError for what is no text; warn of tokens that the model has not."""
        encoding.require_characters(text, "the text")
        for token, index in self._beyond.items():
            if token in text:
                _warn(
                    f"{self.where}: the text has {token!r}, which was added to the tokenizer as id {index}, but the "
                    f"model has a vocabulary of {self.limit}: it is read as plain text"
                )

    @functools.cached_property
    def _beyond(self) -> dict[str, int]:
        if self.limit is None:
            return {}
        added = self.core.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if not self._has(index)}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            self._check(text)
        with _panics_of(self.where, "cannot tokenize this text"):
            found = (self.reader or self.core).encode_batch_fast(texts, add_special_tokens=False)
            return [each.ids for each in found]

    def sized(self, stretches: Iterable[str]) -> Iterator[encoding.Sized]:
        """The ids of a text that comes in stretches, and the bytes of the text that each stands for: see `encoding`."""
        return encoding.sized(self._encoding, self._pieces, stretches)

    def prompt(self, text: str) -> list[int]:
        """The ids of `text` as the model expects to read it: after `bos`, if it expects that. Not for what `chat`
        wrote, where the template has seen to it: encode that."""
        return [*self.before, *self.encode(text)]

    def chat(self, messages: chat.Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as the model was taught to read it, up to where its answer begins. messages: dicts with
        `role` and `content`. Raises InputError if there is no template or it refuses them."""
        require(self.template is not None, "this model brings no chat template: give it a plain prompt, without chat")
        return chat.render(self.template, messages, self.names, add_generation_prompt, str(self.where))

    def decode(self, ids: Iterable[int]) -> str:
        with _panics_of(self.where, "cannot decode these ids"):
            return self.core.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> Callable[..., str]:
        """A function (ids, final=False) -> the text that these ids add to those of the calls before.

        A character whose last bytes are still to come is held back, until final=True shows what there is of it as
        U+FFFD. Special tokens are left out, and so are ids of a padded vocabulary that no token has; a first token's
        leading space is kept: what is streamed goes on from a prompt.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        of = self._pieces
        return lambda ids, final=False: decoder.decode(b"".join(of[i] for i in ids if i < len(of)), final)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes that each id writes; none for special tokens and for ids without a token."""
        return encoding.pieces_of(self.core, self.vocabulary)

    @functools.cached_property
    def byte_ids(self) -> np.ndarray:
        """The token of each single byte, int32 [256]."""
        ids = {piece[0]: index for index, piece in enumerate(self._pieces) if len(piece) == 1}
        return np.array([ids[byte] for byte in range(256)], np.int32)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()[:16]

    @functools.cached_property
    def ids_digest(self) -> str:
        """A hash of the token that each id is. Models whose tokenizers agree in it compare their probabilities, however
        each of them splits text, and in whatever file it came."""
        tokens = sorted((index, token) for token, index in self.core.get_vocab().items() if self._has(index))
        return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]

    def same(self, other: "Tokenizer") -> bool:
        """Whether the other one reads, writes and ends all text as this one does."""
        told = lambda each: (each.digest, each.names, each.stops, each.template)
        return told(self) == told(other)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, and beside it what it does not hold, as `load` and transformers read them: all of it
        or nothing, and nothing of another one stays.

        path: a folder, or the name to use in place of tokenizer.json.
        """
        file = path if path.suffix == ".json" else path / FILE
        write_together(file.parent, self.files(file.stem))

    def files(self, stem: str = "tokenizer") -> dict[str, str | None]:
        """The text of each file that `save` writes; None for one that may be there of another tokenizer."""
        of_another = dict.fromkeys(tokenizer_files.BESIDE if f"{stem}.json" == FILE else ())
        return of_another | tokenizer_files.written(self, stem) | {f"{stem}.json": self.core.to_str(pretty=True)}


@functools.cache
def _warn(line: str) -> None:
    """On stderr, the same line once."""
    print(f"warning: {line}", file=sys.stderr)


@contextlib.contextmanager
def _panics_of(where: Any, problem: str) -> Iterator[None]:
    """Make an InputError of what the library fails with: bare Exceptions, and panics, which are BaseExceptions. Before
    a panic the library writes a few lines of its own on stderr, which it cannot be told to leave out."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        words = " ".join(str(error).split())[:300]
        raise InputError(f"{where} {problem}: {words}: fetch the model again, or use another tokenizer") from None


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` entries, the separator among them; fewer if the text has no more."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, {"eos_token": SEPARATOR})


def from_description(described: dict[str, Any], where: Any) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, tried out once. `where` names it in errors. Raises InputError."""
    require_sound(described, where)
    with _panics_of(where, "is not a tokenizer"):
        core = tokenizers.Tokenizer.from_str(to_json(described))
        core.no_padding()  # of a length the file asks for
        core.no_truncation()
        core.decode(core.encode(TRIAL).ids)
        highest = max(core.get_vocab().values(), default=-1)
        encoding.stages(core.decoder)
    require_all_read(described, core, where)
    count = core.get_vocab_size()
    require(highest < 2 * count + 1000, f"{where} is not a tokenizer: id {highest} in a vocabulary of {count} tokens")
    return core


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json, given as the file or as its folder, and the files beside it that say what it does not:
    tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja, generation_config.json,
    config.json. What its post-processor says of BOS and EOS counts; where it says nothing, add_bos_token does.

    Raises InputError if it is missing, or one of them is damaged or not a file of the folder itself.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    folder, exists = file.parent, functools.partial(model_files.exists, file.parent)
    require(exists(file.name), f"no tokenizer at {file}: give the directory of a finished run or a Hugging Face model")
    beside = lambda name: model_files.read_object(folder, name) if exists(name) else {}
    described, config, names = tokenizer_files.read(beside, file)
    core = from_description(described, file)
    ends = beside("config.json") | beside("generation_config.json")
    ids = {
        name: tokenizer_files.ids_in(core, ends.get(f"{name}_id"), f"{folder}: {name}_id")
        for name in ("bos_token", "eos_token")
    }
    if not config:  # else these are only what the model was trained with
        names |= {name: core.id_to_token(found[0]) for name, found in ids.items() if found}
    eos = core.token_to_id(names["eos_token"]) if "eos_token" in names else None
    loaded = Tokenizer(
        core,
        names,
        extra_stops=tuple(index for index in ids["eos_token"] if index != eos),
        template=tokenizer_files.template(file, config),
        where=file,
    )
    wrong = [index for index in (*loaded.before, *loaded.after) if core.id_to_token(index) is None]
    require(not wrong, f"{file}: its post_processor adds the id {wrong[:1]}, which no token has: fetch the model again")
    return loaded
