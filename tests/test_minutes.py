"Training by the clock: it ends in time, evaluated, whatever the lengths of epochs and evaluations; the clock moves by hand"
import math
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
import deqdet.learner
from deqdet.data import det_dls, synth_coco
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet import runs
from deqdet.learner import EMA, CSVLog, Recipe, Resume, SaveBest, det_learner
from deqdet.model import Feed
from deqdet.predict import save_detector
from deqdet.training import minutes
from deqdet.training.minutes import MaySkip, TimeBudget, budget_by_recipe, clock_factor


class Hand:
    "A clock"
    now = 0.
    def __call__(self): return self.now


class Tick(Callback):
    "A batch takes `batch` seconds, an evaluation `evaluation`; notes when each of them ended"
    order = TimeBudget.order - 1
    def __init__(self, hand, batch=1., evaluation=2.):
        self.hand, self.batch, self.evaluation = hand, batch, evaluation
        self.updated, self.evaluated = [], []
    def after_batch(self):
        if not self.training: return
        self.hand.now += self.batch
        self.updated.append(self.hand.now)
    def after_validate(self):
        self.hand.now += self.evaluation
        self.evaluated.append(self.hand.now)


class Pairs:
    "Numbers and their doubles"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor([i/self.n]), torch.tensor([2*i/self.n])


class Small(MaySkip, Learner): pass


def run(batches, seconds=60, evaluations=4, batch=1., evaluation=2., before=0., **kwargs):
    "Fit a number; epochs of so many batches"
    hand = Hand()
    dls = DataLoaders.from_dsets(Pairs(4*batches), Pairs(8), bs=4, num_workers=0, device='cpu')
    learn = Small(dls, nn.Linear(1, 1), loss_func=nn.MSELoss())
    tick = Tick(hand, batch, evaluation)
    budget = TimeBudget(seconds/60, evaluations, clock=hand, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1000, lr=.01, cbs=[budget, tick])
    return tick, budget, learn

def test_the_rate_rises_within_the_updates_of_the_recipe():
    "A twentieth of ten minutes are thirty batches here; four of them are enough"
    slow, fast = (run(50, 600, warmup_batches=n)[1].hps['lr'] for n in (None, 4))
    assert max(slow[:20]) < .0075 < .0099 < fast[3]
    assert fast[:4] == pytest.approx([.0025, .005, .0075, .01], rel=1e-3)
    assert fast[60:] == pytest.approx(slow[60:])

# ---- the clock

@pytest.mark.parametrize('evaluation', [.5, 2., 7.])
@pytest.mark.parametrize('batches', [1, 2, 3, 7, 9, 10, 11, 13, 20, 23, 45, 47, 49, 55, 300])
def test_it_ends_in_time_and_evaluated_last(batches, evaluation):
    tick, budget, learn = run(batches, evaluation=evaluation)
    # the first evaluation is guessed to take half a second per batch; where it takes longer, so does the end
    guessed = 1. if len(tick.evaluated)==1 else evaluation
    assert tick.hand.now <= 60 + max(0, evaluation - guessed)
    assert tick.evaluated[-1]==tick.hand.now > tick.updated[-1]
    assert len(tick.evaluated) <= 4
    # never the same weights twice
    for a,b in zip([0., *tick.evaluated], tick.evaluated): assert any(a < t < b for t in tick.updated)
    # what is left would not have been enough for one more batch, an evaluation, and what is kept back
    longest = max(evaluation, guessed)
    assert 60 - tick.hand.now < budget.reserve + 1.1*longest + tick.batch


@pytest.mark.parametrize('evaluations', [1, 2, 3, 8])
def test_no_more_evaluations_than_asked(evaluations):
    tick, *_ = run(batches=2, evaluations=evaluations, evaluation=1.)
    assert 1 <= len(tick.evaluated) <= evaluations


def test_an_evaluation_longer_than_the_time_still_comes_last():
    tick, *_ = run(batches=50, seconds=10, evaluation=50.)
    assert len(tick.evaluated)==1 and tick.updated
    assert tick.updated[-1] < 10


def test_the_rate_falls_to_nothing_with_the_time():
    tick, budget, _ = run(batches=10)
    rates = budget.hps['lr']
    assert len(rates)==len(tick.updated)
    assert max(rates)==pytest.approx(.01, rel=.02)
    assert rates[0] < .1*max(rates) and rates[-1] < .01*max(rates)


def test_the_schedule_is_a_rise_and_half_a_cosine():
    assert clock_factor(0.) > 0
    assert clock_factor(.5)==pytest.approx(.5)
    assert clock_factor(1.)==clock_factor(2.)==0
    assert clock_factor(.05)==pytest.approx((1 + math.cos(.05*math.pi))/2)


def test_a_fit_without_a_clock_evaluates_after_every_epoch():
    "The one after a fit by the clock too, and the one after a fit that broke"
    tick, budget, learn = run(batches=2)
    class Break(Callback):
        def after_batch(self):
            if self.training and self.train_iter==3: raise RuntimeError('broken')
    def count(epochs=3):
        again = Tick(Hand())
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=again)
        return len(again.evaluated)
    assert count()==3
    hand = Hand()
    with pytest.raises(RuntimeError, match='broken'), learn.no_bar(), learn.no_logging():
        learn.fit(9, cbs=[TimeBudget(1, clock=hand), Tick(hand), Break()])
    assert learn.validate_now
    learn.remove_cbs(list(learn.cbs[-3:])) # a fit that breaks leaves its own
    assert count()==3

@pytest.mark.parametrize('batches', [1, 5, 7, 100])
def test_at_most_so_many_batches(batches):
    "The schedule ends with them, long before the ten minutes, and evaluations are spread over them"
    tick, budget, learn = run(batches, 600, most=24)
    assert budget.made==len(tick.updated)==24
    assert tick.evaluated[-1]==tick.hand.now > tick.updated[-1]
    assert 1 <= len(tick.evaluated) <= 4
    assert budget.hps['lr'][-1] < .01*max(budget.hps['lr'])


def test_a_limit_beyond_the_time_changes_nothing():
    plain, limited = (run(9, 60, **o) for o in ({}, dict(most=10_000)))
    assert plain[0].updated==limited[0].updated and plain[0].evaluated==limited[0].evaluated
    assert plain[1].hps['lr']==limited[1].hps['lr']

# ---- going on

def test_what_was_spent_before_counts():
    hand = Hand()
    first = TimeBudget(1, clock=hand)
    hand.now = 25.
    s = first.state_dict()
    hand.now = 1000.
    later = TimeBudget(1, clock=hand)
    later.load_state_dict(s)
    hand.now = 1005.
    assert later.elapsed()==30


def test_batches_of_before_count():
    _, budget, _ = run(5, 600, most=30)
    later = TimeBudget(10, clock=Hand(), most=40)
    later.load_state_dict(budget.state_dict())
    assert later.part()==.75

# ---- a detector

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4, grid=(2,2,.4),
                 width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=32,
                 strategy=Settled(steps=2, supervise=(2,), perturb=None))

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('minutes')/'shapes', n_train=8, n_valid=4, size=64, seed=1)


def make(path, cbs=(), recipe=Recipe(lr=1e-3)):
    torch.manual_seed(0)
    dls = det_dls(path, bs=4, num_workers=0, device='cpu')
    learn = det_learner(dls, SMALL.build(), recipe, path=path, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.recorder.add_time = False
    return learn


def fit(learn, hand, monkeypatch, evaluations=3, **kwargs):
    "`fit_published(minutes=)` by a clock that moves by hand; a quarter of a minute, a second each batch"
    budget = partial(TimeBudget, evaluations=evaluations, clock=hand)
    monkeypatch.setattr(minutes, 'TimeBudget', budget)
    tick = Tick(hand)
    with learn.quiet(): learn.fit_published(minutes=.25, cbs=tick, **kwargs)
    return tick


def test_a_detector_is_trained_for_minutes(path, monkeypatch):
    learn = make(path, [SaveBest(), CSVLog()])
    tick = fit(learn, Hand(), monkeypatch)
    assert tick.hand.now <= 15 and tick.evaluated[-1]==tick.hand.now
    assert 1 <= len(tick.evaluated) <= 3
    history = learn.history
    assert len(history)==math.ceil(len(tick.updated)/2)
    assert history.AP.count()==len(tick.evaluated) and not math.isnan(history.AP.iloc[-1])
    assert not any(isinstance(o, TimeBudget) for o in learn.cbs)
    assert learn.csv_log.read().AP.tolist()==pytest.approx(history.AP.tolist(), nan_ok=True)
    assert history.train_loss.notna().all()
    assert learn.save_best.best==history.AP.max()
    with learn.quiet(): values = learn.validate()
    assert list(values)==pytest.approx(history.iloc[-1, 1:].tolist(), rel=1e-4, nan_ok=True) # each in its own column


def test_short_epochs_do_not_save(path, monkeypatch, tmp_path):
    "Before and after each evaluation it saves, and not after each of the many epochs"
    saves = []
    monkeypatch.setattr(Resume, 'save', lambda self: saves.append(self.train_iter))
    learn = make(path, [Resume(tmp_path/'last.pt')])
    tick = fit(learn, Hand(), monkeypatch)
    assert len(learn.history) > len(tick.evaluated)
    assert [saves.count(i) for i in sorted(set(saves))] == [2]*len(tick.evaluated)


def test_the_average_is_what_is_evaluated_and_what_remains(path, monkeypatch):
    class Weights(Callback):
        "First weights of the decoder in each evaluation, and after the last update"
        def now(self): return self.model.state_dict()['decoder.step.cls.3.weight'].clone()
        def before_fit(self): self.seen = []
        def before_batch(self):
            if not self.training and self.iter==0: self.seen.append(self.now())
        def after_step(self): self.trained = self.now()
    learn = make(path, [EMA(.8), Weights()])
    tick = fit(learn, Hand(), monkeypatch)
    w = learn.weights
    assert len(w.seen)==len(tick.evaluated)
    assert torch.equal(w.seen[-1], w.now())
    assert not torch.equal(w.trained, w.now())


def test_a_run_that_was_cut_off_gets_the_rest_of_its_minutes(path, monkeypatch, tmp_path):
    class CutOff(Callback):
        order = Resume.order + 1
        def after_batch(self):
            if self.training and self.train_iter==5: raise RuntimeError('cut off')
    file = tmp_path/'last.pt'
    with pytest.raises(RuntimeError, match='cut off'):
        fit(make(path, [Resume(file, every=1), CutOff()]), Hand(), monkeypatch)
    hand = Hand()
    hand.now = 1000.
    learn = make(path, [Resume(file, resume=True)])
    tick = fit(learn, hand, monkeypatch)
    assert learn.train_iter > 5 and 5 <= 1015 - tick.hand.now <= 12 # five seconds are gone
    assert tick.evaluated[-1]==tick.hand.now

# ---- how long a recipe trains that asks for updates, and its average

@pytest.mark.parametrize('n, epochs', [(0, 120), (1, 120), (2, 60), (4, 30), (8, 15), (50, 15), (100, 15), (150, 10), (250, 6), (10**6, 6)])
def test_finetune_asks_for_updates_within_6_to_15_epochs(n, epochs):
    "Or for 120 updates, where the set is so small"
    assert deqdet.learner.recipes['finetune'].epochs_for(n)==epochs


def test_minutes_have_the_limit_of_the_epochs(path):
    "120 updates of so few images, of two batches each where two are accumulated; recipes that count epochs have none"
    assert budget_by_recipe(make(path, recipe='finetune'), 9).most==120
    learn = make(path, recipe='finetune')
    learn.accumulate = 2
    assert budget_by_recipe(learn, 9).most==240
    assert budget_by_recipe(make(path, recipe='tiny'), 9).most==math.inf


def test_a_training_that_ends_before_its_minutes_says_so(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Recipe, 'most_for', lambda self, n: 10)
    model = SMALL.build(vocab=['disc','triangle','square','cross'])
    model.feed = Feed(64, 64)
    save_detector(model, tmp_path/'start')
    o = dict(data=str(path), model=str(tmp_path/'start'), recipe='finetune', size='64', ema=.9)
    learn = runs.train(o | dict(minutes=90.), tmp_path/'run')
    assert learn.train_iter==10 and learn.keep.best is not None
    said = capsys.readouterr().out
    assert '5 passes over 8 images are enough; --epochs sets another number' in said


@pytest.mark.parametrize('n', [1, 10**6])
def test_other_recipes_ask_for_epochs(n):
    others = {k: r for k,r in deqdet.learner.recipes.items() if k!='finetune'}
    assert all(r.epochs_for(n)==r.epochs for r in others.values())


def averages(learn): return [o.decay for o in learn.cbs if isinstance(o, EMA)]

def test_a_recipe_brings_its_average_once(path):
    assert averages(make(path, recipe='finetune'))==[.99]
    assert averages(make(path, [EMA(.8)], recipe='finetune'))==[.8]
    assert averages(make(path, EMA(.8), recipe='finetune'))==[.8]
    assert averages(make(path, recipe='1x'))==[]


@pytest.mark.filterwarnings('ignore')
def test_fit_by_another_recipe_brings_its_average_too(path):
    learn = make(path, recipe='1x')
    with learn.quiet(): learn.fit_published('finetune', epochs=1)
    assert averages(learn)==[.99]
    with learn.quiet(): learn.fit_published('finetune', epochs=1)
    assert averages(learn)==[.99]
    with learn.quiet(): learn.fit_published('tiny', epochs=1) # has none
    assert averages(learn)==[] and not hasattr(learn, 'denoise')
