"One image with the same two objects in five layouts, and the division of a set"
import json, shutil
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from deqdet.data import epoch_order
from deqdet.sets.check import clean
from deqdet.sets.formats import (LAYOUTS, DataError, NoSplit, _yolo_box, find_layout, permutation, read_coco, read_data,
    read_voc, read_yolo, seed_of)
from deqdet.sets.arrays import Entries, Table
from deqdet.sets.large import read_table
from deqdet.sets.shapes import synth_coco

FILES = {'coco/annotations/instances_train.json': """
{"images": [{"id": 9, "file_name": "a.jpg", "width": 128, "height": 128}],
 "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
 "annotations": [{"id": 1, "image_id": 9, "category_id": 7, "bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0},
                 {"id": 2, "image_id": 9, "category_id": 3, "bbox": [64, 32, 32, 64], "area": 1500, "iscrowd": 0}]}
""", 'voc/Annotations/a.xml': """
<annotation><filename>a.jpg</filename><size><width>128</width><height>128</height><depth>3</depth></size>
<object><name>dog</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>64</xmin><ymin>32</ymin><xmax>96</xmax><ymax>96</ymax></bndbox></object>
</annotation>""", 'voc/ImageSets/train.txt': "a", 'yolo/labels/train/a.txt': """
1 0.1953125 0.3125 0.234375 0.3125
0 0.625 0.5 0.25 0.5
""", 'yolo/data.yaml': """
train: images/train
val: images/val
names: [cat, dog]
""", 'hf/train/metadata.jsonl': '{"file_name": "a.jpg", "objects": {"bbox": [[10, 20, 30, 40], [64, 32, 32, 64]], "category": ["dog", "cat"]}}', 'csv/train.csv': """
filename,class,xmin,ymin,xmax,ymax
a.jpg,dog,10,20,40,60
a.jpg,cat,64,32,96,96
"""}

@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
    "The layouts in one folder"
    tmp = tmp_path_factory.mktemp('layouts')
    for name in (*FILES, 'coco/images/a.jpg', 'voc/JPEGImages/a.jpg', 'yolo/images/train/a.jpg', 'hf/train/a.jpg', 'csv/images/a.jpg'):
        (tmp/name).parent.mkdir(parents=True, exist_ok=True)
        if name in FILES: (tmp/name).write_text(FILES[name].strip())
        else: Image.new('RGB', (128,128)).save(tmp/name)
    return tmp

def test_layouts_are_recognised(tmp):
    assert [find_layout(tmp/o) for o in LAYOUTS]==list(LAYOUTS)
    with pytest.raises(DataError, match='no COCO'): find_layout(tmp/'coco/images')
    with pytest.raises(DataError, match='no such folder'): find_layout(tmp/'nowhere')

def test_all_layouts_one_truth(tmp):
    "After cleaning, but for the ids"
    same = [clean(read(tmp/k, 'train'))[0] for k,read in LAYOUTS.items()]
    names = [{c['id']: c['name'] for c in o['categories']} for o in same]
    for o,n in zip(same, names):
        assert [a['bbox'] for a in o['annotations']]==[[10,20,30,40], [64,32,32,64]]
        assert [n[a['category_id']] for a in o['annotations']]==['dog','cat']
    assert names==[{3: 'cat', 7: 'dog'}, {1: 'cat', 2: 'dog'}, {0: 'cat', 1: 'dog'}, {1: 'cat', 2: 'dog'}, {1: 'cat', 2: 'dog'}]

@pytest.mark.parametrize('read', [read_coco, read_table])
def test_images_of_lvis_have_an_address_instead_of_a_name(tmp_path, read):
    coco = json.loads(FILES['coco/annotations/instances_train.json'])
    del coco['images'][0]['file_name']
    coco['images'][0]['coco_url'] = 'http://images.cocodataset.org/val2017/a.jpg'
    for d in ('annotations', 'images/val2017', 'images/train2017'): (tmp_path/d).mkdir(parents=True)
    (tmp_path/'annotations/lvis_v1_train.json').write_text(json.dumps(coco))
    Image.new('RGB', (128,128)).save(tmp_path/'images/val2017/a.jpg')
    src = read(tmp_path, 'lvis_v1_train')
    images = list(Entries(src.images)) if isinstance(src, Table) else src.coco['images']
    assert isinstance(src, Table)==(read is read_table) and (src.folder/images[0]['file_name']).is_file()
    coco['images'][0]['coco_url'] = 3
    (tmp_path/'annotations/lvis_v1_train.json').write_text(json.dumps(coco))
    with pytest.raises(DataError, match="no field 'file_name'"): read(tmp_path, 'lvis_v1_train')

def test_coco_reader(tmp):
    src = read_coco(tmp/'coco', 'train')
    assert src.folder==tmp/'coco/images'
    assert src.coco['annotations'][0]==dict(id=1, image_id=9, category_id=7, bbox=[10,20,30,40], area=900, iscrowd=0)
    with pytest.raises(DataError, match="no split 'valid'"): read_coco(tmp/'coco', 'valid')
    (tmp/'bad.json').write_text('{"images": [{"id": 1}], "categories": []}')
    with pytest.raises(DataError, match=r"images\[0\]: no field 'file_name'"): read_coco(tmp/'bad.json')

def two_splits(path, folders, side=dict(train=8, valid=9)):
    "A COCO set whose splits have equal file names; images of a split have a width of their own"
    (path/'annotations').mkdir()
    for split, folder in folders.items():
        (path/folder).mkdir(parents=True, exist_ok=True)
        images = [dict(id=i, file_name=f'{i}.png', width=side[split], height=8) for i in range(4)]
        for o in images: Image.new('RGB', (side[split], 8)).save(path/folder/o['file_name'])
        coco = dict(images=images, annotations=[], categories=[])
        (path/f'annotations/{split}.json').write_text(json.dumps(coco))

@pytest.mark.parametrize('train, valid', [
    ('images/Train', 'images/Valid'), ('images/img_train', 'images/img_val'), ('Train2017', 'Val2017'), ('training', 'validation'),
    ('train', 'images/valid'), ('train_images', 'images-VAL')])
def test_each_split_of_coco_has_its_own_images(tmp_path, train, valid):
    two_splits(tmp_path, dict(train=train, valid=valid))
    for o in 'masks', 'train_masks': shutil.copytree(tmp_path/train, tmp_path/o, dirs_exist_ok=True)
    for o in tmp_path.glob('*masks/*'): Image.new('L', (3, 3)).save(o)
    (tmp_path/valid/'2.png').unlink() # a missing image is missed, not found among those of the other split
    assert [o.folder for o in read_data(tmp_path)]==[tmp_path/train, tmp_path/valid]

@pytest.mark.parametrize('read', [read_coco, read_table])
def test_images_in_two_folders_are_not_guessed(tmp_path, read):
    two_splits(tmp_path, dict(train='rgb', valid='depth'))
    for o in 'train', 'valid':
        with pytest.raises(DataError, match=f"{o}.json: images: .*/depth and .*/rgb hold different files of these names: .* 'images'"): read(tmp_path, o)
    shutil.copytree(tmp_path/'rgb', tmp_path/'depth', dirs_exist_ok=True)
    assert read(tmp_path, 'train').folder==tmp_path/'depth' # a copy
    shutil.copytree(tmp_path/'rgb', tmp_path/'images')
    assert read(tmp_path, 'train').folder==tmp_path/'images'

def test_voc_reader(tmp):
    src = read_voc(tmp/'voc', 'train')
    assert [o['name'] for o in src.coco['categories']]==['cat','dog']
    first = src.coco['annotations'][0]
    assert (first['bbox'], first['at'][1])==([10.0, 20.0, 30.0, 40.0], 'object[0]')
    with pytest.raises(DataError, match='ImageSets/Main/valid.txt'): read_voc(tmp/'voc', 'valid')

def test_yolo_reader(tmp):
    src = read_yolo(tmp/'yolo', 'train')
    assert src.coco['images']==[dict(id=1, file_name='images/train/a.jpg', width=128, height=128)]
    got = [(a['category_id'], a['bbox'], a['at'][1]) for a in src.coco['annotations']]
    assert got==[(1, [10.0, 20.0, 30.0, 40.0], 'line 1'), (0, [64.0, 32.0, 32.0, 64.0], 'line 2')]

def test_yolo_lines_are_boxes_or_polygons():
    assert _yolo_box('2 .5 .5 .2 .4', (100,200))==(2, [80., 30., 40., 40.])
    np.testing.assert_allclose(_yolo_box('2 .4 .3 .6 .3 .6 .7', (100,200))[1], [80, 30, 40, 40], atol=1e-5)
    assert _yolo_box('2 .5 .5', (100,200))==(2, '2 .5 .5')

@pytest.mark.parametrize('shape', [[4, 3], [12, 2], [17, 3]])
def test_yolo_poses_have_their_boxes(tmp, tmp_path, shape):
    "An even count of numbers was read as a polygon"
    points = ' .1 .9 2'*shape[0] if shape[1]==3 else ' .1 .9'*shape[0]
    (tmp_path/'images').mkdir()
    (tmp_path/'labels').mkdir()
    shutil.copy(tmp/'yolo/images/train/a.jpg', tmp_path/'images/a.jpg')
    (tmp_path/'labels/a.txt').write_text('0 .5 .5 .2 .4' + points)
    (tmp_path/'data.yaml').write_text(f'train: images\nnames: [person]\nkpt_shape: {shape}')
    found, = read_yolo(tmp_path, 'train').coco['annotations']
    np.testing.assert_allclose(found['bbox'], [51.2, 38.4, 25.6, 51.2], atol=1e-3)

def test_both_splits_are_read_or_made(tmp, tmp_path):
    shapes = synth_coco(tmp_path/'shapes', n_train=80, n_valid=20, size=32)
    assert [len(o.coco['images']) for o in read_data(shapes)]==[80,20]
    (tmp_path/'one').mkdir()
    shutil.copy(shapes/'annotations/instances_train.json', tmp_path/'one/shapes.json')
    parts = read_data(tmp_path/'one', valid_pct=.25)
    assert [len(o.coco['images']) for o in parts]==[60,20]
    with pytest.raises(DataError, match="no split 'valid'"): read_data(tmp/'coco')
    with pytest.raises(DataError, match='layout='): read_data(shapes, layout='pascal')

def test_the_division_of_a_set_stays(tmp_path):
    "Frozen: who trained on a part of a set yesterday validates on the other part tomorrow"
    images = [dict(id=i, file_name=f'{i}.jpg', width=8, height=8) for i in range(12)]
    (tmp_path/'one.json').write_text(json.dumps(dict(images=images, categories=[], annotations=[])))
    held = [[o['id'] for o in read_data(tmp_path, valid_pct=.25, seed=s)[1].coco['images']] for s in (0,1)]
    assert held==[[0, 5, 9], [0, 8, 9]]

@pytest.mark.parametrize('seed', range(3))
def test_permutation_is_the_first_order_of_the_loader(seed):
    "One source of chance for the division of a set and for the order of an epoch"
    order = permutation(50, seed, 0)
    assert order==epoch_order(50, seed, 0) and sorted(order)==list(range(50)) and order!=permutation(50, seed, 1)
    g = torch.Generator().manual_seed(seed_of(seed, 0))
    assert order==torch.randperm(50, generator=g).tolist()
    assert seed_of(seed, 0)==int(np.random.SeedSequence((seed, 0)).generate_state(1)[0])


def voc_xml(name): return (f'<annotation><filename>{name}</filename><size><width>32</width><height>24</height></size><object><name>cat</name>'
                           '<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>13</ymax></bndbox></object></annotation>')


def put_voc(xmls, images, stems):
    for folder in (xmls, images): folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        (xmls/f'{stem}.xml').write_text(voc_xml(f'{stem}.png'))
        Image.new('RGB', (32, 24)).save(images/f'{stem}.png')


@pytest.mark.parametrize('xmls, images', [('annotations', 'images'), ('Annotations', 'JPEGImages'), ('Annotations', '.'), ('.', '.')])
def test_undivided_voc(tmp_path, xmls, images):
    "Folders as labelling tools write them"
    put_voc(tmp_path/xmls, tmp_path/images, ['a', 'b.c', 'd'])
    assert find_layout(tmp_path) == 'voc'
    src = read_voc(tmp_path)
    assert [o['file_name'] for o in src.coco['images']] == ['a.png', 'b.c.png', 'd.png'] and src.folder == tmp_path/images
    assert not src.problems and len(src.coco['annotations']) == 3
    with pytest.raises(NoSplit, match='valid_pct'): read_data(tmp_path)
    assert [len(o.coco['images']) for o in read_data(tmp_path, valid_pct=.34)] == [2, 1]


def test_voc_with_a_folder_for_each_split(tmp_path):
    put_voc(tmp_path/'train', tmp_path/'train', ['a', 'b'])
    put_voc(tmp_path/'val', tmp_path/'val', ['c'])
    assert find_layout(tmp_path) == 'voc'
    train, valid = read_data(tmp_path)
    assert [[o['file_name'] for o in s.coco['images']] for s in (train, valid)] == [['a.png', 'b.png'], ['c.png']]
    assert train.folder == tmp_path/'train' and valid.file == tmp_path/'val'


def test_voc_with_a_folder_for_training_alone(tmp_path):
    put_voc(tmp_path/'train', tmp_path/'train', ['a', 'b', 'c', 'd'])
    with pytest.raises(NoSplit, match="no split 'valid'"): read_data(tmp_path)
    assert [len(o.coco['images']) for o in read_data(tmp_path, valid_pct=.25)] == [3, 1]


def test_lists_of_other_splits_are_not_divided_anew(tmp_path):
    put_voc(tmp_path/'Annotations', tmp_path/'JPEGImages', ['a'])
    (tmp_path/'ImageSets').mkdir()
    (tmp_path/'ImageSets/trainval.txt').write_text('a')
    with pytest.raises(DataError, match='ImageSets/Main/train.txt') as e: read_data(tmp_path)
    assert not isinstance(e.value, NoSplit)


TOOLS = { # annotation file and image, for images a and b of train, c of valid
    'images/{stem}.png annots/{stem}.xml': (3, 0),
    '{split}/images/{stem}.png {split}/annotations/{stem}.xml': (2, 1),
    'images/{split}/{stem}.png images/{split}/{stem}.xml': (2, 1),
    'images/{split}2017/{stem}.png annotations/{split}2017/{stem}.xml': (2, 1)}


@pytest.mark.parametrize('where', TOOLS)
def test_voc_wherever_files_lie(tmp_path, where):
    "Two splits where folders have their names, else one"
    for split, stem in (('train', 'a'), ('train', 'b'), ('val', 'c')):
        image, xml = (tmp_path/o.format(split=split, stem=stem) for o in where.split())
        for o in (image, xml): o.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 24)).save(image)
        xml.write_text(voc_xml(f'C:\\\\photos\\\\{stem}.png'))
    assert find_layout(tmp_path) == 'voc'
    n, m = TOOLS[where]
    sources = read_data(tmp_path) if m else [read_voc(tmp_path)]
    for src in sources:
        assert all((src.folder/o['file_name']).is_file() and o['width'] == 32 for o in src.coco['images']) and not src.problems
    assert [len(s.coco['annotations']) for s in sources] == ([n, m] if m else [n])
    if not m:
        with pytest.raises(NoSplit): read_data(tmp_path)


def test_each_split_of_voc_has_its_own_image(tmp_path):
    "Images of two splits with one name"
    for split, side in (('train', 32), ('valid', 40)):
        put_voc(tmp_path/split/'xml', tmp_path/split/'pictures', ['a'])
        Image.new('RGB', (side, 24)).save(tmp_path/split/'pictures/a.png')
    train, valid = read_data(tmp_path)
    assert train.folder == tmp_path/'train/pictures' and valid.folder == tmp_path/'valid/pictures'
    both = read_voc(tmp_path)
    assert [o['file_name'] for o in both.coco['images']] == ['train/pictures/a.png', 'valid/pictures/a.png']


def colour(source):
    "Of each image that a source names"
    return [Image.open(source.folder/o['file_name']).getpixel((0, 0)) for o in source.coco['images']]


@pytest.mark.parametrize('images', ['JPEGImages', 'images', 'photos'])
@pytest.mark.parametrize('said', ['{d}/0001.png', 'D:\\\\{d}\\\\0001.png', '{d}/0001.jpg', '0001.png', 'old name.png'])
def test_images_of_one_name_in_folders(tmp_path, images, said):
    "That which the xml file says, or in the folder that is called as the xml file's folder"
    colours = dict(a=(250, 0, 0), b=(0, 250, 0), c=(0, 0, 250))
    for d in 'cab':
        put_voc(tmp_path/'Annotations'/d, tmp_path/images/d, ['0001'])
        (tmp_path/'Annotations'/d/'0001.xml').write_text(voc_xml(said.format(d=d)))
        Image.new('RGB', (32, 24), colours[d]).save(tmp_path/images/d/'0001.png')
    src = read_voc(tmp_path)
    assert colour(src) == list(colours.values()) and not src.problems
    for d in 'ab': shutil.move(tmp_path/f'Annotations/{d}/0001.xml', tmp_path/f'Annotations/0001_{d}.xml')
    src = read_voc(tmp_path) # the folder does not tell any more
    if '{d}' in said: assert colour(src) == list(colours.values()) and not src.problems
    elif said=='0001.png':
        assert colour(src) == [colours['c']] and [(o.kind, Path(o.file).stem) for o in src.problems] == [('several images', '0001_a'), ('several images', '0001_b')]
        assert 'a/0001.png' in src.problems[0].detail and 'b/0001.png' in src.problems[0].detail


def test_what_tells_images_of_one_name_apart(tmp_path):
    put_voc(tmp_path/'Annotations', tmp_path/'JPEGImages', ['a'])
    file = tmp_path/'Annotations/a.xml'
    for name in ('old/a.png', 'a.jpg'):
        (tmp_path/'JPEGImages'/name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (32, 24), 'red').save(tmp_path/'JPEGImages'/name)
    assert read_voc(tmp_path).coco['images'][0]['file_name'] == 'a.png' # as it says, and in no other folder
    file.write_text(voc_xml('a.png').replace('<filename>', '<folder>old</folder><filename>'))
    assert read_voc(tmp_path).folder == tmp_path/'JPEGImages/old'
    file.write_text(voc_xml('a.gif'))
    assert [o.kind for o in read_voc(tmp_path).problems] == ['several images'] # .jpg or .png
    shutil.copy(tmp_path/'JPEGImages/a.png', tmp_path/'JPEGImages/a.jpg')
    assert not read_voc(tmp_path).problems # copies


@pytest.mark.parametrize('line', ['{}', '{} -1', '{}  1', ' {} 0 '])
def test_names_with_spaces_in_lists(tmp_path, line):
    stems = ['my photo', 'my photo 1', 'my photo 2', 'b', 'c 0']
    put_voc(tmp_path/'Annotations', tmp_path/'JPEGImages', stems)
    (tmp_path/'ImageSets/Main').mkdir(parents=True)
    (tmp_path/'ImageSets/Main/train.txt').write_text('\n'.join(map(line.format, stems)))
    src = read_voc(tmp_path, 'train')
    assert [o['file_name'] for o in src.coco['images']] == [f'{o}.png' for o in stems] and not src.problems


def test_a_list_whose_names_are_not_unique(tmp_path):
    "Annotations lie in Annotations; elsewhere the list has to tell which is meant"
    for d in ('Annotations', 'Annotations/z'): put_voc(tmp_path/d, tmp_path/'JPEGImages', ['a'])
    (tmp_path/'ImageSets').mkdir()
    (tmp_path/'ImageSets/train.txt').write_text('a')
    def files(): return {Path(o['at'][0]).parent.name for o in read_voc(tmp_path, 'train').coco['annotations']}
    assert files() == {'Annotations'}
    (tmp_path/'ImageSets/train.txt').write_text('z/a')
    assert files() == {'z'}
    (tmp_path/'Annotations/y').mkdir()
    shutil.move(tmp_path/'Annotations/a.xml', tmp_path/'Annotations/y/a.xml')
    assert files() == {'z'}
    (tmp_path/'ImageSets/train.txt').write_text('a')
    assert [o.kind for o in read_voc(tmp_path, 'train').problems] == ['unreadable annotation']


def test_an_xml_file_without_an_image_keeps_its_name(tmp_path):
    put_voc(tmp_path/'Annotations', tmp_path/'JPEGImages', ['a', 'b'])
    (tmp_path/'JPEGImages/b.png').unlink()
    assert [o['file_name'] for o in read_voc(tmp_path).coco['images']] == ['a.png', 'b.png']


@pytest.mark.parametrize('labels, images', [('.', '.'), ('labels', 'images'), ('labels/train', 'images/train'), ('train/labels', 'train/images'), ('train', 'train')])
@pytest.mark.parametrize('names', ['classes.txt', 'obj.names'])
def test_yolo_without_a_description(tmp_path, labels, images, names):
    for d in (labels, images): (tmp_path/d).mkdir(parents=True, exist_ok=True)
    (tmp_path/names).write_text('cat\ndog\n')
    (tmp_path/labels/'a.txt').write_text('1 .5 .5 .5 .5')
    Image.new('RGB', (32, 24)).save(tmp_path/images/'a.png')
    assert find_layout(tmp_path) == 'yolo'
    src = read_yolo(tmp_path, 'train')
    assert [(a['category_id'], a['bbox']) for a in src.coco['annotations']] == [(1, [8., 6., 16., 12.])]
    assert [o['name'] for o in src.coco['categories']] == ['cat', 'dog']
    with pytest.raises(NoSplit): read_yolo(tmp_path, 'valid')


@pytest.mark.parametrize('split', ['', 'train/'])
def test_yolo_labels_beside_the_images(tmp_path, split):
    "As labelImg writes them, in a folder `images` or below one; a file in `labels` comes first"
    for path in tmp_path/'set', tmp_path/'images/cats':
        folder = path/'images'/split
        folder.mkdir(parents=True)
        (path/'images/classes.txt').write_text('cat\ndog\n')
        for o in 'ab':
            (folder/f'{o}.txt').write_text('1 .5 .5 .5 .5')
            Image.new('RGB', (32, 24)).save(folder/f'{o}.png')
        src = read_yolo(path, 'train')
        assert [a['at'] for a in src.coco['annotations']] == [(str(folder/f'{o}.txt'), 'line 1') for o in 'ab']
        assert read_yolo(path/'images').coco['annotations'][0]['bbox'] == [8., 6., 16., 12.]
        (path/'labels'/split).mkdir(parents=True)
        (path/'labels'/split/'b.txt').write_text('0 .5 .5 .5 .5')
        assert [a['category_id'] for a in read_yolo(path).coco['annotations']] == [1, 0]


def test_yolo_without_objects_names_a_file_of_labels(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'classes.txt').write_text('cat')
    Image.new('RGB', (32, 24)).save(tmp_path/'images/a.png')
    assert read_yolo(tmp_path).file == tmp_path/'labels/a.txt'


@pytest.mark.parametrize('entries', [
    dict(train='images/a', val='images/../images/a'), dict(train=['images/a', 'images/../images/a']), dict(train='images/a', val='./images/a'),
    dict(train='images/a', test='same/a'), dict(train=['all.txt', 'images/a']), dict(path='../set', train=['images/a', 'images'])])
def test_yolo_images_count_once(tmp_path, entries):
    "Each was read again for another spelling of its folder"
    path = tmp_path/'set'
    (path/'images/a').mkdir(parents=True)
    (path/'same').symlink_to(path/'images')
    for o in 'xy': Image.new('RGB', (32, 24)).save(path/f'images/a/{o}.png')
    (path/'all.txt').write_text('./images/../images/a/x.png\n./images/a/y.png\n')
    (path/'data.yaml').write_text(json.dumps(dict(names=['cat'], **entries)))
    for split in (None, 'train'):
        assert [Path(o['file_name']).name for o in read_yolo(path, split).coco['images']] == ['x.png', 'y.png']


def test_splits_of_coco_are_not_read_together(tmp_path):
    "Files of one name, as Roboflow writes them, are told apart"
    for o in ('train', 'valid'):
        (tmp_path/o).mkdir()
        (tmp_path/o/'_annotations.coco.json').write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError) as e: read_coco(tmp_path)
    assert str(e.value) == (f'{tmp_path}: splits of COCO are not read together: '
                            'train/_annotations.coco.json, valid/_annotations.coco.json: name the splits with splits=')


HEAD = 'filename,width,height,class,xmin,ymin,xmax,ymax'
@pytest.mark.parametrize('text, boxes', [
    (f'{HEAD}\na.png,32,24,cat,2,3,12,13', [[2, 3, 10, 10]]),
    (f'\ufeff{HEAD.upper()}\r\n"a.png",32,24,"cat",2,3,12,13\r\n\r\n', [[2, 3, 10, 10]]), # as spreadsheets save it
    ('image_path,x1,y1,x2,y2,label\npictures/a.png,2,3,12,13,cat', [[2, 3, 10, 10]]),
    ('pictures/a.png,2,3,12,13,cat\npictures/b.png,,,,,', [[2, 3, 10, 10]]),
    ('a.png,2,3,12,13,cat\na.png,3,3,12,13,cat', [[2, 3, 10, 10], [3, 3, 9, 10]])])
def test_csv(tmp_path, text, boxes):
    (tmp_path/'pictures').mkdir()
    for o in 'ab': Image.new('RGB', (32, 24)).save(tmp_path/f'pictures/{o}.png')
    (tmp_path/'train.csv').write_text(text, encoding='utf-8')
    (tmp_path/'prices.csv').write_text('cat,3\ndog,4')
    assert find_layout(tmp_path) == 'csv'
    src = read_data(tmp_path, valid_pct=0.)[0]
    assert [a['bbox'] for a in src.coco['annotations']] == boxes and src.coco['categories'] == [dict(id=1, name='cat')]
    assert all((src.folder/o['file_name']).is_file() and o['width'] == 32 for o in src.coco['images'])
    with pytest.raises(NoSplit, match="no split 'valid'"): read_data(tmp_path)


def test_faults_of_a_table_name_their_line(tmp_path):
    Image.new('RGB', (32, 24)).save(tmp_path/'a.png')
    (tmp_path/'train.csv').write_text(f'{HEAD}\na.png,32,24,cat,2,3,12,13\na.png,32,24,cat,2,x,12,13\na.png,32,24,,1,2,3,4')
    coco, problems = clean(read_data(tmp_path, valid_pct=0.)[0])
    assert [(p.kind, Path(p.file).name, p.field) for p in problems] == [('bad box', 'train.csv', 'line 3 bbox')] and len(coco['annotations']) == 2
    (tmp_path/'train.csv').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DataError, match='train.csv: no readable table'): find_layout(tmp_path)


def test_all_images_of_a_yolo_set(tmp_path):
    "Without a split: those of every field, each once; a division takes those of `train`"
    for i,(d,n) in enumerate(dict(train=4, val=2, test=1).items()):
        for j in range(n):
            file = tmp_path/'images'/d/f'{i}{j}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(file)
    (tmp_path/'data.yaml').write_text('names: [a]\ntrain: images/train\nval: images/val\ntest: [images/test, images/val]\n')
    assert len(read_yolo(tmp_path).coco['images'])==7
    assert [len(read_yolo(tmp_path, o).coco['images']) for o in ('train','valid','test')]==[4, 2, 3]
    assert [len(o.coco['images']) for o in read_data(tmp_path, valid_pct=.25)]==[3, 1]
