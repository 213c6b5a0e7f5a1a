"`benchmarks/joint.py`: a solver learned with its map, and early states taught"
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from deqdet.decoder import Pred
from deqdet.equilibrium import RAG
from deqdet.sets.images import Target
from deqdet.solver import Picard, solve
from test_shortcuts import Slow, each_alone, problem
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
from acceleration import moved, moves
from beyond import RandomSteps
from contraction import small
from joint import Pace, RandomPair, likeness, paced, straight

def loud(seed=1, std=.5):
    "A solver whose parts are not 1"
    torch.manual_seed(seed)
    m = Pace(8)
    nn.init.normal_(m.net[-1].weight, std=std)
    return m

@torch.no_grad()
def test_parts_of_one_are_picard_bit_for_bit():
    f,z,args = problem()
    a,b,c = (solve(f, z, args, method=m, max_iter=7).z for m in (Picard(), Pace(), loud()))
    assert all(torch.equal(x, y) for x,y in zip(a, b))
    assert not torch.equal(a.content, c.content) and not torch.equal(a.xyzr, c.xyzr)

@torch.no_grad()
def test_batch_equals_single():
    each_alone(method=loud(std=.1), tol=1e-2, max_iter=20)

@torch.no_grad()
def test_a_part_is_of_the_move():
    f,z,args = problem()
    m = Pace()
    m.net[-1].bias.copy_(torch.tensor([-.5, .25]).atanh())
    fz = f(z, *args)
    content,centre,size = moves(z, fz)
    want = moved(fz, (-.5*content, .25*centre, .25*size))
    for a,b in zip(m.step(None, z, fz)[1], want): torch.testing.assert_close(a, b)

def detector(**plan):
    "A tiny equilibrium in training, a batch's first state and features"
    torch.manual_seed(0)
    net = small().build().train()
    net.decoder.plan = replace(net.decoder.plan, **plan)
    for step in (net.decoder.init, net.decoder.step): nn.init.normal_(step.reg[-1].weight, std=.05) # untrained steps move no box
    state,feats = net.start(torch.randint(0, 255, (2,3,64,64), dtype=torch.uint8), torch.full((2,2), 64))
    return net.decoder, state, feats

def test_the_path_with_parts_of_one_is_the_recipes():
    decoder,state,feats = detector(supervise=(2, 4))
    with torch.no_grad(): z = decoder.init(state, feats)
    torch.manual_seed(3)
    plain = decoder.path(z, feats)
    decoder.pace = Pace()
    torch.manual_seed(3)
    learned = paced(decoder, z, feats)
    assert len(plain)==len(learned)==2
    assert all(torch.equal(p, q) for a,b in zip(plain, learned) for p,q in zip(a, b))

@pytest.mark.parametrize('grad, boxes', [(straight, True), (RAG(1), False)], ids=['straight', 'RAG'])
def test_gradient_reaches_map_and_solver(grad, boxes):
    decoder,state,feats = detector(supervise=(2, 4), grad=grad)
    decoder.pace = loud()
    decoder.path = lambda z, feats: paced(decoder, z, feats)
    preds = decoder(state, feats)
    sum((p.boxes/64).sum() + p.logits.sum() for p in preds[1:]).backward()
    content,box = decoder.pace.net[-1].weight.grad.abs().amax(-1)
    assert content > 0 and (box > 0)==boxes, 'f detaches the boxes that it starts from'
    assert decoder.pace.net[0].weight.grad.abs().max() > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.step.parameters())

def test_straight_is_one_application():
    decoder,state,feats = detector()
    with torch.no_grad(): z = decoder.init(state, feats)
    f = lambda z: decoder.step(z, feats)
    assert all(torch.equal(a, b) for a,b in zip(f(z), straight(f, z)))

def test_gradient_of_the_last_parts_is_right():
    f,z,(goal,rate) = problem(2, torch.float64)
    m = loud().double()
    plan = SimpleNamespace(steps=1, supervise=(1,), perturb=None)
    step = lambda z, feats: f(z, goal, rate)
    decoder = SimpleNamespace(plan=plan, pace=m, step=step)
    def end(bias):
        m.net[-1].bias.data.copy_(bias)
        state, = paced(decoder, z, None)
        return (step(state, None).content.square().sum() + step(state, None).xyzr.sum())
    bias = torch.zeros(2, dtype=torch.float64)
    end(bias).backward()
    found = m.net[-1].bias.grad.clone()
    eps = 1e-5*torch.eye(2, dtype=torch.float64)
    want = torch.stack([(end(bias + e) - end(bias - e)).detach()/2e-5 for e in eps])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)

def test_a_late_prediction_teaches_an_early_one():
    torch.manual_seed(0)
    boxes = torch.tensor([[[4.,4.,30.,30.], [20.,10.,60.,50.]]])
    late = Pred(torch.tensor([[[3.,-4.], [-5.,-6.]]], requires_grad=True), boxes.clone().requires_grad_())
    early = Pred(torch.randn(1,2,2, requires_grad=True), (boxes + 3).requires_grad_())
    target = Target(boxes[:, :1], torch.tensor([[0]]), torch.tensor([[64,64]]), torch.tensor([1]))
    loss = likeness(early, late, target)
    loss.backward()
    assert late.logits.grad is None and late.boxes.grad is None
    assert early.logits.grad.abs().min() > 0
    here,there = early.boxes.grad[0].abs().amax(-1)
    assert here > 100*there > 0, 'boxes of queries without an object hardly count'
    same = Pred(late.logits.detach().requires_grad_(), boxes.clone().requires_grad_())
    assert likeness(same, late, target) < loss
    same_loss = likeness(same, late, target)
    same_loss.backward()
    assert same.logits.grad.abs().max() < 1e-7

@pytest.mark.parametrize('kind, early, late', [(RandomPair, {1,2}, set(range(3, 9))), (RandomSteps, set(), set(range(1, 9)))])
def test_lengths_are_drawn(kind, early, late):
    drawn = [kind.lengths(None) for _ in range(200)]
    assert {d['steps'] for d in drawn}==late=={d['supervise'][-1] for d in drawn}
    assert {t for d in drawn for t in d['supervise'][:-1]}==early
