"The commands' doors to other programs: tiles, exported files, sets to correct, groups, trackers, the hub; bad input in one line"
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from PIL import Image
from deqdet import cli, export
from deqdet.commands.options import division
from deqdet.commands.tracking import TRACKERS, trackers
from deqdet.data import det_dls, synth_coco
from deqdet.export import load_exported
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.model import Feed
from deqdet.ops.errors import CommandError
from deqdet.predict import save_detector
from test_using_hub import Hub, hub # a server that speaks as the hub does

SMALL = dict(body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9, grid=(3, 3, .4), width=32, heads=4, groups=2,
             points=(4,), out_points=8, hidden=64,
             strategy=Settled(steps=3, supervise=(1, 3), recompute=False))

pytestmark = pytest.mark.usefixtures('read_once')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A set, an untrained detector, and its exported file: `shapes`, `start`, `start.pt2`"
    d = tmp_path_factory.mktemp('use')
    synth_coco(d/'shapes', n_train=4, n_valid=2, size=64, seed=1)
    torch.manual_seed(0)
    model = AdaMixer(n_classes=4, **SMALL).build(vocab=['disc', 'triangle', 'square', 'cross'])
    model.feed, model.recipe = Feed(64, 64), 'tiny'
    save_detector(model, d/'start')
    model.eval().export(d/'start.pt2', steps=1)
    return d


def bad(capsys, says, f, *args, **kwargs):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: f(*args, **kwargs)
    err = [o for o in capsys.readouterr().err.splitlines() if not o.startswith('warning: ')]
    assert e.value.code == 2 and len(err) == 1 and says in err[0], err


def predict(world, out, model='start', pictures='shapes/images', **kwargs):
    return cli.deqdet_predict(str(world/model), [str(world/pictures)], str(out), device=kwargs.pop('device', 'cpu'), **kwargs)


def found(folder): return json.loads((folder/'predictions.json').read_text())


# ---- predict

def test_tiles_find_what_is_small(world, tmp_path):
    "Nine tiles and the whole see more than the whole"
    predict(world, tmp_path/'whole', min_score=.01, json_only=True)
    predict(world, tmp_path/'tiled', min_score=.01, json_only=True, tiles='32,8')
    few, many = (len(found(tmp_path/o)['annotations']) for o in ('whole', 'tiled'))
    predict(world, tmp_path/'once', min_score=.01, json_only=True, tiles='32,8', nms=.1)
    assert few < many and len(found(tmp_path/'once')['annotations']) < many


def test_a_set_to_correct(world, tmp_path, capsys):
    for layout in 'coco', 'voc', 'yolo':
        predict(world, tmp_path/'out', min_score=.01, json_only=True, layout=layout)
        dls = det_dls(tmp_path/'out'/layout, layout=layout, valid_pct=.5, bs=1, num_workers=0, device='cpu')
        assert len(dls.train_ds) + len(dls.valid_ds) == 6 and len(dls.train_ds.labels)
    bad(capsys, 'coco: not empty', predict, world, tmp_path/'out', layout='coco')


def test_an_exported_file_is_a_detector(world, tmp_path, capsys):
    predict(world, tmp_path/'a', min_score=.01, steps=1)
    predict(world, tmp_path/'b', 'start.pt2', min_score=.01)
    a, b = (found(tmp_path/o) for o in 'ab')
    assert a['images'] == b['images'] and a['categories'] == b['categories'] and len(a['annotations']) == len(b['annotations'])
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) == sorted(o.name for o in (tmp_path/'b').iterdir())
    capsys.readouterr()
    for model, steps in ('start', 1), ('start.pt2', None):
        cli.deqdet_eval(str(world/model), str(world/'shapes'), steps=steps, device='cpu')
    out = capsys.readouterr().out.splitlines()
    assert out[:len(out)//2] == out[len(out)//2:]


def test_an_exported_file_without_names_knows_how_many_classes(world, tmp_path, monkeypatch):
    "The graph is that of the set's detector: recording one more takes seconds"
    program = torch.export.load(world/'start.pt2')
    monkeypatch.setattr(export, 'record', lambda *args: program)
    model = AdaMixer(n_classes=4, **SMALL).build().eval()
    model.export(tmp_path/'x.pt2', steps=1)
    nameless = load_exported(tmp_path/'x.pt2')
    assert nameless.n_classes == 4 and nameless.vocab is None
    predict(world, tmp_path/'out', tmp_path/'x.pt2', json_only=True)
    assert [o['name'] for o in found(tmp_path/'out')['categories']] == ['0', '1', '2', '3']


@pytest.mark.parametrize('kwargs, says', [
    (dict(tiles='32,40'), '--tiles 32,40: (side, overlap) was expected'), (dict(tiles='big'), '--tiles big: (side'), (dict(max_dets=500), 'max_dets 500: this detector gives at most 36 detections (9 queries x 4 classes)'), (dict(nms=2.), '--nms 2.0: a number from 0 to 1'),
    (dict(model='start.pt2', steps=3), '--steps 3: an exported file has a fixed number of steps'), (dict(model='start.pt2', tol=.1), '--tol 0.1: an exported file'),
    (dict(model='start.pt2', device='cuda'), 'providers are for .onnx files'), (dict(model='shapes/annotations/instances_train.json'), 'no exported detector')])
def test_bad_options_of_predict(world, tmp_path, capsys, kwargs, says):
    bad(capsys, says, predict, world, tmp_path/'out', **kwargs)
    assert not (tmp_path/'out').exists()


def test_a_provider_that_is_not_there(world, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    (tmp_path/'x.onnx').write_bytes(b'')
    bad(capsys, '--device: TPUExecutionProvider is not there; there are', predict, world, tmp_path/'out', tmp_path/'x.onnx', device='tpu')


# ---- split

def test_split(world, tmp_path, capsys):
    for i, (place, n) in enumerate([('beach', 6), ('street', 3), ('wood', 1)]):
        for j in range(n):
            file = tmp_path/f'set/images/{place}/{j:03}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (20, 20), (10*i, j, 0)).save(file)
    files = sorted(o.relative_to(tmp_path/'set/images').as_posix() for o in (tmp_path/'set/images').rglob('*.png'))
    coco = dict(images=[dict(id=i, file_name=o) for i, o in enumerate(files)], categories=[dict(id=1, name='x')],
                annotations=[dict(id=i + 1, image_id=i, category_id=1, bbox=[1, 1, 5, 5]) for i in range(len(files))])
    (tmp_path/'set/annotations').mkdir()
    (tmp_path/'set/annotations/instances_all.json').write_text(json.dumps(coco))
    cli.deqdet_split(str(tmp_path/'set'), str(tmp_path/'out'), by='folder', valid_pct=.3)
    assert capsys.readouterr().out.splitlines() == ['train: 7 images, 2 groups', 'valid: 3 images, 1 groups']
    dls = det_dls(tmp_path/'out', bs=1, num_workers=0, device='cpu')
    written = json.loads((tmp_path/'out/annotations/instances_valid.json').read_text())
    assert {o['group'] for o in written['images']} == {'street'} and len(dls.train_ds[0][1].boxes) == 1
    bad(capsys, 'out: there is a set', cli.deqdet_split, str(tmp_path/'set'), str(tmp_path/'out'))
    for by, says in ('(', '--by (: no pattern'), ('x', "'video' or a pattern with a group"), ('nothing(.)', '--by nothing(.)'):
        bad(capsys, says, cli.deqdet_split, str(tmp_path/'set'), str(tmp_path/'other'), by=by)
    bad(capsys, '--valid_pct 1.5', cli.deqdet_split, str(tmp_path/'set'), str(tmp_path/'other'), valid_pct=1.5)
    bad(capsys, 'no such folder', cli.deqdet_split, str(tmp_path/'nowhere'), str(tmp_path/'other'))
    assert not (tmp_path/'other').exists()


# ---- trackers

def train(world, out, **kwargs): cli.deqdet_train(str(world/'shapes'), str(world/'start'), str(out), bs=2, lr=1e-3, device='cpu', **kwargs)


def test_tensorboard(world, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(world, tmp_path/'run', epochs=2, track='tensorboard')
    log = EventAccumulator(str(tmp_path/'run/tensorboard')).Reload()
    assert {'train_loss', 'valid_loss', 'AP', 'AP50', 'lr_0'} <= set(log.Tags()['scalars'])
    assert len(log.Scalars('AP')) == 2
    assert json.loads((tmp_path/'run/config.json').read_text())['options']['track'] == 'tensorboard'


def test_wandb(world, tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='wandb is not installed')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    train(world, tmp_path/'run', minutes=.05, track='wandb')
    assert list((tmp_path/'run/wandb').glob('offline-run-*/*.wandb'))


def test_mlflow(world, tmp_path):
    mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed')
    train(world, tmp_path/'run', epochs=2, track='mlflow')
    mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/run/mlflow.db')
    run, = mlflow.search_runs(experiment_names=['deqdet'], output_format='list')
    assert run.info.status == 'FINISHED' and run.data.params['epochs'] == '2' and {'train_loss', 'AP'} <= set(run.data.metrics)


@pytest.mark.parametrize('name', TRACKERS)
def test_a_tracker_that_is_not_installed(world, tmp_path, capsys, monkeypatch, name):
    for k in [k for k in sys.modules if k.split('.')[0] == name or k == f'fastai.callback.{name}']: monkeypatch.delitem(sys.modules, k)
    monkeypatch.setitem(sys.modules, name, None)
    bad(capsys, f'--track {name}: pip install {name}', train, world, tmp_path/'run', epochs=1, track=name)
    assert not (tmp_path/'run').exists()


def test_an_unknown_tracker():
    with pytest.raises(CommandError, match='one of tensorboard, wandb, mlflow'): trackers('paper', 'x', {})


# ---- the hub

@pytest.fixture
def logged_in(hub, monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    others = Hub.do_GET
    def do_GET(self):
        if self.path != '/api/whoami-v2': return others(self)
        self.say(self.refuse or 200, dict(name='user', type='user', auth=dict(accessToken=dict(role='write'))))
    monkeypatch.setattr(Hub, 'do_GET', do_GET)
    return hub


def test_push(world, tmp_path, capsys, logged_in):
    train(world, tmp_path/'run', epochs=1, push='user/shapes')
    assert f'shared: {logged_in.url}/user/shapes' in capsys.readouterr().out
    files = Hub.repos['user/shapes']
    assert {'config.json', 'model.safetensors', 'README.md', 'sample.png'} <= set(files)
    card = files['README.md'].decode()
    for o in '| data | shapes |', '| recipe | tiny |', '| AP | 0.', 'disc, triangle, square, cross': assert o in card, card


def test_push_is_refused_before_the_training(world, tmp_path, capsys, logged_in):
    bad(capsys, "--push shapes: 'user/name' was expected", train, world, tmp_path/'run', epochs=1, push='shapes')
    Hub.refuse = 401
    bad(capsys, '--push user/shapes: not allowed: hf auth login', train, world, tmp_path/'run', epochs=1, push='user/shapes')
    Hub.refuse = None
    logged_in.shutdown(); logged_in.server_close()
    bad(capsys, '--push user/shapes: ', train, world, tmp_path/'run', epochs=1, push='user/shapes')
    assert not (tmp_path/'run').exists()


def test_a_push_that_fails_loses_nothing(world, tmp_path, capsys, logged_in, monkeypatch):
    from huggingface_hub import HfApi
    def gone(self, *args, **kwargs): raise ConnectionError('gone')
    with monkeypatch.context() as m:
        m.setattr(HfApi, 'upload_folder', gone)
        bad(capsys, 'the training is complete: --resume --push user/shapes tries again', train, world, tmp_path/'run', epochs=1, push='user/shapes')
    cli.deqdet_train(str(world/'shapes'), out=str(tmp_path/'run'), resume=True, push='user/shapes', device='cpu')
    assert 'model.safetensors' in Hub.repos['user/shapes']


def test_drawings_leave_the_images_alone(world, tmp_path):
    "`--out` may be the folder of the images, or refer to them; no drawing takes the place of an image"
    pictures = tmp_path/'pictures'
    pictures.mkdir()
    for name, shade in (('a.jpg', 90), ('a.png', 150), ('b.png', 210)): Image.new('RGB', (64, 48), (shade,)*3).save(pictures/name)
    before = {o.name: o.read_bytes() for o in pictures.iterdir()}
    predict(world, pictures, pictures=pictures, min_score=0.)
    assert {k: (pictures/k).read_bytes() for k in before} == before
    assert sorted(o.name for o in pictures.iterdir() if o.name not in before) == ['a_2.png', 'a_3.png', 'b_2.png', 'predictions.json']
    linked = tmp_path/'linked'
    linked.mkdir()
    (linked/'b.png').symlink_to(pictures/'b.png')
    cli.deqdet_predict(str(world/'start'), [str(pictures/'b.png')], str(linked), device='cpu')
    assert (pictures/'b.png').read_bytes() == before['b.png']


def test_names_that_are_not_utf_8(world, tmp_path):
    "A name with a byte of Latin-1, and a terminal that is strict"
    shutil.copy(next((world/'shapes/images').iterdir()), tmp_path/'caf\udce9.jpg')
    code = 'from deqdet.cli import deqdet_predict as f; f()'
    (tmp_path/'run.py').write_text(code)
    typed = [sys.executable, tmp_path/'run.py', world/'start', tmp_path, '--out', tmp_path/'out', '--device', 'cpu']
    done = subprocess.run(typed, env=os.environ | dict(PYTHONIOENCODING='utf-8:strict'), capture_output=True, text=True)
    assert done.returncode == 0 and '1 image in' in done.stdout, done.stderr


def test_the_present_folder_is_a_part_of_its_training(tmp_path, monkeypatch):
    (tmp_path/'best').mkdir()
    (tmp_path/'config.json').write_text(json.dumps(dict(options=dict(valid_pct=.4, seed=3))))
    monkeypatch.chdir(tmp_path/'best')
    assert division('.') == division(tmp_path) == dict(valid_pct=.4, seed=3, train='train')
