"""Token log-probabilities by blocks against log_softmax in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pedgpt.kernels import cross_entropy, token_logps


@pytest.fixture(autouse=True, params=[7, 2**19], ids=["small blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", request.param)


def draw(tokens, size, masked=0.4, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(size, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    return logits, labels, torch.randn(tokens, generator=generator, dtype=torch.float64)


def truth(logits, labels, dlogps):
    logits = logits.double().detach().requires_grad_()
    found = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels != -100)
    return found.detach(), torch.autograd.grad(found, logits, dlogps)[0]


def result(logits, labels, dlogps):
    logits = logits.detach().requires_grad_()
    found = token_logps(logits, labels)
    return found.detach(), torch.autograd.grad(found, logits, dlogps.to(found.dtype))[0]


SHAPES = [(9, 13), (1, 5), (40, 3), (17, 129), (6, 1), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.1], ids=["all count", "some count", "none counts"])
def test_values_and_gradients_match_float64(shape, masked):
    logits, labels, dlogps = draw(*shape, masked)
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        exact = truth(logits.to(dtype), labels, dlogps)
        found = result(logits.to(dtype), labels, dlogps)
        assert [t.dtype for t in found] == [dtype, dtype]
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_torchs_cross_entropy(dtype):
    logits, labels, dlogps = draw(64, 300)
    logits, dlogps = logits.to(dtype), dlogps.float()
    exact = truth(logits, labels, dlogps.double())
    theirs = logits.clone().requires_grad_()
    nll = -F.cross_entropy(theirs.float(), labels, reduction="none")
    theirs = (nll.detach(), torch.autograd.grad(nll, theirs, dlogps)[0])
    ours = result(logits, labels, dlogps)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a.double() - c).norm() <= 1.02 * (b.double() - c).norm() + 1e-6 * c.norm()


def test_gradients_of_gradients_match_autograds():
    logits, labels, _ = draw(4, 5)
    assert torch.autograd.gradcheck(lambda x: token_logps(x, labels), logits.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: token_logps(x, labels), logits)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]])
    logps, gradient = result(logits, torch.tensor([1, 1]), torch.ones(2))
    assert logps.tolist() == [-2e4, 0.0] and gradient.isfinite().all()


@pytest.mark.parametrize("label", [-1, 5, -101])
def test_a_label_outside_the_vocabulary_is_named(label):
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        token_logps(torch.zeros(3, 5), torch.tensor([0, label, -100]))


def test_logits_are_left_as_they_were_and_strides_do_not_matter():
    logits, labels, dlogps = draw(9, 13)
    wide = torch.cat((logits, logits), dim=1).t().contiguous().t()[:, :13]
    before = wide.clone()
    for ours, theirs in zip(result(wide, labels, dlogps), result(logits, labels, dlogps), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(wide, before)


class Sizes(TorchDispatchMode):
    """Notes every result that has float32 numbers for all tokens and the whole vocabulary."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.numel() >= self.numbers:
                self.found.append(str(func))
        return out


def test_no_float32_tensor_of_tokens_by_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 400)
    logits, labels, dlogps = draw(64, 100)
    logits = logits.bfloat16().requires_grad_()
    with Sizes(64 * 100) as sizes:
        token_logps(logits, labels).backward(dlogps.float())
    assert not sizes.found
    with Sizes(64 * 100) as sizes:  # the probe sees what it looks for
        F.cross_entropy(logits.float(), labels)
    assert sizes.found


def test_compiled_it_gives_the_same():
    logits, labels, dlogps = draw(9, 13)
    logits = logits.float().requires_grad_()
    compiled = torch.compile(token_logps, fullgraph=True, backend="aot_eager")
    found = compiled(logits, labels)
    torch.testing.assert_close(found, token_logps(logits, labels))
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, dlogps.float())[0], result(logits, labels, dlogps)[1]
    )
