"A learner as people use it: accumulation, half precision, interrupted fits, fastai's callbacks, empty results"
import copy, math, warnings
from dataclasses import replace
import matplotlib.pyplot as plt, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.core import GatherPredsCallback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.optimizer import Adam
from deqdet.data import DetDataset, det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.learner import EMA, Resume, WatchSettling, average_checkpoints, det_learner, recipes
from deqdet.families.shared import Shared
from deqdet.loss import SetLoss
from deqdet.ops.errors import one_line
from deqdet.predict import eval_loader
from deqdet.training.contraction import Contract, Later, RandomSteps, jacobian
from deqdet.training.denoise import Denoise
from deqdet.training.minutes import TimeBudget
from deqdet.training.pairs import Pairs
from deqdet.training.results import draw_results
from deqdet.viz import show_pairs, show_predictions
from deqdet.zoo import create_detector
from test_learner import SMALL

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('use')/'shapes', n_train=6, n_valid=3, size=64, seed=5)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def make(path, recipe='1x', hyper=SMALL, **kwargs):
    torch.manual_seed(0)
    dls = det_dls(path, bs=2, num_workers=0, device='cpu')
    learn = det_learner(dls, hyper.build(), recipe, **dict(lr=1e-3, path=path) | kwargs)
    learn.remove_cb(ProgressCallback)
    learn.recorder.add_time = False
    return learn

def fit(learn, n=1, **kwargs):
    with warnings.catch_warnings(), learn.quiet():
        warnings.simplefilter('ignore')
        learn.fit(n, **kwargs)
    return learn

# ---- terms that callbacks add to the loss

class Shares(Callback):
    "The loss, and what goes into the gradient, of the first batch"
    order = 20
    run_valid = False
    def before_fit(self): self.first = None
    def before_backward(self): self.first = self.first or (self.learn.loss.item(), self.learn.loss_grad.item())

ADDED = dict(denoise=lambda: Denoise(), contract=lambda: Contract(1.), pairs=lambda: Pairs())

@pytest.mark.parametrize('name', ADDED)
def test_accumulation_divides_added_terms_as_the_loss(path, name):
    "An update of two batches gets half of each batch's sum, and the log the whole"
    def first(accumulate): return fit(make(path, accumulate=accumulate, cbs=[ADDED[name](), Shares()])).shares.first
    plain = fit(make(path, cbs=Shares())).shares.first[0]
    alone,summed = first(1),first(2)
    assert alone[0]==pytest.approx(alone[1]) and alone[0] > plain*1.001
    assert summed==pytest.approx((alone[0], alone[0]/2), rel=1e-5)

@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
@pytest.mark.parametrize('name', [*ADDED, 'jacobian'])
def test_added_terms_in_half_precision(path, name, amp):
    "Close to those in float32"
    cbs = ADDED | dict(jacobian=lambda: Contract(1e-3, jacobian))
    torch.manual_seed(0)
    whole = fit(make(path, cbs=[cbs[name](), Shares()])).shares.first[0]
    half = fit(make(path, cbs=[cbs[name](), Shares()], amp=amp)).shares.first[0]
    assert half==pytest.approx(whole, rel=.05)

def test_the_recipe_for_own_images_in_half_precision(path):
    learn = make(path, 'finetune', amp='bf16')
    assert learn.recipe.denoise and learn.denoise
    assert fit(learn).history.train_loss.notna().all()

# ---- interrupted fits

class Interrupt(Callback):
    "Ctrl+C in the second batch"
    def after_loss(self):
        if self.training and self.train_iter==1: raise KeyboardInterrupt

def interrupted(path, recipe='1x', **kwargs):
    learn = make(path, recipe, **kwargs)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Interrupt())
    return learn

def test_the_log_after_an_interrupted_fit(path):
    learn = interrupted(path)
    names = [o for o in fit(learn).recorder.metric_names]
    assert names.count('AP')==1 and len(names)==len(set(names))
    assert names==[*fit(make(path)).recorder.metric_names]

def test_a_model_after_an_interrupted_fit(path):
    "No hook stays, so it can be copied and exported"
    learn = interrupted(path, 'finetune')
    assert not any(m._forward_hooks for m in learn.model.modules())
    copy.deepcopy(learn.model)
    learn.export('interrupted.pkl')

# ---- averages

class Moved(Callback):
    "The largest change of the weights between the events around validation"
    order = 200
    most = 0.
    def before_fit(self): self.run = self.learn.fitting
    def state(self): return torch.cat([v.flatten() for v in self.model.state_dict().values() if v.is_floating_point()])
    def after_train(self): self.before = self.state()
    def after_epoch(self): self.most = max(self.most, (self.state() - self.before).abs().max().item())

def test_an_average_given_to_a_fit_takes_the_place_of_the_recipes(path):
    learn = make(path, 'finetune')
    own = learn.ema
    mine = EMA(.9)
    fit(learn, 2, cbs=[mine, Moved()])
    assert mine.n==6 and not hasattr(own, 'n') and learn.ema is own
    moved = Moved()
    fit(make(path, 'finetune'), 2, cbs=[EMA(.9), moved])
    assert moved.most==0

@pytest.mark.parametrize('own', [EMA(.9), Denoise(2)])
def test_a_callback_given_to_a_fit_by_another_recipe_is_for_that_fit(path, own):
    learn = make(path)
    with warnings.catch_warnings(), learn.quiet():
        warnings.simplefilter('ignore')
        learn.fit_published('finetune', epochs=1, cbs=[own])
    kinds = [type(o) for o in learn.cbs]
    assert kinds.count(EMA)==kinds.count(Denoise)==1 and own not in learn.cbs
    assert hasattr(own, 'n' if isinstance(own, EMA) else 'hook') # it was the one that worked
    fit(learn)

def test_two_averages_are_refused(path):
    learn = make(path, 'finetune')
    learn.add_cb(EMA(.9))
    with pytest.raises(Exception, match='two averages'): fit(learn)
    fit(learn.remove_cb(EMA).add_cb(EMA(.9)))

def test_checkpoints_of_different_models_have_no_average(path, tmp_path):
    "Half of a tensor that one of them lacks was returned"
    kinds = dict(a=SMALL, b=replace(SMALL, strategy=Stacked(2)), c=replace(SMALL, hidden=64))
    folders = {k: hyper.build().save_pretrained(tmp_path/k) for k,hyper in kinds.items()}
    for k in 'bc':
        with pytest.raises(ValueError, match='another model'): average_checkpoints([folders['a'], folders[k]])
        with pytest.raises(ValueError, match='another model'): average_checkpoints([folders[k], folders['a']])
    with pytest.raises(ValueError, match='at least one'): average_checkpoints([])
    mean = average_checkpoints([folders['a'], folders['a']/'model.safetensors']) # a folder and a file
    SMALL.build().load_state_dict(mean)

NEEDY = [Pairs, RandomSteps, Later, WatchSettling]

@pytest.mark.parametrize('strategy', [Stacked(2), Shared(2)], ids=['stack', 'shared'])
@pytest.mark.parametrize('kind', NEEDY)
def test_callbacks_for_an_equilibrium(path, kind, strategy):
    "On a stack they were an AttributeError in the middle of a batch"
    learn = make(path, hyper=replace(SMALL, strategy=strategy))
    with pytest.raises(TypeError, match='needs an equilibrium; the decoder is a') as e: fit(learn, cbs=kind())
    assert one_line(e.value).startswith(f'{kind.__name__}() needs')
    assert kind.__name__ not in map(str, learn.cbs)
    fit(learn)

# ---- fits by the clock

class Hand:
    "A clock that moves with each batch"
    now = 0.
    def __call__(self): return self.now

class Tick(Callback):
    def __init__(self, hand): self.hand = hand
    def after_batch(self): self.hand.now += 1

def by_clock(path, *cbs, **kwargs):
    hand = Hand()
    learn = make(path, **kwargs)
    fit(learn, 99, cbs=[TimeBudget(1, evaluations=3, clock=hand), Tick(hand), *cbs])
    return learn

def test_trackers_pass_over_epochs_without_evaluation(path):
    saver = SaveModelCallback(monitor='valid_loss', fname='tracked')
    stop = EarlyStoppingCallback(monitor='valid_loss', patience=3, min_delta=1e9) # three evaluations: never
    learn = by_clock(path, saver, stop)
    losses = learn.history.valid_loss
    assert 1 < losses.notna().sum() < len(losses) and math.isclose(saver.best, losses.min(), rel_tol=1e-6)
    assert stop.wait==losses.notna().sum() - 1

def test_rows_of_the_log_have_all_columns(path):
    learn = by_clock(path)
    assert {len(o) for o in learn.recorder.values}=={len(learn.recorder.metric_names) - 1}
    learn.recorder.plot_loss()

@pytest.mark.parametrize('minutes', [0, -1, math.nan])
def test_minutes_are_more_than_none(path, minutes):
    "None trained by epochs, and fewer never ended"
    with pytest.raises(ValueError, match='more than 0'): make(path).fit_published(minutes=minutes)

@pytest.mark.parametrize('epochs', [0, 2])
def test_minutes_or_epochs(path, epochs):
    "Epochs were left out without a word, where `deqdet_train` refuses both"
    learn = make(path)
    with pytest.raises(ValueError, match='^epochs and minutes exclude each other$'):
        learn.fit_published('finetune', epochs, minutes=1)
    assert learn.recipe.epochs==recipes['1x'].epochs and not hasattr(learn, 'denoise')

# ---- callbacks of fastai

class Screen(Callback):
    "Stands for fastai's bars, and keeps all graphs"
    name = 'progress'
    def before_fit(self): self.graphs = []
    @property
    def mbar(self): return self
    def update_graph(self, *graph): self.graphs.append(graph)

def test_a_graph_of_the_losses(path):
    screen = Screen()
    learn = fit(make(path, cbs=ShowGraphCallback()), 4, cbs=screen)
    assert len(screen.graphs)==4
    (training, validation), (left, right), (low, high) = screen.graphs[1]
    assert validation[0]==(3, 6) and list(validation[1])==learn.history.valid_loss[:2].tolist()
    assert (*training[0],)==(*range(6),) and training[1]==[float(o) for o in learn.recorder.losses[:6]]
    assert (left, right, low)==(0, 12, 0) and high==max(*training[1], *validation[1])

def test_a_graph_of_minutes(path):
    "fastai's ended after the last of 100,000 epochs, and was redrawn in epochs without evaluation"
    screen = Screen()
    learn = by_clock(path, screen, ShowGraphCallback)
    losses = learn.history.valid_loss
    assert 1 < losses.notna().sum()==len(screen.graphs) < len(losses)
    (training, validation), (left, right), _ = screen.graphs[-1]
    assert list(validation[1])==losses.dropna().tolist()
    assert (left, right)==(0, len(training[1]))==(0, len(learn.recorder.losses))

def test_a_graph_of_a_resumed_training(path, tmp_path):
    whole,rest = Screen(),Screen()
    fit(make(path), 4, cbs=[whole, ShowGraphCallback()])
    fit(make(path), 4, cbs=[Resume(tmp_path/'r.pt'), Until(2)])
    fit(make(path), 4, cbs=[Resume(tmp_path/'r.pt', resume=True), rest, ShowGraphCallback()])
    assert len(rest.graphs)==2
    for a,b in zip(whole.graphs[2:], rest.graphs):
        assert a[1:]==b[1:] and a[0][0]==b[0][0] and [o[-1] for o in a[0][1]]==[o[-1] for o in b[0][1]]

class Until(Callback):
    "Ends a fit after some epochs"
    def __init__(self, n): self.n = n
    def before_epoch(self):
        if self.epoch==self.n: raise CancelFitException

def test_without_bars_there_is_no_graph(path):
    "It was an IndexError about a tuple"
    learn = fit(make(path, cbs=ShowGraphCallback()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.history)==1
    learn.get_preds()
    learn.validate()

@pytest.mark.parametrize('kind', [MixUp, CutMix])
def test_callbacks_that_blend_are_refused(path, kind):
    "MixUp was an error about an attribute of a tuple"
    learn = make(path)
    for add in (lambda: make(path, cbs=kind()), lambda: learn.add_cb(kind), lambda: learn.fit(1, cbs=[kind()]),
                lambda: learn.fit_published(epochs=1, cbs=kind())):
        with pytest.raises(ValueError, match=f'^{kind.__name__} blends .*Mosaic') as e: add()
        assert len(str(e.value).splitlines())==1
    fit(learn)

@pytest.mark.parametrize('kind, advice', [(GatherPredsCallback, 'learn.get_preds'), (NonNativeMixedPrecision, "amp='fp16'")])
def test_callbacks_for_one_prediction_are_refused(path, kind, advice):
    "They were errors about an attribute, or a missing GPU, from inside fastai"
    learn = make(path)
    for add in (lambda: make(path, cbs=kind()), lambda: learn.add_cb(kind), lambda: learn.fit(1, cbs=[kind()]), lambda: learn.validate(cbs=kind())):
        with pytest.raises(ValueError, match=f'^{kind.__name__} .*{advice}') as e: add()
        assert len(str(e.value).splitlines())==1
    with pytest.raises(ValueError, match='half precision'): learn.to_non_native_fp16()
    assert len(learn.get_preds()[0].boxes)==len(learn.dls.valid_ds)
    fit(learn)

# ---- what is given to a learner

def test_an_optimiser_of_fastai_is_refused(path):
    with pytest.raises(TypeError, match='PyTorch'): fit(make(path, opt_func=Adam))
    fit(make(path, opt_func=torch.optim.SGD))

def test_a_loss_without_terms(path):
    learn = fit(make(path, loss_func=lambda preds, target: preds[-1].logits.square().mean()))
    assert learn.history.valid_loss.notna().all() and learn.history.l1.isna().all()

def test_a_term_that_a_loss_lacks_is_an_error(path):
    with pytest.raises(Exception, match='nothing'): fit(make(path, metrics=['nothing'], loss_func=SetLoss()))

def test_classes_in_another_order_are_refused(path):
    "The detector would be saved with wrong names"
    dls = det_dls(path, bs=2, num_workers=0)
    names = list(dls.vocab)
    for other,advice in ((names[::-1], 'vocab=model.vocab'), (['a','b','c','d'], 'start_from')):
        with pytest.raises(ValueError, match=advice): det_learner(dls, SMALL.build(vocab=other))
    theirs = det_dls(path, bs=2, num_workers=0, vocab=names[::-1])
    assert det_learner(theirs, SMALL.build(vocab=names[::-1])).model.vocab==names[::-1]
    assert det_learner(dls, SMALL.build()).model.vocab==names

def test_thresholds_of_a_finished_training_that_is_resumed(path, tmp_path):
    first = fit(make(path, cbs=Resume(tmp_path/'run.pt')))
    first.model.thresholds = None # what is saved does not change with the model
    again = fit(make(path, cbs=Resume(tmp_path/'run.pt', resume=True)))
    assert len(again.model.thresholds)==4 and all(0 <= o <= 1 for o in again.model.thresholds)

@pytest.mark.parametrize('n', [20, 30, 300])
def test_any_number_of_queries(n):
    "On a grid as many, or a few more"
    for name in ('deqdet_tiny', 'sparse_rcnn_tiny', 'deqdet_small'):
        hyper = create_detector(name, n_classes=2, n_queries=n).hyper
        assert n <= hyper.n_queries <= n + n**.5 and math.prod(hyper.grid[:2])==hyper.n_queries
    assert create_detector('deformable_detr_tiny', n_queries=n).hyper.n_queries==n

# ---- half precision without autocast

@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['deqdet_tiny', 'sparse_rcnn_tiny', 'deformable_detr_tiny'])
def test_a_detector_in_half_precision_is_refused(name, kind):
    model = create_detector(name, n_classes=2).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad(): whole = model(image)[-1]
    with torch.no_grad(), torch.autocast('cpu', kind): half = model(image)[-1]
    assert (half.logits.float() - whole.logits).abs().median() < .1
    with pytest.raises(TypeError, match='autocast'): model.to(kind).predict(image)
    with pytest.raises(TypeError, match='float32'): model(image.to(kind))
    model.float().predict(image)
    model.double().predict(image.double())

# ---- nothing to show, nothing to count

def test_figures_of_nothing(path):
    ds = det_dls(path, bs=2, num_workers=0).valid_ds
    for figure in (show_predictions(ds, []), show_pairs([], [], [])):
        figure.canvas.draw()
        assert len(figure.axes)==1 and not figure.axes[0].patches
    assert draw_results([], []).size==1

def test_a_stack_applies_at_least_one_step():
    model = create_detector('adamixer_tiny', n_classes=2)
    with pytest.raises(ValueError, match='steps=0'): model.predict(torch.zeros(1, 3, 64, 64), steps=0)

def test_classes_that_a_detector_lacks_are_named(path):
    whole = create_detector('deqdet_tiny', vocab=DetDataset(eval_source(path)).vocab)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        eval_loader(path, whole)
    part = create_detector('deqdet_tiny', vocab=['disc', 'cross', 'other'])
    with pytest.warns(UserWarning, match=r"2 of 4 classes are not the detector's.*'triangle', 'square'"):
        eval_loader(path, part)

def eval_source(path):
    from deqdet.data import read_coco
    return read_coco(path, 'valid')
