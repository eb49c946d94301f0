"""The tables of README.md in this folder: the steps, in the words of their docstrings, and the recipes.

.venv/bin/python -m efflm.compress.methods      # makes them anew; a test compares them with the code
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from efflm.cli.run_directory import write_whole
from efflm.compress import grammar, recipe

README = Path(__file__).with_name("README.md")
PAPER = re.compile(r"((?:\w+ & )?\w+ \d{4}),\s+arXiv\s+(\d{4}\.\d{5})")


def fill(text: str) -> str:
    """The README's text with the tables made anew, each between the lines `<!-- steps -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        begun, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, rest = rest.partition("<!-- end -->\n")
        text = begun + begin + table() + end + rest
    return text


def steps() -> str:
    """A row for each step: its name and the field that a value after @ sets, what it does, the papers."""
    rows = [(_called(name, kind), _says(kind), _listed(papers(kind))) for name, kind in recipe.STEPS.items()]
    return _table(("step", "what it does", "papers (arXiv)"), rows)


def recipes() -> str:
    """A row for each recipe: its chain, and the numbers of the papers of the chain's steps."""
    numbers = lambda name: dict.fromkeys(found for step in grammar.chain(name) for _, found in papers(type(step)))
    rows = [(f"`{name}`", f"`{chain}`", ", ".join(numbers(name))) for name, chain in recipe.RECIPES.items()]
    return _table(("recipe", "chain", "arXiv"), rows)


def papers(kind: type) -> list[tuple[str, str]]:
    """(authors and year, arXiv number) of each paper that the file of a step names; of `merge`, whose file is that of
    another step, none."""
    module = sys.modules[kind.__module__]
    return PAPER.findall(module.__doc__) if module.__name__.endswith(f".{kind.__name__.lower()}") else []


def _called(name: str, kind: type) -> str:
    at = getattr(kind, "at", "")
    field = next(iter(at("0.5"))) if callable(at) else {"steps": "share"}.get(at, at)
    return f"`{name}@{field}`" if field else f"`{name}`"


def _says(kind: type) -> str:
    """The first paragraph of its docstring."""
    return " ".join(kind.__doc__.partition("\n\n")[0].split())


def _listed(found: Iterable[tuple[str, str]]) -> str:
    return "; ".join(map(", ".join, found))


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |\n" for cells in (headings, *rows))
    return "".join([head, "|---" * len(headings) + "|\n", *body])


TABLES: dict[str, Callable[[], str]] = {"steps": steps, "recipes": recipes}

if __name__ == "__main__":
    write_whole(README, fill(README.read_text(encoding="utf-8")))
