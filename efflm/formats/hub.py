"""Models on the Hugging Face hub, from there and to it, through its library: its cache, offline mode and login."""

import re
from pathlib import Path

from efflm.config import InputError, require

PREFIX = "hf:"  # of what is asked of the hub: without it, org/name is a path
_NAME = re.compile(r"(?:(?![.-])[\w.-]{1,96}/)?(?![.-])[\w.-]{1,96}")
_REVISION = re.compile(r"[\w.-][\w./-]{0,250}")
# No weights but safetensors, no code.
FILES = [
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


def could_be(name: str) -> bool:
    """Whether a name could be that of an organization's model."""
    return "/" in name and bool(_NAME.fullmatch(name.partition("@")[0]))


def fetch(source: str) -> Path:
    """The folder in the cache that holds the model `hf:org/name`, or `hf:org/name@revision` (a branch, a tag or a
    commit; main where there is none); fetched first if it is not there or not the newest.

    Without a network, or with HF_HUB_OFFLINE=1, it is what the cache holds. Raises InputError if that is nothing, or
    if the hub has no such model or revision, or none that this user may read.
    """
    from huggingface_hub import constants, errors, snapshot_download

    name, at, revision = source.removeprefix(PREFIX).partition("@")
    require(
        bool(_NAME.fullmatch(name)) and bool(_REVISION.fullmatch(revision) if at else True),
        f"{source} names no model of the Hugging Face hub: give {PREFIX}org/name or {PREFIX}org/name@revision",
    )
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    problems = {
        errors.GatedRepoError: f"{name} on the Hugging Face hub is given only to those who agreed to its terms: do so "
        "on its page, then log in with `hf auth login`",
        errors.RevisionNotFoundError: f"{name} on the Hugging Face hub has no revision {revision}: give a branch, a "
        "tag or a commit of it",
        errors.RepositoryNotFoundError: f"there is no model {name} on the Hugging Face hub, or it is private: check "
        "its name",
        errors.LocalEntryNotFoundError: f"{source} is not in the cache of the Hugging Face hub "
        f"({constants.HF_HUB_CACHE}), and {why}: give a folder that exists, or try again with a network",
    }
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (OSError, ValueError, errors.RevisionResolutionError) as error:
        told = next((words for kind, words in problems.items() if isinstance(error, kind)), "")
        said = " ".join(str(error).split())[:300]
        raise InputError(told or f"{name} cannot be fetched from the hub: {said}") from None


def require_name(name: str) -> None:
    """Raise InputError unless a model can be pushed under this name."""
    require("/" in name and bool(_NAME.fullmatch(name)), f"{name!r:.80} names no model of the hub: give org/name")


def push(path: Path, name: str) -> str:
    """Send a file and its card, or all files of a folder, to the model `org/name` of the hub; its address.

    The model is made there if need be. Raises InputError if the hub cannot be reached or does not take it.
    """
    from huggingface_hub import HfApi, errors

    require_name(name)
    hub = HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        if path.is_dir():
            hub.upload_folder(repo_id=name, folder_path=path)
        else:
            hub.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
            hub.upload_file(repo_id=name, path_or_fileobj=path.with_name(f"{path.name}.md"), path_in_repo="README.md")
        return str(address)
    except (OSError, ValueError, errors.HTTPError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path} cannot be sent to {name} on the Hugging Face hub ({said}): log in with `hf auth login` as one who "
            "may write there"
        ) from None
