"Boxes where they belong and names inside the image, for any form of image; the style is set once"
import base64, io, warnings
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from deqdet.scores.judging import plot_f1
from deqdet.scores.matches import plot_confusion
from deqdet.sets.images import Target, show_sample
from deqdet.ops.draw import STYLE, _as_output, class_color, draw_box, draw_boxes, show_image, style


@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close('all')
    yield
    plt.close('all')


@pytest.fixture
def img(): return torch.arange(3*48*64).reshape(3, 48, 64).remainder(251).to(torch.uint8)

BOXES = torch.tensor([[2., 3, 20, 30], [30, 10, 60, 40], [5, 5, 9, 9]])


def test_a_box_around_the_whole_image_lies_on_its_rim(img):
    ax = show_image(img)
    draw_box(ax, (0, 0, 64, 48), class_color(3), 'all')
    rectangle = ax.patches[0]
    assert (rectangle.get_xy(), rectangle.get_width(), rectangle.get_height()) == ((-.5, -.5), 64, 48)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-.5, 63.5), (47.5, -.5))
    assert [ax.texts[0].get_va(), ax.texts[0].get_ha()] == ['top', 'left'] # inside, at the upper left

def test_any_form_of_image_will_do(img):
    array = img.permute(1, 2, 0).numpy()
    for form in (img, array, Image.fromarray(array)):
        np.testing.assert_array_equal(np.asarray(show_image(form).images[0].get_array()), array)
    np.testing.assert_allclose(np.asarray(show_image(img/255.).images[0].get_array()), array/255., atol=1e-6)

def test_boxes_below_the_score_are_left_out(img):
    scores = torch.tensor([.9, .3, .5])
    assert [len(draw_boxes(img, BOXES, scores=scores, min_score=m).patches) for m in (0, .4, .5, .95)] == [3, 2, 2, 0]

def test_the_best_box_is_drawn_last(img):
    ax = draw_boxes(img, BOXES, scores=torch.tensor([.5, .9, .7]))
    assert [p.get_width() for p in ax.patches] == [18, 4, 30]

def test_without_scores_boxes_keep_their_order(img):
    assert [p.get_width() for p in draw_boxes(img, BOXES).patches] == [18, 30, 4]

@pytest.mark.parametrize('given,texts', [({}, []), (dict(labels=[0, 1, 0]), ['0', '1', '0']),
    (dict(labels=[0, 1, 0], vocab=['a', 'b']), ['a', 'b', 'a']), (dict(scores=[.1, .2, .3]), ['0.10', '0.20', '0.30']),
    (dict(labels=[0, 1, 0], scores=[.1, .2, .3], vocab=['a', 'b']), ['a 0.10', 'b 0.20', 'a 0.30'])])
def test_what_is_known_is_written(img, given, texts):
    assert [t.get_text() for t in draw_boxes(img, BOXES, **given).texts] == texts

def test_nothing_on_an_image(img):
    assert not draw_boxes(img, torch.zeros(0, 4), [], [], ['a']).patches
    assert not draw_boxes(img, [], torch.zeros(0).long(), torch.zeros(0)).patches

def test_a_box_has_four_numbers(img):
    with pytest.raises(RuntimeError, match='shape'): draw_boxes(img, torch.zeros(1, 3))

def test_boxes_are_added_to_what_is_drawn(img):
    ax = draw_boxes(img, BOXES[:1])
    assert draw_boxes(None, BOXES[1:], ax=ax) is ax and len(ax.patches) == 3 and len(ax.images) == 1

def test_one_colour_for_all_and_the_lines_as_asked_for(img):
    ax = draw_boxes(img, BOXES, [0, 1, 2], color=(1., 0, 0), width=3, style='--', alpha=.5)
    for p in ax.patches:
        assert p.get_edgecolor() == (1., 0, 0, .5) and p.get_linewidth() == 3 and p.get_linestyle() == '--'

def test_a_name_out_of_sight_is_not_drawn(img):
    ax = draw_boxes(img, [[100., 5, 120, 20], [5, 100, 20, 120], [float('nan')]*4], [0, 1, 2])
    assert len(ax.patches) == 3 and not ax.texts

def test_the_style_is_set():
    with plt.rc_context():
        plt.rcdefaults()
        style()
        assert {k: plt.rcParams[k] for k in STYLE} == STYLE
        style(photos=True) # formats are a notebook's; elsewhere nothing happens

@pytest.mark.parametrize('photos,kind,sharpness', [(False, 'PNG', 2), (True, 'JPEG', 1.5)])
def test_a_figure_has_more_pixels_than_it_is_shown_with(img, photos, kind, sharpness):
    fig = show_image(img).figure
    outputs = [_as_output(fig, photo, photos) for photo in (False, True)]
    (data,size), = [o for o in outputs if o] # of the two kinds, one
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format==kind and abs(size['width']*sharpness - image.width) <= 1
    assert abs(size['height']*sharpness - image.height) <= 1

def test_a_plot_is_never_a_photograph():
    fig,ax = plt.subplots()
    ax.plot([1, 2])
    assert _as_output(fig, True, photos=True) is None and _as_output(fig, False, photos=True)


def test_dollars_in_names_are_text(img, tmp_path):
    ax = draw_boxes(img, BOXES, [0, 1, 2], [.5, .6, .7], ['$a_{$', '$1 or $2', 'US$'], title='$x^$.png')
    ax.figure.savefig(tmp_path/'x.png') # no formula is read
    assert [o.get_parse_math() for o in (*ax.texts, ax.title)] == [False]*4


def test_glyphs_that_the_font_lacks_come_from_others(img, tmp_path, monkeypatch):
    "Chinese names were empty boxes; here a font of matplotlib stands for one of the system, and a family is missing"
    monkeypatch.setattr('deqdet.ops.draw.CJK', ('No Such Font', 'STIXGeneral'))
    name = '\u2316' # in STIX, not in DejaVu
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Glyph')
        draw_boxes(img, BOXES, [0, 0, 0], vocab=[name], title=name).figure.savefig(tmp_path/'a.png')
        target = Target(BOXES, torch.zeros(3).long())
        show_sample(img, target, [name]).figure.savefig(tmp_path/'b.png')
        table = pd.DataFrame([[2, 1], [0, 3]], [name, 'b'], [name, 'b'])
        plot_confusion(table).figure.savefig(tmp_path/'c.png', bbox_inches='tight')
        curve = pd.DataFrame(dict(score=[0., 1.], f1=[.5, 0.]))
        plot_f1({name: curve}).figure.savefig(tmp_path/'d.png')
