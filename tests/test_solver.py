"""Properties of `deqdet.solver` over many random inputs, and comparisons with other people's solvers."""
import math
from typing import NamedTuple
import numpy as np, pytest, torch
from torch import Tensor
from torch.testing import assert_close
from deqdet.boxes import Record
from deqdet.solver import (Anderson, Averaged, Broyden, Picard, Residual, Status, by_autograd, by_differences, jac_penalty, parts,
                           per_image, per_query, pullback, rebuild, solve, spectral_radius, take)

class Two(NamedTuple):
    content: Tensor
    place: Tensor

class Rec(Record):
    content: Tensor
    place: Tensor

METHODS = [Picard(), Picard(0.6), Anderson(), Anderson(m=2, lam=1e-8), Anderson(m=8, beta=0.7), Broyden(3), Broyden(20)]
ids = lambda m: repr(m)

@pytest.fixture(autouse=True)
def double():
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(old)

def family(n, rho, dims=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, dims, dims, generator=g)
    return rho*A/torch.linalg.eigvals(A).abs().amax(-1)[:,None,None], torch.randn(n, dims, generator=g)

def lin(z, A, b): return (A@z[...,None])[...,0] + b
def tanh(z, A, b): return lin(z, A, b).tanh()

def two(kind=Two):
    "A step on a state of two parts (B,3,4), (B,3,2); `A` (B,6,6), `b` (B,6)"
    def step(z, A, b):
        content,place = parts(z)
        y = (torch.cat([content, place/100-3], -1)@A.mT + b[:,None]).tanh()
        y = y + 0.1*y.mean(1, keepdim=True)
        return rebuild(kind(content, place) if kind is not tuple else (content, place), (y[...,:4], 300+100*y[...,4:]))
    return step

def problem(n, seed, kind=Two):
    A,b = family(n, 1., 6, seed)
    A = A*torch.linspace(0.1, 0.8, n)[:,None,None]
    z = (torch.zeros(n,3,4), torch.full((n,3,2), 300.))
    return two(kind), (z if kind is tuple else kind(*z)), (A, b)

def close(a, b, **kw):
    assert type(a) is type(b)
    for x,y in zip(parts(a), parts(b)): assert_close(x, y, **kw)

# ---------------------------------------------------------------- one by one, whatever the company

@pytest.mark.parametrize('method', METHODS, ids=ids)
@pytest.mark.parametrize('kind', [Two, Rec, tuple])
@pytest.mark.parametrize('seed', range(3))
def test_batch_is_its_images(method, kind, seed):
    f,z,args = problem(6, seed, kind)
    kw = dict(method=method, tol=1e-7, max_iter=60, keep=(0,2,7,60))
    sol = solve(f, z, args, **kw)
    assert type(sol.z) is kind and sol.converged.any() and len(set(sol.n.tolist())) > 1
    for i in range(6):
        row = torch.tensor([i])
        one = solve(f, take(z, row), take(args, row), **kw)
        assert one.n[0]==sol.n[i] and one.status[0]==sol.status[i]
        close(one.z, take(sol.z, row), atol=1e-8, rtol=1e-8)
        for k in kw['keep']: close(one.kept[k], take(sol.kept[k], row), atol=1e-8, rtol=1e-8)
        n = len(one.trace.rel)
        assert_close(one.trace.rel[:,0], sol.trace.rel[:n,i], atol=1e-9, rtol=1e-3)

@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_order_of_images_does_not_matter(method):
    f,z,args = problem(6, 11)
    order = torch.tensor([4,0,5,2,1,3])
    a,b = [solve(f, *x, method=method, tol=1e-7, max_iter=60) for x in ((z, args), take((z, args), order))]
    assert torch.equal(a.n[order], b.n)
    close(take(a.z, order), b.z, atol=1e-8, rtol=1e-8)

@pytest.mark.parametrize('method', METHODS, ids=ids)
@pytest.mark.parametrize('factor', [1e-4, 1e5])
def test_units_do_not_matter(method, factor):
    f,z,args = problem(4, 5)
    to,fro = (lambda z: Two(z.content, z.place*factor)), (lambda z: Two(z.content, z.place/factor))
    a = solve(f, z, args, method=method, max_iter=15, record=True)
    b = solve(lambda z, *args: to(f(fro(z), *args)), to(z), args, method=method, max_iter=15, record=True)
    close(a.z, fro(b.z), atol=1e-7, rtol=1e-7)
    assert_close(a.trace.rel, b.trace.rel, atol=1e-8, rtol=1e-4)

@pytest.mark.parametrize('method', METHODS, ids=ids)
@pytest.mark.parametrize('seed', range(3))
def test_finished_images_cost_nothing(method, seed):
    f,z,args = problem(8, seed)
    rows = []
    def counted(z, *args):
        rows.append(len(z.content))
        return f(z, *args)
    sol = solve(counted, z, args, method=method, tol=1e-6, max_iter=80)
    assert sum(rows)==sol.n.sum() and rows==sorted(rows, reverse=True) and len(rows)==sol.n.max()

# ---------------------------------------------------------------- what is reported is true

@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_report(method):
    f,z,args = problem(8, 3)
    tol = 1e-6
    sol = solve(f, z, args, method=method, tol=tol, max_iter=40, keep=range(41))
    worst = sol.trace.rel.amax(-1)
    for i in range(8):
        n = sol.n[i].item()
        assert sol.converged[i] == (worst[n-1,i] <= tol)
        assert (worst[:n-1,i] > tol).all()
        for r in sol.trace: assert (r[n-1:,i] == r[n-1,i]).all()
        for k in range(n, 41): assert torch.equal(sol.kept[k].content[i], sol.z.content[i])
    assert sol.trace.rel.isfinite().all() and sol.trace.rel.shape == (sol.n.max(), 8, 2)
    after = per_image(sol.z, f(sol.z, *args)).rel.amax(-1)
    assert (after[sol.converged] < 10*tol).all()

def test_trace_of_picard_is_the_residual_of_its_states():
    f,z,args = problem(4, 2)
    sol = solve(f, z, args, max_iter=10, keep=range(11), record=True)
    for t in range(10):
        r = per_image(sol.kept[t], sol.kept[t+1])
        assert torch.equal(sol.trace.rel[t], r.rel) and torch.equal(sol.trace.abs[t], r.abs)

@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_longer_runs_extend_shorter_ones(method):
    f,z,args = problem(4, 9)
    long = solve(f, z, args, method=method, max_iter=12, keep=range(13))
    for k in (0,1,2,5,12): close(solve(f, z, args, method=method, max_iter=k).z, long.kept[k], atol=1e-10, rtol=1e-10)

@pytest.mark.parametrize('seed', range(5))
def test_linear_rate(seed):
    g = torch.Generator().manual_seed(seed)
    rho = 0.05 + 0.93*torch.rand(16, generator=g)
    A = rho[:,None,None]*torch.linalg.qr(torch.randn(16,7,7, generator=g)).Q
    b = torch.randn(16,7, generator=g)
    absolute = lambda z, fz: Residual(*[per_image(z, fz).abs]*2)
    n = solve(lin, torch.zeros_like(b), (A,b), tol=1e-9, max_iter=5000, measure=absolute).n
    assert torch.equal(n, (1 + ((1e-9/b.norm(dim=1)).log()/rho.log()).ceil()).long())

@pytest.mark.parametrize('method', METHODS, ids=ids)
@pytest.mark.parametrize('tol', [0., 1e-6])
def test_non_finite_images_leave_the_others_alone(method, tol):
    f,z,args = problem(6, 4)
    bad = Two(z.content.clone(), z.place.clone())
    bad.content[1,0,0],bad.place[4,2,1] = math.nan,math.inf
    a,b = [solve(f, x, args, method=method, tol=tol, max_iter=40) for x in (z, bad)]
    good = torch.tensor([0,2,3,5])
    assert b.status[1]==Status.NON_FINITE
    assert torch.equal(a.n[good], b.n[good]) and torch.equal(a.status[good], b.status[good])
    close(take(a.z, good), take(b.z, good), atol=1e-9, rtol=1e-9)
    assert b.z.content[1].isnan().any()
    if tol: assert b.n[1]==1

def test_divergence_is_a_status():
    sol = solve(lambda z: 2*z + 1, torch.ones(3,2).float(), tol=1e-3, max_iter=500)
    assert sol.status.tolist()==[Status.NON_FINITE]*3 and sol.z.isinf().all() and (sol.n < 140).all()
    sol = solve(lambda z: 2*z + 1, torch.ones(3,2), tol=1e-6, method=Anderson(lam=0.))
    assert sol.converged.all()
    assert_close(sol.z, -torch.ones(3,2))

# ---------------------------------------------------------------- edges

def test_edges():
    A,b = family(3, 0.5)
    none = solve(lin, torch.zeros(3,8), (A,b), max_iter=0, keep=(0,))
    assert none.n.tolist()==[0,0,0] and none.trace is None and list(none.kept)==[0]
    assert torch.equal(none.z, torch.zeros(3,8))
    for m in METHODS:
        empty = solve(lin, torch.zeros(0,8), (A[:0],b[:0]), tol=1e-3, method=m)
        assert empty.z.shape==(0,8) and empty.status.shape==(0,)
        flat = solve(torch.cos, torch.tensor([0.1,1.,2.]), tol=1e-8, max_iter=100, method=m)
        assert flat.converged.all() and flat.z.shape==(3,)
        exact = solve(lambda z: torch.full_like(z, 2.), torch.zeros(2,3), max_iter=40, method=m)
        assert torch.equal(exact.z, torch.full((2,3), 2.))
        zero = solve(lambda z: 0*z, torch.ones(2,3), max_iter=100, tol=1e-6, method=m)
        assert zero.converged.all() and torch.equal(zero.z, torch.zeros(2,3))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('method', [m for m in METHODS if getattr(m, 'lam', 1) >= 1e-4], ids=ids)
def test_low_precision(dtype, method):
    A,b = family(4, 0.6)
    sol = solve(tanh, torch.zeros_like(b).to(dtype), (A.to(dtype),b.to(dtype)), method=method, max_iter=40)
    assert sol.z.dtype==dtype and (sol.status==Status.MAX_ITER).all()
    truth = solve(tanh, torch.zeros_like(b), (A,b), tol=1e-12, max_iter=500).z
    assert_close(sol.z.double(), truth, atol=20*torch.finfo(dtype).eps, rtol=0)

def test_bad_input():
    A,b = family(3, 0.5)
    z = torch.zeros(3,8)
    for bad in (dict(tolerance=1), dict(solver='anderson'), dict(eps=1e-3)):
        with pytest.raises(TypeError): solve(lin, z, (A,b), **bad)
    for make in (Picard, Anderson, Broyden, Averaged):
        with pytest.raises(TypeError): make(alpha=1)
        with pytest.raises(Exception): make().m = 3
    with pytest.raises(ValueError, match='3 images'): solve(lin, z, (A,b[:2]))
    with pytest.raises(ValueError, match='3 images'): solve(lin, z, ({'a': (A, torch.tensor(1.))},))
    with pytest.raises(ValueError, match='keep'): solve(lin, z, (A,b), keep=(21,))
    with pytest.raises(ValueError, match='through args'): solve(lambda z: tanh(z, A, b), z[:1], tol=1e-3)

def test_args_may_be_nested():
    A,b = family(5, 0.9)
    f = lambda z, feats, extra: lin(z, feats['A'], feats['more'][0]) + 0*len(extra[1])
    nested = ({'A': A, 'more': [b, (b, None)]}, (b, 'text'))
    a,c = [solve(g, torch.zeros_like(b), x, tol=1e-6, max_iter=300) for g,x in ((f, nested), (lin, (A,b)))]
    assert torch.equal(a.z, c.z) and torch.equal(a.n, c.n)

def test_nothing_beyond_the_loop_by_default():
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))
    A,b = family(4, 0.9)
    def extra(steps):
        with Count() as plain:
            z = torch.zeros_like(b)
            for _ in range(steps): z = lin(z, A, b)
        with Count() as ours: sol = solve(lin, torch.zeros_like(b), (A,b), max_iter=steps)
        assert torch.equal(sol.z, z)
        return ours.n - plain.n
    assert extra(1)==extra(20)==extra(200) < 25

def test_plain_run_never_reads_a_value():
    "Nothing in it depends on the numbers, so it runs on tensors that have none; on an accelerator it never waits"
    z = Two(torch.zeros(3,2,4, device='meta'), torch.zeros(3,2,2, device='meta'))
    sol = solve(lambda z: Two(z.content.tanh(), z.place+1), z, keep=(1,3,6), record=True)
    assert sol.z.content.is_meta and sol.status.is_meta and sol.trace.rel.shape==(20,3,2) and list(sol.kept)==[1,3,6]

def test_import_is_light(loaded): assert not {'fastai', 'torchvision', 'matplotlib', 'scipy'} & loaded['solver']

# ---------------------------------------------------------------- what the page shows once, on more

def test_former_names_are_the_same_classes():
    "Saved detectors and older code say `picard`, `anderson`, `broyden`"
    import deqdet.solver as solver
    assert (solver.picard, solver.anderson, solver.broyden) == (Picard, Anderson, Broyden)

def test_misspelt_options_are_named():
    for make,option in ((Picard, 'dampen'), (Anderson, 'lambda_'), (Broyden, 'betta')):
        with pytest.raises(TypeError, match=option): make(**{option: 0.5})

# ---------------------------------------------------------------- the mean of late states

@pytest.mark.parametrize('kind', [Two, Rec])
@pytest.mark.parametrize('after', [0, 2])
def test_state_is_the_mean_of_late_results(kind, after):
    f,z,args = two(kind), kind(torch.randn(3,3,4), torch.randn(3,3,2)), tuple(o/3 for o in family(3, 1.2, dims=6))
    kept = solve(f, z, args, method=Averaged(after), max_iter=8, keep=range(9)).kept
    for n in range(after, 8):
        late = [torch.stack(same).mean(0) for same in zip(*[parts(kept[i]) for i in range(after+1, n+1)])]
        before = rebuild(z, late) if n > after else kept[n]
        for a,b in zip(parts(f(before, *args)), parts(kept[n+1])): assert_close(a, b)

def test_mean_begins_after_plain_repetition():
    A,b = family(4, 1.1)
    z = torch.zeros_like(b)
    for after in (0, 3):
        plain,mean = [solve(lin, z, (A,b), method=m, max_iter=12, keep=range(13)).kept for m in (Picard(), Averaged(after))]
        for n in range(after + 3): assert torch.equal(plain[n], mean[n])
        assert not torch.allclose(plain[after+3], mean[after+3])

def test_mean_of_one_image_is_that_of_its_batch():
    args = tame_to_steep()
    kw = dict(method=Averaged(2), tol=1e-3, max_iter=60)
    sol = solve(tanh, torch.zeros(5,12), args, **kw)
    assert sol.n.unique().numel() > 1
    for i in range(5):
        one = solve(tanh, torch.zeros(1,12), take(args, torch.tensor([i])), **kw)
        assert one.n[0]==sol.n[i]
        assert_close(one.z[0], sol.z[i])

def test_rotation_settles_in_the_mean():
    def turn(z): return torch.stack([3-z[...,1], z[...,0]-1], -1)
    far = [(solve(turn, torch.tensor([[3.,0.]]), method=m, max_iter=100).z - torch.tensor([2.,1.])).norm() for m in (Picard(), Averaged())]
    assert far[0] > 1.4 and far[1] < .05

def test_infinite_norm_is_no_convergence():
    "In single precision the norm of a far state overflows before the state does"
    far = torch.full((1,3), 1.2e19).float()
    assert far.norm().isinf() and (far/2).norm().isfinite()
    assert per_image(far/2, far).rel.isinf()

def test_cosine_from_everywhere():
    sol = solve(torch.cos, torch.tensor([[0.1], [0.7390851], [3.], [100.]]), tol=1e-10, max_iter=100)
    assert sol.converged.all()
    assert_close(sol.z, torch.full((4,1), 0.7390851332151607), atol=1e-9, rtol=0)

def test_relative_rule_is_blind_at_zero():
    stuck = solve(lambda z: z/2, torch.ones(1,3), tol=1e-6, max_iter=30)
    assert stuck.status.tolist() == [Status.MAX_ITER]
    assert_close(stuck.trace.rel, torch.ones(30,1,1), atol=1e-2, rtol=0)

def test_a_measure_sees_what_a_norm_over_mixed_units_hides():
    "Pixels and the logarithm of a size in one part: the pixels settle, and the logarithm is wrong by five"
    def mix(z): return torch.stack([300 + 0.2*(z[:,0]-300), 8 + 0.95*(z[:,1]-8)], -1)
    def by_column(z, fz): return per_image(z.unbind(-1), fz.unbind(-1))
    fooled = solve(mix, torch.zeros(1,2), tol=1e-3, max_iter=200)
    seeing = solve(mix, torch.zeros(1,2), tol=1e-3, max_iter=200, measure=by_column)
    assert fooled.converged.item() and fooled.z[0,1] < 3
    assert seeing.converged.item() and seeing.z[0,1] > 7.8

def rotations(n=6):
    "Linear maps that shrink by a known rate each"
    torch.manual_seed(0)
    rho = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    Q = torch.linalg.qr(torch.randn(n,12,12)).Q
    return (rho[:,None,None]*Q, torch.randn(n,12)), torch.zeros(n,12)

def test_the_count_agrees_with_theory():
    "Each application of a scaled rotation shrinks the move by its scale; stopped by absolute moves"
    (A,b),zeros = rotations()
    def absolute(z, fz):
        r = per_image(z, fz)
        return Residual(r.abs, r.abs)
    rho = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    sol = solve(lin, zeros, (A,b), tol=1e-8, max_iter=1000, measure=absolute)
    theory = 1 + ((1e-8/b.norm(dim=1)).log()/rho.log()).ceil()
    assert sol.n.tolist() == theory.long().tolist()

def test_kept_states_agree_with_shorter_runs():
    args,zeros = rotations()
    sol = solve(lin, zeros, args, tol=1e-6, max_iter=60, keep=(0,1,3,60))
    assert list(sol.kept) == [0,1,3,60]
    assert torch.equal(sol.kept[0], zeros)
    assert_close(sol.kept[3], solve(lin, zeros, args, max_iter=3).z, atol=1e-12, rtol=0)
    assert torch.equal(sol.kept[60], sol.z)
    with pytest.raises(ValueError, match='keep'): solve(lin, zeros, args, max_iter=5, keep=(1,6))

def test_plain_run_makes_the_same_few_tensors_at_any_length():
    from torch.overrides import TorchFunctionMode
    class CountCalls(TorchFunctionMode):
        n = 0
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.n += isinstance(out, Tensor)
            return out
    args,zeros = rotations()
    def added(steps):
        with CountCalls() as plain:
            z = zeros
            for _ in range(steps): z = lin(z, *args)
        with CountCalls() as ours: sol = solve(lin, zeros, args, max_iter=steps)
        assert torch.equal(sol.z, z)
        return ours.n - plain.n
    assert added(5) == added(100) <= 12

def test_bad_input_is_named():
    rates,z0 = torch.tensor([0.1, 0.5, 0.8, 0.9])[:,None], torch.zeros(4,8)
    def shrink(z, rate=rates): return 1 + rate*(z-1)
    with pytest.raises(ValueError, match='4 images'): solve(shrink, z0, (rates[:3],))
    with pytest.raises(ValueError, match='through args'): solve(shrink, z0[:1], tol=1e-3)
    with pytest.raises(TypeError, match='tolerance'): solve(shrink, z0, (rates,), tolerance=1e-3)

def test_lost_images_keep_what_they_became():
    starts = torch.tensor([[0.], [1.49], [1.51], [math.nan]])
    sol = solve(lambda z: (z**2 + 0.75)/2, starts, tol=1e-6, max_iter=60)
    assert sol.z[2].isinf() and sol.z[3].isnan()
    assert sol.n[3] == 1

def test_rotation_that_picard_circles():
    def turn(z): return torch.stack([3-z[...,1], z[...,0]-1], -1)
    assert solve(turn, torch.tensor([[3.,0.]]), tol=1e-6, method=Anderson()).converged.all()

@pytest.mark.parametrize('method', [Picard(), Picard(0.5), Anderson(), Broyden()], ids=ids)
def test_answer_that_is_found_stays_found(method):
    sol = solve(lambda z: torch.full_like(z, 2.), torch.zeros(2,3), method=method, max_iter=30)
    assert torch.equal(sol.z, torch.full((2,3), 2.))

@pytest.mark.parametrize('method', [Anderson(), Broyden()], ids=ids)
def test_autocast_does_not_reach_the_methods(method):
    def bounce(z): return (2 + 0.9*z.flip(-1)).sin()
    torch.manual_seed(0)
    z = torch.rand(2,3).float()
    with torch.autocast('cpu', torch.bfloat16): low = solve(bounce, z, method=method).z
    assert torch.equal(low, solve(bounce, z, method=method).z)

TABLE = [Picard(), Picard(0.7), Anderson(), Anderson(m=10, lam=1e-8), Broyden(5), Broyden(10)]

def tame_to_steep():
    A,b = family(5, 1., dims=12)
    return A*torch.tensor([0.1, 0.5, 0.9, 1.1, 1.4])[:,None,None], b

@pytest.mark.parametrize('method', TABLE, ids=ids)
def test_steep_maps_one_by_one(method):
    args = tame_to_steep()
    kw = dict(tol=1e-9, max_iter=80, method=method)
    sol = solve(tanh, torch.zeros(5,12), args, **kw)
    for i in range(5):
        one = solve(tanh, torch.zeros(1,12), take(args, torch.tensor([i])), **kw)
        assert one.n[0] == sol.n[i] and one.status[0] == sol.status[i]
        assert_close(one.z[0], sol.z[i], atol=1e-9, rtol=0)

@pytest.mark.parametrize('method', TABLE, ids=ids)
def test_pixels_or_metres(method):
    "Two parts that influence each other, the second in the hundreds"
    def pair(z, A, b):
        y = lin(z.content, A, b)
        c = y.tanh()
        return Two(c, 300 + 40*c[:, :2] + 0.3*(z.place-300) + 5*y[:, :2].sin())
    def metres(z): return Two(z.content, z.place/4000)
    def pixels(z): return Two(z.content, z.place*4000)
    args,z = tame_to_steep(), Two(torch.zeros(5,12), torch.zeros(5,2))
    a = solve(pair, z, args, max_iter=12, method=method).z
    c = pixels(solve(lambda z, *args: metres(pair(pixels(z), *args)), metres(z), args, max_iter=12, method=method).z)
    assert_close(a.content, c.content, atol=1e-6, rtol=0)
    assert_close(a.place, c.place, atol=1e-4, rtol=0)

@pytest.mark.parametrize('method', TABLE, ids=ids)
def test_crowd_of_queries_settles(method):
    speed = torch.tensor([0.2, 0.5, 0.7, 0.9]).view(1,4,1)
    def crowd(z):
        other = z.content.mean(1, keepdim=True)
        content = 1 + speed*(z.content-1) + 0.05*(other-1)
        return Two(content, 200 + 0.4*(z.place-200) + z.content[...,:2])
    z = Two(torch.zeros(1,4,6), torch.zeros(1,4,2))
    sol = solve(crowd, z, tol=1e-3, max_iter=100, measure=per_query, method=method)
    assert sol.converged.all()
    assert per_query(sol.z, crowd(sol.z)).rel.amax() < 5e-2

# ---------------------------------------------------------------- queries

@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_settled_queries_are_held(method):
    f,z,args = problem(5, 6)
    tol = 1e-4
    sol = solve(f, z, args, method=method, tol=tol, max_iter=80, measure=per_query, keep=range(81))
    assert sol.converged.all() and sol.trace.rel.shape[1:]==(5,3,2)
    settled = sol.trace.rel.amax(-1) <= tol
    assert torch.equal(settled.sort(0).values, settled)     # once settled, always settled
    for i in range(5):
        for q in range(3):
            first = settled[:,i,q].nonzero()[0].item() + 1
            for k in range(first, 81): assert torch.equal(sol.kept[k].content[i,q], sol.z.content[i,q])
    assert (sol.n >= solve(f, z, args, method=method, tol=tol, max_iter=80).n).sum() >= 4

# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_solve_can_be_unrolled(method):
    f,z,args = problem(4, 8)
    A,b = args[0].requires_grad_(), args[1].requires_grad_()
    grads = []
    for rows in ([torch.arange(4)], torch.arange(4)[:,None]):
        out = [solve(f, take(z, r), take((A,b), r), method=method, tol=1e-5, max_iter=30) for r in rows]
        grads.append(torch.autograd.grad(sum((p**2).sum() for s in out for p in s.z), (A,b)))
    for x,y in zip(*grads): assert_close(x, y, atol=1e-5, rtol=1e-6)

def full_jacobian(f, z, args):
    sizes = [p[0].numel() for p in parts(z)]
    def flat(x):
        state = rebuild(z, [c.view_as(p) for c,p in zip(x.split(sizes), parts(z))])
        return torch.cat([p.flatten() for p in parts(f(state, *args))])
    return torch.autograd.functional.jacobian(flat, torch.cat([p.flatten() for p in parts(z)]))

@pytest.mark.parametrize('seed', range(4))
def test_products_radius_and_penalty(seed):
    torch.manual_seed(seed)
    f,z,args = problem(3, seed)
    z = solve(f, z, args, tol=1e-10, max_iter=500).z
    v = Two(*[torch.randn_like(p) for p in z])
    radius,exact = spectral_radius(f, z, args, n_iter=600), []
    for i in range(3):
        one,a = take((z, args), torch.tensor([i]))
        J,flat = full_jacobian(f, one, a), lambda z: torch.cat([p[i].flatten() for p in z])
        assert_close(flat(pullback(f, z, args)[1](v)), J.T@flat(v))
        assert_close(flat(by_differences(f, z, args)(v)), J@flat(v), atol=1e-3, rtol=1e-3)
        assert abs(torch.linalg.eigvals(J).abs().max() - radius[i]) < 0.02*radius[i]
        S = torch.cat([p.square().mean().sqrt().expand(p.numel()) for p in one])
        exact.append((J/S[:,None]*S).square().sum()/len(S))
    for product in (by_autograd, by_differences):
        assert abs(jac_penalty(f, z, args, draws=400, product=product) / torch.stack(exact).mean() - 1) < 0.15

@pytest.mark.parametrize('product', [by_autograd, by_differences])
def test_penalty_gradient_is_the_derivative(product):
    A,b = family(3, 0.9, 6, 1)
    z = solve(tanh, torch.zeros_like(b), (A,b), tol=1e-12, max_iter=500).z
    def value(A):
        torch.manual_seed(0)
        return jac_penalty(tanh, z, (A,b), draws=2, product=product)
    A.requires_grad_()
    grad, = torch.autograd.grad(value(A), A)
    for i in ((0,0,0), (1,2,3), (2,5,1)):
        d = torch.zeros_like(A)
        d[i] = 1e-6
        assert_close((value(A+d) - value(A-d))/2e-6, grad[i], atol=1e-7, rtol=1e-6)

# ---------------------------------------------------------------- other people's solvers

def scipy_states(name, f, z0, steps, **kw):
    "`f` at the states that SciPy goes through"
    import scipy.optimize
    seen = []
    F = lambda x: f(torch.from_numpy(x)[None])[0].numpy() - x
    kw = dict(iter=steps, line_search=None, f_tol=0, callback=lambda x, fx: seen.append(x+fx)) | kw
    try: getattr(scipy.optimize, name)(F, z0.numpy(), **kw)
    except scipy.optimize.NoConvergence: pass
    return torch.from_numpy(np.stack(seen))

CASES = [('anderson', Anderson(5, 1e-4), dict(M=5, w0=0.01, alpha=1.)),
         ('anderson', Anderson(2, 1e-2, 0.5), dict(M=2, w0=0.1, alpha=0.5)),
         ('broyden1', Broyden(100), dict(alpha=1.)),
         ('broyden1', Broyden(4), dict(alpha=1., max_rank=4)),
         ('broyden1', Broyden(6, beta=0.5), dict(alpha=0.5, max_rank=6))]

@pytest.mark.parametrize('name,method,kw', CASES, ids=[f'{m}' for _,m,_ in CASES])
@pytest.mark.parametrize('f', [lin, tanh])
@pytest.mark.parametrize('seed', range(3))
def test_scipy_iterates(name, method, kw, f, seed):
    pytest.importorskip('scipy')
    A,b = family(1, 0.8, dims=20, seed=seed)
    theirs = scipy_states(name, lambda z: f(z, A, b), torch.zeros(20), 14, **kw)
    ours = solve(f, torch.zeros(1,20), (A,b), method=method, max_iter=15, keep=range(2,16)).kept
    for x,k in zip(theirs, range(2,16)): assert_close(ours[k][0], x, atol=1e-8, rtol=1e-7)

@pytest.mark.parametrize('seed', range(3))
def test_torchdeq_finds_the_same(seed):
    solvers = pytest.importorskip('torchdeq.solver')
    A,b = family(4, 0.9, dims=12, seed=seed)
    f,z0 = (lambda z: tanh(z, A, b)), torch.zeros(4,12)
    for name,method in (('fixed_point_iter', Picard()), ('anderson', Anderson()), ('broyden', Broyden())):
        theirs = solvers.get_solver(name)(f, z0, max_iter=200, tol=1e-8, stop_mode='rel')[0]
        ours = solve(tanh, z0, (A,b), method=method, tol=1e-8, max_iter=200)
        assert ours.converged.all()
        assert_close(ours.z, theirs.view_as(ours.z), atol=1e-6, rtol=0)

# ---------------------------------------------------------------- accelerators

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('method', METHODS, ids=ids)
def test_cuda(method):
    f,z,args = problem(6, 0)
    to = lambda t: rebuild(t, [p.cuda() for p in t])
    a,b = [solve(f, *x, method=method, tol=1e-7, max_iter=60) for x in ((z, args), (to(z), to(args)))]
    assert torch.equal(a.n, b.n.cpu()) and torch.equal(a.status, b.status.cpu())
    close(a.z, Two(*[p.cpu() for p in b.z]), atol=1e-8, rtol=1e-8)
    zc,ac = to(z), to(args)
    solve(f, zc, ac, max_iter=20, keep=(1,3,6))             # warm up what allocates
    torch.cuda.set_sync_debug_mode('error')                 # a plain run must never wait for the device
    try: solve(f, zc, ac, max_iter=20, keep=(1,3,6), method=Picard())
    finally: torch.cuda.set_sync_debug_mode('default')
