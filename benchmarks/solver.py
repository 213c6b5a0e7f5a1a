"The time that `solve` adds to a plain loop of 20 steps, for a step that takes about five milliseconds"
import time, torch
from deqdet.solver import Anderson, Broyden, solve
from common import alternate, parser, report


def step_of(ms, z):
    "A map on `z` that takes about `ms` milliseconds, and keeps moving"
    W = 0.5*torch.linalg.qr(torch.randn(z.shape[-1], z.shape[-1])).Q.to(z.device)
    def products(z, k):
        for _ in range(k): y = (z @ W).tanh()
        return y
    def seconds(k=50):
        start = time.perf_counter()
        products(z, k).sum().item()
        return (time.perf_counter() - start)/k
    k = max(1, round(ms/1e3/min(seconds() for _ in range(10))))
    return lambda z: products(z, k) + 1


def loop(f, z, steps):
    for _ in range(steps): z = f(z)
    return z


def ways(f, z, steps):
    "The callables to time, the plain loop first"
    return {'loop': lambda: loop(f, z, steps),
            'solve': lambda: solve(f, z, max_iter=steps),
            'keep': lambda: solve(f, z, max_iter=steps, keep=(1,3,6,9,12,20)),
            'record': lambda: solve(f, z, max_iter=steps, record=True),
            'tol never reached': lambda: solve(f, z, max_iter=steps, tol=1e-30),
            'anderson': lambda: solve(f, z, max_iter=steps, method=Anderson()),
            'broyden': lambda: solve(f, z, max_iter=steps, method=Broyden())}


@torch.no_grad()
def main():
    args = parser(__doc__, rounds=15, ms=5., steps=20, images=2, queries=100, width=256, device='cpu').parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    z = torch.randn(args.images, args.queries, args.width, device=args.device)
    t = alternate(ways(step_of(args.ms, z), z, args.steps), args.rounds)
    report(dict(step_ms=1e3*t['loop']['median']/args.steps,
                **{k: dict(median_ms=1e3*v['median'], over_loop=v['ratio']) for k,v in t.items()}), args.out,
           steps=args.steps, shape=list(z.shape), device=args.device)


if __name__ == '__main__': main()
