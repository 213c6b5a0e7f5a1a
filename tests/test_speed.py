"Speed without changed results: against the plain formula of benchmarks/plain.py, at start-up, and compiled"
import copy, subprocess, sys, time
from pathlib import Path
from statistics import median
import pytest, torch
from torch import nn
from deqdet.backbone import Pyramid, Neck, tiny_body
from deqdet.data import Target, collate
from deqdet.decoder import Queries, State, prepared
from deqdet.mixer import MixerStep
from deqdet.equilibrium import Equilibrium, Perturb, Settled
from deqdet.mixing import Rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
from plain import Decoder, Step

SMALL = dict(width=32, feat_width=16, groups=2, points=9, out_points=8, heads=4, hidden=64)


def made(n=12, size=(96, 128), classes=5, images=2, **kwargs):
    "A step whose generators are not constant, levels, and a state of boxes all over the images and beyond"
    torch.manual_seed(0)
    step = MixerStep(classes, **kwargs)
    for p in (step.reg[-1].weight, step.sampler.offsets.weight, step.mixing.params.weight): nn.init.normal_(p, std=.02)
    D = step.attn_norm.weight.numel()
    levels = tuple(torch.randn(images, kwargs.get('feat_width', 256), size[0]//s, size[1]//s) for s in (4, 8, 16, 32))
    xy, z = (torch.rand(images, n, 2)*1.2 - .1)*torch.tensor(size[::-1]), torch.rand(images, n, 1)*5 + 1
    return step, levels, State(torch.randn(images, n, D), torch.cat([xy, z, torch.randn(images, n, 1)*.5], -1))


def near(a, b, tol=1e-4): assert (a - b).abs().max() <= tol*max(1, b.abs().max().item()), (a - b).abs().max()


def test_step_is_the_formula():
    "In value and in all gradients, for levels and for the table made of them"
    step, levels, z = made(**SMALL)
    levels = [f.requires_grad_() for f in levels]
    grads = []
    for f, feats in (Step(step), levels), (step, levels), (step, prepared(step, levels)):
        out = f(z, feats)
        loss = out.content.sin().sum() + out.boxes.sin().sum()
        inputs = [*step.sampler.parameters(), *step.mixing.parameters(), *levels]
        grads.append([out.content, out.xyzr, *torch.autograd.grad(loss, inputs)])
    for ours in grads[1:]:
        for a, b in zip(ours, grads[0]): near(a, b)


@pytest.mark.parametrize('training', [True, False])
def test_decoder_is_the_formula(training):
    "Noise included: it is drawn in the same order"
    step, levels, z = made(**SMALL)
    deq = Equilibrium(made(**SMALL)[0], step, steps=6, supervise=(1, 3, 6), perturb=Perturb(position=3.))
    deq.train(training)
    plain = Decoder(deq).train(training)
    answers = []
    for m in plain, deq:
        torch.manual_seed(3)
        answers.append(m(z, levels))
    assert len(answers[0]) == len(answers[1]) == (6 if training else 1)
    for a, b in zip(*answers): near(a.logits, b.logits, 1e-3); near(a.boxes, b.boxes, 1e-3)


def test_features_are_copied_once(monkeypatch):
    "Channels-last from the loader to the levels, and one table for all steps"
    size = torch.tensor([60, 90])
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), size, torch.tensor(1), size)
    images, sizes, _ = collate([(torch.zeros(3, 60, 90, dtype=torch.uint8), target)]*2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    body = tiny_body()
    levels = Pyramid(body, Neck(body.channels, 16, groups=4))(images, sizes)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in levels)
    step, levels, z = made(**SMALL)
    cat, calls = torch.cat, []
    def counted(ts, *args, **kwargs):
        calls.append(sum(t.numel() for t in ts))
        return cat(ts, *args, **kwargs)
    monkeypatch.setattr(torch, 'cat', counted)
    with torch.no_grad(): Equilibrium(step, step).eval()(z, levels)
    assert calls.count(sum(f.numel() for f in levels)) == 1


def test_compiled_step_is_the_step():
    "`torch.compile` finds one graph, and it computes the same; torch 2.6 cuts the graph at properties of a named tuple"
    step, levels, z = made(**SMALL)
    feats = Rows.of(levels)
    whole = torch.__version__ >= '2.7'
    with torch.no_grad():
        a, b = torch.compile(step, backend='eager', fullgraph=whole)(z, feats), step(z, feats)
    near(a.content, b.content, 1e-6); near(a.xyzr, b.xyzr, 1e-6)


def test_compiled_detector_trains_the_same():
    "All parts compiled: the same losses and gradients, with noise on states and steps recomputed"
    from deqdet.zoo import create_detector
    torch.manual_seed(0)
    noise = Perturb(p_content=.5, p_position=.5)
    model = create_detector('deqdet_tiny', n_classes=3, strategy=Settled(steps=4, supervise=(2, 4), perturb=noise))
    fast = copy.deepcopy(model).compile(backend='eager')
    x, grads = torch.rand(2, 3, 96, 128), []
    for m in (model, fast):
        torch.manual_seed(1)
        sum(p.logits.square().mean() + p.boxes.mean()/100 for p in m(x)).backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads): near(a, b, 1e-5)


def test_step_is_faster_than_the_formula():
    """At published width, in processor time; benchmarks/step.py measures how much. Each time is compared with the one
    beside it, and a round that the machine's other work spoilt is run again, twice at most"""
    step, levels, z = made(n=100, size=(512, 640), images=1)
    feats, plain = prepared(step, levels), Step(step)
    def seconds(f, x):
        t = time.process_time()
        f(z, x)
        return time.process_time() - t
    def round_of(n): return median([seconds(step, feats)/seconds(plain, levels) for _ in range(n)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = []
    with torch.no_grad():
        round_of(1)
        while len(parts) < 3 and not (parts and parts[-1] <= .9): parts.append(round_of(7))
    torch.set_num_threads(threads)
    assert parts[-1] <= .9, parts


def test_import_time():
    "`deqdet.model` after torch and timm: at most a fifth of their processor time, in one process"
    code = """
from time import process_time
begin = process_time()
import torch, timm
middle = process_time()
import deqdet.model
print((process_time() - middle)/(middle - begin))
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= .2
