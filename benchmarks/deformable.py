"""Why the equilibrium of Deformable DETR loses to its stack in families.json, and what mends it: one idea at a time, on the same images.

Each (idea, strategy, seed) is one row of the JSON; existing rows are not run again:

    python benchmarks/deformable.py --ideas plain,located --strategies stack,equilibrium --seeds 0,1 --out nbs/results/families_deformable.json"""
import math
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
import torch
from torch import nn
from torchvision.ops import batched_nms, box_convert, box_iou
from deqdet.boxes import iof, pairs
from deqdet.cli import finite
from deqdet.data import synth_coco
from deqdet.decoder import Queries, grid_boxes, linear
from deqdet.equilibrium import RAG, Perturb, Settled
from deqdet.evaluate import coco_ap
from deqdet.families.deformable import DeformableDETR, DeformableStep, RefState, _whwh
from deqdet.families.deformable_attention import sines
from deqdet.training.contraction import Contract, Later, RandomSteps
from common import parser, report
from contraction import doubles, mixed, rows_of
from families import families, measure, stands, strategies

NEAR, FAR = 3, 12  # applications of steps, the first one included
LIVE = .3          # score of a query that claims an object
GRID = (3, 3, .4)  # as that of the other families


class Knowing(DeformableStep):
    "A refining step that knows where its boxes are: by an embedding of them, by their overlaps in self-attention, or both"
    def __init__(self, hyper, from_point):
        h = hyper
        super().__init__(h.n_classes, h.width, h.heads, h.levels, h.points, h.hidden, h.dropout, from_point, h.by_side)
        located, overlaps = h.located and not from_point, h.overlaps and not from_point
        self.place = nn.Sequential(linear(2*h.width, h.width), nn.ReLU(), linear(h.width, h.width)) if located else None
        self.tau = nn.Parameter(torch.empty(h.heads).uniform_(0, 4)) if overlaps else None

    def forward(self, state, feats):
        memory, sizes, *masks = feats
        content, scale = state.content, _whwh(sizes).to(state.ref.dtype)
        ref = self.start(state, scale)
        around = ref if self.aim is None else ref[..., :2]
        pos = state.pos if self.place is None else state.pos + self.place(sines(ref*2*math.pi, content.shape[-1]//2).flatten(2))
        x = content + pos
        heard, _ = self.talk(x, x, content, need_weights=False, attn_mask=None if self.tau is None else self.bias(ref))
        q = self.layer(self.talk_norm(content + self.drop(heard)), pos, around, memory, masks)
        return RefState(q, self.shift(ref, self.reg(q))*scale, state.pos)

    def bias(self, ref):
        "(BH,N,N) what overlap adds to the logits of self-attention, as in AdaMixer"
        boxes = box_convert(ref, 'cxcywh', 'xyxy')
        overlap = (iof(*pairs(boxes, boxes)) + 1e-7).log()  # (B,N,N)
        return (self.tau[:, None, None]*overlap[:, None]).flatten(0, 1)


@dataclass(frozen=True)
class Tried(DeformableDETR):
    "The record with ideas that did not pay"
    located: bool=False   # refining steps embed the box that they move, as DAB-DETR
    overlaps: bool=False  # refining steps know how much boxes overlap
    grid: tuple=()        # (rows, cols, side) of the first boxes; (): learned points

    def queries(self):
        boxes = grid_boxes(*self.grid) if self.grid else None
        return Queries(self.n_queries, 2*self.width, boxes, norm=False, state=RefState)

    def from_point(self, i): return not self.grid and super().from_point(i)
    def step(self, i): return Knowing(self, self.from_point(i))


# fields of the record, fields of the equilibrium's plan, callbacks
IDEAS = dict(
    plain=lambda: ({}, {}, []),
    by_side=lambda: (dict(by_side=True), {}, []),
    located=lambda: (dict(located=True), {}, []),
    both=lambda: (dict(located=True, by_side=True), {}, []),
    overlaps=lambda: (dict(overlaps=True), {}, []),
    grid=lambda: (dict(grid=GRID), {}, []),
    noise_1=lambda: ({}, dict(perturb=Perturb(position=1.)), []),
    no_noise=lambda: ({}, dict(perturb=None), []),
    rag_1=lambda: ({}, dict(grad=RAG(1)), []),
    no_init=lambda: ({}, dict(init_steps=0), []),
    all_states=lambda: ({}, dict(supervise=(1, 2, 3, 4)), []),
    random_steps=lambda: ({}, {}, [RandomSteps()]),
    later=lambda: ({}, {}, [Later()]),
    later_by_side=lambda: (dict(by_side=True), {}, [Later()]),
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


def crowd(pred, target):
    "Of each object: queries that overlap it by .4, and of the nearest the overlap, the score of its class and the best other score"
    rows = []
    for logits, boxes, truth, labels in zip(pred.logits.sigmoid(), pred.boxes, target.boxes, target.labels):
        overlap = box_iou(boxes, truth[labels >= 0].float())  # (N,objects)
        for column, label in zip(overlap.T, labels[labels >= 0]):
            near = column.argmax()
            other = logits[near].clone()
            other[label] = 0
            rows.append((float((column > .4).sum()), column[near].item(), logits[near, label].item(), other.max().item()))
    return rows


def drift(model, dls):
    "What changes from `NEAR` to `FAR` applications: AP, mixed and without doubles; claims, doubles and crowds; how far boxes move"
    mix = dict(boxes_near_scores_far=[], boxes_far_scores_near=[])
    claims, twice, moves, found, around = {}, {}, dict(live=[], empty=[]), {}, {}
    for images, sizes, target in dls.valid:
        preds = path_of(model, images, sizes)
        near, far = preds[NEAR-1], preds[FAR-1]
        mix['boxes_near_scores_far'] += rows_of(mixed(dict(n=near, f=far), 'n', 'f'), sizes, target)
        mix['boxes_far_scores_near'] += rows_of(mixed(dict(n=near, f=far), 'f', 'n'), sizes, target)
        for n in (2, NEAR, 4, 6, FAR):
            found.setdefault(n, []).extend(map(suppressed, rows_of(preds[n-1], sizes, target)))
            around.setdefault(n, []).extend(crowd(preds[n-1], target))
            live = preds[n-1].logits.sigmoid().amax(-1) > LIVE  # (B,N)
            claims.setdefault(n, []).append(live.sum().item())
            twice.setdefault(n, []).append(sum(doubles(b[m]) for b, m in zip(preds[n-1].boxes, live)))
        live = near.logits.sigmoid().amax(-1) > LIVE
        steps = [(b.boxes - a.boxes).abs().mean(-1) for a, b in zip(preds, preds[1:])]  # (B,N) each
        for k, m in dict(live=live, empty=~live).items(): moves[k].append(torch.stack([s[m] for s in steps]))
    n, ap = len(dls.valid.dataset), lambda rows: float(coco_ap(rows, dls.valid.dataset)['AP'])
    return dict(mixed={k: ap(r) for k, r in mix.items()}, suppressed={k: ap(r) for k, r in found.items()},
                crowd={k: dict(zip(('queries', 'overlap', 'score', 'other'), (sum(c)/len(v) for c in zip(*v)))) for k, v in around.items()},
                claims={k: sum(v)/n for k, v in claims.items()}, doubles={k: sum(v)/n for k, v in twice.items()},
                moves={k: torch.cat(v, 1).mean(1).tolist() for k, v in moves.items()})


def tried(hyper, plan, idea):
    "The record of an idea with a strategy, and callbacks; the plan changes if it is an equilibrium"
    more, change, cbs = IDEAS[idea]()
    plan = replace(plan, **change) if isinstance(plan, Settled) else plan
    known = {f.name: getattr(hyper, f.name) for f in fields(hyper)}
    kind = DeformableDETR if all(k in known for k in more) else Tried
    return kind(**known | more | dict(strategy=plan)), cbs


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
                hyper, cbs = tried(base, plans[s], idea)
                def more(model, dls):
                    if args.weights: model.save_pretrained(Path(args.weights)/f'{idea}_{s}_{seed}')
                    return drift(model, dls)
                result.append(dict(idea=idea, strategy=s, **measure(hyper, path, args, seed, cbs, more)))
                report(finite(result), args.out, **about)


if __name__ == '__main__': main()
