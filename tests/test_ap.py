"Average precision on one small image and its edges: every form of input, what is refused, what is dropped, crowds"
import copy, gc, io, json, math
from contextlib import redirect_stdout
import numpy as np, pytest, torch
from pycocotools.coco import COCO
from deqdet.scores.ap import (Result, _detections, _objects, _prepared, _record, _results, _summary, _truth, coco_ap,
                              to_results, write_results)

OBJECTS = torch.tensor([[10., 40, 40, 80], [55, 30, 85, 60], [95, 55, 115, 85]])
GUESSES = torch.tensor([[10.5, 41, 40, 80], [56, 31, 85, 62], [14, 44, 42, 84], [92, 50, 114, 80], [60, 2, 80, 18]])
SCORES = torch.tensor([.95, .8, .6, .4, .3])
CAT_IDS = [1, 3]
NAMES = {1: 'cat', 3: 'dog'}


def as_coco(boxes, first=1):
    "A COCO ground-truth dict of one image with cats, whose annotations are numbered from `first`"
    anns = [dict(id=i, image_id=1, category_id=1, bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1)*(y2 - y1), iscrowd=0)
            for i, (x1, y1, x2, y2) in enumerate(boxes.tolist(), first)]
    cats = [dict(id=i, name=name) for i, name in NAMES.items()]
    return dict(images=[dict(id=1, file_name='a.jpg', width=125, height=95)], annotations=anns, categories=cats)


@pytest.fixture
def truth(): return as_coco(OBJECTS)
@pytest.fixture
def pred(): return dict(image_id=1, boxes=GUESSES, scores=SCORES, labels=torch.zeros(5).long())
@pytest.fixture
def results(pred): return to_results([pred], CAT_IDS)


def same(a, b): np.testing.assert_array_equal(list(a.values()), list(b.values()))
def indexed(truth):
    gt = COCO()
    gt.dataset = truth
    return gt


# ---- predictions as results

def test_lengths_that_differ_name_the_image(pred):
    with pytest.raises(ValueError, match='image 1: 5 boxes, 4 scores'): _record(pred | dict(scores=SCORES[:4]), CAT_IDS)

@pytest.mark.parametrize('label,span', [(-1, '-1..0'), (2, '0..2')])
def test_a_label_without_a_category_names_the_image(pred, label, span):
    labels = torch.tensor([label, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=f'image 1: labels {span}'): _record(pred | dict(labels=labels), CAT_IDS)

def test_labels_become_category_ids(pred):
    found = to_results([pred | dict(labels=torch.ones(5).long())], CAT_IDS)
    assert [r['category_id'] for r in found] == [3]*5

def test_an_image_without_detections_has_no_results():
    assert to_results([dict(image_id=1, boxes=torch.zeros(0, 4), scores=[], labels=[])], CAT_IDS) == []

def test_a_written_file_is_all_there_is(pred, results, tmp_path):
    file = write_results([pred], tmp_path/'results.json', CAT_IDS)
    assert _results(file, None) == results
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']

def test_what_is_not_a_list_is_refused():
    with pytest.raises(ValueError, match='expected a list'): _results({}, None)

def test_labels_need_category_ids(pred, tmp_path):
    with pytest.raises(ValueError, match='need cat_ids'): write_results([pred], tmp_path/'a.json')
    assert not list(tmp_path.iterdir())


# ---- truth and detections, grouped

def test_a_truth_is_found_in_every_form(truth):
    assert _truth(truth) is truth
    assert _truth(indexed(truth)) is truth

def test_a_truth_without_its_fields_is_refused():
    with pytest.raises(ValueError, match='without annotations, categories'): _truth({'images': []})

def test_annotations_are_numbered_from_one():
    assert [o['id'] for o in _objects(as_coco(OBJECTS[:2], first=0), NAMES, {1})[1, 1]] == [1, 2]

def test_detections_are_grouped_and_counted(results):
    before = copy.deepcopy(results)
    dts, n = _detections(results, NAMES, {1})
    assert (len(dts[1, 1]), n) == (5, 5)
    assert results == before and sorted(results[0]) == ['bbox', 'category_id', 'image_id', 'score']

def test_a_detection_for_another_image_is_refused(results):
    with pytest.raises(ValueError, match='result 0 is for image 7'): _detections([results[0] | dict(image_id=7)], NAMES, {1})

def test_a_result_without_its_fields_is_refused():
    with pytest.raises(ValueError, match="result 0 has no 'image_id'"): _detections([{}], NAMES, {1})

def test_what_is_not_finite_is_dropped_with_a_warning(results):
    with pytest.warns(UserWarning, match='not finite'): dts, n = _detections([results[0] | dict(score=math.nan)], NAMES, {1})
    assert n == 0 and not dts

def test_an_unknown_category_is_ignored_with_a_warning(results):
    with pytest.warns(UserWarning, match=r'ignored: \[0\]'): dts, n = _detections([results[0] | dict(category_id=0)], NAMES, {1})
    assert n == 0 and not dts

def test_predictions_and_truth_together(pred, truth):
    names, ids, gts, dts, n = _prepared([pred], truth)
    assert (names, ids, n) == (NAMES, {1}, 5)
    assert [len(gts[1, 1]), len(dts[1, 1])] == [3, 5]

def test_images_that_the_truth_lacks_are_refused(pred, truth):
    with pytest.raises(ValueError, match=r'images \[8\] are not in the truth'): _prepared([pred], truth, images=[1, 8])

@pytest.mark.parametrize('on', [True, False])
def test_the_garbage_collector_is_left_as_it_was(pred, truth, on):
    was = gc.isenabled()
    gc.enable() if on else gc.disable()
    try:
        _prepared([pred], truth)
        assert gc.isenabled() == on
    finally: gc.enable() if was else gc.disable()


# ---- the numbers

def test_the_mean_leaves_out_what_is_undefined():
    p = np.full((10, 101, 2, 4, 3), .6)
    r = np.full((10, 2, 4, 3), .7)
    p[:, :, 1] = -1
    r[:, 1] = -1
    assert p.mean() == pytest.approx(-.2)
    assert _summary(p, r, (1, 10, 100))['AP'] == pytest.approx(.6)
    assert math.isnan(_summary(p[:, :, 1:], r[:, 1:], (1, 10, 100))['AP'])

def test_a_result_answers_by_name_and_is_json():
    r = Result(dict(AP=.5, AP50=.75, AR10=.6), counts=dict(images=2))
    assert (r.AP, r['AP50'], json.loads(json.dumps(r))['AR10']) == (.5, .75, .6)
    with pytest.raises(AttributeError): r.AP99

@pytest.mark.parametrize('max_dets,last', [(100, '100'), (300, '300')])
def test_a_result_prints_what_each_number_counts(pred, truth, max_dets, last):
    lines = repr(coco_ap([pred], truth, max_dets=max_dets)).splitlines()
    rows = {l.split()[0]: l.split()[2:] for l in lines[2:]}
    assert lines[0] == '1 images, 3 objects, 5 detections' and len(rows) == 12
    assert rows['AP50'] == ['0.50', 'all', last] and rows['AP75'] == ['0.75', 'all', last]
    assert rows['APs'] == ['0.50:0.95', 'small', last] and rows['ARl'] == ['0.50:0.95', 'large', last]
    assert rows['AR10'] == ['0.50:0.95', 'all', '10']

def test_every_form_of_input_gives_the_same(pred, truth, results, tmp_path):
    ap = coco_ap([pred], truth)
    file = write_results([pred], tmp_path/'results.json', CAT_IDS)
    (tmp_path/'truth.json').write_text(json.dumps(truth))
    same(ap, coco_ap(file, tmp_path/'truth.json'))
    same(ap, coco_ap(results, indexed(truth)))
    same(ap, coco_ap([{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in pred.items()}], truth))

def test_nothing_found_is_zero_and_nothing_to_find_undefined(pred, truth):
    assert coco_ap([], truth).AP == 0
    assert math.isnan(coco_ap([pred], dict(truth, annotations=[])).AP)
    assert math.isnan(coco_ap([], dict(images=[], annotations=[], categories=[])).AP)

def test_annotations_counted_from_zero_lose_nothing():
    truth = as_coco(OBJECTS[:2], first=0)
    perfect = [dict(image_id=1, category_id=1, bbox=a['bbox'], score=.9) for a in truth['annotations']]
    assert coco_ap(perfect, truth).AP == 1

def test_an_unknown_argument_is_an_error(pred, truth):
    with pytest.raises(TypeError): coco_ap([pred], truth, max_det=3)

def test_a_detection_in_a_crowd_is_neither_right_nor_wrong(pred, truth):
    crowd, without = copy.deepcopy(truth), copy.deepcopy(truth)
    crowd['annotations'][2]['iscrowd'] = 1
    del without['annotations'][2]
    sure = [pred | dict(scores=torch.tensor([.95, .8, .6, .99, .3]))]
    assert coco_ap(sure, truth).AP50 == coco_ap(sure, crowd).AP50 == 1
    assert coco_ap(sure, without).AP50 < .8
    assert coco_ap(sure, crowd).counts['objects'] == 2
    assert coco_ap(sure, crowd).per_class.objects.sum() == 2

def test_with_one_detection_only_the_surest_counts(pred, truth):
    assert coco_ap([pred], truth, max_dets=(1, 1, 1)).AP50 == pytest.approx(34/101)

def test_the_number_of_detections_names_the_recall(pred, truth):
    assert list(coco_ap([pred], truth, max_dets=300))[6:9] == ['AR1', 'AR10', 'AR300']


@pytest.mark.parametrize('most', [1, 2, 5, 10])
def test_a_small_limit_is_the_limit_of_ap(most):
    "Not the ten detections of AR10"
    boxes = torch.tensor([[20.*i, 0, 20.*i + 10, 10] for i in range(12)])
    found = dict(image_id=1, boxes=boxes, scores=torch.arange(12).flip(0)/12., labels=torch.zeros(12).long())
    first = dict(found, **{k: found[k][:most] for k in ('boxes', 'scores', 'labels')})
    few, plain = coco_ap([found], as_coco(boxes), max_dets=most), coco_ap([first], as_coco(boxes))
    assert few.AP == plain.AP < 1 and few.ARs == few[f'AR{most}'] == plain.AR100 == pytest.approx(most/12)
    assert few.AR1 == pytest.approx(1/12) and few.eval['max_dets'] == sorted({1, most})
    row = few.per_class.loc['cat']
    for k in few: assert row[k] == pytest.approx(few[k], nan_ok=True)


def test_fields_without_a_value_are_fields_left_out(truth, results):
    "As some tools write: `iscrowd` and `area` null"
    plain = coco_ap(results, truth)
    for a in truth['annotations']: a.update(iscrowd=None, area=None)
    same(coco_ap(results, truth), plain)


def test_classes_of_one_name_have_a_row_each(truth, results):
    truth['categories'][1]['name'] = 'cat'
    table = coco_ap(results, truth).per_class
    assert list(table.index) == ['cat', 'cat'] and table.objects.tolist() == [3, 0]
