"""Quantization-aware training: the weights are rounded in every forward pass, and trained through that.

The scales are those of the weights as they are (Jacob 2018, arXiv 1712.05877), or are trained too (LSQ, Esser 2020,
arXiv 1902.08153).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from efflm import ops, trees
from efflm.compress.plan import OF_EMBEDDINGS, OF_PLAN, Embeddings, Plan, nearest, plan_of, require_formats
from efflm.compress.step import Context, fit, masters, record, require_schedule, teacher_of, train_step
from efflm.config import flag
from efflm.model import LanguageModel, Transformer
from efflm.model.params import in_layer
from efflm.ops import qarray
from efflm.ops.format import Bits
from efflm.precision import policy_for
from efflm.train import losses


def rounded(w: jax.Array, log_scale: jax.Array, format: ops.Format) -> jax.Array:
    """w [K, N] rounded to codes times exp(log_scale) [groups, N], with the gradients of LSQ (equations 1 to 3).

    A code q = clip(w / s, -Q, Q) is rounded straight-through: the gradient for w is 1 where nothing is clipped and else
    0, that for s is round(q) - w / s there and else +-Q. The gradient for the scale is multiplied by 1 / sqrt(n Q),
    n weights to a scale, so that scales and weights change in proportion (section 2.2). The scale is trained by its
    logarithm, which keeps it positive.
    """
    most, group = format.high, format.group_in(len(w))
    share = 1 / math.sqrt((group or len(w)) * most)
    log_scale = log_scale * share + jax.lax.stop_gradient(log_scale * (1 - share))
    scale = qarray.by_entry(jnp.exp(log_scale), -2, group, len(w))
    clipped = jnp.clip(w / scale, -most, most)
    return (clipped + jax.lax.stop_gradient(jnp.round(clipped) - clipped)) * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class QAT:
    """Round the matrices inside the layers and train all weights with that; then round embeddings to the nearest."""

    bits: Bits = flag(4, "bits of a weight")
    group: int = flag(32, "inputs that share a scale; 0: all of an output")
    scales: Literal["learned", "running"] = flag(
        "learned", "trained like weights (LSQ); running: always that of the largest weight of the group"
    )
    steps: int = flag(150, "optimizer steps")
    learning_rate: float = flag(1e-4, "peak learning rate, reached after a tenth of the steps or 40")
    distill: bool = flag(True, "imitate the teacher; false: learn from the text alone")
    embeddings: Embeddings = flag(8, OF_EMBEDDINGS)
    plan: Plan | None = flag(None, OF_PLAN, internal=True)

    at = "bits"
    trains = True

    def __post_init__(self):
        require_formats(self, self._plan, activations=("float",), symmetric=(True,), scales=("output",))
        require_schedule(self)

    @property
    def _plan(self) -> Plan:
        # The scale with the least squared error: the paper's 2 mean|w| / sqrt(Q) leaves more to the training.
        return plan_of(self, scales="output", clip=self.scales == "learned")

    def __call__(self, model: LanguageModel, context: Context):
        loss, frozen = self.loss(model, context)
        if self.scales == "running":

            def of_layers(path: str, w: Any) -> Any:
                format = self.inside(path)
                return ops.quantize_array(ops.dequantize(w), -2, format) if format else w

            rounded_model = model.replace(params=trees.map_with_path(of_layers, model.params))
            after, _ = train_step(self, rounded_model, context, loss, frozen)
        else:
            after = model.replace(params=self.with_learned_scales(model, context, loss, frozen))
        after = after.replace(params=nearest(after.params, self._plan, inside=False))
        return after, record(self, model, after, context)

    def loss(self, model: LanguageModel, context: Context) -> tuple[losses.LossFn, Any]:
        """The loss of params, and the teacher's params if there is one."""
        if not self.distill:
            return losses.language_model_loss(model.config, policy_for(model.config)), {}
        teacher = teacher_of(context, model)
        models = (Transformer(each.config, policy_for(each.config)) for each in (model, teacher))
        return losses.distillation_loss(*models, temperature=1.0, weight=1.0), teacher.params

    def inside(self, path: str) -> ops.Format | None:
        """The format of a matrix that is rounded while it is trained."""
        return self._plan.of(path) if in_layer(path) else None

    def with_learned_scales(self, model: LanguageModel, context: Context, loss: losses.LossFn, frozen: Any) -> Any:
        """The weights after training. Those that are not rounded here keep their formats."""

        def start(path: str, w: jax.Array) -> Any:
            format = self.inside(path)
            return {"master": w, "log_scale": jnp.log(qarray.grid_of(w, -2, format)[0])} if format else w

        def in_forward(path: str, like: Any, node: Any) -> Any:
            format = self.inside(path)
            if not format:
                return ops.straight_through(node, like)
            return rounded(node["master"], node["log_scale"], format)

        def at_the_end(path: str, like: Any, node: Any) -> Any:
            format = self.inside(path)
            if not format:
                return ops.requantize(node, like)
            return ops.quantize_array(node["master"], -2, format, grid=(jnp.exp(node["log_scale"]), None))

        def rounded_loss(trainable: Any, *rest: Any):
            return loss(trees.map_with_path(in_forward, model.params, trainable), *rest)

        masks = {f"{path}/master" if self.inside(path) else path: mask for path, mask in (model.masks or {}).items()}
        begin = lambda: trees.map_with_path(start, masters(model))
        trained = fit(self, context, rounded_loss, begin, frozen, masks)
        return trees.map_with_path(at_the_end, model.params, trained)
