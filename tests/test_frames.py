"Films in and out: sizes, times, damage, memory"
import tracemalloc
import numpy as np, pytest
pytest.importorskip('av', reason='films need PyAV: pip install "deqdet[film]"')
from deqdet.ops.errors import CommandError
from deqdet.using.frames import FilmReader, FilmWriter, is_camera

def picture(i, h=64, w=96):
    "A grey frame with a bright square that moves"
    image = np.full((h, w, 3), 60, np.uint8)
    image[20:36, i%40:i%40+16] = 220
    return image

def write(file, n=30, rate=24, times=None, **size):
    with FilmWriter(file, rate) as out:
        for i in range(n): out.add(picture(i, **size), None if times is None else times[i])
    return file

def read(file):
    with FilmReader(file) as shots: return list(shots),shots

@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov', '.avi', '.webm'])
def test_round_trip(tmp_path, suffix):
    shots,reader = read(write(tmp_path/f'a{suffix}'))
    assert len(shots) == 30 and reader.fault is None
    assert abs(shots[12].image.astype(int) - picture(12)).mean() < 8
    assert [o.time for o in shots] == sorted(o.time for o in shots)
    assert abs(shots[24].time - 1) < .05

@pytest.mark.parametrize('h,w', [(63, 97), (64, 97), (33, 64), (2, 2)])
def test_odd_sizes(tmp_path, h, w):
    shots,_ = read(write(tmp_path/'a.mp4', h=h, w=w))
    assert shots[0].image.shape == (h + h%2, w + w%2, 3)

def test_uneven_times_are_kept(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([.02, .04, .5], 30)).tolist()
    shots,_ = read(write(tmp_path/'a.mp4', times=times))
    assert np.allclose([o.time for o in shots], np.array(times) - times[0], atol=.002)

def test_a_frame_of_another_size(tmp_path):
    with FilmWriter(tmp_path/'a.mp4') as out:
        for i in range(6): out.add(picture(i, *((64, 96) if i < 3 else (32, 32))))
    shots,_ = read(tmp_path/'a.mp4')
    assert {o.image.shape for o in shots} == {(64, 96, 3)}

def test_cut_off_film_gives_what_there_is(tmp_path):
    whole = write(tmp_path/'a.mkv', n=200).read_bytes()
    (tmp_path/'b.mkv').write_bytes(whole[:len(whole)//2])
    shots,_ = read(tmp_path/'b.mkv')
    assert 20 < len(shots) < 200

def test_damage_in_the_middle_is_skipped_and_said(tmp_path):
    data = bytearray(write(tmp_path/'a.mkv', n=200).read_bytes())
    rng = np.random.default_rng(1)
    start = len(data)//3
    data[start:start+1500] = rng.integers(0, 256, 1500, dtype=np.uint8).tobytes()
    (tmp_path/'b.mkv').write_bytes(data)
    shots,reader = read(tmp_path/'b.mkv')
    assert len(shots) > 30
    if reader.damaged: assert str(reader.damaged) in reader.fault and '\n' not in reader.fault

@pytest.mark.parametrize('content', [b'', b'no film', b'\0'*4000])
def test_no_film_is_one_line(tmp_path, content):
    (tmp_path/'a.mp4').write_bytes(content)
    with pytest.raises(CommandError) as e: FilmReader(tmp_path/'a.mp4')
    assert 'a.mp4' in str(e.value) and '\n' not in str(e.value)

def test_sound_without_frames_is_one_line(tmp_path):
    import av
    with av.open(str(tmp_path/'a.mkv'), 'w') as box:
        stream = box.add_stream('aac', rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        frame.sample_rate = 8000
        box.mux(stream.encode(frame))
        box.mux(stream.encode(None))
    with pytest.raises(CommandError, match='no frames in it'): FilmReader(tmp_path/'a.mkv')

def test_missing_file_and_camera():
    with pytest.raises(CommandError, match='none.mp4: No such file'): FilmReader('none.mp4')
    with pytest.raises(CommandError, match='camera 97'): FilmReader(97)
    assert is_camera('0') and not is_camera('0.mp4')

def test_unknown_suffix_leaves_no_file(tmp_path):
    with pytest.raises(CommandError, match='was expected'): FilmWriter(tmp_path/'a.txt')
    with FilmWriter(tmp_path/'b.mp4'): pass
    assert not list(tmp_path.iterdir())

def test_memory_does_not_grow_with_length(tmp_path):
    "Peak of Python's memory while a film is read: 400 frames need no more than 40"
    def peak(n):
        file = write(tmp_path/f'{n}.mp4', n=n)
        tracemalloc.start()
        with FilmReader(file) as shots:
            for _ in shots: pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    assert peak(400) < 1.5*peak(40) + 200_000

@pytest.mark.parametrize('degrees', [0, 90, -90, 180])
def test_frames_are_turned_upright(degrees):
    "A film says by how many degrees, anticlockwise, its frames are to be turned"
    from deqdet.using.frames import _upright
    class Frame:
        rotation = degrees
        def to_ndarray(self, format, width, height): return picture(3)
    turned = np.asarray(_upright(Frame(), (96, 64)))
    assert np.array_equal(np.rot90(turned, -degrees//90 % 4), picture(3))
