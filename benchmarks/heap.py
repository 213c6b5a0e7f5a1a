"""What keeping freed memory brings: `deqdet_lite` with and without `keep_heap`, in processes that take turns.

    python benchmarks/heap.py --rounds 3 --out benchmarks/results/heap.json

An update has four generated images of 320 pixels; detections are made one image at a time, and eight at a time. Seconds are of the
processor; `peak` is the peak of the process in MB, its imports included."""
import json, os, resource, statistics, subprocess, sys, tempfile, time
import torch
from deqdet.data import det_dls, synth_coco
from deqdet.loss import SetLoss
from deqdet.ops.heap import keep_heap
from deqdet.training.denoise import denoising_loss
from deqdet.training.optim import Muon
from deqdet.zoo import create_detector
from common import parser, report


def median_seconds(f, n):
    "Processor seconds of a call, the median of `n` after two"
    times = []
    for _ in range(n + 2):
        begun = time.process_time()
        f()
        times.append(time.process_time() - begun)
    return statistics.median(times[2:])


def measured(folder, n):
    "Seconds of an update, of an image, and of eight; the peak"
    torch.manual_seed(0)
    dls = det_dls(folder, bs=4, val_bs=8, num_workers=0, seed=0)
    net = create_detector('deqdet_lite', vocab=dls.vocab, frozen_stages=3)
    opt = Muon([p for p in net.parameters() if p.requires_grad])
    loss = SetLoss()
    batch = dls.train.one_batch()

    def update():
        images,sizes,target = batch
        state,feats = net.start(images, sizes)
        value = loss(net.decoder(state, feats), target) + denoising_loss(net, feats, sizes, target)
        opt.zero_grad()
        value.backward()
        opt.step()

    images,sizes,_ = dls.valid.one_batch()
    found = dict(update=median_seconds(update, n))
    found['image'] = median_seconds(lambda: net.predict(images[:1], sizes[:1]), 2*n)
    found['eight images'] = median_seconds(lambda: net.predict(images, sizes), n)
    return found | dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)


def child(folder, kept, n):
    "The numbers of a process of its own"
    env = {k: v for k,v in os.environ.items() if not k.startswith('MALLOC_')} | dict(HEAP_CHILD=f'{int(kept)} {n}')
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__, folder], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    args = parser(__doc__, rounds=3, calls=12).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        synth_coco(folder, n_train=4, n_valid=8, size=320, seed=0)
        rounds = [[child(folder, kept, args.calls) for kept in (False, True)] for _ in range(args.rounds)]
    ratios = {k: statistics.median(b[k]/a[k] for a,b in rounds) for k in rounds[0][0]}
    report(dict(ratios=ratios, rounds=rounds), args.out)


if __name__=='__main__':
    if 'HEAP_CHILD' in os.environ:
        torch.set_num_threads(1)
        kept,n = map(int, os.environ['HEAP_CHILD'].split())
        if kept: keep_heap()
        print(json.dumps(measured(sys.argv[1], n)))
    else: main()
