"""Distillation on text that a model writes while the student is trained.

By the teacher: sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947, section 3.2, with samples in place of
the likeliest sequence): the student learns the teacher's continuations like any text. By the student: on-policy
distillation (GKD, Agarwal 2023, arXiv 2306.13649, algorithm 1): the teacher's distributions for what the student itself
writes, so that the student learns where its own mistakes lead.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from efflm import ops
from efflm.compress import training
from efflm.compress.step import Context
from efflm.config import flag, require
from efflm.config.train import TrainSettings
from efflm.infer.generate import prefill, start, step
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel
from efflm.train import losses


def continued(
    model: LanguageModel, batch: dict[str, jax.Array], keys_B: jax.Array, prompt: int, new: int, temperature: float
) -> dict[str, jax.Array]:
    """A batch of the beginnings of rows, gone on with by `new` tokens of the model, which alone are targets.

    A prompt is the first `prompt` tokens of a row, or as many as are of the row's first document. Rows of padding have
    no targets. No gradient flows to the model.
    """
    model = lax.stop_gradient(model)
    first_B, prompts_BP = batch["segments"][:, 0], batch["inputs"][:, :prompt]
    same_BP = batch["segments"][:, :prompt] == first_B[:, None]
    lengths_B = jnp.sum(jnp.cumprod(same_BP.astype(jnp.int32), axis=1), axis=1)
    P, how = prompts_BP.shape[1], Sampling(temperature=temperature).arrays()
    none_K = jnp.zeros(0, jnp.int32)
    logits_BV, cache = prefill(model, prompts_BP, lengths_B, cache_length=P + new)
    state = start(logits_BV, cache, keys_B, how, none_K)

    def more(state, _):
        state, token_B = step(model, state, how, none_K)
        return state, token_B

    first_token_B = state.token_B
    _, rest_NB = lax.scan(more, state, length=new - 1)
    new_BN = jnp.concatenate([first_token_B[None], rest_NB]).T
    put = lambda row_T, new_N, at: lax.dynamic_update_slice(row_T, new_N, (at,))
    whole_BT = jax.vmap(put)(jnp.pad(prompts_BP, ((0, 0), (0, new))), new_BN, lengths_B)
    place_1T = jnp.arange(P + new - 1, dtype=jnp.int32)[None]
    inside_BT = (place_1T < lengths_B[:, None] + new - 1) & (first_B > 0)[:, None]
    written_BT = inside_BT & (place_1T >= lengths_B[:, None] - 1)
    return {
        "inputs": whole_BT[:, :-1],
        "targets": whole_BT[:, 1:],
        "segments": inside_BT.astype(jnp.int32),
        "positions": jnp.broadcast_to(place_1T, inside_BT.shape),
        "weights": written_BT.astype(jnp.float32),
    }


def _cut(batch: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """The rows of the text to `length` tokens, padded where they are shorter."""
    fitted = lambda x: jnp.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1]))))
    out = {name: fitted(batch[name]) for name in ("inputs", "targets", "segments", "positions")}
    return out | {"weights": losses.target_weights({name: fitted(x) for name, x in batch.items()})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(TrainSettings):
    """Train the model on continuations that the teacher writes, or by the teacher's word on those it writes itself."""

    learning_rate: float = flag(5e-4, "peak learning rate")
    by: Literal["student", "teacher"] = flag("student", "who writes: on-policy, or sequence-level distillation")
    share: float = flag(1.0, "of the steps, on average, that read what was written; the others read the text itself")
    prompt: int = flag(32, "tokens of a row of text that are gone on from; of its first document at most")
    new: int = flag(64, "tokens to write")
    temperature: float = flag(1.0, "of sampling; 0 takes the likeliest token")
    divergence: ops.Divergence = flag("reverse", "by=student: of teacher and student; see Distill")
    mix: float = flag(0.5, "share of the teacher in the mixture of jensen_shannon and skew, in (0, 1)")

    at = "steps"

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.share <= 1, f"share is {self.share}, but must be in (0, 1]")
        for name in ("prompt", "new"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        Sampling(temperature=self.temperature)
        require(0 < self.mix < 1, f"mix is {self.mix}, but must be in (0, 1)")

    def __call__(self, model: LanguageModel, context: Context):
        teacher = training.teacher_of(self, context, model)
        longest = min(model.config.max_length, teacher.config.max_length)
        require(
            self.prompt + self.new <= longest,
            f"prompt is {self.prompt} and new is {self.new}, together {self.prompt + self.new} tokens, but the models "
            f"read at most {longest}: shorten one of them",
        )
        require(context.mesh.shape["sequence"] == 1, "text is written by whole sequences: set mesh.sequence to 1")
        return training.train(self, model, context, training.full(model), self.objective(model, teacher))

    def objective(self, model: LanguageModel, teacher: LanguageModel) -> training.Objective:
        by_student = self.by == "student"
        how = {"teacher": teacher, "divergence": self.divergence, "mix": self.mix} if by_student else {}
        loss, _ = training.objective(self, model, **how)
        writer = (training.in_policy(self, model) if by_student else teacher).config

        def of_generated(params: Any, frozen: Any, batch: Any, rng: jax.Array):
            keys = jax.random.split(rng, len(batch["inputs"]) + 1)
            by = LanguageModel(writer, params if by_student else frozen)
            made = continued(by, batch, keys[1:], self.prompt, self.new, self.temperature)
            if self.share < 1:
                own, use = _cut(batch, made["inputs"].shape[1]), jax.random.uniform(keys[0]) < self.share
                made = {name: jnp.where(use, made[name], own[name]) for name in made}
            return loss(params, frozen if by_student else {}, made, rng)

        return of_generated, teacher.params
