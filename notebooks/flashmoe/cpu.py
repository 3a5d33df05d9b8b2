"""The functions of chapters/fmoe_cpu.h: where the CPU ladders end, tens of times faster than the reference.

    y = flashmoe.cpu.expert(x, down, up, indices, weights)

Names and results are the reference's. x, the matrices and logits may be float32, float16 or bfloat16 (uint16 in NumPy),
all of one kind; y is stored like them.
"""

import numpy as np

from .library import Dtype, Shapes, call, new, view


class _Stored(Shapes):
    """Shapes of arrays of which the first one gives the storage type that the others must have."""

    dtype = None

    def stored(self, name, array, *shape):
        if self.dtype is None:
            self.dtype = view(array, name).dtype
        return self.check(name, array, self.dtype, shape)

    def like_stored(self, *shape):
        kinds = {Dtype.F32: np.float32, Dtype.F16: np.float16, Dtype.BF16: np.uint16}
        return new(*shape, dtype=kinds.get(self.dtype, np.float32))


def router(x, gate, running_mean, running_var, training=False):
    """logits and log-probabilities, [2, T, n]. In training the running buffers move."""
    s = _Stored()
    x, gate = s.stored("x", x, "T", "d"), s.stored("gate", gate, "2n", "d")
    mean, var = s.buffer("running_mean", running_mean, "d"), s.buffer("running_var", running_var, "d")
    n = s["2n"] // 2
    results = new(2, s["T"], n), new(2, s["T"], n)
    call("cpu_router", training, s["T"], s["d"], n, s.dtype, x, gate, mean, var, *results)
    return results


def topk(logits, K, norm_topk_prob=False):
    """indices, scores and routing weights, [T, K] each."""
    s = _Stored()
    logits = s.stored("logits", logits, 2, "T", "n")
    shape = s["T"], max(0, min(K, s["n"] ** 2))
    results = new(*shape, dtype=np.int32), new(*shape), new(*shape)
    call("cpu_topk", s["T"], s["n"], K, norm_topk_prob, s.dtype, logits, *results)
    return results


def schedule(indices, num_experts):
    """offsets [N + 1] and pairs [T·K]."""
    s = _Stored()
    indices = s.integers("indices", indices, "T", "K")
    results = new(max(num_experts, 0) + 1, dtype=np.int32), new(s["T"] * s["K"], dtype=np.int32)
    call("cpu_schedule", s["T"], s["K"], num_experts, indices, *results)
    return results


def expert(x, down, up, indices, weights):
    """y [T, d]."""
    s = _Stored()
    x, down, up = s.stored("x", x, "T", "d"), s.stored("down", down, "N", "d"), s.stored("up", up, "N", "d")
    indices, weights = s.integers("indices", indices, "T", "K"), s.floats("weights", weights, "T", "K")
    y = s.like_stored(s["T"], s["d"])
    call("cpu_expert", s["T"], s["d"], s["N"], s["K"], s.dtype, x, down, up, indices, weights, y)
    return y


def mlp(x, gate, up, down):
    """y [T, d]."""
    s = _Stored()
    x, gate, up = s.stored("x", x, "T", "d"), s.stored("gate", gate, "I", "d"), s.stored("up", up, "I", "d")
    down = s.stored("down", down, "d", "I")
    y = s.like_stored(s["T"], s["d"])
    call("cpu_mlp", s["T"], s["d"], s["I"], s.dtype, x, gate, up, down, y)
    return y
