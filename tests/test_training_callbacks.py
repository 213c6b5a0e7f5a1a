"Callbacks on the learner that they are made for, each against a run without it"
import math, warnings
from dataclasses import replace
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger, ProgressCallback
from deqdet.backbone import read_weights
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.equilibrium import Perturb, Settled
from deqdet.learner import (EMA, CSVLog, NonFinite, Recipe, SaveBest, WatchSettling, average_checkpoints,
                            det_learner)
from deqdet.loss import SetLoss
from deqdet.families.adamixer import AdaMixer
from deqdet.training.callbacks import FitLoop, Patience

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9,
                 grid=(3,3,.4), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=64,
                 strategy=Settled(steps=3, supervise=(1,3), perturb=Perturb(position=3.)))

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('callbacks')/'shapes', n_train=8, n_valid=4, size=64, seed=1)

def make(path, bs=4, hyper=SMALL, **kwargs):
    torch.manual_seed(0)
    dls = det_dls(path, bs=bs, num_workers=0, device='cpu')
    learn = det_learner(dls, hyper.build(), **dict(lr=1e-3, path=path) | kwargs)
    learn.remove_cb(ProgressCallback)
    learn.recorder.add_time = False
    return learn

def fit(learn, n=1):
    with learn.quiet(): learn.fit(n)
    return learn

# ---- schedule

def test_schedule_sets_the_rates_of_a_recipe(path):
    learn = make(path)
    with learn.quiet(): learn.fit_published(Recipe(epochs=6, drops=(3,5), warmup=3))
    lrs = learn.recorder.hps['lr']
    assert [lrs[i] for i in (0,2,6,10)]==pytest.approx([4e-6, 4e-3, 4e-4, 4e-5])

@pytest.mark.parametrize('recipe,kwargs,risen', [
    (Recipe(epochs=3, drops=(), warmup=4), {}, [.001, .334, .667, 1., 1., 1.]), # its own length: its own warm-up
    (Recipe(epochs=9, drops=(), warmup=4), dict(epochs=3), [1.]*6),
    (Recipe(updates=6, drops=(), warmup=4), {}, [1.]*12),
    ('1x', {}, [1.]*16 + [.1]*6 + [.01]*2), # made for COCO's number of updates
    ('1x', dict(epochs=6), [1.]*8 + [.1]*2 + [.01]*2)])
def test_a_fit_of_another_length_has_another_warmup(path, recipe, kwargs, risen):
    learn = make(path)
    with learn.quiet(): learn.fit_published(recipe, **kwargs)
    assert learn.recorder.hps['lr']==pytest.approx([4e-3*o for o in risen], abs=4e-6)

@pytest.mark.filterwarnings('ignore')
def test_the_recipes_own_rates_count_where_none_was_given(path):
    learn = make(path, lr=None)
    with learn.quiet(): learn.fit_published('2x', epochs=1)
    assert [h['wd'] for h in learn.opt.hypers]==pytest.approx([.01, .01, .1])
    assert [learn.lr, learn.recipe.drops]==[2.5e-5, (16,22)]

# ---- half precision

class Dtypes(Callback):
    "What the neck's convolutions compute in, and what the boxes are"
    def before_fit(self): self.hook = self.model.pyramid.neck.convs[0].register_forward_hook(self.look)
    def look(self, module, x, y): self.neck = y.dtype
    def after_pred(self): self.boxes = self.pred[-1].boxes.dtype
    def after_fit(self): self.hook.remove()

def test_half_precision_is_for_products_alone(path):
    first = {}
    for mode,neck in {None: torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}.items():
        learn = fit(make(path, amp=mode, cbs=Dtypes()))
        assert (learn.dtypes.neck, learn.dtypes.boxes)==(neck, torch.float32)
        first[mode] = learn.recorder.losses[0].item()
        assert first[mode]/first[None]==pytest.approx(1, abs=.01)

def test_a_callback_hears_of_the_end_of_a_batch_whatever_happens(path):
    heard = []
    class Hear(Callback):
        def leave_batch(self): heard.append(self.iter)
        def after_pred(self):
            if self.iter==1: raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'): fit(make(path, cbs=Hear()))
    assert heard==[0, 1]

# ---- accumulation

class Grab(Callback):
    order = 7 # before clipping
    def before_step(self):
        self.g = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        raise CancelFitException

def off(a, b): return ((a - b).norm()/b.norm()).item()

def test_accumulation_is_the_mean_over_batches(path):
    "Exactly the mean of two batches of 2, and closer to a batch of 4 than the first of them"
    flat = replace(SMALL, body='resnet10t', strategy=Stacked(2))
    def gradient(bs, **kwargs): return fit(make(path, bs, flat, cbs=Grab(), **kwargs)).grab.g
    four = gradient(4)
    two_twos = gradient(2, accumulate=2)
    assert off(two_twos, four) < off(gradient(2), four)
    torch.manual_seed(0)
    m = flat.build().train()
    batches = [b for b,_ in zip(det_dls(path, bs=2, num_workers=0, device='cpu').train, range(2))]
    (sum(SetLoss()(m(*b[:2]), b[2]) for b in batches)/2).backward()
    assert off(two_twos, torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])) < 1e-5

def test_an_update_that_never_comes_is_refused(path):
    with pytest.raises(ValueError, match='nothing would be learned'): make(path, 2, accumulate=1000).fit(1)

# ---- averages

def test_an_average_does_not_change_training(path):
    plain = make(path, lr=4e-3)
    averaged = make(path, lr=4e-3, cbs=EMA(.8))
    for learn in (plain, averaged):
        torch.manual_seed(0)
        fit(learn, 3)
    assert plain.history.train_loss.tolist()==pytest.approx(averaged.history.train_loss.tolist(), abs=1e-4)
    weights = averaged.ema.avg[0] # after the fit the average is in the model, and the weights are here
    name = 'pyramid.body.net.conv1.weight'
    torch.testing.assert_close(weights, plain.model.state_dict()[name], atol=1e-5, rtol=0)
    assert not torch.equal(weights, averaged.model.state_dict()[name])

def test_the_best_epoch_is_kept_as_it_was_validated(path, tmp_path):
    best = SaveBest(tmp_path/'best.pt', monitor='valid_loss')
    learn = fit(make(path, cbs=[best, EMA(.8)], lr=4e-3), 3)
    logged = learn.history.valid_loss
    assert learn.save_best.best_epoch==logged.argmin()
    learn.model.load_state_dict(read_weights(tmp_path/'best.pt'))
    with learn.quiet(): assert learn.validate()[0]==pytest.approx(logged.min(), abs=1e-4)

def test_the_average_of_two_checkpoints(path, tmp_path):
    learn = fit(make(path, model_dir=tmp_path))
    files = [learn.save('one')]
    files.append(fit(learn).save('two'))
    k = 'decoder.step.cls.3.weight'
    a,b = (read_weights(f)[k] for f in files)
    assert not torch.equal(a, b)
    torch.testing.assert_close(average_checkpoints(files)[k], (a + b)/2, atol=1e-5, rtol=0)

# ---- watching

def test_terms_of_every_iteration_are_recorded(path):
    learn = fit(make(path), 3)
    assert [len(v) for v in learn.term_recorder.values.values()]==[6, 6, 6]
    assert set(learn.term_recorder.values)=={'cls', 'l1', 'giou'}

class Spoil(Callback):
    "NaN in the second training batch"
    run_valid = False
    def after_pred(self):
        if self.train_iter==1: self.learn.pred[-1].boxes[1,0] = torch.nan

def test_a_bad_batch_is_left_out_or_stops_the_run(path):
    with pytest.raises(Exception, match='image ids'): fit(make(path, cbs=Spoil()))
    with pytest.raises(FloatingPointError, match='train_0000'): fit(make(path, cbs=[Spoil(), NonFinite()]))
    with pytest.warns(UserWarning, match='predictions are not finite at update 1'):
        learn = fit(make(path, cbs=[Spoil(), NonFinite(skip=2)]), 2)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert [len(learn.non_finite.skipped), learn.non_finite.row]==[1, 0]

def test_the_log_survives_validation(path):
    "fastai's is emptied by `validate`; ours has every epoch"
    learn = fit(make(path, cbs=[CSVLogger('theirs.csv'), CSVLog('ours.csv')]), 2)
    logged = learn.history.valid_loss.tolist()
    with learn.quiet(): learn.validate()
    assert len(learn.csv_logger.read_log())!=2
    assert learn.csv_log.read().valid_loss.tolist()==pytest.approx(logged, abs=1e-4)

def test_settling_is_watched_in_every_epoch(path):
    learn = fit(make(path, cbs=WatchSettling(12), lr=2e-3), 3)
    assert [t.shape for t in learn.watch_settling.traces]==[(13,2)]*3

# ---- the loop

def test_a_loop_knows_a_fit_from_a_search_and_a_validation(path):
    seen = []
    class See(Callback):
        def before_batch(self): seen.append(self.learn.fitting)
    learn = make(path, cbs=See())
    assert isinstance(learn, FitLoop)
    def flags(f):
        seen.clear()
        with learn.quiet(): f()
        return set(seen)
    assert flags(lambda: learn.fit(1))=={True}
    assert flags(learn.validate)==flags(lambda: learn.lr_find(num_it=8, show_plot=False))=={False}
    assert not learn.fitting

def test_an_update_is_described_once(path):
    learn = make(path, lr=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(learn)
        fit(learn)
    assert len([o for o in caught if 'pass lr' in str(o.message)])==1

# ---- patience

class Told(Callback):
    "AP as it is told, instead of what was measured"
    order = Patience.order-1
    def __init__(self, values): self.values = values
    def after_validate(self): self.recorder.log[self.recorder.metric_names.index('AP')] = self.values[self.epoch]

@pytest.mark.parametrize('values, epochs', [([.1, .2, .2, .1, .3], 4), ([.1, .2, .2, .3, .3, .3, .4], 6), ([.1, .2, .3], 3)])
def test_a_fit_ends_when_patience_does(path, values, epochs):
    learn = make(path, cbs=[Patience(2), Told(values)], lr=0.)
    assert len(fit(learn, len(values)).history)==epochs

def test_patience_survives_an_interruption(path):
    learn = make(path, cbs=[Patience(2), Told([.2, .1, .1, .1])], lr=0.)
    fit(learn, 2)
    s = learn.patience.state_dict()
    assert s==dict(best=.2, waited=1)
    class Restored(Callback):
        order = Patience.order+1
        def before_fit(self): self.patience.load_state_dict(s)
    learn.add_cb(Restored())
    learn.told.values = [.1, .9, .9]
    assert len(fit(learn, 3).history)==1
