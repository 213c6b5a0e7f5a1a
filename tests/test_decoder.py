"States, queries, heads and stacks: shapes, limit cases, and what strategies rely on"
import pytest, torch
from torch import nn
from torch.testing import assert_close
from deqdet.decoder import (Noisy, Pred, Queries, Stacked, State, box_tower, class_tower, grid_boxes, prepared, tower)

SIZES = torch.tensor([[96, 128]])


class Drift(nn.Module):
    "A step that moves every box by a fixed amount"
    def __init__(self, by=1.):
        super().__init__()
        self.by = by
        self.cls = class_tower(16, 3)
    def forward(self, state, feats): return State(state.content + 1, state.xyzr + torch.tensor([self.by, 0, 0, 0]))
    def read(self, state): return Pred(self.cls(state.content), state.boxes)


def test_a_state_at_boxes_has_these_boxes():
    boxes = torch.tensor([[[10., 10, 14, 30], [40., 20, 90, 60]]])
    state = State.at(torch.zeros(1, 2, 8), boxes)
    assert_close(state.boxes, boxes, atol=1e-4, rtol=0)
    assert type(state.jitter(torch.zeros(4))) is Noisy
    assert_close(state.jitter(torch.zeros(4)).boxes, boxes, atol=1e-4, rtol=0)


def test_queries_start_at_the_whole_unpadded_image():
    whole = Queries(12, 16)
    assert_close(whole(SIZES).boxes[0], torch.tensor([0., 0, 128, 96]).expand(12, 4), atol=1e-3, rtol=0)
    assert_close(whole(SIZES).content.mean(-1), torch.zeros(1, 12), atol=1e-5, rtol=0) # layer norm
    assert whole.preds(None) == []


def test_boxes_of_queries_learn_only_if_asked():
    assert len(list(Queries(12, 16).parameters())) == 1
    assert len(list(Queries(12, 16, train_boxes=True).parameters())) == 2
    assert list(Queries(12, 16).state_dict()) == ['boxes', 'content.weight']


def test_as_many_boxes_as_queries():
    with pytest.raises(ValueError, match=r'5 queries need boxes of shape \(5, 4\), got \(12, 4\)'):
        Queries(5, 16, boxes=grid_boxes(3, 4))


def test_a_grid_covers_the_image_evenly():
    boxes = grid_boxes(2, 3, side=.5)
    assert boxes.tolist() == [[pytest.approx(v) for v in (x/6, y/4, .5, .5)] for y in (1, 3) for x in (1, 3, 5)]


def test_towers_have_the_layers_that_they_are_asked_for():
    x = torch.randn(2, 5, 16)
    deep = tower(16, 4, layers=3, bias=False)
    assert deep(x).shape == (2, 5, 4)
    assert sum(p.numel() for p in deep.parameters()) == 3*(16*16 + 2*16) + 16*4 + 4
    assert_close(class_tower(16, 3, prior=.2)[-1].bias.sigmoid(), torch.full((3,), .2))
    assert box_tower(16)(x).abs().max() == 0


@pytest.mark.parametrize('steps', [None, 1, 4, 7])
def test_a_stack_applies_its_steps_and_repeats_the_last(steps):
    stack = Stacked(4)([Drift(by) for by in (1., 10, 100, 1000)])
    start = Queries(6, 16, boxes=grid_boxes(2, 3))(SIZES)
    path = stack.trajectory(start, (), steps=steps)
    n = 4 if steps is None else steps
    moved = [(state.xyzr - start.xyzr)[0, 0, 0].item() for state,_ in path]
    assert moved == pytest.approx([1, 11, 111, 1111, 2111, 3111, 4111][:n], rel=1e-4)
    preds = stack(start, (), steps=steps)
    assert len(preds) == n and preds[-1].boxes.shape == (1, 6, 4)
    for a, (_, b) in zip(preds, path, strict=True): assert_close(a.logits, b.logits, rtol=0, atol=0)


def test_features_are_prepared_as_a_step_says():
    assert prepared(Drift(), [1, 2]) == (1, 2)
    step = Drift()
    step.prepare = lambda feats: 'table'
    assert prepared(step, [1, 2]) == 'table'
