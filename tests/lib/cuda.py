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
