"What evaluation promises: COCO's own numbers on real and random data, files that read back identically, several processes"
import copy, io, json, math, warnings
from contextlib import redirect_stdout
from functools import partial
import numpy as np, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from deqdet.data import DetDL, Target, collate, det_dls, resize_long, synth_coco
from deqdet.decoder import Pred
from deqdet.evaluate import (APCallback, ap_vs_steps, coco_ap, confusion, evaluate, evaluating, gather_preds, match_table,
                             multiply_adds, on_first, one_shape, predict_dl, to_results, worst_images, write_results)
from deqdet.equilibrium import Settled
from deqdet.learner import det_learner
from deqdet.loss import SetLoss, decode
from deqdet.model import to_original
from deqdet.families.adamixer import AdaMixer
from deqdet.sets.augment import recipe_1x
from deqdet.zoo import create_detector

PUBLISHED = dict(AP=.505, AP50=.697, AP75=.573, APs=.586, APm=.519, APl=.501,
                 AR1=.387, AR10=.594, AR100=.595, ARs=.640, ARm=.566, ARl=.564)


def plain(truth, results, max_dets=(1, 10, 100)):
    "COCO's own program on COCO's own objects"
    with redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), 'bbox')
        e.params.maxDets = list(max_dets)
        e.evaluate(); e.accumulate()
        if max_dets[-1] == 100: e.summarize()
    return e


def made(seed, n=12, k=5, crowds=True):
    "A random truth with gaps in its ids, crowds, and areas that are not w*h; and predictions as tensors"
    rng = np.random.default_rng(seed)
    cats = sorted(rng.choice(90, k, replace=False).tolist())
    ids, anns, preds = (rng.choice(9999, n, replace=False) + 1).tolist(), [], []
    for i in ids:
        m = rng.integers(0, 7)
        xy, wh = rng.uniform(0, 300, (m, 2)), np.exp(rng.uniform(1, 5.5, (m, 2)))
        for (x, y), (w, h) in zip(xy, wh):
            anns.append(dict(id=len(anns) + 1, image_id=i, category_id=int(rng.choice(cats[:-1])), bbox=[x, y, w, h],
                             area=w*h*rng.uniform(.4, 1), iscrowd=int(crowds and rng.uniform() < .15)))
        mine = [a for a in anns if a['image_id'] == i]
        near = np.array([a['bbox'] for a in mine for _ in range(rng.integers(0, 4))]).reshape(-1, 4)
        far = rng.uniform(5, 200, (rng.integers(0, 4), 4))
        b = np.concatenate([near*rng.uniform(.85, 1.15, near.shape), far])
        labels = [cats.index(a['category_id']) for a in mine]
        labels = rng.choice(labels or [0], len(b)) if rng.uniform() < .8 else rng.integers(0, k, len(b))
        preds.append(dict(image_id=i, boxes=torch.tensor(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1)).float(),
                          scores=torch.tensor(rng.uniform(size=len(b)).round(2)).float(), labels=torch.tensor(labels).long()))
    truth = dict(images=[dict(id=i, width=600, height=500) for i in ids], annotations=anns,
                 categories=[dict(id=c, name=f'c{c}') for c in cats])
    return truth, preds, cats


def test_real_results(data_dir):
    "100 images of COCO with the results that COCO's authors publish for checking"
    folder = data_dir/'cocoeval'
    truth, results = folder/'instances_val2014_100.json', folder/'instances_val2014_fakebbox100_results.json'
    r = coco_ap(results, truth)
    assert {k: round(v, 3) for k, v in r.items()} == PUBLISHED
    assert r == coco_ap(json.loads(results.read_text()), json.loads(truth.read_text()))
    assert len(r.per_class) == 80 and r.per_class.AP.mean() == pytest.approx(r.AP)
    assert r.counts['images'] == 100


@pytest.mark.parametrize('seed', range(8))
def test_equals_cocos_program(seed):
    truth, preds, cats = made(seed)
    results = to_results(preds, cats)
    e, r = plain(truth, results), coco_ap(preds, truth)
    ours = np.nan_to_num(list(r.values()), nan=-1)
    np.testing.assert_array_equal(ours, e.stats)
    for k in 'precision', 'recall', 'scores': np.testing.assert_array_equal(r.eval[k], e.eval[k])


@pytest.mark.parametrize('max_dets', [(1, 2, 3), (1, 10, 300)])
def test_detections_kept(max_dets):
    truth, preds, cats = made(3, n=6, k=2)
    e, r = plain(truth, to_results(preds, cats), max_dets), coco_ap(preds, truth, max_dets=max_dets)
    np.testing.assert_array_equal(r.eval['precision'], e.eval['precision'])
    assert list(r)[6:9] == [f'AR{m}' for m in max_dets]


def test_file_reads_back_identically(tmp_path):
    truth, preds, cats = made(11)
    path = write_results(preds, tmp_path/'results.json', cats)
    assert json.loads(path.read_text()) == to_results(preds, cats)
    a, b = coco_ap(preds, truth), coco_ap(path, truth)
    assert np.array_equal(list(a.values()), list(b.values()), equal_nan=True)
    with redirect_stdout(io.StringIO()):  # and COCO's own loader takes it
        gt = COCO(); gt.dataset = truth; gt.createIndex()
        assert len(gt.loadRes(str(path)).anns) == a.counts['detections']


def test_failed_write_keeps_the_old_file(tmp_path):
    truth, preds, cats = made(1)
    path = write_results(preds, tmp_path/'results.json', cats)
    before = path.read_text()
    with pytest.raises(TypeError): write_results([dict(bbox=object())], path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_inputs_are_left_alone():
    truth, preds, cats = made(5)
    results = to_results(preds, cats)
    before = copy.deepcopy((truth, preds, results))
    coco_ap(preds, truth); coco_ap(results, truth); match_table(preds, truth)
    assert truth == before[0] and results == before[2]
    for p, q in zip(preds, before[1]): assert all(torch.equal(torch.as_tensor(p[k]), torch.as_tensor(q[k])) for k in p)


def test_silence(capfd):
    truth, preds, cats = made(2)
    coco_ap(preds, truth)
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('seed', range(4))
def test_table_accounts_for_everything(seed):
    truth, preds, cats = made(seed)
    table = match_table(preds, truth, score=0.)
    objects = [a for a in truth['annotations'] if not a['iscrowd']]
    vocab = [c['name'] for c in truth['categories']]
    counts = confusion(table, vocab)
    assert (table.truth != 'background').sum() == len(objects) == counts.iloc[:-1].to_numpy().sum()
    assert counts.iloc[-1, -1] == 0
    assert (table.pred != 'background').sum() <= sum(len(p['scores']) for p in preds)
    assert worst_images(table, 999).to_numpy().sum() == len(table)


@pytest.mark.parametrize('seed', range(6))
def test_boxes_return_to_original_pixels(seed):
    "Through the very resize that feeds the model, at any scale and ratio"
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randint(1, 3000, (2,), generator=g).tolist()
    xy = torch.rand(20, 2, 2, generator=g).sort(1)[0]*torch.tensor([w, h])
    t = Target(xy.flatten(1), torch.zeros(20).long(), torch.tensor([h, w]), torch.tensor(1))
    _, fed = resize_long(torch.zeros(3, h, w, dtype=torch.uint8), t, int(torch.randint(32, 1333, (1,), generator=g)))
    back = to_original(fed.boxes[None], (fed.size/fed.orig).flip(-1)[None])[0]
    assert (back - t.boxes).abs().max() <= 4e-7*max(h, w)  # float32


class Items:
    "Images that carry their number in the first pixel"
    n_inp = 2
    def __init__(self, truth, ids):
        self.coco, self.ids = truth, ids
        self.cat_ids = sorted(c['id'] for c in truth['categories'])
    def __len__(self): return len(self.ids)
    def new_empty(self): return Items(self.coco, [])
    def __getitem__(self, i):
        img = torch.zeros(3, 25, 30, dtype=torch.uint8)
        img[0, 0, :2] = torch.tensor(divmod(self.ids[i], 256), dtype=torch.uint8)
        none, hw = (torch.zeros(0, 4), torch.zeros(0).long()), torch.tensor([25, 30])
        return img, Target(*none, hw, torch.tensor(self.ids[i]), 20*hw)


class Knows(nn.Module):
    "A model that looks its answer up; boxes in pixels of the fed image, a twentieth of the original's"
    def __init__(self, preds, k):
        super().__init__()
        self.p, self.k, self.w = {p['image_id']: p for p in preds}, k, nn.Parameter(torch.ones(1))
    def forward(self, images, sizes):
        logits, boxes = torch.full((len(images), 40, self.k), -30.), torch.zeros(len(images), 40, 4)
        for b, (hi, lo) in enumerate(images[:, 0, 0, :2].long().tolist()):
            p = self.p[hi*256 + lo]
            for j, (x, s, l) in enumerate(zip(p['boxes'], p['scores'], p['labels'])):
                boxes[b, j], logits[b, j, l] = x/20, s.clamp(.001, .999).logit()
        return [Pred(logits*self.w, boxes)]
    def predict(self, images, sizes, orig=None, steps=None, max_dets=100):
        d = decode(self(images, sizes)[-1], max_dets)
        boxes = to_original(d.boxes, (sizes/orig).flip(-1))
        return [dict(scores=s, labels=l, boxes=b) for s, l, b in zip(d.scores, d.labels, boxes)]


def learner(truth, preds, cats, ids):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    dl = DetDL(Items(truth, ids), bs=3, num_workers=0)
    model = Knows(preds, len(cats))
    return Learner(DataLoaders(dl, dl), model, lambda p, t: (p[-1].logits*0).mean() + model.w.sum(), lr=0., cbs=APCallback())


def one_of_two(rank, store, out):
    "Unequal shards, one image in both, as padding leaves it"
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    truth, preds, cats = made(21, n=11)
    ids = sorted(p['image_id'] for p in preds)
    mine = ids[:8] if rank == 0 else ids[7:]
    learn = learner(truth, preds, cats, mine)
    found, result = predict_dl(learn.model, learn.dls.valid), evaluate(learn.model, learn.dls.valid)
    with learn.no_logging(): learn.fit(1)
    torch.save((found, dict(result), list(learn.recorder.values[-1])[2:]), f'{out}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    truth, preds, cats = made(21, n=11)
    mp.spawn(one_of_two, (str(tmp_path/'store'), str(tmp_path)), nprocs=2) # a fork of a process that has gone back through a graph may not
    learn = learner(truth, preds, cats, sorted(p['image_id'] for p in preds))
    found, result = predict_dl(learn.model, learn.dls.valid), evaluate(learn.model, learn.dls.valid)
    with learn.no_logging(): learn.fit(1)
    columns = list(learn.recorder.values[-1])[2:]
    assert 0 < result.AP < 1 and columns[0] == pytest.approx(result.AP)
    same = partial(np.array_equal, equal_nan=True)
    for rank in range(2):
        theirs, numbers, cols = torch.load(tmp_path/f'{rank}.pt', weights_only=False)
        assert [p['image_id'] for p in theirs] == [p['image_id'] for p in found]
        assert all(torch.equal(p[k], q[k]) for p, q in zip(theirs, found) for k in ('boxes', 'scores', 'labels'))
        assert same(list(numbers.values()), list(result.values())) and same(cols, columns)


def test_callback_keeps_still_and_survives_export(tmp_path):
    truth, preds, cats = made(21, n=11)
    learn = learner(truth, preds, cats, sorted(p['image_id'] for p in preds))
    with learn.no_logging(): learn.fit(2)
    assert len(learn.recorder.values) == 2 and learn.metrics == [] and learn.ap.preds == []
    learn.loss_func, learn.path = nn.Identity(), tmp_path
    learn.export('a.pkl')
    from fastai.learner import load_learner
    assert load_learner(tmp_path/'a.pkl').ap.result.AP == learn.ap.result.AP


def test_callback_agrees_with_evaluate_on_a_detector(tmp_path):
    "Images of 100x150 fed at 64: the callback's AP is that of `model.predict`, bit for bit"
    from fastai.learner import Learner
    dls = det_dls(synth_coco(tmp_path, n_train=8, n_valid=6, size=(100, 150)), bs=4, size=64, num_workers=0)
    torch.manual_seed(0)
    model = AdaMixer(4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=6, grid=(2, 3, .4), width=32,
                     heads=4, points=(4,), out_points=8, hidden=64, strategy=Settled()).build()
    loss = SetLoss()
    learn = Learner(dls, model, lambda p, t: loss(p, Target(t)), lr=1e-3, cbs=APCallback(max_dets=10))
    with learn.no_logging(): learn.fit(1)
    result = evaluate(model, dls.valid, max_dets=10)
    assert result.counts == dict(images=6, objects=len(dls.valid.dataset.coco['annotations']), detections=60)
    for k in 'precision', 'recall', 'scores': np.testing.assert_array_equal(learn.ap.result.eval[k], result.eval[k])
    assert list(learn.recorder.metric_names)[3:9] == ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']


def test_detections_do_not_depend_on_the_batch():
    "A batch was padded to its largest image, and its other images were detected in with that padding"
    class Mixed(list):
        coco = dict(images=[dict(id=i) for i in range(7)], annotations=[dict(image_id=0, category_id=1, bbox=[9, 9, 40, 40])],
                    categories=[dict(id=1, name='cat')])
        cat_ids = [1]
    torch.manual_seed(0)
    sides = [(40, 90), (90, 40), (64, 64), (50, 96), (96, 96), (33, 65), (60, 70)]
    items = Mixed((torch.randint(256, (3, *hw), dtype=torch.uint8),
                   Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.tensor(hw), torch.tensor(i))) for i, hw in enumerate(sides))
    model = create_detector('deqdet_tiny', n_classes=1)
    alone = predict_dl(model, DetDL(items, bs=1, num_workers=0))
    for bs in (2, 3, 7):
        dl = DetDL(items, bs=bs, num_workers=0)
        for p, q in zip(alone, predict_dl(model, dl), strict=True):
            assert p['image_id'] == q['image_id']
            for k in ('boxes', 'scores'): torch.testing.assert_close(p[k], q[k], atol=1e-3, rtol=1e-4)


def test_images_of_one_shape_stay_batched():
    "They reach the model as the loader made them"
    items = [(torch.randint(256, (3, 30 + i, 60), dtype=torch.uint8),
              Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.tensor([30 + i, 60]), torch.tensor(i))) for i in (0, 1, 2, 0, 1)]
    dl = DetDL(items, bs=2, num_workers=0)
    for (x, sizes, t), (y, s, orig, ids) in zip(dl, one_shape(dl), strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()
        assert torch.equal(sizes, s) and torch.equal(t.orig, orig) and torch.equal(t.image_id, ids)


def test_few_images_wait_for_others_of_their_shape():
    "A set of many shapes does not gather in memory"
    shown = []
    def images():
        for i in range(40):
            shown.append(i)
            hw = torch.tensor([32*(i + 1), 32])
            yield collate([(torch.zeros(3, *hw), Target(torch.zeros(0, 4), torch.zeros(0).long(), hw, torch.tensor(i)))]*2)
    seen = 0
    for x, *_ in one_shape(images()):
        seen += len(x)
        assert 2*len(shown) - seen <= 8
    assert seen == 80


def test_results_that_are_not_finite_stay_out_of_the_file(tmp_path):
    "They were written as NaN and Infinity, which no reader of JSON has to know"
    boxes = torch.tensor([[1., 2, 3, 4], [math.inf, 2, math.inf, 4], [1, math.nan, 3, 4], [1, 2, 3, 4]])
    pred = dict(image_id=1, boxes=boxes, scores=torch.tensor([.5, .5, .5, math.nan]), labels=torch.zeros(4).long())
    with pytest.warns(UserWarning, match='x.json: 3 of 4 detections are not finite'): write_results([pred], tmp_path/'x.json', [7])
    def refuse(name): raise ValueError(name)
    found = json.loads((tmp_path/'x.json').read_text(), parse_constant=refuse)
    assert found == [dict(image_id=1, category_id=7, bbox=[1., 2, 2, 2], score=.5)]


def test_nothing_finite_does_not_end_training():
    truth, preds, cats = made(21, n=11)
    preds[0]['boxes'] = torch.full((1, 4), math.inf)
    preds[0]['scores'], preds[0]['labels'] = torch.ones(1), torch.zeros(1).long()
    with pytest.warns(UserWarning, match='not finite'): assert not math.isnan(coco_ap(preds, truth).AP)


# ---- moved from the page

def test_every_module_is_put_back_as_it_was():
    frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    with evaluating(frozen):
        assert [m.training for m in frozen] == [False, False] and not torch.is_grad_enabled()
    assert [m.training for m in frozen] == [True, False] and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(frozen): 1/0
    assert [m.training for m in frozen] == [True, False]


def test_padding_of_a_sampler_costs_nothing():
    "Repeated images would be false alarms; alone, and in a process group of one"
    truth, preds, cats = made(21, n=11)
    preds = sorted(preds, key=lambda p: p['image_id'])
    result, twice = coco_ap(preds, truth), preds + preds[:3]
    assert coco_ap(twice, truth).AP < result.AP
    assert str(coco_ap(gather_preds(twice), truth)) == str(result)
    assert [p['image_id'] for p in gather_preds(twice[::-1])] == [p['image_id'] for p in preds]


def test_a_process_group_of_one(tmp_path):
    truth, preds, cats = made(21, n=11)
    result, twice = coco_ap(preds, truth), preds + preds[:3]
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        same = partial(np.array_equal, equal_nan=True)
        assert same(list(coco_ap(gather_preds(twice), truth).values()), list(result.values()))
        assert same(list(on_first(coco_ap, preds, truth).values()), list(result.values()))
    finally: dist.destroy_process_group()


def test_a_loader_is_predicted_whole_and_the_model_left_in_training():
    truth, preds, cats = made(21, n=11)
    learn = learner(truth, preds, cats, [p['image_id'] for p in preds])
    learn.model.train()
    found = predict_dl(learn.model, learn.dls.valid)
    assert len(found) == 11 and learn.model.training
    assert str(evaluate(learn.model, learn.dls.valid)) == str(coco_ap(found, truth, cats))
    with pytest.raises(TypeError): evaluate(learn.model, learn.dls.valid, step=3)


def tiny_learner(**kwargs):
    "A linear map from images of 16 pixels to one box, fed at half their size"
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    torch.manual_seed(0)
    xy = torch.randint(1, 8, (24, 2)).float()
    anns = [dict(image_id=i, category_id=7, bbox=[*(2*o).tolist(), 12., 12.]) for i, o in enumerate(xy)]
    class Squares:
        n_inp, cat_ids, vocab = 2, [7], ['square']
        coco = dict(images=[dict(id=i) for i in range(24)], annotations=anns, categories=[dict(id=7, name='square')])
        def __len__(self): return 24
        def __getitem__(self, i):
            x, y = xy[i].int().tolist()
            img, hw = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.tensor([16, 16])
            img[:, y:y+6, x:x+6] = 255
            return img, Target(torch.cat([xy[i], xy[i] + 6])[None], torch.zeros(1).long(), hw, torch.tensor(i), 2*hw)
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(32*32, 4) # collate pads to multiples of 32
        def forward(self, images, sizes):
            return [Pred(torch.ones(len(images), 1, 1), self.lin(images[:, 0].flatten(1)/900.)[:, None]*16)]
    train, valid = (DetDL(Squares(), bs=8, shuffle=s, num_workers=0) for s in (True, False))
    loss = lambda preds, t: nn.functional.l1_loss(preds[-1].boxes, Target(t).boxes)
    return Learner(DataLoaders(train, valid), Linear(), loss, lr=3e-3, **kwargs)


def test_the_callback_changes_nothing_but_the_log():
    plain_learn, with_ap = tiny_learner(), tiny_learner(cbs=APCallback())
    for l in (plain_learn, with_ap):
        with l.no_logging(): l.fit(2)
    assert with_ap.metrics == []
    assert torch.equal(plain_learn.model.lin.weight, with_ap.model.lin.weight)
    losses = [[v[1] for v in l.recorder.values] for l in (plain_learn, with_ap)]
    assert losses[0] == losses[1]
    assert with_ap.ap.result.AP == with_ap.recorder.values[-1][2]
    with with_ap.no_logging(): numbers = with_ap.validate()
    assert numbers[1] == with_ap.ap.result.AP


class Works(nn.Module):
    "Multiplies one matrix per step, and is the better the more steps it takes"
    def __init__(self, preds):
        super().__init__()
        self.work, self.p = nn.Linear(64, 64), preds
    def predict(self, images, sizes, orig=None, steps=None, max_dets=100):
        w = torch.ones(1, 64)
        for _ in range(steps): w = self.work(w)
        ids = [hi*256 + lo for hi, lo in images[:, 0, 0, :2].long().tolist()]
        g = torch.Generator().manual_seed(0)
        noise = lambda b: 40*.5**steps*torch.randn(b.shape, generator=g)
        return [self.p[i] | dict(boxes=self.p[i]['boxes'] + noise(self.p[i]['boxes'])) for i in ids]


@pytest.mark.parametrize('module,x,n', [(nn.Linear(64, 32), torch.ones(10, 64), 10*64*32),
                                        (nn.Conv2d(3, 8, 3, padding=1), torch.ones(1, 3, 10, 10), 8*100*27)])
def test_multiply_adds_are_counted(module, x, n): assert multiply_adds(module, x) == n


def test_ap_and_cost_against_steps():
    truth, _, cats = made(21, n=11, crowds=False)
    perfect = {}
    for o in truth['images']:
        mine = [a for a in truth['annotations'] if a['image_id'] == o['id']]
        b = torch.tensor([a['bbox'] for a in mine]).reshape(-1, 4).float()
        perfect[o['id']] = dict(boxes=torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1), scores=torch.ones(len(b)),
                                labels=torch.tensor([cats.index(a['category_id']) for a in mine], dtype=torch.long))
    dl = DetDL(Items(truth, sorted(perfect)), bs=3, num_workers=0)
    rows = ap_vs_steps(Works(perfect), dl, [1, 3, 6, 12])
    assert [r['steps'] for r in rows] == [1, 3, 6, 12]
    assert [r['multiply_adds'] for r in rows] == [64*64*t for t in (1, 3, 6, 12)]
    assert all(a['AP'] <= b['AP'] for a, b in zip(rows, rows[1:])) and rows[0]['AP'] < .5 and rows[-1]['AP'] == 1
    assert all(r['seconds'] > 0 for r in rows)


def test_the_door_opens_what_its_wing_defines():
    import deqdet.evaluate as door
    from deqdet.scores import ap, matches
    names = [n for m in (ap, matches) for n in m.__all__]
    assert set(names) <= set(door.__all__)
    assert all(getattr(door, n) in (getattr(ap, n, None), getattr(matches, n, None)) for n in names)


def test_ap_on_augmented_images_warns(tmp_path):
    "Flipped images have other boxes than their files; the loader of validation has the same"
    path = synth_coco(tmp_path/'shapes', n_train=2, n_valid=2, size=32, seed=0)
    dls = det_dls(path, bs=2, tfms=(recipe_1x(True, 32, 32), recipe_1x(False, 32, 32)), num_workers=0, device='cpu')
    learn = det_learner(dls, create_detector('deqdet_tiny', n_classes=4))
    with learn.no_bar():
        with pytest.warns(UserWarning, match='flips or cuts'): learn.validate(ds_idx=0)
        with pytest.warns(UserWarning, match='flips or cuts'): evaluate(learn.model, dls.train)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='.*flips or cuts')
            learn.validate()
            evaluate(learn.model, dls.valid)

def test_ap_vs_steps_counts_a_detector_whose_modules_return_parameters(tmp_path):
    "Deformable DETR: an AssertionError of PyTorch's counter; parameters learn again afterwards"
    path = synth_coco(tmp_path/'shapes', n_train=1, n_valid=2, size=64)
    dl = det_dls(path, bs=2, size=64, num_workers=0, device='cpu').valid
    model = create_detector('deformable_detr_tiny', n_classes=4)
    learning = [p.requires_grad for p in model.parameters()]
    one,two = ap_vs_steps(model, dl, [1, 2])
    assert 0 < one['multiply_adds'] < two['multiply_adds']
    assert [p.requires_grad for p in model.parameters()]==learning
