"Sparse R-CNN's head, stacked and settled, against numbers of the released code; levels at their borders; published keys"
import gzip
import json
import re
import pytest
import torch
from deqdet.boxes import area
from deqdet.checkpoints.layouts import mmdet_names, rename
from deqdet.decoder import Stacked
from deqdet.equilibrium import Settled
from deqdet.loss import SetLoss, decode
from deqdet.model import Detector
from deqdet.families.sparse_rcnn import SparseRCNN, box_levels
from pairs import HERE, base_of, load_pair, reference_pairs
from test_mixer_parity import BOXES, CONTENT, LOGITS, features, near, same_detections, sizes, target


def pytest_generate_tests(metafunc):
    for arg, prefix in dict(sparse_pair='sparse_rcnn', deq_sparse_pair='deq_sparse_rcnn').items():
        if arg in metafunc.fixturenames:
            paths = reference_pairs(metafunc.config, prefix)
            metafunc.parametrize(arg, [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])


def detector(pair, strategy):
    "The pair's weights in our detector; features come as they are, there is no neck"
    c = pair.manifest['config']
    hyper = SparseRCNN(
        n_classes=c['num_classes'], n_queries=c['num_proposals'], feat_width=c['in_channels'], width=c['in_channels'],
        heads=c['num_heads'], hidden=c['feedforward_channels'], dynamic=c['dynamic_feat_channels'],
        cls_layers=c['num_cls_fcs'], reg_layers=c['num_reg_fcs'], roi=c['roi'], ratio=c['sampling_ratio'],
        finest=c['finest_scale'], stds=tuple(c['target_stds']), strides=tuple(c['strides']), strategy=strategy)
    model = Detector(lambda feats, sizes: feats, hyper.queries(), hyper.decoder(), hyper, layout=hyper.layout)
    names = {k: rename(k, mmdet_names(c['num_cls_fcs'], c['num_reg_fcs'])) for k in model.state_dict()}
    model.load_state_dict({ours: pair.sd[theirs] for ours, theirs in names.items()})
    return model, names


def settled(pair, **changes):
    "The equilibrium that the pair ran: T supervised steps, T-1 refinements at inference, no noise"
    T = pair.manifest['config']['num_stages']
    done = {int(m[1]) for k in pair.manifest['scalars'] if (m := re.match(r'iter(\d+)\.', k))}
    return Settled(**dict(steps=T, supervise=tuple(sorted(done)), extra=-1, perturb=None) | changes)


def check_path(model, pair, base):
    "Every state and prediction on the way, and the detections at its end"
    state, feats = model.eval().start(features(base), sizes(base))
    near(state.boxes, base.t['rpn/bboxes'], 1e-4, 'first boxes')
    near(state.content, base.t['rpn/features'], 1e-6, 'first contents')
    path = model.decoder.trajectory(state, feats)
    assert len(path) == len({k.split('/')[1] for k in pair.t if k.startswith('stage/')})
    for i, (s, p) in enumerate(path):
        near(s.content, pair.t[f'stage/{i}/object_feats'], CONTENT, f'stage {i} content')
        near(p.logits, pair.t[f'stage/{i}/cls_score'], LOGITS, f'stage {i} logits')
        near(p.boxes.flatten(0, 1), pair.t[f'stage/{i}/decoded_bboxes'], BOXES, f'stage {i} boxes')
    metas = base.manifest['config']['metas']
    scale = torch.tensor([m['scale_factor'][:2] for m in metas])
    found = decode(path[-1][1], base.manifest['config']['max_per_img'])
    near(model(features(base), sizes(base))[-1].boxes, path[-1][1].boxes, 1e-4, 'the answer')
    for i in range(len(metas)):
        same_detections(found, i, [pair.t[f'pred/{i}/{k}'] for k in ('bboxes_rescaled', 'scores', 'labels')], scale)


def check_training(model, names, pair, base, states, shared=lambda key: key):
    "Every loss term and every gradient"
    feats, loss_func, want = [f.clone().requires_grad_() for f in features(base)], SetLoss(), pair.manifest['scalars']
    total = loss_func(model.train()(feats, sizes(base)), target(base, base))
    for i, name in enumerate(states):
        for ours, theirs in dict(cls='loss_cls', l1='loss_bbox', giou='loss_iou').items():
            got = loss_func.terms[f'{i}/{ours}'].item()
            assert got == pytest.approx(want[f'{name}.{theirs}'], rel=1e-4), (name, ours)
    assert total.item() == pytest.approx(want['total'], rel=1e-4)
    total.backward()
    grads = {names[k]: p.grad for k, p in model.named_parameters()}
    for k in [k for k in pair.t if k.startswith('grad/')]:
        got = feats[int(k[-1])].grad if k.startswith('grad/in/') else grads[k.removeprefix('grad/')]
        near(got, pair.t[k], 1e-4*max(pair.t[k].abs().max().item(), 1e-6), k)
    norms = pair.manifest['grad_norms_all_parameters']
    for k, g in grads.items(): assert g.norm().item() == pytest.approx(norms[k], rel=1e-3, abs=1e-5), k
    assert {shared(k) for k in norms} == set(grads)


def test_stack(sparse_pair):
    pair, stages = sparse_pair, sparse_pair.manifest['config']['num_stages']
    model, names = detector(pair, Stacked(stages))
    assert set(names.values()) == set(pair.sd)
    with torch.no_grad(): check_path(model, pair, pair)
    check_training(model, names, pair, pair, [f's{i}' for i in range(stages)])


@pytest.mark.parametrize('recompute', [True, False])
def test_equilibrium(deq_sparse_pair, recompute):
    pair, base = deq_sparse_pair, base_of(deq_sparse_pair)
    strategy = settled(pair, recompute=recompute)
    model, names = detector(base, strategy)
    with torch.no_grad(): check_path(model, pair, base)
    once = lambda key: re.sub(r'bbox_head\.[1-9]\d*\.', 'bbox_head.1.', key) # the shared head has every index
    states = [f'init^{i}' for i in range(1 + strategy.init_steps)] + [f'iter{i}' for i in strategy.supervise]
    check_training(model, names, pair, base, states, once)


def test_regions_of_the_first_stage(sparse_pair):
    "What is cut out, and from which level; the saved boxes use the finest one alone"
    from deqdet.families.sparse_rcnn import cut_out
    c, t = sparse_pair.manifest['config'], sparse_pair.t
    boxes, saved = t['rpn/bboxes'], t['stage/0/roi_feats']
    near(t['stage/0/rois'][:, 1:], boxes.flatten(0, 1), 1e-4, 'regions')
    x = cut_out(features(sparse_pair), boxes, c['strides'], c['roi'], c['sampling_ratio'], c['finest_scale'])
    near(x.mT.unflatten(-1, (c['roi'],)*2).flatten(0, 1)[:len(saved)], saved, 1e-5, 'features under boxes')


def test_levels_at_every_border():
    "Level l from side 56*2^l on, by the root of the area, whatever the shape"
    for l in range(1, 4):
        for ratio in (.25, 1., 4.):
            side = 56*2**l*torch.tensor([.9999, 1., 1.0001, 1.9999], dtype=torch.float64)
            w, h = side*ratio**.5, side/ratio**.5
            boxes = torch.stack([w*0 - 7, h*0 + 3, w - 7, h + 3], -1)
            assert area(boxes).sqrt().sub(side).abs().max() < 1e-9
            assert box_levels(boxes).tolist() == [l - 1, l, l, l], (l, ratio)


KEYS = json.loads(gzip.decompress((HERE/'full_size_keys.json.gz').read_bytes()))


@pytest.mark.parametrize('config', [k for k in KEYS if k.startswith('mmdet_sparse_rcnn')])
def test_all_published_keys(config):
    keys = KEYS[config]
    n = keys['rpn_head.init_proposal_bboxes.weight'][0]
    with torch.device('meta'): ours = SparseRCNN(n_queries=n).build().state_dict()
    assert {rename(k, mmdet_names()): list(v.shape) for k, v in ours.items()} == keys
