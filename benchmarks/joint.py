"""Half the applications: early states taught, and a solver trained with its map. AP by applications of f after g.

    export DEQDET_DATA=...   # holds cards, raccoon
    python benchmarks/joint.py --all --updates 250 --sets raccoon,cards --out nbs/results/joint.json

The same from a trained detector, a few updates for each kind:

    python benchmarks/joint.py --set cards --kind deqdet_lite --updates 250 --weights weights
    python benchmarks/joint.py --all --updates 60 --sets cards --init weights/cards_deqdet_lite_0.pt --out nbs/results/joint.json

Cells and options are those of own_data.py; `--weights FOLDER` keeps the weights, `--init FILE` begins with some. `deqdet_lite` is the recipe: a loss on
g and, after a path of four applications without gradient, on the fifth. Every supervised state (t) is one application, with gradient, after a path of t."""
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
import own_data
from acceleration import moved, moves
from beyond import STRATEGY, RandomSteps
from common import alternate
from deqdet.boxes import giou
from deqdet.equilibrium import RAG
from deqdet.evaluate import coco_ap
from deqdet.loss import decode, upright
from deqdet.model import to_original
from deqdet.solver import Picard
from deqdet.training.denoise import denoising_loss
from own_data import LITE, Ours

TIMES = 1, 2, 3, 4, 5, 6, 8, 10, 20 # applications of f after g, at which AP is measured
LENGTH = 5 # those of the recipe at inference


# ---- a solver that is learned with the map

class Pace(nn.Module):
    "Go a part of the move, one for the content and one for the box of each query; a method of `solve`"
    def __init__(self, width=32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.net[-1].weight) # parts of 1: Picard
        nn.init.zeros_(self.net[-1].bias)

    def init(self, z): return None

    def step(self, memory, z, fz):
        content,centre,size = moves(z, fz)
        now = content/(fz.content.norm(dim=-1, keepdim=True) + 1e-6), torch.cat([centre, size], -1)
        before,n = memory or (now, z.content.new_zeros(len(z.content)))
        a = self.net(self.seen(now, before, n)).tanh() # (B,N,2) how much more than the move, -1..1
        by = [a[..., :1]*content, a[..., 1:]*centre, a[..., 1:]*size]
        return (now, n + 1), moved(fz, by)

    def seen(self, now, before, n):
        "(B,N,7) log lengths of the last moves of content and box, their changes, cosines; applications"
        p,q = ([o.norm(dim=-1) + 1e-3 for o in x] for x in (now, before))
        change = [(a/b).log() for a,b in zip(p, q)]
        cosine = [(a*b).sum(-1)/(c*d) for a,b,c,d in zip(now, before, p, q)]
        count = n.log1p()[:, None].expand_as(p[0])
        return torch.stack([*[o.log() for o in p], *change, *cosine, count], -1)


def paced(decoder, z, feats):
    "The states of a path to supervise: constants, but for the parts of the last move"
    noise = decoder.plan.perturb or (lambda z: z)
    memory = decoder.pace.init(z)
    kept = []
    for n in range(1, decoder.plan.steps + 1):
        with torch.no_grad():
            z = noise(z)
            fz = decoder.step(z, feats)
        memory,z = decoder.pace.step(memory, z, fz)
        if n in decoder.plan.supervise: kept.append(z)
        z = type(z)(*[p.detach() for p in z])
    return kept


def straight(f, z):
    "An application whose boxes pass their gradient on to the boxes that it started from: f itself detaches those"
    fz = f(z)
    return fz._replace(xyzr=fz.xyzr + (z.xyzr - z.xyzr.detach()))


class Joint(Ours):
    "The path is the learned solver's; the gradient of each supervised state goes through its last parts"
    def __init__(self, *args, grad=straight, **kwargs):
        super().__init__(*args, **kwargs)
        decoder = self.net.decoder
        decoder.pace = Pace()
        decoder.path = partial(paced, decoder)
        decoder.plan = replace(decoder.plan, grad=grad)

    def detect(self, *args, **kwargs): return super().detect(*args, method=self.net.decoder.pace, **kwargs)


# ---- early states taught

class RandomPair(RandomSteps):
    "The path has 3 to 8 applications, drawn for each batch; its first or second state has a loss too"
    def lengths(self):
        early,late = int(torch.randint(1, 3, ())),int(torch.randint(3, 9, ()))
        return dict(steps=late, supervise=(early, late))


class JointPair(RandomPair, Joint):
    "Both"


def likeness(early, late, target):
    "Loss of a prediction against a later one, query by query; the later one is a constant"
    logits,boxes = late.logits.detach(),late.boxes.detach()
    goal = logits.sigmoid()                                        # (B,N,K)
    weight = torch.maximum(goal, early.logits.detach().sigmoid())
    cls = weight*F.binary_cross_entropy_with_logits(early.logits, goal, reduction='none')
    side = target.size.flip(-1).repeat(1, 2)[:, None]              # (B,1,4)
    l1 = ((early.boxes - boxes)/side).abs().sum(-1)                # (B,N)
    apart = 1 - giou(upright(early.boxes), upright(boxes))         # (B,N)
    n = (target.labels >= 0).sum().clamp(min=1)
    live = goal.amax(-1).square()                                  # (B,N) boxes of objects count
    return (cls.sum() + (live*(5*l1 + 2*apart)).sum())/n


class Consistent(Ours):
    "Early states of the path are taught by its last one, not by the truth"
    def loss(self, images, sizes, target):
        state,feats = self.net.start(images, sizes)
        preds = self.net.decoder(state, feats)
        first,*early,late = preds
        loss = self.criterion([first, late], target)
        loss = loss + sum(likeness(p, late, target) for p in early)
        return loss + denoising_loss(self.net, feats, sizes, target, loss=self.criterion)


# ---- measuring

def score(rows, dataset):
    "COCO's AP, AP50, AP75"
    result = coco_ap(rows, dataset, images=sorted({r['image_id'] for r in rows}))
    return {k: float(result[k]) for k in ('AP', 'AP50', 'AP75')}


def rows_of(pred, sizes, target):
    "Detections of a batch in pixels of the original images"
    found = decode(pred)
    boxes = to_original(found.boxes, (sizes/target.orig).flip(-1))
    return [dict(image_id=int(i), boxes=b, scores=s, labels=l)
            for i,b,s,l in zip(target.image_id, boxes, found.scores, found.labels)]


def by_applications(detector, dls, method):
    "AP, loss and median residual by applications of f"
    decoder = detector.net.decoder
    rows,losses = ({t: [] for t in TIMES} for _ in range(2))
    traces = []
    for images,sizes,target in dls.valid:
        state,feats = detector.net.start(images, sizes)
        sol = decoder.solve(state, feats, method=method, max_iter=max(TIMES), keep=TIMES, record=True)
        for t in TIMES:
            pred = decoder.step.read(sol.kept[t])
            rows[t] += rows_of(pred, sizes, target)
            losses[t].append(float(detector.criterion([pred], target)))
        traces.append(sol.trace.rel)
    residual = torch.cat(traces, 1).amax(-1).median(1).values # (T,)
    return dict(by_applications={t: score(r, dls.valid.dataset) for t,r in rows.items()},
                loss={t: sum(v)/len(v) for t,v in losses.items()}, residual=residual.tolist())


def parts_of(detector, batch, n=LENGTH):
    "Quartiles of the learned parts, of content and box, by applications: of queries with a score of .3 and of the others"
    decoder,found = detector.net.decoder,[]
    state,feats = detector.net.start(*batch[:2])
    hook = decoder.pace.net.register_forward_hook(lambda m, x, y: found.append(1 + y.tanh()))
    z = decoder.solve(state, feats, method=decoder.pace, max_iter=n + 1).z
    hook.remove()
    live = decoder.step.read(z).logits.sigmoid().amax(-1) > .3 # (B,N)
    at = torch.tensor([.25, .5, .75])
    spread = lambda v: v.quantile(at, 0).T.tolist() if len(v) else None
    return [dict(objects=spread(a[live]), others=spread(a[~live])) for a in found]


def cost(detector, batch, rounds):
    "Milliseconds of the processor for an image, in turns: of the decoder with as many applications, and of the whole detector"
    net,decoder = detector.net,detector.net.decoder
    images,sizes,_ = batch
    state,feats = net.start(images, sizes)
    ways = {'Picard': Picard(), 'learned': decoder.pace}
    options = dict(max_iter=LENGTH)
    decoders = {k: lambda m=m: decoder.solve(state, feats, method=m, **options) for k,m in ways.items()}
    whole = {k: lambda m=m: net.predict(images, sizes, method=m, **options) for k,m in ways.items()}
    def per_image(fns):
        times = alternate(fns, rounds, clock=time.process_time)
        return {k: dict(ms=1e3*v['median']/len(sizes), ratio=v['ratio']) for k,v in times.items()}
    return dict(decoder=per_image(decoders), detector=per_image(whole))


@torch.no_grad()
def measure(detector, dls, average, steps=()):
    "What stands in an entry, of the average of weights"
    average.swap()
    net = detector.net.eval()
    pace = getattr(net.decoder, 'pace', None)
    found = by_applications(detector, dls, pace or Picard())
    if pace is not None:
        batch = next(iter(dls.valid))
        found |= dict(picard=by_applications(detector, dls, Picard()), parts=parts_of(detector, batch),
                      cost=cost(detector, batch, detector.rounds), solver=sum(p.numel() for p in pace.parameters()))
    if detector.file: torch.save(net.state_dict(), detector.file)
    net.train()
    average.swap()
    return found | dict(found['by_applications'][LENGTH], seconds=detector.seconds, init=detector.init)


train = own_data.train

def timed(detector, dls, args):
    "`own_data.train`; the detector keeps the processor's seconds of an update"
    if args.init: detector.net.load_state_dict(torch.load(args.init), strict=False) # a solver begins as Picard
    begun = time.process_time()
    n,average = train(detector, dls, args)
    detector.init = Path(args.init).name
    detector.seconds = (time.process_time() - begun)/n
    detector.rounds = args.rounds
    detector.file = Path(args.weights)/f'{args.set}_{args.kind}_{args.seed}.pt' if args.weights else None
    return n, average


def supervised(*states, kind=LITE): return partial(kind, strategy=replace(STRATEGY, supervise=states))


own_data.KINDS = {
    'deqdet_lite': LITE,
    'two_states': supervised(2, 4),
    'joint': supervised(2, 4, kind=partial(Joint, 'deqdet_lite')),
    'random_steps': partial(RandomSteps, 'deqdet_lite'),
    'three_states': supervised(1, 2, 4),
    'joint_three': supervised(1, 2, 4, kind=partial(Joint, 'deqdet_lite')),
    'joint_content': supervised(1, 2, 4, kind=partial(Joint, 'deqdet_lite', grad=RAG(1))), # the parts of boxes stay at 1
    'random_pair': partial(RandomPair, 'deqdet_lite'),
    'consistent': supervised(1, 2, 4, kind=partial(Consistent, 'deqdet_lite')),
    'joint_pair': partial(JointPair, 'deqdet_lite')}


if __name__=='__main__':
    own_data.train = timed
    own_data.measure = measure
    own_data.main(kinds=','.join(own_data.KINDS), class_lr=4., weights='', init='')
