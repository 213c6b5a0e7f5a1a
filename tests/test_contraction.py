"Callbacks that teach a step to settle, and what `benchmarks/contraction.py` measures"
import sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelEpochException
from deqdet.data import Target, det_dls, synth_coco
from deqdet.decoder import Pred, Stacked, State
from deqdet.equilibrium import Settled
from deqdet.evaluate import APCallback
from deqdet.families.adamixer import AdaMixer
from deqdet.families.sparse_rcnn import SparseRCNN
from deqdet.learner import det_learner
from deqdet.training.contraction import Contract, Later, RandomSteps, jacobian, of_length, prolonged, stretch
from deqdet.training.denoise import steps_of
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))

SMALL = dict(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, n_queries=9, grid=(3,3,.4), width=32, heads=4, hidden=64)
PLAN = Settled(steps=3, supervise=(1,3), init_steps=1, perturb=None)
MIXER = AdaMixer(**SMALL, norm_groups=8, groups=2, points=(4,), out_points=8, strategy=PLAN)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return synth_coco(tmp_path_factory.mktemp('c')/'shapes', n_train=8, n_valid=4, size=64, seed=1)

def learner(folder, hyper=MIXER, cbs=()):
    torch.manual_seed(0)
    dls = det_dls(folder, bs=4, num_workers=0, device='cpu')
    learn = det_learner(dls, hyper.build(), 'tiny', cbs=list(cbs))
    learn.remove_cb(APCallback)
    return learn

def fitted(*args, **kwargs):
    learn = learner(*args, **kwargs)
    with learn.quiet(): learn.fit(1)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_without_weight_or_share_training_is_the_same_bit_for_bit(folder):
    plain = weights(fitted(folder))
    assert torch.equal(plain, weights(fitted(folder, cbs=[Contract(0.), Later(0.)])))
    for cb in (Contract(1.), Later(1.)): assert not torch.equal(plain, weights(fitted(folder, cbs=[cb])))

FAMILIES = {'stack': replace(MIXER, strategy=Stacked(2)), 'recomputed': replace(MIXER, strategy=replace(PLAN, recompute=True)),
            'roi': SparseRCNN(**SMALL, strategy=PLAN)}

@pytest.mark.parametrize('name,penalty', [('stack', stretch), ('recomputed', jacobian), ('roi', jacobian)])
def test_any_family(folder, name, penalty):
    seen = []
    def spy(f, z, fz):
        seen.append(penalty(f, z, fz))
        return seen[-1]
    fitted(folder, FAMILIES[name], [Contract(.1, spy)])
    assert len(seen)==2 and all(o.isfinite() and o > 0 and o.requires_grad for o in seen)

def test_a_penalty_in_every_second_batch(folder):
    "Where it falls, it weighs twice: with the first batch alone, one of every two is one of every single one with twice the weight"
    seen = []
    def spy(f, z, fz):
        seen.append(stretch(f, z, fz))
        return seen[-1]
    learn = learner(folder, cbs=[Contract(.1, spy, every=2)])
    with learn.quiet(): learn.fit(3)
    assert len(seen)==3 # of six batches
    cut = lambda **o: weights(fitted(folder, cbs=[Contract(**o), After(1)]))
    assert torch.equal(cut(weight=.1, every=2), cut(weight=.2)) and not torch.equal(cut(weight=.1, every=2), cut(weight=.1))

class After(Callback):
    "Ends the epoch after `n` batches"
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.train_iter >= self.n: raise CancelEpochException

class Halt(Callback):
    def after_loss(self): raise KeyboardInterrupt

class Watch(Callback):
    "Plans in training and in validation"
    def before_fit(self): self.seen = {True: [], False: []}
    def after_pred(self): self.seen[self.training].append(self.model.decoder.plan)

def test_nothing_is_left_of_them(folder):
    learn = learner(folder, cbs=[Contract(), Later(1.)])
    with pytest.raises(KeyboardInterrupt), learn.quiet(): learn.fit(1, cbs=Halt())
    assert learn.model.decoder.plan == PLAN
    assert not any(s._forward_hooks for s in steps_of(learn.model.decoder))
    with learn.quiet(): learn.validate() # outside of a fit

def test_later_prolongs_the_path_of_training_batches_only(folder):
    watch = fitted(folder, cbs=[Later(1., 5, 5), Watch()]).watch
    assert watch.seen[True]==[prolonged(PLAN, 5)]*2 and watch.seen[True][0].supervise==(1, 3, 5)
    assert watch.seen[False]==[PLAN]

def test_random_steps_draw_a_length_for_each_training_batch(folder):
    watch = fitted(folder, cbs=[RandomSteps(1, 8), Watch()]).watch
    lengths = [o.steps for o in watch.seen[True]]
    assert watch.seen[True]==[of_length(PLAN, n) for n in lengths] and all(1 <= n <= 8 for n in lengths)
    assert watch.seen[False]==[PLAN]
    learn = learner(folder, cbs=[RandomSteps(1, 8)])
    learn.random_steps.before_fit()
    drawn = []
    for _ in range(100):
        learn.random_steps.before_batch()
        drawn.append(learn.model.decoder.plan.steps)
    assert set(drawn)==set(range(1, 9))

def linear(A): return lambda z: type(z)(*[p @ A for p in z])

def state(B=3): return State(torch.randn(B, 5, 4, dtype=torch.double), torch.randn(B, 5, 4, dtype=torch.double))

def test_stretch_of_a_batch_is_the_mean_of_its_images():
    torch.manual_seed(0)
    f,z = linear(torch.randn(4, 4, dtype=torch.double)),state()
    one = [stretch(f, o, f(o)) for o in (State(*[p[i:i+1] for p in z]) for i in range(3))]
    torch.testing.assert_close(stretch(f, z, f(z)), torch.stack(one).mean())

@pytest.mark.parametrize('penalty', (stretch, jacobian))
def test_gradient(penalty):
    torch.manual_seed(0)
    z = state()
    A = .3*torch.randn(4, 4, dtype=torch.double)
    start = linear(A)(z)
    def value(A):
        torch.manual_seed(1)
        # the last move is cut from the graph, so that it may not move in differences either
        return penalty(linear(A), z, start)
    assert torch.autograd.gradcheck(value, A.requires_grad_(), eps=1e-6, atol=1e-5)

def test_a_settled_state_has_no_stretch():
    z = state()
    assert stretch(lambda z: z, z, z).item()==0

# ---- the benchmark

def test_what_is_compared_between_two_times():
    from contraction import FAR, NEAR, changes, doubles, mixed, overlaps
    box = torch.tensor([[0,0,10,10], [0,0,10,9], [50,50,60,60]]).float()
    near = Pred(torch.tensor([[[3.], [-3.], [2.]]]), box[None])
    far = Pred(torch.tensor([[[1.], [3.], [-3.]]]), box[[0,0,2]][None])
    found = changes({NEAR: near, FAR: far})
    assert found['near_live']==[2] and found['far_live']==[2] and found['near_doubles']==[0] and found['far_doubles']==[1]
    torch.testing.assert_close(torch.tensor(found['overlap']), torch.tensor([1., .9, 1.]))
    assert doubles(box[:0])==0
    both = mixed({NEAR: near, FAR: far}, NEAR, FAR)
    assert both.boxes is near.boxes and both.logits is far.logits
    truth = Target(box[None, [0,2]], torch.tensor([[0,-1]]), torch.tensor([[64,64]]), torch.tensor([0]), torch.tensor([[64,64]]))
    (best,first), = overlaps(far._replace(boxes=box[None]), truth)
    assert abs(best - 1) < 1e-6 and abs(first - .9) < 1e-6 # the best score lies on the second box
