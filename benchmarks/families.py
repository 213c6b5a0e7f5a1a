"""The grid: every family with every strategy, at equal width and epochs, on generated images.

Each (family, strategy, seed) is one row of the JSON; existing rows are not run again. Each runs in its own process, so that the peak of
memory is its own:

    for n in 0 1; do for s in stack recollection equilibrium; do for f in adamixer sparse_rcnn deformable; do
        python benchmarks/families.py --families $f --strategies $s --seeds $n --out nbs/results/families.json; done; done; done

`--teach overlap,denoise` trains with what the recipe `finetune` adds: class targets that grow with the overlap, and noisy true boxes;
`later` adds a loss on a late state in a quarter of the batches, `first_boxes` as many queries at boxes of a dense head."""
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
import torch
from fastai.torch_core import set_seed
from deqdet.cli import finite
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.families.deformable import DeformableDETR
from deqdet.equilibrium import Perturb, Settled
from deqdet.evaluate import evaluate
from deqdet.learner import det_learner
from deqdet.loss import SetLoss
from deqdet.families.adamixer import AdaMixer
from deqdet.families.sparse_rcnn import SparseRCNN
from deqdet.sqr import Recollected, stage_regressions, windows
from deqdet.training.contraction import Later
from deqdet.training.denoise import Denoise
from deqdet.training.quality import with_overlap
from common import commit, machine, parser, report
from dense import DenseLoss, FirstBoxes, dense_head
from sqr import saved_bytes


def families(width, queries, grid):
    "Records of equal width"
    same = dict(body='tiny', frozen_stages=-1, n_queries=queries, width=width, heads=4, hidden=4*width)
    mixed = dict(same, feat_width=width, grid=grid)
    encoder = dict(encoder_layers=1, encoder_heads=4, encoder_hidden=2*width)
    return dict(adamixer=AdaMixer(**mixed, norm_groups=16, points=(8,), out_points=16),
                sparse_rcnn=SparseRCNN(**mixed, dynamic=16, roi=5, finest=14.),
                deformable=DeformableDETR(**same, **encoder, norm_groups=16, dropout=0., refine=True))


def strategies(stages, steps, noise):
    "Strategies by name"
    return dict(stack=Stacked(stages), recollection=Recollected(*windows(stages)),
                equilibrium=Settled(steps=steps, supervise=(1, steps), perturb=Perturb(position=noise), recompute=False))


def loss_of(hyper): return hyper.loss() if hasattr(hyper, 'loss') else SetLoss()


def taught(loss, teach):
    "The loss, and callbacks, with these additions"
    if 'overlap' in teach: loss = with_overlap(loss)
    added = dict(denoise=Denoise, later=Later, first_boxes=DenseLoss)
    return loss, [cb() for k,cb in added.items() if k in teach]


def add_first_boxes(model):
    "As many further queries as there are, at the best boxes of a dense head"
    hyper = model.hyper
    model.dense = dense_head(hyper.n_classes, hyper.width)
    model.queries = FirstBoxes(model.queries, model.dense, n=hyper.n_queries)


def fit(hyper, dls, args, cbs=()):
    "Train one detector; the learner, and what it cost"
    model = replace(hyper, n_classes=len(dls.vocab)).build(vocab=list(dls.vocab))
    teach = getattr(args, 'teach', '')
    if 'first_boxes' in teach: add_first_boxes(model)
    loss_func, more = taught(loss_of(hyper), teach)
    images, sizes, target = dls.train.one_batch()
    kept = saved_bytes(lambda: loss_func(model.train()(images, sizes), target))
    learn = det_learner(dls, model, recipe='tiny', lr=args.lr or None, loss_func=loss_func, cbs=[*cbs, *more])
    start = time.process_time()
    with learn.quiet(): learn.fit_published(epochs=args.epochs)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return learn, dict(iterations=learn.train_iter, kept_mib=kept/2**20, peak_mib=peak, cpu_seconds=seconds,
                       losses=len(model.train()(images, sizes)), applications=len(model.trajectory(images, sizes)))


def by_applications(model, dl, counts):
    "AP after so many applications of steps, the first one included; a stack repeats its last step"
    plan = model.hyper.strategy
    steps = {n: n - 1 - plan.extra if isinstance(plan, Settled) else n for n in counts}
    ap = {n: evaluate(model, dl, steps=t) for n, t in steps.items()}
    return [dict(applications=n, AP=r.AP, AP50=r.AP50) for n, r in ap.items()]


def measure(hyper, path, args, seed, cbs=(), more=None):
    "AP, size and cost of one detector, and what `more(model, dls)` returns"
    set_seed(seed, reproducible=True)
    dls = det_dls(path, bs=args.bs, size=args.size, num_workers=0)
    learn, cost = fit(hyper, dls, args, cbs)
    model, count = learn.model, lambda m: sum(p.numel() for p in m.parameters())
    ap, wrong = evaluate(model, dls.valid), stage_regressions(model, dls.valid, margin=args.margin)
    return dict(seed=seed, **{k: ap[k] for k in ('AP', 'AP50', 'AP75')}, params=count(model), decoder_params=count(model.decoder), **cost,
                by_applications=by_applications(model, dls.valid, (2, 3, 4, 6, 8, 12)), **wrong,
                **(more(model, dls) if more else {}), commit=commit(), machine=machine())


def stands(args, about):
    "Rows that were measured before, with the same settings"
    if not (args.out and Path(args.out).exists()): return []
    old = json.loads(Path(args.out).read_text())
    other = [k for k, v in about.items() if old[k] != v]
    if other: raise SystemExit(f'{args.out} was measured with other settings: {", ".join(other)}')
    return old['result']


def main():
    args = parser(__doc__, epochs=12, seeds='0,1', families='', strategies='', n_train=720, n_valid=200, size=64, classes=2, most=2, bs=8,
                  lr=0., width=64, queries=9, grid='3,3,.4', stages=6, steps=4, noise=3., margin=.02, teach='').parse_args()
    torch.set_num_threads(args.threads)
    path = Path(tempfile.mkdtemp())/'shapes'
    synth_coco(path, args.n_train, args.n_valid, args.size, seed=1, n_classes=args.classes, max_objects=args.most)
    rows, cols, side = args.grid.split(',')
    chosen = lambda found, names: {k: v for k, v in found.items() if not names or k in names.split(',')}
    grid, which = (int(rows), int(cols), float(side)), ('out', 'rounds', 'seeds', 'families', 'strategies', 'teach')
    about = {k: v for k, v in vars(args).items() if k not in which}
    result = stands(args, about)
    for seed in map(int, args.seeds.split(',')):
        for f, hyper in chosen(families(args.width, args.queries, grid), args.families).items():
            for s, plan in chosen(strategies(args.stages, args.steps, args.noise), args.strategies).items():
                if any((r['family'], r['strategy'], r['seed'], r.get('teach', '')) == (f, s, seed, args.teach) for r in result): continue
                result.append(dict(family=f, strategy=s, teach=args.teach, **measure(replace(hyper, strategy=plan), path, args, seed)))
                report(finite(result), args.out, **about)


if __name__ == '__main__': main()
