"""The gradient of weighted sums of rows, by rows (`deqdet.ops.bags`) and as PyTorch computes it

    python benchmarks/bags.py --out benchmarks/results/bags.json

Numbers are ratios: the time by rows over PyTorch's, median over rounds in which both take turns. `sums` is forward and
backward pass of the reads of `deqdet_lite` (four images of 320 pixels, 100 queries), `published` of DEQDet's (one image
of 800 x 1216). `update` is a training update of `deqdet_lite` with three frozen stages and noisy
truth, without the optimiser, on random images; it needs the extra `lite`."""
from time import process_time
import torch
import torch.nn.functional as F
from common import alternate, parser, report
from deqdet import mixing
from deqdet.data import Target
from deqdet.loss import SetLoss
from deqdet.mixing import four_cells
from deqdet.ops.bags import weighted_sums
from deqdet.training.denoise import denoising_loss
from deqdet.zoo import create_detector

SHAPES = dict(sums=(4, 100, 16, 32, (320, 320), (8, 16, 32)), published=(1, 100, 32, 64, (800, 1216), (4, 8, 16, 32)))


def plain(rows, table, weight): return F.embedding_bag(rows, table, per_sample_weights=weight, mode='sum')


def reads(B, N, P, C, size, strides, G=4):
    "Rows, table and weights as boxes all over the images read them"
    cells,weights,n = [],[],0
    spots = torch.rand(2, B, N, 1, 1) + .2*torch.randn(2, B, N, G, P) # of an image
    for s in strides:
        wide,high = size[1]//s, size[0]//s
        at = spots*torch.tensor([wide, high]).view(2, 1, 1, 1, 1)
        c,w = four_cells(at, torch.tensor([wide, high]).view(2, 1, 1, 1, 1), torch.rand(B, N, G, P), n)
        cells.append(c)
        weights.append(w)
        n += wide*high
    cells,weights = (torch.cat(o).movedim(0, -1) for o in (cells, weights)) # (B,N,G,P,K)
    image,group = torch.arange(B).view(-1, 1, 1, 1, 1), torch.arange(G).view(-1, 1, 1)
    rows = (image*n*G + cells*G + group).flatten(0, -2).int()
    return rows, torch.randn(B*n*G, C, requires_grad=True), weights.flatten(0, -2).requires_grad_()


def both(given):
    "Forward and backward pass by either"
    grad = torch.randn(len(given[0]), given[1].shape[1])
    def run(f): return lambda: torch.autograd.grad(f(*given), given[1:], grad)
    return dict(plain=run(plain), rows=run(weighted_sums))


def update():
    "A callable by either: loss and gradients of a batch"
    model = create_detector('deqdet_lite', vocab=list('abcdef'), pretrained=True, frozen_stages=3).train()
    images = torch.randint(256, (4, 3, 320, 320), dtype=torch.uint8)
    sizes = torch.full((4, 2), 320)
    corner = 200*torch.rand(4, 3, 2)
    boxes = torch.cat([corner, corner + 20 + 100*torch.rand(4, 3, 2)], -1)
    target = Target(boxes, torch.zeros(4, 3).long(), sizes, torch.arange(4))
    loss = SetLoss()
    def run(f):
        def go():
            mixing.weighted_sums = f
            state,feats = model.start(images, sizes)
            total = loss(model.decoder(state, feats), target) + denoising_loss(model, feats, sizes, target, loss=loss)
            total.backward()
        return go
    return dict(plain=run(plain), rows=run(weighted_sums))


def main():
    args = parser(__doc__.splitlines()[0], rounds=15).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    found = {k: alternate(both(reads(*o)), args.rounds, clock=process_time) for k,o in SHAPES.items()}
    found['update'] = alternate(update(), args.rounds, clock=process_time)
    report({k: t['rows']['ratio'] for k,t in found.items()}, args.out)


if __name__=='__main__': main()
