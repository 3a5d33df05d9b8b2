"""The functions of cuda/fmoe_cuda.h on PyTorch's CUDA tensors, without copies: outputs and workspaces are new tensors,
and the kernels run in the current stream.

    import torch, flashmoe.cuda
    indices, scores, weights = flashmoe.cuda.topk(logits, K=64)

What fmoe_cuda.h calls dtype may be float32, float16 or bfloat16. Nothing waits for the GPU, except that calls that take
indices look whether one lay out of range, and raise Error then. check=False leaves that out, for timing and in CUDA
graphs.
"""

import ctypes
import weakref

import torch

from .library import Dtype, Shapes, argument, call, load_library
from .reference import MATRICES, _Config, _Outputs, _Weights, num_keys

_cuda = load_library("flashmoe_cuda")
_FLOATS = {torch.float32: Dtype.F32, torch.float16: Dtype.F16, torch.bfloat16: Dtype.BF16}


def level():
    """0 plain CUDA, 1 mma.sync (sm_80), 2 Hopper (sm_90a); -1 without a device that this build has code for."""
    return _cuda.fmoe_cuda_level()


class _Tensors(Shapes):
    """Shapes of tensors that lie on one GPU. The first one that is stored gives the dtype that the others must have."""

    device = dtype = None

    def stored(self, name, tensor, *shape):
        if self.dtype is None:
            self.dtype = _FLOATS.get(tensor.dtype)
        if self.dtype is None:
            raise TypeError(f"{name} is {tensor.dtype}: none of {', '.join(map(str, _FLOATS))}")
        return self.check(name, tensor, self.dtype, shape)

    def place(self, name, tensor, on_cpu):
        if on_cpu:
            raise TypeError(f"{name} does not lie on a GPU")
        self.device = self.device or tensor.device
        if tensor.device != self.device:
            raise ValueError(f"{name} lies on {tensor.device}, not on {self.device}")

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def like_stored(self, *shape):
        return self.new(*shape, dtype={kind: t for t, kind in _FLOATS.items()}[self.dtype])


def _run(name, tensors, ask, sizes, arrays, check=False, step=None):
    """Calls fmoe_cuda_<name>(sizes, arrays, workspace, its bytes, stream); ask: what tells the workspace's size, asked
    of fmoe_cuda_<step>_workspace if the step has another name than the function."""
    size_of = getattr(_cuda, f"fmoe_cuda_{step or name}_workspace")
    size_of.restype = ctypes.c_size_t
    with torch.cuda.device(tensors.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        workspace = tensors.new(size_of(*map(argument, ask)), dtype=torch.uint8)
        place = ctypes.c_void_p(workspace.data_ptr())
        arrays = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arrays]
        call("cuda_" + name, *sizes, *arrays, place, workspace.numel(), stream, back_end=_cuda)
        if check:
            call("cuda_check", place, stream, back_end=_cuda)


def router(x, gate, running_mean, running_var, training=False):
    """logits and log-probabilities, float32 [2, T, n]. In training the running buffers move."""
    s = _Tensors()
    x, gate = s.stored("x", x, "T", "d"), s.stored("gate", gate, "2n", "d")
    mean, var = s.floats("running_mean", running_mean, "d"), s.floats("running_var", running_var, "d")
    n = s["2n"] // 2
    logits, log_probs = s.new(2, s["T"], n), s.new(2, s["T"], n)
    sizes = training, s["T"], s["d"], n, s.dtype
    _run("router", s, sizes, sizes, (x, gate, mean, var, logits, log_probs))
    return logits, log_probs


def topk(logits, K, norm_topk_prob=False):
    """indices, scores and routing weights, [T, K] each."""
    s = _Tensors()
    logits = s.stored("logits", logits, 2, "T", "n")
    shape = s["T"], max(0, min(K, s["n"] ** 2))
    results = s.new(*shape, dtype=torch.int32), s.new(*shape), s.new(*shape)
    ask = s["T"], s["n"], K, s.dtype
    _run("topk", s, ask, (*ask[:3], norm_topk_prob, s.dtype), (logits, *results))
    return results


def topk_backward(logits, indices, dweights=None, dscores=None, norm_topk_prob=False, check=True):
    """dlogits, float32 [2, T, n]."""
    s = _Tensors()
    logits, indices = s.stored("logits", logits, 2, "T", "n"), s.integers("indices", indices, "T", "K")
    given = s.optional("dweights", dweights, "T", "K"), s.optional("dscores", dscores, "T", "K")
    dlogits = s.new(2, s["T"], s["n"])
    ask = s["T"], s["n"], s["K"], s.dtype
    _run("topk_backward", s, ask, (*ask[:3], norm_topk_prob, s.dtype), (logits, indices, *given, dlogits), check)
    return dlogits


def schedule(indices, num_experts, check=True):
    """offsets [N + 1] and pairs [T·K]."""
    s = _Tensors()
    indices = s.integers("indices", indices, "T", "K")
    offsets, pairs = s.new(max(num_experts, 0) + 1, dtype=torch.int32), s.new(s["T"] * s["K"], dtype=torch.int32)
    sizes = s["T"], s["K"], num_experts
    _run("schedule", s, sizes, sizes, (indices, offsets, pairs), check)
    return offsets, pairs


def mlp(x, gate, up, down):
    """y [T, d], stored like x."""
    s = _Tensors()
    x, gate, up = s.stored("x", x, "T", "d"), s.stored("gate", gate, "I", "d"), s.stored("up", up, "I", "d")
    down, y = s.stored("down", down, "d", "I"), s.like_stored(s["T"], s["d"])
    sizes = s["T"], s["d"], s["I"], s.dtype
    _run("mlp", s, sizes, sizes, (x, gate, up, down, y))
    return y


def expert(x, down, up, indices, weights, pre_activations=False, check=True):
    """y [T, d], stored like x; or (y, ⟨x_t, down[e]⟩ in float32 [T, K])."""
    s = _Tensors()
    x, down, up = s.stored("x", x, "T", "d"), s.stored("down", down, "N", "d"), s.stored("up", up, "N", "d")
    indices, weights = s.integers("indices", indices, "T", "K"), s.floats("weights", weights, "T", "K")
    y, pre = s.like_stored(s["T"], s["d"]), s.new(s["T"], s["K"]) if pre_activations else None
    sizes = s["T"], s["d"], s["N"], s["K"], s.dtype
    _run("expert", s, sizes, sizes, (x, down, up, indices, weights, y, pre), check)
    return (y, pre) if pre_activations else y


class Layer:
    """The whole layer's forward pass. weights: the six matrices by name (flashmoe.MATRICES), all of one kind, and
    running_mean and running_var, float32, which move in training. Keeps the tensors that it was given and works on them
    where they lie. The routed branch runs beside the MLP, in a stream of the object's own."""

    def __init__(self, weights, num_experts_per_tok, norm_topk_prob=False):
        s = _Tensors()
        shapes = ("2n", "d"), ("N", "d"), ("N", "d"), ("I", "d"), ("I", "d"), ("d", "I")
        self._views = [s.stored(name, weights[name], *shape) for name, shape in zip(MATRICES, shapes)]
        self._views += [s.floats(name, weights[name], "d") for name in ("running_mean", "running_var")]
        self.n, self.d, self.K = num_keys(s["N"]), s["d"], num_experts_per_tok
        self.dtype, self.device = s.dtype, s.device
        s.stored("router_gate", weights["router_gate"], 2 * self.n, "d")
        self._config = _Config(self.d, s["I"], s["N"], self.K, norm_topk_prob)
        self._weights = _Weights(*(v.pointer for v in self._views))
        self._side = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            call("cuda_side_create", ctypes.byref(self._side), back_end=_cuda)
        weakref.finalize(self, _cuda.fmoe_cuda_side_destroy, self._side)

    def forward(self, x, training=False):
        """y [T, d], stored like x, router_logits [2, T, n], scores and indices [T, K]."""
        s = _Tensors(d=self.d)
        s.device, s.dtype = self.device, self.dtype
        x = s.stored("x", x, "T", "d")
        T, K = s["T"], max(0, min(self.K, self.n**2))
        results = s.like_stored(T, self.d), s.new(2, T, self.n), s.new(T, K), s.new(T, K, dtype=torch.int32)
        config, weights = ctypes.byref(self._config), ctypes.byref(self._weights)
        outputs = ctypes.byref(_Outputs(*(r.data_ptr() for r in results)))
        sizes = training, T, self.dtype
        _run("layer_forward", s, (config, *sizes), (config, weights, *sizes), (x, outputs, self._side), step="layer")
        return results
