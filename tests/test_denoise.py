"Denoising: noisy truth as further states, which never reach the matching"
from dataclasses import replace
import pytest, torch
from fastai.callback.core import Callback
from deqdet.data import Target, det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.families.sparse_rcnn import SparseRCNN
from deqdet.learner import det_learner
from deqdet.training import denoise
from deqdet.training.denoise import Denoise, can_denoise, denoising_loss, noisy_boxes, steps_of
from deqdet.training.recipes import recipes
from deqdet.zoo import create_detector

LITE = AdaMixer(body='', channels=(8, 8, 8, 8), feat_width=32, norm_groups=4, n_queries=16, grid=(4, 4, .3), width=32, heads=4,
                points=(4,), out_points=8, hidden=32, n_classes=3, strategy=Settled(steps=2, supervise=(2,), init_steps=0, recompute=False))


@pytest.fixture
def case():
    "A detector, its features, sizes and a target of two images, the second with padding"
    torch.manual_seed(0)
    model = LITE.build().train()
    feats = model.pyramid([torch.randn(2, 8, 96//s, 96//s) for s in (4, 8, 16, 32)])
    sizes = torch.tensor([[96, 96]]*2)
    boxes = torch.tensor([[[5., 5, 40, 30], [50, 40, 90, 90]], [[20, 20, 60, 70], [0, 0, 0, 0]]])
    target = Target(boxes, torch.tensor([[0, 2], [1, -1]]), sizes, torch.arange(2), sizes)
    return model, feats, sizes, target


@pytest.fixture
def exact(monkeypatch): monkeypatch.setattr(denoise, 'noisy_boxes', lambda boxes: boxes)


def test_noise_stays_within_its_bounds():
    torch.manual_seed(0)
    boxes = torch.tensor([[[10., 20, 50, 40]]]).expand(500, 1, 4)
    noisy = noisy_boxes(boxes)
    sides = noisy[..., 2:] - noisy[..., :2]
    centre = (noisy[..., :2] + noisy[..., 2:])/2
    assert (sides >= torch.tensor([40., 20])*2**-.5 - 1e-3).all() and (sides <= torch.tensor([40., 20])*2**.5 + 1e-3).all()
    assert ((centre - torch.tensor([30., 30])).abs() <= torch.tensor([12., 6]) + 1e-3).all()
    assert sides.std(0).min() > 1 and centre.std(0).min() > 1


def test_groups_do_not_see_each_other(case, exact):
    "Without noise, four copies cost what one does"
    torch.testing.assert_close(denoising_loss(*case, groups=4), denoising_loss(*case, groups=1), rtol=1e-4, atol=1e-5)


def test_more_padding_changes_little(case, exact):
    "A place without an object has no term of its own"
    model, feats, sizes, target = case
    boxes = torch.cat([target.boxes, torch.zeros(2, 1, 4)], 1)
    labels = torch.cat([target.labels, torch.full((2, 1), -1)], 1)
    padded = target._replace(boxes=boxes, labels=labels)
    a = denoising_loss(model, feats, sizes, target, 1)
    b = denoising_loss(model, feats, sizes, padded, 1)
    torch.testing.assert_close(a, b, rtol=.05, atol=0) # attention meets one more tiny box


def test_no_objects_cost_nothing(case):
    model, feats, sizes, target = case
    none = target._replace(labels=torch.full((2, 2), -1))
    assert denoising_loss(model, feats, sizes, none).item()==0


def test_gradients_reach_both_steps_and_the_contents(case):
    model = case[0]
    denoising_loss(*case).backward()
    for part in (model.decoder.init.cls, model.decoder.step.cls, model.decoder.step.reg, model.queries.content, model.pyramid.neck):
        grads = [p.grad for p in part.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert any(g.abs().max() > 0 for g in grads)


def test_true_boxes_cost_less_than_noisy_ones(case, monkeypatch):
    "With boxes that do not move yet, noise is what the box terms see"
    noisy = denoising_loss(*case, groups=8)
    monkeypatch.setattr(denoise, 'noisy_boxes', lambda boxes: boxes)
    assert denoising_loss(*case, groups=8) < noisy


@pytest.mark.parametrize('hyper', [LITE, replace(LITE, strategy=Stacked(3))], ids=['equilibrium', 'stack'])
def test_families_and_strategies(hyper):
    model = hyper.build()
    assert can_denoise(model)
    assert len(steps_of(model.decoder))==hyper.strategy.stages


def test_deformable_detr_is_left_alone():
    assert not can_denoise(create_detector('deformable_detr_tiny', n_classes=2))


def test_deformable_detr_refuses_noise(dls):
    "It was a RuntimeError on shapes in the first batch"
    learn = det_learner(dls, create_detector('deformable_detr_tiny', vocab=list(dls.vocab)))
    with pytest.raises(TypeError, match='Denoise'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Denoise())


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = synth_coco(tmp_path_factory.mktemp('denoise'), n_train=4, n_valid=2, size=64)
    return det_dls(path, bs=2, size=64, num_workers=0, device='cpu')


def test_only_recipes_that_ask_for_it_have_it(dls):
    model = create_detector('deqdet_tiny', vocab=dls.vocab)
    assert not any(isinstance(o, Denoise) for o in det_learner(dls, model).cbs)
    found = [o for o in det_learner(dls, model, 'finetune').cbs if isinstance(o, Denoise)]
    assert len(found)==1 and found[0].groups==recipes['finetune'].denoise > 0


class Seen(Callback):
    "The loss that goes backward, and that of the matching, at every update"
    order, run_valid = Denoise.order + .5, False
    def before_fit(self): self.pairs = []
    def after_loss(self):
        terms = self.loss_func.terms
        main = sum(terms[k] for k in ('cls', 'l1', 'giou'))
        self.pairs.append((self.loss_grad.item(), float(main)))


def test_the_learner_adds_it_to_the_main_loss(dls):
    "The terms that are recorded are those of the main loss; the loss has more"
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=dls.vocab)
    learn = det_learner(dls, model, 'tiny', cbs=[Denoise(2), Seen()])
    with learn.quiet(): learn.fit(1, lr=0.)
    assert learn.seen.pairs and all(whole > main + .1 for whole,main in learn.seen.pairs)
    assert learn.denoise.feats is None
    assert not model.pyramid._forward_hooks


def test_without_it_the_loss_is_the_main_one(dls):
    torch.manual_seed(0)
    learn = det_learner(dls, create_detector('deqdet_tiny', vocab=dls.vocab), 'tiny', cbs=Seen())
    with learn.quiet(): learn.fit(1, lr=0.)
    assert all(abs(whole - main) < 1e-4*main for whole,main in learn.seen.pairs)
