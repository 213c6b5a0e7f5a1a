"Generated films: the same seed, frames in any order, truth that fits the pixels"
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest
from deqdet.sets.films import Actor, Film, Frame, cut_out, sprites_from
from deqdet.sets.scenes import KIND_NAMES
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

@contextmanager
def clock(name): yield

@pytest.fixture
def films(monkeypatch):
    "The benchmark"
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]/'benchmarks'))
    import films
    return films

@pytest.fixture(scope='module')
def tiny():
    from deqdet.zoo import create_detector
    return create_detector('deqdet_tiny', vocab=KIND_NAMES[:12])

def test_the_benchmark_follows_a_film(films, tiny):
    "Cold detections and warm tracks of every frame, on the features of one pass"
    rules = [films.Rule.read(text) for text in ('1', '2', '2:1')]
    frames,found,applied = films.one_film(tiny, Film(seed=1, n=3, size=64), rules, .5, clock)
    assert len(frames)==3 and all(len(dets)==3 for dets in found.values())
    assert applied=={rules[0]: [2]*3, rules[1]: [3]*3, rules[2]: [3]*3} # g, and two of f

def test_a_rule_is_read(films):
    assert films.Rule.read('5')==(5, 0, 0.)
    assert films.Rule.read('5@.05')==(5, 0, .05)
    assert films.Rule.read('2:3')==(2, 3, 0.)
    assert films.Rule.read('5:3@.1')==(5, 3, .1)
    with pytest.raises(ValueError): films.Rule.read('5:3:.1')

def test_a_frame_of_the_benchmark_ends_at_the_tolerance(films, tiny):
    "A tolerance that all residuals meet ends after one application, one that none meets never"
    rules = [films.Rule.read(text) for text in ('3', '3@1e9', '3@1e-9', '1', '3:2@1e9', '3:2@1e-9')]
    three,early,late,one,warm_early,warm_late = rules
    _,found,applied = films.one_film(tiny, Film(seed=1, n=4, size=64), rules, .5, clock)
    assert applied[early]==[2]*4 and applied[late]==[4]*4
    assert applied[warm_early]==[2, 1, 2, 1] and applied[warm_late]==[4, 3, 4, 3] # g in every second frame
    for a,b in ((early, one), (late, three)):
        for x,y in zip(found[a], found[b]): assert all(np.allclose(x[k], y[k], atol=1e-4) for k in x)

def test_the_benchmark_measures_how_soon_a_map_settles(films, tiny):
    rows = films.settling(tiny, Film(seed=1, n=3, size=64), each=2)
    assert len(rows['cold'])==len(rows['warm'])==1
    few = films.typical([dict(residual=[.3, .15, .04, .06]), dict(residual=[.3, .3, .3, .3])])
    assert few['applications_to']=={.2: 3.5, .1: 4., .05: 4.} # 5: never
    assert np.allclose(few['residual'], [.3, .225, .17, .18])
    for row in (rows['cold'][0], rows['warm'][0]):
        assert all(len(o)==films.FAR for o in row.values())
        assert np.allclose(row['residual'], row['rest'], rtol=1e-5) # an untrained detector sees nothing

@pytest.mark.parametrize('pairs', (False, True))
def test_the_benchmark_trains_a_contracting_detector(films, tiny, tmp_path, pairs, monkeypatch):
    "The callbacks change what is learned, and the detector can be read again"
    from deqdet.predict import load_detector
    monkeypatch.setattr(films, 'TRAIN', range(1000, 1002))
    monkeypatch.setattr(films, 'VALID', range(2000, 2001))
    films.make(tmp_path/'set', each=2, size=64, n=12)
    tiny.save_pretrained(tmp_path/'det')
    def trained(name, *args):
        films.tune(tmp_path/'set', tmp_path/'det', tmp_path/name, films.extras(*args), 1e-3, 64)
        return load_detector(tmp_path/name).state_dict()
    plain,contract = trained('plain', pairs, False),trained('contract', pairs, True)
    assert plain.keys()==contract.keys()
    assert any(not plain[k].equal(contract[k]) for k in plain if k.startswith('decoder.step'))
    assert len(films.extras(pairs, True))==2 + pairs

def test_moves_of_some_queries(films):
    "Only the second of three queries moves, by a tenth of its contents"
    from types import SimpleNamespace
    import torch
    from deqdet.decoder import State
    from deqdet.equilibrium import measure_boxes
    a = State(torch.ones(1, 3, 4), torch.tensor([50., 50., 4., 0.]).expand(1, 3, 4))
    b = a._replace(content=a.content.clone())
    b.content[0, 1] = 10/9
    decoder = SimpleNamespace(measure=measure_boxes)
    def moved(*which): return films.moves(decoder, [a, b, b], torch.tensor(which))
    assert np.allclose(moved(False, True, False), [.1, 0], atol=1e-6)
    assert moved(True, False, True)==[0, 0]
    assert 0 < moved(True, True, True)[0] < .1
