"""AdamW (Loshchilov 2017, arXiv 1711.05101) with warm-up, cosine decay and clipping."""

import re
from typing import Any

import optax

from efflm import trees
from efflm.config import TrainConfig

SPARED = r"embedding|norm/|(scale|bias)$"


def decay_mask(params: Any) -> Any:
    """True for the matrices that weight decay pulls on: all but embeddings, norms and biases."""
    return trees.map_with_path(lambda path, _: not re.search(SPARED, path), params)


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to final_fraction of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
