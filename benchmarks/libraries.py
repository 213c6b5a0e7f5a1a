"""Large matmuls by oneDNN and by PyTorch, with the vectors of this processor and with narrower ones

    python benchmarks/libraries.py --out benchmarks/results/libraries.json

The last row of each width is Muon's `orthogonal` on a gradient of 192 x 1152.

Each row is the time of oneDNN over that of PyTorch, the least of the rounds of each. A fresh process per width of vectors, which PyTorch and both libraries
are told by environment variables; MKL knows no AVX without AVX2, and falls back to SSE there."""
import json, os, subprocess, sys, torch
import torch.nn.functional as F
from common import alternate, parser, report
import deqdet.training.optim as optim
from deqdet.ops.linear import product, times

SHAPES = (100, 128, 6144), (100, 4096, 128), (100, 256, 8192), (100, 512, 256), (300, 256, 1024), (300, 256, 49152) # rows, in, out
WIDTHS = {'all': {}, 'AVX2': dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_ENABLE_INSTRUCTIONS='AVX2'),
          'AVX': dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX', MKL_ENABLE_INSTRUCTIONS='AVX'),
          'SSE4': dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', MKL_ENABLE_INSTRUCTIONS='SSE4_2')}


@torch.no_grad()
def ratios(rounds):
    "Of each shape, in this process"
    found = {}
    for n,k,m in SHAPES:
        x,w,b = torch.randn(n, k), torch.randn(m, k), torch.randn(m)
        t = alternate({'PyTorch': lambda: F.linear(x, w, b), 'oneDNN': lambda: product(x, w, b)}, rounds)
        found[f'{n}x{k} by {k}x{m}'] = t['oneDNN']['least']/t['PyTorch']['least']
    return found | {'orthogonal 192x1152': turned(rounds)}


def turned(rounds):
    "Of an orthogonal update; it takes oneDNN where `times` does"
    grad = torch.randn(192, 1152)
    def by(library):
        optim.times = library
        return optim.orthogonal(grad)
    t = alternate({'PyTorch': lambda: by(lambda a, b: a@b.T), 'oneDNN': lambda: by(times)}, rounds)
    return t['oneDNN']['least']/t['PyTorch']['least']


def fresh(rounds, width):
    "The same in a process with these vectors"
    run = subprocess.run([sys.executable, __file__, '--rounds', str(rounds), '--part', '1'], env=os.environ | WIDTHS[width], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main():
    args = parser(__doc__.splitlines()[0], rounds=15, part=0).parse_args()
    torch.set_num_threads(args.threads)
    if args.part: return print(json.dumps(ratios(args.rounds)))
    report({k: fresh(args.rounds, k) for k in WIDTHS}, args.out)


if __name__ == '__main__': main()
