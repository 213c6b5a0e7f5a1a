"Cleaning and reporting: a set that is spoiled in nine ways, and ids"
import json, math, shutil
from pathlib import Path
import pytest
from deqdet.data import DataError, det_dls, synth_coco
from deqdet.sets.check import Report, clean, verify_data
from deqdet.sets.formats import Source

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('check')/'shapes', n_train=80, n_valid=20, seed=1)

@pytest.fixture
def spoiled(shapes, tmp_path):
    "Nine faults, one of each kind"
    path = Path(shutil.copytree(shapes, tmp_path/'spoiled'))
    f = path/'annotations/instances_train.json'
    coco = json.loads(f.read_text())
    a = coco['annotations']
    a[0]['bbox'][2] = 0
    a[1]['bbox'][0] = math.nan
    a[2]['bbox'][0] += 500
    a[3]['category_id'] = 77
    a[4]['image_id'] = 999
    a[6]['id'] = a[5]['id']
    coco['images'][9]['width'] = 256
    f.write_text(json.dumps(coco))
    image = path/'images/train_00011.jpg'
    image.write_bytes(image.read_bytes()[:2000])
    (path/'images/train_00010.jpg').unlink()
    return path

def test_every_fault_is_reported_once(spoiled, shapes):
    assert verify_data(shapes).ok
    kinds = ['empty box', 'bad box', 'box outside', 'unknown category', 'unknown image', 'duplicate id', 'wrong size',
             'missing image', 'truncated image']
    assert verify_data(spoiled).counts==dict.fromkeys(kinds, 1)

@pytest.mark.parametrize('unusable', [False, True])
def test_a_split_without_objects_is_a_problem(shapes, tmp_path, unusable):
    path = Path(shutil.copytree(shapes, tmp_path/'none'))
    f = path/'annotations/instances_valid.json'
    coco = json.loads(f.read_text())
    coco['annotations'] = [dict(a, category_id=77) for a in coco['annotations']] if unusable else []
    f.write_text(json.dumps(coco))
    last = verify_data(path).problems[-1]
    assert last==('no objects', str(f), 'annotations', "not one that can be used in the 20 images of 'valid'")

def test_loading_stops_at_an_unreadable_image_or_goes_on(spoiled):
    def seen(on_error):
        dls = det_dls(spoiled, bs=16, num_workers=0, on_error=on_error, device='cpu')
        return sum(len(b[0]) for b in dls.train)
    with pytest.warns(UserWarning):
        with pytest.raises(DataError, match='train_000'): seen('raise')
        assert seen('skip')==80

@pytest.mark.parametrize('given,want', [([3,5,9], [3,5,9]), ([0,5,9], [1,2,3]), ([5,5,9], [1,2,3]),
                                        ([None,5,9], [1,2,3]),
                                        ([None,None,None], [1,2,3]), ([0.0,5,9], [1,2,3]), ([], [])])
def test_ids_are_renumbered_when_they_fail_to_tell_objects_apart(given, want):
    "Repeated, missing, or 0: pycocotools marks an unmatched detection with 0"
    anns = [dict(id=k, image_id=1, category_id=1, bbox=[0,0,5,5]) for k in given]
    coco = dict(images=[dict(id=1, file_name='a.jpg')], categories=[dict(id=1, name='a')], annotations=anns)
    usable,problems = clean(Source(coco))
    assert [a['id'] for a in usable['annotations']]==want
    known = [k for k in given if k is not None]
    assert len(problems)==len(known)-len(set(known))

def test_many_annotations_are_cleaned_in_little_time():
    "COCO has 860000 of them: the search for repeated ids may not look through all for each"
    import gc, time
    def seconds(n):
        anns = [dict(id=i+1, image_id=1, category_id=1, bbox=[0,0,5,5]) for i in range(n)]
        coco = dict(images=[dict(id=1, file_name='a.jpg')], categories=[dict(id=1, name='a')], annotations=anns)
        start = time.process_time()
        clean(Source(coco))
        return time.process_time()-start
    gc.disable() # its passes take a time that grows with all there is in the process
    try: few,many = min(seconds(2000) for _ in range(3)), min(seconds(40000) for _ in range(3))
    finally: gc.enable()
    assert many < 120*few # a linear search takes 20 times as long, a quadratic one 400 times

@pytest.mark.parametrize('n,text', [(0, 'no problems'), (1, '1 problem'), (2, '2 problems')])
def test_a_report_counts_in_english(n, text):
    from deqdet.sets.formats import Problem
    report = Report(Path('set'), 'coco', dict(train='nothing'), [Problem('bad box', 'set/a.json', 'x', 'y')]*n)
    assert report.ok==(n==0) and text in repr(report).split('\n')
    assert f'- {text}' in report._repr_markdown_().split('\n')


def test_a_set_without_images_is_no_good_set(shapes, tmp_path):
    path = Path(shutil.copytree(shapes, tmp_path/'empty'))
    for f in (path/'annotations').glob('*.json'):
        f.write_text(json.dumps(dict(json.loads(f.read_text()), images=[], annotations=[])))
    assert verify_data(path).counts == {'no images': 2}
