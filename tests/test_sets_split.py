"Groups stay whole, shares come near, and the new set finds the images of the old one; look-alikes across splits"
import json
from io import BytesIO
import numpy as np, pytest, torch
from PIL import Image
from deqdet.sets.check import SAME, look_alikes, thumbnail, verify_data
from deqdet.sets.formats import read_data
from deqdet.sets.images import DataError
from deqdet.sets.shapes import synth_coco
from deqdet.sets.split import divide, group_of, split_data
from deqdet.using.found import Found, save_as


@pytest.mark.parametrize('name, by, group', [
    ('a/b_012.jpg', 'prefix', 'a/b'), ('b-7.png', 'prefix', 'b'), ('0001.jpg', 'prefix', '.'), ('x.jpg', 'prefix', 'x'), ('cam2 frame 17.jpg', 'prefix', 'cam2 frame'),
    ('a/b/c.jpg', 'folder', 'a/b'), ('c.jpg', 'folder', '.'), ('p12_s3.jpg', r'^(p\d+)', 'p12')])
def test_groups(name, by, group): assert group_of(name, by) == group


@pytest.mark.parametrize('by', ['nothing', r'x\d+', r'z(\d)'])
def test_a_pattern_that_does_not_fit_is_named(by):
    with pytest.raises(DataError, match='x1.jpg: by='): group_of('x1.jpg', by)


@pytest.mark.parametrize('seed', range(10))
def test_groups_stay_whole(seed):
    rng = np.random.default_rng(seed)
    names = [f'g{k}_{i}.jpg' for k, n in enumerate(rng.integers(1, 30, rng.integers(2, 20))) for i in range(n)]
    names = [names[i] for i in rng.permutation(len(names))]
    train, valid = divide(names, .25, seed=seed)
    assert sorted(train + valid) == list(range(len(names))) and train and valid
    assert not {group_of(names[i]) for i in train} & {group_of(names[i]) for i in valid}
    assert (train, valid) == divide(names, .25, seed=seed)
    sizes = [sum(group_of(o) == g for o in names) for g in {group_of(o) for o in names}]
    assert abs(len(valid) - .25*len(names)) <= max(sizes)


@pytest.mark.parametrize('sizes, valid_pct, held', [((99, 1), .2, 1), ((50, 50), .2, 50), ((1, 1), .01, 1), ((10, 10, 80), .2, 20)])
def test_uneven_groups(sizes, valid_pct, held):
    names = [f'{"abc"[k]}_{i}.jpg' for k, n in enumerate(sizes) for i in range(n)]
    assert len(divide(names, valid_pct)[1]) == held


@pytest.mark.parametrize('layout', ['coco', 'voc', 'yolo'])
def test_a_set_of_any_layout(tmp_path, layout):
    "The old folder is as it was; the new one has all images and boxes, where they were"
    pictures = []
    for i in range(6):
        Image.new('RGB', (40, 30), (40*i, 0, 0)).save(tmp_path/f'film{i//2}_{i}.png')
        dets = dict(boxes=torch.tensor([[1., 2, 11, 22]]), scores=torch.ones(1), labels=torch.tensor([i % 2]))
        pictures.append(Found(tmp_path/f'film{i//2}_{i}.png', (30, 40), dets, vocab=['cat', 'dog']))
    old = save_as(pictures, tmp_path/'old', layout)
    if layout == 'voc': (old/'ImageSets/Main/train.txt').unlink()
    before = {o: o.read_bytes() for o in old.rglob('*') if o.is_file()}
    new = split_data(old, tmp_path/'deep/new', valid_pct=.3)
    assert {o: o.read_bytes() for o in old.rglob('*') if o.is_file()} == before
    train, valid = read_data(new)
    assert [len(o.coco['images']) for o in (train, valid)] == [4, 2]
    for part in train, valid:
        assert all((part.folder/o['file_name']).is_file() for o in part.coco['images'])
        assert {o['name'] for o in part.coco['categories']} == {'cat', 'dog'}
        assert all(a['bbox'] == pytest.approx([1, 2, 10, 20], abs=.02) for a in part.coco['annotations']) and len(part.coco['annotations']) == len(part.coco['images'])
    assert verify_data(new).counts.keys() <= {'nearly the same in both splits'}


def test_faults_are_named(tmp_path):
    with pytest.raises(DataError, match='no such folder'): split_data(tmp_path/'nowhere', tmp_path/'new')
    with pytest.raises(DataError, match='all 3 images are one group'): divide(['a_1.jpg', 'a_2.jpg', 'a_3.jpg'])
    assert not (tmp_path/'new').exists()


# ---- images that are nearly the same

def scene(seed, hw=(60, 80)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(hw[::-1], Image.BICUBIC)

def jpeg(im):
    file = BytesIO()
    im.save(file, 'JPEG', quality=30)
    return Image.open(file)

def thumb(im): return thumbnail(torch.from_numpy(np.array(im)).permute(2, 0, 1))


def test_sizes_and_encodings_and_shifts_are_the_same():
    a = scene(1, (240, 320))
    frame = scene(1, (242, 322)).crop((2, 2, 322, 242)) # the camera has moved a little
    for b in a.resize((100, 75)), jpeg(a), frame, a.point(lambda v: v*.8 + 20):
        assert thumb(a) @ thumb(b) > SAME
    assert max(thumb(a) @ thumb(scene(i, (240, 320))) for i in range(2, 40)) < .8
    assert thumb(Image.new('RGB', (50, 50), 'red')) is None and thumb(Image.new('RGB', (1, 1))) is None


def test_each_image_once_with_the_nearest():
    train = {f't{i}': thumb(scene(i)) for i in range(5)}
    valid = {'v0': thumb(scene(3).resize((40, 30))), 'v1': thumb(scene(9)), 't2': thumb(scene(2))}
    assert [(a, b) for a, b, r in look_alikes(train, valid)] == [('v0', 't3')] # t2 is the same file, which another check finds
    assert look_alikes({}, valid) == look_alikes(train, {}) == []


def test_a_report_says_it_unless_it_is_fast(tmp_path):
    path = synth_coco(tmp_path/'shapes', n_train=6, n_valid=3, size=64, seed=1)
    assert verify_data(path).ok
    Image.open(path/'images/train_00002.jpg').save(path/'images/valid_00001.jpg', quality=60)
    report = verify_data(path)
    assert [o.kind for o in report.problems] == ['nearly the same in both splits']
    assert report.problems[0].file.endswith('valid_00001.jpg') and report.problems[0].detail.startswith('train_00002.jpg')
    assert verify_data(path, decode=False).ok
