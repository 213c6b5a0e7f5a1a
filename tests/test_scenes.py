"Generated scenes: the same state draws the same scene, and boxes fit what is seen"
import numpy as np, pytest
from deqdet.sets.scenes import KINDS, KIND_NAMES, put, scene, sizes_in
from deqdet.sets.siblings import SIBLING_NAMES, letters, sibling_scene, siblings
from deqdet.sets.silhouettes import SILHOUETTES, mask_of, patch, textures


@pytest.mark.parametrize('i', range(len(SILHOUETTES)))
def test_masks_reach_the_side_they_were_asked_for(i):
    for seed in range(20):
        polygons = SILHOUETTES[i](np.random.default_rng(seed))
        mask = mask_of(polygons, 64, seed, 1.3)
        assert abs(max(mask.size) - 64) <= 2
        assert np.asarray(mask).max() > 200, 'nothing was drawn'


def test_textures_stay_in_bounds():
    bank = textures()
    assert bank.min() >= 0 and bank.max() <= 1 and bank.dtype==np.float32
    assert all(t.std() > .01 for t in bank), 'a texture without contrast'


@pytest.mark.parametrize('h,w', [(8, 8), (320, 320), (33, 700), (500, 40)])
def test_patches_have_the_size_asked_for(h, w):
    for seed in range(20): assert patch(np.random.default_rng(seed), h, w).shape==(h, w)


def test_scenes_repeat():
    for seed in range(5):
        a = scene(np.random.default_rng(seed), 96, 128)
        b = scene(np.random.default_rng(seed), 96, 128)
        assert all(np.array_equal(x, y) for x,y in zip(a, b))


def test_boxes_lie_in_the_image_and_labels_name_kinds():
    counts = []
    for seed in range(40):
        h,w = [(96, 128), (160, 160), (224, 192)][seed%3]
        img,boxes,labels = scene(np.random.default_rng(seed), h, w)
        assert img.shape==(h, w, 3) and img.dtype==np.uint8
        assert len(boxes)==len(labels)
        counts.append(len(labels))
        if not len(labels): continue
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert labels.min() >= 0 and labels.max() < len(KINDS)
    assert max(counts) > 15 and min(counts) <= 2, 'crowds and nearly empty scenes'


def test_sizes_span_a_factor_of_fifteen():
    drawn = [sizes_in(np.random.default_rng(i), 256) for i in range(600)]
    sides = [draw() for n,draw in drawn for _ in range(n)]
    assert np.quantile(sides, .99)/np.quantile(sides, .01) > 15
    assert sum(n==0 for n,_ in drawn) > 5


def test_an_object_is_never_hidden_beyond_the_limit():
    "What is drawn later covers at most the allowed part of what was there"
    rng = np.random.default_rng(0)
    img = np.zeros((128, 128, 3), np.float32)
    owner = np.zeros((128, 128), np.int64)
    style = dict(upright=False, cut=False, hide=.4, hues=[rng.uniform(0, 255, 3)]*3, shadow=0, areas={})
    number = 0
    for _ in range(200):
        kind = KINDS[rng.integers(len(KINDS))]
        before = {i: (owner==i).sum() for i in style['areas']}
        if not put(rng, img, owner, kind, 30, number+1, style): continue
        number += 1
        for i,n in before.items(): assert n - (owner==i).sum() <= .4*style['areas'][i] + 1
    assert number > 10


def test_names_are_distinct(): assert len(set(KIND_NAMES))==len(KINDS)==60


def test_siblings_share_a_look_and_differ_in_their_marks():
    every = siblings()
    assert len(every)==len(SIBLING_NAMES) and len(set(SIBLING_NAMES))==len(every)
    assert [k.number for k in every]==list(range(60, 60 + len(every)))
    for first in range(0, len(every), 4):
        family = every[first:first + 4]
        looks = {(k.make, k.seed, k.stretch, k.texture, *k.hue) for k in family}
        assert len(looks)==1
        drawn = [tuple(np.concatenate([*m.polygons, m.rgb[None, :2], m.at[None]]).tobytes() for m in k.marks()) for k in family]
        assert len(set(drawn))==4, 'two of a family cannot be told apart'


def test_sibling_scenes_repeat_and_name_their_families():
    seen = set()
    for seed in range(12):
        a = sibling_scene(np.random.default_rng(seed), 160, 128)
        b = sibling_scene(np.random.default_rng(seed), 160, 128)
        assert all(np.array_equal(x, y) for x,y in zip(a, b))
        seen |= set(a[2].tolist())
    assert any(k >= 60 for k in seen) and any(k < 60 for k in seen)


def test_a_letter_keeps_its_hole():
    mask = np.asarray(mask_of(letters('O'), 80, 0., 1.))
    middle = mask[mask.shape[0]//2 - 4:mask.shape[0]//2 + 4]
    assert middle[:, 4:12].max() > 200, 'no ring'
    assert np.median(middle[:, middle.shape[1]//2 - 6:middle.shape[1]//2 + 6]) < 30, 'no hole'
