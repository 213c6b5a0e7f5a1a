"What `benchmarks/deformable.py` tries on Deformable DETR's equilibrium, at toy size"
import json, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from torch import nn
from deqdet.data import Target
from deqdet.decoder import Pred
from deqdet.families.deformable import DeformableDETR
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import deformable
from deformable import FAR, IDEAS, NEAR, Tried, crowd, path_of, suppressed, tried
from families import families, strategies

BASE = families(32, 9, (3, 3, .4))['deformable']
PLANS = strategies(stages=3, steps=2, noise=3.)
IMAGES, SIZES = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [50, 60]])


def built(idea, strategy='equilibrium'):
    torch.manual_seed(0)
    model = tried(BASE, PLANS[strategy], idea)[0].build()
    for n, p in model.named_parameters():
        if n.endswith(('reg.4.weight', 'offsets.weight')): nn.init.normal_(p, std=.05)
    return model


def answer(model):
    torch.manual_seed(1)
    with torch.no_grad(): return model.train()(IMAGES, SIZES)[-1].boxes


def test_only_ideas_that_the_package_lacks_have_a_record_of_their_own():
    kinds = {k: type(tried(BASE, PLANS['stack'], k)[0]) for k in IDEAS}
    assert {k for k, v in kinds.items() if v is Tried} == {'located', 'both', 'overlaps', 'grid'}
    assert {v for v in kinds.values()} == {Tried, DeformableDETR}


def test_without_ideas_its_step_is_the_package_s():
    torch.manual_seed(0)
    same = Tried(**{k: getattr(BASE, k) for k in BASE.__dataclass_fields__})
    models = built('plain'), replace(same, strategy=PLANS['equilibrium']).build()
    models[1].load_state_dict(models[0].state_dict())
    a, b = map(answer, models)
    assert torch.equal(a, b)


@pytest.mark.parametrize('idea', ['located', 'both', 'overlaps', 'grid', 'by_side'])
@pytest.mark.parametrize('strategy', ['stack', 'equilibrium'])
def test_ideas_of_the_step_change_it_and_get_gradients(idea, strategy):
    model = built(idea, strategy)
    assert not torch.equal(answer(model), answer(built('plain', strategy)))
    sum(p.boxes.sum() + p.logits.sum() for p in model.train()(IMAGES, SIZES)).backward()
    own = [p for n, p in model.decoder.named_parameters() if 'place' in n or n.endswith('tau')]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
    assert bool(own) == (idea in ('located', 'both', 'overlaps'))


def test_ideas_of_the_plan_leave_a_stack_alone():
    for idea in ('noise_1', 'no_noise', 'rag_1', 'no_init', 'all_states'):
        assert tried(BASE, PLANS['stack'], idea)[0] == tried(BASE, PLANS['stack'], 'plain')[0]
        if idea=='all_states': continue   # needs four steps
        assert tried(BASE, PLANS['equilibrium'], idea)[0] != tried(BASE, PLANS['equilibrium'], 'plain')[0]


@pytest.mark.parametrize('strategy', ['stack', 'equilibrium'])
def test_a_path_has_as_many_applications_as_it_says(strategy):
    path = path_of(built('plain', strategy), IMAGES, SIZES)
    assert len(path) == FAR > NEAR


def test_doubles_are_suppressed():
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 11], [0, 0, 10, 10]])
    row = dict(image_id=3, boxes=boxes, scores=torch.tensor([.5, .9, .4]), labels=torch.tensor([0, 0, 1]))
    kept = suppressed(row)
    assert kept['scores'].tolist() == pytest.approx([.9, .4]) and kept['image_id']==3


def test_the_crowd_around_an_object():
    boxes = torch.tensor([[[0., 0, 10, 10], [0, 0, 10, 12], [30, 30, 40, 40]]])
    logits = torch.tensor([[[2., -1], [0, 1], [3, 3]]])
    truth = Target(torch.tensor([[[0., 0, 10, 11.5], [0, 0, 0, 0]]]), torch.tensor([[1, -1]]), SIZES[:1], torch.arange(1))
    (queries, overlap, score, other), = crowd(Pred(logits, boxes), truth)
    assert (queries, overlap) == (2, pytest.approx(11.5/12))
    assert (score, other) == (pytest.approx(torch.tensor(1.).sigmoid().item()), .5)


def test_rows_are_resumed(tmp_path, monkeypatch, capsys):
    out = tmp_path/'out.json'
    toy = '--epochs 1 --n-train 8 --n-valid 4 --bs 4 --width 32 --queries 4 --stages 2 --steps 2 --seeds 0'.split()
    def run(*more):
        monkeypatch.setattr(sys, 'argv', ['deformable.py', '--out', str(out), *toy, *more])
        deformable.main()
        return json.loads(out.read_text())['result']
    first = run('--strategies', 'stack,equilibrium')
    assert [(r['idea'], r['strategy']) for r in first] == [('plain', 'stack'), ('plain', 'equilibrium')]
    assert [set(r[k]) for k in ('doubles', 'suppressed', 'crowd') for r in first] == 6*[{'2', '3', '4', '6', '12'}]
    both = run('--ideas', 'plain,by_side')
    assert both[:2] == first and [r['idea'] for r in both[2:]] == ['by_side']
    assert len(both[2]['moves']['empty']) == FAR - 1
    with pytest.raises(SystemExit, match='other settings: lr'): run('--lr', '.1')
