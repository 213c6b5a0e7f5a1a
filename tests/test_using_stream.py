"Any number of images of any kind: order, batches, memory, what cannot be read"
import gc, weakref
import numpy as np, pytest, torch
from PIL import Image
from deqdet.data import DataError
from deqdet.equilibrium import Settled
from deqdet.export import load_exported
from deqdet.families.adamixer import AdaMixer
from deqdet.model import Feed
from deqdet.ops.errors import CommandError
from deqdet.ops.folding import folded
from deqdet.predict import detect, find_pictures, predict
from deqdet.using.stream import AHEAD, SUFFIXES

SMALL = dict(body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9, grid=(3, 3, .4), width=32,
             heads=4, groups=2, points=(4,), out_points=8, hidden=64,
             strategy=Settled(steps=3, supervise=(1, 3), recompute=False))
FLAT = dict(min_score=0., max_dets=5)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = AdaMixer(n_classes=4, **SMALL).build(vocab=list('abcd')).eval()
    model.feed = Feed(64, 64)
    return model


def noise(h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


class Counted:
    "A model that notes the shapes of its batches"
    feed, vocab, thresholds = Feed(64, 64), None, None
    def __init__(self): self.batches = []
    def parameters(self): return iter(())
    def predict(self, images, sizes, orig, min_score, max_dets):
        self.batches.append(tuple(images.shape))
        one = dict(scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.long))
        return [dict(one, boxes=torch.tensor([[0., 0, w, h]])) for h, w in orig.tolist()]


@pytest.mark.parametrize('bs', [1, 3, 8])
def test_order_and_sizes_are_those_of_the_images(bs):
    "Portrait and landscape and unreadable ones in turn; a batch holds one shape"
    model, sizes = Counted(), [(64, 30), (30, 64), (100, 200), (64, 64)]*9
    pictures = [noise(*hw) for hw in sizes]
    pictures.insert(5, 'nowhere.png')
    found = list(detect(model, iter(pictures), bs))
    assert [o.picture is p for o, p in zip(found, pictures, strict=True)] == [True]*37 and 'no such image' in found[5].error
    sizes.insert(5, None)
    assert [o.hw for o in found] == sizes
    assert all(o.boxes.tolist() == [[0, 0, o.hw[1], o.hw[0]]] for o in found if not o.error)
    assert sum(b[0] for b in model.batches) == 36 and max(b[0] for b in model.batches) <= bs
    full = [b for b in model.batches if b[0] == bs]
    assert any(b[2:] == (64, 32) for b in full) and any(b[2:] == (32, 64) for b in full)


def test_memory_is_constant():
    "Of 300 images of a generator, never more alive than may wait"
    class Picture(np.ndarray): pass # arrays themselves take no weak references
    alive, most = weakref.WeakSet(), 0
    class Key:
        def __init__(self, x): self.x = x
    def stream():
        nonlocal most
        for i in range(300):
            picture = noise(20 + 2*(i % 3), 40, i).view(Picture)
            key = picture.key = Key(i)
            alive.add(key)
            most = max(most, len(alive))
            yield picture
            del picture, key
    n = 0
    for o in detect(Counted(), stream(), 4): n += 1
    gc.collect()
    assert n == 300 and most <= AHEAD*4 + 4


def test_one_shape_waits_for_one_batch_only():
    read = 0
    def camera():
        nonlocal read
        while True:
            read += 1
            yield noise(48, 64)
    stream = predict(Counted(), camera(), bs=3)
    assert read == 0
    next(stream)
    assert read == 3
    for _ in range(3): next(stream)
    assert read == 6


def test_batches_of_any_kind_say_the_same(model):
    pictures = [noise(64, 48, 1), noise(48, 64, 2), noise(64, 64, 3), noise(30, 90, 4)]*2
    alone = [predict(model, o, 0., max_dets=100) for o in pictures]
    for bs in 2, 5:
        for a, b in zip(alone, predict(model, pictures, 0., bs=bs, max_dets=100)): # nearly equal scores may change places
            for k in 'boxes', 'scores': torch.testing.assert_close(a[k].sort(0).values, b[k].sort(0).values, atol=1e-2, rtol=0)
            assert a.hw == b.hw


FORMATS = 'bmp gif jpg png ppm tga tiff webp avif jp2 pcx sgi qoi'.split()

def test_formats(model, tmp_path):
    "What Pillow writes and reads is found in a folder and read"
    can = {k[1:] for k, v in Image.registered_extensions().items() if v in Image.SAVE}
    formats = [o for o in FORMATS if o in can and f'.{o}' in SUFFIXES]
    assert {'avif', 'gif', 'webp', 'tga'} <= set(formats)
    for o in formats: Image.fromarray(np.full((40, 56, 3), 90, np.uint8)).save(tmp_path/f'x.{o}')
    (tmp_path/'notes.txt').write_text('not an image')
    found = predict(model, tmp_path, **FLAT)
    assert [o.picture.suffix[1:] for o in found] == sorted(formats)
    assert {o.hw for o in found} == {(40, 56)} and not any(o.error for o in found)


def test_modes_of_pillow(model):
    for mode in '1', 'L', 'P', 'RGBA', 'CMYK', 'I;16', 'LA', 'F':
        assert predict(model, Image.new(mode, (56, 40)), **FLAT).hw == (40, 56)


def test_what_counts_as_one(model, tmp_path):
    x = noise(40, 56)
    Image.fromarray(x).save(tmp_path/'x.png')
    for one in x, x[..., 0], torch.from_numpy(x), Image.fromarray(x), tmp_path/'x.png', str(tmp_path/'x.png'):
        assert isinstance(predict(model, one, **FLAT), dict)
    for many, n in ([x], 1), ((x, [x, x]), 3), (np.stack([x, x]), 2), (tmp_path, 1), (f'{tmp_path}/*.png', 1), ([], 0), ({'a': x}.values(), 1):
        assert len(predict(model, many, **FLAT)) == n
    for wrong in 3, None, [3]:
        with pytest.raises(TypeError, match='a path, an image or several'): predict(model, wrong)


def test_broken_ones_are_skipped_with_a_summary(model, tmp_path):
    for i in range(5): (tmp_path/f'{i}.jpg').write_text('no image')
    Image.fromarray(noise(40, 56)).save(tmp_path/'x.png')
    with pytest.warns(UserWarning, match=r'^5 of 6 images could not be read: .*0.jpg: unreadable.*; and 2 more$'):
        found = predict(model, tmp_path, **FLAT)
    assert [o.error is None for o in found] == [False]*5 + [True] and len(found[5].names) == 5
    stream = predict(model, (o for o in [tmp_path/'x.png', 'nowhere.png', tmp_path]), **FLAT)
    with pytest.warns(UserWarning, match='6 of 8 images'): assert len(list(stream)) == 8
    with pytest.raises(DataError, match='0.jpg'): predict(model, tmp_path/'0.jpg')
    with pytest.raises(CommandError, match='nowhere'): predict(model, [tmp_path, 'nowhere'])


def test_a_detector_has_it_as_a_method(model):
    x = noise(64, 64)
    assert model.predict(x, **FLAT) == predict(model, x, **FLAT)
    assert [o.hw for o in model.predict([x, x], tiles=40, nms=.5, **FLAT)] == [(64, 64)]*2
    batch = torch.from_numpy(x).permute(2, 0, 1)[None]
    plain = model.predict(batch, **FLAT)
    assert type(plain[0]) is dict
    torch.testing.assert_close(plain[0]['boxes'], predict(model, x, **FLAT).boxes, atol=1e-3, rtol=0)
    with pytest.raises(TypeError): model.predict(x, colour='red')


def test_tiles_of_small_images_are_the_image(model):
    x = noise(64, 64)
    assert predict(model, x, tiles=(64, 8), **FLAT) == predict(model, x, **FLAT)
    with pytest.raises(ValueError, match='overlap'): predict(model, x, tiles=(64, 64))
    assert predict(Counted(), x, tiles=(40, 8)).boxes.tolist() == [[0, 0, 64, 64]]


def test_thresholds_of_classes_and_nms(model):
    "A bar for each class holds for joined views too; with nms nothing of a class overlaps"
    x = noise(90, 130)
    every = predict(model, x, 0., tiles=(64, 16))
    model.thresholds = [float(every.scores.median())]*2 + [1., 0.]
    try: some = predict(model, x, tiles=(64, 16))
    finally: del model.thresholds
    bars = torch.tensor([float(every.scores.median())]*2 + [1., 0.])
    assert 0 < len(some.names) < len(every.names) and (some.scores >= bars[some.labels]).all() and 'c' not in some.names
    few = predict(model, x, 0., nms=.05)
    from torchvision.ops import box_iou
    same = few.labels[:, None] == few.labels[None]
    assert (box_iou(few.boxes, few.boxes)*same).triu(1).max() <= .05 and len(few.names) < len(predict(model, x, 0.).names)


def test_a_box_for_each_query(tmp_path):
    "A detector with more than 100 queries gives as many detections, unless another number is asked for"
    wide = AdaMixer(n_classes=4, **SMALL | dict(n_queries=121, grid=(11, 11, .2))).build(vocab=list('abcd')).eval()
    wide.feed = Feed(64, 64)
    counts = [len(predict(wide, noise(48, 64), 0., **o).scores) for o in ({}, dict(max_dets=7), dict(max_dets=100))]
    assert counts == [121, 7, 100]
    assert len(predict(folded(wide), noise(48, 64), 0.).scores) == 121
    file = load_exported(wide.export(tmp_path/'wide.pt2', steps=0))
    assert [len(predict(file, noise(48, 64), 0., **o).scores) for o in ({}, dict(max_dets=7))] == [121, 7]


class Planted:
    "A model that finds boxes planted by the width of the view"
    feed, vocab = Feed(200, 200), None
    def __init__(self, planted, thresholds=None): self.planted, self.thresholds = planted, thresholds
    def parameters(self): return iter(())
    def predict(self, images, sizes, orig, min_score, max_dets=None):
        out = []
        for h, w in orig.tolist():
            rows = [o for o in self.planted.get(w, ()) if o[1] >= min_score]
            boxes = torch.tensor([o[0] for o in rows], dtype=torch.float).reshape(-1, 4)
            out.append(dict(boxes=boxes, scores=torch.tensor([o[1] for o in rows]),
                            labels=torch.tensor([o[2] for o in rows], dtype=torch.long)))
        return out


def test_a_box_below_its_bar_removes_none_above():
    "The whole image has a poor box of class 1, which is not cut off; a tile has a good one, cut off"
    box = (150, 0, 200, 50)
    planted = {300: [(box, .3, 1)], 200: [(box, .9, 1)]} # 300: the whole image, 200: each tile
    model = Planted(planted, thresholds=[.2, .6])
    picture = np.zeros((200, 300, 3), np.uint8)
    same_bar = next(detect(model, [picture], min_score=.6, tiles=(200, 100)))
    own_bars = next(detect(model, [picture], min_score=None, tiles=(200, 100)))
    assert len(same_bar.boxes) > 0 and own_bars == same_bar


def test_max_dets_counts_the_detections_of_the_image(model):
    "Of all tiles together, the best ones; without it, tiles add up"
    picture = noise(200, 200)
    every = predict(model, picture, min_score=0., tiles=64)
    few = predict(model, picture, min_score=0., tiles=64, max_dets=7)
    assert len(few.boxes) == 7 and len(every.boxes) > 100
    assert (few.scores.diff() <= 0).all() and few.scores[0] == every.scores[0]


@pytest.mark.parametrize('size', [(64, 64), (64, 40), (128, 128)])
def test_a_generator_may_use_one_array_again(model, size):
    "A camera's buffer: images that wait for their batch keep their pixels"
    pictures = [noise(*size, seed) for seed in range(3)]
    buffer = np.zeros((*size, 3), np.uint8)
    def again():
        for o in pictures:
            buffer[:] = o
            yield buffer
    for a, b in zip(predict(model, again(), **FLAT), predict(model, pictures, **FLAT), strict=True): assert torch.equal(a.boxes, b.boxes)


def test_other_images_do_not_change_the_detections(model):
    "No image is padded to the shape of another one: alone, in small and in large batches it has the same boxes"
    images = [noise(h, w, i) for i, (h, w) in enumerate([(64, 64), (30, 64), (64, 30), (64, 60), (20, 64)])]
    alone = [predict(model, o, **FLAT) for o in images]
    for bs in (2, 8):
        for one, other in zip(alone, predict(model, images, bs=bs, **FLAT)):
            assert torch.allclose(one.scores, other.scores, atol=1e-5) and torch.allclose(one.boxes, other.boxes, atol=1e-2)


def test_hidden_files_are_left_out(tmp_path):
    "As macOS and notebooks leave them beside images; patterns never found them"
    for o in ('a.png', '._a.png', '.ipynb_checkpoints/a.png', '.photos/b.png'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(8, 8)).save(tmp_path/o)
    assert find_pictures([tmp_path]) == find_pictures([tmp_path/'**/*.png']) == [tmp_path/'a.png']
    assert find_pictures([tmp_path/'.photos']) == [tmp_path/'.photos/b.png'] # asked for by name
