"Rows of Hugging Face datasets: dicts of many forms, files, real datasets where the package is there; faults in one line"
import io, json
import numpy as np, pytest
from PIL import Image
from deqdet import cli
from deqdet.data import det_dls, find_layout, read_data
from deqdet.ops.errors import CommandError
from deqdet.ops.rows import class_names, coco_of_folder, rows_to_coco, write_rows
from deqdet.sets.formats import read_hf

BOXES = [[1., 2., 30., 40.], [10., 10., 5., 5.]]


def picture(i=0): return Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def encoded(i=0, kind='JPEG'):
    file = io.BytesIO()
    picture(i).save(file, kind)
    return file.getvalue()


def rows(n=3, image=picture): return [dict(image=image(i), objects=dict(bbox=BOXES[:i], category=[1, 0][:i])) for i in range(n)]


def check(folder, names=('cat', 'dog'), n=3, layout=None):
    "The set has `n` images, with 0, 1, 2, … objects"
    dls = det_dls(folder, layout=layout, bs=1, num_workers=0, device='cpu', valid_pct=1/n)
    found = {o['id']: (ds[i][0].shape, ds[i][1]) for ds in (dls.train_ds, dls.valid_ds) for i, o in enumerate(ds.images)}
    assert list(dls.vocab) == list(names) and len(found) == n
    for k in range(n):
        shape, t = found[k + 1]
        assert shape == (3, 48, 64)
        want = np.array(BOXES[:k]).reshape(-1, 4)
        want[:, 2:] += want[:, :2]
        np.testing.assert_allclose(t.boxes, want)
        assert [dls.vocab[o] for o in t.labels.tolist()] == ['dog', 'cat'][:k]


@pytest.mark.parametrize('image', [picture, encoded, lambda i: dict(bytes=encoded(i, 'PNG'), path=None), lambda i: np.asarray(picture(i))])
def test_images_of_any_form(tmp_path, image):
    write_rows(iter(rows(3, image)), tmp_path/'set', names=['cat', 'dog'])
    check(tmp_path/'set')
    file = tmp_path/'set/images/train/0000001'
    if image is encoded: assert file.with_suffix('.jpg').read_bytes() == encoded(0)
    else: np.testing.assert_array_equal(Image.open(file.with_suffix('.png')), picture(0))


@pytest.mark.parametrize('form', [np.asarray, Image.fromarray])
def test_16_bits_are_kept(tmp_path, form):
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    write_rows([dict(image=form(deep), objects=None)], tmp_path/'set')
    np.testing.assert_array_equal(Image.open(tmp_path/'set/images/train/0000001.png'), deep)


def test_paths_are_copied(tmp_path):
    picture().save(tmp_path/'x.webp', lossless=True)
    for x in tmp_path/'x.webp', dict(bytes=None, path=str(tmp_path/'x.webp')):
        write_rows([dict(image=x, objects=None)], tmp_path/'set')
        assert (tmp_path/'set/images/train/0000001.webp').read_bytes() == (tmp_path/'x.webp').read_bytes()


def test_objects_of_any_form():
    forms = [dict(bbox=BOXES, category=['dog', 'cat'], id=[4, 5], area=[7., 8.]), [dict(bbox=b, label=k) for b, k in zip(BOXES, ('dog', 'cat'))],
             dict(bbox=np.array(BOXES), categories=['dog', 'cat'], iscrowd=[0, 1])]
    for o in forms:
        coco = rows_to_coco([dict(image='x', objects=o)], lambda x, i: x)
        assert [(a['bbox'], a['category_id']) for a in coco['annotations']] == [(BOXES[0], 2), (BOXES[1], 1)]
    assert [a['iscrowd'] for a in coco['annotations']] == [0, 1]


def test_names_are_found_at_any_depth():
    for spec in ({'feature': {'names': ['a', 'b'], '_type': 'ClassLabel'}, '_type': 'Sequence'}, {'names': ['a', 'b']}):
        for objects in ({'feature': {'bbox': {}, 'category': spec}}, [{'bbox': {}, 'category': spec}], {'category': spec}): assert class_names(dict(objects=objects)) == ['a', 'b']
    assert class_names({}) is None and class_names(None) is None


def test_a_number_is_a_place_in_names_and_else_a_class():
    objects = [dict(image='x', objects=[dict(bbox=BOXES[0], category=k)]) for k in (10, 2, 1, 2)]
    def read(rows, names=None):
        coco = rows_to_coco(rows, lambda x, i: x, names)
        found = {o['id']: o['name'] for o in coco['categories']}
        return list(found.values()), [found[a['category_id']] for a in coco['annotations']]
    assert read(objects) == read(objects, [1, 2, 10]) == (['1', '2', '10'], ['10', '2', '1', '2'])
    assert read(objects[1:], ['cat', 'dog', 'cow']) == (['cat', 'dog', 'cow'], ['cow', 'dog', 'cow'])


@pytest.mark.parametrize('packed', [False, True])
def test_splits_with_numbers_for_classes_have_one_vocabulary(tmp_path, packed):
    "Also one that lacks a class of the other"
    for split, classes in dict(train=(1, 2, 10), valid=(2, 10)).items():
        lines = [dict(file_name=f'{i}.png', objects=dict(bbox=[BOXES[0]], categories=[k])) for i, k in enumerate(classes)]
        if not packed: jsonl(tmp_path/split, lines)
        else:
            pa = pytest.importorskip('pyarrow', reason='pyarrow is not installed (the extra "hf")')
            rows = [dict(image=dict(bytes=encoded(i)), objects=o['objects']) for i, o in enumerate(lines)]
            import pyarrow.parquet
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path/f'{split}.parquet')
    dls = det_dls(tmp_path, bs=1, num_workers=0, device='cpu')
    assert list(dls.vocab) == ['1', '2', '10']
    found = [[dls.vocab[t.labels.item()] for _, t in (ds[i] for i in range(len(ds)))] for ds in (dls.train_ds, dls.valid_ds)]
    assert found == [['1', '2', '10'], ['2', '10']]


def jsonl(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    for i, _ in enumerate(lines): picture(i).save(folder/f'{i}.png')
    (folder/'metadata.jsonl').write_text('\n'.join(o if isinstance(o, str) else json.dumps(o) for o in lines))


def test_a_folder_of_images(tmp_path):
    "metadata.jsonl, without any package; the command trains on such a folder"
    lines = [dict(file_name=f'{i}.png', objects=dict(bbox=BOXES[:i], categories=['dog', 'cat'][:i])) for i in range(3)]
    jsonl(tmp_path/'set', lines)
    assert find_layout(tmp_path/'set') == 'hf'
    check(tmp_path/'set')
    assert not (tmp_path/'set/.deqdet').exists()
    for o in 'train', 'validation': jsonl(tmp_path/'two'/o, lines)
    assert [len(o.coco['images']) for o in read_data(tmp_path/'two')] == [3, 3]
    assert cli.deqdet_check(str(tmp_path/'two')) == 1 # the same images in both


def bad(capsys, says, *args, **kwargs):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.deqdet_check(*map(str, args), **kwargs)
    err = capsys.readouterr().err
    assert e.value.code == 2 and len(err.splitlines()) == 1 and says in err, err


@pytest.mark.parametrize('line, says', [
    ('{', 'line 1: '), ('[]', 'row 1: an image and objects'), ({}, "row 1: an image and objects with bbox and category: no 'image'"),
    (dict(file_name='0.png'), 'row 1'), (dict(file_name='0.png', objects=dict(bbox=[[1, 2, 3, 'x']], category=['a'])), 'row 1'),
    (dict(file_name='0.png', objects=dict(bbox=BOXES, category=['a'])), 'row 1')])
def test_bad_rows(tmp_path, capsys, line, says):
    jsonl(tmp_path/'set', [line])
    bad(capsys, says, tmp_path/'set', valid_pct=.5)


def test_other_faults(tmp_path, capsys):
    jsonl(tmp_path/'set/train', [dict(file_name='0.png', objects=[])])
    bad(capsys, "no split 'nights'", tmp_path/'set', valid='nights')
    with pytest.raises(CommandError, match="row 1: category 'c': not one of"): write_rows([dict(image=picture(), objects=[dict(bbox=BOXES[0], category='c')])], tmp_path/'x', names=['a'])
    pytest.importorskip('pyarrow', reason='pyarrow is not installed (the extra "hf")')
    (tmp_path/'table').mkdir()
    (tmp_path/'table/train.parquet').write_text('no table')
    bad(capsys, 'train.parquet: ', tmp_path/'table', valid_pct=.5)


# ---- tables, and the real package

def table(n=3):
    datasets = pytest.importorskip('datasets', reason='the package datasets is not installed')
    features = datasets.Features(dict(image=datasets.Image(), objects=dict(
        bbox=datasets.Sequence(datasets.Sequence(datasets.Value('float32'))), category=datasets.Sequence(datasets.ClassLabel(names=['cat', 'dog'])))))
    return datasets.Dataset.from_list(rows(n, lambda i: dict(bytes=encoded(i), path=None)), features=features)


def test_a_dataset(tmp_path):
    ds = table()
    write_rows(ds, tmp_path/'set')
    check(tmp_path/'set')
    assert (tmp_path/'set/images/train/0000001.jpg').read_bytes() == encoded(0)
    write_rows(ds.to_iterable_dataset(), tmp_path/'stream')
    check(tmp_path/'stream')


def test_saved_to_disk_and_parquet(tmp_path):
    datasets = pytest.importorskip('datasets', reason='the package datasets is not installed')
    both = datasets.DatasetDict(train=table(3), validation=table(2))
    both.save_to_disk(tmp_path/'disk')
    table().save_to_disk(tmp_path/'one')
    (tmp_path/'hub/data').mkdir(parents=True)
    for k, ds in both.items(): ds.to_parquet(tmp_path/f'hub/data/{k}-00000-of-00001.parquet')
    for folder in 'disk', 'hub':
        train, valid = read_data(tmp_path/folder)
        assert [len(train.coco['images']), len(valid.coco['images'])] == [3, 2]
        assert [o['name'] for o in train.coco['categories']] == ['cat', 'dog']
    check(tmp_path/'one')
    (tmp_path/'hub/data').joinpath('validation-00000-of-00001.parquet').unlink()
    check(tmp_path/'hub')


def test_a_table_is_unpacked_once(tmp_path):
    (tmp_path/'set').mkdir()
    file = tmp_path/'set/train.parquet'
    table().to_parquet(file)
    read_hf(tmp_path/'set', 'train')
    made = tmp_path/'set/.deqdet/annotations/instances_train.json'
    then = made.stat().st_mtime_ns
    read_hf(tmp_path/'set', 'train')
    assert made.stat().st_mtime_ns == then
    table(2).to_parquet(file)
    later = made.stat().st_mtime + 5
    import os
    os.utime(file, (later, later))
    assert len(read_hf(tmp_path/'set', 'train').coco['images']) == 2
