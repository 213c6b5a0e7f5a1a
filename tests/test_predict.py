"From a folder to a detector, from an image to boxes, drawings and COCO json"
import json, shutil
from dataclasses import replace
from pathlib import Path
import pytest, torch
from PIL import Image
from deqdet.data import DataError, det_dls, load_image, synth_coco
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.learner import det_learner
from deqdet.model import Detector, Feed
from deqdet.ops.errors import CommandError
from deqdet.predict import (COCO, Found, detect, draw_detections, eval_loader, find_pictures, load_detector,
                            predict, read_names, save_detector, start_from, to_coco)
from deqdet.zoo import create_detector

SHAPES = ['disc', 'triangle', 'square', 'cross']
SMALL = dict(body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9, grid=(3, 3, .4), width=32,
             heads=4, groups=2, points=(4,), out_points=8, hidden=64,
             strategy=Settled(steps=3, supervise=(1, 3), recompute=False))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp('predict')/'shapes'
    synth_coco(path, n_train=4, n_valid=4, size=64, seed=1, empty=0)
    return path


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = AdaMixer(n_classes=4, **SMALL).build(vocab=SHAPES).eval()
    model.feed, model.recipe = Feed(64, 64), 'tiny'
    return model


@pytest.fixture
def folder(model, tmp_path): return save_detector(model, tmp_path/'m')


# --------------------------------------------------------------------------------------- folders

def test_a_folder_gives_the_detector_back(model, folder):
    again = load_detector(folder, device='cpu')
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(again.predict(x)[0]['scores'], model.predict(x)[0]['scores'])
    assert (again.feed, again.vocab, again.recipe) == (Feed(64, 64), SHAPES, 'tiny') and not again.training
    assert load_detector(folder, '48x96', 'cpu').feed == Feed(48, 96)
    assert sorted(o.name for o in folder.iterdir()) == ['config.json', 'model.safetensors']


def test_folders_of_older_versions(model, folder):
    "They kept in a file of its own how images are fed; saving again leaves one answer"
    config = json.loads((folder/'config.json').read_text())
    del config['feed']
    (folder/'config.json').write_text(json.dumps(config))
    assert load_detector(folder, device='cpu').feed is None
    (folder/'feed.json').write_text('{"short": 32, "long": 48}')
    assert load_detector(folder, device='cpu').feed == Feed(32, 48)
    save_detector(model, folder)
    assert not (folder/'feed.json').exists() and load_detector(folder, device='cpu').feed == Feed(64, 64)
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'feed.json').write_text('{"width": 3}')
    with pytest.raises(CommandError, match=str(folder)): load_detector(folder)


def test_a_training_means_its_best(model, tmp_path):
    for k in 'last', 'best':
        model.vocab = [f'{k} {o}' for o in SHAPES]
        (tmp_path/'run').mkdir(exist_ok=True)
        save_detector(model, tmp_path/'run'/k)
    model.vocab = SHAPES
    assert load_detector(tmp_path/'run', device='cpu').vocab[0] == 'best disc'


def test_damaged_folders_are_named(folder, tmp_path):
    weights = folder/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CommandError, match=str(folder)): load_detector(folder)
    (folder/'config.json').write_text('{"vocab": null}')
    with pytest.raises(CommandError, match="no 'hyper'"): load_detector(folder)
    with pytest.raises(CommandError, match='no detector there'): load_detector(tmp_path)
    whole = save_detector(AdaMixer(**SMALL).build(), tmp_path/'whole')
    with pytest.raises(ValueError, match='tpu'): load_detector(whole, device='tpu')


def test_saving_leaves_no_traces(model, tmp_path):
    (tmp_path/'taken').write_text('a file')
    with pytest.raises(CommandError, match='taken'): save_detector(model, tmp_path/'taken')
    assert (tmp_path/'taken').read_text() == 'a file' and len(list(tmp_path.iterdir())) == 1


def test_what_is_written_stays_whole(model, folder, monkeypatch):
    "A fault while saving leaves the detector that was there"
    before = {o.name: o.read_bytes() for o in folder.iterdir()}
    def fails(self, path):
        path.mkdir()
        (path/'model.safetensors').write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Detector, 'save_pretrained', fails)
    with pytest.raises(CommandError, match='No space left'): save_detector(model, folder)
    assert {o.name: o.read_bytes() for o in folder.iterdir()} == before
    assert [o.name for o in folder.parent.iterdir()] == [folder.name]


# --------------------------------------------------------------------------------------- images

def test_find_pictures(shapes):
    "Files, folders, patterns; each once"
    assert len(find_pictures([shapes])) == 8
    assert len(find_pictures([f'{shapes}/images/train*', shapes/'images/valid_00000.jpg', shapes])) == 8
    for o in shapes/'annotations', 'nowhere', '*.tga':
        with pytest.raises(CommandError, match='no image there'): find_pictures([o])


def test_detect_in_batches(model, shapes, tmp_path):
    "An unreadable image has a reason; batches of any size say the same"
    bad = tmp_path/'bad.jpg'
    bad.write_text('no image')
    files = find_pictures([f'{shapes}/images/valid*', bad])
    found = list(detect(model, files, 4, min_score=.01, max_dets=5))
    assert [o.picture for o in found] == files
    assert found[0].hw == (64, 64) and found[0].dets['boxes'].shape == (5, 4)
    assert found[-1] == Found(bad, None, None, found[-1].error) and 'unreadable image' in found[-1].error
    one = list(detect(model, files, 1, min_score=.01, max_dets=5))
    for a, b in zip(found[:-1], one[:-1]):
        torch.testing.assert_close(a.dets['boxes'], b.dets['boxes'], atol=1e-3, rtol=0)


def test_pictures_of_every_kind_say_the_same(model, shapes):
    file = shapes/'images/valid_00000.jpg'
    tensor = load_image(file)
    array = tensor.permute(1, 2, 0).numpy()
    kinds = file, str(file), Image.fromarray(array), array, tensor
    res = [predict(model, o, min_score=0.) for o in kinds]
    assert set(res[0]) == {'boxes', 'scores', 'labels', 'names'} and set(res[0]['names']) <= set(SHAPES)
    for o in res[1:]:
        assert all(torch.equal(o[k], res[0][k]) for k in ('boxes', 'scores', 'labels'))
        assert o['names'] == res[0]['names']
    many = predict(model, list(kinds), min_score=0.)
    assert len(many) == 5 and many[2]['names'] == res[0]['names']


def test_one_picture_or_many(model, shapes):
    "A file is one; a list, a folder and a pattern are many, even with one image"
    file = shapes/'images/valid_00000.jpg'
    assert isinstance(predict(model, file), dict)
    assert [len(predict(model, o)) for o in ([file], shapes, f'{shapes}/images/valid_00000.*')] == [1, 8, 1]
    with pytest.raises(CommandError, match='no image there'): predict(model, 'nowhere')


def test_predict_refuses_what_is_no_picture(model, tmp_path):
    (tmp_path/'bad.jpg').write_text('no image')
    with pytest.raises(DataError, match='bad.jpg'): predict(model, tmp_path/'bad.jpg')


def test_predict_says_what_a_learner_says(model, shapes):
    file = shapes/'images/valid_00001.jpg'
    learn = det_learner(det_dls(shapes, bs=2, num_workers=0, device='cpu', size=64), model)
    a, b = learn.predict(file, min_score=.01), predict(model, file, min_score=.01)
    assert a['names'] == b['names'] and a.keys() == b.keys()
    torch.testing.assert_close(a['boxes'], b['boxes'], atol=1e-3, rtol=0)


def test_a_detector_without_names_or_size(shapes):
    "Numbers for names, and the published size for images"
    model = AdaMixer(n_classes=4, **SMALL).build().eval()
    d = predict(model, shapes/'images/valid_00000.jpg', min_score=0., max_dets=3)
    assert set(d['names']) <= set('0123') and d['boxes'].max() < 200


# --------------------------------------------------------------------------------------- what comes out

def test_drawings_are_legible_and_not_huge(tmp_path):
    none = dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))
    one = dict(boxes=torch.tensor([[8., 8., 40., 40.]]), scores=torch.tensor([.5]), labels=torch.tensor([0]))
    drawn = {(64, 64): (480, 480), (1, 1): (480, 480), (600, 900): (600, 900), (1000, 4000): (400, 1600)}
    for (h, w), shape in drawn.items():
        for d in none, one:
            draw_detections(Image.new('RGB', (w, h)), d, tmp_path/'x.png', SHAPES)
            assert load_image(tmp_path/'x.png').shape[1:] == shape


def test_coco_json(model, shapes):
    found = list(detect(model, find_pictures([f'{shapes}/images/valid*'])[:2], max_dets=5))
    coco = to_coco(found, SHAPES)
    assert [o['id'] for o in coco['images']] == [1, 2]
    assert [o['id'] for o in coco['annotations']] == list(range(1, 11))
    assert coco['categories'][0] == dict(id=1, name='disc') and len(coco['categories']) == 4
    x, y, w, h = coco['annotations'][0]['bbox']
    torch.testing.assert_close(torch.tensor([x, y, x+w, y+h]), found[0].dets['boxes'][0])
    assert coco['annotations'][0]['category_id'] == found[0].dets['labels'][0] + 1
    assert [o['name'] for o in to_coco([], None, 3)['categories']] == ['0', '1', '2']


def test_names(shapes, tmp_path):
    assert (len(COCO), len(set(COCO)), COCO[0], COCO[11], COCO[-1]) == (80, 80, 'person', 'stop sign', 'toothbrush')
    assert read_names(shapes/'annotations/instances_train.json') == SHAPES
    (tmp_path/'names.txt').write_text('cat\n\n hot dog \n')
    assert read_names(tmp_path/'names.txt') == ['cat', 'hot dog']
    (tmp_path/'x.json').write_text('{}')
    with pytest.raises(CommandError, match='x.json'): read_names(tmp_path/'x.json')


# ------------------------------------------------------------------------------ starting from another's weights

def test_start_with_other_classes(model, folder):
    said = []
    cats = start_from(folder, ['cat', 'dog'], said.append)
    old, new = model.state_dict(), cats.state_dict()
    fresh = {f'decoder.{s}.cls.3.{p}' for s in ('init', 'step') for p in ('weight', 'bias')}
    assert {k for k in old if not torch.equal(old[k], new[k])} == fresh
    # without `queries.boxes`, which are no weights
    told = f'{folder}: 4 classes there, 2 here: {len(old) - 5} tensors kept, 4 tensors start afresh (decoder.init.cls.3.weight, '
    assert len(said) == 1 and said[0].startswith(told)
    assert (cats.vocab, cats.feed, cats.recipe, cats.training) == (['cat', 'dog'], Feed(64, 64), 'tiny', True)


@pytest.mark.parametrize('n, grid', [(12, (3, 4, .3)), (4, (2, 2, .5)), (9, (1, 9, .3))])
def test_start_with_another_number_of_queries(model, n, grid):
    "Each box takes the contents of the nearest old one; boxes follow from the record"
    said = []
    new = start_from(model, SHAPES, said.append, n_queries=n, grid=grid)
    nearest = torch.cdist(new.queries.boxes[:, :2], model.queries.boxes[:, :2]).argmin(1)
    if n == 9: nearest = torch.arange(9)
    assert torch.equal(new.queries.content.weight, model.queries.content.weight[nearest])
    plain = replace(model.hyper, n_queries=n, grid=grid).build()
    assert torch.equal(new.queries.boxes, plain.queries.boxes) and len(said) == (n != 9)
    assert new(torch.zeros(1, 3, 64, 64))[-1].boxes.shape == (1, n, 4)


@pytest.mark.parametrize('n, grid', [(4, (2, 2, .4)), (16, (4, 4, .4)), (30, (6, 5, .4))])
def test_a_grid_stays_a_grid(model, n, grid):
    new = start_from(model, SHAPES, lambda s: None, n_queries=n)
    assert (new.hyper.grid, new.hyper.n_queries) == (grid, n)


def test_thresholds_come_back(model, tmp_path):
    "They are kept in config.json; a detector without them has none"
    assert load_detector(save_detector(model, tmp_path/'none'), device='cpu').thresholds is None
    model.thresholds = [.1, .2, .3, .4]
    try: assert load_detector(save_detector(model, tmp_path/'some'), device='cpu').thresholds == [.1, .2, .3, .4]
    finally: del model.thresholds


def test_start_of_every_family():
    for name in 'sparse_rcnn_tiny', 'deformable_detr_tiny', 'sqr_adamixer_tiny':
        old = create_detector(name, n_classes=4)
        new = start_from(old, ['a', 'b'], lambda s: None)
        theirs = old.state_dict()
        fits = {k: v for k, v in new.state_dict().items() if v.shape == theirs[k].shape}
        assert all(torch.equal(v, theirs[k]) for k, v in fits.items())
        assert new(torch.zeros(1, 3, 64, 64))[-1].logits.shape[-1] == 2


# --------------------------------------------------------------------------------------- a split of a set

def test_a_loader_numbers_classes_as_the_detector_does(model, shapes):
    dl = eval_loader(shapes, model)
    images, sizes, t = dl.one_batch()
    assert len(dl.dataset) == 4 and images.shape == (4, 3, 64, 64)
    swapped = start_from(model, ['cross', 'disc'], lambda s: None)
    ds = eval_loader(shapes, swapped).dataset
    assert (ds.vocab, ds.cat_ids) == (['cross', 'disc'], [4, 1])


def test_a_loader_refuses_other_classes(model, shapes, tmp_path):
    alien = start_from(model, ['cat', 'dog'], lambda s: None)
    with pytest.raises(CommandError, match='cat'): eval_loader(shapes, alien)
    alien.vocab = None
    with pytest.raises(CommandError, match='4 classes'): eval_loader(shapes, alien)
    with pytest.raises(CommandError, match='--layout foo'): eval_loader(shapes, model, layout='foo')
    path = Path(shutil.copytree(shapes, tmp_path/'bare'))
    file = path/'annotations/instances_valid.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(images=[], annotations=[])))
    with pytest.raises(CommandError, match='at least one image'): eval_loader(path, model)


def test_a_detector_is_saved_in_the_present_folder(tmp_path, monkeypatch):
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    model = create_detector('deqdet_tiny', vocab=['a'])
    assert str(save_detector(model, '.')) == '.' and load_detector('.', device='cpu').vocab == ['a']
    assert [o.name for o in tmp_path.iterdir()] == ['here']


def test_names_of_other_editors(tmp_path):
    "A file that begins with a byte order mark, upper-case suffixes, and a file in another encoding"
    text, coco, latin = (tmp_path/o for o in ('names.txt', 'NAMES.JSON', 'latin.txt'))
    text.write_bytes('\ufeffcat\ndog'.encode())
    coco.write_text(json.dumps(dict(categories=[dict(id=2, name='dog'), dict(id=1, name='cat')])), encoding='utf-8-sig')
    latin.write_bytes('Größe'.encode('latin-1'))
    assert read_names(text) == read_names(coco) == ['cat', 'dog']
    with pytest.raises(CommandError, match='latin.txt'): read_names(latin)
