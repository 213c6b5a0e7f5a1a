"Deformable DETR's state, step, proposals, loss and hyper-parameters; recipes; names of checkpoints"
from dataclasses import fields, replace
import re
import pytest
import torch
from torch import nn
from deqdet.backbone import Pyramid, tiny_body
from deqdet.checkpoints.dialects import (
    _TO_ORIGINAL, DIALECTS, deformable_keys, dialect_of, infer_deformable, load_deformable, publish_deformable)
from deqdet.checkpoints.layouts import rename
from deqdet.data import Target
from deqdet.decoder import Queries, Stacked
from deqdet.families.deformable import (
    RECIPES, DeformableDETR, DeformableStep, Proposals, RefState, TwoStageLoss, _whwh, inverse_sigmoid, shift, shift_by_side)
from deqdet.families.deformable_attention import DeformableLayer, EncodedPyramid, Encoder, LevelNeck
from deqdet.learner import param_groups, recipes
from deqdet.loss import SetLoss
from deqdet.zoo import zoo

SIZES = torch.tensor([[60, 100], [96, 160]])
TINY = DeformableDETR(n_classes=2, body='tiny', norm_groups=8, n_queries=8, width=32, heads=4, points=2, hidden=64,
                      encoder_layers=1, encoder_heads=4, encoder_points=2, encoder_hidden=48, dropout=0.,
                      strategy=Stacked(2))
VARIANTS = dict(plain=DeformableDETR(), refine=DeformableDETR(refine=True),
                two_stage=DeformableDETR(refine=True, two_stage=True))


def close(a, b, eps=1e-5): return torch.allclose(a, b, rtol=1e-5, atol=eps)


@pytest.fixture(scope='module')
def feats():
    torch.manual_seed(0)
    body = tiny_body((16, 32, 48, 64))
    encoder = Encoder([DeformableLayer(32, 4, 4, 3, 64) for _ in range(2)], 32)
    pyramid = EncodedPyramid(Pyramid(body, LevelNeck(body.channels[1:], 32, groups=8)), encoder)
    with torch.no_grad(): return pyramid(torch.rand(2, 3, 96, 160), SIZES)


@pytest.fixture
def first():
    torch.manual_seed(1)
    return Queries(5, 64, norm=False, state=RefState)


def make_step(from_point, **kwargs):
    "A step whose heads have weights"
    torch.manual_seed(2)
    step = DeformableStep(3, width=32, heads=4, points=3, hidden=64, from_point=from_point, **kwargs)
    nn.init.normal_(step.reg[-1].weight, std=.1)
    nn.init.normal_(step.layer.look.offsets.weight, std=.1)
    return step


def test_the_state_is_half_embedding_half_content(first):
    z = first(SIZES)
    assert torch.equal(z.pos[0], first.content.weight[:, :32])
    assert torch.equal(z.content[0], first.content.weight[:, 32:])
    noisy = z.jitter(torch.tensor([150., 0, 0, 0]))
    assert torch.equal(noisy.pos, z.pos)


def test_no_move_and_the_way_back():
    ref, delta = torch.tensor([.9, .1, .3, .4]), torch.tensor([.3, -.2, -.4, .1])
    assert close(shift(ref, torch.zeros(4)), ref, 1e-6)
    assert close(shift(shift(ref, delta), -delta), ref, 1e-6)
    assert inverse_sigmoid(torch.tensor([-3., 0, 1, 7])).isfinite().all()


def test_centres_move_by_parts_of_the_sides():
    ref = torch.tensor([[.5, .5, .05, .1], [.5, .5, .4, .2], [.98, .1, .3, .4]], dtype=torch.float64)
    aside = torch.tensor([.2, -.1, 0, 0], dtype=torch.float64)
    moved = shift_by_side(ref, aside)
    assert close(moved[:2, :2], ref[:2, :2] + aside[:2]*ref[:2, 2:], 1e-12)
    assert close(moved[:, 2:], ref[:, 2:], 1e-12)
    assert moved[2, 0]==1                                                # no centre leaves the image
    other = torch.tensor([.3, -.2, -.4, .1], dtype=torch.float64)
    assert torch.equal(shift_by_side(ref, other)[:, 2:], shift(ref, other)[:, 2:])
    delta = (.1*torch.randn(2, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: shift_by_side(ref[:2], d), delta)


def test_off_is_as_published_bit_for_bit_and_on_adds_no_weights(first, feats):
    off, on, point = make_step(False), make_step(False, by_side=True), make_step(True, by_side=True)
    for (a, x), (b, y) in zip(off.state_dict().items(), on.state_dict().items(), strict=True): assert a==b and torch.equal(x, y)
    z = make_step(True)(first(SIZES), feats)
    for a, b in zip(make_step(True)(z, feats), point(z, feats)): assert torch.equal(a, b)   # a step from a point has no incoming box
    plain, moved, scale = off(z, feats), on(z, feats), _whwh(SIZES).float()
    assert torch.equal(plain.content, moved.content)
    ref, delta = z.ref/scale, off.reg(plain.content)
    assert torch.equal(plain.ref, shift(ref, delta)*scale) and torch.equal(moved.ref, shift_by_side(ref, delta)*scale)
    assert not torch.equal(plain.ref, moved.ref)


def test_published_models_move_as_published():
    for name, entry in zoo.items(): assert not getattr(entry.hyper, 'by_side', False), name


def test_a_fresh_step(first, feats):
    point = DeformableStep(3, width=32, heads=4, points=3, hidden=64, from_point=True)
    box = DeformableStep(3, width=32, heads=4, points=3, hidden=64)
    assert close(box.cls.bias.sigmoid(), torch.full((3,), .01))
    assert box.reg(torch.randn(2, 7, 32)).abs().max() == 0
    z1 = point(first(SIZES), feats)
    assert type(z1) is RefState and type(box(z1, feats)) is RefState


@pytest.mark.parametrize('from_point', [True, False])
def test_a_step_is_pure_keeps_images_apart_and_takes_queries_as_a_set(from_point, first, feats):
    step, z = make_step(from_point), make_step(True)(first(SIZES), feats)
    out = step(z, feats)
    for a, b in zip(step(z, feats), out): assert torch.equal(a, b)
    alone = step(RefState(*[t[1:] for t in z]), [f[1:] for f in feats])
    for a, b in zip(alone, out): assert close(a[0], b[1], 1e-4)
    order = torch.randperm(5)
    for a, b in zip(step(RefState(*[t[:, order] for t in z]), feats), out): assert close(a, b[:, order], 1e-3)
    moved = step(z.jitter(torch.tensor([9., 5, 9, 5])), feats)
    assert ((moved.content - out.content).abs().max() > 1e-4) == (not from_point)


@pytest.mark.parametrize('by_side', [False, True])
@pytest.mark.parametrize('from_point, want', [(False, ['content', 'pos', 'memory']),
                                              (True, ['content', 'pos', 'memory', 'aim'])])
def test_gradients_flow_where_we_said(from_point, want, by_side, first, feats):
    step, z1 = make_step(from_point, by_side=by_side), make_step(True)(first(SIZES), feats)
    names = dict(content=z1.content, ref=z1.ref, pos=z1.pos, memory=feats[0])
    leaves = {k: v.detach().requires_grad_() for k, v in names.items()}
    z = step(RefState(leaves['content'], leaves['ref'], leaves['pos']), (leaves['memory'], *feats[1:]))
    if from_point: leaves['aim'] = step.aim.weight
    answer = z.content.sin().sum() + z.boxes.sin().sum()
    grads = torch.autograd.grad(answer, list(leaves.values()), allow_unused=True)
    assert [k for k, g in zip(leaves, grads) if g is not None and g.abs().sum() > 0] == want


def test_proposals(feats):
    torch.manual_seed(0)
    stage1 = Proposals(12, 32, 3)
    p, = stage1.preds(feats)
    assert (p.logits.shape, p.boxes.shape) == ((2, 321, 3), (2, 321, 4))
    start = stage1(SIZES, feats)
    assert [tuple(t.shape) for t in start] == [(2, 12, 32), (2, 12, 4), (2, 12, 32)]
    assert Proposals(5000, 32, 3)(SIZES, feats).content.shape == (2, 321, 32)  # no more queries than cells
    params = [stage1.pos.weight, stage1.cls.weight, stage1.reg[-1].weight]
    grads = torch.autograd.grad(start.content.sin().sum(), params, allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False]              # neither head is reached


def test_the_two_stage_loss_without_and_with_proposals(feats):
    torch.manual_seed(0)
    boxes = torch.tensor([[[10., 10, 40, 30], [50, 20, 90, 55]], [[20., 20, 70, 70], [0, 0, 0, 0]]])
    target = Target(boxes, torch.tensor([[2, 0], [1, -1]]), SIZES, torch.arange(2))
    stage1, step = Proposals(12, 32, 3), make_step(False)
    preds = stage1.preds(feats) + [step.read(stage1(SIZES, feats))]
    loss = TwoStageLoss()
    assert close(loss(preds[1:], target), SetLoss(form='cxcywh')(preds[1:], target))
    loss(preds, target).backward()
    assert stage1.cls.weight.grad.abs().sum() > 0


def answer(hyper):
    "Number of parameters, and mean of the boxes, of a fresh detector whose heads have weights"
    torch.manual_seed(0)
    model = hyper.build()
    for n, p in model.named_parameters():
        if n.endswith(('reg.4.weight', 'offsets.weight')): nn.init.normal_(p, std=.05)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor([[64, 64]]*4)
    torch.manual_seed(1)
    with torch.no_grad(): boxes = model.train()(images, sizes)[-1].boxes
    return sum(p.numel() for p in model.parameters()), boxes.mean().item()


def test_every_hyper_parameter_matters():
    changes = dict(n_classes=5, maps=2, levels=5, norm_groups=4, n_queries=6, width=48, heads=2, points=3, hidden=48,
                   encoder_layers=2, encoder_heads=2, encoder_points=3, encoder_hidden=64, dropout=.3, refine=True,
                   two_stage=True, strategy=Stacked(3))
    base, moving = answer(TINY), replace(TINY, refine=True)
    for k, v in changes.items(): assert answer(replace(TINY, **{k: v})) != base, k
    assert answer(replace(moving, by_side=True)) != answer(moving)       # the plain variant has no incoming boxes
    assert answer(replace(TINY, by_side=True)) == base
    assert {f.name for f in fields(TINY)} - set(changes) == {'by_side', 'body', 'channels', 'frozen_stages', 'drop_path'}
    assert answer(TINY) == base
    with pytest.raises(TypeError, match='n_query'): replace(TINY, n_query=3)


def test_frozen_stages_and_fed_features():
    def frozen(k):
        model = replace(TINY, body='resnet18', frozen_stages=k).build()
        return sum(not p.requires_grad for p in model.parameters())
    assert frozen(1) > frozen(0) > 0
    assert frozen(-1) == 0
    fed = replace(TINY, body='', channels=(16, 32, 48, 64)).build()
    maps = [torch.rand(1, c, 96//s, 160//s) for c, s in ((16, 4), (32, 8), (48, 16), (64, 32))]
    assert len(fed.pyramid.levels(maps)) == 4


@pytest.mark.parametrize('name, rates', [('original', {'2e-05': 152, '2e-04': 230}), ('detrex', {'1e-05': 126, '1e-04': 256})])
def test_recipes_name_rates_that_exist(name, rates):
    "Tensors by learning rate; the rate falls to a tenth after 40 epochs; fields of both records exist"
    with torch.device('meta'): full = DeformableDETR().build()
    r = RECIPES[name]
    recipe, found = recipes[r['recipe']], {}
    for g in param_groups(full, recipe.mults):
        rate = f'{recipe.lr*g.lr:.0e}'
        found[rate] = found.get(rate, 0) + len(g.params)
    assert found == rates
    assert [recipe.factor(i, e, 1) for i, e in ((0, 0), (9, 39), (9, 40))] == [1., 1., .1]
    replace(DeformableDETR(), **r['hyper'])
    replace(DeformableDETR().loss(), **r['loss'])


def test_offsets_and_the_layer_for_points_learn_slowly():
    with torch.device('meta'): full = DeformableDETR().build()
    _, (pattern, _, _) = recipes['deformable'].mults
    slow = [n for n, _ in full.named_parameters() if re.search(pattern, n)]
    assert len(slow) == 2*(6+6) + 2     # weight and bias of the offsets of twelve layers, and of the layer for points


@pytest.mark.parametrize('ours, theirs', [
    ('pyramid.encoder.layers.2.look.offsets.bias', 'transformer.encoder.layers.2.self_attn.sampling_offsets.bias'),
    ('pyramid.encoder.layers.2.ffn_norm.bias', 'transformer.encoder.layers.2.norm2.bias'),
    ('decoder.steps.1.layer.look_norm.weight', 'transformer.decoder.layers.1.norm1.weight'),
    ('decoder.steps.1.talk.out_proj.bias', 'transformer.decoder.layers.1.self_attn.out_proj.bias'),
    ('decoder.steps.1.reg.4.bias', 'bbox_embed.1.layers.2.bias'),
    ('decoder.steps.0.aim.bias', 'transformer.reference_points.bias')])
def test_names_of_the_original(ours, theirs): assert rename(ours, _TO_ORIGINAL) == theirs


def test_boxes_of_plain_queries_are_not_published():
    assert not any('boxes' in k for k in deformable_keys(TINY.build()))


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('variant', [{}, dict(refine=True), dict(two_stage=True)])
def test_weights_go_round_in_every_dialect(dialect, variant):
    torch.manual_seed(0)
    hyper = replace(TINY, **variant)
    a = hyper.build()
    b = load_deformable(hyper.build(), publish_deformable(a, dialect), dialect).state_dict()
    for k, v in a.state_dict().items(): assert torch.equal(b[k], v), k


def test_weights_of_another_variant_are_refused():
    sd = publish_deformable(replace(TINY, two_stage=True).build())
    with pytest.raises(ValueError, match='unknown names, such as'): load_deformable(TINY.build(), sd)


def test_chosen_rows_of_the_class_heads():
    "The wanted rows in the steps, the first rows in the proposals, whose first means 'an object'"
    wide = publish_deformable(replace(TINY, n_classes=7, two_stage=True).build())
    narrow = load_deformable(replace(TINY, two_stage=True).build(), wide, rows=[4, 6])
    assert torch.equal(narrow.decoder.steps[1].cls.weight, wide['class_embed.1.weight'][[4, 6]])
    assert torch.equal(narrow.queries.cls.weight, wide['class_embed.2.weight'][:2])


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_full_size_checkpoint_says_what_it_is(variant, dialect):
    with torch.device('meta'): names = publish_deformable(VARIANTS[variant].build(), dialect)
    assert dialect_of(names) == dialect
    assert replace(infer_deformable(names), channels=()) == VARIANTS[variant]


def test_other_checkpoints_have_no_dialect(): assert dialect_of({'neck.convs.0.conv.weight': 0}) is None
