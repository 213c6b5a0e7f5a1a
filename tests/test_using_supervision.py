"The real package supervision: its annotators, its tracker and its slicer work with our detections"
import warnings
import numpy as np, pytest, torch
from deqdet.data import det_dls, synth_coco
from deqdet.learner import det_learner
from deqdet.using.found import Found, to_supervision
from deqdet.zoo import create_detector

sv = pytest.importorskip('supervision', reason='the package supervision is not installed (the extra "supervision")')
VOCAB = ['cat', 'dog']


def found(boxes, hw=(120, 160)):
    n = len(boxes)
    dets = dict(boxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), scores=torch.full((n,), .9), labels=torch.arange(n)%2)
    return Found(np.zeros((*hw, 3), np.uint8), hw, dets, vocab=VOCAB)


def test_annotators_draw():
    image = np.zeros((120, 160, 3), np.uint8)
    o = found([[10, 20, 60, 80], [70, 30, 140, 100]])
    drawn = sv.LabelAnnotator().annotate(sv.BoxAnnotator().annotate(image.copy(), o.to_supervision()), o.to_supervision())
    assert drawn.shape == image.shape and drawn[20, 10:60].any() and not image.any()
    assert not sv.BoxAnnotator().annotate(image.copy(), found([]).to_supervision()).any()


def test_a_tracker_keeps_identities():
    "Two boxes that move; each keeps its number"
    trackers = pytest.importorskip('trackers', reason='the package trackers is not installed')
    tracker = trackers.ByteTrackTracker()
    ids = [tracker.update(found([[10 + 2*t, 20, 50 + 2*t, 80], [90, 30 + t, 150, 90 + t]]).to_supervision()).tracker_id.tolist() for t in range(6)]
    assert len(set(ids[-1])) == 2 and min(ids[-1]) >= 0 and all(o == ids[-1] for o in ids[2:])


def test_the_slicer_puts_parts_together():
    "A bright square in a large image, found in slices by a function that answers with `Found`"
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:140, 170:210] = 255
    def look(part):
        ys, xs = np.nonzero(part[..., 0])
        boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] if len(xs) else []
        return found(boxes, part.shape[:2]).to_supervision()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dets = sv.InferenceSlicer(look, slice_wh=(160, 160), overlap_wh=(60, 60))(image)
    assert [170, 100, 210, 140] in dets.xyxy.astype(int).tolist()
    assert set(dets.data['class_name']) == {'cat'}


def test_what_a_learner_predicts(tmp_path):
    "Boxes, scores, classes and names of `learn.predict` arrive; the slicer takes the learner too"
    torch.manual_seed(0)
    dls = det_dls(synth_coco(tmp_path/'shapes', n_train=2, n_valid=2, size=64, seed=0), bs=2, size=64, num_workers=0, device='cpu')
    learn = det_learner(dls, create_detector('deqdet_tiny', vocab=list(dls.vocab)))
    file = tmp_path/'shapes/images/valid_00000.jpg'
    mine = learn.predict(file, min_score=0., max_dets=7)
    theirs = to_supervision(mine)
    assert len(theirs) == 7 and (theirs.xyxy == mine['boxes'].numpy()).all() and (theirs.confidence == mine['scores'].numpy()).all()
    assert theirs.class_id.tolist() == mine['labels'].tolist() and theirs.data['class_name'].tolist() == mine['names']
    assert sv.BoxAnnotator().annotate(np.zeros((64, 64, 3), np.uint8), theirs).any()
    def look(part): return to_supervision(learn.predict(np.ascontiguousarray(part), min_score=0., max_dets=1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dets = sv.InferenceSlicer(look, slice_wh=(64, 64), overlap_wh=(0, 0), overlap_filter=sv.OverlapFilter.NONE)(np.zeros((64, 128, 3), np.uint8))
    assert len(dets) == 2
