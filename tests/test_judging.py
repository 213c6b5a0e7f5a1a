"F1 curves, kinds of error and calibration, against a slow count and by hand"
import numpy as np, pandas as pd, pytest, torch
from deqdet.scores.ap import coco_ap
from deqdet.scores.judging import (KINDS, best_points, calibration, calibration_error, error_kinds, f1_curves, find_faults,
                                   plot_calibration, plot_f1)
from deqdet.scores.matches import best_thresholds

CATS = [dict(id=3, name='a'), dict(id=5, name='b'), dict(id=9, name='never')]


def made(seed, n=12):
    "Images with crowds, near misses, confusions, doubles and inventions"
    rng = np.random.default_rng(seed)
    anns, results = [], []
    for im in range(n):
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 80, 2), *rng.uniform(10, 40, 2)]
            k = int(rng.choice([3, 5]))
            anns.append(dict(id=len(anns)+1, image_id=im, category_id=k, bbox=box, area=box[2]*box[3], iscrowd=int(rng.random() < .1)))
            for _ in range(rng.integers(0, 3)):
                near = (np.array(box) + rng.normal(size=4)*rng.choice([1, 6])).clip(1)
                results.append(dict(image_id=im, category_id=int(k if rng.random() < .7 else 8-k), bbox=near.tolist(), score=round(rng.random(), 1)))
        results.append(dict(image_id=im, category_id=int(rng.choice([3, 5, 9])), bbox=[200., 200, 9, 9], score=round(rng.random(), 1)))
    return results, dict(images=[dict(id=i, width=300, height=300) for i in range(n)], annotations=anns, categories=CATS)


@pytest.mark.parametrize('seed', range(4))
def test_curves_are_what_thresholds_give(seed):
    "At each threshold: precision, recall and F1 of what reaches it, matched anew"
    results, truth = made(seed)
    curves = f1_curves(results, truth)
    assert list(curves) == ['a', 'b', 'never'] and not curves['never'].f1.any()
    for name, c in (('a', 3), ('b', 5)):
        n = sum(a['category_id'] == c and not a['iscrowd'] for a in truth['annotations'])
        t = curves[name]
        assert (t.score.diff().dropna() < 0).all()
        for row in t.itertuples():
            only = [r for r in results if r['category_id'] == c and r['score'] >= row.score]
            other = f1_curves(only, truth)[name].iloc[-1]
            assert (other.precision, other.recall) == pytest.approx((row.precision, row.recall))
            assert row.f1 == pytest.approx(2*row.precision*row.recall/max(row.precision + row.recall, 1e-9)) and row.recall*n == pytest.approx(round(row.recall*n))
    best = best_points(curves)
    assert best.score.iloc[:2].tolist() == pytest.approx(best_thresholds(results, truth)[:2]) and best.loc['never'].isna().all()
    assert len(plot_f1(curves).lines) == 4


@pytest.mark.parametrize('seed', range(4))
def test_every_detection_is_right_or_one_error(seed):
    results, truth = made(seed)
    faults = find_faults(results, truth)
    ids = [f.det['id'] for f in faults if f.det]
    assert len(ids) == len(set(ids)) and {f.kind for f in faults} <= set(KINDS)
    right = [i for i in range(1, len(results)+1) if i not in ids]
    missed = {f.obj['id'] for f in faults if f.kind == 'missed'}
    about = {f.obj['id'] for f in faults if f.free}
    single = {i for i, a in enumerate(truth['annotations'], 1) if not a['iscrowd']}
    assert missed <= single and not missed & about
    # matched objects, those with a free error, and missed ones: all objects, each once
    crowds = sum(coco_ap([results[i-1]], dict(truth, annotations=[a for a in truth['annotations'] if not a['iscrowd']])).eval['recall'].max() <= 0 for i in right)
    assert len(single) == len(right) - crowds + len(missed) + len(about)


@pytest.mark.parametrize('seed', range(4))
def test_putting_right_never_costs(seed):
    results, truth = made(seed)
    t = error_kinds(results, truth)
    assert list(t.index) == list(KINDS) and (t.dAP50 >= -1e-9).all()
    faults = find_faults(results, truth)
    assert t['count'].to_dict() == {k: sum(f.kind == k for f in faults) for k in KINDS}
    for kind in KINDS:
        if not t['count'][kind]: assert t.dAP50[kind] == 0


def one(det, *objs):
    "The kinds of error of one detection"
    truth = dict(images=[dict(id=0, width=99, height=99)], categories=CATS,
                 annotations=[dict(id=i, image_id=0, category_id=k, bbox=b, iscrowd=c) for i, (k, b, c) in enumerate(objs, 1)])
    return [f.kind for f in find_faults([dict(image_id=0, category_id=3, bbox=det, score=.5)], truth)]


BOX = [0., 0, 10, 10]

@pytest.mark.parametrize('det, objs, kinds', [
    (BOX, [(3, BOX, 0)], []), (BOX, [(5, BOX, 0)], ['classification']), ([4, 0, 10, 10], [(3, BOX, 0)], ['localisation']),
    ([4, 0, 10, 10], [(5, BOX, 0)], ['both', 'missed']), ([50, 0, 10, 10], [(3, BOX, 0)], ['background', 'missed']), (BOX, [], ['background']),
    (BOX, [(3, [0, 0, 90, 90], 1)], []), (BOX, [(5, [0, 0, 90, 90], 1)], ['background']),
    ([4, 0, 10, 10], [(3, BOX, 0), (5, [4, 0, 10, 10], 0)], ['localisation', 'missed'])])
def test_kinds_by_hand(det, objs, kinds): assert one(det, *objs) == kinds


def test_a_second_detection_is_a_duplicate():
    truth = dict(images=[dict(id=0, width=99, height=99)], categories=CATS, annotations=[dict(id=1, image_id=0, category_id=3, bbox=BOX)])
    two = [dict(image_id=0, category_id=3, bbox=BOX, score=s) for s in (.2, .9)]
    faults = find_faults(two, truth)
    assert [(f.kind, f.det['score'], f.free) for f in faults] == [('duplicate', .2, False)]
    assert find_faults(two, truth, score=.5) == []


def test_calibration():
    results, truth = made(0, 60)
    t = calibration(results, truth, bins=5)
    assert t['count'].sum() <= len(results) and t.precision.between(0, 1).all() and len(t) == 5
    assert calibration_error(t) == pytest.approx(np.average((t.precision - t.score).abs(), weights=t['count']))
    perfect = [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=1.) for a in truth['annotations']]
    assert calibration_error(calibration(perfect, truth)) == 0
    plot_calibration(t)


def test_nothing_at_all():
    truth = dict(images=[dict(id=0, width=9, height=9)], annotations=[], categories=CATS)
    assert find_faults([], truth) == [] and calibration([], truth).empty and calibration_error(calibration([], truth)) == 0
    assert best_points(f1_curves([], truth)).isna().all(axis=None) and not plot_f1(f1_curves([], truth)).lines
    preds = [dict(image_id=0, boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))]
    assert error_kinds(preds, truth)['count'].sum() == 0
