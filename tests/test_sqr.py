"Recollection: regressions on a path, windows, groups as one batch, and the plain loop's answers and gradients"
import copy
from dataclasses import replace
import pytest
import torch
from torch import nn
from deqdet.data import Target
from deqdet.decoder import Pred, Queries, Stacked, State
from deqdet.mixer import MixerStep
from deqdet.families.sparse_rcnn import SparseRCNN
from deqdet.families.adamixer import AdaMixer
from deqdet.sqr import Recollected, apart, follow, side_by_side, stage_regressions, windows

TRUTH = Target(torch.tensor([[[10., 10, 30, 30]]]), torch.tensor([[0]]), torch.tensor([[64, 64]]), torch.tensor([0]))
GHOST = [40., 40, 60, 60]
SIZES = torch.tensor([[96, 128], [90, 100]])


def close(a, b, eps): return torch.allclose(a, b, rtol=1e-5, atol=eps)


def say(scores, boxes): return Pred(torch.tensor(scores).logit()[None, :, None], torch.tensor(boxes)[None])


class Said:
    "Three stages at one object: query 0 has it and fades, query 1 sees a ghost and is the surer of it the longer it looks"
    stages = [say([.5, .2], [[14., 10, 30, 30], GHOST]), say([.9, .3], [[10., 10, 30, 31], GHOST]),
              say([.8, .6], [[12., 10, 30, 30], GHOST])]
    def trajectory(self, images, sizes, steps=None): return [(None, p) for p in self.stages]


def test_scores_of_every_stage():
    scores, _, own = follow(Said.stages, TRUTH, 0)
    assert close(scores, torch.tensor([[.5, .2], [.9, .3], [.8, .6]]), 1e-5)
    assert own.tolist() == [0, -1]


def test_regressions_with_a_margin_and_a_least_score():
    batches = [(None, TRUTH.size, TRUTH)]
    found = stage_regressions(Said(), batches)
    assert found == dict(fading=dict(rate=1., by_stage=[0., 1.], of=1), exacerbation=dict(rate=1., by_stage=[1., 1.], of=1))
    assert stage_regressions(Said(), batches, margin=.15)['fading']['rate'] == 0
    assert stage_regressions(Said(), batches, min_score=.7)['exacerbation']['of'] == 0


def test_windows_of_seven_stages_are_as_published():
    assert windows(7) == ((0, 0, 1, 2, 4, 7, 12), (1, 2, 4, 7, 12, 20, 33))
    assert Recollected().stages == 6 and Recollected(*windows(7)).stages == 7


@pytest.mark.parametrize('starts, ends, said', [((0, 0), (1, 3), 'must lie in the 2 states made so far'), ((0, 1), (1, 1), '1..1')])
def test_windows_of_states_that_do_not_exist(starts, ends, said):
    with pytest.raises(ValueError, match=said): Recollected(starts, ends)


def make_step():
    step = MixerStep(3, width=32, feat_width=16, groups=2, points=9, out_points=8, heads=4, hidden=64)
    for p in (step.reg[-1].weight, step.mixing.params.weight, step.sampler.offsets.weight): nn.init.normal_(p, std=.03)
    return step


@pytest.fixture
def stack():
    "Six steps, features, and first queries"
    torch.manual_seed(0)
    steps = [make_step() for _ in range(6)]
    return steps, tuple(torch.randn(2, 16, 96//s, 128//s) for s in (4, 8, 16, 32)), Queries(6, 32)(SIZES)


def loop(steps, starts, ends, state, feats):
    "Recollection as it is written down"
    states, preds = [state], []
    for step, a, b in zip(steps, starts, ends):
        for z in states[a:b]:
            states.append(step(z, feats))
            preds.append(step.read(states[-1]))
    return preds


def test_rows_of_an_image_lie_side_by_side(stack):
    steps, feats, z0 = stack
    two = [steps[0](z0, feats), steps[1](steps[0](z0, feats), feats)]
    both = side_by_side(two)
    assert both.content.shape == (4, 6, 32)
    rows = [z.content[b] for b in range(2) for z in two]
    for a, b in zip(both.content, rows): assert torch.equal(a, b)
    for a, b in zip(apart(both, 2), two):
        assert torch.equal(a.content, b.content)
        assert type(a) is State


def test_one_batch_answers_as_the_loop(stack):
    steps, feats, z0 = stack
    plain, ours = loop(steps, *windows(6), z0, feats), Recollected()(steps)(z0, feats)
    assert len(ours) == len(plain) == 32
    for a, b in zip(ours, plain):
        assert close(a.boxes, b.boxes, 1e-2)
        assert close(a.logits, b.logits, 1e-3)


@pytest.mark.parametrize('recompute, shares', [(False, True), (True, True), (False, False)])
def test_gradients_of_the_loop_in_float64(stack, recompute, shares):
    "With recomputing too, and for a step that does not share features"
    steps, feats, z0 = stack
    steps, z0, feats = copy.deepcopy(steps[:4]), State(*[t.double().detach() for t in z0]), [f.double() for f in feats]
    for step in steps: step.double()
    params = [p for step in steps for p in step.parameters()]
    def grads(preds): return torch.autograd.grad(sum(p.logits.sin().sum() + p.boxes.sin().sum() for p in preds), params)
    want = grads(loop(steps, *windows(4), z0, feats))
    for step in steps: step.shares_features = shares
    ours = grads(Recollected(*windows(4), recompute=recompute)(steps)(z0, feats))
    for a, b in zip(ours, want): assert close(a, b, 1e-9*(1 + b.abs().max().item()))


FED = dict(body='', channels=(16,)*4, feat_width=16, width=32, heads=4, hidden=64, n_queries=6)
FAMILIES = dict(adamixer=AdaMixer(**FED, norm_groups=4, groups=2, points=(9,), out_points=8), sparse_rcnn=SparseRCNN(**FED, dynamic=8))


@pytest.mark.parametrize('family', FAMILIES)
def test_any_family_recollects_and_its_weights_fit_the_stack(family, stack):
    _, feats, _ = stack
    hyper, maps = FAMILIES[family], list(feats)
    model = replace(hyper, strategy=Recollected(*windows(3))).build()
    preds = model(maps, SIZES)
    assert len(preds) == 6
    sum(p.logits.sum() + p.boxes.sum() for p in preds).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    same = replace(hyper, strategy=Stacked(3)).build()
    same.load_state_dict(model.state_dict())
    assert torch.equal(same.eval()(maps, SIZES)[-1].boxes, model.eval()(maps, SIZES)[-1].boxes)
