"Pairs of detections and objects, what is counted from them, and thresholds by F1 on cases with a known answer"
import copy, math
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from deqdet.scores.ap import coco_ap
from deqdet.scores.judging import f1_curves, plot_f1
from deqdet.scores.matches import (_f1_curve, _pair, best_thresholds, confusion, match_table, plot_confusion, plot_pr,
                                   worst_images)

CATS = [dict(id=2, name='disc'), dict(id=5, name='square'), dict(id=9, name='ring'), dict(id=11, name='star')]
VOCAB = [c['name'] for c in CATS]
CAT_IDS = [c['id'] for c in CATS]


def made_truth(n=40, seed=0):
    "Random objects in `n` images; no star anywhere"
    rng = np.random.default_rng(seed)
    anns = []
    for i in range(n):
        for _ in range(rng.integers(1, 7)):
            w, h = np.exp(rng.uniform(np.log(12), np.log(150), 2))
            x, y = rng.uniform(0, 320 - w), rng.uniform(0, 240 - h)
            anns.append(dict(id=len(anns) + 1, image_id=100 + i, category_id=int(rng.choice(CAT_IDS[:3])), bbox=[x, y, w, h]))
    return dict(images=[dict(id=100 + i, width=320, height=240) for i in range(n)], annotations=anns, categories=CATS)


def seen(anns, quality, rng):
    "One image's annotations as a bad eye sees them; two more are invented, of any class"
    anns = [a for a in anns if rng.uniform() < .6 + .4*quality]
    labels = [CAT_IDS.index(a['category_id']) for a in anns]
    labels = [l if rng.uniform() < .7 + .3*quality else rng.integers(3) for l in labels]
    xywh = np.concatenate([np.array([a['bbox'] for a in anns]).reshape(-1, 4), rng.uniform(10, 90, (2, 4))])
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    boxes += rng.normal(size=boxes.shape)*.25*(1 - quality)*np.tile(xywh[:, 2:], 2)
    scores = np.concatenate([rng.uniform(.3, 1, len(anns)), rng.uniform(0, .6, 2)])
    return dict(boxes=torch.tensor(boxes).float(), scores=torch.tensor(scores).float(),
                labels=torch.tensor([*labels, *rng.integers(0, 4, 2)]))


def made_preds(truth, quality=.7, seed=0):
    rng = np.random.default_rng(seed)
    return [dict(image_id=o['id'], **seen([a for a in truth['annotations'] if a['image_id'] == o['id']], quality, rng))
            for o in truth['images']]


@pytest.fixture(scope='module')
def truth(): return made_truth()
@pytest.fixture(scope='module')
def preds(truth): return made_preds(truth)
@pytest.fixture(scope='module')
def result(preds, truth): return coco_ap(preds, truth)
@pytest.fixture(scope='module')
def table(preds, truth): return match_table(preds, truth)


# ---- AP of a whole set

def test_a_class_without_objects_has_no_ap_and_leaves_the_mean(result):
    assert math.isnan(result.per_class.AP['star'])
    assert result.AP == pytest.approx(result.per_class.AP[:3].mean())

def test_the_table_per_class_counts_objects_and_detections(result, preds, truth):
    for k, c in enumerate(CATS):
        assert result.per_class.objects[c['name']] == sum(a['category_id'] == c['id'] for a in truth['annotations'])
        assert result.per_class.detections[c['name']] == sum((p['labels'] == k).sum().item() for p in preds)

def test_the_order_of_images_does_not_matter(result, preds, truth): assert str(coco_ap(preds[::-1], truth)) == str(result)

def test_a_part_of_a_set_is_the_set_of_that_part(preds, truth):
    half = coco_ap(preds, truth, images=[100 + i for i in range(20)])
    first = dict(images=truth['images'][:20], annotations=[a for a in truth['annotations'] if a['image_id'] < 120])
    assert half == coco_ap(preds[:20], truth | first)

def test_the_number_in_the_legend_is_the_area(result):
    ax = plot_pr(result)
    assert ax.lines[0].get_ydata().mean() == pytest.approx(result.AP50)
    assert [t.get_text() for t in ax.get_legend().get_texts()][0] == f'IoU 0.50: {result.AP50:.2f}'
    one = plot_pr(result, classes=['ring', 'star'])
    assert len(one.lines) == 1 # a class without objects has no curve
    plt.close('all')


# ---- pairs

def box(x, y, w, h, **kw): return dict(bbox=[x, y, w, h], **kw)

def test_one_object_has_one_detection():
    two = [box(0, 0, 10, 10), box(1, 0, 10, 10)]
    assert [j for j, _ in _pair(two, [box(0, 0, 10, 10, iscrowd=0)], .5)] == [0, None]

def test_a_crowd_takes_any_number():
    two = [box(0, 0, 10, 10), box(1, 0, 10, 10)]
    assert [j for j, _ in _pair(two, [box(0, 0, 90, 90, iscrowd=1)], .5)] == [-1, -1]

def test_an_object_goes_before_a_crowd():
    objs = [box(0, 0, 90, 90, iscrowd=1), box(0, 0, 10, 12, iscrowd=0)]
    assert [j for j, _ in _pair([box(0, 0, 10, 10)]*2, objs, .5)] == [1, -1]

def test_nothing_has_no_pairs():
    assert _pair([], [box(0, 0, 90, 90, iscrowd=0)], .5) == []
    assert _pair([box(0, 0, 9, 9)], [], .5) == [(None, 0.)]

def test_every_object_appears_once(table, truth):
    assert (table.truth != 'background').sum() == len(truth['annotations'])
    counts = confusion(table, VOCAB)
    assert counts.iloc[:-1].to_numpy().sum() == len(truth['annotations'])
    assert counts.loc['star'].sum() == 0

def test_good_predictions_are_on_the_diagonal(truth):
    good = [p | dict(scores=torch.ones(len(p['boxes']))) for p in made_preds(truth, quality=1)]
    counts = confusion(match_table(good, truth), VOCAB)
    assert (np.diag(counts)[:3] >= .9*counts.iloc[:3].sum(axis=1)).all()

def test_every_pair_is_of_one_kind(table):
    counts = worst_images(table, 999)
    assert counts.to_numpy().sum() == len(table)
    both = (table.truth != 'background') & (table.pred != 'background')
    assert counts.confused.sum() == (both & (table.truth != table.pred)).sum()
    errors = counts[['confused', 'missed', 'invented']].sum(axis=1)
    assert errors.is_monotonic_decreasing and list(worst_images(table, 3).index) == list(counts.index[:3])

@pytest.mark.parametrize('n,texts', [(3, 3), (30, 0)])
def test_counts_are_written_up_to_25_classes(n, texts):
    import pandas as pd
    names = [f'c{i}' for i in range(n - 1)] + ['background']
    counts = pd.DataFrame(np.eye(n, dtype=int), names, names)
    assert len(plot_confusion(counts).texts) == texts
    plt.close('all')


# ---- thresholds

class Set:
    "What `best_thresholds` needs of a dataset: one image of a hundred objects in a row, of 10x10 pixels"
    def __init__(self, n_objects, cat_ids=(7, 3), crowd=()):
        anns = [dict(image_id=1, category_id=c, bbox=[20*i, 100*k, 10, 10], iscrowd=int((c, i) in crowd))
                for k, c in enumerate(cat_ids) for i in range(n_objects[k])]
        self.cat_ids = list(cat_ids)
        self.coco = dict(images=[dict(id=1)], annotations=anns, categories=[dict(id=c, name=str(c)) for c in cat_ids])

def found(*rows):
    "Predictions of one image: (label, number of the object or None for a miss, score)"
    boxes = [[20*i, 100*k, 20*i + 10, 100*k + 10] if i is not None else [5000 + n, 0, 5005 + n, 5] for n, (k, i, _) in enumerate(rows)]
    return [dict(image_id=1, boxes=torch.tensor(boxes).float().reshape(-1, 4), scores=torch.tensor([s for *_, s in rows]),
                 labels=torch.tensor([k for k, *_ in rows], dtype=torch.long))]

def test_the_threshold_parts_right_from_wrong():
    preds = found((0, 0, .9), (0, 1, .7), (0, None, .6), (0, None, .5), (1, 0, .3), (1, None, .2))
    assert best_thresholds(preds, Set([2, 1])) == pytest.approx([.7, .3])

def test_thresholds_come_in_the_order_of_the_labels():
    "Categories 7 and 3: label 0 is 7"
    preds = found((0, 0, .9), (1, 0, .25))
    assert best_thresholds(preds, Set([1, 1])) == pytest.approx([.9, .25])
    assert best_thresholds(preds, Set([1, 1], cat_ids=(3, 7))) == pytest.approx([.9, .25])

def test_a_late_hit_pays_for_a_false_alarm_where_many_are_missed():
    "2 of 4 objects by .8: F1 .67; with one false alarm and both others .89"
    preds = found((0, 0, .9), (0, 1, .8), (0, None, .6), (0, 2, .5), (0, 3, .4))
    assert best_thresholds(preds, Set([4, 0]))[0] == pytest.approx(.4)

@pytest.mark.parametrize('rows', [(), ((0, None, .9),), ((1, 0, .9),)], ids=['nothing', 'all wrong', 'another class'])
def test_a_class_without_a_right_detection_gets_a_half(rows):
    assert best_thresholds(found(*rows), Set([1, 1]))[0] == .5

def test_a_class_without_objects_gets_a_half():
    assert best_thresholds(found((0, None, .9)), Set([0, 1])) == [.5, .5]

def test_equal_scores_stand_or_fall_together():
    scores, f1 = _f1_curve([(.9, True), (.5, True), (.5, False), (.5, False)], n=2)
    assert scores.tolist() == [.9, .5] and f1.tolist() == pytest.approx([2/3, 4/6])
    scores, f1 = _f1_curve([(.5, False), (.5, True)], n=1) # whatever their order in the list
    assert scores.tolist() == [.5] and f1.tolist() == pytest.approx([2/3])

def test_a_duplicate_is_a_false_alarm():
    assert best_thresholds(found((0, 0, .9), (0, 0, .4)), Set([1, 0]))[0] == pytest.approx(.9)

def test_crowds_count_neither_as_objects_nor_as_false_alarms():
    preds = found((0, 0, .9), (0, 1, .4), (0, 2, .3))
    assert best_thresholds(preds, Set([3, 0], crowd={(7, 1)}))[0] == pytest.approx(.3)
    alone = best_thresholds(found((0, 0, .9), (0, 1, .4)), Set([2, 0], crowd={(7, 1)}))
    assert alone[0] == pytest.approx(.9)

def test_the_overlap_that_is_asked_for_counts():
    preds = found((0, 0, .9), (0, 1, .5))
    preds[0]['boxes'][1] += torch.tensor([0., 0, 4, 0]) # IoU 10/14
    assert best_thresholds(preds, Set([2, 0]), iou=.5)[0] == pytest.approx(.5)
    assert best_thresholds(preds, Set([2, 0]), iou=.8)[0] == pytest.approx(.9)

@pytest.mark.parametrize('seed', range(3))
def test_no_other_threshold_has_a_better_f1(seed):
    "By brute force, over every score, from the table of matches of one class at a time"
    truth = made_truth(12, seed)
    preds = made_preds(truth, seed=seed)
    best = best_thresholds(preds, truth)
    for k, c in enumerate(CAT_IDS[:3]):
        one = dict(truth, annotations=[a for a in truth['annotations'] if a['category_id'] == c])
        mine = [dict(image_id=p['image_id'], **{f: p[f][p['labels'] == k] for f in ('boxes', 'scores', 'labels')}) for p in preds]
        def f1(t):
            table = match_table(mine, one, score=t)
            return 2*(table.truth == table.pred).sum()/((table.truth != 'background').sum() + (table.pred != 'background').sum())
        all_scores = torch.cat([p['scores'] for p in mine]).tolist()
        assert f1(best[k]) == pytest.approx(max(map(f1, all_scores)))

def test_predictions_and_truth_are_left_alone(preds, truth):
    before = copy.deepcopy((preds, truth))
    best_thresholds(preds, truth)
    assert truth == before[1]
    for p, q in zip(preds, before[0]): assert all(torch.equal(p[k], q[k]) for k in ('boxes', 'scores', 'labels'))


def test_a_class_named_background_is_a_class():
    boxes = [[0, 0, 10, 10], [50, 50, 10, 10]]
    truth = dict(images=[dict(id=1)], categories=[dict(id=1, name='background'), dict(id=2, name='x')],
                 annotations=[dict(image_id=1, category_id=k, bbox=b) for k, b in enumerate(boxes, 1)])
    table = match_table([dict(image_id=1, category_id=2, bbox=boxes[1], score=.9)], truth)
    counts = confusion(table, ['background', 'x'])
    assert counts.shape == (3, 3) and counts.loc['background', '(background)'] == 1 and counts.to_numpy().sum() == 2
    assert worst_images(table).loc[1].to_dict() == dict(found=1, confused=0, missed=1, invented=0)


def test_dollars_in_plots_are_text(tmp_path):
    "No formula is read in legends and ticks"
    names = ['$a_{$', '$1 or $2']
    truth = dict(images=[dict(id=1)], categories=[dict(id=i, name=o) for i, o in enumerate(names)],
                 annotations=[dict(image_id=1, category_id=i, bbox=[0, 0, 9, 9]) for i in (0, 1)])
    preds = [dict(image_id=1, category_id=i, bbox=[0, 0, 9, 9], score=.9) for i in (0, 1)]
    axs = (plot_pr(coco_ap(preds, truth), classes=names), plot_f1(f1_curves(preds, truth)),
           plot_confusion(confusion(match_table(preds, truth), names)))
    for ax in axs: ax.figure.savefig(tmp_path/'x.png')
