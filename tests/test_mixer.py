"AdaMixer's step: pure, batch equals singles, queries are a set, any width, noisy states"
import pytest, torch
from torch import nn
from torch.testing import assert_close
from deqdet.decoder import Queries, Stacked, State, grid_boxes, prepared
from deqdet.mixer import MixerStep

SMALL = dict(width=32, feat_width=16, groups=2, points=9, out_points=8, heads=4, hidden=64)
def small_step(**kw): return MixerStep(3, **(SMALL | kw))


@pytest.fixture(scope='module')
def world():
    "A step whose heads move boxes, features of two images, a first state, and what the step makes of it"
    torch.manual_seed(0)
    step = small_step()
    nn.init.normal_(step.reg[-1].weight, std=.02)
    nn.init.normal_(step.mixing.params.weight, std=.1)
    feats = tuple(torch.randn(2, 16, 96//s, 128//s) for s in (4, 8, 16, 32))
    z0 = Queries(6, 32, boxes=grid_boxes(2, 3))(torch.tensor([[96, 128], [90, 100]]))
    return step, feats, z0, step(z0, feats)


def test_an_untrained_step_moves_no_box(world):
    _, feats, z0, _ = world
    z1 = small_step()(z0, feats)
    assert type(z1) is State and [tuple(t.shape) for t in z1] == [(2, 6, 32), (2, 6, 4)]
    assert_close(z1.xyzr, z0.xyzr)


def test_a_step_is_pure(world):
    step, feats, z0, z1 = world
    for a, b in zip(step(z0, feats), z1): assert (a - b).abs().max() == 0


def test_a_batch_equals_its_images_one_at_a_time(world):
    step, feats, z0, z1 = world
    for i in range(2):
        single = step(State(*[t[i:i+1] for t in z0]), [f[i:i+1] for f in feats])
        for a, b in zip(single, z1): assert_close(a[0], b[i], atol=1e-5, rtol=1e-5)


def test_permuting_queries_permutes_the_answer(world):
    step, feats, z0, z1 = world
    perm = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for a, b in zip(step(State(*[t[:, perm] for t in z0]), feats), z1): assert_close(a, b[:, perm], atol=1e-4, rtol=0)


def test_two_rows_of_queries_may_look_at_one_image(world):
    step, feats, z0, z1 = world
    twice = State(*[t.repeat_interleave(2, 0) for t in z0])
    for a, b in zip(step(twice, feats), z1):
        for row in (a[0::2], a[1::2]): assert_close(row, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kw', [dict(width=48), dict(feat_width=16, groups=4), dict(points=5), dict(heads=2)])
def test_content_and_features_may_differ_in_width(world, kw):
    _, feats, z0, _ = world
    width = kw.get('width', 32)
    assert small_step(**kw)(State(torch.randn(2, 6, width), z0.xyzr), feats).content.shape == (2, 6, width)


def test_noise_of_zero_changes_nothing_and_the_answer_is_a_plain_state(world):
    step, feats, z0, z1 = world
    assert_close(step(z0.jitter(torch.zeros(4)), feats).content, z1.content, atol=1e-4, rtol=0)
    assert type(step(z0.jitter(torch.tensor([120., 0, 0, 0])), feats)) is State


def test_prepared_features_give_the_same_bits(world):
    step, feats, z0, z1 = world
    for a, b in zip(step(z0, prepared(step, feats)), z1): assert torch.equal(a, b)


def test_a_stack_of_six_answers_six_times(world):
    _, feats, z0, _ = world
    stack = Stacked(6)([small_step() for _ in range(6)])
    preds = stack(z0, feats)
    assert len(preds) == 6 and preds[-1].boxes.shape == (2, 6, 4) and len(stack(z0, feats, steps=9)) == 9
