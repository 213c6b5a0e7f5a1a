"Reading a pyramid and mixing what was read, against the formulas written out"
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from deqdet.mixing import (CACHED, AdaptiveMixing, Rows, Sampler, ends, four_cells, gather, grid_offsets, level_weights, per_picture,
    sample, sampling_points)

STRIDES = (4, 8, 16, 32)

def close(a, b, eps=1e-5): return torch.allclose(a, b, rtol=0, atol=eps)

def sample_plain(feats, points, strides, groups):
    "(B,N,G,P,C) features at (B,N,G,P,3) points: the formula, a `grid_sample` for each level"
    xy, out = points[..., :2], 0
    for feat, stride, w in zip(feats, strides, level_weights(points[..., 2], strides).unbind(-1)):
        B, D, H, W = feat.shape
        grid = (2*xy/(stride*xy.new_tensor([W, H])) - 1).transpose(1, 2).flatten(0, 1)
        x = F.grid_sample(feat.reshape(B*groups, D//groups, H, W), grid, align_corners=False)
        out = out + x.view(B, groups, -1, *x.shape[-2:]).permute(0, 3, 1, 4, 2)*w[..., None]
    return out

@pytest.fixture
def pyramid():
    "Levels of two images of 96 by 128 pixels, and (2,5,2,7,3) points in and around them"
    torch.manual_seed(0)
    feats = tuple(torch.randn(2, 8, 128//s, 96//s) for s in STRIDES)
    xyzr = torch.stack([torch.rand(2, 5)*96, torch.rand(2, 5)*128, torch.rand(2, 5)*5 + 2, torch.randn(2, 5)*.5], -1)
    return feats, sampling_points(xyzr, torch.randn(2, 5, 2, 7, 3)*.5)

def test_rows_lie_level_after_level_and_stay_what_they_are(pyramid):
    feats, _ = pyramid
    rows = Rows.of(feats)
    assert torch.equal(rows.table[1, 32*24 + 2*12 + 5], feats[1][1, :, 2, 5])
    assert torch.equal(rows.levels[1, 1], torch.tensor([12, 16, 32*24.]))
    assert Rows.of(rows) is rows

def test_two_cells_around_a_position_and_none_outside():
    (low, high), (a, b) = ends(torch.tensor([1.25, -.5, 3.]), 4)
    assert [low.tolist(), high.tolist()] == [[1, 0, 3], [2, 0, 3]]
    assert close(a + b, torch.tensor([1., .5, 1.]))   # half of the second one lies outside

def test_four_cells_and_their_bilinear_weights():
    cells, weights = four_cells(torch.tensor([[1.25, -.5], [.5, 0.]]), torch.tensor([[4], [3]]))
    assert torch.equal(cells[:, 0], torch.tensor([1, 2, 5, 6]))
    assert close(weights[:, 0], torch.tensor([.375, .125, .375, .125]))
    assert close(weights[:, 1].sum(), torch.tensor(.5))

def test_sets_of_queries_of_a_picture_lie_in_one_row():
    assert torch.equal(per_picture(torch.arange(8).view(4, 2), 2), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))

def test_gather_sums_rows_of_a_groups_own_channels_when_exporting_and_compiling_too(monkeypatch):
    torch.manual_seed(0)
    tokens, cells, w = torch.randn(2, 6, 4), torch.randint(6, (2, 3, 2, 5)), torch.rand(2, 3, 2, 5)
    out = gather(tokens, cells, w)
    mine = tokens[1, cells[1, 2, 1], 2:]
    assert close(out[1, 2, 1], (w[1, 2, 1, :, None]*mine).sum(0), 1e-6)
    assert close(torch.compile(gather, backend='eager', fullgraph=True)(tokens, cells, w), out, 1e-6)
    monkeypatch.setattr('deqdet.mixing._exporting', lambda: True)
    assert close(gather(tokens, cells, w), out, 1e-6)

def test_sample_is_the_formula(pyramid):
    feats, points = pyramid
    assert close(sample(feats, points, STRIDES), sample_plain(feats, points, STRIDES, 2))
    assert torch.equal(sample(Rows.of(feats), points, STRIDES), sample(feats, points, STRIDES))

def test_gradients_of_sample_equal_the_formulas_and_finite_differences():
    torch.manual_seed(1)
    feats = tuple(torch.randn(1, 2, 32//s, 32//s, dtype=torch.double, requires_grad=True) for s in STRIDES)
    points = (torch.rand(1, 1, 1, 3, 3, dtype=torch.double)*torch.tensor([32., 32, 6])).requires_grad_()
    assert gradcheck(lambda p, *f: sample(f, p, STRIDES), (points, *feats))
    ours, plain = (torch.autograd.grad(x.sin().sum(), (points, *feats))
                   for x in (sample(feats, points, STRIDES), sample_plain(feats, points, STRIDES, 1)))
    for a, b in zip(ours, plain): assert close(a, b, 1e-9)

def test_outside_the_picture_everything_reads_as_zero(pyramid):
    feats, points = pyramid
    assert sample(feats, points + torch.tensor([1e4, 0, 0]), STRIDES).abs().max() == 0

def test_pictures_of_a_batch_do_not_see_each_other(pyramid):
    feats, points = pyramid
    one = sample([f[1:] for f in feats], points[1:], STRIDES)
    assert close(one[0], sample(feats, points, STRIDES)[1], 1e-6)

def test_memory_layout_changes_nothing(pyramid):
    feats, points = pyramid
    last = [f.contiguous(memory_format=torch.channels_last) for f in feats]
    assert torch.equal(sample(last, points, STRIDES), sample(feats, points, STRIDES))

def test_sets_of_queries_read_the_same_features(pyramid):
    feats, points = pyramid
    far = points + torch.tensor([1e4, 0, 0])
    both = torch.stack([points, far], 1).flatten(0, 1)   # two sets for each image: p0, far0, p1, far1
    assert torch.equal(sample(feats, both, STRIDES)[::2], sample(feats, points, STRIDES))

def test_points_stay_in_the_precision_of_the_boxes():
    "A coordinate near 1300 is off by pixels in bfloat16"
    torch.manual_seed(0)
    pixels = torch.arange(1200., 1300) + .5
    assert (pixels - pixels.bfloat16().float()).abs().max() > 2
    sampler, q = Sampler(16, groups=2, points=9), torch.randn(2, 5, 16)
    xyzr = torch.tensor([1203.5, 700.25, 5, 0]).expand(2, 5, 4)
    with torch.autocast('cpu', torch.bfloat16): points = sampler.points(q, xyzr)
    assert points.dtype == torch.float32 and close(points[..., 4, :2], xyzr[:, :, None, :2].expand(-1, -1, 2, -1), .1)

@pytest.mark.parametrize('points', [1, 4, 64])
def test_grids_are_centred_one_octave_finer(points):
    assert close(grid_offsets(points).mean(0), torch.tensor([0., 0., -1.])) and grid_offsets(points).shape == (points, 3)
    if points == 4:
        assert grid_offsets(4).tolist() == [[-.25, -.25, -1], [-.25, .25, -1], [.25, -.25, -1], [.25, .25, -1]]

# mixing

@pytest.fixture
def mixing():
    torch.manual_seed(0)
    mix = AdaptiveMixing(16, channels=4, groups=2, points=7, out_points=6)
    return mix, torch.randn(2, 5, 16), torch.randn(2, 5, 2, 7, 4)

def test_at_first_every_query_mixes_alike(mixing):
    mix, q, _ = mixing
    assert torch.equal(mix.params(q)[0, 0], mix.params(q)[1, 3])

def mix_plain(q, x, params, out, O):
    "Query by query, group by group"
    B, N, G, P, C = x.shape
    res = []
    for b in range(B):
        for n in range(N):
            rows, gen = [], params(q[b, n]).view(G, C*C + O*P)
            for g in range(G):
                M, S = gen[g, :C*C].view(C, C), gen[g, C*C:].view(O, P)
                y = F.relu(F.layer_norm(x[b, n, g] @ M, (P, C)))
                rows.append(F.relu(F.layer_norm(S @ y, (O, C))))
            res.append(out(torch.stack(rows).flatten()))
    return torch.stack(res).view(B, N, -1)

def test_mixing_equals_the_loop_and_treats_queries_alone(mixing):
    mix, q, x = mixing
    nn.init.normal_(mix.params.weight, std=.3)
    assert close(mix(q, x), mix_plain(q, x, mix.params, mix.out, 6))
    answers = mix(q, x[:, :1].expand_as(x))
    assert (answers[0, 0] - answers[0, 1]).abs().max() > .1   # the same reads, other answers
    perm = torch.randperm(5)
    assert close(mix(q[:, perm], x[:, perm]), mix(q, x)[:, perm])

def test_mixing_in_blocks_changes_nothing():
    torch.manual_seed(0)
    mix = AdaptiveMixing(256, channels=64, points=16, out_points=64)
    nn.init.normal_(mix.params.weight, std=.02)
    q, x = torch.randn(2, 90, 256), torch.randn(2, 90, 4, 16, 64)
    with torch.no_grad():
        assert CACHED//mix.params.out_features < 180   # more than one block
        assert close(mix(q, x), mix.mix(q, x), 1e-4)
        assert mix(q[:0], x[:0]).shape == (0, 90, 256)

def test_at_the_published_size_generating_costs_more_than_mixing():
    D, G, C, P, O = 256, 4, 64, 64, 128
    generate, mix = D*G*(C*C + O*P) + G*O*C*D, G*P*C*C + G*O*P*C
    assert generate > 3*mix
