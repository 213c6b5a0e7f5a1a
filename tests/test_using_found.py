"What was found in an image: its dict, its images, and its ways into other programs"
import copy, json, pickle
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from deqdet.sets.formats import read_data
from deqdet.using.found import Found, save_as, to_coco, to_frame, to_supervision

VOCAB = ['cat', 'dog']


def found(picture='x.png', hw=(40, 60), n=3, vocab=VOCAB):
    g = torch.Generator().manual_seed(n)
    corners = torch.rand(n, 2, generator=g)*20
    boxes = torch.cat([corners, corners + 5 + 10*torch.rand(n, 2, generator=g)], 1)
    scores = torch.rand(n, generator=g).sort(descending=True).values
    return Found(picture, hw, dict(boxes=boxes, scores=scores, labels=torch.arange(n)%2), vocab=vocab)


@pytest.fixture
def pictures(tmp_path):
    "Three images of 60 x 40 in two folders, two of them with the same name"
    files = [tmp_path/o for o in ('a/x.png', 'b/x.png', 'b/y.jpg')]
    for i, f in enumerate(files):
        f.parent.mkdir(exist_ok=True)
        Image.new('RGB', (60, 40), (40*i, 0, 0)).save(f)
    return files


def test_it_is_a_dict_and_has_names_for_it():
    f = found()
    assert set(f) == {'boxes', 'scores', 'labels', 'names'} and f.names == ['cat', 'dog', 'cat']
    assert f['boxes'] is f.boxes and set(f.dets) == {'boxes', 'scores', 'labels'}
    assert type(f | dict(names=[])) is dict
    assert found(vocab=None).names == ['0', '1', '0']


@pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_it_survives_copies(again):
    f = again(found())
    assert f == found() and (f.picture, f.hw, f.vocab, f.error) == ('x.png', (40, 60), VOCAB, None)


def test_what_is_equal():
    assert found() != found(n=2) and found() != found(hw=(1, 1)) and found() != found(vocab=None)
    bad = Found('x', None, None, 'unreadable')
    assert bad == Found('x', None, None, 'unreadable') and bad != Found('x', None, None, 'missing')
    assert bad.names == [] and bad.boxes.shape == (0, 4) and bad._repr_png_() is None and repr(bad) == 'unreadable'


def test_text_is_short():
    assert repr(found()).splitlines()[0] == 'x.png, 60 x 40: 3 objects'
    lines = repr(found(n=30)).splitlines()
    assert len(lines) == 10 and lines[-1] == '  … 22 more'
    assert repr(found(np.zeros((40, 60, 3)), n=1)).startswith('ndarray, 60 x 40: 1 object\n')
    assert repr(found(n=0)) == 'x.png, 60 x 40: 0 objects'


@pytest.mark.parametrize('n', [0, 3])
def test_a_notebook_shows_an_image_of_its_size(pictures, n):
    f = found(pictures[0], n=n)
    f.save(pictures[0].with_name('drawn.png'))
    assert Image.open(pictures[0].with_name('drawn.png')).size == (480, 320)
    assert f._repr_png_()[:4] == b'\x89PNG'


def test_pick():
    f = found()
    assert f.pick(f.labels == 1).names == ['dog'] and f.pick([2, 0]).scores.tolist() == f.scores[[2, 0]].tolist()


def test_a_table_of_several():
    t = to_frame([found('a.png'), found(Image.new('RGB', (60, 40)), n=2), found(n=0)])
    assert t.picture.tolist() == ['a.png']*3 + [1]*2 and t.name.tolist() == ['cat', 'dog', 'cat', 'cat', 'dog']
    assert to_frame([]).columns.tolist() == ['picture', 'name', 'score', 'x1', 'y1', 'x2', 'y2']


def test_coco_leaves_out_what_could_not_be_read():
    coco = to_coco([Found('bad.png', None, None, 'unreadable'), found(), found(torch.zeros(3, 40, 60), n=1)])
    assert [o['file_name'] for o in coco['images']] == ['x.png', 'picture_2.png']
    assert [o['image_id'] for o in coco['annotations']] == [1, 1, 1, 2]
    assert [o['name'] for o in coco['categories']] == VOCAB


def test_supervision_has_the_same():
    pytest.importorskip('supervision', reason='the package supervision is not installed')
    sv = to_supervision(found())
    np.testing.assert_allclose(sv.xyxy, found().boxes.numpy())
    assert sv.class_id.tolist() == [0, 1, 0] and sv.data['class_name'].tolist() == ['cat', 'dog', 'cat']
    assert len(found(n=0).to_supervision()) == 0


def test_supervision_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'supervision', None)
    with pytest.raises(ImportError, match='pip install supervision'): found().to_supervision()


@pytest.mark.parametrize('layout', ['coco', 'voc', 'yolo'])
def test_a_set_is_read_back(pictures, tmp_path, layout):
    "Boxes, classes and images of the same name; errors and empty images; boxes cut at the edges"
    wide = found(pictures[2], n=2)
    wide['boxes'] = torch.tensor([[-5., 10, 30, 50], [70, 10, 80, 20]])
    array = np.full((40, 60, 3), 7, dtype=np.uint8)
    some = [found(pictures[0]), Found('bad', None, None, 'unreadable'), found(pictures[1], n=0), wide, found(array, n=1)]
    folder = save_as((o for o in some), tmp_path/'set', layout)
    src = read_data(folder, layout, ('train', 'train'))[0]
    names = {o['id']: o['name'] for o in src.coco['categories']}
    files = {o['id']: o for o in src.coco['images']}
    assert sorted(o['file_name'].split('/')[-1] for o in files.values()) == ['picture_4.png', 'x.png', 'x_2.png', 'y.jpg']
    assert all((src.folder/o['file_name']).is_file() and (o['width'], o['height']) == (60, 40) for o in files.values())
    got = sorted((files[a['image_id']]['file_name'].split('/')[-1], names[a['category_id']], *a['bbox']) for a in src.coco['annotations'])
    def rows(name, f): return [(name, k, x1, y1, x2-x1, y2-y1) for k, (x1, y1, x2, y2) in zip(f.names, f.boxes.tolist())]
    cut = [('y.jpg', 'cat', 0., 10., 30., 30.)]
    want = sorted(rows('x.png', some[0]) + cut + rows('picture_4.png', some[-1]))
    assert [o[:2] for o in got] == [o[:2] for o in want] and not src.problems
    np.testing.assert_allclose([o[2:] for o in got], [o[2:] for o in want], atol=.02)


@pytest.mark.parametrize('layout', ['coco', 'voc', 'yolo'])
def test_names_with_spaces_are_read_back(pictures, tmp_path, layout):
    names = ['my photo.png', 'my photo 1.png', 'my photo 2.png']
    for o in names: Image.open(pictures[0]).save(tmp_path/o)
    src = read_data(save_as([found(tmp_path/o) for o in names], tmp_path/'set', layout), layout, ('train', 'train'))[0]
    assert sorted(Path(o['file_name']).name for o in src.coco['images']) == sorted(names) and not src.problems

def test_a_set_without_names_or_with_a_wrong_layout(pictures, tmp_path):
    with pytest.raises(ValueError, match="'pdf': one of coco, voc, yolo"): save_as([found()], tmp_path/'no', 'pdf')
    assert not (tmp_path/'no').exists()
    save_as([found(pictures[0], vocab=None)], tmp_path/'yes', 'yolo')
    assert 'names:\n  0: \'0\'\n  1: \'1\'' in (tmp_path/'yes/data.yaml').read_text()
    coco = json.loads((save_as([], tmp_path/'none')/'annotations/instances_train.json').read_text())
    assert coco == dict(images=[], annotations=[], categories=[])


@pytest.mark.parametrize('layout', ['coco', 'voc', 'yolo'])
def test_a_set_has_every_image(layout, tmp_path):
    "Also those in a format, or of a name, that no reader of a set knows"
    files = [tmp_path/o for o in ('x.gif', 'y.jfif', 'caf\udce9.png')]
    for i, f in enumerate(files): Image.new('RGB', (60, 40), (60*i, 0, 0)).save(f, 'jpeg' if f.suffix=='.jfif' else None)
    folder = save_as([found(o) for o in files], tmp_path/layout, layout)
    assert sum(len(o.coco['images']) for o in read_data(folder, layout, valid_pct=.4)) == 3


def test_coco_names_every_class_that_was_found():
    coco = to_coco([found(vocab=None)])
    assert {o['category_id'] for o in coco['annotations']} <= {o['id'] for o in coco['categories']}

def test_one_image_is_a_coco_set_too(): assert to_coco(found())==to_coco([found()])
