"""Memory of `predict` on an endless generator: a line through the resident memory of a process, image by image

`python benchmarks/stream.py --images 6000 --out benchmarks/results/stream.json` detects in noise of three shapes, one of them broken now and then. The first
quarter (caches, allocators) is left out of the line; its slope times 100,000 is what a hundred thousand images would add."""
import gc, warnings
import numpy as np, torch
from deqdet.predict import predict
from deqdet.model import Feed
from deqdet.zoo import create_detector
from common import parser, report
from coco_size import resident

SHAPES = (48, 64), (64, 48), (64, 64)


def camera(n, broken=500):
    "Images of noise; each 500th is the name of a file that is not there"
    rng = np.random.default_rng(0)
    for i in range(n):
        if i % broken == broken-1: yield 'nowhere.jpg'
        else: yield rng.integers(0, 256, (*SHAPES[i % 3], 3), dtype=np.uint8)


def measured(model, n, every):
    "Numbers of images, and megabytes after them"
    at, mb = [], []
    for i, found in enumerate(predict(model, camera(n), bs=8, min_score=0.), 1):
        if i % every: continue
        gc.collect()
        at.append(i)
        mb.append(resident()/1e6)
    return np.array(at), np.array(mb)


def main():
    args = parser(__doc__, images=6000, every=50).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', n_classes=4).eval()
    model.feed = Feed(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        at, mb = measured(model, args.images, args.every)
    late = at > args.images//4
    (slope, start), cov = np.polyfit(at[late], mb[late], 1, cov=True)
    result = dict(slope_mb_per_100k=slope*1e5, error_mb_per_100k=cov[0, 0]**.5*1e5, first_mb=mb[0], at_quarter_mb=mb[late][0], last_mb=mb[-1], most_mb=mb.max())
    report(result, args.out, images=args.images, shapes=SHAPES)


if __name__ == '__main__': main()
