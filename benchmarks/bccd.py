"""DEQDet and AdaMixer of equal width on BCCD (blood cells, 205 images to train on, 87 to validate), from scratch.

Each (model, seed) runs in its own process and is one entry of the JSON; existing entries are not run again:

    export DEQDET_DATA=...   # holds bccd/ in VOC layout
    for s in 0 1; do for m in deqdet_tiny adamixer_tiny; do
        python benchmarks/bccd.py --only $m --seed $s --out nbs/results/bccd.json; done; done"""
import json, os, resource, time, warnings
from dataclasses import replace
from pathlib import Path
import torch
from torchvision.transforms import v2
from deqdet.sets.augment import Augment, Fit, recipe_1x
from deqdet.cli import finite
from deqdet.data import det_dls
from deqdet.evaluate import ap_vs_steps, evaluate
from deqdet.learner import CSVLog, EMA, det_learner, recipes
from deqdet.zoo import create_detector
from common import commit, machine, parser

MODELS = 'deqdet_tiny', 'adamixer_tiny'
QUERIES = dict(n_queries=48, grid=(6, 8, .2)) # up to 30 cells in an image


def loaders(args):
    "Loaders of images of 256x192 (by default), flipped both ways"
    flips = v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), Fit(args.size, args.size), v2.SanitizeBoundingBoxes()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # two empty boxes of the published set are left out
        return det_dls(Path(os.environ['DEQDET_DATA'])/'bccd', bs=args.bs, tfms=(Augment(*flips), recipe_1x(False, args.size, args.size)),
                       val_bs=8, num_workers=0, seed=args.seed)


def run(args):
    "Train one model with one seed and measure it"
    torch.manual_seed(args.seed)
    dls = loaders(args)
    model = create_detector(args.only, vocab=dls.vocab, **QUERIES)
    warmup = min(recipes['tiny'].warmup, max(1, args.epochs*len(dls.train)//5))
    recipe = replace(recipes['tiny'], epochs=args.epochs, batch=args.bs, warmup=warmup, lr=args.lr or recipes['tiny'].lr)
    where = Path(args.runs)/f'{args.only}_{args.seed}'
    learn = det_learner(dls, model, recipe, path=where, cbs=[EMA(.998), CSVLog('log.csv')])
    wall, cpu = time.perf_counter(), time.process_time()
    with learn.no_bar(): learn.fit_published(epochs=args.epochs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    if args.keep: model.save_pretrained(where/'model')
    r = evaluate(model, dls.valid)
    steps = ap_vs_steps(model, dls.valid, (1, 2, 4, 6, 8, 12, 20)) if args.only.startswith('deq') else None
    return dict(model=args.only, seed=args.seed, epochs=args.epochs, size=args.size, bs=args.bs, lr=recipe.lr, iterations=learn.train_iter,
                parameters=sum(p.numel() for p in model.parameters()), peak_memory_mb=peak, train_seconds=wall,
                train_cpu_seconds=cpu, numbers=dict(r), classes=r.per_class.to_dict('index'), steps=steps,
                log=learn.history.to_dict('list'), commit=commit(), machine=machine())


def main():
    p = parser(__doc__, threads=1, epochs=20, size=256, bs=4, seed=0, lr=0., runs='runs/bccd')
    p.add_argument('--only', choices=MODELS, required=True)
    p.add_argument('--keep', action='store_true', help='keep the weights beside the log')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out) if args.out else None
    done = json.loads(out.read_text()) if out and out.exists() else []
    if any((o['model'], o['seed']) == (args.only, args.seed) for o in done): return print('stands in', out)
    new = run(args)
    print(json.dumps({k: v for k,v in new.items() if k != 'log'}, indent=1))
    if not out: return
    out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(out.read_text()) if out.exists() else [] # another process may have ended meanwhile
    out.write_text(json.dumps(finite(done + [new]), indent=1) + '\n')


if __name__ == '__main__': main()
