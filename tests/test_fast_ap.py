"The optional faster program of COCO's numbers: every array equal to pycocotools, bit by bit"
import json
import numpy as np, pytest
from deqdet.scores.ap import coco_ap

hotcoco = pytest.importorskip('hotcoco', reason='hotcoco is not installed (the extra "fast")')


def same(results, truth, **kwargs):
    slow, fast = (coco_ap(results, truth, fast=o, **kwargs) for o in (False, True))
    for k in ('precision', 'recall', 'scores', 'ious', 'recalls'): np.testing.assert_array_equal(slow.eval[k], fast.eval[k], strict=True)
    assert (slow.eval['max_dets'], slow.eval['cat_ids']) == (fast.eval['max_dets'], fast.eval['cat_ids'])
    np.testing.assert_array_equal(list(slow.values()), list(fast.values()))
    assert slow.per_class.equals(fast.per_class) and slow.counts == fast.counts


def boxes(rng, n): return np.concatenate([rng.uniform(0, 300, (n, 2)), np.exp(rng.uniform(1, 5.5, (n, 2)))], 1)


def case(seed):
    "Crowds, equal scores, boxes on whole pixels, classes without objects, images without any, many detections in one image"
    rng = np.random.default_rng(seed)
    n_classes, n_images = rng.integers(1, 5), rng.integers(1, 6)
    anns, results = [], []
    for i in range(1, n_images + 1):
        near = boxes(rng, rng.integers(0, 6))
        if rng.random() < .5: near = near.round()
        for b in near.tolist():
            anns.append(dict(id=len(anns) + 1, image_id=i, category_id=int(rng.integers(1, n_classes + 1)), bbox=b,
                             area=b[2]*b[3]*rng.choice([1, .7]), iscrowd=int(rng.random() < .15)))
        n = int(rng.integers(0, 130 if rng.random() < .1 else 15))
        found = boxes(rng, n)
        if len(near):
            at = rng.random(n) < .6
            found[at] = (near[rng.integers(0, len(near), n)] + rng.normal(0, 4, (n, 4)))[at]
        found[:, 2:] = found[:, 2:].clip(.5)
        scores = rng.random(n).round(1 if rng.random() < .4 else 9)
        results += [dict(image_id=i, category_id=int(c), bbox=b, score=s) for c, b, s in zip(rng.integers(1, n_classes + 1, n), found.tolist(), scores.tolist())]
    return results, dict(images=[dict(id=i) for i in range(1, n_images + 1)], annotations=anns,
                         categories=[dict(id=c, name=f'c{c}') for c in range(1, n_classes + 1)])


@pytest.mark.parametrize('tens', range(100))
def test_random_cases(tens):
    for seed in range(10*tens, 10*tens + 10): same(*case(seed))


@pytest.mark.parametrize('max_dets', [5, 300, (2, 7, 20)])
def test_other_limits(max_dets):
    for seed in range(5): same(*case(seed), max_dets=max_dets)


def test_nothing():
    results, truth = case(0)
    same([], truth)
    same(results, dict(truth, annotations=[]))
    same(results, truth, images=[1]) if len(truth['images']) == 1 else same([r for r in results if r['image_id'] == 1], truth, images=[1])


def test_cocos_own_example(data_dir):
    folder = data_dir/'cocoeval'
    results = json.loads((folder/'instances_val2014_fakebbox100_results.json').read_text())
    same(results, json.loads((folder/'instances_val2014_100.json').read_text()))
