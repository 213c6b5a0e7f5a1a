"The learner where a notebook is the wrong place: every published model, odd images, callbacks together"
import math, warnings
from dataclasses import replace
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.learner import load_learner
from deqdet.backbone import read_weights
from deqdet.data import det_dls, synth_coco
from deqdet.decoder import Stacked
from deqdet.families.deformable import DeformableDETR, TwoStageLoss
from deqdet.equilibrium import Perturb, Settled
from deqdet.evaluate import best_thresholds, evaluate, predict_dl
from deqdet.learner import (EMA, CSVLog, DetLearner, DetOpt, Interpretation, NonFinite, Recipe, Resume, SaveBest,
                            WatchSettling, average_checkpoints, deal, det_learner, draw_results, param_groups,
                            recipes, section_of, shard)
from deqdet.loss import SetLoss
from deqdet.model import Detector, Feed
from deqdet.predict import predict
from deqdet.sets.augment import feed_tfm
from deqdet.families.adamixer import AdaMixer
from deqdet.zoo import create_detector, published, zoo

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4,
                 grid=(2,2,.4), width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=32,
                 strategy=Settled(steps=2, supervise=(2,), perturb=Perturb(position=3.)))

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('learner')/'shapes', n_train=6, n_valid=3, size=64, seed=5)

def make(path, hyper=SMALL, bs=2, size=None, **kwargs):
    torch.manual_seed(0)
    dls = det_dls(path, bs=bs, size=size, num_workers=0, device='cpu')
    learn = det_learner(dls, hyper.build(), **dict(lr=1e-3, path=path) | kwargs)
    learn.remove_cb(ProgressCallback)
    learn.recorder.add_time = False
    return learn

def fit(learn, n=1, **kwargs):
    with learn.quiet(): learn.fit(n, **kwargs)
    return learn

# ---- groups

@pytest.mark.parametrize('name', [k for k in zoo if isinstance(published(k).hyper, AdaMixer)])
def test_groups_of_published_models(name):
    "Every parameter that learns is in one group, and the decoder's rates are the recipe's"
    with torch.device('meta'): model = published(name).hyper.build()
    for r in recipes.values():
        groups = param_groups(model, r.mults)
        ids = [id(p) for g in groups for p in g.params]
        assert len(ids)==len(set(ids)) and set(ids)=={id(p) for p in model.parameters() if p.requires_grad}
        assert [g.section for g in groups]==sorted((g.section for g in groups), key=('body','rest','decoder').index)
    decoder = {n for n,_ in model.named_parameters() if n.startswith('decoder.')}
    rates = {(g.lr, g.wd) for g in param_groups(model, recipes['1x'].mults) if g.section=='decoder'}
    assert decoder and rates=={(4., 10.)}

def test_a_detector_brings_its_recipe(path):
    model = create_detector('deqdet_tiny', n_classes=4)
    learn = make(path, type('Built', (), dict(build=lambda self: model))(), lr=None)
    assert learn.recipe==recipes['tiny']
    assert make(path, SMALL, lr=None).recipe==recipes['1x']

@pytest.mark.parametrize('name', ['deqdet_swins_2x', 'deqdet_swinl_1x'])
def test_swin_norms_and_tables(name):
    "In a Swin body exactly the norms and the position tables learn slower, without decay"
    with torch.device('meta'): model = published(name).hyper.build()
    groups = param_groups(model, recipes['2x_swin'].mults)
    slow = {id(p) for g in groups if (g.section, g.lr, g.wd)==('body', .1, 0.) for p in g.params}
    norms = {id(p) for m in model.pyramid.body.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    tables = {id(p) for n,p in model.pyramid.body.named_parameters() if n.endswith('relative_position_bias_table')}
    assert norms and tables and slow==norms|tables
    still = [g for g in param_groups(model, recipes['2x_swin'].mults) if g.wd==0 and g.section=='rest']
    assert [id(p) for g in still for p in g.params]==[id(p) for p in model.pyramid.neck.norm.parameters()]

def test_schedule_is_the_published_one():
    "mmengine's LinearLR over 500 iterations and MultiStepLR, written out"
    r,per_epoch = recipes['2x'],7330
    def theirs(i):
        up = 1 if i >= 499 else .001 + .999*i/499
        return up*.1**sum(i//per_epoch >= d for d in (16,22))
    for i in [0, 1, 250, 498, 499, 500, 16*per_epoch-1, 16*per_epoch, 22*per_epoch-1, 22*per_epoch, 24*per_epoch-1]:
        assert math.isclose(r.factor(i, i//per_epoch, 24*per_epoch), theirs(i))

def test_update_is_adamw(path):
    "One update is torch's AdamW with the multiples, after clipping"
    learn = make(path, replace(SMALL, strategy=Stacked(2)), lr=1e-3, wd=.05)
    class Keep(Callback):
        order = 8
        def before_step(self): self.g = {n: p.grad.clone() for n,p in self.model.named_parameters()}
        def after_step(self): raise CancelFitException
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    learn.add_cb(Keep())
    fit(learn)
    scale = 1/(torch.stack([g.norm() for g in learn.keep.g.values()]).norm() + 1e-6)
    for n,p in learn.model.named_parameters():
        m,d = (4,10) if section_of(n)=='decoder' else (1,1)
        g = learn.keep.g[n]*min(scale, 1)
        want = before[n]*(1 - 1e-3*m*.05*d) - 1e-3*m*g/(g.abs() + 1e-8)
        torch.testing.assert_close(p, want, atol=2e-6, rtol=1e-4)

# ---- odd data

@pytest.mark.parametrize('hw', [(1,1), (8000,50), (50,8000), (33,47)])
def test_predict_on_odd_sizes(path, hw):
    learn = make(path, size=64)
    d = learn.predict(np.full((*hw,3), 90, dtype=np.uint8), min_score=0.)
    assert len(d['boxes'])==16 and d['boxes'].isfinite().all() and set(d)=={'boxes','scores','labels','names'}

def test_predict_gives_a_box_for_each_query(path):
    wide = make(path, replace(SMALL, n_queries=121, grid=(11, 11, .2)), size=64)
    image = np.full((48, 64, 3), 90, dtype=np.uint8)
    assert [len(wide.predict(image, 0., **o)['boxes']) for o in ({}, dict(max_dets=7))] == [121, 7]

def test_predict_names_a_missing_picture(path):
    with pytest.raises(ValueError, match='nowhere.jpg'): make(path).predict('nowhere.jpg')

def test_no_object_at_all(tmp_path):
    "A training set without any object trains; AP is undefined"
    learn = fit(make(synth_coco(tmp_path/'empty', 4, 2, size=64, empty=1.)))
    assert math.isfinite(learn.history.train_loss[0]) and math.isnan(learn.history.AP[0])
    assert learn.history.l1[0]==0

def test_one_picture(tmp_path):
    learn = fit(make(synth_coco(tmp_path/'one', 1, 1, size=64)), 2)
    assert len(learn.history)==2
    assert Interpretation.from_learner(learn).losses.shape==(1,)

# ---- fastai's ways

def test_ways_to_fit(path):
    learn = make(path)
    with learn.quiet():
        learn.fit_flat_cos(1, 1e-3)
        learn.fit_one_cycle(1, 1e-3)
        learn.fit(1, slice(1e-4, 1e-3))
        learn.fit_sgdr(1, 1, 1e-3)
        before = learn.history
        assert len(learn.validate())==len(before.columns) - 1 and learn.history.equals(before)
    learn.show_training_loop()

def test_results_show_scores(path):
    "A name and a score for each detection above the threshold"
    learn = make(path)
    img,t = learn.dls.valid_ds[0]
    boxes = torch.tensor([[[2.,9,30,40],[20,30,50,60],[1,1,9,9]]])
    found = [torch.tensor([[.9,.4,.1]]), torch.tensor([[0,1,2]]), boxes]
    ax = draw_results([(img, t)], found, learn.dls.vocab).flat[0]
    assert [o.get_text() for o in ax.texts]==['disc 0.90', 'triangle 0.40']

class Inside(Callback):
    "Predictions on images without truth, asked for in the middle of a fit"
    order = 80
    def __init__(self, files): self.files,self.found = files,[]
    def after_epoch(self):
        if self.learn.fitting and not hasattr(self.learn, 'gather_preds'):
            self.found.append(self.learn.get_preds(dl=self.dls.test_dl(self.files, num_workers=0), inner=True)[0])

def test_predictions_inside_a_fit(path):
    files = sorted((path/'images').iterdir())[:2]
    plain,asked = fit(make(path), 2), fit(make(path, cbs=Inside(files)), 2)
    assert [p.scores.shape[0] for p in asked.inside.found]==[2,2]
    assert asked.history.equals(plain.history)

def test_the_loss_of_a_family(path):
    deformable = DeformableDETR(n_classes=4, body='tiny', frozen_stages=-1, n_queries=6, width=32, norm_groups=8,
                                heads=2, encoder_layers=1, encoder_heads=2, encoder_hidden=32, hidden=32,
                                two_stage=True, strategy=Stacked(2))
    learn = make(path, deformable)
    assert isinstance(learn.loss_func, TwoStageLoss) and learn.loss_func.form=='cxcywh'
    learn.freeze()
    assert not any(p.requires_grad for p in learn.model.pyramid.levels.body.parameters())
    assert all(p.requires_grad for p in learn.model.pyramid.encoder.parameters())
    assert fit(learn).history.valid_loss.notna().all()

def test_no_epochs_are_none(path):
    "Zero is not the recipe's number"
    learn = make(path)
    with learn.quiet(): learn.fit_published('1x', epochs=0)
    assert len(learn.history)==0

def test_unknown_arguments(path):
    for bad in (lambda: make(path, lrr=1), lambda: Recipe(warm=3), lambda: Resume('x', evry=1),
                lambda: make(path).fit_published('1x', epoch=2)):
        with pytest.raises(TypeError): bad()

def test_save_and_load(path):
    a = fit(make(path))
    a.save('weights')
    b = make(path)
    b.load('weights')
    assert all(torch.equal(x, y) for x,y in zip(a.model.parameters(), b.model.parameters()))
    assert a.opt.state_dict()['state'].keys()==b.opt.state_dict()['state'].keys()

@pytest.mark.filterwarnings('ignore')
def test_export_with_everything(path, tmp_path):
    cbs = [EMA(.5), NonFinite(), SaveBest(), CSVLog(), WatchSettling(2)]
    learn = fit(make(path, amp='bf16', accumulate=2, cbs=cbs))
    learn.export(tmp_path/'all.pkl')
    again = load_learner(tmp_path/'all.pkl')
    file = next((path/'images').iterdir())
    torch.testing.assert_close(again.predict(file, 0.)['boxes'], learn.predict(file, 0.)['boxes'])
    assert all(p.device.type=='cpu' for p in again.model.parameters())

def test_frozen_stays_frozen(path):
    "Through every way to freeze and thaw, stem and first stage of a published body do not move"
    learn = make(path, replace(SMALL, body='resnet10t', frozen_stages=1))
    still = {n: v.clone() for n,v in learn.model.state_dict().items()}
    asleep = {n for n,p in learn.model.named_parameters() if not p.requires_grad}
    assert asleep
    with learn.quiet(): learn.fine_tune(1, base_lr=1e-2); learn.unfreeze(); learn.fit(1, reset_opt=True)
    now = learn.model.state_dict()
    assert all(torch.equal(still[n], now[n]) for n in asleep)
    assert all(torch.equal(still[n], v) for n,v in now.items() if 'running_' in n)
    moving = 'pyramid.body.net.layer4.0.conv1.weight', 'decoder.step.cls.3.weight'
    assert not any(torch.equal(still[n], now[n]) for n in moving)

def test_a_learner_made_frozen_and_thawed(path):
    "Making a new optimiser while the body is frozen does not lose the body"
    learn = make(path)
    learn.freeze()
    learn.create_opt()
    assert sum(len(g) for g in learn.opt.param_lists)==len(list(learn.model.parameters()))

# ---- callbacks

def test_everything_at_once(path):
    def everything(**kwargs):
        cbs = [EMA(.5), NonFinite(skip=1), Resume('all.pt', **kwargs), SaveBest(), CSVLog()]
        return make(path, amp='bf16', accumulate=2, cbs=cbs)
    learn = fit(everything(every=1), 2)
    assert learn.history.train_loss.notna().all() and not torch.is_autocast_enabled('cpu')
    again = fit(everything(resume=True), 3)
    assert again.train_iter==9 and len(again.csv_log.read())==3

@pytest.mark.parametrize('fail', [False, True])
def test_validation_leaves_the_average_where_it_was(path, fail):
    "A fit that ends in the middle of a validation ends with the average all the same"
    class Leave(Callback):
        def before_batch(self):
            if not self.training and fail: raise CancelFitException
    learn = fit(make(path, cbs=[EMA(.5), Leave()]))
    assert learn.ema.swapped
    raw = {n for n,a,b in zip(learn.model.state_dict(), learn.ema.avg, learn.ema.weights()) if torch.equal(a, b)}
    assert 'decoder.step.cls.3.weight' not in raw
    before = [v.clone() for v in learn.ema.weights()]
    fail = False
    learn.validate()
    assert all(torch.equal(a, b) for a,b in zip(before, learn.ema.weights()))

class Bad(Callback):
    "Gradients that are not finite, at the given updates"
    order = 9
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.train_iter in self.at: next(self.parameters()).grad[0] = math.inf

@pytest.mark.parametrize('amp', [None, 'bf16'])
def test_gradients_that_are_not_finite(path, amp):
    learn = make(path, amp=amp, cbs=[Bad(1), NonFinite(skip=1)])
    with pytest.warns(UserWarning, match='gradients are not finite at update 1'): fit(learn)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and len(learn.non_finite.skipped)==2
    with pytest.raises(FloatingPointError, match='train_0000'), warnings.catch_warnings(action='ignore'):
        fit(make(path, amp=amp, cbs=[Bad(0,1), NonFinite(skip=1)]))

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_backward', 'before_validate', 'after_epoch'])
def test_an_error_does_not_leave_autocast_on(path, event):
    def fail(): raise RuntimeError('broken')
    learn = make(path, amp='bf16', cbs=Callback(**{event: lambda self: fail()}))
    with pytest.raises(RuntimeError, match='broken'): fit(learn)
    assert not torch.is_autocast_enabled('cpu')

def test_best_is_what_was_validated(path, tmp_path):
    def tracked(**kwargs):
        cbs = [EMA(.7), SaveBest(tmp_path/'best.pt', 'valid_loss'), Resume(tmp_path/'last.pt', **kwargs)]
        return make(path, cbs=cbs, lr=4e-3)
    learn = fit(tracked(), 3)
    logged = learn.history.valid_loss
    learn.model.load_state_dict(read_weights(tmp_path/'best.pt'))
    with learn.quiet(): assert learn.validate()[0]==pytest.approx(logged.min(), abs=1e-5)
    again = fit(tracked(resume=True), 3)
    assert again.save_best.best==pytest.approx(logged.min())

def test_average_of_checkpoints(path, tmp_path):
    learn,files = make(path, cbs=Resume(tmp_path/'last.pt')),[]
    for i in range(3):
        fit(learn)
        files.append(learn.model.save_pretrained(tmp_path/str(i))/'model.safetensors')
    files[-1] = tmp_path/'last.pt' # the same weights, from another kind of file
    mean,k = average_checkpoints(files),'decoder.step.cls.3.weight'
    torch.testing.assert_close(mean[k], sum(read_weights(f)[k] for f in files)/3)
    state = learn.model.state_dict()
    assert mean.keys()==state.keys() and all(mean[n].dtype==v.dtype for n,v in state.items())

@pytest.mark.parametrize('n, bs, world', [(n, bs, w) for n in (1,2,5,8,13) for bs in (1,2,4) for w in (1,2,3,8)])
def test_deal(n, bs, world):
    "Processes get equally many batches; together these have all images; successive rounds are successive batches"
    parts = [deal(range(n), bs, r, world) for r in range(world)]
    batches = [[p[i:i+bs] for i in range(0, len(p), bs)] for p in parts]
    assert len({len(b) for b in batches})==1
    assert set(sum(parts, []))==set(range(n))
    dealt = [b for rnd in zip(*batches) for b in rnd]
    assert dealt[:math.ceil(n/bs)]==[list(range(n))[i:i+bs] for i in range(0, n, bs)]

def test_shards_follow_the_epochs(path):
    dl = det_dls(path, bs=2, num_workers=0, device='cpu').train
    a,b = shard(dl, 0, 2),shard(dl, 1, 2)
    for epoch in range(2):
        ids = [[t.image_id.tolist() for _,_,t in p] for p in (a,b)]
        dl.set_epoch(epoch)
        want = [t.image_id.tolist() for _,_,t in dl]
        assert [i for pair in zip(*ids) for i in pair][:len(want)]==want
        assert (a.epoch, b.epoch)==(epoch+1, epoch+1)

def test_tensorboard(path, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    fit(make(path, cbs=TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False)))
    assert list((tmp_path/'tb').glob('events*'))

# ---- what the lesson shows without asserting it

def test_a_learner_takes_its_numbers_from_the_recipe(path):
    torch.manual_seed(0)
    learn = DetLearner(det_dls(path, bs=2, num_workers=0, device='cpu'), SMALL.build(), '1x', loss_func=SetLoss())
    learn.create_opt()
    assert [learn.opt.sections, learn.lr, learn.wd]==[['body','rest','decoder'], 2.5e-5, .01]
    learn.freeze()
    assert [all(p.requires_grad for p in ps) for ps in learn.opt.param_lists]==[False, True, True]

def test_other_classes_and_unknown_recipes_are_refused(path):
    with pytest.raises(ValueError, match='7 classes'): make(path, replace(SMALL, n_classes=7))
    with pytest.raises(KeyError, match="no recipe '4x'"): make(path, recipe='4x')

def test_freezing_stops_the_body_and_fine_tuning_thaws_what_learned(path):
    learn = make(path, replace(SMALL, body='resnet10t', frozen_stages=1))
    def learning():
        names = [n for n,p in learn.model.named_parameters() if p.requires_grad]
        return [sum(section_of(n)==s for n in names) for s in ('body','rest','decoder')]
    before = learning()
    learn.freeze()
    assert learning()==[0, *before[1:]]
    with learn.quiet(): learn.fine_tune(1, base_lr=1e-3)
    assert learning()==before

def test_searching_for_a_rate_changes_nothing(path):
    learn = make(path)
    before = [p.clone() for p in learn.model.parameters()]
    with learn.quiet(): learn.lr_find(1e-5, 1, num_it=8, show_plot=False)
    assert learn.recorder.lrs[0]==pytest.approx(1e-5, abs=1e-9)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

@pytest.mark.parametrize('strategy, states', [(Settled(steps=3, supervise=(1,3), perturb=Perturb(position=3.)), 1),
                                              (Stacked(3), 3)], ids=['equilibrium', 'stack'])
def test_predictions_are_the_last_states(path, strategy, states):
    learn = make(path, replace(SMALL, strategy=strategy))
    assert len(learn.model.eval()(*learn.dls.valid.one_batch()[:2]))==states
    preds,targets,found,losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert [preds.scores.shape, found.scores.shape, losses.shape, len(targets.boxes)]==[(3,4,4), (3,16), (3,), 3]

def test_predict_takes_whatever_holds_a_picture(path):
    "The same boxes from a path, an image, an array and a tensor; twice as large on an image of twice the size"
    file = sorted((path/'images').iterdir())[0]
    img = Image.open(file).convert('RGB')
    learn = make(path)
    boxes = learn.predict(file, 0., max_dets=3)['boxes']
    array = np.array(img)
    for o in (str(file), img, array, torch.from_numpy(array).permute(2,0,1)):
        torch.testing.assert_close(learn.predict(o, 0., 3)['boxes'], boxes, atol=1e-5, rtol=0)
    assert [len(d['names']) for d in learn.predict([file, img], 0., 5)]==[5, 5]
    learn.dls.valid_ds.tfm = det_dls(path, size=64, num_workers=0).valid_ds.tfm
    boxes = learn.predict(file, 0.)['boxes'] # all, since scores that are nearly equal may change places
    large = learn.predict(img.resize((128,128), Image.NEAREST), 0.)['boxes']
    apart = torch.cdist(large, 2*boxes, p=math.inf)
    assert len(large)==len(boxes)==16
    assert apart.min(0).values.max() < 1 and apart.min(1).values.max() < 1

def test_a_fit_finds_thresholds_that_stay(path, tmp_path):
    "They belong to the weights that remain, come back from a folder, and decide what `predict` leaves out"
    learn = make(path, cbs=EMA(.5))
    learn.validate()
    assert learn.model.thresholds is None
    with learn.quiet(): learn.fit_published(epochs=2)
    found = learn.model.thresholds
    assert found == pytest.approx(best_thresholds(predict_dl(learn.model, learn.dls.valid), learn.dls.valid_ds))
    assert Detector.from_pretrained(learn.model.save_pretrained(tmp_path/'kept')).thresholds == found
    learn.model.thresholds = [0., 2., 2., 2.]
    file = sorted((path/'images').iterdir())[0]
    assert set(learn.predict(file)['names']) == {'disc'}
    learn.validate()
    assert learn.model.thresholds == [0., 2., 2., 2.]

@pytest.mark.filterwarnings('ignore')
def test_an_exported_learner_predicts_without_its_pictures(path, tmp_path):
    learn = fit(make(path))
    learn.export(tmp_path/'model.pkl')
    again = load_learner(tmp_path/'model.pkl')
    file = next((path/'images').iterdir())
    assert torch.equal(again.predict(file, 0.)['scores'], learn.predict(file, 0.)['scores'])
    assert len(again.dls.valid_ds)==0

def test_losses_of_single_pictures(path):
    learn = make(path)
    interp = Interpretation.from_learner(learn)
    inputs,_,target,_,losses = interp[0]
    with torch.no_grad(): loss = learn.loss_func(learn.model.eval()(*inputs), target)
    assert loss.item()==pytest.approx(losses[0].item(), abs=1e-3)

# ---- the input size

@pytest.mark.parametrize('given,feed', [(dict(size=48), Feed(48, 48)), (dict(size=None, tfms=Feed(40, 56)), Feed(40, 56))])
def test_a_fit_notes_the_input_size(path, tmp_path, given, feed):
    "That of validation, on which AP and thresholds were found; `predict` and a saved folder then use it too"
    if 'tfms' in given: given = dict(tfms=(feed_tfm(feed, 'flip'), feed_tfm(feed)))
    dls = det_dls(path, bs=2, num_workers=0, device='cpu', **given)
    model = SMALL.build()
    model.feed = Feed(320, 320) # as with a pretrained start
    learn = det_learner(dls, model, lr=1e-3, path=path)
    with learn.quiet():
        learn.validate()
        assert model.feed == Feed(320, 320)
        learn.fit(1)
    assert model.feed == feed == Detector.from_pretrained(model.save_pretrained(tmp_path/'kept')).feed
    image = next((path/'images').rglob('*.png'), None) or next(path.rglob('*.jpg'))
    one, other = learn.predict(image, min_score=0.), predict(model, image, min_score=0.)
    assert torch.allclose(one['scores'], other.scores, atol=1e-5)

def test_an_unknown_transform_leaves_the_input_size(path):
    dls = det_dls(path, bs=2, num_workers=0, device='cpu', tfms=(None, lambda img, t: (img, t)))
    learn = det_learner(dls, SMALL.build(), lr=1e-3, path=path)
    learn.model.feed = Feed(99, 99)
    assert fit(learn).model.feed == Feed(99, 99)

def test_the_best_is_saved_in_fits_alone(path, tmp_path):
    "Other passes have no column AP, and need none"
    learn = fit(make(path, cbs=[SaveBest(tmp_path/'best.pt')], size=48))
    with learn.no_bar(): learn.get_preds()
    with learn.quiet(): learn.lr_find(num_it=2, show_plot=False, suggest_funcs=None)
    with pytest.raises(ValueError, match="no column 'XY'"): fit(make(path, cbs=[SaveBest(tmp_path/'best.pt', 'XY')], size=48))
