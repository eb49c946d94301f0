"""A model card: README.md beside an exported model, which the Hugging Face hub shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from efflm.formats import hub
from efflm.model import LanguageModel

FILE = "README.md"


def text(model: LanguageModel, name: str, format: str, said: Sequence[str] = ()) -> str:
    """The card of a model. said: what is to be known of the files, a line each.

    Of model.about it shows what is there: source, recipe, lineage, and where the caller put them in, `command` (text),
    `figures` ({name: text}) and `protocol` (lines: how they were measured).
    """
    from huggingface_hub import ModelCard, ModelCardData  # here, for its only use: it is slow to import

    about, base = model.about, str(model.about.get("source", ""))
    data = ModelCardData(
        base_model=base.removeprefix(hub.PREFIX) if base.startswith(hub.PREFIX) else None,
        library_name="transformers" if format != "gguf" else None,
        pipeline_tag="text-generation",
        tags=["efflm", format],
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}\n", f"Written by efflm, format {format}."]
    parts += [f"- {line}" for line in said]
    if about.get("lineage"):
        parts += [
            "\n## How it was made\n",
            _table(("step", "settings", "seed", "text", "bytes"), _steps(about["lineage"])),
        ]
    if about.get("figures"):
        parts += ["\n## Measured\n", _table(("figure", "value"), about["figures"].items()), *about.get("protocol", ())]
    if about.get("command"):
        parts += ["\n## Command\n", f"    {about['command']}"]
    content = "\n".join(parts) + "\n"
    return ModelCard(content).content


def _steps(lineage: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    settings = lambda record: ", ".join(f"{key}={value}" for key, value in record.get("settings", {}).items())
    nbytes = lambda record: record.get("actual_bytes", record.get("predicted_bytes", ""))
    return [
        (each.get("step", ""), settings(each), each.get("seed", ""), each.get("corpus", ""), nbytes(each))
        for each in lineage
    ]


def _table(head: Sequence[str], rows: Any) -> str:
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
