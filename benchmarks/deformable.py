"""Why the equilibrium of Deformable DETR loses to its stack in families.json, and what mends it: one idea at a time, on the same images.

Each (idea, strategy, seed) is one row of the JSON; existing rows are not run again:

    python benchmarks/deformable.py --ideas plain,located --strategies stack,equilibrium --seeds 0,1 --out nbs/results/families_deformable.json"""
import tempfile
from dataclasses import replace
from pathlib import Path
import torch
from torchvision.ops import batched_nms
from deqdet.cli import finite
from deqdet.data import synth_coco
from deqdet.equilibrium import RAG, Perturb, Settled
from deqdet.evaluate import coco_ap
from deqdet.training.contraction import Contract, Later, RandomSteps
from common import parser, report
from contraction import doubles, mixed, rows_of
from families import families, measure, stands, strategies

NEAR, FAR = 3, 12  # applications of steps, the first one included
LIVE = .3          # score of a query that claims an object
GRID = (3, 3, .4)  # as that of the other families

# fields of the record, fields of the equilibrium's plan, callbacks
IDEAS = dict(
    plain=lambda: ({}, {}, []),
    located=lambda: (dict(located=True), {}, []),
    by_side=lambda: (dict(by_side=True), {}, []),
    overlaps=lambda: (dict(overlaps=True), {}, []),
    located_overlaps=lambda: (dict(located=True, overlaps=True), {}, []),
    all_three=lambda: (dict(located=True, by_side=True, overlaps=True), {}, []),
    all_three_random=lambda: (dict(located=True, by_side=True, overlaps=True), {}, [RandomSteps()]),
    all_three_grid=lambda: (dict(located=True, by_side=True, overlaps=True, grid=GRID), {}, []),
    located_random=lambda: (dict(located=True), {}, [RandomSteps()]),
    both=lambda: (dict(located=True, by_side=True), {}, []),
    grid=lambda: (dict(grid=GRID), {}, []),
    grid_located=lambda: (dict(grid=GRID, located=True), {}, []),
    grid_by_side=lambda: (dict(grid=GRID, by_side=True), {}, []),
    grid_both=lambda: (dict(grid=GRID, located=True, by_side=True), {}, []),
    noise_1=lambda: ({}, dict(perturb=Perturb(position=1.)), []),
    noise_8=lambda: ({}, dict(perturb=Perturb(position=8.)), []),
    no_noise=lambda: ({}, dict(perturb=None), []),
    rag_1=lambda: ({}, dict(grad=RAG(1)), []),
    no_init=lambda: ({}, dict(init_steps=0), []),
    all_states=lambda: ({}, dict(supervise=(1, 2, 3, 4)), []),
    random_steps=lambda: ({}, {}, [RandomSteps()]),
    later=lambda: ({}, {}, [Later()]),
    contract=lambda: ({}, {}, [Contract(every=2)]))


def path_of(model, images, sizes):
    "Predictions after 1 to `FAR` applications"
    plan = model.hyper.strategy
    steps = FAR - 1 - plan.extra if isinstance(plan, Settled) else FAR
    return [p for _, p in model.trajectory(images, sizes, steps=steps)]


def suppressed(row, overlap=.6):
    "Detections of an image after non-maximum suppression, which no detector of this package needs"
    keep = batched_nms(row['boxes'], row['scores'], row['labels'], overlap)
    return row | {k: row[k][keep] for k in ('boxes', 'scores', 'labels')}


def drift(model, dls):
    "What changes from `NEAR` to `FAR` applications: AP of mixed predictions and without doubles, claims, doubles, how far boxes move"
    mix = dict(boxes_near_scores_far=[], boxes_far_scores_near=[])
    claims, twice, moves, found = {}, {}, dict(live=[], empty=[]), {}
    for images, sizes, target in dls.valid:
        preds = path_of(model, images, sizes)
        near, far = preds[NEAR-1], preds[FAR-1]
        mix['boxes_near_scores_far'] += rows_of(mixed(dict(n=near, f=far), 'n', 'f'), sizes, target)
        mix['boxes_far_scores_near'] += rows_of(mixed(dict(n=near, f=far), 'f', 'n'), sizes, target)
        for n in (2, NEAR, 4, 6, FAR):
            found.setdefault(n, []).extend(map(suppressed, rows_of(preds[n-1], sizes, target)))
            live = preds[n-1].logits.sigmoid().amax(-1) > LIVE  # (B,N)
            claims.setdefault(n, []).append(live.sum().item())
            twice.setdefault(n, []).append(sum(doubles(b[m]) for b, m in zip(preds[n-1].boxes, live)))
        live = near.logits.sigmoid().amax(-1) > LIVE
        steps = [(b.boxes - a.boxes).abs().mean(-1) for a, b in zip(preds, preds[1:])]  # (B,N) each
        for k, m in dict(live=live, empty=~live).items(): moves[k].append(torch.stack([s[m] for s in steps]))
    n, ap = len(dls.valid.dataset), lambda rows: float(coco_ap(rows, dls.valid.dataset)['AP'])
    return dict(mixed={k: ap(r) for k, r in mix.items()}, suppressed={k: ap(r) for k, r in found.items()},
                claims={k: sum(v)/n for k, v in claims.items()}, doubles={k: sum(v)/n for k, v in twice.items()},
                moves={k: torch.cat(v, 1).mean(1).tolist() for k, v in moves.items()})


def planned(hyper, plan, change):
    "The record with a strategy, changed if it is an equilibrium"
    return replace(hyper, strategy=replace(plan, **change) if isinstance(plan, Settled) else plan)


def main():
    args = parser(__doc__, epochs=12, seeds='0,1', ideas='plain', strategies='equilibrium', n_train=720, n_valid=200, size=64, classes=2,
                  most=2, bs=8, lr=0., width=64, queries=9, grid='3,3,.4', stages=6, steps=4, noise=3., margin=.02, weights='').parse_args()
    torch.set_num_threads(args.threads)
    path = Path(tempfile.mkdtemp())/'shapes'
    synth_coco(path, args.n_train, args.n_valid, args.size, seed=1, n_classes=args.classes, max_objects=args.most)
    about = {k: v for k, v in vars(args).items() if k not in ('out', 'rounds', 'seeds', 'ideas', 'strategies', 'weights')}
    result = stands(args, about)
    rows, cols, side = args.grid.split(',')
    base = families(args.width, args.queries, (int(rows), int(cols), float(side)))['deformable']
    plans = strategies(args.stages, args.steps, args.noise)
    for seed in map(int, args.seeds.split(',')):
        for idea in args.ideas.split(','):
            for s in args.strategies.split(','):
                if any((r['idea'], r['strategy'], r['seed']) == (idea, s, seed) for r in result): continue
                fields, change, cbs = IDEAS[idea]()
                hyper = planned(replace(base, **fields), plans[s], change)
                def more(model, dls):
                    if args.weights: model.save_pretrained(Path(args.weights)/f'{idea}_{s}_{seed}')
                    return drift(model, dls)
                result.append(dict(idea=idea, strategy=s, **measure(hyper, path, args, seed, cbs, more)))
                report(finite(result), args.out, **about)


if __name__ == '__main__': main()
