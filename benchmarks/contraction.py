"""Does a detector stay where it has settled? AP, boxes, scores and movement far beyond the states that it was trained on, for ways of teaching.

    export DEQDET_DATA=...   # holds raccoon
    python benchmarks/contraction.py --all --sets raccoon --updates 80 --size 256 --seen 0 --out nbs/results/contraction.json

Cells and options are those of own_data.py, kinds those of beyond.py; `--weights FOLDER` keeps the detectors, `--seen 0` leaves out the images to train
on. One that has been trained already:

    python benchmarks/contraction.py --detector FOLDER --data raccoon --size 320 --out nbs/results/contraction_raccoon.json

Tiny detectors on generated shapes, a minute for each seed:

    python benchmarks/contraction.py --shapes --data shapes --out nbs/results/contraction_shapes.json"""
import argparse, contextlib, copy, io, sys, time
from pathlib import Path
import torch
from torchvision.ops import box_iou
import beyond, own_data
from common import report
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Pred, prepared
from deqdet.equilibrium import RAG, Perturb, Settled
from deqdet.evaluate import APCallback, coco_ap
from deqdet.families.adamixer import AdaMixer
from deqdet.learner import det_learner
from deqdet.loss import decode
from deqdet.model import to_original
from deqdet.ops.states import by_differences, take
from deqdet.predict import load_detector
from deqdet.sets.augment import recipe_1x
from deqdet.sets.images import collate
from deqdet.solver import solve, spectral_radius
from deqdet.training.contraction import Contract, Later, jacobian

KINDS = 'deqdet_lite', 'late', 'stretch', 'jacobian', 'random_steps', 'random_stretch', 'more_noise', 'no_noise', 'deqdet_lite_plain'
TIMES = 1, 2, 3, 5, 11, 21, 41 # applications of f; a detector trained with T=4 makes 5
NEAR,FAR = 5, 41


# ---- states

def batches(dataset, n, bs=8):
    "The first `n` images"
    for i in range(0, n, bs): yield collate([dataset[j] for j in range(i, min(n, i+bs))])


def walk(net, data):
    "For each batch: states by applications, residuals (T,B,2), sizes and truth, features"
    decoder = net.decoder
    for images,sizes,target in data:
        state,feats = net.start(images, sizes)
        feats = prepared(decoder.step, feats)
        sol = solve(decoder.step, decoder.init(state, feats), (feats,), max_iter=FAR, keep=TIMES, measure=decoder.measure, record=True)
        yield sol.kept, sol.trace.rel, sizes, target, feats


def rows_of(pred, sizes, target):
    "Detections of a batch in pixels of the original images"
    found = decode(pred)
    boxes = to_original(found.boxes, (sizes/target.orig).flip(-1))
    return [dict(image_id=int(i), boxes=b, scores=s, labels=l) for i,b,s,l in zip(target.image_id, boxes, found.scores, found.labels)]


def mixed(preds, a, b):
    "Boxes after `a` applications with scores after `b`"
    return Pred(preds[b].logits, preds[a].boxes)


# ---- what changes between two times

def changes(preds):
    "Of queries with a score of .3 at either time: overlap of the two boxes, change of score; counts and doubles at each"
    p,q = preds[NEAR],preds[FAR]
    s,t = p.logits.sigmoid().amax(-1),q.logits.sigmoid().amax(-1) # (B,N)
    live = (s > .3) | (t > .3)
    iou = torch.stack([box_iou(a, b).diagonal() for a,b in zip(p.boxes, q.boxes)])
    rows = dict(overlap=iou[live].tolist(), change=(t - s)[live].tolist())
    for name,pred,score in (('near', p, s), ('far', q, t)):
        rows[f'{name}_live'] = (score > .3).sum(1).tolist()
        rows[f'{name}_doubles'] = [doubles(b[m]) for b,m in zip(pred.boxes, score > .3)]
    return rows


def doubles(boxes):
    "How many boxes overlap an earlier one by .7"
    return int((box_iou(boxes, boxes).triu(1) > .7).any(0).sum()) if len(boxes) else 0


def overlaps(pred, target):
    "Of each object, (best overlap among the ten best queries, overlap of the best query that has .5 at least, or 0)"
    rows = []
    for logits,boxes,truth,labels in zip(pred.logits, pred.boxes, target.boxes, target.labels):
        order = logits.amax(-1).argsort(descending=True)[:10]
        near = box_iou(boxes[order], truth[labels >= 0].float()) # (10,objects)
        for column in near.T: rows.append((column.max().item(), (column*(column >= .5))[(column >= .5).int().argmax()].item()))
    return rows


def mean(values): return sum(values)/max(len(values), 1)


@torch.no_grad()
def far_and_near(net, dataset, n, radius=0):
    "AP by applications; AP of mixed predictions; movement; what changes"
    aps = {t: [] for t in TIMES}
    mix = {'boxes near, scores far': [], 'boxes far, scores near': []}
    traces,moved,radii,reached = [],{},[],{t: [] for t in TIMES}
    for kept,rel,sizes,target,feats in walk(net, batches(dataset, n)):
        preds = {t: net.decoder.step.read(z) for t,z in kept.items()}
        for t in TIMES: aps[t] += rows_of(preds[t], sizes, target)
        for k,(a,b) in zip(mix, ((NEAR, FAR), (FAR, NEAR))): mix[k] += rows_of(mixed(preds, a, b), sizes, target)
        for k,v in changes(preds).items(): moved.setdefault(k, []).extend(v)
        for t in TIMES: reached[t] += overlaps(preds[t], target)
        traces.append(rel)
        if sum(len(r) for r in radii) < radius:
            rows = torch.arange(min(len(sizes), radius))
            radii.append(spectral_radius(net.decoder.step, take(kept[FAR], rows), (take(feats, rows),), 20, by_differences))
    def score(rows):
        result = coco_ap(rows, dataset, images=sorted({r['image_id'] for r in rows}))
        return {k: float(result[k]) for k in ('AP', 'AP50', 'AP75')}
    rel = torch.cat(traces, 1).amax(-1) # (T,B)
    few = lambda tol: ((rel > tol).sum(0) + 1).float().mean().item() # applications until the residual is below; FAR+1: never
    return dict(by_applications={t: score(r) for t,r in aps.items()}, mixed={k: score(r) for k,r in mix.items()},
                residual=rel.median(1).values.tolist(), applications_to={tol: few(tol) for tol in (.2, .1, .05)},
                moved={k: mean(v) for k,v in moved.items()},
                best_of_ten={t: mean([r[0] for r in v]) for t,v in reached.items()}, ranked_first={t: mean([r[1] for r in v]) for t,v in reached.items()},
                radius=torch.cat(radii).tolist() if radii else [])


# ---- cells

def both(net, dls, radius=4, n=40, seen=True):
    "On the first images for validation, and on as many that it was trained on, without augmentation"
    valid = dls.valid.dataset
    found = dict(valid=far_and_near(net, valid, min(n, len(valid)), radius))
    if seen: found['train'] = far_and_near(net, as_valid(dls), min(n, len(valid)))
    return found


def as_valid(dls):
    "The images to train on, without augmentation"
    seen = copy.copy(dls.train.dataset)
    seen.tfm = dls.valid.dataset.tfm
    return seen


def measure(detector, dls, average, steps=()):
    "What stands in an entry, of the average of weights"
    average.swap()
    found = both(detector.net.eval(), dls, seen=detector.seen)
    if detector.folder: detector.net.save_pretrained(detector.folder)
    detector.net.train()
    average.swap()
    return found | dict(AP=found['valid']['by_applications'][NEAR]['AP'], seconds=detector.seconds)


train = own_data.train

def timed(detector, dls, args):
    "`own_data.train`; the detector keeps the processor's seconds of an update"
    begun = time.process_time()
    n,average = train(detector, dls, args)
    detector.seconds = (time.process_time() - begun)/n
    detector.seen = bool(args.seen)
    detector.folder = Path(args.weights)/f'{args.set}_{args.kind}' if args.weights else None
    return n, average


# ---- generated shapes and a tiny detector: many trainings in a minute

WAYS = {
    'plain': lambda: dict(),
    'Later': lambda: dict(cbs=[Later()]),
    'Contract, stretch': lambda: dict(cbs=[Contract(1.)]),
    'Contract, jacobian': lambda: dict(cbs=[Contract(1e-5, jacobian)]),
    'without noise (RAP)': lambda: dict(perturb=None)}


def small(perturb=Perturb(position=3.)):
    "A tiny equilibrium, trained at T=4 like `deqdet_lite`"
    plan = Settled(steps=4, supervise=(4,), init_steps=0, grad=RAG(1), perturb=perturb, recompute=False)
    return AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=16, grid=(4,4,.3), width=32, heads=4,
                    groups=2, points=(8,), out_points=8, hidden=64, strategy=plan)


def of_shapes(args):
    "Every way of teaching, for every seed: entries as of cells"
    folder = synth_coco(Path(args.data), n_train=40, n_valid=60, size=64, max_objects=3, seed=1)
    rows = []
    for seed in range(args.seeds):
        for name in args.ways or WAYS:
            options = WAYS[name]()
            cbs = options.pop('cbs', [])
            torch.manual_seed(seed)
            dls = det_dls(folder, bs=8, num_workers=0, seed=seed, device='cpu')
            learn = det_learner(dls, small(**options).build(), 'tiny', cbs=cbs)
            learn.remove_cb(APCallback)
            begun = time.process_time()
            with learn.quiet(): learn.fit_published(epochs=args.epochs)
            seconds = (time.process_time() - begun)/args.epochs/len(dls.train)
            rows.append(dict(way=name, seed=seed, seconds=seconds, **both(learn.model.eval(), dls)))
            found = {k: [round(rows[-1][k]['by_applications'][t]['AP'], 3) for t in (NEAR, 11, FAR)] for k in ('valid', 'train')}
            print(f'{name}, seed {seed}: {found}, {1000*seconds:.0f} ms', flush=True)
            with contextlib.redirect_stdout(io.StringIO()): report(rows, args.out, seeds=args.seeds, epochs=args.epochs)


def of_folder(args):
    "Measure a detector that has been trained already"
    dls = det_dls(args.data, tfms=[recipe_1x(False, args.size, args.size)]*2, num_workers=0)
    report(both(load_detector(args.detector).eval(), dls), args.out, size=args.size)


if __name__=='__main__':
    if {'--detector', '--shapes'} & set(sys.argv):
        p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        for o in ('--detector', '--data', '--out'): p.add_argument(o)
        p.add_argument('--shapes', action='store_true', help='train tiny detectors on generated shapes, written to the folder `data`')
        p.add_argument('--size', type=int, default=320)
        p.add_argument('--seeds', type=int, default=2)
        p.add_argument('--epochs', type=int, default=24)
        p.add_argument('--ways', nargs='+', choices=WAYS, help='some of the ways of teaching; default: all')
        args = p.parse_args()
        torch.set_num_threads(1)
        (of_shapes if args.shapes else of_folder)(args)
    else:
        own_data.train = timed
        own_data.measure = measure
        own_data.main(set='raccoon', sets='raccoon', kinds=','.join(KINDS), class_lr=4., weights='', seen=1)
