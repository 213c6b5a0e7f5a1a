"Pictures of real objects: fastai's logs, a detector's trajectory, solver traces, boxes at any place, films that stay small"
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from PIL import Image
from torch import nn
from deqdet.data import det_dls, synth_coco
from deqdet.equilibrium import Settled
from deqdet.evaluate import predict_dl
from deqdet.families.adamixer import AdaMixer
from deqdet.solver import picard, solve
from deqdet.viz import (class_color, draw_boxes, draw_points, plot_residuals, plot_training, read_log, save_refinement,
                        show_pairs, show_predictions, show_refinement, show_trails)


@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close('all')
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = synth_coco(tmp_path_factory.mktemp('shapes'), n_train=2, n_valid=5, size=(96, 150), seed=4)
    return det_dls(path, bs=2, size=64, num_workers=0)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return AdaMixer(4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=6, grid=(2, 3, .4), width=32,
                    heads=4, points=(4,), out_points=8, hidden=64, strategy=Settled()).build()


def test_a_detectors_refinement(model, dls, tmp_path):
    images, sizes, _ = dls.valid.one_batch()
    path = model.trajectory(images, sizes, steps=3)
    for i in range(len(images)):
        titles = [ax.get_title() for ax in show_refinement(images[i], path, i, min_score=0.).axes]
        assert titles == ['init', '1 step', '2 steps', '4 steps'][:len(titles)] and len(titles) >= 3
        assert len(show_trails(images[i], path, i, min_score=0.).lines) == 2*6
    plt.close('all')
    file = save_refinement(images[0], path, tmp_path/'a.gif', vocab=dls.vocab, min_score=0.)
    with Image.open(file) as im: assert im.n_frames <= len(path) and im.info['loop'] == 0
    assert file.stat().st_size < 60_000 and not plt.get_fignums()


def test_predictions_lie_on_the_files_pixels(model, dls):
    "The model saw 64 pixels of 150; what is drawn is in pixels of the file"
    preds = predict_dl(model, dls.valid, max_dets=3)
    fig = show_predictions(dls.valid.dataset, preds, n=2, min_score=0.)
    for ax in fig.axes[:4]: assert ax.images[0].get_array().shape == (96, 150, 3)
    patches = [p for p in fig.axes[1].patches]
    widths = sorted(p.get_width() for p in patches)
    np.testing.assert_allclose(widths, sorted((preds[0]['boxes'][:, 2] - preds[0]['boxes'][:, 0]).tolist()), rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_text_stays_inside(seed):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(40, 2, 2, generator=g).sort(1)[0]*torch.tensor([200., 100.])
    ax = draw_boxes(torch.zeros(3, 100, 200, dtype=torch.uint8), xy.flatten(1), torch.arange(40), torch.rand(40, generator=g))
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    for t in ax.texts:
        b = t.get_window_extent()
        assert b.x0 >= frame.x0 - 2 and b.x1 <= frame.x1 + 2 and b.y1 <= frame.y1 + 4


def test_thirty_colours_differ():
    c = np.array([class_color(k) for k in range(20)])
    far = np.abs(c[:, None] - c[None]).sum(-1) + np.eye(20)
    assert far.min() > .15 and c.min() >= 0 and c.max() <= 1


def test_nothing_to_draw(dls):
    img, t = dls.valid.dataset[0]
    assert not draw_boxes(img, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), dls.vocab).patches
    draw_points(img, torch.zeros(0, 2, 4, 2), torch.zeros(0, 2, 4, 4))
    assert plot_residuals({}).get_yscale() in ('linear', 'log')


@pytest.mark.parametrize('far', [1e4, 1e9, 1e15, 1e30, float('inf')])
def test_boxes_far_away(far, tmp_path):
    "A training that goes wrong has them; a picture can be drawn all the same, and is no larger"
    boxes = torch.tensor([[far, far, 2*far, 2*far], [-far, -far, far, far], [10, -far, 20, far], [-2*far, 5, -far, 20]])
    ax = draw_boxes(torch.zeros(3, 64, 64, dtype=torch.uint8), boxes, torch.arange(4), torch.rand(4))
    ax.figure.savefig(tmp_path/'far.png', dpi=50, bbox_inches='tight')
    with Image.open(tmp_path/'far.png') as im: assert max(im.size) < 200


def test_a_figure_is_as_high_as_its_pictures(dls):
    "Lying pictures leave no blank rows; where nothing was found the picture says so"
    img, t = torch.zeros(3, 50, 100, dtype=torch.uint8), dict(boxes=torch.tensor([[5., 5, 20, 20]]), labels=torch.tensor([1]))
    low = t | dict(scores=torch.tensor([.2]))
    fig = show_pairs([img]*4, [t]*4, [low]*3 + [low | dict(scores=torch.tensor([.9]))])
    w, h = fig.get_size_inches()
    assert h/w == pytest.approx(2*.57/4)
    said = [any('none above 0.3' in o.get_text() for o in ax.texts) for ax in fig.axes]
    assert said == [False, True, False, True, False, True, False, False]


def test_residuals_of_a_solution():
    s = solve(lambda z, b: .5*z + b, torch.zeros(3, 4), (torch.ones(3, 4),), method=picard(), max_iter=10, record=True)
    line = plot_residuals(dict(picard=s.trace.rel[..., 0])).lines[0]
    assert len(line.get_xdata()) == 10 and np.all(np.diff(line.get_ydata()) < 0)


def test_fastais_own_logs(tmp_path):
    x = torch.randn(16, 2)
    dl = DataLoader(list(zip(x, x.sum(1, keepdim=True))), bs=4, num_workers=0)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(2, 1), nn.MSELoss(), metrics=[lambda p, t: (p - t).abs().mean()])
    learn.metrics[0].func.__name__ = 'APish'
    learn.path = tmp_path
    with learn.no_logging(): learn.fit(3, cbs=CSVLogger())
    a, b, c = read_log(tmp_path/'history.csv'), read_log(learn), read_log(learn.recorder)
    assert list(a) == list(b) == ['train_loss', 'valid_loss', 'APish'] and len(a) == 3
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert b.equals(c)
    axs = plot_training(learn)
    assert [len(ax.lines) for ax in axs] == [2, 1]


def test_a_single_epoch():
    "A point has one place on the axis, not nine with fractions"
    axs = plot_training([dict(epoch=0, train_loss=3., valid_loss=2., AP=.1)])
    for ax in axs:
        ax.figure.canvas.draw()
        assert [t.get_text() for t in ax.get_xticklabels()] == ['0']
