"""The Python module against NumPy in float64: every function, every kind of refusal. PyTorch too, if it is there."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))
import flashmoe
from flashmoe import Dtype, Error, Status

random = np.random.default_rng(1)


def normal(*shape):
    return random.standard_normal(shape, np.float32)


def wide(*arrays):
    return [a.astype(np.float64) for a in arrays]


def close(out, expected, limit=1e-6):
    error = flashmoe.relative_error(out, expected.astype(np.float32))
    assert out.shape == expected.shape and error <= limit, f"error {error:.1e}, shapes {out.shape}, {expected.shape}"


def refused(kind, words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert words in str(error), f"{error!r} does not say {words!r}"
        return error
    raise AssertionError(f"nothing was raised: {words}")


def silu(s):
    return s / (1 + np.exp(-s))


def derivative(function, arrays, name, dy, step=1e-6):
    """The gradient of ⟨function(...), dy⟩ along one random direction, and that direction, in float64."""
    direction = random.standard_normal(arrays[name].shape)
    change = lambda sign: np.vdot(function(**{**arrays, name: arrays[name] + sign * step * direction}), dy)
    return (change(1) - change(-1)) / (2 * step), direction


def gradients_hold(function, arrays, gradients, dy):
    arrays = {name: a.astype(np.float64) for name, a in arrays.items()}
    for name, gradient in gradients.items():
        expected, direction = derivative(function, arrays, name, dy.astype(np.float64))
        found = np.vdot(gradient.astype(np.float64), direction)
        assert abs(found - expected) <= 1e-4 * max(1, abs(expected)), f"d{name}: {found} and not {expected}"


# ---- Storage types, comparing ----------------------------------------------------------------------------------------


def test_storage_types():
    values = normal(1000)
    assert np.array_equal(flashmoe.from_f32(Dtype.F16, values), values.astype(np.float16))
    assert np.array_equal(flashmoe.to_f32(values.astype(np.float16)), values.astype(np.float16).astype(np.float32))
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    assert np.array_equal(flashmoe.to_bf16(values), rounded)
    assert np.array_equal(flashmoe.from_bf16(rounded).view(np.uint32), rounded.astype(np.uint32) << 16)
    assert flashmoe.error_limit(Dtype.F32) == 1e-5 and flashmoe.error_limit(Dtype.BF16) == 4e-3


def test_relative_error():
    out, ref = normal(7, 5), normal(7, 5)
    expected = np.linalg.norm(np.subtract(*wide(out, ref))) / np.linalg.norm(*wide(ref))
    assert abs(flashmoe.relative_error(out, ref) - expected) < 1e-12
    assert flashmoe.relative_error(np.full(3, np.nan, np.float32), normal(3)) == np.inf
    refused(ValueError, "[5], ref [7]", flashmoe.relative_error, normal(5), normal(7))


# ---- Steps -----------------------------------------------------------------------------------------------------------


def router_norm(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def test_router():
    x, gate, mean, var = normal(9, 5), normal(6, 5), normal(5), 1 + normal(5) ** 2
    evaluated = flashmoe.router_norm(x, mean, var)
    close(evaluated, (x - mean) / np.sqrt(var + 1e-5))
    before = mean.copy(), var.copy()
    x_hat = flashmoe.router_norm(x, mean, var, training=True)
    close(x_hat, router_norm(*wide(x)))
    close(mean, 0.9 * before[0] + 0.1 * x.mean(0))
    close(var, 0.9 * before[1] + 0.1 * x.var(0, ddof=1))
    logits = flashmoe.router_logits(x_hat, gate)
    close(logits, np.ascontiguousarray((x_hat.astype(np.float64) @ gate.T).reshape(9, 2, 3).transpose(1, 0, 2)))

    dlogits = normal(2, 9, 3)
    dx_hat, dgate = flashmoe.router_logits_backward(x_hat, gate, dlogits)
    flat = dlogits.transpose(1, 0, 2).reshape(9, 6).astype(np.float64)
    close(dx_hat, flat @ gate)
    close(dgate, flat.T @ x_hat)
    dx = flashmoe.router_norm_backward(x, dx_hat, training=True)
    gradients_hold(router_norm, {"x": x}, {"x": dx}, dx_hat)
    close(flashmoe.router_norm_backward(x, dx_hat, mean, var), dx_hat / np.sqrt(var + 1e-5))

    alone = refused(Error, "tokens = 1", flashmoe.router_norm, x[:1], mean, var, training=True)
    assert alone.status is Status.BATCH_OF_ONE
    refused(ValueError, "gate has the shape [6, 4]", flashmoe.router_logits, x_hat, normal(6, 4))
    mean.flags.writeable = False
    refused(ValueError, "running_mean is read-only", flashmoe.router_norm, x, mean, var)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_log_softmax():
    logits, dlog_probs = normal(2, 4, 7), normal(2, 4, 7)
    close(flashmoe.log_softmax(logits), log_softmax(*wide(logits)))
    dlogits = flashmoe.log_softmax_backward(logits, dlog_probs)
    gradients_hold(log_softmax, {"logits": logits}, {"logits": dlogits}, dlog_probs)


def pair_scores(logits):
    p = log_softmax(logits.astype(np.float64))
    return (p[0][:, :, None] + p[1][:, None, :]).reshape(logits.shape[1], -1)


def test_topk():
    logits = normal(2, 11, 5)
    scores = pair_scores(logits)
    for norm in False, True:
        indices, found, weights = flashmoe.topk(logits, 7, norm)
        order = np.argsort(-scores, axis=1)[:, :7]
        assert np.array_equal(indices, order)
        best = np.take_along_axis(scores, order, 1)
        close(found, best)
        close(weights, np.exp(best) / (np.exp(best).sum(1, keepdims=True) if norm else 1))
        assert all(map(np.array_equal, flashmoe.topk_at(logits, indices, norm), (found, weights)))
        dweights, dscores = normal(11, 7), normal(11, 7)
        dlogits = flashmoe.topk_backward(logits, indices, dweights, dscores, norm)

        def loss(logits):
            s = np.take_along_axis(pair_scores(logits), order, 1)
            w = np.exp(s) / (np.exp(s).sum(1, keepdims=True) if norm else 1)
            return np.concatenate([w, s], 1)

        gradients_hold(loss, {"logits": logits}, {"logits": dlogits}, np.concatenate([dweights, dscores], 1))
    assert flashmoe.compare_indices(logits, indices, indices[:, ::-1].copy()) == -1
    wrong = indices.copy()
    wrong[3, 0] = scores[3].argmin()
    assert flashmoe.compare_indices(logits, wrong, indices) == 3
    assert [flashmoe.num_keys(N) for N in (0, 1, 15, 16, 17)] == [0, 1, 3, 4, 4]

    error = refused(Error, "num_experts_per_tok = 26 exceeds n² = 25", flashmoe.topk, logits, 26)
    assert error.status is Status.BAD_TOPK
    refused(Error, "num_experts_per_tok = 0 is below 1", flashmoe.topk, logits, 0)
    refused(TypeError, "logits is float64", flashmoe.topk, logits.astype(np.float64), 7)
    refused(TypeError, "logits is f16, the library takes f32", flashmoe.topk, logits.astype(np.float16), 7)
    refused(TypeError, "logits is a list", flashmoe.topk, [1.0, 2.0], 1)
    refused(ValueError, "numpy.ascontiguousarray(logits)", flashmoe.topk, logits[:, :, ::2], 1)
    refused(ValueError, "[3, 11, 5], not [2, T = 11, n = 5]", flashmoe.topk, normal(3, 11, 5), 1)


def test_schedule():
    indices = random.integers(0, 10, (13, 3), dtype=np.int32)
    offsets, pairs = flashmoe.schedule(indices, 10)
    assert np.array_equal(pairs, np.argsort(indices.ravel(), kind="stable"))
    assert np.array_equal(np.diff(offsets), np.bincount(indices.ravel(), minlength=10)) and offsets[0] == 0
    assert refused(Error, "is outside [0, num_experts = 9)", flashmoe.schedule, np.full((1, 1), 9, np.int32), 9)
    refused(TypeError, "indices is i64, the library takes i32", flashmoe.schedule, indices.astype(np.int64), 10)


def expert(x, down, up, weights, indices):
    pre = np.einsum("td,tkd->tk", x, down[indices])
    return np.einsum("tk,tkd->td", silu(pre) * weights, up[indices])


def test_expert():
    x, down, up, weights, dy = normal(6, 4), normal(10, 4), normal(10, 4), normal(6, 3), normal(6, 4)
    indices = random.integers(0, 10, (6, 3), dtype=np.int32)
    y, pre = flashmoe.expert(x, down, up, indices, weights, pre_activations=True)
    close(y, expert(*wide(x, down, up, weights), indices))
    close(pre, np.einsum("td,tkd->tk", *wide(x, down[indices])))
    assert abs(flashmoe.silu(1) - silu(1)) < 1e-15
    dx, ddown, dup, dweights = flashmoe.expert_backward(x, down, up, indices, weights, dy)
    arrays = {"x": x, "down": down, "up": up, "weights": weights}
    gradients = {"x": dx, "down": ddown, "up": dup, "weights": dweights}
    gradients_hold(lambda **a: expert(**a, indices=indices), arrays, gradients, dy)

    indices[4, 1] = 10
    words = "indices[4, 1] = 10 is outside [0, num_experts = 10)"
    error = refused(Error, words, flashmoe.expert, x, down, up, indices, weights)
    assert error.status is Status.BAD_INDEX
    words = "up has the shape [9, 4], not [N = 10, d = 4]"
    refused(ValueError, words, flashmoe.expert, x, down, up[:9], indices, weights)
    empty = flashmoe.expert(x[:0], down, up, indices[:0], weights[:0])
    assert empty.shape == (0, 4)


def mlp(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_mlp():
    arrays = {"x": normal(5, 4), "gate": normal(7, 4), "up": normal(7, 4), "down": normal(4, 7)}
    dy = normal(5, 4)
    close(flashmoe.mlp(**arrays), mlp(*wide(*arrays.values())))
    gradients_hold(mlp, arrays, dict(zip(arrays, flashmoe.mlp_backward(**arrays, dy=dy))), dy)


# ---- The fast functions ----------------------------------------------------------------------------------------------

STORAGE = {Dtype.F32: np.float32, Dtype.F16: np.float16, Dtype.BF16: np.uint16}


def stored(dtype, *shapes):
    """Random arrays of a storage type, and the same values as the reference takes them."""
    arrays = [flashmoe.from_f32(dtype, normal(*shape)) for shape in shapes]
    return arrays, [flashmoe.to_f32(array) for array in arrays]


def test_fast_functions():
    for dtype in STORAGE:
        for T in 0, 1, 7, 130:
            limit = flashmoe.error_limit(dtype)
            (x, gate, logits), wide_ones = stored(dtype, (T, 19), (10, 19), (2, T, 5))
            for training in [False, True] if T != 1 else [False]:
                mean, var = normal(19), 1 + normal(19) ** 2
                mean_too, var_too = mean.copy(), var.copy()
                expected = flashmoe.router_logits(flashmoe.router_norm(wide_ones[0], mean, var, training), wide_ones[1])
                found, log_probs = flashmoe.cpu.router(x, gate, mean_too, var_too, training)
                assert found.shape == (2, T, 5)
                if T:
                    close(found, expected, 1e-5)
                    close(log_probs, flashmoe.log_softmax(expected), 1e-5)
                    close(mean_too, mean), close(var_too, var)
            for norm in False, True:
                found, expected = flashmoe.cpu.topk(logits, 9, norm), flashmoe.topk(wide_ones[2], 9, norm)
                assert np.array_equal(found[0], expected[0])
                if T:
                    close(found[1], expected[1], 1e-5), close(found[2], expected[2], 1e-5)

            matrices, values = stored(dtype, (T, 19), (30, 19), (30, 19))
            routing = random.integers(0, 30, (T, 6), dtype=np.int32), normal(T, 6)
            routed, expected = flashmoe.cpu.expert(*matrices, *routing), flashmoe.expert(*values, *routing)
            matrices, values = stored(dtype, (T, 19), (23, 19), (23, 19), (19, 23))
            shared, expected_too = flashmoe.cpu.mlp(*matrices), flashmoe.mlp(*values)
            assert routed.dtype == shared.dtype == STORAGE[dtype] and routed.shape == shared.shape == (T, 19)
            if T:
                close(flashmoe.to_f32(routed), expected, limit)
                close(flashmoe.to_f32(shared), expected_too, limit)
            indices = routing[0]
            assert all(map(np.array_equal, flashmoe.cpu.schedule(indices, 30), flashmoe.schedule(indices, 30)))


def test_fast_functions_refuse():
    x, gate, mean, var = normal(4, 6), normal(8, 6), normal(6), 1 + normal(6) ** 2
    error = refused(Error, "tokens = 1", flashmoe.cpu.router, x[:1], gate, mean, var, training=True)
    assert error.status is Status.BATCH_OF_ONE
    refused(Error, "num_keys = 0", flashmoe.cpu.router, x, gate[:0], mean, var)
    logits, indices, weights = normal(2, 4, 5), random.integers(0, 8, (4, 3), dtype=np.int32), normal(4, 3)
    assert refused(Error, "= 26 exceeds n² = 25", flashmoe.cpu.topk, logits, 26).status is Status.BAD_TOPK
    assert refused(Error, "dtype = 3", flashmoe.cpu.topk, np.zeros((2, 4, 5), np.int32), 3).status is Status.UNSUPPORTED
    expert = lambda down, up: flashmoe.cpu.expert(x, down, up, indices, weights)
    refused(Error, "num_experts_per_tok = 3 exceeds num_experts = 2", expert, x[:2], x[:2])
    refused(TypeError, "up is f16, the library takes f32", expert, gate, gate.astype(np.float16))
    refused(Error, "num_experts = 0", flashmoe.cpu.schedule, indices, 0)
    refused(Error, "intermediate_size = 0", flashmoe.cpu.mlp, x, x[:0], x[:0], normal(6, 0))
    indices[2, 1] = -1
    for function, arguments in (expert, (gate, gate)), (flashmoe.cpu.schedule, (indices, 8)):
        error = refused(Error, "indices[2, 1] = -1 is outside [0, num_experts = 8)", function, *arguments)
        assert error.status is Status.BAD_INDEX


# ---- Layer and files -------------------------------------------------------------------------------------------------


def layer_of(path):
    file = flashmoe.File(path)
    weights = {name: file[name + ".weight"] for name in flashmoe.MATRICES}
    for name in "running_mean", "running_var":
        weights[name] = file[f"router_norm.{name}.before"]
    metadata = file.metadata
    layer = flashmoe.Layer(weights, int(metadata["num_experts_per_tok"]), metadata["norm_topk_prob"] == "1")
    return file, layer, weights, metadata["training"] == "1"


def test_layer():
    for path in sorted((ROOT / "tests/golden").glob("*_*_*.safetensors")):
        if path.stem.startswith("trained_logits"):  # no layer
            continue
        file, layer, weights, training = layer_of(path)
        d = file["x"].shape[-1]
        x, dy = file["x"].reshape(-1, d), file["dy"].reshape(-1, d)
        y, logits, scores, indices = layer.forward(x, training)
        assert flashmoe.compare_indices(logits, indices, file["indices"]) == -1
        close(y, file["y"].reshape(-1, d))
        close(logits, file["router_logits"])
        close(scores, file["scores"])
        for name in "running_mean", "running_var":
            close(weights[name], file.get(f"router_norm.{name}.after", weights[name]))
        gradients = layer.backward(x, indices, dy, training)
        close(gradients["dx"], file["dx"].reshape(-1, d))
        for name in flashmoe.MATRICES:
            if f"grad.{name}.weight" in file:
                close(gradients[name], file[f"grad.{name}.weight"])
        assert np.array_equal(layer.forward(x, chosen=indices)[3], indices)
    refused(ValueError, "router_gate", flashmoe.Layer, {**weights, "router_gate": normal(4, d)}, 1)


def test_files():
    missing = refused(Error, "no/such/file", flashmoe.File, "no/such/file")
    assert missing.status is Status.IO
    assert refused(Error, "module.py", flashmoe.File, __file__).status is Status.BAD_FILE


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class Speaks:
    """What lends its memory through one protocol only."""

    def __init__(self, array, protocol):
        self.array = array
        setattr(type(self), protocol, property(lambda s: getattr(s.array, protocol)))


def test_protocols():
    values = normal(3, 4)
    for protocol in "__dlpack__", "__array_interface__":
        lender = type("Lender", (Speaks,), {})(values, protocol)
        v = flashmoe.view(lender)
        assert (v.pointer, v.dtype, v.shape, v.on_cpu) == (values.ctypes.data, Dtype.F32, (3, 4), True)
        assert np.array_equal(flashmoe.log_softmax(lender), flashmoe.log_softmax(values))
    lender = type("Lender", (Speaks,), {})(values.T, "__dlpack__")
    refused(ValueError, "not dense in C order", flashmoe.view, lender)


def test_torch():
    try:
        import torch
    except ImportError:
        return "skipped, no PyTorch"
    logits = torch.randn(2, 5, 4)
    assert flashmoe.view(logits).pointer == logits.data_ptr()
    indices, scores, weights = flashmoe.topk(logits, 3)
    assert np.array_equal(indices, flashmoe.topk(logits.numpy(), 3)[0])
    half = torch.randn(8).bfloat16()
    assert flashmoe.view(half).dtype == Dtype.BF16 and np.array_equal(flashmoe.to_f32(half), half.float().numpy())
    refused(ValueError, "contiguous()", flashmoe.view, torch.randn(4, 3).T)
    mean, var = torch.zeros(6), torch.ones(6)
    flashmoe.router_norm(torch.randn(4, 6), mean, var, training=True)
    assert mean.abs().max() > 0  # moved where it lies


if __name__ == "__main__":
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, test in tests:
        remark = test()
        print(f"ok  flashmoe in Python, {name[5:].replace('_', ' ')}" + (f": {remark}" if remark else ""))
