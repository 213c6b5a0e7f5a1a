"Images of real objects: fastai's logs, a detector's trajectory, solver traces, boxes at any place, films that stay small"
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from PIL import Image
from torch import nn
from deqdet.data import collate, det_dls, synth_coco
from deqdet.decoder import Pred
from deqdet.equilibrium import Settled
from deqdet.evaluate import predict_dl
from deqdet.families.adamixer import AdaMixer
from deqdet.solver import Picard, solve
from deqdet.viz import (_draw_state, _queries, _truths_of, class_color, draw_boxes, draw_points, plot_residuals, plot_training,
                        read_log, save_refinement, show_image, show_pairs, show_predictions, show_refinement, show_trails)


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
    "A training that goes wrong has them; an image can be drawn all the same, and is no larger"
    boxes = torch.tensor([[far, far, 2*far, 2*far], [-far, -far, far, far], [10, -far, 20, far], [-2*far, 5, -far, 20]])
    ax = draw_boxes(torch.zeros(3, 64, 64, dtype=torch.uint8), boxes, torch.arange(4), torch.rand(4))
    ax.figure.savefig(tmp_path/'far.png', dpi=50, bbox_inches='tight')
    with Image.open(tmp_path/'far.png') as im: assert max(im.size) < 200


def test_a_figure_is_as_high_as_its_pictures(dls):
    "Lying images leave no blank rows; where nothing was found the image says so"
    img, t = torch.zeros(3, 50, 100, dtype=torch.uint8), dict(boxes=torch.tensor([[5., 5, 20, 20]]), labels=torch.tensor([1]))
    low = t | dict(scores=torch.tensor([.2]))
    fig = show_pairs([img]*4, [t]*4, [low]*3 + [low | dict(scores=torch.tensor([.9]))])
    w, h = fig.get_size_inches()
    assert h/w == pytest.approx(2*.57/4)
    said = [any('none above 0.3' in o.get_text() for o in ax.texts) for ax in fig.axes]
    assert said == [False, True, False, True, False, True, False, False]


def test_residuals_of_a_solution():
    s = solve(lambda z, b: .5*z + b, torch.zeros(3, 4), (torch.ones(3, 4),), method=Picard(), max_iter=10, record=True)
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


# ---- moved from the page

@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    "Eight generated images of 128 pixels"
    path = synth_coco(tmp_path_factory.mktemp('squares'), n_train=1, n_valid=8, size=128, seed=0)
    return det_dls(path, num_workers=0).valid.dataset


def settling(n=12, steps=12, found=5):
    "A trajectory of `n` queries in an image of 128 pixels, of which the first `found` end with a high score"
    g = torch.Generator().manual_seed(0)
    xy = 90*torch.rand(n, 2, generator=g)
    boxes = torch.cat([xy, xy + 5 + 30*torch.rand(n, 2, generator=g)], 1)
    logits = torch.full((n, 4), -4.)
    logits[range(found), torch.arange(found) % 4] = 3.
    return [(None, Pred(logits[None], boxes[None] + 20*.6**s)) for s in range(steps + 1)]


def test_an_image_in_any_form_shows_the_same(squares):
    "The file, an array, a float tensor, a PIL image"
    img = squares[0][0]
    array = img.permute(1, 2, 0).numpy()
    for form in (squares.folder/squares.images[0]['file_name'], array, img/255., Image.fromarray(array)):
        np.testing.assert_array_equal(np.asarray(show_image(form).images[0].get_array()), array)
        assert len(draw_boxes(form, [[1., 2, 9, 9]]).patches) == 1


def test_the_truth_of_an_image_is_in_pixels_of_its_file(squares):
    for i in (0, 3):
        t = squares[i][1]
        truth, = _truths_of(squares, [t.image_id.item()])
        assert torch.equal(truth['boxes'], t.boxes) and torch.equal(truth['labels'], t.labels)


def test_queries_that_end_with_a_score_are_found():
    boxes, scores, labels, found = _queries(settling(), 0, .3)
    assert boxes.shape == (13, 12, 4) and scores.shape == (13, 12) and labels.shape == (12,)
    assert found == [0, 1, 2, 3, 4] and labels[:5].tolist() == [0, 1, 2, 3, 0]


def test_every_query_has_a_box_and_those_that_are_found_a_name():
    q = _queries(settling(), 0, .3)
    for names in (False, True):
        ax = show_image(torch.zeros(3, 128, 128, dtype=torch.uint8))
        _draw_state(ax, 12, *q, ['a', 'b', 'c', 'd'], names)
        assert len(ax.patches) == 12
        assert [t.get_text()[:1] for t in ax.texts] == (['a', 'b', 'c', 'd', 'a'] if names else [])


def test_a_trail_for_each_query_that_is_found():
    assert len(show_trails(torch.zeros(3, 128, 128, dtype=torch.uint8), settling()).lines) == 2*5


def test_panels_of_a_model_stop_at_its_last_state(model, squares):
    batch, sizes, _ = collate([squares[0], squares[1]])
    path = model.trajectory(batch, sizes, steps=4)
    assert len(show_refinement(batch[1], path, index=1, min_score=0.).axes) == 4


def test_one_palette_makes_the_film_small(squares, tmp_path):
    "Less than half of what matplotlib writes, on a textured background"
    from matplotlib.animation import FuncAnimation, PillowWriter
    img, path = squares[0][0], settling()
    q = _queries(path, 0, .3)
    fig, ax = plt.subplots(figsize=(2, 2.2), layout='constrained')
    def frame(t):
        ax.clear()
        show_image(img, ax, f'{t}')
        _draw_state(ax, t, *q)
    FuncAnimation(fig, frame, frames=len(path)).save(tmp_path/'naive.gif', writer=PillowWriter(fps=4), dpi=100)
    file = save_refinement(img, path, tmp_path/'settle.gif', vocab=squares.vocab)
    with Image.open(file) as im: assert (im.n_frames, im.size) == (13, (200, 225))
    assert file.stat().st_size < .5*(tmp_path/'naive.gif').stat().st_size


def test_points_lie_where_they_are_read():
    points = torch.rand(2, 2, 16, 2)*100
    weights = torch.softmax(torch.randn(2, 2, 16, 4), -1)
    ax = draw_points(torch.zeros(3, 128, 128, dtype=torch.uint8), points, weights, boxes=torch.tensor([[1., 2, 30, 40]]*2))
    assert [len(c.get_offsets()) for c in ax.collections[:2]] == [32, 32]
    np.testing.assert_allclose(ax.collections[0].get_offsets()[0], points[0, 0, 0] - .5, atol=1e-5)
    octaves = weights[:, 0] @ torch.tensor([2., 3, 4, 5])
    np.testing.assert_allclose(ax.collections[0].get_array(), octaves.flatten(), rtol=1e-5)
    assert len(ax.patches) == 2


def test_residuals_have_a_line_each_and_one_for_the_tolerance():
    traces = {k: torch.rand(25, 8)*.8**torch.arange(25)[:, None] for k in ('picard', 'anderson')}
    ax = plot_residuals(traces, tol=1e-3)
    assert len(ax.lines) == 3 and ax.get_yscale() == 'log'


def test_zeros_and_lost_images_leave_no_holes():
    lost = torch.tensor([[1., float('nan')], [.1, float('nan')]])
    ax = plot_residuals({'exact': torch.zeros(4, 3), 'one lost': lost})
    assert all(np.isfinite(l.get_ydata()).all() for l in ax.lines)


class Recorder:
    "What a fastai recorder keeps"
    metric_names = ['epoch', 'train_loss', 'valid_loss', 'AP', 'time']
    values = [[3., 4., .1], [2., 3., .2]]


def test_every_form_of_a_log_gives_its_table(tmp_path):
    import pandas as pd
    e = np.arange(12)
    log = pd.DataFrame(dict(epoch=e, train_loss=9*.8**e + 3, valid_loss=9*.82**e + 3.4, AP=.6*(1 - .8**e), AP50=.9*(1 - .7**e),
                            AP75=.65*(1 - .82**e), APs=.4*(1 - .85**e), APm=.7*(1 - .8**e), APl=float('nan'), time='00:11'))
    log.to_csv(tmp_path/'log.csv', index=False)
    assert read_log(Recorder()).AP.tolist() == [.1, .2]
    assert read_log(tmp_path/'log.csv').round(9).equals(read_log(log).round(9))
    assert [len(ax.lines) for ax in plot_training(log)] == [2, 5] # APl has no number


def test_a_training_without_validation_has_one_panel():
    import pandas as pd
    assert len(plot_training([dict(epoch=0, train_loss=2.), dict(epoch=1, train_loss=1.)])) == 1
    assert len(plot_training(pd.DataFrame(dict(epoch=[], train_loss=[])))) == 1
