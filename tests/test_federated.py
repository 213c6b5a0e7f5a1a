"LVIS's AP against a plain implementation and against the package `lvis`, on random cases; 1203 classes from file to AP"
import copy, json, logging, math
from collections import defaultdict
import numpy as np, pytest, torch
from deqdet.scores.ap import coco_ap
from deqdet.scores.federated import lvis_ap

AREAS = dict(all=(0, 1e10), s=(0, 32**2), m=(32**2, 96**2), l=(96**2, 1e10))
OVERLAPS = np.linspace(.5, .95, 10)
RECALLS = np.linspace(0, 1, 101)


def random_case(seed, n=12, k=9):
    "A truth of `n` images and `k` classes, and results near its objects and elsewhere"
    rng = np.random.default_rng(seed)
    images, anns, results = [], [], []
    for i in rng.permutation(n) + 1:
        classes = rng.choice(k, 6, replace=False) + 1
        positive, negative = classes[:rng.integers(1, 5)], classes[4:]
        partly = [int(c) for c in positive if rng.random() < .4]
        images.append(dict(id=int(i), file_name=f'{i}.jpg', width=300, height=300, not_exhaustive_category_ids=partly,
                           neg_category_ids=[int(c) for c in negative]))
        for c in rng.choice(positive, rng.integers(1, 9)):
            x, y = rng.uniform(0, 150, 2)
            w, h = rng.choice([12., 50., 120.], 2)*rng.uniform(.8, 1.2, 2)
            anns.append(dict(id=len(anns) + 1, image_id=int(i), category_id=int(c), bbox=[x, y, w, h], area=w*h*rng.uniform(.5, 1),
                             iscrowd=0, segmentation=[]))
            for _ in range(rng.integers(0, 3)):
                b = np.array([x, y, w, h])*rng.normal(1, .06, 4)
                results.append(dict(image_id=int(i), category_id=int(c), bbox=b.tolist(), score=round(rng.random(), 1)))
        for c in rng.integers(1, k + 1, 6):
            b = [*rng.uniform(0, 150, 2), *rng.uniform(10, 120, 2)]
            results.append(dict(image_id=int(i), category_id=int(c), bbox=[float(o) for o in b], score=round(rng.random(), 1)))
    kinds = rng.choice(list('rcf'), k)
    cats = [dict(id=i, name=f'class {i}', frequency=str(f)) for i, f in enumerate(kinds, 1)]
    return dict(images=images, annotations=anns, categories=cats), results


# ---- a plain implementation, as the rules are stated

def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inner = max(w, 0)*max(h, 0)
    return inner/(a[2]*a[3] + b[2]*b[3] - inner)


def judged(objects, dets, overlap, area, partly):
    "[(score, is right)] of the detections of an image that count, and the number of objects"
    outside = lambda x: not area[0] <= x <= area[1]
    free = sorted(objects, key=lambda o: outside(o['area']))
    n, out = sum(not outside(o['area']) for o in objects), []
    for d in sorted(dets, key=lambda d: -d['score']):
        best, most = None, overlap
        for o in free:
            if best is not None and not outside(best['area']) and outside(o['area']): break
            if iou(d['bbox'], o['bbox']) >= most: best, most = o, iou(d['bbox'], o['bbox'])
        if best is not None:
            free.remove(best)
            if not outside(best['area']): out.append((d['score'], True))
        elif not partly and not outside(d['bbox'][2]*d['bbox'][3]): out.append((d['score'], False))
    return out, n


def curve(pairs, n):
    "Mean precision at 101 recalls, and recall"
    right = np.cumsum([r for _, r in sorted(pairs, key=lambda p: -p[0])])
    if not len(right): return 0., 0.
    precision = right/(np.arange(len(right)) + 1 + np.spacing(1))
    recall = right/n
    at = [precision[recall >= r].max() if (recall >= r).any() else 0. for r in RECALLS]
    return np.mean(at), recall[-1]


def plain(truth, results, max_dets):
    "LVIS's thirteen numbers"
    objects, dets = defaultdict(list), defaultdict(list)
    for a in truth['annotations']: objects[a['image_id'], a['category_id']].append(a)
    for o in truth['images']:
        mine = sorted((r for r in results if r['image_id']==o['id']), key=lambda r: -r['score'])
        for r in mine[:max_dets]:
            key = o['id'], r['category_id']
            if key in objects or r['category_id'] in o['neg_category_ids']: dets[key].append(r)
    ap, ar = {}, {}
    for c in truth['categories']:
        for name, area in AREAS.items():
            for t in OVERLAPS:
                pairs, total = [], 0
                for o in sorted(truth['images'], key=lambda o: o['id']):
                    key = o['id'], c['id']
                    some, n = judged(objects[key], dets[key], t, area, c['id'] in o['not_exhaustive_category_ids'])
                    pairs += some
                    total += n
                if total: ap[c['id'], name, t], ar[c['id'], name, t] = curve(pairs, total)
    def mean(values): return np.mean(values) if len(values) else math.nan
    def some(table, area='all', overlap=None, kind=None):
        kinds = {c['id']: c['frequency'] for c in truth['categories']}
        return mean([v for (c, a, t), v in table.items() if a==area and overlap in (None, t) and kind in (None, kinds[c])])
    out = dict(AP=some(ap), AP50=some(ap, overlap=OVERLAPS[0]), AP75=some(ap, overlap=OVERLAPS[5]))
    out |= {f'AP{a}': some(ap, a) for a in 'sml'} | {f'AR{max_dets}': some(ar)} | {f'AR{a}': some(ar, a) for a in 'sml'}
    return out | {f'AP{k}': some(ap, kind=k) for k in 'rcf'}


@pytest.mark.parametrize('seed,max_dets', [(0, 300), (1, 8), (2, 300), (3, 15)])
def test_the_numbers_are_those_of_a_plain_implementation(seed, max_dets):
    truth, results = random_case(seed)
    ours, theirs = lvis_ap(results, truth, max_dets=max_dets), plain(truth, results, max_dets)
    assert ours.keys()==theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-9)
    assert .05 < ours.AP < .95


@pytest.mark.parametrize('seed,max_dets', [(0, 300), (4, 10), (5, 300)])
def test_the_numbers_are_those_of_the_package_lvis(seed, max_dets, monkeypatch, tmp_path):
    lvis = pytest.importorskip('lvis', reason='needs: pip install lvis')
    monkeypatch.setattr(np, 'float', float, raising=False) # it was written for an older NumPy
    truth, results = random_case(seed)
    file = tmp_path/'truth.json'
    file.write_text(json.dumps(truth))
    gt = lvis.LVIS(str(file))
    e = lvis.LVISEval(gt, lvis.LVISResults(gt, copy.deepcopy(results), max_dets=max_dets), 'bbox')
    e.params.max_dets = max_dets
    e.run()
    ours, names = lvis_ap(results, file, max_dets=max_dets), {'AR': f'AR@{max_dets}'}
    for k in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'APr', 'APc', 'APf'): assert abs(ours[k] - e.results[k]) < 1e-9
    for a in ('', 's', 'm', 'l'): assert abs(ours[f'AR{a or max_dets}'] - e.results[f'AR{a}@{max_dets}']) < 1e-9


def test_where_all_is_checked_ap_is_that_of_coco():
    truth, results = random_case(6)
    for o in truth['images']: o |= dict(neg_category_ids=list(range(1, 10)), not_exhaustive_category_ids=[])
    ours, coco = lvis_ap(results, truth), coco_ap(results, truth, max_dets=300)
    for k in ('AP', 'AP50', 'APs', 'APl', 'ARm'): assert ours[k]==coco[k]


def test_the_order_of_results_and_a_subset_of_images():
    truth, results = random_case(7)
    for i, r in enumerate(results): r['score'] = (i*37 % 101)/101 + i*1e-6 # all different
    a, b = lvis_ap(results, truth), lvis_ap(results[::-1], truth)
    assert list(a.values())==list(b.values())
    part = [1, 2, 3]
    small = dict(truth, images=[o for o in truth['images'] if o['id'] in part], annotations=[a for a in truth['annotations'] if a['image_id'] in part])
    np.testing.assert_array_equal([*lvis_ap(results, truth, images=part).values()],
                                  [*lvis_ap([r for r in results if r['image_id'] in part], small).values()])


def test_no_detections_give_zero_and_no_objects_give_nan():
    truth, results = random_case(8)
    assert lvis_ap([], truth).AP==0
    assert math.isnan(lvis_ap(results, dict(truth, annotations=[])).AP)


def test_1203_classes_from_file_to_ap(tmp_path):
    "Rare classes come more often, one update teaches, predictions are judged"
    from deqdet.data import det_dls, synth_coco
    from deqdet.evaluate import predict_dl
    from deqdet.loss import SetLoss
    from deqdet.zoo import create_detector
    path = synth_coco(tmp_path/'set', n_train=12, n_valid=4, size=64, seed=3)
    for split in ('train', 'valid'):
        file = path/f'annotations/instances_{split}.json'
        coco = json.loads(file.read_text())
        coco['categories'] = [dict(id=i, name=f'class {i}', frequency='rcf'[i % 3]) for i in range(1, 1204)]
        for i, a in enumerate(coco['annotations']): a['category_id'] = 1203 if i==0 else 1 + (a['category_id']*401) % 1203
        for o in coco['images']: o |= dict(neg_category_ids=[5, 6], not_exhaustive_category_ids=[])
        file.write_text(json.dumps(coco))
    dls = det_dls(path, bs=4, num_workers=0, rare=.5, device='cpu')
    assert len(dls.vocab)==1203 and len(dls.train.chosen) > 12
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=list(dls.vocab))
    images, sizes, target = dls.train.one_batch()
    loss = SetLoss()(model.train()(images, sizes), target)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    preds = predict_dl(model, dls.valid, max_dets=300)
    result = lvis_ap(preds, path/'annotations/instances_valid.json', dls.valid.dataset.cat_ids)
    assert len(result.per_class)==1203 and 0 <= result.AP <= 1

def test_a_truth_without_the_lists_names_the_image():
    truth,results = random_case(0)
    bare = dict(truth, images=[{k: v for k,v in o.items() if k != 'neg_category_ids'} for o in truth['images']])
    with pytest.raises(ValueError, match=f"image {bare['images'][0]['id']} has no 'neg_category_ids'"): lvis_ap(results, bare)
