"""The candidates of a search: they are made by chains, measured, and kept in files from which a search goes on."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from efflm.cli import run_directory
from efflm.compress import grammar, recipe
from efflm.compress.step import Context, trains
from efflm.config import InputError, require
from efflm.evaluate import scoring, tasks
from efflm.evaluate.answers import Answers, correct, usual
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FINALISTS, FIRST, UNSEEN
from efflm.evaluate.task_files import Task
from efflm.evaluate.windows import Scoring
from efflm.formats import saved
from efflm.formats.saved import Saved
from efflm.formats.sources import Loaded
from efflm.model import LanguageModel
from experiments.making.chains import Making, prepared

FORWARD_PASSES = 4  # that a training step on as many tokens takes, with a teacher


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Candidates by the names of their chains; FIRST is the model itself.

    texts: {name: text}, of which UNSEEN is the acceptance text. tried: what tried.json in the folder holds, costs: its
    costs of the target that is searched. deadline: by time.monotonic(), the acceptance included.
    """

    run: Making
    folder: Path
    loaded: Loaded
    context: Context
    texts: dict[str, Any]
    score: Scoring
    asked: list[Task]
    tried: dict[str, Any]
    costs: dict[str, float]
    deadline: float
    say: Callable[[str], None]

    def keep(self) -> None:
        run_directory.write_json(self.folder / "tried.json", self.tried)

    def file(self, name: str) -> Path:
        return self.folder / "candidates" / f"{grammar.file_name(name)}.safetensors"

    @property
    def left(self) -> float:
        """Seconds, without those that it takes to test."""
        unseen = sum(self.tried["sums"].get(FIRST, {}).get(UNSEEN, {}).get("tokens", ()))
        return self.deadline - FINALISTS * unseen * self.tried["second_a_token"] - time.monotonic()

    def made(self, name: str) -> LanguageModel:
        """The model of a candidate, from its file if it is there."""

        def apply() -> Saved:
            model, records = recipe.apply(self.loaded.model, self.run.steps_of(name), self.context)
            return Saved(model, self.loaded.about | {"recipe": name}, records)

        if name == FIRST:
            return self.loaded.model
        return saved.once(self.file(name), self.loaded.tokenizer, self.context.mesh, apply)

    def measure(self, name: str, text: str) -> Quality | None:
        """The sums of a candidate on a text; None: no time is left for it."""
        if name != FIRST and text != UNSEEN and self.left < 0:
            return None
        model, how = prepared(self.made(name)), dataclasses.replace(self.score, documents=0)
        start = time.monotonic()
        found = scoring.measure({"": model}, self.texts[text], self.loaded.tokenizer, how, model)[""]
        took = (time.monotonic() - start) / float(found.tokens.sum())
        self.tried["second_a_token"] = min(took, self.tried["second_a_token"] or took)  # later ones compile nothing
        return found

    def make(self, name: str, cost: Callable[[LanguageModel], float], words: Callable[[float], str]) -> None:
        """Find the cost of a candidate, where it can be made and there is time to train it."""
        run, start = self.run, time.monotonic()
        trained = sum(step.steps for step in run.steps_of(name) if trains([step])) * run.batch * run.length
        needed = FORWARD_PASSES * trained * self.tried["second_a_token"]
        if self.left < needed:
            self.say(f"{name}: left out for now, since it takes about {needed / 60:.0f} minutes to train")
            return
        try:
            self.costs[name] = cost(self.made(name))
            self.say(f"{name}: {words(self.costs[name])}, made in {time.monotonic() - start:.0f} s")
        except InputError as error:
            self.tried["problems"][name] = str(error)
            self.say(f"{name} cannot be made: {error}")
        self.keep()

    @functools.cache  # noqa: B019 (there is one object, until the program ends)
    def answers(self, name: str) -> dict[str, Answers]:
        first = prepared(self.made(FIRST))
        answering = tasks.answering(self.asked, self.loaded.tokenizer, first)
        return answering({name: prepared(self.made(name))})[name]

    def flips(self, name: str) -> tuple[int, int]:
        """Answers that are right in one model and wrong in the other, and of how many."""
        pairs = [(own, self.answers(FIRST)[task]) for task, own in self.answers(name).items()]
        differ = [correct(own, usual(first)) != correct(first, usual(first)) for own, first in pairs]
        return int(sum(map(np.sum, differ))), sum(map(len, differ))


def begun(file: Path, key: str) -> dict[str, Any]:
    """What tried.json holds. Raises InputError if it is of another search."""
    found = {"key": key, "second_a_token": 0.0, "sums": {}, "costs": {}, "tests": {}, "problems": {}}
    found = json.loads(file.read_text()) if file.exists() else found
    require(found["key"] == key, f"{file} is of another model, text or settings: give another --run_dir, or delete it")
    return found
