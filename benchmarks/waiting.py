"""What threads that wait cost: `deqdet_lite` on all cores, with GOMP_SPINCOUNT from its default down to 0.

    python benchmarks/waiting.py --rounds 2 --seconds 3 --out benchmarks/results/waiting.json

Each number comes from a process of its own, and the settings take turns. `alone` has the machine for itself; beside `neighbours` there
are as many busy processes as cores. Numbers are seconds of the clock, the mean over at least `--seconds`: of a prediction for two random
images of 160 pixels, and of an update with four of 320."""
import json, os, statistics, subprocess, sys, time
from contextlib import contextmanager
import torch
from deqdet.loss import SetLoss
from deqdet.ops.threads import CHOICES
from deqdet.sets.images import Target
from deqdet.training.optim import Muon
from deqdet.zoo import create_detector
from common import parser, report

SPINS = None, 10000, 1000, 0 # None: what the library does by itself
BUSY = 'while True: pass'


def mean_seconds(f, least):
    "Of a call, after a first one"
    f()
    begun = time.perf_counter()
    n = 0
    while time.perf_counter() - begun < least:
        f()
        n += 1
    return (time.perf_counter() - begun)/n


def noise(n, side): return torch.randint(0, 255, (n, 3, side, side), dtype=torch.uint8)


def measured(least):
    "Seconds of a prediction, and of an update"
    torch.manual_seed(0)
    net = create_detector('deqdet_lite', n_classes=60, frozen_stages=3)
    images = noise(4, 320)
    sizes = torch.full((4, 2), 320)
    boxes = torch.tensor([[20., 30, 90, 80], [150, 100, 300, 260]]).expand(4, 2, 4)
    target = Target(boxes, torch.tensor([[3, 5]]*4), sizes, torch.arange(4), sizes)
    opt = Muon([p for p in net.parameters() if p.requires_grad])
    loss = SetLoss()

    def update():
        state,feats = net.start(images, sizes)
        opt.zero_grad()
        loss(net.decoder(state, feats), target).backward()
        opt.step()

    few = noise(2, 160)
    found = dict(update=mean_seconds(update, least))
    return found | dict(prediction=mean_seconds(lambda: net.eval().predict(few), least))


@contextmanager
def neighbours(n):
    "Busy processes, in sessions of their own as another user's are"
    running = [subprocess.Popen([sys.executable, '-c', BUSY], start_new_session=True) for _ in range(n)]
    try: yield
    finally:
        for p in running: p.kill()


def child(spins, least):
    "The numbers of a process of its own"
    env = {k: v for k,v in os.environ.items() if k not in CHOICES} | dict(WAITING_CHILD=str(least))
    if spins is not None: env['GOMP_SPINCOUNT'] = str(spins)
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    p = parser(__doc__, rounds=3)
    p.add_argument('--seconds', type=float, default=5.)
    args = p.parse_args()
    found = {}
    for name,n in (('alone', 0), ('neighbours', os.cpu_count())):
        with neighbours(n): rounds = [[child(s, args.seconds) for s in SPINS] for _ in range(args.rounds)]
        for what in ('update','prediction'):
            times = zip(*[[o[what] for o in r] for r in rounds])
            found[f'{what}, {name}'] = {str(s): statistics.median(t) for s,t in zip(SPINS, times)}
        print(found, flush=True)
    report(dict(seconds=found), args.out)


if __name__=='__main__':
    if 'WAITING_CHILD' in os.environ: print(json.dumps(measured(float(os.environ['WAITING_CHILD']))))
    else: main()
