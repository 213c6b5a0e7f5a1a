"Shared by all benchmarks: machine, commit, and times of alternating runs"
import argparse, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path
import torch, torchvision

ROOT = Path(__file__).resolve().parent.parent


def _line(path, key):
    "Value of the first line of a /proc file that starts with `key`"
    try: return next(l.split(':', 1)[1].strip() for l in Path(path).read_text().splitlines() if l.startswith(key))
    except (OSError, StopIteration): return None


def machine():
    "The hardware and the versions that a number belongs to"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=_line('/proc/cpuinfo', 'model name') or platform.processor(), cores=os.cpu_count(),
                threads=torch.get_num_threads(),
                memory=_line('/proc/meminfo', 'MemTotal'), gpu=gpu, system=platform.system(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__)


def commit():
    "Hash of the checkout, with `+` when tracked files differ from it"
    git = lambda *a: subprocess.run(['git', *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')


def _seconds(f, clock):
    sync = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    sync(); start = clock()
    f()
    sync(); return clock() - start


def alternate(fns, n=7, warmup=1, clock=time.perf_counter):
    """Time the callables of a dict in turns, `n` rounds, every other round backwards.

    Returns per name `median`, `least`, `most` and `times` in seconds, and `ratio`: the median over rounds of its time
    over that of the first name in the same round, so that what slows a whole round down does not count."""
    for _ in range(warmup):
        for f in fns.values(): f()
    times = {k: [] for k in fns}
    for i in range(n):
        for k in list(fns)[::-1 if i % 2 else 1]: times[k].append(_seconds(fns[k], clock))
    first = times[next(iter(fns))]
    return {k: dict(median=statistics.median(t), least=min(t), most=max(t), times=t,
                    ratio=statistics.median(a/b for a,b in zip(t, first))) for k,t in times.items()}


CLOCKS = dict(wall=time.perf_counter, processor=time.process_time) # the second where other work shares the cores


def parser(doc, **defaults):
    "Arguments that every benchmark has"
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--out', help='write the result here as JSON (it is always printed)')
    p.add_argument('--rounds', type=int, default=defaults.pop('rounds', 7))
    p.add_argument('--threads', type=int, default=defaults.pop('threads', 1))
    for k,v in defaults.items(): p.add_argument('--' + k.replace('_', '-'), type=type(v), default=v)
    return p


def report(result, out=None, **about):
    "Print a result as JSON with commit, machine and command, and write it to `out`"
    result = dict(command=' '.join(['python', *sys.argv]), commit=commit(), machine=machine(), **about, result=result)
    text = json.dumps(result, indent=1)
    print(text)
    if out: Path(out).parent.mkdir(parents=True, exist_ok=True); Path(out).write_text(text + '\n')
    return result
