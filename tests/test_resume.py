"Training that is cut off, anywhere and in any way, goes on as if nothing had happened"
import io, os, random, signal, sys, time, traceback
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from deqdet.ops.linear import CHOSEN
from deqdet.sets.augment import recipe_small
from deqdet.data import det_dls, synth_coco
from deqdet.equilibrium import Perturb, Settled
from deqdet.learner import EMA, Amp, CSVLog, Resume, Stop, det_learner
from deqdet.families.adamixer import AdaMixer
from deqdet.training import resume
from deqdet.training.optim import Muon

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4,
                 grid=(2,2,.4), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=32,
                 strategy=Settled(steps=2, supervise=(2,), perturb=Perturb(position=3.)))

def make(path, cbs=(), num_workers=0, tfms=None, hyper=SMALL, bs=2, **kwargs):
    torch.manual_seed(0)
    dls = det_dls(path, bs=bs, tfms=tfms, num_workers=num_workers, device='cpu')
    learn = det_learner(dls, hyper.build(), lr=1e-3, path=path, cbs=[EMA(.8), *cbs], **dict(accumulate=2) | kwargs)
    learn.recorder.add_time = False
    return learn

def run(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-3)
    return learn

class CutOff(Callback):
    "An error after `n` iterations, or in a validation"
    def __init__(self, n=None, validation=None): self.n,self.validation = n,validation
    def after_batch(self):
        if self.training and self.train_iter==self.n: raise RuntimeError('cut off')
    def before_validate(self):
        if self.epoch==self.validation: raise RuntimeError('cut off')

def same(a, b):
    "Same weights, averages, optimiser and log, bit for bit"
    for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): assert torch.equal(x, y)
    for x,y in zip(a.ema.avg, b.ema.avg, strict=True): assert torch.equal(x, y)
    for x,y in zip(a.opt.state_dict()['state'].values(), b.opt.state_dict()['state'].values(), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert a.history.equals(b.history)
    assert [float(o) for o in a.recorder.losses]==[float(o) for o in b.recorder.losses]
    assert a.term_recorder.values==b.term_recorder.values

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('resume')/'shapes', n_train=7, n_valid=2, size=64, seed=2)

@pytest.fixture(scope='module')
def whole(path): return run(make(path))

@pytest.mark.parametrize('cut', [dict(n=n) for n in range(1, 7)] + [dict(validation=v) for v in (0,1)], ids=str)
def test_cut_anywhere(path, whole, cut, tmp_path):
    "After each of six iterations, with accumulated gradients pending or not, and in each validation"
    file = tmp_path/'last.pt'
    with pytest.raises(RuntimeError, match='cut off'): run(make(path, [Resume(file, every=1), CutOff(**cut)]))
    same(whole, run(make(path, [Resume(file, resume=True)])))

def test_cut_twice_with_workers(path, whole, tmp_path):
    "Saves are three iterations apart: what was done after the last one is done again"
    file = tmp_path/'last.pt'
    for n in (2, 5):
        cbs = [Resume(file, every=2, resume=True), CutOff(n)]
        with pytest.raises(RuntimeError): run(make(path, cbs, num_workers=2))
    same(whole, run(make(path, [Resume(file, resume=True)])))

VARIED = dict(recipe='tiny', tfms=(recipe_small(64), recipe_small(64, train=False)))

@pytest.fixture(scope='module')
def whole_varied(path): return run(make(path, **VARIED))

@pytest.mark.parametrize('cut', [dict(n=n) for n in range(1, 6)] + [dict(validation=0)], ids=str)
def test_cut_with_muon_and_augmentation(path, whole_varied, cut, tmp_path):
    "Another optimiser; images vary at random; processes load them after the cut but not before"
    file = tmp_path/'last.pt'
    with pytest.raises(RuntimeError, match='cut off'): run(make(path, [Resume(file, every=1), CutOff(**cut)], **VARIED))
    same(whole_varied, run(make(path, [Resume(file, resume=True)], num_workers=2, **VARIED)))

def test_what_varies_does(path, whole, whole_varied):
    assert isinstance(whole_varied.opt.opt, Muon) and not isinstance(whole.opt.opt, Muon)
    plain = run(make(path, **VARIED | dict(tfms=None)))
    assert plain.recorder.losses[0]!=whole_varied.recorder.losses[0]

@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_cut_in_half_precision(path, amp, tmp_path):
    "The scale of gradients is remembered too; it grows every other update here"
    file,cbs = tmp_path/'last.pt',lambda *more: [Amp(amp, growth_interval=2), *more]
    whole = run(make(path, cbs(Resume(tmp_path/'whole.pt'))))
    with pytest.raises(RuntimeError, match='cut off'): run(make(path, cbs(Resume(file, every=1), CutOff(3))))
    same(whole, run(make(path, cbs(Resume(file, resume=True)))))
    a,b = (torch.load(f, weights_only=True)['scaler'] for f in (tmp_path/'whole.pt', file))
    assert a==b and (amp=='bf16' or a['scale'] != 2.**16)

def test_finished_run_has_nothing_to_do(path, whole, tmp_path):
    file = tmp_path/'last.pt'
    run(make(path, [Resume(file)]))
    again = run(make(path, [Resume(file, resume=True)]))
    same(whole, again)
    assert again.train_iter==0

def test_more_epochs(path, tmp_path):
    "A finished run may be made longer"
    file = tmp_path/'last.pt'
    run(make(path, [Resume(file)]))
    longer = run(make(path, [Resume(file, resume=True)]), epochs=3)
    assert len(longer.history)==3 and longer.train_iter==9

def test_without_a_file_it_starts(path, whole, tmp_path):
    same(whole, run(make(path, [Resume(tmp_path/'none.pt', resume=True)])))

def test_fresh_start_ignores_the_file(path, whole, tmp_path):
    file = tmp_path/'last.pt'
    file.write_text('an old thing')
    same(whole, run(make(path, [Resume(file)])))
    assert file.stat().st_size > 10**6

def test_next_fit_is_whole(path, tmp_path):
    "A resumed fit that fails does not shorten the one after it"
    file = tmp_path/'last.pt'
    run(make(path, [Resume(file)]))
    learn = make(path)
    cbs = [Resume(file, resume=True), CutOff(7)]
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-3, cbs=cbs)
    run(learn, 1)
    assert len(learn.history)==1 and learn.train_iter==3

def test_validate_and_lr_find_leave_it_alone(path, tmp_path):
    "Only `fit` loads and saves"
    file = tmp_path/'last.pt'
    run(make(path, [Resume(file)]))
    stamp = file.stat().st_mtime_ns
    learn = make(path, [Resume(file, resume=True)], accumulate=1)
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=8, show_plot=False)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))
    assert file.stat().st_mtime_ns==stamp

def test_best_is_remembered(path, tmp_path):
    "The best value so far survives, or the first epoch after a stop would count as better"
    file = tmp_path/'last.pt'
    def track(): return SaveModelCallback('valid_loss', fname='best')
    first = run(make(path, [Resume(file, every=1), track()]), 1)
    again = make(path, [Resume(file, resume=True), track()])
    best = []
    class Look(Callback):
        order = Resume.order+1
        def before_fit(self): best.append(self.learn.save_model.best)
    again.add_cb(Look())
    run(again, 1)
    assert best==[float(first.save_model.best)]

def test_a_signal_after_a_failed_fit(path):
    "A fit that ends with an error does not swallow the next Ctrl-C"
    old = signal.getsignal(signal.SIGINT)
    try:
        learn = make(path)
        with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Stop(), CutOff(1)])
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    finally: signal.signal(signal.SIGINT, old); signal.signal(signal.SIGTERM, signal.SIG_DFL)

# ---- what is refused, and what an older file is

@pytest.fixture(scope='module')
def last(path, tmp_path_factory):
    "What a finished run wrote"
    file = tmp_path_factory.mktemp('last')/'last.pt'
    run(make(path, [Resume(file)]))
    return file

def refused(path, file, match, **kwargs):
    with pytest.raises(ValueError, match=match): run(make(path, [Resume(file, resume=True)], **kwargs))

@pytest.mark.parametrize('size', [5000, 0])
def test_a_damaged_file_is_refused(path, last, tmp_path, size):
    file = tmp_path/'bad.pt'
    file.write_bytes(last.read_bytes()[:size])
    refused(path, file, 'bad.pt: damaged')

def test_weights_alone_are_refused(path, tmp_path):
    torch.save(SMALL.build().state_dict(), tmp_path/'bad.pt')
    refused(path, tmp_path/'bad.pt', 'weights alone')

def test_weights_of_another_model_are_refused(path, last):
    refused(path, last, 'weights of another model', hyper=replace(SMALL, n_queries=1, grid=(1,1,.4)))

def test_another_batch_size_is_refused(path, last): refused(path, last, 'must be the same', bs=4)

def test_the_libraries_of_matmuls_are_those_of_the_file(path, last, tmp_path):
    s = torch.load(last, weights_only=True)
    assert len(s['matmuls'])==1 and CHOSEN.items() >= s['matmuls'][0].items()
    s['matmuls'][0][7, 9] = False
    torch.save(s, tmp_path/'last.pt')
    run(make(path, [Resume(tmp_path/'last.pt', resume=True)]))
    assert CHOSEN.pop((7, 9)) is False

def test_a_file_of_an_older_version_loads(path, whole, tmp_path):
    "It says 'cuda' where today's says 'device', and has no libraries of matmuls"
    file = tmp_path/'last.pt'
    with pytest.raises(RuntimeError, match='cut off'): run(make(path, [Resume(file, every=1), CutOff(4)]))
    s = torch.load(file, weights_only=True)
    for r in s['rng']: r['cuda'] = r.pop('device')
    del s['matmuls']
    torch.save(s, file)
    same(whole, run(make(path, [Resume(file, resume=True)])))

def test_the_csv_log_is_whole_after_going_on(path, whole, tmp_path):
    file = tmp_path/'last.pt'
    def cbs(*more): return [CSVLog(tmp_path/'log.csv'), *more]
    with pytest.raises(RuntimeError, match='cut off'): run(make(path, cbs(Resume(file, every=1), CutOff(5))))
    again = run(make(path, cbs(Resume(file, resume=True))))
    want = whole.history.train_loss.tolist()
    assert again.csv_log.read().train_loss.tolist()==pytest.approx(want, abs=1e-4)

# ---- random generators

def draws(): return torch.rand(2).tolist(), np.random.rand(), random.random()

def test_generators_are_put_back(tmp_path):
    s = resume._rng()
    want = draws()
    resume._set_rng(s)
    assert draws()==want
    torch.save(s, tmp_path/'rng.pt')
    resume._set_rng(torch.load(tmp_path/'rng.pt', weights_only=True))
    assert draws()==want

class Several:
    "An accelerator of two devices"
    def __init__(self): self.states = [torch.tensor([1]), torch.tensor([2])]
    def get_rng_state_all(self): return list(self.states)
    def set_rng_state_all(self, states):
        for i,o in enumerate(states): self.states[i] = o # an IndexError for states of devices that are not there
    def device_count(self): return len(self.states)

class Single:
    "An accelerator of one device"
    def __init__(self): self.states = [torch.tensor([1])]
    def get_rng_state(self): return self.states[0]
    def set_rng_state(self, state): self.states = [state]

@pytest.mark.parametrize('kind', [Several, Single])
def test_generators_of_any_accelerator_are_put_back(monkeypatch, kind):
    module = kind()
    monkeypatch.setattr(resume, '_accelerator', lambda: module)
    before = module.states
    s = resume._rng()
    module.states = [x + 5 for x in before]
    resume._set_rng(s)
    assert [x.item() for x in module.states]==[x.item() for x in before]

def test_a_training_goes_on_with_fewer_devices(monkeypatch):
    "`CUDA_VISIBLE_DEVICES=0` after a training where two were visible was an IndexError"
    module = Several()
    monkeypatch.setattr(resume, '_accelerator', lambda: module)
    s = resume._rng()
    module.states = [torch.tensor([7])]
    resume._set_rng(s)
    assert [x.item() for x in module.states]==[1]

def test_states_of_another_kind_of_accelerator_are_passed_over(monkeypatch):
    module = Several()
    monkeypatch.setattr(resume, '_accelerator', lambda: module)
    monkeypatch.setattr(resume, 'accelerator', lambda: torch.device('cuda', 1))
    s = resume._rng()
    module.states = [torch.tensor([7])]
    monkeypatch.setattr(resume, 'accelerator', lambda: torch.device('mps'))
    resume._set_rng(s)
    assert [x.item() for x in module.states]==[7]

def test_states_of_an_accelerator_are_passed_over_without_one(monkeypatch):
    monkeypatch.setattr(resume, '_accelerator', lambda: None)
    s = resume._rng()
    assert s['device']==[]
    resume._set_rng(s | dict(device=[torch.tensor([1])]))

# ---- signals

class Knock(Callback):
    "A SIGTERM in the fourth iteration"
    def before_backward(self):
        if self.train_iter==3: os.kill(os.getpid(), signal.SIGTERM)

def test_a_signal_ends_the_run_between_two_iterations(path, whole, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    stopped = run(make(path, [Resume(tmp_path/'knock.pt'), Stop(), Knock()]))
    again = run(make(path, [Resume(tmp_path/'knock.pt', resume=True), Stop()]))
    assert [stopped.stop.asked, stopped.train_iter, again.stop.asked]==['SIGTERM', 4, None]
    same(whole, again)
    assert signal.getsignal(signal.SIGTERM)==handler

# The rest needs processes that can be killed: forks of this one, which has imported all that they need

def told(path, file, how, n):
    "A run that prints NOW where it is to be struck: in the n-th save, around its renaming, or in the n-th iteration"
    saves = 0
    def hang():
        print('NOW', flush=True)
        time.sleep(100)
    save,move = torch.save,os.replace
    def torch_save(s, f):
        nonlocal saves
        saves += 1
        if saves!=n or how!='write': return save(s, f)
        whole = io.BytesIO()
        save(s, whole)
        f.write(whole.getvalue()[:len(whole.getvalue())//2])
        f.flush()
        hang()
    def replace_(a, b):
        here = str(b).endswith('last.pt') and saves==n
        if here and how=='before move': hang()
        move(a, b)
        if here and how=='after move': hang()
    class Slow(Callback):
        def before_backward(self):
            if how!='term' or self.train_iter!=n: return
            print('NOW', flush=True)
            time.sleep(3)
    torch.save,os.replace = torch_save,replace_
    learn = run(make(path, [Resume(file, every=1), Stop(), Slow()]))
    print('stopped by', learn.stop.asked, 'after', learn.train_iter)

def child(f, pipe):
    "Call `f` in a process of its own that prints to a pipe; its id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        signal.alarm(120) # ends it
        for fd in (1, 2): os.dup2(pipe, fd)
        sys.stdout = sys.stderr = open(1, 'w')
        f()
        status = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

def strike(path, file, how, n, sig):
    "Start a run, wait until it says so, send a signal; what it printed, and its exit status"
    here,there = os.pipe()
    pid = child(lambda: told(path, file, how, n), there)
    os.close(there)
    out = ''
    with open(here) as lines:
        for line in lines:
            out += line
            if line.strip()=='NOW': os.kill(pid, sig)
    assert 'NOW' in out and 'Traceback' not in out, out
    return out, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@pytest.mark.parametrize('how, n, done', [('write', 3, 2), ('before move', 4, 3), ('after move', 2, 2)])
def test_sigkill_while_saving(path, whole, tmp_path, how, n, done):
    "The file is the last whole one, and the run goes on from it to the same end"
    file = tmp_path/'last.pt'
    assert strike(path, file, how, n, signal.SIGKILL)[1] == -signal.SIGKILL
    assert torch.load(file, weights_only=True)['train_iter'] == done
    same(whole, run(make(path, [Resume(file, resume=True)])))
    assert [f.name for f in tmp_path.iterdir()]==['last.pt'] # what was half written is gone

def test_sigterm(path, whole, tmp_path):
    "The iteration ends, all is saved, the program ends well"
    file = tmp_path/'last.pt'
    out,code = strike(path, file, 'term', 3, signal.SIGTERM)
    assert code==0 and 'stopped by SIGTERM after 4' in out
    same(whole, run(make(path, [Resume(file, resume=True)])))
