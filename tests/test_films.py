"Generated films: the same seed, frames in any order, truth that fits the pixels"
import sys
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest
from deqdet.sets.films import Actor, Film, Frame, cut_out, sprites_from
from PIL import Image

def disc(side=40, rgb=(250, 20, 20)):
    "A sprite of one colour, twice as large as in the film"
    y,x = np.mgrid[:2*side, :2*side] - side + .5
    alpha = 255*(x**2 + y**2 <= side**2)
    return Image.fromarray(np.dstack([np.full((2*side, 2*side, 3), rgb), alpha]).astype(np.uint8))

def actor(place, speed=(0, 0), **kwargs):
    return Actor(disc(), 0, np.array(place, float), np.array(speed, float), **{**dict(first=0, last=20), **kwargs})

def film(actors, **kwargs): return Film(n=20, size=128, shake=0., noise=0., actors=actors, **kwargs)

def test_same_seed_same_film_in_any_order():
    a,b = Film(seed=5, n=8, size=96, objects=4),Film(seed=5, n=8, size=96, objects=4)
    forwards = list(a)
    for t in (6, 0, 3):
        for x,y in zip(vars(forwards[t]).values(), vars(b[t]).values()): assert np.array_equal(x, y)
    assert not np.array_equal(Film(seed=6, n=8, size=96, objects=4)[3].image, forwards[3].image)
    assert len(forwards) == len(a) == 8

@pytest.mark.parametrize('seed', range(4))
def test_boxes_lie_in_the_frame_and_numbers_are_single(seed):
    f = Film(seed=seed, n=12, size=96, objects=6)
    for frame in f:
        assert frame.image.shape == (96, 96, 3) and frame.image.dtype == np.uint8
        assert len(set(frame.ids.tolist())) == len(frame.ids) == len(frame.boxes) == len(frame.labels)
        if not len(frame.boxes): continue
        assert frame.boxes.min() >= 0 and frame.boxes.max() <= 96
        assert (frame.boxes[:, 2:] > frame.boxes[:, :2]).all()
        assert ((frame.seen >= f.least) & (frame.seen <= 1)).all()

def test_box_follows_the_path():
    f = film([actor((64, 64), (2, -1))])
    for t in (6, 10, 14):
        x1,y1,x2,y2 = f[t].boxes[0]
        assert abs((x1+x2)/2 - (64 + 2*(t-10))) < 1 and abs((y1+y2)/2 - (64 - (t-10))) < 1
        assert abs(x2 - x1 - 40) <= 2

def test_hidden_object_leaves_the_truth_and_keeps_its_number():
    "The second actor passes in front of the first, which stands"
    f = film([actor((64, 64)), actor((64, 64), (8, 0))])
    assert f[3].ids.tolist() == [1, 2]
    assert f[10].ids.tolist() == [2]
    assert f[17].ids.tolist() == [1, 2]

def test_camera_moves_all_together():
    "Between two frames, boxes of objects that stand move by the camera's step"
    still = [actor((40, 40)), actor((90, 90))]
    f = Film(seed=1, n=20, size=128, shake=3., noise=0., actors=still)
    a,b = f[4].boxes,f[9].boxes
    step = (np.round(f.camera[9]) - np.round(f.camera[4]))[::-1]
    assert abs(step).max() > 0
    assert np.allclose(b - a, np.tile(step, 2), atol=.01)

def test_cutouts_are_what_lies_in_the_box(tmp_path):
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[10:40, 20:70] = (0, 200, 0)
    Image.fromarray(picture).save(tmp_path/'a.png')
    sprite = np.asarray(cut_out(tmp_path/'a.png', (20, 10, 70, 40), 50))
    assert max(sprite.shape[:2]) == 100
    middle = sprite[sprite.shape[0]//2, sprite.shape[1]//2]
    assert middle.tolist() == [0, 200, 0, 255]
    assert sprite[0, 0, 3] == 0

def test_cutouts_of_real_photographs(data_dir):
    from deqdet.sets.formats import read_voc
    source = read_voc(data_dir/'bccd', 'val')
    cutouts = sprites_from(source)
    f = Film(seed=1, n=4, size=128, objects=4, kinds=cutouts.kinds, cutouts=cutouts)
    assert len(list(f)) == 4 and set(f[2].labels.tolist()) <= set(cutouts.kinds)

def test_the_benchmark_follows_a_film():
    "Cold detections and warm tracks of every frame, on the features of one pass"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
    from films import one_film
    from deqdet.zoo import create_detector
    @contextmanager
    def clock(name): yield
    model = create_detector('deqdet_tiny', vocab=list('abcd'))
    frames,colds,warms,applied = one_film(model, Film(seed=1, n=3, size=64), [1, 2], [(2, 1)], .5, clock)
    assert len(frames)==len(colds[1])==len(colds[2])==len(warms[2, 1])==3
    assert applied=={(2, 1): 3.} # g, and two of f
