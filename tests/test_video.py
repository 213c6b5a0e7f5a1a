"Detections in films: warm and cold, written films, bad films, the command"
import csv, tracemalloc
import numpy as np, pytest, torch
from deqdet import export # gives a `Detector` the method
from deqdet.model import Detector, Feed
from deqdet.ops.errors import CommandError
from deqdet.predict import save_detector
from deqdet.using import video
from deqdet.using.frames import FilmReader, FilmWriter
from deqdet.using.held import Hold
from deqdet.using.video import Seen, draw_seen, film_names, films_in, predict_video
from deqdet.zoo import create_detector

@pytest.fixture(scope='module')
def model():
    "Random weights; every score is about .01"
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=['a', 'b']).eval()
    model.feed = Feed(64, 64)
    return model

@pytest.fixture
def with_av(): return pytest.importorskip('av', reason='films need PyAV: pip install "deqdet[film]"')

def frames(n, h=48, w=64):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for _ in range(n)]

def write(file, n=12, **size):
    with FilmWriter(file) as out:
        for o in frames(n, **size): out.add(o)
    return file

def test_without_track_as_predict_bit_for_bit(model):
    images = frames(11)
    films = list(predict_video(model, images, min_score=.005, track=False, bs=4))
    for i,(a,b) in enumerate(zip(films, model.predict(images, min_score=.005, bs=4), strict=True)):
        assert a.number == i and len(a.labels) == len(b.labels) > 0
        for k in ('boxes','scores','labels'): assert torch.equal(a[k], b[k])
        assert (a.ids == -1).all()

def test_track_gives_numbers_in_pixels_of_the_frame(model):
    seens = list(predict_video(model, frames(5, 96, 128), min_score=.005))
    ids = [set(o.ids.tolist()) for o in seens]
    assert ids[0] and ids[0] & ids[4] and all(len(i) == len(o.ids) for i,o in zip(ids, seens))
    assert all((o.ids >= 0).all() and o.hw == (96, 128) for o in seens)
    assert max(o.boxes.max() for o in seens) > 70 # beyond what was fed
    assert all((o.scores.diff() <= 0).all() for o in seens)

def test_first_frame_as_a_cold_one(model):
    "With as many applications, all that is held in the first frame is what `predict` finds there"
    image = frames(1)[0]
    seen, = predict_video(model, [image], min_score=.005, steps=model.decoder.length())
    found = model.predict(image, min_score=.005)
    for box in seen.boxes: assert (found.boxes - box).abs().amax(1).min() < 1e-3

def test_memory_does_not_grow_with_length(model):
    def peak(n):
        tracemalloc.start()
        for _ in predict_video(model, (np.zeros((300, 400, 3), np.uint8) for _ in range(n))): pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(2)
    assert peak(30) < peak(6) + 1_000_000 # three frames

def test_seen_picks_draws_and_converts(model, tmp_path):
    dets = dict(boxes=torch.tensor([[1., 2, 30, 40], [5, 5, 20, 20]]), scores=torch.tensor([.9, .4]),
                labels=torch.tensor([0, 1]), ids=torch.tensor([7, 3]))
    seen = Seen(frames(1)[0], dets, .5, 12, ['a', 'b'])
    one = seen.pick(torch.tensor([False, True]))
    assert one.ids.tolist() == [3] and one.names == ['b'] and one.number == 12
    seen.save(tmp_path/'a.png')
    assert (tmp_path/'a.png').exists() and seen._repr_png_()[:4] == b'\x89PNG'
    pytest.importorskip('supervision', reason='pip install "deqdet[supervision]"')
    assert seen.to_supervision().tracker_id.tolist() == [7, 3]

def rows(file):
    with open(file, newline='') as f: return list(csv.DictReader(f))

@pytest.mark.parametrize('h,w', [(48, 64), (49, 65)])
def test_film_and_table(model, with_av, tmp_path, h, w):
    result = model.predict_film(write(tmp_path/'a.mp4', h=h, w=w), tmp_path/'out/b.mp4', min_score=.005)
    assert result.frames == 12 and result.fault is None
    with FilmReader(tmp_path/'out/b.mp4') as shots: assert len(list(shots)) == 12
    table = rows(tmp_path/'out/b.csv')
    assert {int(o['frame']) for o in table} == set(range(12))
    assert len({o['id'] for o in table}) == sum(result.objects.values())

def test_table_alone(model, with_av, tmp_path):
    model.predict_film(write(tmp_path/'a.mp4'), tmp_path/'b.mp4', drawn=False)
    assert (tmp_path/'b.csv').exists() and not (tmp_path/'b.mp4').exists()

def test_film_that_breaks_off_keeps_what_was_found(model, with_av, tmp_path):
    whole = write(tmp_path/'a.mkv', n=60).read_bytes()
    (tmp_path/'cut.mkv').write_bytes(whole[:len(whole)//2])
    result = model.predict_film(tmp_path/'cut.mkv', tmp_path/'b.mp4', min_score=.005)
    assert 5 < result.frames < 60
    with FilmReader(tmp_path/'b.mp4') as shots: assert len(list(shots)) == result.frames
    assert int(rows(tmp_path/'b.csv')[-1]['frame']) == result.frames - 1

def test_ctrl_c_keeps_what_was_found(model, with_av, tmp_path, monkeypatch):
    class Stopped(FilmReader):
        def __iter__(self):
            for i,shot in enumerate(super().__iter__()):
                if i==5: raise KeyboardInterrupt
                yield shot
    monkeypatch.setattr(video, 'FilmReader', Stopped)
    with pytest.raises(KeyboardInterrupt):
        model.predict_film(write(tmp_path/'a.mp4'), tmp_path/'b.mp4', min_score=.005)
    with FilmReader(tmp_path/'b.mp4') as shots: assert len(list(shots)) == 5
    assert int(rows(tmp_path/'b.csv')[-1]['frame']) == 4

def test_command(model, with_av, tmp_path, capsys, monkeypatch):
    from deqdet.cli import deqdet_predict
    monkeypatch.chdir(tmp_path)
    save_detector(model, tmp_path/'det')
    write(tmp_path/'a.mp4')
    assert deqdet_predict('det', ['a.mp4'], out='found.mp4', min_score=.005) == 0
    assert 'a.mp4: 12 frames: ' in capsys.readouterr().out and (tmp_path/'found.csv').exists()
    (tmp_path/'bad.mp4').write_bytes(b'no film')
    assert deqdet_predict('det', ['bad.mp4', 'a.mp4'], out='films') == 2
    said = capsys.readouterr()
    assert said.err.count('\n') == 1 and 'bad.mp4: ' in said.err and 'a.mp4: 12 frames' in said.out
    assert (tmp_path/'films/a.mp4').exists() and not (tmp_path/'films/bad.mp4').exists()

@pytest.mark.parametrize('images,out,line', [
    (['a.mp4', 'b.jpg'], 'x', 'b.jpg: films and images need commands of their own'),
    (['a.mp4', 'c.mp4'], 'x.mp4', 'x.mp4: 2 films need a folder'),
    (['a.mp4'], 'a.mp4', 'it would be overwritten')])
def test_command_refuses(model, with_av, tmp_path, capsys, monkeypatch, images, out, line):
    from deqdet.cli import deqdet_predict
    monkeypatch.chdir(tmp_path)
    save_detector(model, tmp_path/'det')
    for o in ('a.mp4', 'c.mp4'): write(tmp_path/o, 2)
    with pytest.raises(SystemExit) as e: deqdet_predict('det', images, out=out)
    said = capsys.readouterr().err
    assert e.value.code == 2 and line in said and said.count('\n') == 1

def test_a_stack_is_followed_without_numbers(with_av, tmp_path):
    stack = create_detector('adamixer_tiny', vocab=['a', 'b']).eval()
    stack.feed = Feed(64, 64)
    assert video.predict_films(stack, [str(write(tmp_path/'a.mp4', 3))], tmp_path/'b.mp4', min_score=.001) == 0
    assert {o['id'] for o in rows(tmp_path/'b.csv')} == {'-1'}

def test_an_exported_file_detects_in_films(model, with_av, tmp_path, capsys):
    from deqdet.cli import deqdet_predict
    film = write(tmp_path/'a.mp4', 3)
    Detector.export(model, tmp_path/'m.pt2', steps=1)
    assert deqdet_predict(str(tmp_path/'m.pt2'), [str(film)], out=str(tmp_path/'b.mp4'), min_score=.001) == 0
    assert 'a.mp4: 3 frames: ' in capsys.readouterr().out and {o['id'] for o in rows(tmp_path/'b.csv')} == {'-1'}

def test_options_of_images_are_refused_for_films():
    "Until now they were left out without a word"
    for k in ('tiles','nms','max_dets','layout'):
        with pytest.raises(CommandError, match=f'--{k} is for images'): films_in(['a.mp4'], **{k: 1})
    assert films_in(['a.mp4'], tiles=None) == ['a.mp4'] and films_in(['a.jpg'], tiles=64) == []

def test_names():
    assert films_in(['a.jpg', 'b/*.png']) == [] and films_in(['a.MP4', '0']) == ['a.MP4', '0']
    assert [str(o) for o in film_names(['x/a.mp4', 'y/a.mp4', '0'], 'out')] == ['out/a_0.mp4', 'out/a_1.mp4', 'out/camera0_2.mp4']

@pytest.mark.parametrize('name', ['x.gif', 'x.WEBP', 'x.mpg'])
def test_a_film_that_cannot_be_written_is_no_folder(tmp_path, name):
    "It was a folder of that name"
    out = tmp_path/name
    with pytest.raises(CommandError, match=r'\.avi, .*\.webm was expected'): film_names(['a.mp4'], str(out))
    out.mkdir()
    assert film_names(['a.mp4'], out) == [out/'a.mp4']
    assert film_names(['a.mp4'], tmp_path/'run.v2') == [tmp_path/'run.v2/a.mp4']

def test_letters_that_pillows_font_lacks():
    "Two Russian names were the same row of empty boxes"
    image = np.zeros((40, 80, 3), np.uint8)
    dets = dict(boxes=torch.tensor([[5., 20, 60, 35]]), scores=torch.ones(1), labels=torch.zeros(1).long(), ids=torch.zeros(1).long())
    a,b = (np.asarray(draw_seen(image, Seen(image, dets, vocab=[name]))) for name in ('\u0434\u043e\u043c', '\u043a\u043e\u0442'))
    assert (a != b).any()

def test_a_stack_cannot_track(model):
    from deqdet.ops.errors import CommandError
    with pytest.raises(CommandError, match='needs an equilibrium'):
        predict_video(create_detector('adamixer_tiny', n_classes=2), frames(1))

def test_a_film_is_not_written_over_itself(model, with_av, tmp_path):
    "Nor over itself under another name"
    film = write(tmp_path/'film.mp4')
    before = film.read_bytes()
    (tmp_path/'link.mp4').symlink_to(film)
    for out in (film, str(film), tmp_path/'link.mp4'):
        with pytest.raises(CommandError, match='would be overwritten'): model.predict_film(film, out)
        assert film.read_bytes() == before
    assert not (tmp_path/'film.csv').exists()
    model.predict_film(film, film, drawn=False)
    assert film.read_bytes() == before and (tmp_path/'film.csv').exists()

def test_a_hold_keeps_its_score(model):
    "`take` of a given `Hold` counts, unless `min_score` is given"
    images = frames(4)
    def n(**kwargs): return sum(len(o.boxes) for o in predict_video(model, images, **kwargs))
    some = n(min_score=.005)
    assert some > 0 == n()
    assert n(hold=Hold(take=.005)) == n(hold=Hold(take=.9), min_score=.005) == some
    model.thresholds = [.005, .005]
    try: assert n(hold=Hold(patience=3)) == n() == some and n(hold=Hold(take=.9)) == 0
    finally: model.thresholds = None
