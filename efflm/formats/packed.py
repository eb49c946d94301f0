"""Quantized matrices as the tensors of compressed-tensors, GPTQ and AWQ checkpoints: their codes bit for bit, and back.

All three store codes as unsigned numbers, 2^(bits - 1) above ours, in int32 words: the first code in the lowest bits,
32 codes in as many words as a code has bits. That is the order of ops.packing, so where they are packed along the
inputs only the highest bit of each code changes. AWQ packs along the outputs, the eight of a word in another order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from efflm import trees
from efflm.config import require
from efflm.formats.packed_config import REMEDY, Scheme
from efflm.formats.tensors import FLOATING, Named
from efflm.ops.packing import pack, packed_size, unpack
from efflm.ops.qarray import QArray

Shape = tuple[int, ...]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight each code of a word is of, the lowest first
INTEGERS = {"weight": np.int8, "weight_shape": np.int64} | dict.fromkeys(
    ("weight_packed", "qweight", "qzeros", "g_idx"), np.int32
)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized matrix [inputs, outputs] among the tensors of a checkpoint: those whose names begin with `module`."""

    scheme: Scheme
    module: str
    inputs: int
    outputs: int

    @property
    def group(self) -> int:
        return 0 if self.scheme.group >= self.inputs else self.scheme.group

    @property
    def shapes(self) -> dict[str, Shape]:
        """{what follows the module's name: shape} of its tensors, as far as they are known to be there."""
        K, N, bits = self.inputs, self.outputs, self.scheme.bits
        G = -(-K // self.group) if self.group else 1
        words = lambda size: -(-size * bits // 32)
        if self.scheme.layout == "awq":
            return {"qweight": (K, words(N)), "qzeros": (G, words(N)), "scales": (G, N)}
        if self.scheme.layout in ("gptq", "gptq_v2"):
            return {"qweight": (words(K), N), "qzeros": (G, words(N)), "scales": (G, N)}
        packs = self.scheme.layout == "packed"
        codes = {"weight_packed": (N, words(K)), "weight_shape": (2,)} if packs else {"weight": (N, K)}
        zeros = {} if self.scheme.symmetric else {"weight_zero_point": (words(N), G) if packs else (N, G)}
        static = {"input_scale": (1,)} if self.scheme.activations == "int8_static" else {}
        return codes | {"weight_scale": (N, G)} | zeros | static

    @property
    def beside(self) -> dict[str, Shape]:
        """Those that may be there and say nothing, which is looked at: the order of inputs, zeros as zero points."""
        if self.scheme.layout in ("gptq", "gptq_v2"):
            return {"g_idx": (self.inputs,)}
        return {"weight_zero_point": self.shapes["weight_scale"]} if self.scheme.layout == "int" else {}

    def tensors(self, there: dict[str, Shape]) -> list[str]:
        """The names of its tensors. Raises InputError where one is missing or of another shape."""
        names, awq = [], self.scheme.layout == "awq"
        require(
            not awq or self.outputs % 8 == 0, f"{self.module:.80} has {self.outputs} outputs, which 8 do not divide"
        )
        for part, shape in (self.beside | self.shapes).items():
            name = f"{self.module}.{part}"
            if part not in self.shapes and name not in there:
                continue
            require(name in there, f"{name:.80} is missing, which the quantization_config speaks of: fetch it again")
            require(
                there[name] == shape,
                f"{name:.80} has shape {there[name]}, but the quantization_config and the sizes say {shape}",
            )
            names.append(name)
        return names

    def integer(self, part: str) -> type | None:
        """The dtype of a part; None: floating."""
        if part == "weight_zero_point":
            return np.int32 if self.scheme.layout == "packed" else np.int8
        return INTEGERS.get(part)

    # --- in ----------------------------------------------------------------------------------------------------------

    def read(self, source: Callable[[str], np.ndarray], there: dict[str, Shape]) -> dict[str, np.ndarray]:
        """The arrays of the QArray, [..., outputs]. Raises InputError."""
        scheme, (K, N, bits) = self.scheme, (self.inputs, self.outputs, self.scheme.bits)

        def tensor(part: str) -> np.ndarray:
            array, integer = source(f"{self.module}.{part}"), self.integer(part)
            good = array.dtype == integer if integer else array.dtype in FLOATING
            require(
                good, f"{self.module:.80}.{part} is stored as {array.dtype}, which is not what such a weight is made of"
            )
            return array

        if scheme.layout == "awq":
            codes = _in_order(_unpacked(tensor("qweight"), bits, N, -1))
            zeros = _in_order(_unpacked(tensor("qzeros"), bits, N, -1))
            values, scale = pack(codes, bits, 0), tensor("scales")
        elif scheme.layout in ("gptq", "gptq_v2"):
            if f"{self.module}.g_idx" in there:
                in_order = np.array_equal(tensor("g_idx"), np.arange(K) // (self.group or K))
                require(
                    in_order,
                    f"{self.module:.80}.g_idx says that groups are of inputs in another order (desc_act), which is not "
                    f"supported: give a model made with desc_act=False, or {REMEDY}",
                )
            values, scale, zeros = _signed(tensor("qweight"), bits, K, 0), tensor("scales"), tensor("qzeros")
            zeros = _zeros_of_gptq(zeros, bits, N) if scheme.layout == "gptq" else _unpacked(zeros, bits, N, -1)
        else:
            values, zeros = self._of_compressed_tensors(tensor, there)
            scale = tensor("weight_scale").T
        parts = {"values": values, "scale": scale} | ({} if zeros is None or not zeros.any() else {"zeros": zeros})
        if scheme.activations == "int8_static":
            parts["activation_scale"] = tensor("input_scale").astype(np.float32).reshape(1, 1)
        return parts

    def _of_compressed_tensors(
        self, tensor: Callable[[str], np.ndarray], there: dict[str, Shape]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Values and zeros [..., outputs]."""
        scheme, (K, N, bits) = self.scheme, (self.inputs, self.outputs, self.scheme.bits)
        zeros = tensor("weight_zero_point") if f"{self.module}.weight_zero_point" in there else None
        if scheme.layout == "packed":
            same = tensor("weight_shape").tolist() == [N, K]
            require(same, f"{self.module:.80}.weight_shape is not {[N, K]}, which the model's config says")
            values = _signed(tensor("weight_packed"), bits, K, -1).T
            zeros = zeros if zeros is None else _unpacked(zeros, bits, N, 0)
        else:
            values = tensor("weight").T
            most = 2 ** (bits - 1)
            fits = bits == 8 or (-most <= values.min() and values.max() < most)
            require(fits, f"{self.module:.80}.weight has codes of more than {bits} bits: {REMEDY}")
            values = pack(values, bits, 0)
            require(
                zeros is None or not scheme.symmetric or not zeros.any(),
                f"{self.module:.80}.weight_zero_point is not 0, but the quantization_config calls it symmetric",
            )
        return values, None if zeros is None else zeros.T

    # --- out ---------------------------------------------------------------------------------------------------------

    def write(self, weights: list[QArray], join: Callable[[list[np.ndarray]], np.ndarray]) -> Iterator[Named]:
        """The tensors of compressed-tensors. weights: the matrix, or its parts that `join` puts side by side."""
        for part, shape in self.shapes.items():
            floats = np.float32 if part == "input_scale" else weights[0].scale.dtype
            kind = jax.ShapeDtypeStruct(shape, np.dtype(self.integer(part) or floats))
            yield f"{self.module}.{part}", kind, functools.partial(self._written, part, weights, join)

    def _written(self, part: str, weights: list[QArray], join: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray:
        whole = lambda of: join([of(w) for w in weights]).T
        bits = self.scheme.bits
        if part in ("weight", "weight_packed"):
            codes = whole(lambda w: unpack(trees.on_host(w.values), w.bits, w.size, w.axis))
            return codes if part == "weight" else _words(codes, bits, -1)
        if part == "weight_zero_point":
            zeros = whole(lambda w: trees.on_host(w.zeros))
            return _words(zeros, bits, 0) if self.scheme.layout == "packed" else zeros
        if part == "weight_shape":
            return np.array([self.outputs, self.inputs])
        if part == "input_scale":
            return trees.on_host(weights[0].activation_scale).reshape(1)
        return whole(lambda w: trees.on_host(w.scale))


def matrix_of(module: str, weight: QArray, outputs: int) -> Matrix:
    """Where a matrix, of which `weight` is all or a part, is stored by compressed-tensors."""
    scheme = Scheme(
        layout="packed" if weight.activations == "float" else "int",
        bits=weight.bits,
        group=weight.group,
        symmetric=weight.zeros is None,
        activations=weight.activations,
    )
    return Matrix(scheme, module, weight.size, outputs)


# --- words -----------------------------------------------------------------------------------------------------------


def _highest(size: int, bits: int) -> np.ndarray:
    """Bytes with the highest bit of each of `size` codes set: what differs between a signed code and one that is
    counted from the least."""
    return pack(np.full(size, -(2 ** (bits - 1)), np.int8), bits).view(np.uint8)


def _signed(words: np.ndarray, bits: int, size: int, axis: int) -> np.ndarray:
    """`size` unsigned codes in int32 words along an axis, as ops.packing packs signed ones; int8 with 8 bits."""
    raw = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)[..., : packed_size(size, bits)]
    packed = raw ^ _highest(size, bits)
    return np.moveaxis(packed.view(np.int8) if bits == 8 else packed, -1, axis)


def _unpacked(words: np.ndarray, bits: int, size: int, axis: int) -> np.ndarray:
    """The same as int8 codes."""
    return unpack(_signed(words, bits, size, axis), bits, size, axis)


def _words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The inverse of `_unpacked`; what is left of the last word is 0."""
    last = np.moveaxis(codes, axis, -1)
    packed = pack(last ^ np.int8(-(2 ** (bits - 1))), bits).view(np.uint8)
    filled = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % 4)])
    return np.moveaxis(np.ascontiguousarray(filled).view(np.int32), -1, axis)


def _zeros_of_gptq(words: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The zero points [..., size] of which each code is one less. One that overflows carries into the next of its word:
    the programs that write these files take 1 from each in the same way."""
    if 32 % bits:  # codes lie across words
        return unpack(pack(_unpacked(words, bits, size, -1) + np.int8(1), bits), bits, size)
    ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
    return _unpacked((words.view(np.uint32) + ones).view(np.int32), bits, size, -1)


def _in_order(codes: np.ndarray) -> np.ndarray:
    """AWQ's codes [..., outputs] with each output in its place."""
    words = codes.reshape(*codes.shape[:-1], -1, 8)
    return words[..., np.argsort(AWQ_ORDER)].reshape(codes.shape)
