"""Log-likelihoods of token ids after others: several continuations of one context read it once.

A context and its continuations are packed side by side into a row of tokens, in which each is there once (see
model.Branches): what the layers compute grows with the tokens that differ, and there is no padding but at the end of a
block. Blocks have few shapes, so that few programs are compiled, and the longest come first.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from efflm.cli import progress
from efflm.evaluate import quality
from efflm.infer.generate import bucket
from efflm.model import Branches, LanguageModel, require_same_tokenizer

BLOCK = 2048  # tokens that are read at a time
ROUNDED = 16  # tokens and sequences of a block are a multiple of this
TARGETS = 128  # tokens that are scored at a time

Request = tuple[Sequence[int], Sequence[Sequence[int]]]  # ids of a context and of each continuation, none of them empty
Group = tuple[list[int], list[tuple[int, list[int]]]]  # what is read first, and continuations with their numbers


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of each token of all continuations, in order, [tokens]: owners, the number of its continuation among those of all
    requests; nats, -log p of it; kl, KL(reference || model) in nats; confidence, the probability of the likeliest token
    in its place; right, whether that is the token itself."""

    owners: np.ndarray
    nats: np.ndarray
    kl: np.ndarray
    confidence: np.ndarray
    right: np.ndarray


@dataclasses.dataclass(frozen=True)
class Block:
    """What `quality.states` reads, how many of its tokens are no padding, and int [targets]: which token each target
    is predicted at, its id, and the number of its continuation."""

    read: quality.Block
    tokens: int
    states: np.ndarray
    targets: np.ndarray
    owners: np.ndarray


def scores(
    models: dict[str, LanguageModel],
    requests: Sequence[Request],
    reference: LanguageModel,
    kept: dict[int, np.ndarray] | None = None,
    title: str = "scoring",
) -> dict[str, Scores]:
    """What each model makes of the continuations, and how far from the reference, which reads each block once.

    models: prepared, on one device. kept: as `quality.measure` has it, for the same requests. A
    context that is too long loses its first tokens, as lm-eval has it (see `is_cut`); a continuation must fit.
    """
    for model in models.values():
        require_same_tokenizer(model, reference, "model", "reference")
    longest = min(model.config.max_length for model in (reference, *models.values()))
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in models}
    packed = list(blocks(requests, longest))
    total = sum(block.tokens for block in packed)
    for index, block in enumerate(progress.shown(packed, title, total, lambda block: block.tokens)):
        states = lambda model, block=block: quality.states(model, block.read)[block.states]
        expected_MD = kept[index] if kept and index in kept else states(reference)
        if kept is not None:
            quality.keep(kept, index, expected_MD)
        read = {name: expected_MD if model is reference else states(model) for name, model in models.items()}
        found = quality.score(models, read, reference, expected_MD, block.targets, TARGETS)
        for name, part in found.items():
            parts[name].append(part)
    owners = np.concatenate([np.zeros(0, int), *(block.owners for block in packed)])
    order = np.argsort(owners, kind="stable")
    return {name: _joined(owners[order], found, order) for name, found in parts.items()}


def _joined(owners: np.ndarray, found: list[dict[str, np.ndarray]], order: np.ndarray) -> Scores:
    of = lambda figure: np.concatenate([np.zeros(0), *(part[figure] for part in found)])[order]
    return Scores(owners, of("bits") * np.log(2), of("kl"), of("confidence"), of("right").astype(bool))


def is_cut(context: Sequence[int], continuation: Sequence[int], longest: int) -> bool:
    """Whether a model that reads `longest` tokens does not read the whole context: the last token is only predicted."""
    return len(context) + len(continuation) - 1 > longest


def blocks(requests: Sequence[Request], longest: int) -> Iterator[Block]:
    """All continuations, those with the longest sequences first, in blocks of about BLOCK tokens. The places in a
    sequence are a power of two, and for each of these all blocks have one shape."""
    groups = sorted(_groups(requests, longest), key=lambda group: (-_length(group), -_tokens(group)))
    packed, used = [], BLOCK
    for group in groups:
        if used + _tokens(group) > BLOCK:
            packed.append([])
            used = 0
        packed[-1].append(group)
        used += _tokens(group)
    sizes: dict[int, tuple[int, int]] = {}  # the most tokens and sequences of the blocks with so many places in each
    for part in packed:
        places = bucket(_length(part[0]))
        size = (sum(map(_tokens, part)), sum(map(_sequences, part)))
        sizes[places] = tuple(map(max, zip(size, sizes.get(places, (0, 0)))))
    for part in packed:
        places = bucket(_length(part[0]))
        tokens, sequences = (-(-size // ROUNDED) * ROUNDED for size in sizes[places])
        yield _block(part, tokens, (sequences, places))


def _groups(requests: Sequence[Request], longest: int) -> Iterator[Group]:
    """Continuations with what is read before them. Where a context is cut, or they are more than a block holds, it is
    read more than once."""
    number = 0
    for context, ends in requests:
        shared, group = list(context), []
        for end in map(list, ends):
            if is_cut(shared, end, longest):
                yield (shared + end)[-longest - 1 : -len(end)], [(number, end)]
            else:
                if group and _tokens((shared, group)) + len(end) - 1 > BLOCK:
                    yield shared, group
                    group = []
                group.append((number, end))
            number += 1
        if group:
            yield shared, group


def _tokens(group: Group) -> int:
    """Tokens that are read: of a continuation all but the last, which is only predicted."""
    return len(group[0]) + sum(len(end) - 1 for _, end in group[1])


def _length(group: Group) -> int:
    return len(group[0]) + max(len(end) - 1 for _, end in group[1])


def _sequences(group: Group) -> int:
    """Rows of the sequences of a group: where nothing is read after the context, it is one for all."""
    return max(1, sum(len(end) > 1 for _, end in group[1]))


def _block(groups: Sequence[Group], size: int, shape: tuple[int, int]) -> Block:
    tokens_T, positions_T, places_T = np.zeros((3, size), np.int32)
    tokens_RS, row, at = np.zeros(shape, np.int32), 0, 0
    states, targets, owners = [], [], []
    for shared, ends in groups:
        first, row_of_group = at, row
        at += len(shared)
        context = np.arange(first, at)
        tokens_T[context], positions_T[context] = shared, context - first
        places_T[context] = row * shape[1] + positions_T[context]
        tokens_RS[row, : len(shared)] = context
        for number, end in ends:
            branch = np.arange(at, at + len(end) - 1)
            states += [context[-1], *branch]
            targets += end
            owners += [number] * len(end)
            if len(branch):
                places = np.arange(len(shared), len(shared) + len(branch))
                tokens_T[branch], positions_T[branch], places_T[branch] = end[:-1], places, row * shape[1] + places
                tokens_RS[row, : len(shared)], tokens_RS[row, places] = context, branch
                at, row = at + len(branch), row + 1
        row = max(row, row_of_group + 1)
    read = {"inputs": tokens_T, "positions": positions_T, "documents": np.ones(size, np.int32)}
    sequences = Branches(tokens_RS, places_T[None])
    return Block(
        {name: x[None] for name, x in read.items()} | {"segments": sequences},
        at,
        *(np.array(x, np.int32) for x in (states, targets, owners)),
    )
