"""What threads that wait cost: predictions of `deqdet_lite` on all cores, with GOMP_SPINCOUNT from its default down to 0.

    python benchmarks/waiting.py --rounds 2 --seconds 3 --out benchmarks/results/waiting.json

Each number comes from a process of its own, and the settings take turns. `alone` has the machine for itself; beside `neighbours` there
are as many busy processes as cores. Numbers are seconds of the clock for two generated images of 160 pixels, the mean over at least `--seconds`."""
import json, os, statistics, subprocess, sys, time
from contextlib import contextmanager
import torch
from deqdet.sets.scenes import KIND_NAMES
from deqdet.zoo import create_detector
from common import parser, report

SPINS = None, 10000, 1000, 0 # None: what the library does by itself
BUSY = 'while True: pass'


def seconds(least):
    "Of one prediction"
    torch.manual_seed(0)
    net = create_detector('deqdet_lite', vocab=KIND_NAMES).eval()
    images = torch.randint(0, 255, (2, 3, 160, 160), dtype=torch.uint8)
    net.predict(images)
    begun = time.perf_counter()
    n = 0
    while time.perf_counter() - begun < least:
        net.predict(images)
        n += 1
    return (time.perf_counter() - begun)/n


@contextmanager
def neighbours(n):
    "Busy processes, in sessions of their own as another user's are"
    running = [subprocess.Popen([sys.executable, '-c', BUSY], start_new_session=True) for _ in range(n)]
    try: yield
    finally:
        for p in running: p.kill()


def child(spins, least):
    "The number of a process of its own"
    env = {k: v for k,v in os.environ.items() if k not in ('GOMP_SPINCOUNT','OMP_WAIT_POLICY')} | dict(WAITING_CHILD=str(least))
    if spins is not None: env['GOMP_SPINCOUNT'] = str(spins)
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return float(out.stdout.splitlines()[-1])


def main():
    p = parser(__doc__, rounds=3)
    p.add_argument('--seconds', type=float, default=5.)
    args = p.parse_args()
    found = {}
    for name,n in (('alone', 0), ('neighbours', os.cpu_count())):
        with neighbours(n): rounds = [[child(s, args.seconds) for s in SPINS] for _ in range(args.rounds)]
        found[name] = {str(s): statistics.median(times) for s,times in zip(SPINS, zip(*rounds))}
        print(name, found[name], flush=True)
    report(dict(seconds=found), args.out)


if __name__=='__main__':
    if 'WAITING_CHILD' in os.environ: print(seconds(float(os.environ['WAITING_CHILD'])))
    else: main()
