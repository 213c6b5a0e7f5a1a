"Arrays of annotations give what lists of dictionaries give: entries, messages, samples; and the cache of them"
import io, json, os, random
from itertools import chain
from pathlib import Path
import numpy as np, pytest, torch
import deqdet.sets.cache as cache
from deqdet.data import DetDataset, det_dls
from deqdet.sets.arrays import Entries, Misfit, Pieces, Table, parse
from deqdet.sets.cache import cache_files, digest, load_cache, read_arrays, save_cache
from deqdet.sets.check import clean
from deqdet.sets.formats import Source, read_coco, read_data
from deqdet.sets.images import DataError
from deqdet.sets.large import clean_table, pack, read_sources, read_table, with_objects
from deqdet.sets.shapes import synth_coco

@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return synth_coco(tmp_path_factory.mktemp('large')/'shapes', 40, 10, empty=.2, seed=3)

def value(rng, depth=0):
    "A random JSON value"
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind < 7: return rng.choice([None, True, 'a } , { b', 'é"\\\n', -3, 12345, 1.5e-7, 2.25, '', float('inf')])
    if kind == 7: return [value(rng, depth+1) for _ in range(rng.randrange(4))]
    return {f'k{i} ' + '},{': value(rng, depth+1) for i in range(rng.randrange(4))}

@pytest.mark.parametrize('seed', range(20))
def test_pieces_are_json(seed):
    "Lists of any values, at any size of a piece and with any blanks"
    rng = random.Random(seed)
    whole = {k: [value(rng) for _ in range(rng.randrange(12))] for k in 'abc'}
    text = json.dumps(whole, indent=rng.choice([None, 0, 2]), separators=rng.choice([None, (',', ':'), (' , ', ' : ')]))
    for piece in (1, 3, 50, 1000):
        reader = Pieces(io.StringIO(text), piece)
        assert {k: [*chain(*reader.batches())] for k in reader.fields()} == whole
        assert reader.peek() == ''

@pytest.mark.parametrize('text', ['[1, 2', '[1 2]', '[1,]', '[{}, {}, {},]', '[{}{}]', '[,1]', '[{"a": 1}, {"a" 1}]', '[tru]'])
def test_pieces_refuse_what_json_refuses(text):
    with pytest.raises(ValueError): json.loads(text)
    for piece in (1, 100):
        with pytest.raises(ValueError): [*Pieces(io.StringIO(text), piece).batches()]

def faults(rng, coco):
    "Spoil a set at random"
    anns,images = coco['annotations'],coco['images']
    for _ in range(25):
        a = rng.choice(anns)
        a.update(rng.choice([
            dict(bbox=[5, 5, 0, 9]), dict(bbox=[5., 5, 1e-3, -2]), dict(bbox='wide'), dict(bbox=[1, 2, 3]), dict(bbox=[1, 2, 3, '4']),
            dict(bbox=[-3, 2, 40, 50.5]), dict(bbox=[500, 2, 4, 5]), dict(bbox=[1, 2, float('nan'), 4]), dict(bbox=[1, True, 20, 30]),
            dict(bbox=[100, 100, 28, 29]), dict(bbox=[100, 100.5, 28.75, 28]), dict(bbox=None), dict(bbox=[0, 0, 1<<60, 2]),
            dict(category_id=77), dict(category_id='a'), dict(category_id=None, name='a thing'), dict(category_id=2.0),
            dict(image_id=4711), dict(image_id=1.0), dict(image_id=None), dict(image_id='1'), dict(iscrowd=1), dict(iscrowd=True),
            dict(area=None), dict(area='large'), dict(area=7), dict(area=float('inf')), dict(id=1), dict(id=0), dict(id=None),
            dict(name='x'), dict(at=None), dict(at=['b.json', 'line 3'])]))
        if rng.random() < .3: a.pop(rng.choice(['bbox', 'id', 'image_id', 'category_id', 'area', 'iscrowd']), None)
    for _ in range(3):
        images[rng.randrange(len(images))].update(rng.choice([dict(id=1), dict(width=0), dict(width=None), dict(height=64)]))
        if rng.random() < .5: images[rng.randrange(len(images))].pop('width', None)
    if rng.random() < .5: coco['categories'].append(dict(id=rng.choice([1, 9]), name=rng.choice(['disc', 'new'])))

def spoilt(shapes, tmp_path, seed):
    rng = random.Random(seed)
    coco = json.loads((shapes/'annotations/instances_train.json').read_text())
    faults(rng, coco)
    (tmp_path/'images').symlink_to(shapes/'images')
    (tmp_path/'annotations').mkdir()
    file = tmp_path/'annotations/instances_train.json'
    file.write_text(json.dumps(coco))
    return file

@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize('vocab', [None, ['disc', 'unheard of']])
def test_bad_sets_give_the_same(shapes, tmp_path, seed, vocab):
    "The same entries, messages in the same order, and targets"
    file = spoilt(shapes, tmp_path, seed)
    table = read_table(file)
    assert isinstance(table, Table)
    for _ in range(2): # cleaning changes nothing
        usable,problems = clean_table(table, vocab)
        want,known = clean(read_coco(file), vocab)
        assert problems == known and problems
        assert usable == want and list(usable['annotations']) == want['annotations']
    for a,b in zip(pack(usable), pack(want)): assert a.dtype == b.dtype and torch.equal(a, b)

@pytest.mark.parametrize('seed', range(10))
def test_parts_of_bad_sets_are_the_same(shapes, tmp_path, seed):
    file = spoilt(shapes, tmp_path, seed)
    (tmp_path/'annotations').rename(tmp_path/'old')
    one = tmp_path/'one.json'
    (tmp_path/'old/instances_train.json').rename(one)
    ours,theirs = read_sources(tmp_path, valid_pct=.3, seed=seed), read_data(tmp_path, valid_pct=.3, seed=seed)
    for a,b in zip(ours, theirs):
        assert isinstance(a, Table) and clean_table(a) == clean(b)
        bare,want = with_objects(a), with_objects(b)
        assert clean_table(bare)[0] == clean(want)[0]
        assert len(clean_table(bare)[0]['images']) <= len(clean_table(a)[0]['images'])

MISFITS = [
    lambda d: d['images'][0].update(id='1'), lambda d: d['images'][0].update(width=64.5), lambda d: d['images'][0].pop('file_name'),
    lambda d: d['images'][0].update(id=1<<70), lambda d: d['images'][0].update(file_name='a/'*250 + 'b'), lambda d: d['images'].append(3),
    lambda d: d['annotations'].append(3), lambda d: d['annotations'][0].update(id='one'), lambda d: d.pop('images'),
    lambda d: d.update(categories=3), lambda d: d.update(annotations={}), lambda d: d['images'][0].update(width=-4)]

@pytest.mark.parametrize('change', MISFITS)
def test_a_misfit_is_read_as_before(shapes, tmp_path, change):
    "Entries or message are those of `read_coco`"
    coco = json.loads((shapes/'annotations/instances_train.json').read_text())
    change(coco)
    (tmp_path/'images').symlink_to(shapes/'images')
    file = tmp_path/'set.json'
    file.write_text(json.dumps(coco))
    assert read_arrays(file) is None
    try: want = read_coco(file)
    except DataError as e:
        with pytest.raises(DataError) as got: read_table(file)
        assert str(got.value) == str(e)
    else: assert read_table(file) == want

@pytest.mark.parametrize('text', ['', '{', '[]', '{"images": [', '{"images": [], "annotations": [], "categories": []} x', '\ufeff{}', '3'])
def test_an_unreadable_file_says_what_it_said(tmp_path, text):
    file = tmp_path/'set.json'
    file.write_text(text)
    with pytest.raises(DataError) as want: read_coco(file)
    with pytest.raises(DataError) as got: read_table(file)
    assert str(got.value) == str(want.value)

def test_samples_are_the_same(shapes):
    "Loaders of arrays deal the samples of loaders of dictionaries"
    ds = det_dls(shapes, bs=4, num_workers=0, device='cpu').train_ds
    old = DetDataset(read_coco(shapes, 'train'))
    assert isinstance(ds.images, Entries) and isinstance(old.images, list)
    for (x,t),(y,s) in zip(ds, old): assert torch.equal(x, y) and all(map(torch.equal, t, s))

def test_entries_are_a_list(shapes):
    images = Entries(read_table(shapes, 'train').images)
    plain = list(images)
    assert images[-1] == plain[-1] and images[3:7] == plain[3:7] and images == plain and plain == images
    assert images != plain[1:] and images[0] in images and len(images) == 40
    with pytest.raises(IndexError): images[40]
    with pytest.raises(TypeError): json.dumps(images)

@pytest.fixture
def cached(shapes, tmp_path, monkeypatch):
    "A file, its key and its cache; the user's folder is another"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'home'))
    file = tmp_path/'set.json'
    file.write_bytes((shapes/'annotations/instances_train.json').read_bytes())
    table = read_arrays(file, least=0)
    key = digest(file)
    return file, key, cache_files(file, key), table

def same(a, b):
    return all(np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == 'f') and x[k].dtype == y[k].dtype
               for x,y in ((a.images, b.images), (a.objects, b.objects)) for k in x) and (a.odd, a.categories) == (b.odd, b.categories)

def test_a_second_start_reads_the_cache(cached, monkeypatch):
    file,key,(beside,home),table = cached
    assert beside.is_file() and not home.exists() and [o.name for o in file.parent.iterdir()].count(beside.name) == 1
    monkeypatch.setattr(cache, 'parse', lambda f: pytest.fail('the JSON was read'))
    assert same(read_arrays(file, least=0), table)

def test_a_small_file_has_no_cache(shapes): assert not [*shapes.rglob('.*')] and read_table(shapes, 'train')

def test_another_content_or_version_makes_it_void(cached, monkeypatch):
    file,key,(beside,home),table = cached
    stat = file.stat()
    file.write_text(file.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns)) # size and time as before
    assert file.stat().st_size == stat.st_size and read_arrays(file, least=0).objects['iscrowd'].sum() == 1
    key = digest(file)
    assert load_cache(beside, key)
    monkeypatch.setattr(cache, 'FORM', 0)
    assert load_cache(beside, key) is None

@pytest.mark.parametrize('seed', range(40))
def test_a_damaged_cache_is_written_again(cached, seed):
    file,key,(beside,home),table = cached
    rng = random.Random(seed)
    data = bytearray(beside.read_bytes())
    if seed % 2: data = data[:rng.randrange(len(data))]
    else: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    beside.write_bytes(data)
    assert load_cache(beside, key) is None and same(read_arrays(file, least=0), table) and load_cache(beside, key)

def test_a_cache_of_pickles_is_not_read(cached):
    "Even with the right first line"
    file,key,(beside,home),table = cached
    out = io.BytesIO()
    np.savez(out, about=np.array([dict(a=1)], dtype=object))
    beside.write_bytes(cache._head(key, out.getvalue()) + out.getvalue())
    with pytest.raises(ValueError, match='allow_pickle'): load_cache(beside, key)

def test_a_folder_that_cannot_be_written(cached, monkeypatch):
    "The user's folder takes the cache; and where that cannot be written either, nothing does"
    file,key,(beside,home),table = cached
    beside.unlink()
    beside.mkdir() # a name that no file can take
    assert same(read_arrays(file, least=0), table) and home.is_file() and same(load_cache(home, key), table)
    home.unlink()
    home.parent.rmdir()
    home.parent.write_text('a file')
    assert same(read_arrays(file, least=0), table) and not [o for o in file.parent.iterdir() if 'tmp' in o.name]
