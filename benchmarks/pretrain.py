"""Train neck, queries and decoder of `deqdet_lite` on generated scenes, its ImageNet body frozen.

    python benchmarks/pretrain.py --minutes 76 --stream 1 --out deqdet/weights/deqdet_lite.safetensors
    python benchmarks/pretrain.py --minutes 72 --stream 2 --begin yes --overlap .75 --lr 2e-3 --run runs/second \
        --out deqdet/weights/deqdet_lite.safetensors
    python benchmarks/pretrain.py --minutes 75 --stream 3 --begin yes --overlap .75 --lr 2e-3 --siblings .5 --run runs/third \
        --out deqdet/weights/deqdet_lite.safetensors
    python benchmarks/pretrain.py --minutes 66 --stream 4 --begin yes --overlap .75 --lr 2e-3 --siblings .5 --denoise 60 \
        --early 2 --run runs/fourth --out deqdet/weights/deqdet_lite.safetensors
    python benchmarks/pretrain.py --minutes 85 --stream 5 --begin yes --overlap .75 --lr 2e-3 --siblings .5 --denoise 60 \
        --early 2 --late .25 --run runs/fifth --out runs/fifth/deqdet_lite.safetensors

The first command starts from random weights. The others go on from what the package holds (`--begin`), with other scenes
(`--stream`) and class targets that grow with the overlap. In the third, half of the scenes show classes that differ only
in a detail (`--siblings`). Their rows of the class layers are not written: the file names the 60 kinds. In the fourth, g and
f also refine noisy truth, up to 60 states of an image (`--denoise`), and the loss on the end of the path has one application
behind it instead of two, for the first or the second state has a loss too (`--early`). In the fifth, a quarter of the paths
go on to a state between the 8th and the 20th, which has a loss too (`--late`). The package holds the result of the fourth: the
fifth gained nothing after four minutes on own images.

Each scene is drawn once, by a process beside the one that trains. The state is saved every 200 updates in --run, and the
same command goes on from there. The file holds the moving average of the weights, in half precision, without the body. `--name adamixer_lite` trains the stack instead."""
import json, math, os, time
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, IterableDataset
from deqdet.equilibrium import RAG, Settled
from deqdet.families.start import object_row, start_file, start_note
from deqdet.loss import SetLoss
from deqdet.sets.images import Target
from deqdet.sets.scenes import KIND_NAMES, scene
from deqdet.sets.siblings import SIBLING_NAMES, sibling_scene
from deqdet.training.contraction import prolonged
from deqdet.training.denoise import denoising_loss
from deqdet.training.optim import Muon
from deqdet.training.quality import with_overlap
from deqdet.zoo import create_detector, published
from common import commit, machine, parser

SIDES = 192, 224, 256, 256, 288, 320
WARMUP = 100 # updates
LATE = 8, 21 # applications of a path that goes on


def drawn(rng, height, side, siblings):
    "A scene, a part `siblings` of which show families of alike classes"
    alike = siblings and rng.random() < siblings
    return (sibling_scene if alike else scene)(rng, height, side)


def batch(i, bs, stream=1, siblings=0.):
    "Images (bs,3,h,w) and their `Target`: batch number `i` of a stream"
    rng = np.random.default_rng((stream, i))
    side = int(rng.choice(SIDES))
    height = int(side*.75)//32*32 if rng.random() < .4 else side
    scenes = [drawn(rng, height, side, siblings) for _ in range(bs)]
    most = max(1, *(len(labels) for *_,labels in scenes))
    images = torch.from_numpy(np.stack([img for img,*_ in scenes])).permute(0, 3, 1, 2)
    boxes = torch.zeros(bs, most, 4)
    labels = torch.full((bs, most), -1)
    for j,(_,b,l) in enumerate(scenes):
        boxes[j, :len(l)] = torch.from_numpy(b)
        labels[j, :len(l)] = torch.from_numpy(l)
    size = torch.tensor([height, side]).expand(bs, 2)
    return images, Target(boxes, labels, size, torch.arange(bs), size)


class Stream(IterableDataset):
    "Batches that never repeat"
    def __init__(self, start, args): self.start, self.args = start, args

    def __iter__(self):
        torch.set_num_threads(1)
        i = self.start
        while True:
            yield tuple(batch(i, self.args.bs, self.args.stream, self.args.siblings))
            i += 1


def groups(model, wd):
    "Parameters that learn: norms and biases do not decay"
    named = [(n, p) for n,p in model.named_parameters() if p.requires_grad]
    plain = [p for n,p in named if 'norm' in n or 'bias' in n]
    decayed = [p for n,p in named if not ('norm' in n or 'bias' in n)]
    return [dict(params=decayed, weight_decay=wd), dict(params=plain, weight_decay=0.)]


@torch.no_grad()
def object_rows(model, bs, batches=12):
    "For the class towers of g and f: the row that says whether there is an object, from scenes that were not trained on"
    seen = dict(init=[], step=[])
    for i in range(batches):
        images, target = batch(10**6 + i, bs)
        path = model.eval().trajectory(images, target.size)
        for j,(state,_) in enumerate(path):
            part = 'step' if j else 'init'
            tower = getattr(model.decoder, part).cls
            hidden = tower[:-1](state.content).flatten(0, 1)
            seen[part].append((hidden, tower[-1](hidden)))
    rows = {}
    for part,pairs in seen.items():
        weight, bias = object_row(*map(torch.cat, zip(*pairs)))
        rows |= {f'decoder.{part}.cls.object.weight': weight, f'decoder.{part}.cls.object.bias': bias}
    return rows


def features(model, images, size):
    "Those of the neck; nothing is kept of the frozen body"
    pyramid = model.pyramid
    with torch.no_grad():
        x = pyramid.normalize(images, size).contiguous(memory_format=torch.channels_last)
        levels = pyramid.body(x)
    return tuple(f.contiguous(memory_format=model.layout) for f in pyramid.neck(levels))


@torch.no_grad()
def keep_rows(model, file):
    "Give the first classes of a detector the rows that a start file has of them"
    own = model.state_dict()
    for k,v in load_file(file).items():
        if '.cls.3.' in k: own[k][:len(v)] = v


def strategy(args):
    "The equilibrium is trained with two applications behind each gradient, or one if early states have a loss; one more on the first guess"
    own = published(args.name).hyper.strategy
    grad = RAG(1 if args.early else 2)
    return dict(strategy=replace(own, init_steps=1, grad=grad)) if isinstance(own, Settled) else {}


class Run:
    "Model, optimiser, moving average, and where they are in time"
    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args = args
        vocab = KIND_NAMES + SIBLING_NAMES if args.siblings else KIND_NAMES
        self.model = create_detector(args.name, vocab=vocab, pretrained=args.body or True, start=bool(args.begin), **strategy(args)).train()
        self.plan = self.model.decoder.plan
        if args.begin: keep_rows(self.model, start_file(args.name))
        self.model.pyramid.body.requires_grad_(False)
        self.opt = Muon(groups(self.model, .1), lr=args.lr, weight_decay=.1)
        self.loss = with_overlap(SetLoss(), args.overlap) if args.overlap else SetLoss()
        self.average = {k: v.clone() for k,v in self.model.state_dict().items() if '.body.' not in k}
        self.n, self.spent = 0, 0.
        self.before = int(start_note(start_file(args.name))['updates']) if args.begin else 0 # updates
        self.file = Path(args.run)/'state.pt'
        if self.file.exists(): self.load()

    def save(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = dict(model=self.model.state_dict(), opt=self.opt.state_dict(), ema=self.average, n=self.n, spent=self.spent)
        torch.save(state, f'{self.file}.tmp')
        os.replace(f'{self.file}.tmp', self.file)

    def load(self):
        s = torch.load(self.file, map_location='cpu', weights_only=True)
        self.model.load_state_dict(s['model'])
        self.opt.load_state_dict(s['opt'])
        self.average, self.n, self.spent = s['ema'], s['n'], s['spent']

    def rate(self):
        "Warm-up, then half a cosine over the minutes"
        part = self.spent/(60*self.args.minutes)
        rise = min(1, (self.n + 1)/WARMUP)
        return self.args.lr*rise*(.02 + .98*(1 + math.cos(math.pi*part))/2)

    def loss_of(self, images, target):
        "The main loss; with `--denoise`, that of noisy truth on the same features too"
        model,size = self.model,target.size
        if self.args.early: self.draw_lengths()
        feats = features(model, images, size)
        loss = self.loss(model.decoder(model.queries(size, feats), feats), target)
        if not self.args.denoise: return loss
        return loss + denoising_loss(model, feats, size, target, loss=self.loss, states=self.args.denoise)

    def draw_lengths(self):
        "Which states have a loss in this update: one of the first `--early`, the last, and in a part `--late` a later one"
        args, decoder = self.args, self.model.decoder
        first = int(torch.randint(1, args.early + 1, ()))
        plan = replace(self.plan, supervise=(first, self.plan.steps))
        is_late = torch.rand(()) < args.late
        decoder.plan = prolonged(plan, int(torch.randint(*LATE, ()))) if is_late else plan

    def update(self, images, target):
        for g in self.opt.param_groups: g['lr'] = self.rate()
        loss = self.loss_of(images, target)
        self.opt.zero_grad()
        loss.backward()
        clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.)
        self.opt.step()
        self.n += 1
        decay = min(.998, (1 + self.n)/(10 + self.n))
        now = self.model.state_dict()
        for k,v in self.average.items():
            if v.is_floating_point(): v.lerp_(now[k], 1 - decay)
        return float(loss)

    def write(self, file):
        "The moving average in half precision"
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.model.load_state_dict(self.average, strict=False)
        tensors = self.average | object_rows(self.model, self.args.bs)
        tensors = {k: v[:len(KIND_NAMES)] if '.cls.3.' in k else v for k,v in tensors.items()}
        half = {k: v.half().contiguous() if v.is_floating_point() else v for k,v in tensors.items()}
        updates = self.n + self.before
        note = dict(name=self.args.name, updates=str(updates), scenes=str(updates*self.args.bs), minutes=str(self.args.minutes),
                    commit=commit(), machine=json.dumps(machine()), vocab=json.dumps(KIND_NAMES))
        save_file(half, file, note)
        print(f'{file}: {file.stat().st_size/1e6:.1f} MB, {self.n} updates')


def main():
    p = parser(__doc__, minutes=85., bs=8, lr=2.5e-3, seed=0, name='deqdet_lite', run='runs/pretrain', body='', begin='', stream=1, overlap=0., siblings=0., denoise=0, early=0, late=0.)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args)
    last, mean = time.monotonic(), None
    for images,target in DataLoader(Stream(run.n, args), batch_size=None, num_workers=1, prefetch_factor=6):
        if run.spent >= 60*args.minutes: break
        loss = run.update(images, Target(*target))
        mean = loss if mean is None else .98*mean + .02*loss
        now = time.monotonic()
        run.spent += min(now - last, 20) # a machine that slept did not train
        last = now
        if run.n%50==0: print(f'{run.n} updates, {run.spent/60:.1f} min, loss {mean:.2f}', flush=True)
        if run.n%200==0: run.save()
    run.save()
    if args.out: run.write(args.out)


if __name__=='__main__': main()
