"""AP on real sets after some minutes of one core: our detectors and torchvision's on the same body, loaders and schedule.

Each cell (set, detector, minutes, seed, optimiser) is a process of its own and one entry of the JSON; what stands there is
not run again, so the same command goes on where it was stopped:

    export DEQDET_DATA=...   # holds bccd, cards, deeppcb, raccoon
    python benchmarks/own_data.py --all --minutes 3 --out nbs/results/own_data.json

Minutes are processor minutes of training; evaluation is not counted. With `--updates N` a training ends after N updates
instead, which compares ways of teaching whatever else the machine does; `--curve 1,2,5` measures AP after these epochs too, `--at 1,5,20`
after these refinement steps, `--nms .7` that without doubles, `--mean 3` that with the mean of the states after three applications:

    python benchmarks/own_data.py --all --updates 120 --seeds 2 --sets bccd,cards --out nbs/results/own_data.json \
        --kinds deqdet_lite,deqdet_lite_focal,deqdet_lite_plain,deqdet_lite_base,deqdet_lite_scratch

The body is EfficientNet-Lite0 from ImageNet for all, BatchNorm on stored statistics, `--frozen` stages without learning, the
rest at a tenth of the rate. The class layer of our detectors, which begins afresh, has four times the rate (`--class-lr`);
torchvision's learn best with one rate for all. Warm-up 5 %, cosine, moving average."""
import argparse, json, os, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7
from deqdet.backbone import create_body
from deqdet.data import det_dls
from deqdet.evaluate import coco_ap
from deqdet.families.adopt import with_queries
from deqdet.loss import SetLoss
from deqdet.model import Feed
from deqdet.ops.averaging import Averaged
from deqdet.ops.files import finite
from deqdet.sets.augment import feed_tfm
from deqdet.sets.sizes import fed_sides, queries_for
from deqdet.training.denoise import denoising_loss
from deqdet.training.minutes import clock_factor
from deqdet.training.optim import Muon
from deqdet.training.quality import with_overlap
from deqdet.using.tiles import suppress
from deqdet.zoo import create_detector, published
from common import commit, machine, parser

STEPS = 1, 2, 3, 5, 10, 20, 40 # at which AP is measured
SETS = 'bccd', 'cards', 'deeppcb', 'raccoon'
BODY = 'tf_efficientnet_lite0'


# ---- detectors: a module, its loss on a batch, its detections in original pixels

class Ours:
    "A detector of the zoo"
    clip = 1.

    def __init__(self, name, vocab, args, start=True, denoise=True, overlap=True, **overrides):
        self.denoise = denoise
        changes = dict(frozen_stages=args.frozen, **queries(name, args.queries)) | overrides
        self.net = create_detector(name, vocab=vocab, pretrained=True, start=start, **changes)
        self.criterion = with_overlap(SetLoss()) if overlap else SetLoss()

    def loss(self, images, sizes, target):
        "The main loss, and the denoising loss on the same features"
        state, feats = self.net.start(images, sizes)
        loss = self.criterion(self.net.decoder(state, feats), target)
        if not self.denoise: return loss
        return loss + denoising_loss(self.net, feats, sizes, target, loss=self.criterion)

    def detect(self, images, sizes, target, nms=None, **kwargs):
        found = self.net.predict(images, sizes, orig=target.orig, **kwargs)
        return [suppress(d, nms) for d in found]


def queries(name, n):
    "Fields of a record with `n` queries, where that is more than it has"
    hyper = published(name).hyper
    if n <= hyper.n_queries: return {}
    more = with_queries(hyper, n)
    return dict(n_queries=more.n_queries, grid=more.grid)


class FPN(nn.Module):
    "The body's levels from stride 8 on, and torchvision's feature pyramid"
    def __init__(self, frozen, width=128, extra=True):
        super().__init__()
        self.body = create_body(BODY, pretrained=True, frozen_stages=frozen)
        self.out_channels = width
        top = LastLevelP6P7(width, width) if extra else None
        self.fpn = FeaturePyramidNetwork(self.body.channels[1:], width, top)

    def forward(self, x):
        levels = self.body(x)[1:]
        return self.fpn({str(i): f for i,f in enumerate(levels)})


def anchors(levels=5):
    "RetinaNet's anchors"
    sizes = [(s, int(s*2**(1/3)), int(s*2**(2/3))) for s in (32, 64, 128, 256, 512)]
    return AnchorGenerator(tuple(sizes[:levels]), ((.5, 1., 2.),)*levels)


def retinanet_v2(body, n_classes, **kwargs):
    "RetinaNet with what torchvision's second version of it has: groups are normalised in its head, boxes learn by GIoU"
    boxes = anchors()
    head = RetinaNetHead(body.out_channels, boxes.num_anchors_per_location()[0], n_classes, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = 'giou'
    return RetinaNet(body, n_classes, anchor_generator=boxes, head=head, **kwargs)


def peer(kind, n_classes, size, frozen):
    "One of torchvision's detectors on our body"
    common = dict(min_size=size, max_size=size, image_mean=[.5]*3, image_std=[.5]*3, _skip_resize=True)
    if kind=='fcos': return FCOS(FPN(frozen), n_classes, **common)
    if kind=='retinanet': return RetinaNet(FPN(frozen), n_classes, anchor_generator=anchors(), **common)
    if kind=='retinanet_v2': return retinanet_v2(FPN(frozen), n_classes, **common)
    generator = AnchorGenerator(((32,), (64,), (128,)), ((.5, 1., 2.),)*3)
    roi = dict(box_roi_pool=_pooler())
    return FasterRCNN(FPN(frozen, extra=False), n_classes + 1, rpn_anchor_generator=generator, **roi, **common)


def _pooler():
    from torchvision.ops import MultiScaleRoIAlign
    return MultiScaleRoIAlign(['0', '1', '2'], 7, 2)


class Peer:
    "A detector of torchvision"
    clip = 10.

    def __init__(self, kind, vocab, args):
        self.net = peer(kind, len(vocab), args.size, args.frozen)
        self.first = int(kind=='faster_rcnn') # its class 0 is the background

    def lists(self, images, sizes):
        return [x[:, :h, :w].float()/255 for x,(h,w) in zip(images, sizes.tolist())]

    def loss(self, images, sizes, target):
        keep = [l >= 0 for l in target.labels]
        truth = [dict(boxes=b[k], labels=l[k] + self.first) for b,l,k in zip(target.boxes, target.labels, keep)]
        return sum(self.net(self.lists(images, sizes), truth).values())

    def detect(self, images, sizes, target):
        found = []
        for d,fed,orig in zip(self.net(self.lists(images, sizes)), sizes, target.orig):
            scale = (fed/orig).flip(-1).repeat(2)
            found.append(dict(boxes=d['boxes']/scale, scores=d['scores'], labels=d['labels'] - self.first))
        return found


LITE = partial(Ours, 'deqdet_lite')
KINDS = {
    'deqdet_lite': LITE,
    'adamixer_lite': partial(Ours, 'adamixer_lite'),
    'shared_lite': partial(Ours, 'shared_lite'),       # gradients through all applications
    'deqdet_lite_scratch': partial(LITE, start=False), # random neck, queries and decoder
    'deqdet_small': partial(Ours, 'deqdet_small', start=False), # all of it random; --body-lr 1 --frozen 0
    'deqdet_lite_focal': partial(LITE, overlap=False), # class targets of 1
    'deqdet_lite_plain': partial(LITE, denoise=False), # no noisy truth
    'deqdet_lite_base': partial(LITE, denoise=False, overlap=False),
    'fcos': partial(Peer, 'fcos'), 'retinanet': partial(Peer, 'retinanet'), 'retinanet_v2': partial(Peer, 'retinanet_v2'), 'faster_rcnn': partial(Peer, 'faster_rcnn')}


# ---- training

CLASSES = '.cls.3.', 'cls_logits', 'cls_score' # the layer of each detector that knows its classes, and begins afresh


def groups(net, args):
    "The body and the class layer at multiples of the rate; norms and biases do not decay"
    found = {}
    for name,p in net.named_parameters():
        if not p.requires_grad: continue
        decay = 0. if p.ndim < 2 or 'norm' in name else args.wd
        part = args.body_lr if '.body.' in name else 1.
        if any(o in name for o in CLASSES): part = args.class_lr
        found.setdefault((part, decay), []).append(p)
    return [dict(params=ps, part=part, weight_decay=decay) for (part,decay),ps in found.items()]


class Average:
    "A moving average of all weights"
    def __init__(self, net, decay):
        self.decay, self.n = decay, 0
        self.curve = {} # AP by epochs, where that is asked for
        self.live = [v for v in net.state_dict().values() if v.is_floating_point()]
        self.kept = [v.clone() for v in self.live]

    def update(self):
        self.n += 1
        torch._foreach_lerp_(self.kept, self.live, 1 - min(self.decay, (1 + self.n)/(10 + self.n)))

    def swap(self):
        for a,b in zip(self.live, self.kept):
            held = a.clone()
            a.copy_(b)
            b.copy_(held)


def result(detector, dls, **kwargs):
    "COCO's numbers on the validation images"
    preds = []
    for images,sizes,target in dls.valid:
        found = detector.detect(images, sizes, target, **kwargs)
        preds += [dict(d, image_id=i) for i,d in zip(target.image_id.tolist(), found)]
    return coco_ap(preds, dls.valid.dataset)


def numbers(result): return {k: float(result[k]) for k in ('AP', 'AP50', 'AP75')}


def ap(detector, dls, **kwargs):
    "AP, AP50, AP75"
    return numbers(result(detector, dls, **kwargs))


@torch.no_grad()
def measure(detector, dls, average, steps=STEPS, nms=None, mean=None):
    "AP of the average; of our detectors also by the number of refinement steps, and with suppression of doubles, or of the mean of late states"
    average.swap()
    detector.net.eval()
    at_once = result(detector, dls)
    found = dict(numbers(at_once), by_class=at_once.per_class.AP.to_dict())
    if steps and isinstance(detector, Ours):
        found['by_steps'] = {t: ap(detector, dls, steps=t)['AP'] for t in steps}
        if nms: found['by_steps_nms'] = {t: ap(detector, dls, steps=t, nms=nms)['AP'] for t in (*steps, None)}
        if mean: found['by_steps_mean'] = {t: ap(detector, dls, steps=t, method=Averaged(mean))['AP'] for t in steps if t > mean}
    detector.net.train()
    average.swap()
    return found


def train(detector, dls, args):
    "Updates, epochs; the average of weights"
    net = detector.net.train()
    pars = groups(net, args)
    opt = (Muon if args.opt=='muon' else torch.optim.AdamW)(pars, lr=args.lr, weight_decay=args.wd)
    average = Average(net, args.ema)
    learning = [p for g in pars for p in g['params']]
    marks = [int(e) for e in args.curve.split(',') if e]
    n = epoch = 0
    begun = time.process_time()
    def part():
        "How much of the training is over"
        if args.updates: return n/args.updates
        return (time.process_time() - begun)/(60*args.minutes)
    while part() < 1:
        for images,sizes,target in dls.train:
            now = part()
            if now >= 1: break
            detector.part = now # some kinds end with another diet
            for g in opt.param_groups: g['lr'] = args.lr*g['part']*clock_factor(now)
            loss = detector.loss(images, sizes, target)
            opt.zero_grad()
            loss.backward()
            clip_grad_norm_(learning, detector.clip)
            opt.step()
            average.update()
            n += 1
        epoch += 1
        if epoch in marks: average.curve[epoch] = measure(detector, dls, average, steps=())
    return n, average


def run(args):
    "One cell"
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # BCCD has two boxes without width
        folder = Path(os.environ['DEQDET_DATA'])/args.set
        tfms = tuple(feed_tfm(Feed(args.size, args.size), o) for o in (args.augment or 'small', 'none'))
        dls = det_dls(folder, bs=args.bs, tfms=tfms, val_bs=8, num_workers=0, seed=args.seed, rare=args.rare or None)
    args.queries = args.queries or queries_for(dls.train_ds)
    args.side = fed_sides(dls.train_ds, Feed(args.size, args.size)).median().item()/args.size
    detector = KINDS[args.kind](list(dls.vocab), args=args)
    n, average = train(detector, dls, args)
    entry = dict(cell(args), updates_made=n, epochs=n/len(dls.train), lr=args.lr, size=args.size, bs=args.bs)
    entry |= measure(detector, dls, average, steps=[int(t) for t in args.at.split(',')], nms=args.nms or None, mean=args.mean or None)
    if average.curve: entry['by_epochs'] = average.curve
    if isinstance(detector, Ours):
        hyper = detector.net.hyper
        entry |= dict(queries=hyper.n_queries, first_side=hyper.grid[2])
    entry |= dict(parameters=sum(p.numel() for p in detector.net.parameters()), commit=commit(), machine=machine())
    return entry


# ---- cells

KEY = 'set', 'kind', 'minutes', 'updates', 'seed', 'opt', 'lr', 'class_lr', 'frozen', 'rare', 'size', 'augment'
def cell(args):
    "What tells one training from another"
    if not args.class_lr: args.class_lr = 4. if 'lite' in args.kind else 1.
    if args.updates: args.minutes = 0.
    return {k: getattr(args, k) for k in KEY}


def read(file): return json.loads(Path(file).read_text()) if file and Path(file).exists() else []


def same(a, b): return all((a.get(k) or 0)==(b.get(k) or 0) for k in KEY)


def stands(file, want): return any(same(o, want) for o in read(file))


def write(file, entry):
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    others = [o for o in read(file) if not same(o, entry)]
    file.write_text(json.dumps(finite(others + [entry]), indent=1) + '\n')


def run_all(args):
    "Every cell that does not stand in the file, one process after the other"
    for seed in range(args.seeds):
        for name in args.sets.split(','):
            for kind in args.kinds.split(','):
                one = argparse.Namespace(**vars(args) | dict(seed=seed, set=name, kind=kind))
                if stands(one.out, cell(one)): continue
                options = [f'--{k.replace("_", "-")}={v}' for k,v in vars(one).items() if k not in ('all', 'rounds')]
                subprocess.run([sys.executable, '-W', 'ignore', sys.argv[0], *options], check=False)


def main(**defaults):
    "Run what the command line says; keywords are other defaults"
    p = parser(__doc__, **dict(set='bccd', kind='deqdet_lite', minutes=3., seed=0, opt='muon', lr=2.5e-3, body_lr=.1, class_lr=0., updates=0, frozen=3, wd=.1, ema=.99,
               size=320, augment='', bs=4, queries=0, rare=0., nms=0., mean=0, seeds=1, curve='', at=','.join(map(str, STEPS)), sets=','.join(SETS), kinds=','.join(KINDS)) | defaults)
    p.add_argument('--all', action='store_true', help='every set and every detector')
    args = p.parse_args()
    if args.all: return run_all(args)
    if stands(args.out, cell(args)): return print('stands in', args.out)
    entry = run(args)
    print(json.dumps({k: v for k,v in entry.items() if k != 'machine'}), flush=True)
    if args.out: write(args.out, entry)


if __name__=='__main__': main()
