"Sparse R-CNN's levels, cuts, step and hyper-parameters; names of checkpoints"
from dataclasses import replace
import pytest
import torch
from deqdet.checkpoints.layouts import detectron2_names, rename
from deqdet.data import Target
from deqdet.decoder import Stacked
from deqdet.equilibrium import Perturb, Settled
from deqdet.families.sparse_rcnn import BoxState, SparseRCNN, SparseStep, box_levels, cut_out, move_corners
from deqdet.loss import SetLoss

STRIDES = 4, 8, 16, 32
SMALL = SparseRCNN(n_classes=4, body='tiny', feat_width=32, width=48, dynamic=16, heads=4, hidden=96, n_queries=12,
                   grid=(3, 4, .4), finest=14., strategy=Stacked(3))
SETTLED = replace(SMALL, strategy=Settled(steps=4, supervise=(1, 4), extra=-1, perturb=Perturb(position=3.)))
SIZES = torch.tensor([[128, 128]])


def close(a, b, eps): return torch.allclose(a, b, rtol=1e-5, atol=eps)
def square(side): return torch.stack([torch.zeros_like(side)]*2 + [side]*2, -1)
def one_image(): return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def feats():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 16, 640//s, 800//s) for s in STRIDES)


@pytest.fixture(scope='module')
def boxes():
    torch.manual_seed(1)
    xy, side = 20 + torch.rand(2, 9, 2)*60, torch.logspace(4, 9, 9, base=2)
    return torch.cat([xy, xy + side[:, None]*torch.tensor([1.2, .8])], -1)


def make_step(**kw):
    torch.manual_seed(2)
    return SparseStep(3, **{**dict(width=24, feat_width=16, dynamic=8, heads=4, hidden=48), **kw})


def test_a_noisy_state_is_a_state():
    s = BoxState.at(torch.zeros(1, 1, 8), torch.tensor([[[10., 10, 14, 30]]]))
    assert type(Perturb(p_position=1., p_content=1.)(s)) is BoxState


def test_levels_at_the_published_borders():
    edges = torch.tensor([1., 55.9, 56, 111.9, 112, 223.9, 224, 447.9, 448, 4000])
    assert box_levels(square(edges)).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert box_levels(torch.tensor([0., 0, 28, 448])) == 1          # the area counts, not the longer side
    flat, inverted = [5., 5, 5, 9], [9., 9, 5, 12]
    assert box_levels(torch.tensor([flat, inverted])).tolist() == [0, 0]
    assert box_levels(square(edges), n=2, finest=28.).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_rows_that_share_an_image_read_what_each_reads_alone(feats, boxes):
    three = torch.stack([boxes, boxes.flip(1), boxes+5], 1)         # (2,3,9,4)
    together = cut_out(feats, three.flatten(0, 1), STRIDES)
    for i in range(3): assert torch.equal(together[i::3], cut_out(feats, three[:, i], STRIDES))


def test_a_batch_without_any_large_box(feats, boxes):
    assert torch.equal(cut_out(feats, boxes[:, :2], STRIDES), cut_out(feats, boxes, STRIDES)[:, :2])


def test_no_move(boxes): assert close(move_corners(boxes, torch.zeros(4)), boxes, 1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_move_is_the_product_with_a_row_of_scales(boxes, dtype):
    "Bit for bit, also for scales that no float32 holds; three scales are refused"
    boxes, delta, stds = boxes.to(dtype), torch.randn(2, 9, 4, dtype=dtype), (.1, .2, .7, .3)
    row = torch.tensor(stds, dtype=dtype)
    assert torch.equal(move_corners(boxes, delta, stds), move_corners(boxes, delta*row, (1, 1, 1, 1)))
    with pytest.raises(ValueError): move_corners(boxes, delta, stds[:3])


def test_guarantees_of_the_step(feats, boxes):
    "Images apart, queries a set, rows may share an image, widths are free, boxes keep their precision"
    step, z0 = make_step(), BoxState(torch.randn(2, 9, 24), boxes)
    z1 = step(z0, feats)
    assert type(z1) is BoxState and step.read(z1).logits.shape == (2, 9, 3)
    alone = step(BoxState(*[t[1:] for t in z0]), [f[1:] for f in feats])
    for a, b in zip(alone, z1): assert close(a[0], b[1], 1e-3)
    perm = torch.randperm(9)
    for a, b in zip(step(BoxState(*[t[:, perm] for t in z0]), feats), z1): assert close(a, b[:, perm], 1e-3)
    twice = step(BoxState(*[t.repeat_interleave(2, 0) for t in z0]), feats)
    for a, b in zip(twice, z1): assert close(a[1::2], b, 1e-3)
    other = make_step(width=32, size=5, layers=(2, 3))
    assert other(BoxState(torch.randn(2, 9, 32), boxes), feats).content.shape == (2, 9, 32)
    with torch.autocast('cpu', torch.bfloat16): low = step(z0, feats)
    assert low.boxes.dtype == torch.float32
    assert (z1.boxes - z0.boxes).abs().max() > 1                    # published heads start with a random box tower


@pytest.mark.parametrize('learned', [False, True])
def test_gradients_reach_contents_features_and_learned_boxes(learned, feats, boxes):
    content, b = torch.randn(2, 9, 24, requires_grad=True), boxes.clone().requires_grad_()
    fs = [f.clone().requires_grad_() for f in feats]
    out = make_step(learned_boxes=learned)(BoxState(content, b), fs)
    grads = torch.autograd.grad(out.content.sum() + out.boxes.sin().sum(), [content, b, *fs], allow_unused=True)
    assert [g is not None and g.abs().sum().item() > 0 for g in grads] == [True, learned] + [True]*4


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    exact = SparseStep(2, width=8, feat_width=4, strides=(4, 8), dynamic=3, heads=2, hidden=8, size=2, finest=14.,
                       learned_boxes=True).double()
    q = torch.randn(1, 2, 8, dtype=torch.double, requires_grad=True)
    fs = [torch.randn(1, 4, 48//s, 48//s, dtype=torch.double, requires_grad=True) for s in (4, 8)]
    b = torch.tensor([[[6.3, 5.1, 17.7, 16.2], [7.2, 8.9, 42.1, 39.4]]], dtype=torch.double)
    assert box_levels(b, 2, 14.).tolist() == [[0, 1]]               # one box on each level
    run = lambda q, w, *f: tuple(exact(BoxState(q, b), f))
    assert torch.autograd.gradcheck(run, (q, exact.mixing.params.bias, *fs), atol=1e-5)


def test_parameters_by_part():
    with torch.device('meta'): model = SparseRCNN().build()
    found = [sum(p.numel() for p in getattr(model, k).parameters())/1e6 for k in ('queries', 'decoder')]
    assert found == pytest.approx([.026, 79.412472], abs=1e-6)


def test_an_equilibrium_counts_its_steps_as_published():
    torch.manual_seed(0)
    model = SETTLED.build()
    assert [len(model(one_image(), SIZES)), len(model.trajectory(one_image(), SIZES))] == [5, 4]
    assert len(SMALL.build()(one_image(), SIZES)) == 3


@torch.no_grad()
def answer(hyper):
    torch.manual_seed(0)
    model = hyper.build().eval()
    return sum(p.numel() for p in model.parameters()), model(one_image(), SIZES)[-1].boxes.mean().item()


def test_every_hyper_parameter_matters():
    changes = dict(n_classes=7, feat_width=16, width=32, heads=2, hidden=64, dynamic=8, cls_layers=2, reg_layers=2, roi=5,
                   ratio=1, finest=56., stds=(1., 1., 1., 1.), limit=1.1, strides=(8, 16, 32, 64), grid=(),
                   strategy=Stacked(2))
    changes = [dict(n_queries=6, grid=(2, 3, .4))] + [{k: v} for k, v in changes.items()]
    ref = answer(SMALL)
    for change in changes: assert answer(replace(SMALL, **change)) != ref, change
    assert answer(SMALL) == ref


@pytest.mark.parametrize('hyper', [SMALL, SETTLED], ids=['stack', 'equilibrium'])
def test_every_parameter_gets_a_gradient(hyper):
    torch.manual_seed(0)
    target = Target(torch.tensor([[[20., 20, 60, 70]]]), torch.tensor([[1]]), SIZES, torch.tensor([0]))
    model = hyper.build()
    SetLoss()(model(one_image(), SIZES), target).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.queries.boxes.grad.abs().sum() > 0


def test_names_of_the_original():
    with torch.device('meta'): keys = list(SparseRCNN().build().state_dict())
    theirs = [rename(k, detectron2_names()) for k in keys]
    wanted = """head.head_series.5.bboxes_delta.weight head.head_series.0.cls_module.1.bias head.head_series.0.reg_module.7.bias
        head.head_series.2.inst_interact.dynamic_layer.weight head.head_series.1.self_attn.in_proj_weight backbone.fpn_output5.bias
        head.head_series.3.inst_interact.norm3.weight backbone.bottom_up.stem.conv1.norm.running_mean init_proposal_boxes.weight
        backbone.bottom_up.res4.0.shortcut.norm.weight backbone.bottom_up.res5.2.conv3.weight""".split()
    assert set(wanted) <= set(theirs)
    assert not any(k.startswith(('decoder', 'pyramid', 'queries')) for k in theirs)


def test_boxes_without_bound_are_cut_out():
    "Corners at infinity ended Python: `roi_align` read outside of the features"
    feats = [torch.rand(1, 4, 8, 8)]
    far = torch.tensor([[[-float('inf'), 0., float('inf'), 9.], [float('nan')]*4, [1e30, 1e30, 2e30, 2e30]]])
    assert cut_out(feats, far, [8]).isfinite().all()
