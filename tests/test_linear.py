"The linear layer that asks oneDNN: derivatives, odd operands, and when it does not ask"
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
import deqdet.ops.linear as linear
from deqdet.ops.linear import Linear, _onednn, by_onednn, onednn_pays, product

needs_onednn = pytest.mark.skipif(_onednn is None, reason='PyTorch was built without oneDNN')

def close(a, b, eps=1e-5): return torch.allclose(a, b, rtol=0, atol=eps)

@pytest.fixture
def operands():
    torch.manual_seed(0)
    return torch.randn(50, 40, requires_grad=True), torch.randn(30, 40, requires_grad=True), torch.randn(30, requires_grad=True)

@needs_onednn
def test_product_and_its_first_and_second_derivatives(operands):
    x, w, b = operands
    y, ref = product(x, w, b), F.linear(x, w, b)
    assert close(y, ref)
    v = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(o, (x, w, b), v, create_graph=True) for o in (y, ref))
    for a, c in zip(ours, theirs): assert close(a, c, 1e-4)
    twice = [torch.autograd.grad(sum(g.sin().sum() for g in gs), (x, w)) for gs in (ours, theirs)]
    for a, c in zip(*twice): assert close(a, c, 1e-3)

@needs_onednn
def test_product_of_operands_that_lie_transposed_in_memory(operands):
    x, w, _ = operands
    assert close(product(x, w.T.contiguous().T), F.linear(x, w))

@needs_onednn
def test_who_needs_no_gradient_gets_none(operands):
    x, w, _ = operands
    grad, = torch.autograd.grad(product(x.detach(), w).sum(), (w,))
    assert grad is not None
    x.grad = None
    product(x, w.detach()).sum().backward()
    assert w.grad is None and x.grad is not None

def test_small_matmuls_other_precisions_devices_and_autocast_are_pytorchs():
    x, w = torch.randn(2, 100, 256), torch.randn(512, 256)
    assert by_onednn(x, w) == (_onednn is not None)
    assert not by_onednn(torch.randn(10, 64), torch.randn(64, 64))
    assert not by_onednn(x.double(), w.double())
    assert not by_onednn(x.to('meta'), w.to('meta'))
    with torch.autocast('cpu', torch.bfloat16): assert not by_onednn(x, w)

@pytest.fixture
def layers():
    pair = []
    for kind in (Linear, nn.Linear):
        torch.manual_seed(1)
        pair.append(kind(256, 512))
    return pair

def test_the_layer_is_pytorchs_in_names_weights_answers_and_gradients(layers):
    ours, theirs = layers
    x = torch.randn(2, 100, 256)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and torch.equal(ours.weight, theirs.weight)
    assert close(ours(x), theirs(x))
    for layer in layers: layer(x).square().sum().backward()
    assert close(ours.weight.grad, theirs.weight.grad, 1e-2)

def test_an_empty_batch_and_no_bias(layers):
    x, bare = torch.randn(2, 100, 256), Linear(256, 512, bias=False)
    assert layers[0](x[:0]).shape == (0, 100, 512)
    assert close(bare(x), x @ bare.weight.T)

def test_in_float64_the_layer_equals_finite_differences():
    tight = Linear(3, 2).double()
    assert gradcheck(tight, torch.randn(4, 3, dtype=torch.double, requires_grad=True))

@pytest.fixture
def unknown(monkeypatch):
    "A processor for which the library was not measured; no choice stands"
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    monkeypatch.setattr(linear, 'CHOSEN', {})
    return monkeypatch

@needs_onednn
@pytest.mark.parametrize('times,choice', [((1.4, 1), True), ((1.6, 1), False), ((.5, 1), True)])
def test_elsewhere_the_library_is_measured_once_for_a_weight(unknown, layers, times, choice):
    "A tie stays with oneDNN; a batch and an image of it go the same way"
    asked, answers = [], iter(times)
    unknown.setattr(linear, '_least', lambda f, *args: asked.append(f) or next(answers))
    x, theirs = torch.randn(4, 100, 256), layers[1]
    for o in (x, x[:1], x[:2]): assert by_onednn(o, layers[0].weight)==choice
    assert len(asked)==2 and linear.CHOSEN=={(512, 256): choice}
    if not choice: assert torch.equal(layers[0](x), theirs(x))

@needs_onednn
def test_a_much_slower_onednn_is_left_out(unknown):
    import time
    fast = linear._onednn
    unknown.setattr(linear, '_onednn', lambda *args: time.sleep(.05) or fast(*args))
    assert not onednn_pays(torch.randn(100, 256), torch.randn(512, 256, requires_grad=True))

@needs_onednn
def test_with_wide_vectors_nothing_is_measured(unknown):
    unknown.setattr(linear, '_least', lambda f, *args: pytest.fail('measured'))
    unknown.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    assert onednn_pays(torch.randn(100, 256), torch.randn(512, 256))
