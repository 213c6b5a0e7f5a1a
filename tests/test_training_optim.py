"Orthogonal updates: what they are to a matrix, and that everything else is AdamW's"
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from torch import nn
from deqdet.training.optim import Muon, is_matrix, orthogonal

@pytest.fixture
def lopsided():
    "A matrix (32,100) a few directions of which carry nearly everything"
    torch.manual_seed(0)
    u,_,v = torch.linalg.svd(torch.randn(32, 100), full_matrices=False)
    return u@torch.diag(.8**torch.arange(32.))@v

def near(s): return ((s/s[0]) > .5).sum().item()

def test_every_direction_gets_nearly_the_same_size(lopsided):
    before = torch.linalg.svdvals(lopsided)
    after = torch.linalg.svdvals(orthogonal(lopsided))
    assert near(after) > 2*near(before)
    assert (after < 1.3).all()

def test_the_short_form_is_the_plain_one(lopsided):
    x = lopsided/lopsided.norm()
    for _ in range(5):
        a = x@x.T
        x = 3.4445*x + (-4.775*a + 2.0315*a@a)@x
    torch.testing.assert_close(orthogonal(lopsided), x, atol=2e-3, rtol=0)

def test_close_to_the_exact_one_whatever_the_shape():
    torch.manual_seed(0)
    m = torch.randn(48, 100)
    u,_,v = torch.linalg.svd(m, full_matrices=False)
    assert F.cosine_similarity(orthogonal(m).flatten(), (u@v).flatten(), 0) > .97
    torch.testing.assert_close(orthogonal(m.T), orthogonal(m).T, atol=1e-4, rtol=0)
    kernel = m.reshape(48, 4, 5, 5)
    torch.testing.assert_close(orthogonal(kernel).flatten(1), orthogonal(m), atol=1e-4, rtol=0)

def test_matrices_are_turned_and_the_rest_is_adamw():
    "A matrix moves by numbers of about .2 of the rate, a bias as under AdamW; gradients are still there"
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    was = deepcopy(layer)
    layer(torch.randn(64, 32)).square().sum().backward()
    Muon(layer.parameters(), lr=1e-2, weight_decay=0.).step()
    moved = layer.weight - was.weight
    assert moved.square().mean().sqrt().item()==pytest.approx(.2*1e-2, abs=3e-4)
    for p,q in zip(was.parameters(), layer.parameters()): p.grad = q.grad
    torch.optim.AdamW(was.parameters(), lr=1e-2, betas=(.95,.999), weight_decay=0.).step()
    assert torch.equal(layer.bias, was.bias)
    assert layer.weight.grad is not None

def test_decay_shrinks_what_has_no_gradient_to_speak_of():
    layer = nn.Linear(16, 16, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    Muon(layer.parameters(), lr=.1, weight_decay=.5).step()
    torch.testing.assert_close(layer.weight, before*.95, atol=1e-6, rtol=0)

def run(opt, model, seed):
    torch.manual_seed(seed)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        opt.step()

def test_all_state_is_in_state_dict():
    a = nn.Linear(32, 24)
    opt_a = Muon(a.parameters())
    run(opt_a, a, 0)
    b = deepcopy(a)
    opt_b = Muon(b.parameters())
    opt_b.load_state_dict(deepcopy(opt_a.state_dict()))
    run(opt_a, a, 1)
    run(opt_b, b, 1)
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)

def test_what_counts_as_a_matrix():
    shapes = (64,3,7,7), (64,64), (64,), (4,64)
    assert [is_matrix(torch.zeros(s)) for s in shapes]==[True, True, False, False]
