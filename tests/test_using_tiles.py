"Tiles cover an image and share a strip; joined, each object is there once"
import pytest, torch
from deqdet.using.tiles import is_cut, join_views, suppress, tile_size, windows, without_doubles


@pytest.mark.parametrize('hw', [(300, 400), (1000, 160), (161, 161), (3000, 4000), (100, 500)])
@pytest.mark.parametrize('tiles', [(160, 40), (160, 0), 160, (150, 100)])
def test_tiles_cover_and_share(hw, tiles):
    size, overlap = tile_size(tiles)
    whole, *rest = windows(hw, tiles)
    h, w = hw
    assert whole == (0, 0, w, h) and len(set(rest)) == len(rest)
    for axis, length in ((0, w), (1, h)):
        starts = sorted({o[axis] for o in rest})
        side = min(size, length)
        assert starts[0] == 0 and starts[-1] + side == length
        assert all(0 < b-a <= side-overlap for a, b in zip(starts, starts[1:]))
    assert all(x >= 0 and y >= 0 and x+tw <= w and y+th <= h for x, y, tw, th in rest)


def test_small_images_are_one_view():
    assert windows((100, 160), 160) == [(0, 0, 160, 100)] and windows((9, 9)) == [(0, 0, 9, 9)]
    assert tile_size(100) == tile_size('100') == (100, 20) and tile_size('640x64') == (640, 64)
    for bad in (100, 100), (100, -1), 0, (0, 0), '640x', '64x64', 'small':
        with pytest.raises(ValueError, match='overlap'): tile_size(bad)


def seen(objects, labels, hw, tiles, noise=0.):
    "What a perfect detector says of each view: boxes cut at the edges of the view, if a third is in sight"
    g = torch.Generator().manual_seed(0)
    views = []
    for x, y, w, h in windows(hw, tiles):
        cut = (objects - torch.tensor([x, y, x, y])).clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        def area(b): return (b[:, 2:] - b[:, :2]).prod(1)
        there = area(cut) > area(objects)/3
        boxes = cut[there] + noise*torch.randn(cut[there].shape, generator=g)
        scores = .5 + .5*torch.rand(int(there.sum()), generator=g)
        views.append(((x, y, w, h), dict(boxes=boxes, scores=scores, labels=labels[there])))
    return views


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('noise', [0., .5])
def test_every_object_once(seed, noise):
    "200 objects of 16 to 32 pixels, none on top of another, in tiles that share 40"
    g = torch.Generator().manual_seed(seed)
    cells = torch.randperm(400, generator=g)[:200]
    side = 16 + 16*torch.rand(200, 2, generator=g)
    corner = 50.*torch.stack([cells % 20, cells//20], 1) + torch.rand(200, 2, generator=g)*(50 - side)
    objects, labels = torch.cat([corner, corner + side], 1), torch.randint(0, 3, (200,), generator=g)
    dets = join_views(seen(objects, labels, (1000, 1000), (160, 40), noise), (1000, 1000))
    assert len(dets['scores']) == 200 and (dets['scores'].diff() <= 0).all()
    gap = (dets['boxes'][:, None] - objects[None]).abs().amax(2)
    nearest = gap.argmin(1)
    assert nearest.unique().numel() == 200 and gap.amin(1).max() <= 6*noise + 1e-3
    assert torch.equal(dets['labels'], labels[nearest])


def test_large_objects_come_from_the_whole():
    objects = torch.tensor([[30., 40, 390, 350], [500., 500, 900, 560]])
    dets = join_views(seen(objects, torch.tensor([0, 1]), (1000, 1000), (160, 40)), (1000, 1000))
    assert sorted(dets['labels'].tolist()) == [0, 1] and sorted(dets['boxes'].tolist()) == objects.tolist()


def test_edges_of_the_image_do_not_cut():
    boxes = torch.tensor([[0., 0, 20, 20], [150., 50, 160, 60], [50., 150, 60, 160], [80., 80, 90, 90]])
    assert is_cut(boxes, (0, 0, 160, 160), (300, 300)).tolist() == [False, True, True, False]
    assert not is_cut(boxes, (0, 0, 160, 160), (160, 160)).any()


def test_other_classes_and_the_same_tile_stay():
    boxes = torch.tensor([[0., 0, 10, 10]]*4)
    kept = without_doubles(boxes, torch.tensor([.9, .8, .7, .6]), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.bool))
    assert kept.tolist() == [0, 1, 2]
    none = torch.zeros(0, dtype=torch.long)
    assert without_doubles(torch.zeros(0, 4), torch.zeros(0), none, none, none.bool()).tolist() == []


def test_suppress_is_off_and_by_class():
    dets = dict(boxes=torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9]]), scores=torch.tensor([.5, .6, .7]), labels=torch.tensor([0, 0, 1]))
    assert suppress(dets, None) is dets
    assert suppress(dets, .8)['scores'].tolist() == pytest.approx([.7, .6]) and len(suppress(dets, .95)['scores']) == 3


def test_suppress_knows_classes_wherever_their_boxes_lie():
    "Left of the image, and beside a box that is larger than any image"
    boxes = torch.tensor([[60., 60, 100, 100], [-41, -41, -1, -1]])
    apart = dict(boxes=boxes, scores=torch.tensor([.9, .8]), labels=torch.tensor([0, 1]))
    assert len(suppress(apart, .5)['scores']) == 2
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 1e20, 1e20]])
    double = dict(boxes=boxes, scores=torch.tensor([.9, .8, .1]), labels=torch.tensor([1, 1, 0]))
    assert suppress(double, .5)['scores'].tolist() == pytest.approx([.9, .1])


@pytest.mark.parametrize('tiles', [(640, 64, 2), ()])
def test_tiles_are_one_number_or_two(tiles):
    with pytest.raises(ValueError, match='overlap'): tile_size(tiles)
