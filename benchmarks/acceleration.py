"""Ways to a fixed point: AP against applications for Picard, Anderson, constants found by search and learned extrapolations; the residual as evidence, and for halting.

    deqdet_train cards --minutes 10 --size 320 --out det
    python benchmarks/acceleration.py det cards --out nbs/results/solver.json

All that is fitted or searched sees training images only. `--cache` keeps features and states, so that a second run starts at once."""
import argparse, contextlib, copy, io, time, warnings
from importlib.util import find_spec
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.ops import box_iou
from common import alternate, report
from deqdet.boxes import move
from deqdet.data import det_dls
from deqdet.decoder import Pred, State, position_embedding, prepared
from deqdet.loss import SetLoss, decode
from deqdet.mixer import MixerStep
from deqdet.model import evaluating, to_original
from deqdet.predict import load_detector
from deqdet.evaluate import coco_ap
from deqdet.solver import Anderson, Picard, per_part, solve, take

STEPS = 1, 2, 3, 4, 5, 6, 8, 10, 20
PARTS = 'content', 'centre', 'size'


# ---- moves, in units that fit every box

def moves(z, fz):
    "Moves (B,N,128), (B,N,2), (B,N,2) of the content, of the centre in sizes of the box, and of log size and ratio"
    d = fz.xyzr - z.xyzr
    return fz.content - z.content, d[..., :2]/2**fz.xyzr[..., 2:3], d[..., 2:]


def moved(z, by):
    "The state `z`, moved"
    content,centre,size = by
    return State(z.content + content, z.xyzr + torch.cat([centre*2**z.xyzr[..., 2:3], size], -1))


# ---- methods, in the protocol of `deqdet.solver`

class Constant:
    "Go beyond `f(z)` by constant parts of the last move"
    def __init__(self, content=0., boxes=0.): self.by = content, boxes, boxes
    def init(self, z): return None
    def step(self, memory, z, fz): return None, moved(fz, [a*d for a,d in zip(self.by, moves(z, fz))])


class First(Constant):
    "`Constant` after the first application, Picard after that"
    def step(self, memory, z, fz):
        if memory is not None: return memory, fz
        return z.content.new_ones(len(z.content)), super().step(None, z, fz)[1]


class Mix(nn.Module):
    "Go beyond `f(z)` by parts of the last two moves, which a small network reads from their lengths and angles"
    def __init__(self, width=32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 6))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
    def init(self, z): return None
    def step(self, memory, z, fz):
        d = moves(z, fz)
        before,n = memory or ([torch.zeros_like(o) for o in d], z.content.new_zeros(len(z.content)))
        by = self.net(self.seen(d, before, n)).unbind(-1) # 6 times (B,N)
        beyond = [by[i][..., None]*a + by[3+i][..., None]*b for i,(a,b) in enumerate(zip(d, before))]
        return (list(d), n + 1), moved(fz, beyond)
    def seen(self, d, before, n):
        "(B,N,10) lengths, cosines and ratios of moves; the number of applications"
        now,then = ([o.norm(dim=-1) for o in x] for x in (d, before))
        dots = [(a*b).sum(-1)/(p*q + 1e-6) for a,b,p,q in zip(d, before, now, then)]
        length = [(o + 1e-3).log() for o in now]
        ratio = [((p + 1e-3)/(q + 1e-3)).log() for p,q in zip(now, then)]
        return torch.stack([*length, *dots, *ratio, n[:, None].expand_as(dots[0]).log1p()], -1)


class Jump(nn.Module):
    "Go beyond `f(z)` by what a small network expects, from the content and the last move, to be left of the way"
    def __init__(self, width=128, hidden=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2*width + 5, hidden), nn.ReLU(), nn.Linear(hidden, width + 4))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
    def init(self, z): return None
    def step(self, memory, z, fz):
        n = z.content.new_zeros(len(z.content)) if memory is None else memory
        d = moves(z, fz)
        count = n[:, None, None].expand(*z.content.shape[:2], 1).log1p()
        left = self.net(torch.cat([fz.content, *d, count], -1))
        return n + 1, moved(fz, left.split([left.shape[-1]-4, 2, 2], -1))


# ---- what a frozen detector gives

class Batch:
    "Features, first guess of g, sizes and truth of some images"
    def __init__(self, model, images, sizes, target):
        state,feats = model.start(images, sizes)
        self.feats = prepared(model.decoder.step, feats)
        self.z0 = model.decoder.init(state, self.feats)
        self.sizes,self.target = sizes,target


def batches(model, dl, n):
    "The first `n` images of a loader, or about as many, as `Batch`"
    found = []
    for images,sizes,target in dl:
        if sum(len(b.sizes) for b in found) >= n: break
        found.append(Batch(model, images, sizes, target))
    return found


def run(model, batch, method, steps, measure=None, **kwargs):
    options = {} if measure is None else dict(measure=measure)
    return solve(model.decoder.step, batch.z0, (batch.feats,), method=method, max_iter=max(steps), keep=steps, **options, **kwargs)


def average_precision(preds, data, dataset):
    "COCO's AP, AP50, AP75 of one `Pred` for each batch"
    rows = []
    for p,b in zip(preds, data):
        found = decode(p)
        boxes = to_original(found.boxes, (b.sizes/b.target.orig).flip(-1))
        rows += [dict(image_id=int(i), boxes=x, scores=s, labels=l)
                 for i,x,s,l in zip(b.target.image_id, boxes, found.scores, found.labels)]
    result = coco_ap(rows, dataset, images=[r['image_id'] for r in rows],
                     fast=find_spec('hotcoco') is not None)
    return {k: float(result[k]) for k in ('AP', 'AP50', 'AP75')}


def remaining(z, late):
    "(B,N,3) distance of each part to a late state, relative or in sizes of the box"
    content,centre,size = (o.norm(dim=-1) for o in moves(z, late))
    return torch.stack([content/late.content.norm(dim=-1), centre, size], -1)


# ---- fitting

def weights(read, late):
    "(B,N) how much a query counts: the square of its best score at the late state, so that objects count most"
    return read(late).logits.sigmoid().amax(-1).square() + .001


def fit_stored(method, model, data, paths, first=4, epochs=60, lr=3e-3):
    "Fit to stored states: the move from `f(z)` should end at the late state"
    opt = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs*len(data))
    for _ in range(epochs):
        for path in paths:
            w = weights(model.decoder.step.read, path[-1])[..., None]
            memory = method.init(path[0])
            loss = 0
            for z,fz in zip(path[:first], path[1:]):
                memory,ahead = method.step(memory, z, fz)
                gap = remaining(ahead, path[-1])
                loss = loss + (w*F.smooth_l1_loss(gap, torch.zeros_like(gap), reduction='none', beta=.2)).sum()/w.sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
    return method


def fit_unrolled(method, model, data, updates, steps=(2,3), lr=1e-3):
    "Fit by the detection loss after a few applications, with gradient through all of them"
    opt = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, updates)
    loss_of = SetLoss()
    for i in range(updates):
        b = data[i % len(data)]
        kept = run(model, b, method, steps).kept
        loss = loss_of([model.decoder.step.read(kept[t]) for t in steps], b.target)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 1.)
        opt.step()
        sched.step()
    return method


@torch.no_grad()
def detection_loss(model, data, method, steps):
    "Mean loss of the detector after some applications"
    loss = SetLoss()
    total = 0
    for b in data:
        kept = run(model, b, method, steps).kept
        total += float(loss([model.decoder.step.read(kept[t]) for t in steps], b.target))
    return total/len(data)


def search(model, data, kind=Constant, steps=(2,3), grid=(-.5, -.25, 0., .25, .5)):
    "The constants whose loss after a few applications is least: boxes first, then content"
    tried = {}
    def loss(c, b):
        if (c, b) not in tried: tried[c, b] = detection_loss(model, data, kind(c, b), steps)
        return tried[c, b]
    boxes = min(grid, key=lambda b: loss(0., b))
    content = min(grid, key=lambda c: loss(c, boxes))
    return (content, boxes), [dict(content=c, boxes=b, loss=v) for (c,b),v in tried.items()]


# ---- measuring

@torch.no_grad()
def walk(model, b, method, steps):
    "States from the first guess on, and the residuals (T,B,2) of contents and corners"
    sol = run(model, b, method, range(steps + 1), model.decoder.measure, record=True)
    return list(sol.kept.values()), sol.trace.rel


def curve(model, data, dataset, walks, lates):
    "AP, median residuals and distances to Picard's late state by the number of applications"
    kept,traces = zip(*walks)
    last = len(kept[0]) - 1
    steps = [t for t in STEPS if t <= last]
    read = model.decoder.step.read
    ap = {t: average_precision([read(k[t]) for k in kept], data, dataset) for t in steps}
    w = [weights(read, late) for late in lates]
    def far(t): # objects count most
        parts = [(v[..., None]*remaining(k[t], late)).sum((0, 1)) for v,k,late in zip(w, kept, lates)]
        return (sum(parts)/sum(v.sum() for v in w)).tolist()
    rel = torch.cat(traces, 1).median(1).values.tolist() # (T,2)
    return dict(by_steps=ap, distance={t: far(t) for t in range(1, last + 1)}, residual=rel)


@torch.no_grad()
def explained(paths, read, memory, at=(1,2,3)):
    "Share of the squared distance that is left, which the best mix of the last moves would remove: by query, in hindsight"
    found = {}
    for t in at:
        total = torch.zeros(3)
        rest = torch.zeros(3)
        for path in paths:
            left = moves(path[t], path[-1])
            last = [moves(a, b) for a,b in zip(path[max(t-memory, 0):t], path[max(t-memory, 0)+1:])]
            w = weights(read, path[-1])
            for i,l in enumerate(left):
                D = torch.stack([m[i] for m in last], -1)                        # (B,N,d,k)
                mix = torch.linalg.lstsq(D.double(), l[..., None].double(), driver='gelsd').solution
                total[i] += (w*l.square().sum(-1)).sum()
                rest[i] += (w*(l.double() - (D.double()@mix)[..., 0]).square().sum(-1)).sum()
        found[t] = (1 - rest/total).tolist()
    return found


@torch.no_grad()
def foreseen(method, paths, read, first=4):
    "Share of the squared distance left that a method removes on stored states, for each application"
    total = torch.zeros(first, 3)
    rest = torch.zeros(first, 3)
    for path in paths:
        w = weights(read, path[-1])[..., None]
        memory = method.init(path[0])
        for t,(z,fz) in enumerate(zip(path[:first], path[1:])):
            memory,ahead = method.step(memory, z, fz)
            total[t] += (w*remaining(fz, path[-1]).square()).sum((0, 1))
            rest[t] += (w*remaining(ahead, path[-1]).square()).sum((0, 1))
    return (1 - rest/total).tolist()


# ---- the residual as evidence

def by_query(z, fz):
    "Residuals (B,N,2) of contents and corners, for each query"
    return per_part((z.content, z.boxes), (fz.content, fz.boxes), dim=2)


def judged(pred, target):
    "(B,N) True where the best class of a query finds an object, with an IoU of .5, that no better query found"
    scores,labels = pred.logits.sigmoid().max(-1)
    good = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(len(scores)):
        real = target.labels[b] >= 0
        iou = box_iou(pred.boxes[b], target.boxes[b][real].float())
        iou = iou*(labels[b][:, None]==target.labels[b][real])
        for q in scores[b].argsort(descending=True).tolist():
            if iou.shape[1]==0: break
            best,o = iou[q].max(0)
            if best < .5: continue
            good[b,q] = True
            iou[:, o] = 0
    return good


@torch.no_grad()
def evidence(model, data, paths, steps):
    "Per query: logit, log residuals of the last application, right or not; and the predictions"
    x,y,preds = [],[],[]
    for b,kept in zip(data, paths):
        pred = model.decoder.step.read(kept[steps])
        rel = by_query(kept[steps-1], kept[steps]).rel
        x.append(torch.cat([pred.logits.amax(-1, keepdim=True), (rel + 1e-4).log()], -1)) # (B,N,3)
        y.append(judged(pred, b.target))
        preds.append(pred)
    return x, y, preds


def calibration_error(p, y, bins=15):
    "Expected calibration error: mean gap between confidence and truth, over bins of equal width"
    at = np.minimum((p*bins).astype(int), bins-1)
    return float(sum(abs(p[at==k].mean() - y[at==k].mean())*(at==k).mean() for k in range(bins) if (at==k).any()))


def logistic(x, y): return LogisticRegression(C=10., max_iter=1000).fit(x, y)


def evidence_table(model, train, valid, dataset, paths, valid_paths, steps):
    "AP, AUC and ECE of scores: as they are, calibrated, and calibrated with the last residual"
    flat = lambda a: torch.cat([o.flatten(0, 1) for o in a]).double().numpy()
    xt,yt,_ = evidence(model, train, paths, steps)
    xv,yv,preds = evidence(model, valid, valid_paths, steps)
    a,b = (flat(xt), flat(yt)), (flat(xv), flat(yv))
    rows = {'score': None, 'calibrated': [0], 'with residual': [0,1,2], 'residual alone': [1,2]}
    out = {}
    seen = b[0][:, 0] > np.log(.05/.95) # scores above .05
    for name,cols in rows.items():
        if cols is None:
            p = 1/(1 + np.exp(-b[0][:, 0]))
            ap = average_precision(preds, valid, dataset)
            out[name] = dict(ap)
        else:
            fit = logistic(a[0][:, cols], a[1])
            p = fit.predict_proba(b[0][:, cols])[:, 1]
            slope = float(fit.coef_[0][0]) if 0 in cols else 0.
            rest = np.array([0. if c==0 else w for c,w in zip(cols, fit.coef_[0])])
            def ranked(p_, x):
                shift = (x[..., cols]*torch.tensor(rest, dtype=x.dtype)).sum(-1, keepdim=True) + float(fit.intercept_[0])
                return Pred(slope*p_.logits + shift, p_.boxes)
            out[name] = average_precision([ranked(p_, x) for p_,x in zip(preds, xv)], valid, dataset) if 0 in cols else {}
            out[name]['coefficients'] = fit.coef_[0].tolist()
        out[name] |= dict(ECE=calibration_error(p, b[1]), ECE_seen=calibration_error(p[seen], b[1][seen]),
                          AUC=float(roc_auc_score(b[1], p)), AUC_seen=float(roc_auc_score(b[1][seen], p[seen])))
    return dict(rows=out, queries=len(b[1]), seen=int(seen.sum()), right=int(b[1].sum()), lies=lies(b[0], b[1]))


def lies(x, y):
    "Of detections of similar score, how often those with small and with large last residuals are right"
    p = 1/(1 + np.exp(-x[:, 0]))
    rows = []
    for lo,hi in ((.1, .3), (.3, .5), (.5, .7), (.7, 1.)):
        mine = (p >= lo) & (p < hi)
        if mine.sum() < 10: continue
        r = x[mine, 1]
        calm = r <= np.median(r)
        rows.append(dict(score=[lo, hi], n=int(mine.sum()), right_settled=float(y[mine][calm].mean()),
                         right_moving=float(y[mine][~calm].mean()), median=float(np.exp(np.median(r)))))
    return rows


@torch.no_grad()
def halting(model, data, dataset, tols, steps):
    "AP and mean applications of a query that stays where it is once its residuals are at most a tolerance"
    read = model.decoder.step.read
    rows = []
    for tol in tols:
        sols = [run(model, b, Picard(), (steps,), by_query, tol=tol) for b in data]
        n = []
        for s in sols:
            most = s.trace.rel.amax(-1)                       # (T,B,N); a settled query repeats its last
            moving = (most > tol).sum(0) + 1                  # (B,N)
            n.append(moving.clamp(max=steps).float().flatten())
        ap = average_precision([read(s.z) for s in sols], data, dataset)
        n = torch.cat(n)
        rows.append(dict(tol=tol, applications=n.mean().item(), settled=(n < steps).float().mean().item(), **ap))
    return rows


# ---- halting with compaction: queries that are done leave the computation

def compact(step, z, feats, active):
    "AdaMixer's step for some queries (n,) of one image; the others stay, and are still attended to"
    q = step.talk(z.content, z.xyzr, z.boxes)[:, active]
    xyzr = z.xyzr[:, active]
    q = step.mix_norm(q + step.mixing(q, step.sampler(q, xyzr, feats)))
    q = step.ffn_norm(q + step.ffn(q))
    return State(z.content.index_copy(1, active, q), z.xyzr.index_copy(1, active, move(xyzr, step.reg(q))))


def halted(step, z, feats, tol, steps):
    "State of one image after at most `steps` applications to each query, and the number of them in all"
    active = torch.arange(z.content.shape[1])
    n = 0
    for _ in range(steps):
        fz = compact(step, z, feats, active)
        n += len(active)
        rel = by_query(take_queries(z, active), take_queries(fz, active)).rel[0].amax(-1) # (n,)
        z = fz
        active = active[rel > tol]
        if not len(active): break
    return z, n


def take_queries(z, active): return State(z.content[:, active], z.xyzr[:, active])


@torch.no_grad()
def compaction(model, data, dataset, tols, steps, rounds, images=8):
    "AP, applications and milliseconds of the processor for an image of a batch of one"
    step = model.decoder.step
    singles = []
    for b in data:
        for i in range(len(b.sizes)):
            one = copy.copy(b)
            row = torch.tensor([i])
            one.z0,one.feats,one.sizes,one.target = take((b.z0, b.feats, b.sizes, b.target), row)
            singles.append(one)
    rows = []
    for tol in tols:
        found = [halted(step, b.z0, b.feats, tol, steps) for b in singles]
        ap = average_precision([step.read(z) for z,_ in found], singles, dataset)
        rows.append(dict(tol=tol, applications=sum(n for _,n in found)/len(singles)/singles[0].z0.content.shape[1], **ap))
    def walk_all(f): return lambda: [f(b) for b in singles[:images]]
    fns = {'Picard': walk_all(lambda b: run(model, b, Picard(), (steps,)))}
    fns |= {tol: walk_all(lambda b, tol=tol: halted(step, b.z0, b.feats, tol, steps)) for tol in tols}
    ms = alternate(fns, rounds, clock=time.process_time)
    n_queries = singles[0].z0.content.shape[1]
    parts = {n: (lambda n=n: [compact(step, b.z0, b.feats, torch.arange(n)) for b in singles[:images]]) for n in (n_queries, n_queries//2, n_queries//4, n_queries//10)}
    by_count = alternate(parts, rounds, clock=time.process_time)
    per = lambda v, k: dict(ms=1e3*v['median']/images/k, ratio=v['ratio'])
    return dict(rows=rows, ms={k: per(v, 1) for k,v in ms.items()}, ms_by_queries={k: per(v, 1) for k,v in by_count.items()})


# ---- attention in some applications

class Remembered:
    "`talk` of a step that computes its attention in one of `every` applications; the others take the last result"
    def __init__(self, step, every):
        self.step,self.every = step,every
        self.n = 0 # applications so far
        step.attn.register_forward_hook(self.keep)

    def keep(self, attn, args, found): self.last = found.detach()

    def __call__(self, q, xyzr, boxes):
        self.n += 1
        if (self.n - 1)%self.every==0: return MixerStep.talk(self.step, q, xyzr, boxes)
        x = q + position_embedding(xyzr, q.shape[-1])
        return self.step.attn_norm(x + self.last)


def remembering(step, every):
    "A copy of a step with `Remembered` attention"
    other = copy.deepcopy(step)
    if every > 1: other.talk = Remembered(other, every)
    return other


def apply(step, b, steps):
    "The states of `run` for another step, whose applications are counted anew"
    if 'talk' in vars(step): step.talk.n = 0
    return solve(step, b.z0, (b.feats,), max_iter=max(steps), keep=steps).kept


@torch.no_grad()
def attention(model, data, dataset, length, rounds, every=(1,2,100), steps=(1,2,3,4,5,6,8)):
    "AP by applications, and milliseconds of an application, where attention is computed in one of some applications"
    f = model.decoder.step
    fs = {n: remembering(f, n) for n in every}
    rows = {}
    for n,step in fs.items():
        kept = [apply(step, b, steps) for b in data]
        rows[n] = {t: average_precision([f.read(k[t]) for k in kept], data, dataset) for t in steps}
    one = copy.copy(data[0])
    one.z0,one.feats = take((one.z0, one.feats), torch.arange(1))
    ms = alternate({n: lambda o=o: apply(o, one, (length,)) for n,o in fs.items()}, rounds, clock=time.process_time)
    return dict(by_steps=rows, ms=by_application(ms, length), light=light(f, one, length, rounds))


def by_application(times, length): return {n: dict(ms=1e3*v['median']/length, ratio=v['ratio']) for n,v in times.items()}


def light(f, b, length, rounds):
    "Milliseconds of an application of lighter steps, before they are trained"
    from beyond import half_of_points, lighten
    fs = {k: copy.deepcopy(f) for k in ('f', 'half of the points', 'rank 32')}
    half_of_points(fs['half of the points'])
    lighten(fs['rank 32'].mixing, 32)
    return by_application(alternate({k: lambda o=o: apply(o, b, (length,)) for k,o in fs.items()}, rounds, clock=time.process_time), length)


# ---- other starts

@torch.no_grad()
def starts(model, dl, n, steps=range(6)):
    "AP by applications of f, from the queries themselves, from g and from g applied twice; the detector was trained with g"
    d = model.decoder
    data = {k: [] for k in ('no g', 'g', 'g twice')}
    for images,sizes,target in dl:
        if sum(len(b.sizes) for b in data['g']) >= n: break
        state,_ = model.start(images, sizes)
        b = Batch(model, images, sizes, target)
        for k,z0 in zip(data, (State(*state), b.z0, d.init(b.z0, b.feats))):
            one = copy.copy(b)
            one.z0 = z0
            data[k].append(one)
    found = {}
    for k,batch in data.items():
        kept = [run(model, b, Picard(), steps).kept for b in batch]
        read = d.step.read
        found[k] = {t: average_precision([read(z[t]) for z in kept], batch, dl.dataset) for t in steps}
    return found


def parameters(m): return sum(p.numel() for p in m.parameters())


def prepare(args, model):
    "Batches of the two splits and Picard's states on them, from the cache if there is one"
    dls = det_dls(args.data, bs=8, size=args.size, val_bs=8, num_workers=0, seed=args.seed)
    cache = Path(args.cache) if args.cache else None
    if cache and cache.exists(): kept = torch.load(cache, weights_only=False)
    else:
        with evaluating(model):
            train,valid = batches(model, dls.train, args.train), batches(model, dls.valid, args.valid)
            paths = [walk(model, b, Picard(), args.late//2)[0] for b in train]
            walks = [walk(model, b, Picard(), args.late) for b in valid]
        kept = train, valid, paths, walks
        if cache: torch.save(kept, cache)
    return dls.valid.dataset, *kept


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('detector')
    p.add_argument('data')
    p.add_argument('--out')
    p.add_argument('--cache', help='file for features and states')
    p.add_argument('--size', type=int, default=320)
    p.add_argument('--train', type=int, default=96, help='training images to fit on')
    p.add_argument('--valid', type=int, default=1000, help='validation images, at most')
    p.add_argument('--late', type=int, default=20, help='applications after which a state counts as the fixed point; half as many on training images')
    p.add_argument('--steps', type=int, default=10, help='most applications of the other methods')
    p.add_argument('--updates', type=int, default=32, help='updates through the applications')
    p.add_argument('--epochs', type=int, default=30, help='epochs over stored states')
    p.add_argument('--only-first', action='store_true', help='measure Picard and `First` alone')
    p.add_argument('--only-starts', action='store_true', help='measure f without g, and g applied twice, alone')
    p.add_argument('--only-compaction', action='store_true', help='measure queries that leave the computation alone')
    p.add_argument('--only-attention', action='store_true', help='measure attention in some applications alone')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=1)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter('ignore')
    model = load_detector(args.detector).eval().requires_grad_(False)
    begun = time.process_time()
    def say(*a): print(f'{time.process_time()-begun:6.0f} s', *a, flush=True)

    dl = det_dls(args.data, bs=8, size=args.size, val_bs=8, num_workers=0, seed=args.seed).valid
    if args.only_starts: return report(starts(model, dl, args.valid), args.out, valid=min(args.valid, len(dl.dataset)))
    if args.only_attention:
        with torch.no_grad(): valid = batches(model, dl, args.valid)
        result = attention(model, valid, dl.dataset, model.decoder.length(), args.rounds)
        return report(result, args.out, valid=sum(len(b.sizes) for b in valid))
    if args.only_compaction:
        with torch.no_grad(): valid = batches(model, dl, args.valid)
        result = compaction(model, valid, dl.dataset, (.1, .2, .4), model.decoder.length(), args.rounds)
        return report(result, args.out, valid=sum(len(b.sizes) for b in valid))
    dataset,train,valid,paths,walks = prepare(args, model)
    valid_paths = [path for path,_ in walks]
    lates = [path[-1] for path in valid_paths]
    read = model.decoder.step.read
    length = model.decoder.length()
    about = dict(length=length, late=args.late, train=sum(len(b.sizes) for b in train), valid=sum(len(b.sizes) for b in valid),
                 updates=args.updates, epochs=args.epochs, seed=args.seed)
    result = dict(curves={}, explained={}, parameters=dict(detector=parameters(model)))
    def keep(**found):
        "What has been measured so far goes into the file"
        result.update(found)
        with contextlib.redirect_stdout(io.StringIO()): report(result, args.out, **about)
    def measured(name, walks):
        result['curves'][name] = curve(model, valid, dataset, walks, lates)
        say(name, [round(r['AP'], 4) for r in result['curves'][name]['by_steps'].values()])
        keep()
    @torch.no_grad()
    def measure(name, method):
        methods[name] = method
        if isinstance(method, nn.Module): result['parameters'][name] = parameters(method)
        measured(name, [walk(model, b, method, args.steps) for b in valid])

    methods = {'Picard': Picard()}
    measured('Picard', walks)
    best,tried = search(model, train[:3], First, grid=(-.75, -.5, -.25, 0.))
    keep(first=dict(best=best, tried=tried))
    measure('first', First(*best))
    if args.only_first: return
    keep(evidence=evidence_table(model, train, valid, dataset, paths, valid_paths, length))
    best,tried = search(model, train[:3])
    keep(constants=dict(best=best, tried=tried))
    say('constants', best)
    fitted = {name: fit_stored(kind(), model, train, paths, epochs=args.epochs) for name,kind in (('mix', Mix), ('jump', Jump))}
    keep(explained={f'any mix of {m}': explained(valid_paths, read, m) for m in (1, 2)} | {
        k: foreseen(m, valid_paths, read) for k,m in [('constant', Constant(*best)), *fitted.items()]})
    say('explained', result['explained'])
    for name,m in [('Anderson', Anderson()), ('constant', Constant(*best)), *fitted.items()]: measure(name, m)
    keep(halting=halting(model, valid, dataset, (.4, .2, .1), length))
    say('halting', result['halting'])
    for name,m in fitted.items():
        measure(f'{name}, unrolled', fit_unrolled(copy.deepcopy(m), model, train, args.updates))
    one = copy.copy(valid[0])
    one.z0,one.feats = take((one.z0, one.feats), torch.arange(2))
    with torch.no_grad():
        ms = alternate({k: lambda m=m: run(model, one, m, (length,)) for k,m in methods.items()}, args.rounds, clock=time.process_time)
    result['ms'] = {k: dict(ms=1e3*v['median']/2/length, ratio=v['ratio']) for k,v in ms.items()}
    report(result, args.out, **about)


if __name__=='__main__': main()
