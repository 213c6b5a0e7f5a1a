"Two processes on a CPU: the same gradients, weights and AP as one, and no process waits forever"
import os, signal, socket, subprocess, sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import rank_distrib
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.evaluate import evaluate
from deqdet.loss import SetLoss
from deqdet.learner import EMA, CSVLog, NonFinite, Recipe, Resume, Stop, det_learner
from deqdet.families.adamixer import AdaMixer
from deqdet.training.processes import shard_weights, whole_weights
from torch.distributed.tensor import DTensor
from forks import accelerate, forked, script, torchrun

HYPER = AdaMixer(n_classes=4, body='resnet10t', frozen_stages=0, feat_width=32, norm_groups=8, n_queries=49,
                 grid=(7,7,.3), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=64)
STACK = replace(HYPER, strategy=Stacked(2))
EQUILIBRIUM = replace(HYPER, strategy=replace(HYPER.strategy, steps=2, supervise=(2,)))

def make(path, hyper, cbs=(), bs=2, **kwargs):
    torch.manual_seed(0)
    dls = det_dls(path, bs=bs, num_workers=0, device='cpu')
    learn = det_learner(dls, hyper.build(), lr=1e-3, path=path, cbs=list(cbs), **kwargs)
    learn.recorder.add_time = False
    return learn

class Gradients(Callback):
    "Of every update, before clipping"
    order = 9
    def before_fit(self): self.seen = []
    def before_step(self):
        grads = [p.grad.flatten().clone() for p in self.parameters() if p.grad is not None]
        self.seen.append(torch.cat(grads))

class CutOff(Callback):
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.train_iter==self.n: raise CancelFitException

class SpoilOne(Callback):
    "NaN for one image of the second batch of the last process"
    run_valid = False
    def after_pred(self):
        if self.train_iter==1 and rank_distrib()==1: self.learn.pred[-1].boxes[0,0] = torch.nan

class KnockOne(Callback):
    "A signal to the last process alone, in the second iteration"
    def before_backward(self):
        if self.train_iter==1 and rank_distrib()==1: os.kill(os.getpid(), signal.SIGTERM)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def fit(learn, epochs=1, many=True):
    recipe = Recipe(epochs, drops=(1,), warmup=3)
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx() if many else nullcontext(): learn.fit_published(recipe)
    return learn

def train_and_validate(path, many, **kwargs):
    "Gradients and weights of one epoch; AP before it"
    # Adam's first updates are signs of gradients, so rounding would show: SGD
    learn = make(path, STACK, [Gradients()], opt_func=torch.optim.SGD, **kwargs)
    with learn.no_bar(), learn.distrib_ctx() if many else nullcontext(): learn.validate()
    before = dict(learn.ap.result)
    fit(learn, 1, many)
    return dict(grads=torch.stack(learn.gradients.seen), weights=weights(learn),
                before=before, after=dict(learn.ap.result), evaluated=dict(evaluate(learn.model, learn.dls.valid)),
                train_loss=learn.history.train_loss.tolist())

def resumed(path):
    "Weights of a run, and of the same run cut off and gone on with; noise is on"
    whole = fit(make(path, EQUILIBRIUM, [EMA(.5)]), 2)
    file = path/'two.pt'
    fit(make(path, EQUILIBRIUM, [EMA(.5), Resume(file, every=1), CutOff(3)]), 2)
    again = fit(make(path, EQUILIBRIUM, [EMA(.5), Resume(file, resume=True), CSVLog()]), 2)
    return dict(whole=weights(whole), again=weights(again), rows=len(again.history))

def left_out(path):
    "A batch that is bad in one process is left out in both"
    learn = fit(make(path, STACK, [SpoilOne(), NonFinite(skip=1)]))
    return dict(names=learn.non_finite.skipped, weights=weights(learn))

def stopped(path):
    "A signal to one process ends both between the same iterations"
    learn = fit(make(path, STACK, [Stop(), KnockOne()]))
    return dict(asked=learn.stop.asked, iterations=learn.train_iter)

def batches_of(path): return list(det_dls(path, bs=2, num_workers=0, device='cpu').train)

def sgd(model, batches):
    "Norms of the gradient in two updates of two batches each, of which this process has the given ones"
    opt = torch.optim.SGD(model.parameters(), 1e-2)
    loss = SetLoss()
    norms = []
    for update in batches:
        for images,sizes,target in update: (loss(model(images, sizes), target)/len(update)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        opt.step()
        opt.zero_grad()
    return norms

CALM = replace(EQUILIBRIUM, strategy=replace(EQUILIBRIUM.strategy, perturb=None)) # without random numbers

FSDP = hasattr(torch.cpu.Stream, 'record_event') # FSDP2 of torch 2.6 needs the streams of a GPU

def divided(path, hyper):
    "Norms and weights of a model whose weights are divided over the processes"
    torch.manual_seed(0)
    model = shard_weights(hyper.build())
    mine = sum(p.to_local().numel() for p in model.parameters())
    norms = sgd(model, [[b] for b in batches_of(path)[rank_distrib()::2]])
    return dict(norms=norms, mine=mine, weights=whole_weights(model))

def worker(path):
    out = dict(same=train_and_validate(path, True), resumed=resumed(path), left_out=left_out(path),
               stopped=stopped(path), divided=[divided(path, o) for o in (STACK, CALM) if FSDP])
    torch.save(out, path/f'out{rank_distrib()}.pt')

def two_workers(path):
    "What torchrun does, in forks: `test_script` has the launchers"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    os.environ.update(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    children = []
    for rank in '01':
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            signal.alarm(500) # ends it
            worker(path)
            sys.stdout.flush()
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes==[0, 0], codes

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('processes')/'shapes', n_train=8, n_valid=5, size=64, seed=3)

@pytest.fixture(scope='module')
def both(path):
    code,out = forked(lambda: two_workers(path), timeout=600)
    assert code==0, out[-4000:]
    return [torch.load(path/f'out{r}.pt', weights_only=False) for r in range(2)]

@pytest.fixture(scope='module')
def one(path): return train_and_validate(path, False, accumulate=2)

def test_gradients_and_weights(both, one):
    "Two processes of two images are one process that accumulates two batches of two"
    for two in (b['same'] for b in both):
        scale = one['grads'].abs().max()
        assert len(two['grads'])==len(one['grads'])==2
        torch.testing.assert_close(two['grads'], one['grads'], atol=1e-4*scale, rtol=0)
        torch.testing.assert_close(two['weights'], one['weights'], atol=1e-5, rtol=0)
    assert torch.equal(both[0]['same']['weights'], both[1]['same']['weights'])

def test_ap(both, one):
    "Five images, dealt in three batches to two processes, give the same numbers as in one; a repeat counts once"
    for two in (b['same'] for b in both):
        assert two['before']==pytest.approx(one['before'], nan_ok=True, abs=1e-9)
        assert two['before']['AR100'] > 0
        assert two['after']==pytest.approx(two['evaluated'], nan_ok=True, abs=1e-9)

@pytest.mark.skipif(not FSDP, reason='FSDP2 of this torch needs a GPU')
@pytest.mark.parametrize('i,hyper', enumerate([STACK, CALM]), ids=['stack','equilibrium'])
def test_divided_weights(both, path, i, hyper):
    "FSDP2 trains as one process does, saves, and a whole detector loads it"
    torch.manual_seed(0)
    one = hyper.build()
    batches = batches_of(path)
    norms = sgd(one, [batches[:2], batches[2:4]])
    first,second = (o['divided'][i] for o in both)
    assert first['norms']==second['norms']==pytest.approx(norms, rel=1e-4)
    n = sum(p.numel() for p in one.parameters())
    assert max(first['mine'], second['mine']) < .51*n and first['mine']+second['mine'] >= n
    again = hyper.build()
    again.load_state_dict(first['weights'])
    torch.testing.assert_close(again.state_dict(), one.state_dict(), atol=1e-5, rtol=1e-4)
    assert not second['weights']

def test_resume(both):
    for b in (o['resumed'] for o in both):
        assert torch.equal(b['whole'], b['again']) and b['rows']==2
    assert torch.equal(both[0]['resumed']['whole'], both[1]['resumed']['whole'])

def test_bad_batch_is_left_out_in_both(both):
    a,b = (o['left_out'] for o in both)
    assert torch.equal(a['weights'], b['weights']) and a['weights'].isfinite().all()
    assert a['names']==[] and len(b['names'])==1

def test_signal_to_one_stops_both(both):
    assert [o['stopped']['iterations'] for o in both]==[2, 2]
    assert [o['stopped']['asked'] for o in both]==[None, 'SIGTERM']

@pytest.mark.parametrize('by', [torchrun, accelerate], ids=['torchrun', 'accelerate'])
def test_script(path, by):
    "The ten lines of examples/train.py, in two processes; those of `accelerate launch` are interpreters of their own in test_cli.py"
    code,out = forked(by(Path(__file__).parents[1]/'examples'/'train.py', path, 1))
    assert code==0, out[-4000:]
    assert out.count('images per update')==1 and '8 images per update: 4 in a batch x 2 processes' in out

NOTEBOOK = '''
import sys
from pathlib import Path
from accelerate import notebook_launcher
from fastai.torch_core import rank_distrib
from deqdet.data import det_dls
from deqdet.learner import det_learner
from deqdet.zoo import create_detector
def train(path, out):
    dls = det_dls(path, bs=2, num_workers=0, device='cpu')
    learn = det_learner(dls, create_detector('deqdet_tiny', vocab=dls.vocab), 'tiny', lr=1e-3)
    with learn.distrib_ctx(), learn.no_bar(): learn.fit_published(epochs=1)
    (Path(out)/f'AP{rank_distrib()}').write_text(str(learn.history.AP[0])) # what both print to one pipe may be mixed
if __name__=='__main__': notebook_launcher(train, sys.argv[1:], num_processes=2)
'''

def test_notebook_launcher(path, tmp_path):
    "What `notebook_launcher` starts trains together, and both know the AP"
    (tmp_path/'notebook.py').write_text(NOTEBOOK)
    code,out = forked(script(tmp_path/'notebook.py', path, tmp_path))
    assert code==0, out[-4000:]
    assert '2 in a batch x 2 processes' in out
    a,b = ((tmp_path/f'AP{r}').read_text() for r in range(2))
    assert a==b and 0<=float(a)<=1

ABANDONED = '''
import sys
from deqdet.data import DataError, det_dls
from deqdet.learner import Stop, det_learner
from deqdet.zoo import create_detector
dls = det_dls(sys.argv[1], bs=2, num_workers=2, device='cpu')
learn = det_learner(dls, create_detector('deqdet_tiny', vocab=dls.vocab), 'tiny', lr=1e-3, cbs=[Stop()])
try: learn.fit_published(epochs=1)
except DataError as e: fault = e # its traceback holds the loader, and with it two processes
print(type(fault).__name__)
'''

def test_an_abandoned_loader_ends_with_the_process(tmp_path):
    "Processes that load are deaf to the signal with which Python ends its children"
    path = synth_coco(tmp_path/'shapes', n_train=8, n_valid=2, size=64, seed=3)
    for f in (path/'images').glob('train_*'): f.write_bytes(f.read_bytes()[:200])
    cmd = [sys.executable, '-W', 'ignore', '-c', ABANDONED, path]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    assert res.returncode==0 and 'DataError' in res.stdout, res.stderr[-2000:]
