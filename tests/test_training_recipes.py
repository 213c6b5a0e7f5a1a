"Recipes are the published ones, and their multiples survive whatever sets a learning rate"
from dataclasses import replace
import pytest, torch
from fastai.optimizer import OptimWrapper
from deqdet.families.adamixer import AdaMixer
from deqdet.training.recipes import SECTIONS, DetOpt, Recipe, param_groups, recipes, section_of
from deqdet.zoo import create_detector

@pytest.fixture(scope='module')
def small():
    hyper = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4,
                     grid=(2,2,.4), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=32)
    return hyper.build()

def rates(opt, k): return [h[k] for h in opt.hypers]

def test_warmup_climbs_to_the_full_rate():
    r = Recipe()
    assert [r.factor(0, 0, 1), r.factor(499, 0, 1), r.factor(499, 7, 1)]==[.001, 1., 1.]

def test_rate_falls_at_the_given_epochs():
    assert [Recipe().factor(10**5, e, 1) for e in (7,8,10,11)]==pytest.approx([1, .1, .1, .01], abs=1e-5)

def test_no_warmup_is_the_full_rate_at_once():
    assert [replace(Recipe(), warmup=0).factor(i, 0, 9) for i in (0,1)]==[1., 1.]

def test_a_short_fit_gets_a_short_warmup():
    "A twentieth of the updates, at most the recipe's, and none stays none"
    r = replace(Recipe(), warmup=75)
    assert [r.fitted(n).warmup for n in (1, 20, 80, 1500, 90000)]==[1, 1, 4, 75, 75]
    assert replace(r, warmup=0).fitted(80).warmup==0
    assert replace(r.fitted(80), warmup=75)==r

def test_drops_come_at_the_same_parts():
    assert [Recipe().fitted(10**5, n).drops for n in (3, 6, 12, 36)]==[(2,2), (4,5), (8,11), (24,33)]
    assert Recipe().fitted(10**5)==Recipe() and recipes['finetune'].fitted(10**5, 99).drops==()

def test_unknown_numbers_are_refused():
    with pytest.raises(TypeError, match='epoch'): Recipe(epoch=3)

def test_every_parameter_is_in_a_group_or_frozen():
    with torch.device('meta'): model = AdaMixer().build()
    def size(ps): return sum(p.numel() for p in ps)
    frozen = size(p for p in model.parameters() if not p.requires_grad)
    assert frozen > 0
    assert sum(size(g.params) for g in param_groups(model)) + frozen==size(model.parameters())
    assert [g.section for g in param_groups(model, recipes['1x'].mults)]==['body', 'rest', 'decoder']

def test_fastais_wrapper_loses_the_multiples(small):
    groups = param_groups(small, recipes['1x'].mults)
    opt = OptimWrapper([g.params for g in groups], torch.optim.AdamW, lr=1e-4)
    opt.set_hyper('lr', 1e-3)
    assert rates(opt, 'lr')==[1e-3, 1e-3, 1e-3]

def test_a_number_is_the_base_of_the_multiples(small):
    opt = DetOpt(param_groups(small, recipes['1x'].mults), torch.optim.AdamW, lr=1e-3)
    opt.set_hypers(lr=1e-3, wd=.01)
    assert rates(opt, 'lr')==pytest.approx([1e-3, 1e-3, 4e-3])
    assert rates(opt, 'wd')==pytest.approx([.01, .01, .1])
    assert opt.sections==list(SECTIONS)

def test_a_slice_is_taken_as_it_comes(small):
    opt = DetOpt(param_groups(small, recipes['1x'].mults), torch.optim.AdamW, lr=1e-3)
    opt.set_hyper('lr', slice(1e-5, 1e-3))
    assert rates(opt, 'lr')==pytest.approx([1e-5, 1e-4, 1e-3])
    assert all(type(v) is float for v in rates(opt, 'lr')) # a checkpoint is read without unpickling

def test_a_body_below_an_encoder_is_a_body():
    assert [section_of(n) for n in ('pyramid.body.a', 'pyramid.levels.body.a', 'pyramid.neck.a', 'decoder.a')]== \
        ['body', 'body', 'rest', 'decoder']


@pytest.mark.parametrize('name', ['adamixer_tiny', 'sparse_rcnn_tiny', 'deformable_detr_tiny'])
def test_finetune_slows_the_body_of_every_family(name):
    "That of Deformable DETR lies one level deeper, and had the full rate"
    model = create_detector(name, n_classes=2)
    found = param_groups(model, recipes['finetune'].mults)
    assert {g.lr for g in found if g.section=='body'}=={.1}
