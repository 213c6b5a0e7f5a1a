"Recipes against coloured rectangles: wherever the pixels go, the colour says where the object is"
import pickle, random
from collections import Counter
from types import SimpleNamespace
import numpy as np, pytest, torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from deqdet.boxes import area
from deqdet.data import det_dls, synth_coco, uncollate
from deqdet.sets.augment import (AUGMENT, Augment, Fit, RandomSpanCrop, feed_tfm, fit_hw, recipe_1x, recipe_2x,
    recipe_small, resize_long)
from deqdet.sets.images import Target

COLOURS = torch.tensor([[220, 40, 40], [40, 190, 60], [50, 80, 230], [230, 200, 40]])
SPOTS = torch.tensor([[40., 60, 180, 200], [220, 40, 300, 150], [360, 250, 600, 440], [90, 300, 130, 330]])

def board(h=480, w=640):
    "An image (3,h,w) of four coloured rectangles on grey, and its `Target`"
    img = torch.full((3, h, w), 90, dtype=torch.uint8)
    boxes = (SPOTS*torch.tensor([w/640, h/480]).repeat(2)).round()
    for c,(x1,y1,x2,y2) in zip(COLOURS, boxes.int().tolist()): img[:, y1:y2, x1:x2] = c[:, None, None]
    size = torch.tensor([h, w])
    return img, Target(boxes, torch.arange(4), size, torch.tensor(7), size)

def seen(img):
    "Corners of what has the colour of each object, None where nothing has"
    palette = torch.cat([COLOURS, torch.full((1, 3), 90)])
    owner = torch.stack([(img.int() - c[:, None, None]).abs().sum(0) for c in palette]).argmin(0)
    res = []
    for k in range(4):
        y = (owner == k).any(1).nonzero()
        x = (owner == k).any(0).nonzero()
        res.append(torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1]).float() if len(x) else None)
    return res

def gap(img, target):
    "Largest distance in pixels between the boxes and the colours they belong to"
    found = seen(img)
    return max((found[k] - b).abs().max().item() for b,k in zip(target.boxes, target.labels.tolist()))

def same(a, b): return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x,y in zip(a[1], b[1]))

@pytest.fixture
def sample(): return board()

# ---- one transform at a time

def test_the_board_is_exact(sample): assert gap(*sample)==0

def test_boxes_in_a_plain_tensor_stay_behind(sample):
    "Why there is `Augment`"
    img,target = sample
    flip = v2.RandomHorizontalFlip(p=1)
    flipped,boxes = flip({'image': tv_tensors.Image(img), 'boxes': target.boxes}).values()
    assert torch.equal(boxes, target.boxes) and gap(flipped, target._replace(boxes=boxes)) > 100

def test_augment_moves_boxes_and_returns_plain_tensors(sample):
    img,target = sample
    flipped = Augment(v2.RandomHorizontalFlip(p=1))(img, target)
    assert gap(*flipped)==0
    assert torch.equal(flipped[1].boxes[:, 0], 640 - target.boxes[:, 2])
    assert [type(o) for o in flipped[1]]==[torch.Tensor]*5 and type(flipped[0]) is torch.Tensor

def test_resize_long_keeps_the_whole_image_whole():
    whole = Target(torch.tensor([[0.,0,333,50]]), torch.tensor([0]), torch.tensor([50,333]), torch.tensor(0))
    x,t = resize_long(torch.zeros(3,50,333, dtype=torch.uint8), whole, 100)
    assert x.shape==(3,15,100)
    torch.testing.assert_close(t.boxes, torch.tensor([[0.,0,100,15]]), atol=1e-5, rtol=0)
    assert (t.size.tolist(), t.orig.tolist())==([15,100], [50,333])
    assert resize_long(torch.zeros(3,8000,50, dtype=torch.uint8), whole, 64)[0].shape==(3,64,1)

def test_resize_long_follows_the_pixels(sample):
    for size in (100, 320, 900): assert gap(*resize_long(*sample, size)) <= .5*max(1, size/640)

# ---- sizes

def test_torchvision_is_one_pixel_short(sample):
    assert tuple(v2.RandomShortestSize([800], max_size=1333)(sample[0]).shape[-2:])==(800, 1066)

@pytest.mark.parametrize('hw,fit', {(480,640): (800,1067), (640,480): (1067,800), (427,640): (800,1199),
    (375,500): (800,1067), (333,500): (800,1201), (480,500): (800,833), (400,1200): (444,1333), (1600,2666): (800,1333),
    (1,5000): (1,1333)}.items())
def test_sizes_are_the_published_ones(hw, fit): assert fit_hw(hw, 800, 1333)==fit

def test_fit_scales_each_axis_by_its_own_ratio(sample):
    img,target = sample
    fitted = Augment(Fit(800))(img, target)
    assert fitted[1].size.tolist()==[800, 1067] and gap(*fitted) <= .5
    scale = torch.tensor([1067/640, 800/480]).repeat(2)
    torch.testing.assert_close(fitted[1].boxes, target.boxes*scale, atol=1e-4, rtol=0)
    whole = target._replace(boxes=torch.tensor([[0., 0, 640, 480]]), labels=torch.tensor([0]))
    got = Augment(Fit(800))(img, whole)[1].boxes
    torch.testing.assert_close(got, torch.tensor([[0., 0, 1067, 800]]), atol=1e-3, rtol=0)

@pytest.fixture
def noisy():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 120, 160), generator=g, dtype=torch.uint8)

@pytest.mark.parametrize('hw', [[200, 267], [80, 107]])
def test_bytes_are_resized_as_floats_are(noisy, hw):
    "To one grey level"
    assert (F.resize(noisy, hw) - F.resize(noisy.float(), hw)).abs().max().item() <= 1.01

@pytest.mark.parametrize('hw', [[200, 267], [80, 107], [333, 161]])
def test_flip_and_resize_commute(noisy, hw):
    "To one grey level, so the flip may come first, where it is cheaper"
    torch.testing.assert_close(F.resize(noisy.flip(-1), hw), F.resize(noisy, hw).flip(-1), atol=1, rtol=0)

def test_boxes_at_the_edge_survive_the_resize():
    "480.00003 of 480 pixels is outside, and what is outside is dropped"
    for h in range(386, 600, 3):
        edge = torch.tensor([[3., 3., 500., h]])
        target = Target(edge, torch.tensor([0]), torch.tensor([h, 500]), torch.tensor(0))
        fitted = recipe_1x(short=480)(torch.zeros(3, h, 500, dtype=torch.uint8), target)[1]
        assert len(fitted.labels)==1 and (fitted.boxes[0,2:] <= fitted.size.flip(0)).all(), h

# ---- 1x

def test_half_is_flipped_and_nothing_else_changes():
    "Of 1000 draws between 450 and 550: three standard deviations are 47"
    torch.manual_seed(0)
    small = board(48, 64)
    draws = [recipe_1x(short=48, long=64)(*small) for _ in range(1000)]
    flips = sum((t.boxes[0,0] != small[1].boxes[0,0]).item() for _,t in draws)
    assert 450 < flips < 550
    for _,t in draws[:20]: assert (t.image_id.item(), t.orig.tolist(), t.labels.tolist())==(7, [48, 64], [0, 1, 2, 3])

def test_1x_boxes_lie_on_their_colours():
    torch.manual_seed(0)
    for h,w in [(480, 640), (640, 427), (375, 500), (300, 1200)]:
        for _ in range(3): assert gap(*recipe_1x()(*board(h, w))) <= .75

# ---- crops

def test_a_crop_alone_leaves_boxes_without_extent(sample):
    "Why the recipes sanitize: the object is gone, its label is not"
    torch.manual_seed(3)
    cut = Augment(RandomSpanCrop(200, 300))(*sample)
    assert (area(cut[1].boxes) == 0).any() and len(cut[1].labels)==4

def test_sanitized_crops_keep_boxes_and_labels_together(sample):
    torch.manual_seed(3)
    clean = Augment(RandomSpanCrop(200, 300), v2.SanitizeBoundingBoxes())(*sample)
    assert len(clean[1].boxes)==len(clean[1].labels) and (area(clean[1].boxes) > 0).all()
    assert gap(*clean)==0

def test_a_crop_without_objects_is_an_image(sample):
    img,target = sample
    lonely = target._replace(boxes=target.boxes[3:], labels=target.labels[3:])
    torch.manual_seed(0)
    crops = [Augment(RandomSpanCrop(150, 250), v2.SanitizeBoundingBoxes())(img, lonely) for _ in range(200)]
    empty = [t for _,t in crops if not len(t.labels)]
    assert [empty[0].boxes.shape, empty[0].labels.shape, empty[0].boxes.dtype]==[(0, 4), (0,), torch.float32]
    assert Augment(v2.RandomHorizontalFlip(p=1), Fit(800))(img, empty[0])[1].boxes.shape==(0, 4)

def test_regions_cover_their_range_inside_the_image():
    crop = RandomSpanCrop()
    torch.manual_seed(0)
    spans = [crop.make_params([torch.zeros(3, 533, 900)]) for _ in range(2000)]
    hs,ws = (np.array([s[k] for s in spans]) for k in ('height', 'width'))
    assert (hs.min(), hs.max(), ws.min(), ws.max())==(384, 533, 384, 600)
    assert all(s['top'] + s['height'] <= 533 and s['left'] + s['width'] <= 900 for s in spans)
    assert {crop.make_params([torch.zeros(3, 300, 1000)])['height'] for _ in range(20)}=={300}
    assert abs(hs.mean() - (384 + 533)/2) < 4 and abs(ws.mean() - (384 + 600)/2) < 6

# ---- 2x

def drawn_sizes(hw, n):
    "Sizes that the 2x recipe gives images of one size; a lone box is enough, its canvas travels with it"
    torch.manual_seed(0)
    fits = recipe_2x().tfms.transforms[1]
    ghost = tv_tensors.BoundingBoxes(torch.zeros(1, 4), format='XYXY', canvas_size=hw)
    return [fits(ghost).canvas_size for _ in range(n)]

def test_2x_draws_each_short_side_as_often():
    "A share of 1/11 in 1100 draws has a standard deviation of 9.5"
    sides = Counter(min(s) for s in drawn_sizes((480, 640), 1100))
    assert sorted(sides)==list(range(480, 801, 32))
    assert all(100 - 4*9.5 < n < 100 + 4*9.5 for n in sides.values())

def test_2x_bounds_the_long_side():
    sizes = drawn_sizes((300, 1200), 300)
    assert max(max(s) for s in sizes)==1333 and (333, 1333) in sizes

def test_2x_boxes_lie_on_their_colours():
    "And a colour that is seen but has no box is a sliver at most"
    torch.manual_seed(0)
    worst = lost = 0
    for i in range(24):
        x,t = recipe_2x()(*board(480, 640) if i % 2 else board(640, 427))
        if len(t.labels): worst = max(worst, gap(x, t))
        for k in {0, 1, 2, 3} - set(t.labels.tolist()):
            if (s := seen(x)[k]) is not None: lost = max(lost, (s[2:] - s[:2]).min().item())
    assert worst < 1.5 and lost <= 2

# ---- small sets, and sizes that a detector is fed

def test_the_small_recipe_varies_scale_only_downwards(sample):
    torch.manual_seed(0)
    sizes = Counter(recipe_small(128)(*sample)[1].size.max().item() for _ in range(200))
    assert sorted(sizes)==[96, 104, 112, 120, 128]
    assert recipe_small(128, train=False)(*sample)[1].size.tolist()==[96, 128]
    plain = recipe_small(128, least=1, jitter=0)
    assert max(gap(*plain(*sample)) for _ in range(10)) <= .5

@pytest.mark.parametrize('augment', AUGMENT)
def test_no_augmentation_feeds_more_than_the_input_size(augment):
    "A square image fits the short side in training too"
    feed = SimpleNamespace(short=96, long=160)
    for _ in range(8): assert max(feed_tfm(feed, augment)(*board(200, 200))[1].size.tolist()) <= 96

def test_feed_tfm_is_the_recipe_its_name_says():
    feed = SimpleNamespace(short=96, long=160)
    crop = recipe_2x(True, [58, 61, 65, 69, 73, 77, 81, 84, 88, 92, 96], [48, 60, 72], [46, 72], 160)
    want = dict(none=recipe_1x(False, 96, 160), flip=recipe_1x(True, 96, 160), crop=crop, small=recipe_small(160, short=96))
    assert list(AUGMENT)==list(want)
    for k in AUGMENT:
        assert repr(feed_tfm(feed, k))==repr(want[k])
        for seed in range(5):
            torch.manual_seed(seed); a = feed_tfm(feed, k)(*board(96, 128))
            torch.manual_seed(seed); b = want[k](*board(96, 128))
            assert same(a, b)
    assert repr(feed_tfm(feed))==repr(want['none'])
    with pytest.raises(ValueError, match="augment='flop': one of none, flip, crop, small"): feed_tfm(feed, 'flop')

# ---- seeds, copies and processes

RECIPES = dict(one=recipe_1x, two=recipe_2x, small=lambda: recipe_small(128))

@pytest.mark.parametrize('name', RECIPES)
def test_a_seed_decides_everything(sample, name):
    "Generators other than torch's have no say, a pickled recipe draws the same, and the input is left alone"
    recipe = RECIPES[name]()
    def drawn(recipe, seed=4):
        torch.manual_seed(seed)
        return recipe(*sample)
    first = drawn(recipe)
    random.seed(1); np.random.seed(1)
    assert same(first, drawn(recipe)) and same(first, drawn(pickle.loads(pickle.dumps(recipe))))
    assert same(sample, board())

def test_seeds_differ(sample):
    sizes = set()
    for seed in range(8):
        torch.manual_seed(seed)
        sizes.add(tuple(recipe_2x()(*sample)[1].size.tolist()))
    assert len(sizes) > 3

def test_recipes_in_loaders(tmp_path):
    "File, recipe, padded batch: the training set varies, the validation set does not"
    path = synth_coco(tmp_path, n_train=8, n_valid=4, size=96)
    dls = det_dls(path, bs=4, tfms=(recipe_small(128), recipe_small(128, train=False)), num_workers=0)
    images,sizes,target = dls.train.one_batch()
    assert dls.valid.one_batch()[1].tolist()==[[128, 128]]*4
    assert images.shape[-2:]==(128, 128) and (sizes <= 128).all()
    for image,t in uncollate((images, sizes, target)):
        height,width = image.shape[-2:]
        assert (t.boxes >= 0).all() and (t.boxes[:, :2] < t.boxes[:, 2:]).all()
        assert (t.boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
