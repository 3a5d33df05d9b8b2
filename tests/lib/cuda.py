"""flashmoe.cuda against the reference, on PyTorch's tensors. Skipped without PyTorch, the library or a GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
import flashmoe
from flashmoe import Dtype, Error, Status



def skip(why):
    print(f"ok  flashmoe.cuda in Python: skipped, {why}")
    sys.exit(0)


try:
    import torch
    import flashmoe.cuda as fast
except ImportError as error:
    skip(error)
if not torch.cuda.is_available() or fast.level() < 0:
    skip("no GPU that this build has code for")

torch.manual_seed(1)
KINDS = {torch.float32: Dtype.F32, torch.float16: Dtype.F16, torch.bfloat16: Dtype.BF16}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def host(tensor):
    """As the reference takes it: on the CPU, float32 (exact) or int32."""
    return tensor.cpu() if tensor.dtype == torch.int32 else tensor.float().cpu()


def close(out, ref, dtype=torch.float32):
    error, limit = flashmoe.relative_error(host(out), ref), flashmoe.error_limit(KINDS[dtype])
    assert error <= limit, f"error {error:.1e}, limit {limit:.0e}"


def refused(kind, words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert words in str(error), f"{error!r} does not say {words!r}"
        return error
    raise AssertionError(f"nothing was raised: {words}")


def test_router():
    for dtype in KINDS:
        for training in False, True:
            x, gate = normal(70, 48, dtype=dtype), normal(26, 48, dtype=dtype)
            mean, var = normal(48), 1 + normal(48) ** 2
            expected_mean, expected_var = host(mean), host(var)
            logits, log_probs = fast.router(x, gate, mean, var, training)
            x_hat = flashmoe.router_norm(host(x), expected_mean, expected_var, training)
            expected = flashmoe.router_logits(x_hat, host(gate))
            close(logits, expected)
            close(log_probs, flashmoe.log_softmax(expected))
            close(mean, expected_mean)
            close(var, expected_var)


def test_topk():
    for dtype in KINDS:
        logits = normal(2, 33, 24, dtype=dtype)
        indices, scores, weights = fast.topk(logits, 17, norm_topk_prob=True)
        expected = flashmoe.topk(host(logits), 17, norm_topk_prob=True)
        assert (indices.cpu().numpy() == expected[0]).all()
        close(scores, expected[1])
        close(weights, expected[2])
        dweights = normal(33, 17)
        close(
            fast.topk_backward(logits, indices, dweights, norm_topk_prob=True),
            flashmoe.topk_backward(host(logits), expected[0], host(dweights), norm_topk_prob=True),
        )
    assert refused(Error, "num_experts_per_tok = 577", fast.topk, logits, 577).status is Status.BAD_TOPK
    refused(TypeError, "logits does not lie on a GPU", fast.topk, logits.cpu(), 4)
    refused(TypeError, "torch.float64", fast.topk, logits.double(), 4)
    refused(ValueError, "contiguous()", fast.topk, logits[:, :, ::2], 4)


def test_schedule_and_expert():
    for dtype in KINDS:
        x, down, up = normal(40, 72, dtype=dtype), normal(50, 72, dtype=dtype) / 8, normal(50, 72, dtype=dtype)
        indices = torch.randint(50, (40, 9), dtype=torch.int32, device="cuda")
        weights = torch.rand(40, 9, device="cuda")
        offsets, pairs = fast.schedule(indices, 50)
        expected = flashmoe.schedule(host(indices), 50)
        assert (offsets.cpu().numpy() == expected[0]).all() and (pairs.cpu().numpy() == expected[1]).all()
        y, pre = fast.expert(x, down, up, indices, weights, pre_activations=True)
        expected = flashmoe.expert(host(x), host(down), host(up), host(indices), host(weights), pre_activations=True)
        assert y.dtype == dtype
        close(y, expected[0], dtype)
        close(pre, expected[1], dtype)
    bad = indices.clone()
    bad[7, 3] = 50
    error = refused(Error, "50", fast.expert, x, down, up, bad, weights)
    assert error.status is Status.BAD_INDEX
    print(f"    a bad index is told: {error}")
    refused(Error, "50", fast.schedule, bad, 50)
    fast.expert(x, down, up, bad, weights, check=False)
    refused(TypeError, "down is f32", fast.expert, x, down.float(), up, indices, weights)
    assert fast.expert(x[:0], down, up, indices[:0], weights[:0]).shape == (0, 72)


def test_mlp():
    for dtype in KINDS:
        for d, I in (72, 100), (128, 256):
            x, gate, up = normal(40, d, dtype=dtype), normal(I, d, dtype=dtype) / 8, normal(I, d, dtype=dtype) / 8
            down = normal(d, I, dtype=dtype)
            y = fast.mlp(x, gate, up, down)
            assert y.dtype == dtype
            close(y, flashmoe.mlp(host(x), host(gate), host(up), host(down)), dtype)


def layer_of(T, dtype, K=9, d=72, I=104, N=150):
    n = flashmoe.num_keys(N)
    shapes = (2 * n, d), (N, d), (N, d), (I, d), (I, d), (d, I)
    weights = {name: normal(*s, dtype=dtype) / s[1] ** 0.5 for name, s in zip(flashmoe.MATRICES, shapes)}
    weights |= {"running_mean": normal(d) / 8, "running_var": 1 + normal(d) ** 2}
    return fast.Layer(weights, K, norm_topk_prob=True), weights, normal(T, d, dtype=dtype)


def test_layer():
    for dtype in KINDS:
        for T in 1, 40, 300:
            layer, weights, x = layer_of(T, dtype)
            expected = {name: host(w).clone() for name, w in weights.items()}
            reference = flashmoe.Layer(expected, 9, norm_topk_prob=True)
            for training in (False, True) if T > 1 else (False,):
                y, logits, scores, indices = layer.forward(x, training)
                at_choice = reference.forward(host(x), training, chosen=host(indices))
                own_choice = flashmoe.topk(at_choice[1], 9)[0]
                assert y.dtype == dtype and flashmoe.compare_indices(at_choice[1], host(indices), own_choice) == -1
                close(y, at_choice[0], dtype)
                close(logits, at_choice[1])
                close(scores, at_choice[2])
            for name in "running_mean", "running_var":
                close(weights[name], expected[name])
    assert layer.forward(x[:0])[0].shape == (0, 72)
    assert refused(Error, "tokens = 1", layer.forward, x[:1], training=True).status is Status.BATCH_OF_ONE
    refused(TypeError, "x is f32", layer.forward, x.float())
    refused(ValueError, "T = 300, d = 72", layer.forward, x[:, :64].contiguous())
    refused(Error, "num_experts_per_tok = 145", fast.Layer(weights, 145).forward, x)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    other, _, x2 = layer_of(40, torch.bfloat16)
    alone = layer.forward(x)[0].clone(), other.forward(x2)[0].clone()
    with torch.cuda.graph(graph):
        y = layer.forward(x)[0]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # two layers at once, one of them replayed
        y2 = other.forward(x2)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, alone[0]) and torch.equal(y2, alone[1])
    x.copy_(normal(300, 72, dtype=x.dtype))
    graph.replay()
    assert torch.equal(y, layer.forward(x)[0])


def test_golden_layers():
    for path in sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.safetensors")):
        file = flashmoe.File(path)
        if "x" not in file:
            continue
        dtype = torch.bfloat16 if "bf16" in path.name else torch.float32  # a File holds float32, which is exact
        weights = {name: torch.from_numpy(file[name + ".weight"]).to("cuda", dtype) for name in flashmoe.MATRICES}
        for name in "running_mean", "running_var":
            weights[name] = torch.from_numpy(file[f"router_norm.{name}.before"]).cuda()
        K, norm, training = (int(file.metadata[key]) for key in ("num_experts_per_tok", "norm_topk_prob", "training"))
        layer = fast.Layer(weights, K, norm == 1)
        x = torch.from_numpy(file["x"]).to("cuda", dtype).reshape(-1, layer.d)
        y, logits, _, indices = layer.forward(x, training == 1)
        close(logits, file["router_logits"])
        assert flashmoe.compare_indices(file["router_logits"], host(indices), file["indices"]) == -1
        close(y, file["y"].reshape(y.shape), dtype)


def test_streams_and_graphs():
    logits = normal(2, 64, 32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # whoever does not wait for this stream reads too early
        late = logits * 2 - 1
        indices = fast.topk(late, 16)[0]
    side.synchronize()
    assert (indices.cpu().numpy() == flashmoe.topk(host(logits * 2 - 1), 16)[0]).all()

    fast.topk(logits, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fast.topk(logits, 16)[0]
    logits.copy_(normal(2, 64, 32))
    graph.replay()
    assert (replayed.cpu().numpy() == flashmoe.topk(host(logits), 16)[0]).all()


for name, test in [(name, test) for name, test in globals().items() if name.startswith("test_")]:
    test()
    print(f"ok  flashmoe.cuda in Python, {name[5:].replace('_', ' ')}, level {fast.level()}")
