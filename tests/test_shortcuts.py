"What `benchmarks/acceleration.py` fits and measures: the protocol of a method, fitting, calibration, halting"
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn
from deqdet.decoder import Pred, State
from deqdet.sets.images import Target
from deqdet.solver import Picard, solve, take
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
from acceleration import Constant, First, Jump, Mix, apply, by_query, calibration_error, compact, fit_stored, fit_unrolled, foreseen, halted, halting, judged, moved, moves, remembering

class Slow(nn.Module):
    "Contents and boxes go a part of the way to their place in every application"
    def forward(self, z, goal, rate):
        r = rate[:, None, None]
        return State(*[g + r*(a-g) for a,g in zip(z, goal)])
    def read(self, z): return Pred(z.content[..., :2], z.boxes)

def problem(n=4, dtype=torch.float32, rates=None):
    g = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g).to(dtype)
    def state(): return State(draw(n,5,8), torch.cat([100 + 9*draw(n,5,2), 5 + .3*draw(n,5,1), .2*draw(n,5,1)], -1))
    rate = torch.linspace(.3, .9, n, dtype=dtype) if rates is None else torch.full((n,), rates, dtype=dtype)
    return Slow(), state(), (state(), rate)

def each_alone(**options):
    "Solves a batch, and each of its images alone: the same states after as many applications"
    f,z,args = problem()
    whole = solve(f, z, args, **options)
    assert len(set(whole.n.tolist())) > 1, 'images should leave the batch at different times'
    for i in range(4):
        row = torch.tensor([i])
        one = solve(f, take(z, row), take(args, row), **options)
        assert one.n.item()==whole.n[i].item()
        for a,b in zip(one.z, take(whole.z, row)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

def loud(kind, **kwargs):
    "A method whose network answers more than 0"
    torch.manual_seed(1)
    m = kind(**kwargs)
    nn.init.normal_(m.net[-1].weight, std=.02 if kind is Mix else .001)
    return m

METHODS = {'constant': lambda: Constant(.2, .3), 'first': lambda: First(-.5, -.5), 'mix': lambda: loud(Mix), 'jump': lambda: loud(Jump, width=8)}

@pytest.mark.parametrize('kind', METHODS)
@torch.no_grad()
def test_batch_equals_single(kind):
    each_alone(method=METHODS[kind](), tol=1e-2, max_iter=12)

@pytest.mark.parametrize('method', [Constant(), First(), Mix(), Jump(width=8)], ids=['constant','first','mix','jump'])
@torch.no_grad()
def test_off_is_picard_bit_for_bit(method):
    f,z,args = problem()
    a,b = (solve(f, z, args, method=m, max_iter=7).z for m in (Picard(), method))
    assert all(torch.equal(x, y) for x,y in zip(a, b))

def test_moved_undoes_moves():
    _,z,(goal,_) = problem()
    content,centre,size = moves(z, goal)
    back = moved(z, (content, centre*2**(goal.xyzr - z.xyzr)[..., 2:3], size)) # centres are counted in sizes of the second box
    for a,b in zip(back, goal): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

def detector(f): return SimpleNamespace(decoder=SimpleNamespace(step=f))

@pytest.mark.parametrize('kind', [Mix, lambda: Jump(width=8)], ids=['mix','jump'])
def test_fit_to_stored_states_shortens_the_way(kind):
    f,z,args = problem(16, rates=.7)
    path = list(solve(f, z, args, max_iter=40, keep=range(41)).kept.values())
    torch.manual_seed(0)
    m = fit_stored(kind(), detector(f), [None], [path], epochs=300, lr=1e-2)
    with torch.no_grad(): share = np.array(foreseen(m, [path], f.read))
    assert (share[1:] > .3).all(), share # of the squared distance that is left

def test_gradient_through_applications():
    f,z,args = problem(2, torch.float64)
    m = loud(Mix, width=3).double()
    names = [k for k,_ in m.named_parameters()]
    def ends(*ps):
        method = SimpleNamespace(init=m.init, step=lambda *a: torch.func.functional_call(Bound(m), dict(zip(['m.'+k for k in names], ps)), a))
        return tuple(solve(f, z, args, method=method, max_iter=3).z)
    assert torch.autograd.gradcheck(ends, tuple(m.parameters()), eps=1e-6, atol=1e-4)

class Bound(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, *args): return self.m.step(*args)

def truth(boxes, labels):
    boxes,labels = torch.tensor([boxes], dtype=torch.float), torch.tensor([labels])
    return Target(boxes, labels, torch.tensor([[200,200]]), torch.tensor([1]))

def test_unrolled_fit_lowers_the_loss():
    f,z,(goal,rate) = problem(2, rates=.8)
    labels = torch.zeros(2, 5, dtype=torch.long)
    b = SimpleNamespace(z0=z, feats=goal, target=Target(goal.boxes, labels, torch.full((2,2), 200), torch.arange(2)))
    step = Slow()
    step.forward = lambda z, goal: Slow.forward(step, z, goal, rate)
    from acceleration import detection_loss
    model,m = detector(step), Mix()
    before = detection_loss(model, [b], m, (2,3))
    fit_unrolled(m, model, [b], 40, lr=1e-2)
    assert detection_loss(model, [b], m, (2,3)) < before - .1

def test_judged_counts_an_object_once():
    boxes = torch.tensor([[[0,0,10,10], [0,0,10,9], [50,50,60,60], [50,50,60,60]]]).float()
    logits = torch.tensor([[[3.,0.], [2.,0.], [0.,1.], [2.,0.]]]) # the last has the wrong class
    good = judged(Pred(logits, boxes), truth([[0,0,10,10], [50,50,60,60], [0,0,0,0]], [0, 1, -1]))
    assert good.tolist()==[[True, False, True, False]]

def test_calibration_error():
    p = np.array([.9]*10 + [.2]*10)
    y = np.array([1]*9 + [0] + [1,1] + [0]*8)
    assert calibration_error(p, y) < 1e-9
    assert abs(calibration_error(p, 1-y) - (.8 + .6)/2) < 1e-9

def test_halting_without_tolerance_is_the_whole_walk(monkeypatch):
    f,z,(goal,_) = problem(2)
    step = Slow()
    step.forward = lambda z, feats: Slow.forward(step, z, *feats)
    feats = goal, torch.tensor([.1, .6])
    import acceleration
    seen = []
    def ap(preds, *_):
        seen.append(preds[0])
        return {}
    monkeypatch.setattr(acceleration, 'average_precision', ap)
    rows = halting(detector(step), [SimpleNamespace(z0=z, feats=feats)], None, (1e-9, .05, 1e9), 6)
    n = [r['applications'] for r in rows]
    assert n[0]==6 and 1 < n[1] < 6 and n[2]==1
    plain = solve(step, z, (feats,), max_iter=6).z
    assert torch.equal(seen[0].boxes, plain.boxes)

def mixer(N=6):
    from deqdet.mixer import MixerStep
    torch.manual_seed(0)
    step = MixerStep(3, width=32, feat_width=32, groups=2, points=4, out_points=8, heads=4, hidden=32).eval()
    nn.init.normal_(step.mixing.params.weight, std=.1)
    nn.init.normal_(step.reg[-1].weight, std=.1)
    feats = step.prepare([torch.randn(1, 32, 64//s, 64//s) for s in (4, 8, 16, 32)])
    return step, State.at(torch.randn(1, N, 32), torch.tensor([[[10., 10, 40, 40]]]).repeat(1, N, 1) + 9*torch.rand(1, N, 4)), feats

@torch.no_grad()
def test_compaction_computes_what_halting_holds():
    step,z,feats = mixer()
    for a,b in zip(compact(step, z, feats, torch.arange(6)), step(z, feats)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    active = torch.tensor([1, 4])
    some,whole = compact(step, z, feats, active),step(z, feats)
    torch.testing.assert_close(some.content[:, active], whole.content[:, active], rtol=1e-4, atol=1e-4)
    assert torch.equal(some.content[:, [0,2,3,5]], z.content[:, [0,2,3,5]])
    plain = solve(step, z, (feats,), measure=by_query, max_iter=5, record=True)
    some_settle = plain.trace.rel[1].amax(-1).median().item()
    for tol in (0., some_settle):
        found,n = halted(step, z, feats, tol, 5)
        sol = solve(step, z, (feats,), tol=tol, measure=by_query, max_iter=5, record=True)
        for a,b in zip(found, sol.z): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        counted = ((sol.trace.rel.amax(-1) > tol).sum(0) + 1).clamp(max=5).sum().item()
        assert n==counted and (n < 30) == (tol > 0)

@torch.no_grad()
def test_remembered_attention():
    "Without change in every application, and at a fixed point of f; elsewhere the states differ from the second on"
    step,z,feats = mixer()
    b = SimpleNamespace(z0=z, feats=feats)
    plain = solve(step, z, (feats,), max_iter=3, keep=(1,2,3)).kept
    always,seldom = remembering(step, 1),remembering(step, 2)
    for _ in range(2): # applications are counted anew
        found = apply(seldom, b, (1,2,3))
        torch.testing.assert_close(found[1].content, plain[1].content)
        assert torch.dist(found[2].content, plain[2].content) > 1e-3
        torch.testing.assert_close(apply(always, b, (1,2,3))[3].content, plain[3].content)
    assert 'talk' not in vars(step)
    seldom.talk.n = 0
    for _ in range(2): torch.testing.assert_close(seldom(z, feats).content, plain[1].content) # the same state twice

def test_times_of_lighter_steps():
    "In the order in which they compute less; the step itself stays"
    from acceleration import light
    step,z,feats = mixer()
    before = {k: v.clone() for k,v in step.state_dict().items()}
    with torch.no_grad(): found = light(step, SimpleNamespace(z0=z, feats=feats), 2, 1)
    assert list(found)==['f', 'half of the points', 'rank 32'] and all(o['ms'] > 0 for o in found.values())
    assert before.keys()==step.state_dict().keys() and all(torch.equal(v, before[k]) for k,v in step.state_dict().items())
