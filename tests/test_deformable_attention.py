"Deformable attention and its encoder: shapes, padding, gradients, one image beside a batch"
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from deqdet.families.deformable_attention import (
    DeformableAttention, DeformableLayer, Encoder, LevelNeck, centres, level_masks, map_embedding, star)

SIZES = torch.tensor([[60, 100], [96, 160]])
SHAPES = (12, 20), (6, 10), (3, 5), (2, 3)


@pytest.fixture
def masks(): return level_masks([torch.zeros(2, 1, *s) for s in SHAPES], SIZES, (96, 160))


@pytest.fixture
def shown(masks): return torch.cat([m.flatten(1) for m in masks], 1)


@pytest.fixture
def reading(masks):
    "An attention that looks about, queries, boxes and cells"
    torch.manual_seed(0)
    attn = DeformableAttention(32, 4, 4, 3)
    for p in (attn.offsets.weight, attn.weights.weight): nn.init.normal_(p, std=.3)
    box = torch.rand(2, 7, 4)*torch.tensor([1, 1, .5, .5])
    return attn, torch.randn(2, 7, 32), box, torch.randn(2, sum(h*w for h, w in SHAPES), 32)


def test_more_levels_than_maps():
    maps = [torch.rand(1, c, 96//s, 160//s) for c, s in ((32, 8), (48, 16), (64, 32))]
    assert len(LevelNeck((48, 64), 32, levels=5, groups=8)(maps)) == 5


def test_shapes_of_centres_and_embeddings(masks):
    assert centres(masks).shape == (2, 12*20 + 6*10 + 3*5 + 2*3, 2)
    assert map_embedding(masks[0], 32).shape == (2, 12, 20, 32)


def test_the_outermost_point_of_the_star():
    s = star(8, 4, 4)
    assert s.shape == (8, 4, 4, 2)
    assert torch.allclose(s[:, :, 3].abs().amax(-1), torch.full((8, 4), 4.))


def test_a_mask_too_few_is_an_error(reading, masks):
    attn, q, box, memory = reading
    with pytest.raises(Exception): attn(q, box, memory, masks[:3])


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    small = DeformableAttention(4, 2, 2, 2).double()
    for p in (small.offsets.weight, small.weights.weight): nn.init.normal_(p, std=.2)
    masks = torch.ones(1, 4, 5).bool(), torch.ones(1, 2, 3).bool()
    masks[0][:, :, 4] = False
    args = [torch.randn(1, 2, 4), torch.rand(1, 2, 4)*.6 + .2, torch.randn(1, 26, 4)]
    args = [a.double().requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: small(*a, masks), args)


def test_what_stands_on_padding_is_not_read(reading, masks, shown):
    attn, q, box, memory = reading
    noisy = torch.where(shown[..., None], memory, 1e3*torch.randn_like(memory))
    assert torch.allclose(attn(q, box, noisy, masks), attn(q, box, memory, masks), atol=1e-6)


def test_an_image_padded_further_is_the_same_image(reading, masks):
    attn, q, box, memory = reading
    wider = [F.pad(m, (0, 3, 0, 2)) for m in masks]
    cells = [F.pad(c.unflatten(1, m.shape[1:]), (0, 0, 0, 3, 0, 2)).flatten(1, 2)
             for c, m in zip(memory.split([h*w for h, w in SHAPES], 1), masks)]
    assert torch.allclose(attn(q, box, torch.cat(cells, 1), wider), attn(q, box, memory, masks), atol=1e-5)


def test_dropout_of_a_layer_is_alive_in_training_only(reading, masks):
    _, q, box, memory = reading
    assert DeformableLayer(32, 4, 4, 3, 64)(q, torch.zeros_like(q), box, memory, masks).shape == q.shape
    layer = DeformableLayer(32, 4, 4, 3, 64, dropout=.5)
    assert (layer(q, q, box, memory, masks) - layer(q, q, box, memory, masks)).abs().max() > .1
    layer.eval()
    assert torch.equal(layer(q, q, box, memory, masks), layer(q, q, box, memory, masks))


def test_cells_of_the_encoder_read_neither_padding_nor_other_images(masks, shown):
    torch.manual_seed(0)
    encoder = Encoder([DeformableLayer(32, 4, 4, 3, 64) for _ in range(2)], 32)
    levels = [torch.randn(2, 32, *s) for s in SHAPES]
    memory = encoder(levels, masks)
    assert memory.shape == (2, shown.shape[1], 32)
    spoilt = [torch.where(m[:, None], l, 1e3*torch.randn_like(l)) for l, m in zip(levels, masks)]
    assert torch.allclose(encoder(spoilt, masks)[shown], memory[shown], atol=1e-5)
    alone = encoder([l[:1] for l in levels], [m[:1] for m in masks])
    assert torch.allclose(alone[0], memory[0], atol=1e-5)
