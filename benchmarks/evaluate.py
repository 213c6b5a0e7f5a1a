"COCO evaluation of generated results: the time of COCO's arithmetic and of conversion"
import contextlib, io, time
import numpy as np, torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from deqdet import evaluate as ev
from common import alternate, parser, report


def made(pictures, detections, classes, seed=0):
    """A truth with about seven objects of up to three classes an image, as in COCO, and predictions of up to fifteen
    classes, of which two in five lie near an object"""
    rng, anns, preds = np.random.default_rng(seed), [], []
    for i in range(1, pictures + 1):
        n = 1 + rng.poisson(6.3)
        kinds = rng.integers(0, classes, min(n, 3))
        xy, wh, labels = rng.uniform(0, 400, (n, 2)), np.exp(rng.uniform(2, 5.7, (n, 2))), rng.choice(kinds, n)
        xywh = np.concatenate([xy, wh], 1)
        anns += [dict(id=len(anns) + j + 1, image_id=i, category_id=int(l) + 1, bbox=b, area=b[2]*b[3], iscrowd=0)
                 for j,(b,l) in enumerate(zip(xywh.tolist(), labels))]
        j, near = rng.integers(0, n, detections), rng.uniform(size=detections) < .4
        b = np.where(near[:, None], xywh[j] + rng.normal(0, 5, (detections, 4)), rng.uniform(5, 200, (detections, 4)))
        b = np.concatenate([b[:, :2], b[:, :2] + b[:, 2:].clip(1)], 1)
        preds.append(dict(image_id=i, boxes=torch.tensor(b).float(), scores=torch.tensor(rng.uniform(size=detections)).float(),
                          labels=torch.tensor(np.where(near, labels[j], rng.choice(rng.integers(0, classes, 12), detections)))))
    return dict(images=[dict(id=i + 1) for i in range(pictures)], annotations=anns,
                categories=[dict(id=c + 1, name=f'c{c}') for c in range(classes)]), preds


def by_the_book(preds, truth):
    "From tensors to a ready `COCOeval` as its documentation does it: a loop over boxes, two indexed COCO objects"
    results = []
    for p in preds:
        for (x1,y1,x2,y2),s,l in zip(p['boxes'].tolist(), p['scores'].tolist(), p['labels'].tolist()):
            results.append(dict(image_id=p['image_id'], category_id=l + 1, bbox=[x1, y1, x2 - x1, y2 - y1], score=s))
    gt = COCO(); gt.dataset = truth; gt.createIndex()
    e = COCOeval(gt, gt.loadRes(results), 'bbox')
    e._prepare()
    return e


def ours(preds, truth):
    "The same by `coco_ap`"
    names, ids, gts, dts, _ = ev._prepared(preds, truth)
    return ev._Eval(gts, dts, sorted(ids), sorted(names), [1, 10, 100])


def whole(preds, truth):
    "One `coco_ap`: its seconds, those of them inside pycocotools, and its result"
    inside, arrays = [], ev._Eval.arrays
    def timed(self):
        t, out = time.perf_counter(), arrays(self)
        inside.append(time.perf_counter() - t)
        return out
    ev._Eval.arrays = timed
    try: t, r = time.perf_counter(), ev.coco_ap(preds, truth)
    finally: ev._Eval.arrays = arrays
    return time.perf_counter() - t, inside[0], r


def by_hotcoco(preds, truth, r):
    "One `coco_ap(fast=True)`, if the package is there: its seconds, those of all processors, and whether all arrays are those of `r`"
    try: import hotcoco
    except ImportError: return {}
    cpu, t, f = time.process_time(), time.perf_counter(), ev.coco_ap(preds, truth, fast=True)
    cpu, t = time.process_time() - cpu, time.perf_counter() - t
    same = all(bool(np.array_equal(r.eval[k], f.eval[k])) for k in ('precision', 'recall', 'scores'))
    return dict(hotcoco_seconds=t, hotcoco_processor_seconds=cpu, hotcoco_arrays_equal=same, hotcoco_version=getattr(hotcoco, '__version__', None))


def equal(preds, truth, n=100):
    "True if the arrays equal those of COCO's program on the first `n` images"
    part = dict(truth, images=truth['images'][:n], annotations=[a for a in truth['annotations'] if a['image_id'] <= n])
    e, r = by_the_book(preds[:n], part), ev.coco_ap(preds[:n], part)
    e.evaluate(); e.accumulate()
    return all(bool(np.array_equal(e.eval[k], r.eval[k])) for k in ('precision', 'recall', 'scores'))


def main():
    args = parser(__doc__, rounds=3, pictures=5000, detections=100, classes=80).parse_args()
    torch.set_num_threads(args.threads)
    truth, preds = made(args.pictures, args.detections, args.classes)
    with contextlib.redirect_stdout(io.StringIO()):
        cpu = time.process_time()
        seconds, inside, r = whole(preds, truth)
        cpu = time.process_time() - cpu
        fast = by_hotcoco(preds, truth, r)
        t = alternate({'coco_ap': lambda: ours(preds, truth), 'by the book': lambda: by_the_book(preds, dict(truth))}, args.rounds)
        same = equal(preds, truth)
    report(dict(seconds=seconds, processor_seconds=cpu, seconds_in_pycocotools=inside, our_share=1 - inside/seconds,
                conversion_seconds={k: v['median'] for k,v in t.items()}, by_the_book_times_as_long=t['by the book']['ratio'],
                arrays_equal_cocos=same, AP=r.AP, **fast), args.out,
           pictures=args.pictures, detections=args.detections, classes=args.classes)


if __name__ == '__main__': main()
