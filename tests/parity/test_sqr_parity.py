"Selective query recollection of AdaMixer against numbers of the released code; its losses are summed over groups"
import pytest
import torch
from deqdet.convert import load_official
from deqdet.loss import SetLoss, decode
from deqdet.sqr import Recollected
from pairs import load_pair, reference_pairs
from test_mixer_parity import check_gradients, features, near, near_state, same_detections, sizes, target


def pytest_generate_tests(metafunc):
    paths = reference_pairs(metafunc.config, 'sqr_adamixer')
    metafunc.parametrize('pair', [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])


def detector(pair, **kwargs):
    "The published stack; its steps strung together anew"
    c = pair.manifest['config']
    model = load_official(pair.sd, strides=tuple(c['strides']))
    model.decoder = Recollected(tuple(c['start_q']), tuple(c['end_q']), **kwargs)(model.decoder.steps)
    return model


@torch.no_grad()
def test_inference_is_the_stack(pair):
    c, model = pair.manifest['config'], detector(pair).eval()
    state, feats = model.start(features(pair), sizes(pair))
    path = model.decoder.trajectory(state, feats)
    assert len(path) == c['num_stages'] == len(model(features(pair), sizes(pair)))
    names = 'query_content', 'query_xyzr', 'cls_score', 'decode_bbox_pred'
    for i, (s, p) in enumerate(path): near_state(s, p, pair.t, f'stage/{i}', names)
    found, scale = decode(path[-1][1], c['max_per_img']), torch.tensor([m['scale_factor'][:2] for m in c['metas']])
    for i in range(len(scale)):
        p = pair.t[f'pred/{i}']
        same_detections(found, i, (p[:, :4], p[:, 4], p[:, 5].long()), scale)


def train(pair, dtype, **kwargs):
    "One training pass: the model, its inputs, its loss and the loss's terms, with gradients"
    model, loss_func = detector(pair, **kwargs).to(dtype).train(), SetLoss()
    feats = [f.to(dtype).requires_grad_() for f in features(pair)]
    total = loss_func(model(feats, sizes(pair)), target(pair, pair))
    total.backward()
    return model, feats, total.item(), loss_func.terms


@pytest.mark.parametrize('recompute', [True, False])
def test_losses(pair, recompute):
    c, want = pair.manifest['config'], pair.manifest['scalars']
    _, _, total, terms = train(pair, torch.float32, recompute=recompute)
    made = 0
    for stage, (a, b) in enumerate(zip(c['start_q'], c['end_q'])):
        for ours, theirs in dict(cls='loss_cls', l1='loss_bbox', giou='loss_iou').items():
            got = sum(terms[f'{made + i}/{ours}'] for i in range(b - a)).item()
            assert got == pytest.approx(want[f'stage{stage}_{theirs}'], rel=1e-4), (stage, ours)
        made += b - a
    assert len(terms) == 3*(made + 1) and total == pytest.approx(want['total'], rel=1e-4)


@pytest.mark.parametrize('recompute', [True, False])
def test_gradients(pair, recompute):
    """In float64 they agree to 1e-5 of their maximum. In float32 one ReLU of `sqr_adamixer_tiny`'s mixing falls on the
    other side of its kink, which changes some by 2 %; elsewhere it may be the released float32 run that fell over."""
    try: check_gradients(*train(pair, torch.float64, recompute=recompute)[:2], pair)
    except AssertionError: check_gradients(*train(pair, torch.float32, recompute=recompute)[:2], pair)
