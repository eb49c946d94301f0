"""Models on the Hugging Face hub, through its library: its cache, its offline mode, its login."""

import re
from pathlib import Path

from efflm.config import InputError

ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
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
    "chat_template.jinja",
]


def fetch(name: str) -> Path:
    """The folder in the cache that holds the model `org/name`; fetched first if it is not there or not the newest.

    Without a network, or with HF_HUB_OFFLINE=1, it is what the cache holds. Raises InputError if that is nothing, or
    if the hub has no such model, or none that this user may read.
    """
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except errors.GatedRepoError:
        raise InputError(
            f"{name} on the Hugging Face hub is given only to those who agreed to its terms: do so on its page, then "
            "log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"there is no model {name} on the Hugging Face hub, or it is private: check its name"
        ) from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise InputError(
            f"{name} is not in the cache of the Hugging Face hub ({constants.HF_HUB_CACHE}), and {why}: give a folder "
            "that exists, or try again with a network"
        ) from None
    except (OSError, ValueError, errors.RevisionResolutionError) as error:
        raise InputError(f"{name} cannot be fetched from the hub: {' '.join(str(error).split())[:300]}") from None
