"The generated set: its numbers, and its bytes"
import hashlib, json
import numpy as np
from PIL import Image
from deqdet.sets.shapes import _outline, synth_coco

def test_sides_cover_their_range():
    "From 8% to 64% of the side, neither more nor less"
    outlines = [_outline(np.random.default_rng(i), 'cross', (128,128)) for i in range(2000)]
    sides = [np.sqrt(np.prod(np.ptp(p, 0))) for p in outlines]
    assert 10.2 <= min(sides) < 11 and 78 < max(sides) <= 82

def test_more_images_leave_the_first_as_they_are(tmp_path):
    a = synth_coco(tmp_path/'a', n_train=20, n_valid=0, seed=1)
    b = synth_coco(tmp_path/'b', n_train=21, n_valid=0, seed=1)
    for i in (0, 7, 19):
        name = f'images/train_{i:05}.jpg'
        assert (a/name).read_bytes()==(b/name).read_bytes()

def test_annotations_are_those_of_the_first_release(tmp_path):
    "Published numbers were measured on these sets: boxes, classes and areas may not move"
    path = synth_coco(tmp_path, 12, 6, size=(64,96), seed=3, empty=.2, n_classes=3, max_objects=9)
    digest = hashlib.sha256()
    for split in ('train','valid'):
        coco = json.loads((path/f'annotations/instances_{split}.json').read_text())
        for a in coco['annotations']:
            digest.update(repr((a['image_id'], a['category_id'], a['bbox'], a['area'])).encode())
    assert digest.hexdigest()[:16]=='ffcf268a00c156e9'

def test_a_low_saturation_keeps_the_objects_and_calms_the_colours(tmp_path):
    def read(name, **kw):
        path = synth_coco(tmp_path/name, n_train=4, n_valid=0, size=64, seed=2, **kw)
        images = np.stack([np.asarray(Image.open(f), float) for f in sorted((path/'images').iterdir())]) # (4,64,64,3)
        return json.loads((path/'annotations/instances_train.json').read_text())['annotations'], np.ptp(images, -1).mean()
    strong,calm = read('strong'),read('calm', saturation=.25)
    assert strong[0]==calm[0] and calm[1] < .5*strong[1]

def test_another_saturation_is_another_set(tmp_path):
    synth_coco(tmp_path, n_train=1, n_valid=0, size=64)
    first = (tmp_path/'images/train_00000.jpg').read_bytes()
    synth_coco(tmp_path, n_train=1, n_valid=0, size=64, saturation=.25)
    assert (tmp_path/'images/train_00000.jpg').read_bytes()!=first
