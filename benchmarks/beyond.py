"""Ideas beyond the paper, one at a time on the recipe of `deqdet_lite`, after the same number of updates.

    export DEQDET_DATA=...   # holds bccd, cards, deeppcb, raccoon
    python benchmarks/beyond.py --all --updates 120 --sets cards --out nbs/results/beyond.json

Cells, sets and options are those of own_data.py; the same command goes on where it was stopped."""
import math
from dataclasses import dataclass, replace
from functools import partial
import torch
from torch import nn
from torchvision.transforms.v2.functional import resize
import own_data
from acceleration import First, Remembered
from deqdet.boxes import iof, pairs
from deqdet.decoder import position_embedding
from deqdet.equilibrium import RAG, Perturb
from deqdet.sets.mosaic import mosaic
from deqdet.training.contraction import jacobian, prolonged, stretch
from deqdet.training.denoise import steps_of
from deqdet.zoo import published
from dense import FirstBoxes, dense_head, dense_loss
from own_data import KINDS, LITE, Ours, queries

STRATEGY = published('deqdet_lite').hyper.strategy


class RandomSteps(Ours):
    "The path has between 1 and 8 applications, drawn for each batch"
    def lengths(self):
        "What changes in the plan"
        steps = int(torch.randint(1, 9, ()))
        return dict(steps=steps, supervise=(steps,))

    def loss(self, images, sizes, target):
        decoder = self.net.decoder
        trained = decoder.plan
        decoder.plan = replace(trained, **self.lengths())
        loss = super().loss(images, sizes, target)
        decoder.plan = trained
        return loss


class RandomGrad(RandomSteps):
    "One to three applications behind each gradient, drawn for each batch"
    def lengths(self): return dict(grad=RAG(int(torch.randint(1, 4, ()))))


class SometimesEarly(RandomSteps):
    "In half of the batches, the first or the second state has a loss too"
    def lengths(self):
        if torch.rand(()) < .5: return {}
        return dict(supervise=(int(torch.randint(1, 3, ())), self.net.decoder.plan.steps))


class Mosaics(Ours):
    "Half of the batches are mosaics of four images, except in the last 30 % of the training"
    def loss(self, images, sizes, target):
        batch = images, sizes, target
        if self.part < .7 and torch.rand(()) < .5: batch = mosaic(batch)
        return super().loss(*batch)


class Growing(Ours):
    "Images are smaller in the first part of the training"
    def __init__(self, *args, scale=.7, until=.6, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.until = scale, until

    def loss(self, images, sizes, target):
        if self.part < self.until: images, sizes, target = shrunk(images, sizes, target, self.scale)
        return super().loss(images, sizes, target)


def shrunk(images, sizes, target, scale):
    "A batch at a part of its size"
    fed = (sizes*scale).round().long()
    part = (fed/sizes).flip(-1).repeat(1, 2)[:, None]  # (B,1,4) of x, y, x, y
    side = [32*math.ceil(n*scale/32) for n in images.shape[-2:]]
    small = images.new_zeros(*images.shape[:2], *side)
    for new,image,(h,w),(h1,w1) in zip(small, images, sizes.tolist(), fed.tolist()):
        new[:, :h1, :w1] = resize(image[:, :h, :w], [h1, w1])
    return small, fed, target._replace(boxes=target.boxes*part, size=fed)


class Late(Ours):
    "In a quarter of the batches the path goes on to a late state, which gets a loss too"
    def loss(self, images, sizes, target):
        decoder = self.net.decoder
        trained = decoder.plan
        if torch.rand(()) < .25: decoder.plan = prolonged(trained, int(torch.randint(8, 17, ())))
        loss = super().loss(images, sizes, target)
        decoder.plan = trained
        return loss


class Contracted(Ours):
    "A penalty on the step at the last state of the path, in every batch or in one of `every`"
    def __init__(self, *args, penalty=stretch, weight=.1, every=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty,self.weight = penalty,weight
        self.every = every
        self.n = 0 # batches so far
        self.net.decoder.step.register_forward_hook(self.keep)

    def keep(self, step, args, fz):
        if step.training and torch.is_grad_enabled(): self.call = *args, fz

    def loss(self, images, sizes, target):
        step = self.net.decoder.step
        state, feats = self.net.start(images, sizes)
        loss = self.criterion(self.net.decoder(state, feats), target)
        self.n += 1
        if self.n % self.every==0:
            z,read,fz = self.call
            loss = loss + self.weight*self.penalty(lambda z: step(z, read), z, fz)
        if not self.denoise: return loss
        return loss + own_data.denoising_loss(self.net, feats, sizes, target, loss=self.criterion)


class RandomContracted(RandomSteps, Contracted):
    "Both"


class Sized(Ours):
    "First boxes as large as the median object of the set"
    def __init__(self, name, vocab, args, **overrides):
        usual = dict(grid=published(name).hyper.grid)
        rows,cols,_ = (usual | queries(name, args.queries))['grid']
        super().__init__(name, vocab, args, grid=(rows, cols, args.side), **overrides)


class SizedRandom(RandomSteps, Sized):
    "Both"


class Damped(Ours):
    """The path begins with a part of the first move; the part is learned with the step.

    The state after it, and one application, is supervised too: its gradient reaches the part."""
    def __init__(self, *args, learn=True, start=.75, **kwargs):
        super().__init__(*args, **kwargs)
        decoder = self.net.decoder
        decoder.damp = nn.Parameter(torch.tensor(start if learn else 1.), requires_grad=learn)
        decoder.path = self.path

    def first(self, z, feats):
        "The state after the damped first move"
        with torch.no_grad(): fz = self.net.decoder.step(z, feats)
        a = self.net.decoder.damp
        return type(z)(*[p + a*(q-p) for p,q in zip(z, fz)])

    def path(self, z, feats):
        "[state after the first move, state at the end]"
        decoder = self.net.decoder
        z1 = self.first(z, feats)
        late = type(z1)(*[p.detach() for p in z1])
        noise = decoder.plan.perturb
        with torch.no_grad():
            for _ in range(decoder.plan.steps - 1): late = decoder.step(noise(late), feats)
        return [z1, late]

    def detect(self, *args, **kwargs):
        part = self.net.decoder.damp.item() - 1
        return super().detect(*args, method=First(part, part), **kwargs)


class DenseHead(Ours):
    "A dense head of torchvision's FCOS on the neck, whose loss is added"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net.dense = dense_head(len(self.net.vocab), 128)

    def loss(self, images, sizes, target):
        state, feats = self.net.start(images, sizes)
        own = self.criterion(self.net.decoder(state, feats), target)
        noisy = own_data.denoising_loss(self.net, feats, sizes, target, loss=self.criterion)
        return own + noisy + dense_loss(self.net.dense, feats, images, target)


class Proposed(DenseHead):
    "The dense head, whose best boxes are further first boxes"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net.queries = FirstBoxes(self.net.queries, self.net.dense)


@dataclass(frozen=True)
class LookTwice:
    """Two applications with gradient; that of the last box reaches the move before it too.

    A step detaches the boxes that it moves. The box before is added again without a change of the value."""
    def __call__(self, f, z):
        z = f(z)
        fz = f(z)
        return fz._replace(xyzr=fz.xyzr + (z.xyzr - z.xyzr.detach()))


class Groups(Ours):
    "A second group of queries between those of the grid, in which each object belongs to three"
    def loss(self, images, sizes, target, copies=3):
        state, feats = self.net.start(images, sizes)
        loss = self.criterion(self.net.decoder(state, feats), target)
        loss = loss + own_data.denoising_loss(self.net, feats, sizes, target, loss=self.criterion)
        second = self.between(state, sizes)
        copies = max(1, min(copies, second.boxes.shape[1]//target.labels.shape[1]))
        boxes = target.boxes.repeat(1, copies, 1)
        labels = target.labels.repeat(1, copies)
        return loss + self.criterion(self.net.decoder(second, feats), target._replace(boxes=boxes, labels=labels))

    def between(self, state, sizes):
        "The first state with each box moved by half a cell of the grid"
        rows,cols,_ = self.net.hyper.grid
        half = (sizes/sizes.new_tensor([rows, cols])/2).flip(-1).repeat(1, 2) # (B,4) of x, y, x, y
        return self.net.queries.state.at(state.content, state.boxes + half[:, None])


class LowRank(nn.Sequential):
    "A linear layer's best approximation by two layers, the first of which has few outputs"
    def __init__(self, layer, rank):
        n_out,n_in = layer.weight.shape
        super().__init__(nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out))
        self.out_features = n_out
        down,up = self
        U,S,V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        root = S[:rank].sqrt()
        with torch.no_grad():
            down.weight.copy_(root[:, None]*V[:rank])
            up.weight.copy_(U[:, :rank]*root)
            up.bias.copy_(layer.bias)


class Light(Ours):
    "The two large layers of adaptive mixing have a low rank"
    def __init__(self, *args, rank=32, **kwargs):
        super().__init__(*args, **kwargs)
        for step in steps_of(self.net.decoder): lighten(step.mixing, rank)


def lighten(mixing, rank):
    "Both large layers of adaptive mixing, at a low rank"
    mixing.params = LowRank(mixing.params, rank)
    mixing.out = LowRank(mixing.out, rank)


class SeldomAttention(Ours):
    "Attention among queries in every second application of f; between them, its last result is used"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        decoder = self.net.decoder
        self.talk = decoder.step.talk = Remembered(decoder.step, 2)
        decoder.init.register_forward_hook(self.restart)

    def restart(self, *_): self.talk.n = 0

    def loss(self, images, sizes, target):
        decoder = self.net.decoder
        trained = decoder.plan
        steps = trained.steps - int(torch.randint(2, ()))          # the step with gradient has attention, or has not
        decoder.plan = replace(trained, steps=steps, supervise=(steps,))
        loss = super().loss(images, sizes, target)
        decoder.plan = trained
        return loss


def some_rows(layer, rows):
    "A linear layer with some of the outputs of another"
    less = type(layer)(layer.in_features, len(rows))
    with torch.no_grad():
        less.weight.copy_(layer.weight[rows])
        less.bias.copy_(layer.bias[rows])
    return less


def keep_points(step, keep):
    "Let a step read only some of the points of each group, with the weights that it has for them"
    G,C,P,O = step.mixing.sizes
    offsets = torch.arange(3*G*P).view(G, P, 3)
    mixed,over = torch.arange(G*(C*C + O*P)).view(G, -1).split([C*C, O*P], 1)
    over = over.view(G, O, P)[..., keep].flatten(1)                # (G,O*k)
    step.sampler.offsets = some_rows(step.sampler.offsets, offsets[:, keep].flatten())
    step.mixing.params = some_rows(step.mixing.params, torch.cat([mixed, over], 1).flatten())
    step.mixing.sizes = G, C, len(keep), O


def half_of_points(step):
    "Keep every second point of the square, as on a chessboard"
    side = math.isqrt(step.mixing.sizes[2])
    keep_points(step, [side*i + j for i in range(side) for j in range(side) if (i + j)%2==0])


class FewerPoints(Ours):
    "f reads half of the points of g"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        half_of_points(self.net.decoder.step)


class NoInit(Ours):
    "The step makes the first guess too; g is not used"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        decoder = self.net.decoder
        decoder.init = decoder.step


class NoInitProposed(NoInit, Proposed):
    "Both"


class Relation(nn.Module):
    "A bias of attention from places and sizes of two boxes relative to each other; zero at first"
    def __init__(self, heads, waves=4):
        super().__init__()
        self.register_buffer('waves', 2.**torch.arange(waves))
        self.hidden = nn.Linear(8*waves, 32)
        self.out = nn.Linear(32, heads)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, boxes): # (B,N,4) corners; the result is (B,H,N,N)
        angles = relative(boxes)[..., None]*self.waves             # (B,N,N,4,W)
        wave = torch.cat([angles.sin(), angles.cos()], -1)         # (B,N,N,4,2W)
        return self.out(self.hidden(wave.flatten(-2)).relu()).permute(0, 3, 1, 2)


def relative(boxes):
    "Logarithms of distances over sides, and of quotients of sides, (B,N,N,4)"
    low,high = boxes.split(2, -1)
    sides = (high - low).clamp(min=1)[:, :, None]                  # (B,N,1,2)
    centres = ((low + high)/2)[:, :, None]
    far = ((centres - centres.transpose(1, 2)).abs()/sides + 1).log()
    larger = (sides.transpose(1, 2)/sides).log()
    return torch.cat([far, larger], -1)


class Related(Ours):
    "Attention among queries has a learned bias from relations of boxes (Relation-DETR)"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for step in steps_of(self.net.decoder):
            step.relation = Relation(step.attn.heads)
            step.talk = partial(self.talk, step)

    @staticmethod
    def talk(step, q, xyzr, boxes):
        "`MixerStep.talk` with the further bias"
        x = q + position_embedding(xyzr, q.shape[-1])
        overlap = (iof(*pairs(boxes, boxes)) + 1e-7).log()         # (B,N,N)
        bias = step.tau[:, None, None]*overlap[:, None] + step.relation(boxes)
        return step.attn_norm(x + step.attn(x, bias))


IDEAS = {
    **{k: KINDS[k] for k in ('deqdet_lite', 'deqdet_lite_plain', 'deqdet_lite_focal', 'shared_lite', 'adamixer_lite')},
    'rag2': partial(LITE, strategy=replace(STRATEGY, grad=RAG(2))),                   # two applications behind each gradient
    'two_states': partial(LITE, strategy=replace(STRATEGY, supervise=(2, 4))),        # two supervised states of the path
    'rag4': partial(LITE, strategy=replace(STRATEGY, grad=RAG(4))),
    'three_states': partial(LITE, strategy=replace(STRATEGY, supervise=(1, 2, 4))),   # early states too
    'first_and_last': partial(LITE, strategy=replace(STRATEGY, supervise=(1, 4))),
    'no_noise': partial(LITE, strategy=replace(STRATEGY, perturb=None)),              # without RAP
    'random_steps': partial(RandomSteps, 'deqdet_lite'),
    'random_stretch': partial(RandomContracted, 'deqdet_lite'),
    'random_stretch_half': partial(RandomContracted, 'deqdet_lite', weight=.2, every=2),
    'sized': partial(Sized, 'deqdet_lite'),
    'sized_random': partial(SizedRandom, 'deqdet_lite'),
    'random_k': partial(RandomGrad, 'deqdet_lite'),
    'sometimes_early': partial(SometimesEarly, 'deqdet_lite'),
    'deqdet_lite_base': KINDS['deqdet_lite_base'],
    'damped': partial(Damped, 'deqdet_lite'),
    'undamped': partial(Damped, 'deqdet_lite', learn=False),                          # the same supervision
    'mosaic': partial(Mosaics, 'deqdet_lite'),
    'growing': partial(Growing, 'deqdet_lite'),
    'late': partial(Late, 'deqdet_lite'),
    'stretch': partial(Contracted, 'deqdet_lite'),
    'jacobian': partial(Contracted, 'deqdet_lite', penalty=jacobian, weight=1e-5), # its value is in the thousands at first
    'more_noise': partial(LITE, strategy=replace(STRATEGY, perturb=Perturb(.2, 12., .4, .4))), # twice the RAP, twice as often
    'dense_head': partial(DenseHead, 'deqdet_lite'),
    'first_boxes': partial(Proposed, 'deqdet_lite'),
    'look_twice': partial(LITE, strategy=replace(STRATEGY, grad=LookTwice())),
    'groups': partial(Groups, 'deqdet_lite'),
    'no_init': partial(NoInit, 'deqdet_lite'),
    'no_init_first_boxes': partial(NoInitProposed, 'deqdet_lite'),
    'related': partial(Related, 'deqdet_lite'),
    'seldom_attention': partial(SeldomAttention, 'deqdet_lite'),
    'fewer_points': partial(FewerPoints, 'deqdet_lite'),
    'light': partial(Light, 'deqdet_lite')}
own_data.KINDS = IDEAS


if __name__=='__main__': own_data.main(kinds=','.join(own_data.KINDS), class_lr=4.)
