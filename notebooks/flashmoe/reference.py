"""The functions of ref_cpu/fmoe.h."""

import ctypes
import os

import numpy as np

from .library import Dtype, Shapes, Write, call, new, returns, value_of, view


# ---- Storage types, comparing ----------------------------------------------------------------------------------------


def to_f32(array):
    """float16, bfloat16 (uint16 in NumPy) or float32 as float32; exact."""
    v = view(array)
    result = new(*v.shape)
    value_of("to_f32", v.dtype, result.size, v, result)
    return result


def from_f32(dtype, array):
    """Rounded to nearest, ties to even."""
    v = Shapes().floats("array", array, *view(array).shape)
    result = new(*v.shape, dtype={Dtype.F32: np.float32, Dtype.F16: np.float16, Dtype.BF16: np.uint16}[dtype])
    value_of("from_f32", dtype, result.size, v, result)
    return result


def to_bf16(array):
    return from_f32(Dtype.BF16, array)


def from_bf16(array):
    return to_f32(array)


def relative_error(out, ref, natural_scale=0.0):
    """‖out − ref‖ / ‖ref‖, the measure that every result in this repository is held to; see fmoe.h."""
    out, ref = to_f32(out), to_f32(ref)
    if out.shape != ref.shape:
        raise ValueError(f"out has the shape {list(out.shape)}, ref {list(ref.shape)}")
    return value_of("relative_error", out.size, out, ref, float(natural_scale))


def error_limit(dtype):
    """The limit of that measure: 1e-5, 6e-4 or 4e-3, by how the result is stored."""
    return value_of("error_limit", Dtype(dtype))


def compare_indices(logits, indices, expected):
    """The first token whose choice is not accepted, or -1: choices count as sets, near ties are forgiven."""
    s = Shapes()
    logits = s.floats("logits", logits, 2, "T", "n")
    indices, expected = s.integers("indices", indices, "T", "K"), s.integers("expected", expected, "T", "K")
    return value_of("compare_indices", s["T"], s["n"], s["K"], logits, indices, expected)


# ---- Step: router ----------------------------------------------------------------------------------------------------


def router_norm(x, running_mean, running_var, training=False):
    """x̂ [T, d]. In training the two running buffers [d] move, where they lie."""
    s = Shapes()
    x = s.floats("x", x, "T", "d")
    mean, var = s.buffer("running_mean", running_mean, "d"), s.buffer("running_var", running_var, "d")
    x_hat = new(s["T"], s["d"])
    call("router_norm", training, s["T"], s["d"], x, mean, var, x_hat)
    return x_hat


def router_norm_backward(x, dx_hat, running_mean=None, running_var=None, training=False):
    s = Shapes()
    x, dx_hat = s.floats("x", x, "T", "d"), s.floats("dx_hat", dx_hat, "T", "d")
    mean = s.optional("running_mean", running_mean, "d")
    var = s.optional("running_var", running_var, "d")
    dx = new(s["T"], s["d"])
    call("router_norm_backward", training, s["T"], s["d"], x, mean, var, dx_hat, dx)
    return dx


def router_logits(x_hat, gate):
    """[2, T, n] from x̂ [T, d] and gate [2n, d]."""
    s = Shapes()
    x_hat, gate = s.floats("x_hat", x_hat, "T", "d"), s.floats("gate", gate, "2n", "d")
    logits = new(2, s["T"], s["2n"] // 2)
    call("router_logits", s["T"], s["d"], s["2n"] // 2, x_hat, gate, logits)
    return logits


def router_logits_backward(x_hat, gate, dlogits):
    """dx̂ [T, d] and dgate [2n, d]."""
    s = Shapes()
    x_hat, dlogits = s.floats("x_hat", x_hat, "T", "d"), s.floats("dlogits", dlogits, 2, "T", "n")
    gate = s.floats("gate", gate, 2 * s["n"], "d")
    dx_hat, dgate = new(s["T"], s["d"]), new(*gate.shape)
    call("router_logits_backward", s["T"], s["d"], s["n"], x_hat, gate, dlogits, Write.OVERWRITE, dx_hat, dgate)
    return dx_hat, dgate


def log_softmax(logits):
    """Over the last dimension."""
    v = Shapes().floats("logits", logits, *view(logits, "logits").shape)
    log_probs = new(*v.shape)
    call("log_softmax", log_probs.size // max(v.shape[-1], 1), v.shape[-1], v, log_probs)
    return log_probs


def log_softmax_backward(logits, dlog_probs):
    shape = view(logits, "logits").shape
    logits, dlog_probs = Shapes().floats("logits", logits, *shape), Shapes().floats("dlog_probs", dlog_probs, *shape)
    dlogits = new(*shape)
    call("log_softmax_backward", dlogits.size // max(shape[-1], 1), shape[-1], logits, dlog_probs, dlogits)
    return dlogits


# ---- Step: topk ------------------------------------------------------------------------------------------------------


def num_keys(num_experts):
    """floor(sqrt(N)), exactly."""
    return value_of("num_keys", num_experts)


def topk(logits, K, norm_topk_prob=False):
    """indices, scores and routing weights, [T, K] each, of the K best of the n² pairs; logits [2, T, n]."""
    s = Shapes()
    logits = s.floats("logits", logits, 2, "T", "n")
    shape = s["T"], max(0, min(K, s["n"] ** 2))  # a K beyond that is refused
    indices, scores, weights = new(*shape, dtype=np.int32), new(*shape), new(*shape)
    call("topk", s["T"], s["n"], K, norm_topk_prob, logits, indices, scores, weights)
    return indices, scores, weights


def topk_at(logits, indices, norm_topk_prob=False):
    """scores and weights of a choice made elsewhere."""
    s = Shapes()
    logits, indices = s.floats("logits", logits, 2, "T", "n"), s.integers("indices", indices, "T", "K")
    scores, weights = new(*indices.shape), new(*indices.shape)
    call("topk_at", s["T"], s["n"], s["K"], norm_topk_prob, logits, indices, scores, weights)
    return scores, weights


def topk_backward(logits, indices, dweights=None, dscores=None, norm_topk_prob=False):
    """dlogits [2, T, n]; a gradient that is None counts as zero."""
    s = Shapes()
    logits, indices = s.floats("logits", logits, 2, "T", "n"), s.integers("indices", indices, "T", "K")
    dweights, dscores = s.optional("dweights", dweights, "T", "K"), s.optional("dscores", dscores, "T", "K")
    dlogits = new(*logits.shape)
    call("topk_backward", s["T"], s["n"], s["K"], norm_topk_prob, logits, indices, dweights, dscores, dlogits)
    return dlogits


# ---- Step: schedule --------------------------------------------------------------------------------------------------


def schedule(indices, num_experts):
    """offsets [N + 1] and pairs [T·K]: expert e owns pairs[offsets[e] : offsets[e + 1]], each pair being t·K + k."""
    s = Shapes()
    indices = s.integers("indices", indices, "T", "K")
    offsets, pairs = new(max(num_experts, 0) + 1, dtype=np.int32), new(s["T"] * s["K"], dtype=np.int32)
    call("schedule", s["T"], s["K"], num_experts, indices, offsets, pairs)
    return offsets, pairs


# ---- Step: expert ----------------------------------------------------------------------------------------------------


def silu(s):
    return value_of("silu", float(s))


def _expert_inputs(s, x, down, up, indices, weights):
    x, down, up = s.floats("x", x, "T", "d"), s.floats("down", down, "N", "d"), s.floats("up", up, "N", "d")
    return x, down, up, s.integers("indices", indices, "T", "K"), s.floats("weights", weights, "T", "K")


def expert(x, down, up, indices, weights, pre_activations=False):
    """y [T, d]: y_t = Σ_k silu(⟨x_t, down[e]⟩) · weights[t, k] · up[e] with e = indices[t, k]. With pre_activations
    also the ⟨x_t, down[e]⟩ [T, K]."""
    s = Shapes()
    inputs = _expert_inputs(s, x, down, up, indices, weights)
    y, pre = new(s["T"], s["d"]), new(s["T"], s["K"])
    call("expert", s["T"], s["d"], s["N"], s["K"], *inputs, y, pre)
    return (y, pre) if pre_activations else y


def expert_backward(x, down, up, indices, weights, dy):
    """dx [T, d], ddown [N, d], dup [N, d], dweights [T, K]."""
    s = Shapes()
    inputs = _expert_inputs(s, x, down, up, indices, weights)
    gradients = new(s["T"], s["d"]), new(s["N"], s["d"]), new(s["N"], s["d"]), new(s["T"], s["K"])
    dy = s.floats("dy", dy, "T", "d")
    call("expert_backward", s["T"], s["d"], s["N"], s["K"], *inputs, dy, Write.OVERWRITE, *gradients)
    return gradients


# ---- Step: mlp -------------------------------------------------------------------------------------------------------


def _mlp_inputs(s, x, gate, up, down):
    x, gate, up = s.floats("x", x, "T", "d"), s.floats("gate", gate, "I", "d"), s.floats("up", up, "I", "d")
    return x, gate, up, s.floats("down", down, "d", "I")


def mlp(x, gate, up, down):
    """y [T, d] from x [T, d], gate and up [I, d], down [d, I]."""
    s = Shapes()
    inputs = _mlp_inputs(s, x, gate, up, down)
    y = new(s["T"], s["d"])
    call("mlp", s["T"], s["d"], s["I"], *inputs, y)
    return y


def mlp_backward(x, gate, up, down, dy):
    """dx, dgate, dup, ddown, each shaped like what it is the gradient of."""
    s = Shapes()
    inputs = _mlp_inputs(s, x, gate, up, down)
    gradients = tuple(new(*v.shape) for v in inputs)
    call("mlp_backward", s["T"], s["d"], s["I"], *inputs, s.floats("dy", dy, "T", "d"), Write.OVERWRITE, *gradients)
    return gradients


# ---- The layer -------------------------------------------------------------------------------------------------------

MATRICES = "router_gate", "down_embed", "up_embed", "gate_proj", "up_proj", "down_proj"


def _struct(*fields):
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


def _pointers(*names):
    return _struct(*((name, ctypes.c_void_p) for name in names))


_Config = _struct(*((name, ctypes.c_int64) for name in "dINK"), ("norm_topk_prob", ctypes.c_bool))
_Weights = _pointers(*MATRICES, "running_mean", "running_var")
_Outputs = _pointers("y", "router_logits", "scores", "indices")
_Gradients = _pointers("dx", *MATRICES)


class Layer:
    """The whole layer. weights: the six matrices by name (MATRICES), and running_mean and running_var, which move in
    training. Keeps the arrays that it was given and works on them where they lie."""

    def __init__(self, weights, num_experts_per_tok, norm_topk_prob=False):
        s = Shapes()
        shapes = ("2n", "d"), ("N", "d"), ("N", "d"), ("I", "d"), ("I", "d"), ("d", "I")
        self._views = [s.floats(name, weights[name], *shape) for name, shape in zip(MATRICES, shapes)]
        self._views += [s.buffer(name, weights[name], "d") for name in ("running_mean", "running_var")]
        self.n, self.d, self.N, self.K = num_keys(s["N"]), s["d"], s["N"], num_experts_per_tok
        s.floats("router_gate", weights["router_gate"], 2 * self.n, "d")
        self._config = _Config(self.d, s["I"], self.N, self.K, norm_topk_prob)
        self._weights = _Weights(*(v.pointer for v in self._views))

    def forward(self, x, training=False, chosen=None):
        """y [T, d], router_logits [2, T, n], scores and indices [T, K]. chosen: indices in place of the layer's own."""
        s = Shapes(d=self.d, K=self.K)
        x = s.floats("x", x, "T", "d")
        chosen = None if chosen is None else s.integers("chosen", chosen, "T", "K")
        T, K = s["T"], max(0, min(self.K, self.n**2))
        results = new(T, self.d), new(2, T, self.n), new(T, K), new(T, K, dtype=np.int32)
        outputs = ctypes.byref(_Outputs(*(r.ctypes.data for r in results)))
        config, weights = ctypes.byref(self._config), ctypes.byref(self._weights)
        call("layer_forward", config, weights, training, T, x, chosen, outputs)
        return results

    def backward(self, x, indices, dy, training=False):
        """The gradients by name: dx, and one for each matrix."""
        s = Shapes(d=self.d, K=self.K)
        x, indices = s.floats("x", x, "T", "d"), s.integers("indices", indices, "T", "K")
        dy = s.floats("dy", dy, "T", "d")
        results = {"dx": new(s["T"], self.d)}
        results |= {name: new(*v.shape) for name, v in zip(MATRICES, self._views)}
        gradients = ctypes.byref(_Gradients(*(r.ctypes.data for r in results.values())))
        config, weights = ctypes.byref(self._config), ctypes.byref(self._weights)
        call("layer_backward", config, weights, training, s["T"], x, indices, dy, Write.OVERWRITE, gradients)
        return results


# ---- Files: safetensors ----------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("dtype", ctypes.c_int), ("rank", ctypes.c_int)]
    _fields_ += [("shape", ctypes.c_int64 * 8), ("count", ctypes.c_int64), ("data", ctypes.c_void_p)]


returns(ctypes.POINTER(_Tensor), "file_tensor")


class File(dict):
    """A safetensors file's tensors by name: float32 whatever they are stored as (exact), or integers as they are. What
    the metadata says of the layer is in metadata, as text."""

    KEYS = "batch", "seq_len", "training", "num_experts", "num_experts_per_tok", "norm_topk_prob", "min_topk_gap"

    def __init__(self, path):
        super().__init__()
        file = ctypes.c_void_p()
        call("file_open", ctypes.c_char_p(os.fsencode(path)), ctypes.byref(file))
        try:
            for i in range(value_of("file_count", file)):
                tensor = value_of("file_tensor", file, i).contents
                self[tensor.name.decode()] = self._values(tensor)
            found = {key: value_of("file_metadata", file, ctypes.c_char_p(key.encode())) for key in self.KEYS}
            self.metadata = {key: value.decode() for key, value in found.items() if value is not None}
        finally:
            value_of("file_close", file)

    @staticmethod
    def _values(tensor):
        shape, data = tensor.shape[: tensor.rank], ctypes.c_void_p(tensor.data)
        if tensor.dtype <= Dtype.BF16:
            values = new(*shape)
            value_of("to_f32", Dtype(tensor.dtype), tensor.count, data, values)
        else:
            values = new(*shape, dtype=np.int32 if tensor.dtype == Dtype.I32 else np.int64)
            ctypes.memmove(values.ctypes.data, data, values.nbytes)
        return values
