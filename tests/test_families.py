"A fourth family is a state, a step, a neck and a record: here in under 40 lines, with every strategy"
import math
from dataclasses import dataclass, replace
import pandas
import pytest
import torch
from torch import nn
from deqdet import cli
from deqdet.data import Target, synth_coco
from deqdet.decoder import Pred, Stacked, State, class_tower, linear, tower
from deqdet.equilibrium import Perturb, Settled
from deqdet.families.shared import Shared
from deqdet.loss import SetLoss
from deqdet.model import Family
from deqdet.predict import load_detector
from deqdet.sqr import Recollected, windows
from deqdet.families.start import load_start, start_file
from deqdet.zoo import create_detector, list_detectors, published


class GlanceStep(nn.Module):
    "Look at the mean of the image, mix it into the content, move"
    def __init__(self, n_classes, width, channels):
        super().__init__()
        self.look, self.norm = linear(width + channels, width), nn.LayerNorm(width)
        self.cls, self.reg = class_tower(width, n_classes), tower(width, 4)

    def forward(self, state, feats):
        seen = feats[0].mean((2, 3))[:, None].expand(-1, state.content.shape[1], -1)
        q = self.norm(state.content + self.look(torch.cat([state.content, seen], -1)).relu())
        return State(q, state.xyzr.detach() + .1*self.reg(q).tanh())

    def read(self, state): return Pred(self.cls(state.content), state.boxes)


@dataclass(frozen=True)
class Glance(Family):
    "Hyper-parameters of the toy"
    def neck(self, channels): return Levels()
    def step(self, i): return GlanceStep(self.n_classes, self.width, self.channels[0])


class Levels(nn.Module):
    def forward(self, feats): return tuple(feats)


PLANS = {Stacked(3): 3, Shared(3): 4, Recollected(*windows(3)): 6, Settled(steps=3, supervise=(1, 3), perturb=Perturb(position=2.)): 5}


@pytest.mark.parametrize('strategy, n', PLANS.items())
def test_a_toy_family_with_every_strategy(strategy, n):
    torch.manual_seed(0)
    model = Glance(n_classes=2, body='', channels=(5,), n_queries=4, grid=(2, 2, .5), width=16, strategy=strategy).build()
    feats, sizes = [torch.randn(2, 5, 8, 8)], torch.tensor([[32, 32], [28, 30]])
    boxes = [[[2., 3, 20, 22]], [[8., 8, 16, 24]]]
    target = Target(torch.tensor(boxes), torch.tensor([[0], [1]]), sizes, torch.arange(2))
    loss_func, opt, losses = SetLoss(), torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(15):
        preds = model(feats, sizes)
        loss = loss_func(preds, target)
        loss.backward(); opt.step(); opt.zero_grad(); losses.append(loss.item())
    assert len(preds) == n and losses[-1] < .7*losses[0]
    both = model.eval()(feats, sizes)[-1]
    for i in range(2):
        alone = model([feats[0][i:i+1]], sizes[i:i+1])[-1]
        assert torch.allclose(alone.logits[0], both.logits[i], atol=1e-4)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return synth_coco(tmp_path_factory.mktemp('families')/'shapes', n_train=4, n_valid=2, size=64, seed=1)


@pytest.mark.parametrize('name', list_detectors('*_tiny'))
def test_every_family_trains_from_the_shell(name, shapes, tmp_path):
    "`deqdet_train --model NAME`: every pair of family and strategy, two updates; what comes back is what was asked for"
    cli.deqdet_train(str(shapes), model=name, out=str(tmp_path), epochs=1, bs=2, size='64', device='cpu')
    model = load_detector(tmp_path, device='cpu')
    hyper, log = published(name).hyper, pandas.read_csv(tmp_path/'log.csv')
    assert type(model.hyper) is type(hyper) and model.hyper.strategy == hyper.strategy
    assert len(log) == 1 and math.isfinite(log.train_loss[0]) and math.isfinite(log.valid_loss[0])


@pytest.mark.parametrize('stages', range(1, 8))
@pytest.mark.parametrize('reach', [1, 2, 3, None])
def test_windows_lie_in_what_exists(stages, reach):
    "Any reach gives a valid plan; the newest state is always consumed, so the stack's path is in it"
    plan, made = Recollected(*windows(stages, reach)), 1
    assert plan.stages == stages
    for a, b in zip(plan.starts, plan.ends):
        assert b == made and 0 <= a < b
        made += b - a
    assert replace(plan, recompute=True).ends == plan.ends


def test_a_shared_stack_sends_gradient_through_every_application():
    "Against the same steps written out, in float64"
    torch.manual_seed(0)
    model = Glance(n_classes=2, body='', channels=(5,), n_queries=4, grid=(2, 2, .5), width=16, strategy=Shared(3)).build().double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)
    feats = [torch.randn(2, 5, 8, 8).double()]
    sizes = torch.tensor([[32, 32], [28, 30]])
    model(feats, sizes)[-1].logits.sum().backward()
    got = [p.grad.clone() for p in model.decoder.step.parameters() if p.grad is not None]
    model.zero_grad()
    state = model.decoder.init(model.queries(sizes, feats), feats)
    for _ in range(3): state = model.decoder.step(state, feats)
    model.decoder.step.read(state).logits.sum().backward()
    want = [p.grad for p in model.decoder.step.parameters() if p.grad is not None]
    assert len(got)==len(want) > 0 and all(torch.allclose(a, b) for a,b in zip(got, want))


def test_a_shared_stack_starts_from_the_trained_start():
    model = create_detector('shared_lite', n_classes=3)
    done = load_start(model, start_file('deqdet_lite'))
    fresh = [k for k in done.fresh if '.cls.3.' not in k]
    assert not fresh and len(done.kept) > 50
