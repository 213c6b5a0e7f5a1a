"The grid: every family strung together in every way, at equal width and epochs, on generated pictures; what stands in `--out` is not run again"
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
import torch
from fastai.torch_core import set_seed
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.deformable import DeformableDETR
from deqdet.equilibrium import Perturb, Settled
from deqdet.evaluate import evaluate
from deqdet.learner import det_learner
from deqdet.loss import SetLoss
from deqdet.model import AdaMixer
from deqdet.sparse_rcnn import SparseRCNN
from deqdet.sqr import Recollected, stage_regressions, windows
from common import parser, report
from sqr import saved_bytes


def families(width, queries, grid):
    "Records of equal width"
    same = dict(body='tiny', frozen_stages=-1, n_queries=queries, width=width, heads=4, hidden=4*width)
    mixed = dict(same, feat_width=width, grid=grid)
    encoder = dict(encoder_layers=1, encoder_heads=4, encoder_hidden=2*width)
    return dict(adamixer=AdaMixer(**mixed, norm_groups=16, points=(8,), out_points=16),
                sparse_rcnn=SparseRCNN(**mixed, dynamic=16, finest=14.),
                deformable=DeformableDETR(**same, **encoder, norm_groups=16, dropout=0., refine=True))


def strategies(stages, steps, noise):
    "Ways to string steps together"
    return dict(stack=Stacked(stages), recollection=Recollected(*windows(stages)),
                equilibrium=Settled(steps=steps, supervise=(1, steps), perturb=Perturb(position=noise), recompute=False))


def loss_of(hyper): return hyper.loss() if hasattr(hyper, 'loss') else SetLoss()


def measure(hyper, path, args, seed):
    "Train one detector; what it reaches, weighs and costs"
    set_seed(seed, reproducible=True)
    dls = det_dls(path, bs=args.bs, size=args.size, num_workers=0)
    model = replace(hyper, n_classes=len(dls.vocab)).build(vocab=list(dls.vocab))
    loss_func, batch = loss_of(hyper), dls.train.one_batch()
    kept = saved_bytes(lambda: loss_func(model.train()(*batch[:2]), batch[2]))
    learn = det_learner(dls, model, recipe='tiny', lr=args.lr or None, loss_func=loss_func)
    start = time.process_time()
    with learn.quiet(): learn.fit_published(epochs=args.epochs)
    seconds = time.process_time() - start
    ap, count = evaluate(model, dls.valid), lambda m: sum(p.numel() for p in m.parameters())
    wrong = stage_regressions(model, dls.valid, margin=args.margin)
    return dict(seed=seed, **{k: ap[k] for k in ('AP', 'AP50', 'AP75')}, params=count(model),
                decoder_params=count(model.decoder), kept_mib=kept/2**20, stages=len(model.trajectory(*batch[:2])), predictions=len(model.train()(*batch[:2])),
                cpu_seconds_per_epoch=seconds/args.epochs, fading=wrong['fading'], exacerbation=wrong['exacerbation'])


def main():
    args = parser(__doc__, epochs=12, seeds='0,1', families='', strategies='', n_train=400, n_valid=200, size=64, classes=2, most=3, bs=8,
                  lr=0., width=64, queries=12, grid='3,4,.4', stages=6, steps=4, noise=3., margin=.02).parse_args()
    torch.set_num_threads(args.threads)
    path = Path(tempfile.mkdtemp())/'shapes'
    synth_coco(path, args.n_train, args.n_valid, args.size, seed=1, n_classes=args.classes, max_objects=args.most)
    rows, cols, side = args.grid.split(',')
    chosen = lambda found, names: {k: v for k, v in found.items() if not names or k in names.split(',')}
    grid, about = (int(rows), int(cols), float(side)), {k: v for k, v in vars(args).items() if k not in ('out', 'rounds', 'threads')}
    result = json.loads(Path(args.out).read_text())['result'] if args.out and Path(args.out).exists() else []
    for seed in map(int, args.seeds.split(',')):
        for f, hyper in chosen(families(args.width, args.queries, grid), args.families).items():
            for s, plan in chosen(strategies(args.stages, args.steps, args.noise), args.strategies).items():
                if any((r['family'], r['strategy'], r['seed']) == (f, s, seed) for r in result): continue
                result.append(dict(family=f, strategy=s, **measure(replace(hyper, strategy=plan), path, args, seed)))
                report(result, args.out, **about)


if __name__ == '__main__': main()
