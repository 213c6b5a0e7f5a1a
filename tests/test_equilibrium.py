"What a notebook cannot show of the equilibrium: peak memory and time of a training step at published widths"
import json
import os
import subprocess
import sys
import pytest

SCRIPT = '''
import json, os, resource, sys, torch
from deqdet.decoder import Queries
from deqdet.mixer import MixerStep
from deqdet.equilibrium import Equilibrium
kw = json.loads(sys.argv[1])
torch.manual_seed(0)
deq = Equilibrium(MixerStep(80), MixerStep(80), **{k: tuple(v) if isinstance(v, list) else v for k, v in kw.items()})
feats = [torch.randn(1, 256, 256//s, 320//s).to(memory_format=torch.channels_last).requires_grad_() for s in (4, 8, 16, 32)]
queries = Queries(100, 256)
def step():
    for p in [*deq.parameters(), *feats]: p.grad = torch.zeros_like(p)   # their memory is there from the start
    base, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, os.times().user
    preds = deq(queries(torch.tensor([[256, 320]])), feats)
    sum(p.logits.square().mean() + p.boxes.mean() for p in preds).backward()
    return len(preds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)/1024, os.times().user - t
n, memory, _ = step()
print(json.dumps(dict(n=n, memory=memory, time=min(step()[2] for _ in range(2)))))
'''


def measure(**kw):
    # glibc keeps freed blocks below a threshold that it raises on its own: a fixed one makes the process's peak that of the tensors
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    r = subprocess.run([sys.executable, '-c', SCRIPT, json.dumps(kw)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def measured():
    return dict(nine=measure(), one=measure(supervise=[20], init_steps=0),
                plain=measure(recompute=False), long=measure(steps=30, supervise=[1, 3, 6, 9, 12, 30]))


def test_peak_memory_does_not_grow_with_supervised_states_nor_with_steps(measured):
    "The process's peak during a training step, above what it held before"
    assert [measured[k]['n'] for k in ('nine', 'one', 'plain', 'long')] == [9, 2, 9, 9]  # the first guess always has a loss
    print({k: round(v['memory']) for k, v in measured.items()})
    assert measured['nine']['memory'] <= 1.35*measured['one']['memory']
    assert measured['long']['memory'] <= 1.1*measured['nine']['memory']
    assert measured['nine']['memory'] <= .5*measured['plain']['memory']


def test_recomputing_costs_little_time(measured):
    "The processor's time of a training step, against the plain sum's, without the system's for fresh pages"
    print({k: round(v['time'], 2) for k, v in measured.items()})
    assert measured['nine']['time'] <= 1.35*measured['plain']['time']
