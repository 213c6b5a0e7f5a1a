"Reading, checking and loading of detection sets: what a notebook is the wrong place for"
import io, json, math, pickle, random, shutil, subprocess, sys, warnings
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image, ImageOps
from deqdet.data import (DataError, DetDataset, DetDL, LAYOUTS, SHAPES, Source, Target,  clean, collate,
    det_dls, epoch_order, find_layout, load_image, picture_size, read_coco, read_data, read_voc, read_yolo, seeded,
    synth_coco, uncollate, verify_data)

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('data')/'shapes', 12, 6, size=64, seed=3, empty=.2)

@pytest.fixture
def copy(shapes, tmp_path): return Path(shutil.copytree(shapes, tmp_path/'copy'))

def edit(path, change, split='train'):
    "Change the annotations of a split"
    f = path/f'annotations/instances_{split}.json'
    d = json.loads(f.read_text())
    change(d)
    f.write_text(json.dumps(d))

def as_voc(src, dst, main=True):
    "The set `src`, of COCO layout, in VOC layout"
    for o in ('JPEGImages','Annotations', 'ImageSets/Main' if main else 'ImageSets'):
        (dst/o).mkdir(parents=True, exist_ok=True)
    for split,name in (('train','train'), ('valid','val')):
        coco = json.loads((src/f'annotations/instances_{split}.json').read_text())
        names = {o['id']:o['name'] for o in coco['categories']}
        for o in coco['images']:
            shutil.copy(src/'images'/o['file_name'], dst/'JPEGImages')
            objs = ''
            for a in (a for a in coco['annotations'] if a['image_id']==o['id']):
                x,y,w,h = a['bbox']
                objs += (f"<object><name>{names[a['category_id']]}</name><difficult>{a['iscrowd']}</difficult>"
                         f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
                         f"<xmax>{x+w}</xmax><ymax>{y+h}</ymax></bndbox></object>")
            size = f"<size><width>{o['width']}</width><height>{o['height']}</height></size>"
            (dst/'Annotations'/Path(o['file_name']).with_suffix('.xml')).write_text(
                f'<annotation>{size}{objs}</annotation>')
        stems = [Path(o['file_name']).stem for o in coco['images']]
        (dst/('ImageSets/Main' if main else 'ImageSets')/f'{name}.txt').write_text('\n'.join(stems))
    return dst

def as_yolo(src, dst):
    "The set `src`, of COCO layout, in YOLO layout"
    for split,name in (('train','train'), ('valid','val')):
        for o in ('images','labels'): (dst/o/name).mkdir(parents=True, exist_ok=True)
        coco = json.loads((src/f'annotations/instances_{split}.json').read_text())
        for o in coco['images']:
            shutil.copy(src/'images'/o['file_name'], dst/'images'/name)
            lines = []
            for a in (a for a in coco['annotations'] if a['image_id']==o['id']):
                (x,y,w,h),W,H = a['bbox'],o['width'],o['height']
                lines.append(f"{a['category_id']-1} {(x+w/2)/W} {(y+h/2)/H} {w/W} {h/H}")
            if lines: (dst/'labels'/name/Path(o['file_name']).with_suffix('.txt')).write_text('\n'.join(lines)+'\n')
    (dst/'data.yaml').write_text('train: images/train\nval: images/val\nnc: 4\nnames: ' + str(list(SHAPES)))
    return dst

AS = dict(coco=lambda src, dst: Path(shutil.copytree(src, dst)), voc=as_voc, yolo=as_yolo)

def same(ds):
    return {Path(o['file_name']).name: (x, t.boxes, [ds.vocab[k] for k in t.labels]) for o,(x,t) in zip(ds.images, ds)}

# ---- images

def encode(im, fmt, **kw):
    f = io.BytesIO(); im.save(f, fmt, **kw)
    return f.getvalue()

@pytest.fixture(scope='module')
def photo():
    "An image with detail at every scale, 75 x 101"
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((101, 75), Image.BICUBIC)

@pytest.mark.parametrize('mode,fmt,kw', [('RGB','jpeg',dict(quality=90)),
    ('RGB','jpeg',dict(quality=75, subsampling=0)),
    ('RGB','jpeg',dict(progressive=True)), ('L','jpeg',{}), ('CMYK','jpeg',{}), ('RGB','png',{}), ('RGBA','png',{}),
    ('LA','png',{}), ('P','png',{}), ('1','png',{}), ('RGB','webp',dict(lossless=True)), ('P','gif',{}),
    ('RGB','bmp',{}), ('RGB','tiff',{})])
def test_decoding_is_exact(photo, tmp_path, mode, fmt, kw):
    "All decoders give Pillow's bytes"
    f = tmp_path/'a'
    f.write_bytes(encode(photo.convert(mode), fmt, **kw))
    with Image.open(f) as im: want = np.array(im.convert('RGB'))
    got = load_image(f)
    assert got.dtype==torch.uint8 and np.array_equal(got.permute(1,2,0), want)
    assert picture_size(f) == (75,101)

def test_sixteen_bits(tmp_path):
    Image.fromarray((np.arange(12*16).reshape(12,16)*300).astype(np.uint16)).save(tmp_path/'a.png')
    assert np.array_equal(load_image(tmp_path/'a.png')[0], np.arange(12*16).reshape(12,16)*300 >> 8)

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('fmt', ['jpeg','png','tiff'])
def test_exif_orientation(photo, tmp_path, turn, fmt):
    exif = Image.Exif(); exif[0x112] = turn
    f = tmp_path/f'a.{fmt}'
    f.write_bytes(encode(photo, fmt, exif=exif))
    with Image.open(f) as im: raw,upright = np.array(im), np.array(ImageOps.exif_transpose(im))
    assert np.array_equal(load_image(f).permute(1,2,0), upright)
    assert picture_size(f) == upright.shape[:2]
    assert np.array_equal(load_image(f, upright.shape[:2]).permute(1,2,0), upright)
    if turn>=5: assert np.array_equal(load_image(f, raw.shape[:2]).permute(1,2,0), raw) # annotated unturned

def test_pictures_in_memory(photo):
    want = np.array(photo)
    for x in (photo, want, want/255, want.astype(np.float32)/255, torch.as_tensor(want),
              torch.as_tensor(want).permute(2,0,1)):
        assert np.array_equal(load_image(x).permute(1,2,0), want)
    assert load_image(np.zeros((5,7), bool).astype(np.uint8)).shape==(3,5,7)
    assert load_image(np.zeros((5,7,4), np.uint8)).shape==(3,5,7)
    with pytest.raises(DataError, match='shape'): load_image(np.zeros((5,7,9), np.uint8))

# ---- the generated set

def test_synth_is_what_it_says(tmp_path):
    path = synth_coco(tmp_path/'a', 150, 50, seed=5)
    for split,n in (('train',150), ('valid',50)):
        d = json.loads((path/f'annotations/instances_{split}.json').read_text())
        assert len(d['images'])==n and [c['name'] for c in d['categories']]==list(SHAPES)
        per = np.bincount([a['image_id'] for a in d['annotations']], minlength=n+1)[1:]
        assert per.max()<=6 and 0<(per==0).sum()<.2*n and len(set(per))>=6
        x,y,w,h = np.array([a['bbox'] for a in d['annotations']]).T
        assert x.min()>=0 and y.min()>=0 and (x+w).max()<=128 and (y+h).max()<=128 and min(w.min(), h.min())>2
        area = np.array([a['area'] for a in d['annotations']])
        assert np.all(area<=w*h) and np.all(area>.15*w*h) and np.sqrt(w*h).max()/np.sqrt(w*h).min()>6
    assert verify_data(path).ok

def test_synth_boxes_are_extents(tmp_path):
    "An image of one object: where it differs from its ground is where its box says"
    from deqdet.sets.shapes import _extent, _paint, _scene
    for i in range(10):
        rng = np.random.default_rng(i)
        owner,labels = _scene(rng, (96,128), list(SHAPES), 1)
        state = rng.bit_generator.state
        with_,x = np.array(_paint(rng, (96,128), owner, 1), int), None
        rng.bit_generator.state = state
        without = np.array(_paint(rng, (96,128), Image.new('L', owner.size), 1), int)
        ys,xs = np.nonzero(np.abs(with_-without).max(-1)>3)
        x,y,w,h = _extent(np.asarray(owner)==1)
        assert np.abs(np.array([xs.min(), ys.min(), xs.max()+1, ys.max()+1]) - [x, y, x+w, y+h]).max() <= 1

def test_synth_repeats_itself(tmp_path):
    a,b = synth_coco(tmp_path/'a', 5, 2, size=64), synth_coco(tmp_path/'b', 7, 2, size=64)
    other = synth_coco(tmp_path/'c', 5, 2, size=64, seed=1)
    read = lambda p: (p/'images/train_00003.jpg').read_bytes()
    assert read(a)==read(b)!=read(other)
    assert read(a)!=(a/'images/valid_00001.jpg').read_bytes()
    f = a/'images/train_00003.jpg'; f.unlink()
    synth_coco(a, 5, 2, size=64)
    assert not f.exists()                    # the very set is there by its annotations: nothing is written
    synth_coco(a, 5, 2, size=64, seed=1)
    assert f.read_bytes()==read(other)       # another one is asked for: it is

def test_synth_options(tmp_path):
    path = synth_coco(tmp_path, 6, 1, size=(48,80), n_classes=2, empty=0, max_objects=1)
    ds = DetDataset(read_coco(path, 'train'))
    assert ds.vocab==['disc','triangle'] and all(x.shape==(3,48,80) and len(t.labels)==1 for x,t in ds)
    assert all(len(t.labels)==0 for _,t in DetDataset(read_coco(synth_coco(tmp_path/'e', 4, 1, empty=1), 'train')))
    with pytest.raises(ValueError, match='n_classes'): synth_coco(tmp_path, n_classes=5)

# ---- layouts

def test_three_layouts_one_dataset(shapes, tmp_path):
    want = {}
    for kind,make in AS.items():
        path = make(shapes, tmp_path/kind)
        assert find_layout(path)==kind
        assert verify_data(path).ok
        dls = det_dls(path, bs=4, vocab=list(SHAPES), num_workers=0, device='cpu')
        assert dls.vocab==list(SHAPES)
        for name,dl in zip(('train','valid'), dls):
            got = same(dl.dataset)
            want.setdefault(name, got)
            assert got.keys()==want[name].keys()
            for k,(x,b,l) in got.items():
                assert torch.equal(x, want[name][k][0]) and l==want[name][k][2]
                torch.testing.assert_close(b, want[name][k][1], atol=1e-4, rtol=0)
            truth = dl.dataset.coco
            assert all(a.keys()>={'id','image_id','category_id','bbox','area','iscrowd'} for a in truth['annotations'])
            assert [c['id'] for c in truth['categories']]==dl.dataset.cat_ids

def test_layouts_that_cannot_be_told(shapes, tmp_path):
    with pytest.raises(DataError, match='no such folder'): find_layout(tmp_path/'none')
    with pytest.raises(DataError, match='no COCO'): find_layout(tmp_path)
    both = as_yolo(shapes, AS['coco'](shapes, tmp_path/'both'))
    with pytest.raises(DataError, match='like coco and like yolo'): det_dls(both)
    assert len(read_data(both, 'yolo')[0].coco['images'])==12
    with pytest.raises(DataError, match='pascal'): det_dls(both, layout='pascal')

@pytest.mark.parametrize('images,file', [('images/{}2017','annotations/instances_{}2017.json'),
    ('{}2017','annotations/instances_{}2017.json'),
    ('{}','{}/_annotations.coco.json'), ('{}','annotations/{}.json'), ('images','{}.json'),
    ('images/{}','annotations/instances_{}.json')])
def test_where_coco_files_lie(shapes, tmp_path, images, file):
    "Both splits name their images 0.jpg, 1.jpg, …: the folder decides, except where there is only one"
    for i,(split,name) in enumerate((('train','train'), ('valid','val'))):
        d = json.loads((shapes/f'annotations/instances_{split}.json').read_text())
        folder,f = tmp_path/images.format(name), tmp_path/file.format(name)
        folder.mkdir(parents=True, exist_ok=True); f.parent.mkdir(parents=True, exist_ok=True)
        for k,o in enumerate(d['images']):
            new = f"{k + (100*i if images=='images' else 0)}.jpg"
            shutil.copy(shapes/'images'/o['file_name'], folder/new)
            o['file_name'] = new
        f.write_text(json.dumps(d))
    for split in ('train','valid'):
        a,b = DetDataset(read_coco(tmp_path, split)), DetDataset(read_coco(shapes, split))
        assert find_layout(tmp_path)=='coco' and len(a)==len(b)
        for (x,t),(y,u) in zip(a, b): assert torch.equal(x, y) and torch.equal(t.boxes, u.boxes)

def test_several_coco_files(copy):
    shutil.copy(copy/'annotations/instances_train.json', copy/'annotations/instances_train2014.json')
    with pytest.raises(DataError, match='which one. .*instances_train.json, .*instances_train2014.json: name the splits'):
        det_dls(copy)
    assert len(det_dls(copy, splits=('train2014','valid'), num_workers=0).train_ds)==12

def test_coco_with_everything(tmp_path, shapes):
    "Gaps in the category ids, RLE crowd, images without annotations, an id 0, no area, no size"
    (tmp_path/'images').mkdir(); (tmp_path/'annotations').mkdir()
    for i in (0,1,2): shutil.copy(shapes/f'images/train_0000{i}.jpg', tmp_path/f'images/{i}.jpg')
    d = dict(images=[dict(id=40+i, file_name=f'{i}.jpg', width=64, height=64) for i in range(2)] +
                    [dict(id=7, file_name='2.jpg')],
        categories=[dict(id=90, name='z'), dict(id=3, name='c'), dict(id=17, name='m')],
        annotations=[dict(id=0, image_id=41, category_id=90, bbox=[1,2,30,20], iscrowd=0),
                     dict(id=5, image_id=41, category_id=17, bbox=[0,0,64,64], area=99., iscrowd=1,
                          segmentation=dict(size=[64,64], counts=[9,99,3988])),
                     dict(id=6, image_id=7, category_id=3, bbox=[5,6,7,8], area=31., segmentation=[[5,6,12,6,12,14]])])
    (tmp_path/'annotations/instances_train.json').write_text(json.dumps(d))
    ds = DetDataset(read_coco(tmp_path, 'train'))
    assert (ds.vocab, ds.cat_ids)==(['c','m','z'], [3,17,90])
    assert [t.labels.tolist() for _,t in ds]==[[],[2],[0]] and [t.image_id.item() for _,t in ds]==[40,41,7]
    assert ds[0][1].boxes.shape==(0,4)
    assert [(a['id'], a['iscrowd'], a['area']) for a in ds.coco['annotations']]==[(1,0,600.), (2,1,99.), (3,0,31.)]
    assert (ds.coco['images'][2]['width'], ds.coco['images'][2]['height'])==(64,64)
    assert 'segmentation' not in ds.coco['annotations'][1]
    assert verify_data(tmp_path, splits=('train','train')).counts=={'image in both splits':3}

def test_validation_numbers_categories_otherwise(copy):
    def renumber(d):
        d['categories'] = [dict(id=50-c['id'], name=c['name']) for c in d['categories'] if c['id']!=2] + \
                          [dict(id=99, name='comet')]
        for a in d['annotations']: a['category_id'] = 50-a['category_id']
        d['annotations'] = [a for a in d['annotations'] if a['category_id']!=48]
        d['annotations'][0]['category_id'] = 99
    edit(copy, renumber, 'valid')
    with pytest.warns(UserWarning, match='1 unknown category'): dls = det_dls(copy, num_workers=0)
    ds = dls.valid_ds
    assert ds.vocab==dls.vocab==list(SHAPES) and ds.cat_ids[0]==49 and ds.cat_ids[2:]==[47,46]
    assert len(set(ds.cat_ids))==4 and ds.cat_ids[1] not in (49,47,46,99)
    old = DetDataset(read_coco(copy, 'train')).labels
    assert set(ds.labels.tolist()) <= {0,2,3} and set(old.tolist()) <= {0,1,2,3}

@pytest.mark.parametrize('text,message', [('', 'no readable json'),
    ('{}', "field 'images'"), ('[]', "field 'images'"),
    ('{"images": 3}', "field 'images'"),
    ('{"images": [], "categories": []}', "field 'annotations'"),
    ('{"images": [{"id": 1}], "categories": [], "annotations": []}', r"images\[0\]: no field 'file_name'"),
    ('{"images": [{"id": "a", "file_name": "b"}], "categories": [], "annotations": []}', r"images\[0\] id: 'a'"),
    ('{"images": [], "categories": [{"id": 1}], "annotations": []}', r"categories\[0\]: no field 'name'"),
    ('{"images": [], "categories": [], "annotations": [3]}', r'annotations\[0\]'),
    ('{"images": [], "categories": [], "annotations": []}', 'categories: at least one class'),
    ('{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}', 'images: at least one image')])
def test_broken_json_is_named(copy, text, message):
    (copy/'annotations/instances_train.json').write_text(text)
    with pytest.raises(DataError, match=f'instances_train.json.*{message}'): det_dls(copy)

def test_missing_split_is_named(copy):
    (copy/'annotations/instances_valid.json').unlink()
    with pytest.raises(DataError, match="no split 'valid'.*valid_pct"): det_dls(copy)
    dls = det_dls(copy, valid_pct=.25, num_workers=0)
    again = det_dls(copy, valid_pct=.25, num_workers=0)
    names = lambda ds: {o['file_name'] for o in ds.images}
    assert (len(dls.train_ds), len(dls.valid_ds))==(9,3) and not names(dls.train_ds) & names(dls.valid_ds)
    assert names(dls.valid_ds)==names(again.valid_ds)!=names(
        det_dls(copy, valid_pct=.25, seed=1, num_workers=0).valid_ds)

# ---- VOC

def test_voc_details(shapes, tmp_path):
    "Difficult objects, no size, another image suffix, an unreadable annotation"
    path = as_voc(shapes, tmp_path/'voc', main=False)
    xml = lambda i: path/f'Annotations/train_0000{i}.xml'
    box = '<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox>'
    xml(0).write_text(f'<annotation><object><name>disc</name><difficult>1</difficult>{box}</object>'
                      f'<object><name>cross</name>{box}</object></annotation>')
    Image.open(path/'JPEGImages/train_00000.jpg').save(path/'JPEGImages/train_00000.png')
    (path/'JPEGImages/train_00000.jpg').unlink()
    xml(1).write_text('<annotation><obj')
    xml(2).unlink()
    with pytest.warns(UserWarning, match='2 unreadable annotation'):
        ds = DetDataset(read_voc(path, 'train'), list(SHAPES))
    assert len(ds)==10                                   # images whose truth is unknown are left out
    assert ds.images[0]==dict(id=1, file_name='train_00000.png', width=64, height=64)
    assert ds[0][1].labels.tolist()==[3] and ds[0][1].boxes.tolist()==[[1,2,11,22]]
    assert [a['iscrowd'] for a in ds.coco['annotations'] if a['image_id']==1]==[1,0]
    report = verify_data(path)
    assert report.counts=={'unreadable annotation':2} and \
        {Path(o.file).name for o in report.problems}=={'train_00001.xml','train_00002.xml'}

def test_voc_without_lists(shapes, tmp_path):
    path = as_voc(shapes, tmp_path/'voc'); shutil.rmtree(path/'ImageSets')
    with pytest.raises(DataError, match='ImageSets/Main/train.txt.*valid_pct'): det_dls(path)
    dls = det_dls(path, valid_pct=.5, num_workers=0)
    assert len(dls.train_ds)==len(dls.valid_ds)==9

# ---- YOLO

@pytest.mark.parametrize('change', ['names', 'root', 'roboflow', 'lists', 'relative'])
def test_yolo_descriptions(shapes, tmp_path, change, monkeypatch):
    path = as_yolo(shapes, tmp_path/'yolo')
    want = same(DetDataset(read_yolo(path, 'train')))
    names = str(list(SHAPES))
    if change=='names': text = 'train: images/train\nval: images/val\nnames: ' + str(dict(enumerate(SHAPES)))
    if change=='root': text = f'path: {path}\ntrain: [images/train]\nval: images/val\nnames: {names}'
    if change=='roboflow': text = f'train: ../images/train\nval: ../images/val\nnames: {names}'
    if change=='lists':
        text = f'train: train.txt\nval: images/val\nnames: {names}'
        (path/'train.txt').write_text('\n'.join(f'./images/train/{k}' for k in want))
    if change=='relative':
        monkeypatch.chdir(path); text = (path/'data.yaml').read_text(); path = Path('.')
    (path/'data.yaml').write_text(text)
    got = same(DetDataset(read_yolo(path, 'train')))
    assert got.keys()==want.keys()
    for k in got: assert torch.equal(got[k][1], want[k][1]) and got[k][2]==want[k][2]

def test_yolo_complaints(shapes, tmp_path):
    path = as_yolo(shapes, tmp_path/'yolo')
    good = (path/'data.yaml').read_text()
    for text,message in ((good.replace('train: images/train', 'train: nowhere'),
                          "field 'train': nowhere does not exist"),
                         (good.replace('val: images/val\n', ''), "no split 'valid'"),
                         ('names: [a\n', 'no readable yaml')):
        (path/'data.yaml').write_text(text)
        with pytest.raises(DataError, match=f'data.yaml.*{message}'): det_dls(path)
    (path/'data.yaml').write_text('nothing: here')
    with pytest.raises(DataError, match='names'): read_yolo(path)

def test_yolo_lines(shapes, tmp_path):
    path = as_yolo(shapes, tmp_path/'yolo')
    (path/'labels/train/train_00000.txt').write_text('1 .5 .5 .25 .5\n\n0 .1 .1 .6 .1 .6 .8\n'
        '2 .5 .5\nx y\n9 .5 .5 .1 .1\n0 .5 .5 inf .1\n')
    with pytest.warns(UserWarning, match='2 bad box, 2 unknown category'): ds = DetDataset(read_yolo(path, 'train'))
    x,t = ds[0]
    torch.testing.assert_close(t.boxes, torch.tensor([[24.,16,40,48], [6.4,6.4,38.4,51.2]]))
    assert t.labels.tolist()==[1,0]
    assert [o.field for o in verify_data(path).problems]==[
        'line 4 bbox', 'line 5 category_id', 'line 6 category_id', 'line 7 bbox']

# ---- every kind of problem

def a(i, **kw): return lambda path: edit(path, lambda d: d['annotations'][i].update(kw))
def without(i, k): return lambda path: edit(path, lambda d: d['annotations'][i].pop(k))
def truncate(path): f = path/'images/train_00004.jpg'; f.write_bytes(f.read_bytes()[:-500])
def repeat(key): return lambda path: edit(path, lambda d: d[key].append(d[key][0]))

PROBLEMS = {
    'missing image':    (lambda p: (p/'images/train_00004.jpg').unlink(), 'train_00004.jpg', 'file'),
    'unreadable image': (lambda p: (p/'images/train_00004.jpg').write_bytes(b'GIF89 or so'),
                           'train_00004.jpg', 'file'),
    'unreadable image (empty)': (lambda p: (p/'images/train_00004.jpg').write_bytes(b''), 'train_00004.jpg', 'file'),
    'truncated image':  (truncate, 'train_00004.jpg', 'file'),
    'wrong size':         (lambda p: edit(p, lambda d: d['images'][4].update(height=99)),
                           'train_00004.jpg', 'height, width'),
    'box outside':        (a(2, bbox=[64,3,5,5]), 'instances_train.json', 'annotations[2] bbox'),
    'box outside (left)': (a(2, bbox=[-9,3,9,5]), 'instances_train.json', 'annotations[2] bbox'),
    'box cut':            (a(2, bbox=[60,3,50,5]), 'instances_train.json', 'annotations[2] bbox'),
    'empty box':          (a(2, bbox=[6,3,0,5]), 'instances_train.json', 'annotations[2] bbox'),
    'empty box (inverted)': (a(2, bbox=[6,30,5,-5]), 'instances_train.json', 'annotations[2] bbox'),
    'bad box':            (a(2, bbox=[6,3,math.nan,5]), 'instances_train.json', 'annotations[2] bbox'),
    'bad box (infinite)': (a(2, bbox=[6,3,math.inf,5]), 'instances_train.json', 'annotations[2] bbox'),
    'bad box (three numbers)': (a(2, bbox=[6,3,5]), 'instances_train.json', 'annotations[2] bbox'),
    'bad box (text)':     (a(2, bbox=['6','3','5','5']), 'instances_train.json', 'annotations[2] bbox'),
    'bad box (none)':     (without(2, 'bbox'), 'instances_train.json', 'annotations[2] bbox'),
    'unknown category':   (a(2, category_id=77), 'instances_train.json', 'annotations[2] category_id'),
    'unknown category (none)': (without(2, 'category_id'), 'instances_train.json', 'annotations[2] category_id'),
    'unknown image':    (a(2, image_id=77), 'instances_train.json', 'annotations[2] image_id'),
    'duplicate id':       (a(2, id=1), 'instances_train.json', 'annotations[2] id'),
    'duplicate id (image)':  (repeat('images'), 'instances_train.json', 'images[12] id'),
    'duplicate id (category)': (repeat('categories'), 'instances_train.json', 'categories[4] id'),
    'image in both splits':  (lambda p: edit(p, lambda d: d['images'][4].update(file_name='train_00003.jpg'),
                                               'valid'),
                                'train_00003.jpg', 'file'),
}

@pytest.mark.parametrize('kind', PROBLEMS)
def test_verify_data_sees(copy, kind):
    "One fault gives one line, which names file and field; and nothing of it crashes a loader in silence"
    spoil,file,field = PROBLEMS[kind]
    n = len(read_coco(copy, 'train').coco['annotations'])
    spoil(copy)
    report = verify_data(copy)
    kind = kind.split(' (')[0]
    assert report.counts=={kind:1} and not report.ok
    o, = report.problems
    assert Path(o.file).name==file and o.field==field and o.detail
    for text in (repr(report), report._repr_markdown_()): assert f'{kind}: 1' in text and file in text and field in text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ds = DetDataset(read_coco(copy, 'train'))
    lost = kind in ('box outside','empty box','bad box','unknown category','unknown image')
    assert len(ds.coco['annotations'])==n-lost
    assert [f'1 {kind}' in str(w.message) and field in str(w.message) for w in caught
            if 'left out' in str(w.message)]==[True]*lost
    assert len({a['id'] for a in ds.coco['annotations']})==len(ds.coco['annotations'])
    if kind.endswith('image') and kind!='unknown image' or kind=='wrong size':
        with pytest.raises(DataError, match='train_00004.jpg'): list(ds)
        ds.on_error = 'skip'
        with pytest.warns(UserWarning, match='train_00004.jpg.*replaces it'): items = list(ds)
        assert [t.image_id.item() for _,t in items]==[1,2,3,4,6,6,7,8,9,10,11,12]
    else:
        b = torch.cat([t.boxes for _,t in ds])
        assert len(b)==n-lost and b.isfinite().all() and b.min()>=0 and b.max()<=64 and (b[:,2:]>b[:,:2]).all()

def test_verify_without_decoding(copy):
    truncate(copy); (copy/'images/train_00005.jpg').unlink()
    assert verify_data(copy, decode=False).counts=={'missing image':1}
    assert verify_data(copy).counts=={'missing image':1, 'truncated image':1}

def test_a_good_set_gives_no_warning(shapes):
    with warnings.catch_warnings(): warnings.simplefilter('error'); det_dls(shapes, num_workers=0).one_batch()

def test_no_picture_can_be_read(copy):
    for o in (copy/'images').glob('train*'): o.write_bytes(b'')
    dls = det_dls(copy, num_workers=0, on_error='skip')
    with pytest.raises(DataError, match='none of 12|not one of 12'), pytest.warns(UserWarning): dls.one_batch()
    with pytest.raises(ValueError, match='on_error'): det_dls(copy, on_error='ignore')

# ---- loaders

def jitter(img, t): return (img*torch.rand(())*np.random.rand()).to(torch.uint8), t

def equal(a, b):
    return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b)
                                  for x,y in zip([*p[:2], *p[2]], [*q[:2], *q[2]]))

@pytest.mark.parametrize('group', [False, True])
def test_any_pass_can_be_repeated_and_resumed(shapes, group):
    "Same bits whatever the number of workers, the past, and the place where the pass begins"
    def make(**kw):
        return det_dls(shapes, bs=4, tfms=(jitter, None), seed=5, group=group,
                       **{'num_workers':0, 'device':'cpu', **kw}).train
    dl = make()
    one,two = list(dl), list(dl)                   # epochs 0 and 1
    assert not equal(one, two)
    fresh = make(num_workers=2)
    torch.manual_seed(99); np.random.seed(9)
    fresh.one_batch()                              # a look at the data changes nothing
    assert equal(list(fresh), one)
    late = make(num_workers=2)
    late.set_epoch(1, start=8)
    assert equal(list(late), two[2:])
    assert late.epoch==2 and late.start==0
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(make())
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])

def test_validation_keeps_every_picture_in_order(shapes):
    dls = det_dls(shapes, bs=4, num_workers=0, device='cpu')
    for _ in range(2): assert torch.cat([b[2].image_id for b in dls.valid]).tolist()==[1,2,3,4,5,6]
    assert len(list(dls.train))==3 and dls.train.drop_last
    assert not det_dls(shapes, bs=64, num_workers=0).train.drop_last

def test_grouping():
    rng = np.random.default_rng(0)
    wide = rng.random(1001) < .6
    order = epoch_order(1001, 1, 2, wide, 8)
    assert sorted(order)==list(range(1001))
    kinds = [set(wide[order[i:i+8]]) for i in range(0, 1001, 8)]
    assert sum(len(k)>1 for k in kinds) <= 1 and {True} in kinds and {False} in kinds
    first = [kinds[i]=={True} for i in range(40)]
    assert any(first) and not all(first)           # batches of both kinds come mixed

@pytest.mark.parametrize('n', [999, 1000])
def test_large_sets_are_grouped(tmp_path, n):
    "From 1000 images on, batches hold lying or standing images; no file is opened to know which is which"
    sides = [(48,64) if i%3 else (64,48) for i in range(n)]
    images = [dict(id=i+1, file_name=f'{i}.jpg', height=h, width=w) for i,(h,w) in enumerate(sides)]
    for split in ('train','valid'):
        (tmp_path/f'instances_{split}.json').write_text(json.dumps(dict(
            images=images, annotations=[], categories=[dict(id=1, name='a')])))
    dls = det_dls(tmp_path, bs=8, num_workers=0)
    assert dls.train.group==(n==1000) and not dls.valid.group
    idxs = dls.train.get_idxs()
    mixed = sum(len({sides[i] for i in idxs[k:k+8]})>1 for k in range(0, n, 8))
    assert sorted(idxs)==list(range(n)) and (mixed<=1 if n==1000 else mixed>20)
    assert det_dls(tmp_path, bs=8, num_workers=0, group=n<1000).train.group==(n<1000)

def test_sizes_of_every_kind(tmp_path):
    "1 x 1, 8000 x 50, and an image without objects in one batch"
    (tmp_path/'images').mkdir(); (tmp_path/'annotations').mkdir()
    images = []
    for i,(h,w) in enumerate([(1,1), (8000,50), (37,41)]):
        Image.new('RGB', (w,h), (i*90,)*3).save(tmp_path/f'images/{i}.png')
        images.append(dict(id=i+1, file_name=f'{i}.png', width=w, height=h))
    anns = [dict(id=1, image_id=1, category_id=1, bbox=[0,0,1,1]),
            dict(id=2, image_id=2, category_id=1, bbox=[0,7000,50,1000])]
    for split in ('train','valid'):
        (tmp_path/f'annotations/instances_{split}.json').write_text(json.dumps(dict(
            images=images, annotations=anns, categories=[dict(id=1, name='a')])))
    dls = det_dls(tmp_path, bs=3, size=64, num_workers=0, device='cpu')
    x,s,t = next(iter(dls.valid))
    assert x.shape==(3,3,64,64) and s.tolist()==[[64,64],[64,1],[58,64]] and t.orig.tolist()==[[1,1],[8000,50],[37,41]]
    torch.testing.assert_close(t.boxes[:,0], torch.tensor([[0.,0,64,64], [0,56,1,64], [0,0,0,0]]))
    back = t.boxes[:,0] / (s/t.orig).flip(1).repeat(1,2)
    torch.testing.assert_close(back[1], torch.tensor([0.,7000,50,8000]))
    assert det_dls(tmp_path, bs=3, num_workers=0).valid.one_batch()[0].shape==(3,3,8000,64)

def test_one_picture_and_no_object(tmp_path):
    for n,empty in ((1,0), (3,1)):
        path = synth_coco(tmp_path/str(n), n, 1, size=64, empty=empty)
        x,s,t = det_dls(path, bs=4, num_workers=0, device='cpu').one_batch()
        assert len(x)==n and t.boxes.shape[0]==n and t.boxes.shape[1]>=1 and ((t.labels>=0).any().item())==(not empty)
    with pytest.raises(DataError, match='at least one image'): det_dls(path, keep_empty=False)

def test_keep_empty(shapes):
    a,b = det_dls(shapes, num_workers=0), det_dls(shapes, num_workers=0, keep_empty=False)
    bare = sum(len(t.labels)==0 for _,t in a.train_ds)
    assert bare>0 and len(b.train_ds)==len(a.train_ds)-bare and len(b.valid_ds)==len(a.valid_ds)

def test_new_pictures(shapes):
    dls = det_dls(shapes, bs=2, size=32, num_workers=0, device='cpu')
    f = shapes/'images/valid_00002.jpg'
    forms = [f, str(f), Image.open(f), np.array(Image.open(f)), load_image(f)]
    b = list(dls.test_dl(forms))
    x,ids = torch.cat([o[0] for o in b]), torch.cat([o[2].image_id for o in b])
    assert x.shape==(5,3,32,32) and all(torch.equal(o, x[0]) for o in x) and ids.tolist()==[0,1,2,3,4]
    assert all((o[2].labels<0).all() and o[2].orig.tolist()==[[64,64]]*len(o[0]) for o in b)
    assert len(dls.test_dl(f).dataset)==1 and len(dls.test_dl(tuple(forms)).dataset)==5
    with pytest.raises(DataError, match='nowhere.jpg'): list(dls.test_dl(['nowhere.jpg']))

def test_exported_loaders_carry_nothing(shapes):
    dls = det_dls(shapes, bs=4, size=32, num_workers=0, device='cpu')
    blob = pickle.dumps(dls.new_empty())
    assert b'train_00' not in blob and str(shapes/'images').encode() not in blob
    back = pickle.loads(blob)
    assert back.vocab==dls.vocab and len(back.train_ds)==0 and back.valid_ds.cat_ids==[1,2,3,4]
    assert torch.equal(back.test_dl([shapes/'images/valid_00000.jpg']).one_batch()[0], dls.valid.one_batch()[0][:1])

def test_unknown_options_are_errors(shapes):
    with pytest.raises(TypeError): det_dls(shapes, sizes=3)
    with pytest.raises(TypeError, match='shufle'): DetDL(DetDataset(read_coco(shapes, 'train')), shufle=True)

@pytest.mark.parametrize('seed', range(20))
def test_collate_round_trip(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda lo,hi: torch.randint(lo, hi, (), generator=g).item()
    items = []
    for i in range(r(1, 6)):
        h,w,m = r(1, 150), r(1, 150), r(0, 5)
        t = Target(torch.rand(m, 4, generator=g)*w, torch.randint(0, 9, (m,), generator=g),
                   torch.tensor([h,w]), torch.tensor(i), torch.tensor([2*h,3*w]))
        items.append((torch.randint(0, 256, (3,h,w), generator=g, dtype=torch.uint8), t))
    x,s,t = batch = collate(items)
    assert x.shape[2]%32==0 and x.shape[3]%32==0 and \
        x.shape[2]-max(o[0].shape[1] for o in items)<32 and t.boxes.shape[1]>=1
    for (a,p),(b,q) in zip(items, uncollate(batch)):
        assert torch.equal(a, b) and all(torch.equal(u, v) for u,v in zip(p, q))
    assert x.sum()==sum(o[0].sum() for o in items)      # all else is zero

# ---- real sets

def test_bccd(data_dir):
    "292 photographs, 3943 objects in three classes, two of them without an inside"
    path = data_dir/'bccd'
    if not path.is_dir(): pytest.skip(f'{path} is not there')
    report = verify_data(path)
    assert report.layout=='voc' and report.counts=={'empty box': 2, 'nearly the same in both splits': 1}
    assert {Path(o.file).stem for o in report.problems}=={'BloodImage_00343', 'BloodImage_00338', 'BloodImage_00037'}
    with pytest.warns(UserWarning, match='1 empty box'):
        dls = det_dls(path, bs=8, size=320, num_workers=0, device='cpu')
    assert dls.vocab==['Platelets','RBC','WBC'] and (len(dls.train_ds), len(dls.valid_ds))==(205,87)
    assert len(dls.train_ds.boxes)+len(dls.valid_ds.boxes)==3941
    x,s,t = dls.one_batch()
    assert x.shape==(8,3,256,320) and s.unique(dim=0).tolist()==[[240,320]] and \
        t.orig.unique(dim=0).tolist()==[[480,640]]
    import matplotlib.pyplot as plt
    dls.show_batch(max_n=4); plt.close('all')

def test_cocoeval(data_dir):
    "The truth that a dataset hands to evaluation scores the given results as the file itself does"
    f = data_dir/'cocoeval/instances_val2014_100.json'
    if not f.is_file(): pytest.skip(f'{f} is not there')
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    src = read_coco(f)
    n,crowd = len(src.coco['annotations']), sum(o['iscrowd'] for o in src.coco['annotations'])
    assert any(isinstance(o.get('segmentation'), dict) for o in src.coco['annotations']) or crowd==0
    ds = DetDataset(src)
    assert len(ds)==len(src.coco['images'])==100 and len(ds.vocab)==80 and ds.cat_ids[-1]==90 and 12 not in ds.cat_ids
    assert len(ds.coco['annotations'])==n and len(ds.boxes)==n-crowd
    truth = COCO(); truth.dataset = dict(ds.coco, info={}); truth.createIndex()
    e = COCOeval(truth, truth.loadRes(str(data_dir/'cocoeval/instances_val2014_fakebbox100_results.json')), 'bbox')
    e.evaluate(); e.accumulate(); e.summarize()
    np.testing.assert_allclose(e.stats, [.505,.697,.573,.586,.519,.501,.387,.594,.595,.640,.566,.564], atol=5e-4)
    with pytest.raises(DataError, match='no such image'): ds[0]


def test_unknown_format_is_said_plainly(tmp_path):
    "The message names the file and no address in memory"
    (tmp_path/'x.jpg').write_bytes(b'GIF89 or so')
    with pytest.raises(DataError, match='x.jpg: unreadable image') as e: load_image(tmp_path/'x.jpg')
    assert '0x' not in str(e.value)

# ---- what the page shows without proving it

@pytest.fixture(scope='module')
def eighty(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('page')/'shapes', n_train=80, n_valid=20, seed=1)

def test_crowds_and_frames(tmp_path):
    "A crowd stays in `.coco` and is no target; a box over the frame is cut; bad ones are left out"
    Image.new('RGB', (128,128)).save(tmp_path/'a.jpg')
    boxes = [([10,20,30,40], 7, 0), ([64,32,32,64], 3, 0), ([0,0,90,90], 7, 1), ([5,5,0,9], 7, 0), ([5,5,9,9], 99, 0),
             ([100,100,50,10], 7, 0)]
    anns = [dict(id=i, image_id=9, category_id=k, bbox=b, iscrowd=crowd) for i,(b,k,crowd) in enumerate(boxes, 1)]
    coco = dict(images=[dict(id=9, file_name='a.jpg', width=128, height=128)], annotations=anns,
                categories=[dict(id=3, name='cat'), dict(id=7, name='dog')])
    with pytest.warns(UserWarning, match='left out: 1 empty box, 1 unknown category'):
        ds = DetDataset(Source(coco, tmp_path))
    assert ds[0][1].boxes.tolist()==[[10,20,40,60], [64,32,96,96], [100,100,128,110]]
    assert [a['iscrowd'] for a in ds.coco['annotations']]==[0,0,1,0]

def test_the_next_image_stands_in(copy):
    (copy/'images/train_00003.jpg').write_bytes(b'not an image')
    src = read_coco(copy, 'train')
    with pytest.raises(DataError, match='train_00003.jpg: unreadable image'): DetDataset(src)[3]
    with pytest.warns(UserWarning, match='replaces it'): _,t = DetDataset(src, on_error='skip')[3]
    assert t.image_id==5

def test_seeded_numbers_depend_on_the_key_and_leave_nothing_behind():
    def draw(): return torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    untouched = draw()
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    with seeded(0, 1, 7): a = draw()
    assert draw()==untouched
    with seeded(0, 1, 7): assert draw()==a
    with seeded(0, 2, 7): assert all(x!=y for x,y in zip(draw(), a))
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1): draw(); raise KeyError
    assert torch.equal(torch.get_rng_state(), state) # after an error as well

def test_an_order_depends_on_seed_and_epoch():
    wide = [i%3>0 for i in range(32)]
    order = epoch_order(32, 0, 0, wide, bs=4)
    assert sorted(order)==list(range(32))
    assert order==epoch_order(32, 0, 0, wide, bs=4)
    assert order!=epoch_order(32, 0, 1, wide, bs=4)

def test_passes_leave_the_global_generator_alone(eighty):
    ds = DetDataset(read_coco(eighty, 'train'), tfm=jitter)
    def one_pass(start=0, num_workers=0):
        dl = DetDL(ds, bs=16, shuffle=True, num_workers=num_workers)
        dl.set_epoch(3, start)
        return list(dl)
    state = torch.get_rng_state()
    whole,workers,rest = one_pass(), one_pass(num_workers=2), one_pass(start=48)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(whole, workers) and equal(whole[3:], rest)
    assert (len(whole), len(workers), len(rest))==(5, 5, 2)

def test_one_call(eighty):
    dls = det_dls(eighty, bs=8, num_workers=0, device='cpu')
    x,s,t = dls.one_batch()
    assert (x.dtype, x.shape, s.shape)==(torch.uint8, (8,3,128,128), (8,2))
    assert (dls.vocab, dls.n_inp, dls.valid_ds.cat_ids)==(list(SHAPES), 2, [1,2,3,4])
    assert det_dls(eighty, bs=8, size=96, num_workers=0).one_batch()[0].shape==(8,3,96,96)

def test_a_learner_predicts_on_new_images_after_export(eighty, tmp_path):
    from fastai.learner import Learner, load_learner
    dls = det_dls(eighty, bs=8, num_workers=0, device='cpu')
    def loss(pred, target): return (pred - (Target(target).labels>=0).sum(1)).pow(2).mean()
    learn = Learner(dls, Mean(), loss, path=tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-2)
    learn.export('mean.pkl')
    loaded = load_learner(tmp_path/'mean.pkl')
    assert len(loaded.dls.train_ds)==0 and loaded.dls.vocab==dls.vocab
    new = [eighty/'images/valid_00000.jpg', Image.new('RGB', (60,40)), np.zeros((20,30,3), np.uint8)]
    dl = loaded.dls.test_dl(new, num_workers=0)
    x,s,t = dl.one_batch()
    assert s.tolist()==[[128,128], [40,60], [20,30]]
    assert (t.labels>=0).sum()==0
    preds,targs = loaded.get_preds(dl=dl)
    assert torch.equal(Target(targs).image_id, torch.arange(3)) and preds.shape==(3,)

class Mean(torch.nn.Module):
    "A stand-in for a detector: one number, added to the mean of an image"
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, images, sizes): return images.float().mean((1,2,3))/255 + self.w

def test_a_vocabulary_orders_the_labels(tmp_path):
    "VOC sorts its names; a vocabulary that is given comes first"
    for o in ('Annotations','ImageSets','JPEGImages'): (tmp_path/o).mkdir()
    Image.new('RGB', (128,128)).save(tmp_path/'JPEGImages/a.jpg')
    (tmp_path/'ImageSets/train.txt').write_text('a')
    box = '<bndbox><xmin>{}</xmin><ymin>20</ymin><xmax>96</xmax><ymax>60</ymax></bndbox>'
    objects = ''.join(f'<object><name>{k}</name>{box.format(x)}</object>' for k,x in (('dog',10), ('cat',64)))
    (tmp_path/'Annotations/a.xml').write_text(f'<annotation>{objects}</annotation>')
    voc = det_dls(tmp_path, splits=('train','train'), vocab=['dog','cat'], num_workers=0)
    assert voc.one_batch()[2].labels.tolist()==[[0,1]]

def test_the_door_has_every_name_of_old():
    "`from deqdet.data import ...` works for all that stood in one module"
    import deqdet.data as data
    names = '''Target collate uncollate DataError load_image SHAPES synth_coco show_sample Problem Source picture_size
        read_coco read_voc read_yolo LAYOUTS find_layout clean DetDataset resize_long seeded epoch_order DetDL read_data
        det_dls Report verify_data'''.split()
    assert set(names) <= set(data.__all__) and all(hasattr(data, o) for o in names)

# ---- workers

ANEW = """
import multiprocessing, sys
from deqdet.data import det_dls
from deqdet.training.processes import shard

def ids(dl): return [t.image_id.tolist() for _,_,t in dl]

if __name__=='__main__':
    multiprocessing.set_start_method('spawn')
    here,there = (det_dls(sys.argv[1], bs=2, num_workers=n, device='cpu').train for n in (0, 1))
    assert ids(here)==ids(there) and ids(shard(here, 1, 2))==ids(shard(there, 1, 2))
"""

def test_workers_that_begin_anew(shapes, tmp_path):
    "The default on Windows, and on Linux from Python 3.14 on: a loader is pickled, and its generator could not be"
    script = tmp_path/'anew.py'
    script.write_text(ANEW)
    done = subprocess.run([sys.executable, '-W', 'ignore', script, shapes], capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-2000:]

@pytest.mark.skipif(sys.platform!='linux', reason='elsewhere the default is that of Python')
def test_workers_begin_as_copies(shapes, monkeypatch):
    dl = det_dls(shapes, num_workers=1, device='cpu').train
    for chosen,want in ((None, 'fork'), ('spawn', 'spawn')):
        monkeypatch.setattr('deqdet.data.get_start_method', lambda allow_none: chosen)
        assert dl.fake_l.multiprocessing_context.get_start_method()==want

# ---- images to predict on

def test_no_other_image_replaces_one_to_predict_on(shapes, tmp_path):
    "With `on_error='skip'`, a damaged file got the detections of the next one"
    dls = det_dls(shapes, num_workers=0, device='cpu', on_error='skip')
    bad = tmp_path/'bad.jpg'
    bad.write_bytes(b'not an image')
    good = next((shapes/'images').glob('*.jpg'))
    with pytest.raises(DataError, match='bad.jpg'): list(dls.test_dl([bad, good]))
