"""The loss on saved predictions: published matching and terms, without any model.

Every manifest with objects (`gt/0/bboxes`) and supervised outputs is taken, whatever its sizes: from `reference/`
beside this file and from the folder or folders given by `--reference`, where that option exists."""
import json
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file
from deqdet.loss import SetLoss

TERMS = dict(cls='loss_cls', l1='loss_bbox', giou='loss_iou')


def supervised_calls(cfg):
    "DEQDet: loss name -> index of the layer call that it looks at"
    calls = {'init': 0} | {f'init^{i}': i for i in range(1, cfg['extra_supervisions_on_init_head'] + 1)}
    at = len(calls) - 1
    for step in range(1, cfg['refinement_steps'] + 1):
        at += 1
        if step in cfg['supervision_position']:
            at += cfg['rag']
            calls[f'iter{step}'] = at
    return calls


def saved_states(m, t):
    "Loss prefix -> (logits, boxes) of every supervised state whose output is saved"
    if 'call/0/cls' in t:
        found = {f'{k}_': (f'call/{i}/cls', f'call/{i}/bbox') for k,i in supervised_calls(m['config']).items()}
    else: # stacks; a recollecting one sums over groups from its second stage on
        kind = next((k for k in ('decode_bbox_pred', 'decoded_bboxes') if f'stage/0/{k}' in t), None)
        last = 1 if 'start_q' in m['config'] else 99
        names = [(i, p.format(i)) for i in range(last) for p in ('stage{}_', 's{}.', 'init^{}.')]
        found = {p: (f'stage/{i}/cls_score', f'stage/{i}/{kind}') for i,p in names if f'{p}loss_cls' in m['scalars']}
    found = {p: [t[k] for k in v] for p,v in found.items() if v[0] in t}
    return {p: (cls, box.reshape(*cls.shape[:2], 4)) for p,(cls,box) in found.items()}


def saved_target(m, t, metas):
    "The objects of all images as one padded target"
    pad = torch.nn.utils.rnn.pad_sequence
    each = range(len(metas))
    return SimpleNamespace(
        boxes=pad([t[f'gt/{b}/bboxes'] for b in each], batch_first=True),
        labels=pad([t[f'gt/{b}/labels'].long() for b in each], batch_first=True, padding_value=-1),
        size=torch.tensor([meta['img_shape'][:2] for meta in metas]), image_id=torch.arange(len(metas)))


def load(path):
    "A manifest and its tensors; what it takes from another pair of the folder (`state_from`) is looked up there"
    m,t = json.loads(path.read_text()), load_file(path.with_suffix('.safetensors'))
    other = m.get('config', {}).get('state_from', '').split(' ')[0]
    if not other or other == path.stem: return m, t, m.get('config', {}).get('metas')
    om,ot,metas = load(path.with_name(f'{other}.json'))
    return m, {k: v for k,v in ot.items() if k.startswith('gt/')} | t, m['config'].get('metas', metas)


def usable(path, matching=False):
    "Does this pair hold supervised outputs and the terms of their losses (and who owns what)?"
    if not path.with_suffix('.safetensors').exists(): return False
    m,t,metas = load(path)
    if metas is None or 'gt/0/bboxes' not in t or not saved_states(m, t): return False
    return not matching or any(k.startswith('assign/') for k in t)


def pytest_generate_tests(metafunc):
    more = metafunc.config.getoption('--reference', default=None) or []
    folders = [Path(__file__).parent/'reference', *map(Path, [more] if isinstance(more, (str, Path)) else more)]
    matching = 'matching' in metafunc.function.__name__
    paths = [p for d in folders for p in sorted(d.glob('*.json')) if usable(p, matching)]
    metafunc.parametrize('path', paths, ids=[p.stem for p in paths])


def test_terms(path):
    "Every loss term of every saved supervised state, to 1e-5 of itself"
    m,t,metas = load(path)
    states,loss = saved_states(m, t), SetLoss()
    total = loss([SimpleNamespace(logits=l, boxes=b) for l,b in states.values()], saved_target(m, t, metas))
    want = {(s,k): m['scalars'][p + v] for s,p in enumerate(states) for k,v in TERMS.items()}
    for (s,k),v in want.items(): assert loss.terms[f'{s}/{k}'].item() == pytest.approx(v, rel=1e-5), (s, k)
    assert total.item() == pytest.approx(sum(want.values()), rel=1e-5)


def test_matching(path):
    "The owner of every object in every saved supervised state"
    m,t,metas = load(path)
    states = saved_states(m, t)
    names = [p.removesuffix('_') for p in states]
    where = SetLoss().match(*map(torch.stack, zip(*states.values())), saved_target(m, t, metas))
    owner = torch.zeros(len(states), *next(iter(states.values()))[0].shape[:2], dtype=torch.long)
    owner[tuple(where[:3])] = where[3] + 1
    for s,name in enumerate(names):
        for b in range(len(metas)): assert owner[s,b].tolist() == t[f'assign/{name}/{b}/gt_inds'].tolist(), (name, b)
