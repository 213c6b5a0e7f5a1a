"What the commands promise: one line for what the user can put right, nothing half written, nothing lost"
import errno, json, os, re, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
import pytest, torch
from PIL import Image
from deqdet import cli, demo, runs, shell
from deqdet.data import load_image, synth_coco
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.model import Feed
from deqdet.predict import COCO, load_detector, save_detector
from deqdet.zoo import create_detector
from forks import accelerate, forked, torchrun

SMALL = dict(body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9, grid=(3, 3, .4), width=32, heads=4, groups=2,
             points=(4,), out_points=8, hidden=64, strategy=Settled(steps=3, supervise=(1, 3), recompute=False))
RUN = dict(bs=2, epochs=2, lr=1e-3, ema=.5, every=1, device='cpu')


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    "A set of shapes, an untrained detector, and a training of it: `shapes`, `start`, `run`"
    d = tmp_path_factory.mktemp('cli')
    synth_coco(d/'shapes', n_train=4, n_valid=2, size=64, seed=1)
    torch.manual_seed(0)
    model = AdaMixer(n_classes=4, **SMALL).build(vocab=['disc', 'triangle', 'square', 'cross'])
    model.feed, model.recipe = Feed(64, 64), 'tiny'
    save_detector(model, d/'start')
    train(d, 'run')
    return d


@pytest.fixture
def blank(monkeypatch):
    "Trainings that leave empty files in the place of figures, which take as long as the training"
    def touch(folder, ds, device):
        assert device==torch.device('cpu') # where the training was
        for o in 'curves.png', 'predictions.png': (folder/o).touch()
    monkeypatch.setattr(runs, 'draw_training', touch)


def train(d, out, data='shapes', **kwargs):
    "Train on a set of `d`"
    options = {} if kwargs.get('resume') else dict(RUN, model=str(d/'start'))
    cli.deqdet_train(str(d/data), out=str(d/out), **options | kwargs)


def refused(capsys, status, says, f, *args, **kwargs):
    "The command ends with a status and, as its last line, one that names command and place"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: f(*args, **kwargs)
    err = capsys.readouterr().err
    assert e.value.code == status, err
    lines = [o for o in err.splitlines() if not o.startswith('warning: ')]
    assert len(lines) == 1 and says in lines[0], err
    return lines[0]


def bad(capsys, says, f, *args, **kwargs): return refused(capsys, 2, says, f, *args, **kwargs)


def altered(world, tmp_path, split='train', **change):
    "A copy of the shapes with other lists in an annotation file"
    path = Path(shutil.copytree(world/'shapes', tmp_path/'set'))
    file = path/f'annotations/instances_{split}.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return path


def weights(folder): return load_detector(folder, device='cpu').state_dict()


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------- the commands as a whole

COMMANDS = [v for k, v in vars(cli).items() if k.startswith('deqdet_')] + [demo.deqdet_demo]

def test_starts_quickly():
    "`--help` waits for none of the large libraries"
    code = ("import sys, deqdet.cli, deqdet.demo\n"
            "sys.exit(bool({'torch', 'fastai', 'numpy', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_help_is_worth_reading():
    from fastcore.script import anno_parser
    for f in COMMANDS:
        p = anno_parser(f, f.__name__)
        assert f.__name__ in p.description, f'{f.__name__}: an example was expected'
        assert all(a.help for a in p._actions), f.__name__


def test_the_zoo_as_a_table(capsys):
    from fastcore.script import anno_parser
    args = vars(anno_parser(cli.deqdet_models).parse_args(['adamixer*']))
    cli.deqdet_models(args['pattern'])
    names = [o.split()[0] for o in capsys.readouterr().out.splitlines()[1:]]
    assert names and all(o.startswith('adamixer') for o in names)
    assert anno_parser(cli.deqdet_models).parse_args([]).pattern == '*'


def test_every_command_is_a_script():
    ini = (Path(__file__).parents[1]/'settings.ini').read_text()
    for f in COMMANDS: assert f'{f.__name__}={f.__module__}:{f.__name__}' in ini


def test_a_bug_is_no_fault_of_the_user(capsys):
    def f(): raise AttributeError('ours')
    with pytest.raises(AttributeError): shell.command(f)()
    def g(): raise OSError(errno.EBADF, 'ours')
    with pytest.raises(OSError): shell.command(g)()
    def h(): raise KeyboardInterrupt
    refused(capsys, 130, 'h: stopped', shell.command(h))


PRINTS = 'from deqdet.shell import command\n@command\ndef prints(): print("a line")\nprints()'

@pytest.mark.parametrize('buffered, cmd', [('', [Path(sys.executable).parent/'deqdet_models']), ('1', [sys.executable, '-c', PRINTS])])
def test_output_without_a_reader(buffered, cmd):
    "As in `deqdet_models | head -1`, and a command that starts quickly"
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONUNBUFFERED=buffered))
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait() == 128 + signal.SIGPIPE


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv('DEQDET_TRACEBACK', '1')
    with pytest.raises(ValueError): cli.deqdet_check('nowhere')


def test_options_are_spelt_with_hyphens_or_underscores(monkeypatch):
    for low, high in ('--min_score', '--max_dets'), ('--min-score', '--max-dets'):
        monkeypatch.setattr(sys, 'argv', ['deqdet_predict', 'a_b', 'x_y.jpg', 'z.jpg', low, '.5', f'{high}=7', '--json_only'])
        kwargs = shell.read_options(cli.deqdet_predict)
        assert kwargs['images'] == ['x_y.jpg', 'z.jpg'] and kwargs['model'] == 'a_b'
        assert (kwargs['min_score'], kwargs['max_dets'], kwargs['json_only']) == (.5, 7, True)


def test_a_call_from_python_reads_no_options(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pytest', '--nonsense'])
    assert shell.command(lambda n=3: n)() == 3


def test_warnings_are_one_line(capsys):
    def f():
        warnings.simplefilter('always')
        warnings.warn('an image\nstands in for another')
    shell.command(f)()
    assert capsys.readouterr().err == 'warning: an image stands in for another\n'


# --------------------------------------------------------------------------------------- bad options

def test_numbers_that_make_no_sense(world, tmp_path, capsys):
    "They are refused before anything is read or written"
    start, data, pictures, out = str(world/'start'), str(world/'shapes'), [str(world/'shapes/images')], str(tmp_path/'out')
    for k, v in dict(epochs=0, minutes=0., queries=0, bs=0, accumulate=-1, every=0, workers=-1, lr=0., wd=-1., ema=1.5, valid_pct=2., seed=-1).items():
        bad(capsys, f'--{k} {v}: a number', train, world, out, **{k: v})
    for k, v in dict(bs=0, max_dets=0, steps=-1, tol=-1., workers=-1).items():
        bad(capsys, f'--{k} {v}: a number', cli.deqdet_eval, start, data, device='cpu', **{k: v})
    for k, v in dict(bs=0, max_dets=-3, min_score=2., tol=float('nan')).items():
        bad(capsys, f'--{k} {v}: a number', cli.deqdet_predict, start, pictures, out, device='cpu', **{k: v})
    for k, v in dict(minutes=-1., n_train=0, n_valid=-1, seed=-3).items():
        bad(capsys, f'--{k} {v}: a number', demo.deqdet_demo, out, **{k: v})
    assert not Path(out).exists()


def test_words_that_name_nothing(world, tmp_path, capsys):
    bad(capsys, '--recipe 4x', train, world, tmp_path/'out', recipe='4x')
    bad(capsys, '--size big', train, world, tmp_path/'out', size='big')
    bad(capsys, '--size big', cli.deqdet_eval, str(world/'start'), str(world/'shapes'), size='big')
    bad(capsys, '--size 0', cli.deqdet_convert, 'x.pth', str(tmp_path/'out'), size='0')
    assert not (tmp_path/'out').exists()


def test_epochs_or_minutes(world, tmp_path, capsys):
    bad(capsys, '--epochs and --minutes exclude each other', train, world, tmp_path/'out', epochs=2, minutes=1.)
    assert not (tmp_path/'out').exists()
    bad(capsys, 'this training counts epochs', train, world, 'run', resume=True, minutes=1.)


def test_help_fits_a_screen(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    for f in COMMANDS:
        lines = shell.parser_of(f).format_help().splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 80, f'{f.__name__}: {len(lines)} lines'


@pytest.mark.parametrize('words, says', [
    ('deqdet_eval a', 'required: data'), ('deqdet_eval a b --bs many', 'invalid int'), ('deqdet_train a --augment upside', 'invalid choice'),
    ('deqdet_predict a b --nonsense', '--nonsense'), ('deqdet_export a b --max-dets', 'expected one argument')])
def test_options_that_cannot_be_read(monkeypatch, capsys, words, says):
    monkeypatch.setattr(sys, 'argv', words.split())
    with pytest.raises(SystemExit) as e: shell.read_options(getattr(cli, words.split()[0]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and says in err and '--help' in err


def test_a_stack_has_no_tolerance(world, tmp_path, capsys):
    stack = create_detector('adamixer_tiny', vocab=['disc', 'triangle', 'square', 'cross'])
    stack.feed = Feed(64, 64)
    save_detector(stack, tmp_path/'stack')
    bad(capsys, '--tol 0.001', cli.deqdet_eval, str(tmp_path/'stack'), str(world/'shapes'), tol=1e-3, device='cpu')
    bad(capsys, '--steps 0: a stack', cli.deqdet_eval, str(tmp_path/'stack'), str(world/'shapes'), steps=0, device='cpu')


def test_zero_is_a_number(world, tmp_path, blank):
    "Not the same as nothing said"
    train(world, tmp_path/'out', epochs=1, wd=0., workers=0)
    config = json.loads((tmp_path/'out/config.json').read_text())
    assert config['options'].items() >= dict(wd=0., workers=0).items()


def test_weights_of_a_body_that_would_not_be_read(world, tmp_path, capsys):
    for model in (str(world/'start'), 'deqdet_tiny'):
        bad(capsys, '--pretrained nowhere.pth', train, world, tmp_path/'out', model=model, pretrained='nowhere.pth')
    assert 'did you mean' not in bad(capsys, '--model no/where', train, world, tmp_path/'out', model='no/where')


def test_messages_speak_of_options(world, tmp_path, capsys):
    data, start = str(world/'shapes'), str(world/'start')
    bad(capsys, 'needs --valid_pct', train, world, tmp_path/'out', train='nope')
    bad(capsys, "no split 'nope'", train, world, tmp_path/'out', train='nope', valid_pct=.3)
    two = shutil.copytree(world/'shapes', tmp_path/'two')
    (two/'annotations/instances_train.json').rename(two/'annotations/instances_test.json')
    bad(capsys, 'with --train and --valid', train, tmp_path, tmp_path/'out', 'two', model=str(world/'start'), valid_pct=.3)
    bad(capsys, "needs --split ''", cli.deqdet_eval, start, data, 'nope')
    bad(capsys, 'not read together: annotations/instances_train.json, annotations/instances_valid.json: name the splits with --split',
        cli.deqdet_eval, start, data, '')
    bad(capsys, '--layout foo', cli.deqdet_check, data, 'foo')
    bad(capsys, 'deqdet_models has all names', train, world, tmp_path/'out', model='deqdet_r50')
    shutil.copytree(world/'start', tmp_path/'it is')
    (tmp_path/'text.jpg').write_text('no image')
    assert cli.deqdet_predict(start, [str(tmp_path/'text.jpg')], str(tmp_path/'found'), device='cpu') == 2
    assert 'object at' not in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_first(world, tmp_path, capsys):
    (tmp_path/'folder').mkdir()
    (tmp_path/'taken').write_text('mine')
    for out in (tmp_path/'folder', tmp_path/'taken/x.json'):
        bad(capsys, f'{out}'.removesuffix('/x.json') + ':', cli.deqdet_eval, str(world/'start'), str(world/'shapes'), device='cpu', out=str(out))
    cli.deqdet_eval(str(world/'start'), str(world/'shapes'), device='cpu', out=str(tmp_path/'new/folder/x.json'))
    assert json.loads((tmp_path/'new/folder/x.json').read_text())


def test_a_training_that_explodes(world, tmp_path, capsys):
    assert '--lr' in bad(capsys, 'not finite', train, world, tmp_path/'out', lr=1e36)
    train(world, tmp_path/'far', lr=1e6, ema=None) # finite, and boxes are far away: they can be drawn all the same


def test_out_of_memory(capsys):
    "On a GPU, in the processor's memory, in NumPy"
    def f(e): raise e
    for e in (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'), MemoryError(),
              RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")):
        assert '--bs' in bad(capsys, 'out of memory', shell.command(f), e)


# --------------------------------------------------------------------------------------- bad data

def test_no_such_things(world, tmp_path, capsys):
    nowhere = str(tmp_path/'nowhere')
    for f, args in ((cli.deqdet_check, (nowhere,)), (cli.deqdet_train, (nowhere,)), (cli.deqdet_eval, (nowhere, nowhere)),
                    (cli.deqdet_eval, (str(world/'start'), nowhere)), (cli.deqdet_predict, (str(world/'start'), [nowhere])),
                    (cli.deqdet_convert, (nowhere, nowhere))):
        bad(capsys, nowhere, f, *args)
    bad(capsys, 'deqdet_r50_1x', cli.deqdet_train, str(world/'shapes'), model='deqdet_r50_1y', out=nowhere)
    bad(capsys, 'yolo', cli.deqdet_models, 'yolo')
    bad(capsys, '--device tpu', cli.deqdet_eval, str(world/'start'), str(world/'shapes'), device='tpu')
    assert not Path(nowhere).exists() or not list(Path(nowhere).iterdir())


@pytest.mark.parametrize('text', ['', '[]', '{', '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}'])
def test_no_annotation_file(world, tmp_path, capsys, text):
    path = altered(world, tmp_path)
    file = path/'annotations/instances_train.json'
    file.write_text(text)
    bad(capsys, str(file), cli.deqdet_check, str(path))
    bad(capsys, str(file), train, world, tmp_path/'out', path)


def test_wrong_categories(world, tmp_path, capsys):
    coco = json.loads((world/'shapes/annotations/instances_valid.json').read_text())
    path = altered(world, tmp_path, 'valid', categories=[dict(id=i, name=f'thing {i}') for i in range(1, 5)])
    assert cli.deqdet_check(str(path)) == 1
    bad(capsys, 'thing 1', cli.deqdet_eval, str(world/'start'), str(path))
    (path/'annotations/instances_valid.json').write_text(json.dumps(coco | dict(categories=coco['categories'][:1] + [dict(id=9, name='x')])))
    capsys.readouterr()
    cli.deqdet_eval(str(world/'start'), str(path), device='cpu') # what is known is counted
    assert 'unknown category' in capsys.readouterr().err


def test_nothing_to_learn_from(world, tmp_path, capsys):
    path = altered(world, tmp_path, annotations=[])
    bad(capsys, 'not one object', train, world, tmp_path/'out', path)
    (path/'annotations/instances_train.json').write_text(json.dumps(dict(images=[], annotations=[], categories=[dict(id=1, name='disc')])))
    bad(capsys, 'at least one image', train, world, tmp_path/'out', path)
    path2 = altered(world, tmp_path/'two', 'valid', images=[], annotations=[])
    bad(capsys, 'to validate on', train, world, tmp_path/'out', path2)


def cut(path):
    "Cut an image short; its path"
    file = sorted((path/'images').glob('train*'))[0]
    file.write_bytes(file.read_bytes()[:700])
    return file


def test_truncated_picture(world, tmp_path, capsys):
    path = altered(world, tmp_path)
    file = cut(path)
    assert cli.deqdet_check(str(path)) == 1 and 'truncated image' in capsys.readouterr().out
    assert cli.deqdet_check(str(path), fast=True) == 0
    bad(capsys, str(file), train, world, tmp_path/'out', path, epochs=1)
    bad(capsys, str(file), train, world, tmp_path/'out', path, epochs=1, workers=1)
    train(world, tmp_path/'skipped', path, epochs=1, skip_bad=True)
    assert str(file) in capsys.readouterr().err
    assert cli.deqdet_predict(str(world/'start'), [str(path/'images')], str(tmp_path/'found'), device='cpu') == 2
    assert str(file) in capsys.readouterr().err
    assert len(json.loads((tmp_path/'found/predictions.json').read_text())['images']) == 5


def strange(path):
    "Replace a set's images by one of a single pixel and one of 8000x50; what is annotated stays inside"
    for split in ('train', 'valid'):
        file, dot, strip = path/f'annotations/instances_{split}.json', f'{split}_dot.png', f'{split}_strip.png'
        images = [dict(id=1, file_name=dot, width=1, height=1), dict(id=2, file_name=strip, width=8000, height=50)]
        anns = [dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 1, 1]), dict(id=2, image_id=2, category_id=2, bbox=[7000, 10, 500, 30])]
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(images=images, annotations=anns)))
        Image.new('RGB', (1, 1)).save(path/'images'/dot)
        Image.new('L', (8000, 50), 90).save(path/'images'/strip)


def test_strange_pictures(world, tmp_path, capsys):
    path = altered(world, tmp_path)
    strange(path)
    assert cli.deqdet_check(str(path)) == 0
    train(world, tmp_path/'out', path, epochs=1, bs=2)
    cli.deqdet_predict(str(tmp_path/'out'), [str(path/'images/valid_*.png')], str(tmp_path/'found'), min_score=0., device='cpu')
    coco = json.loads((tmp_path/'found/predictions.json').read_text())
    assert [(o['width'], o['height']) for o in coco['images']] == [(1, 1), (8000, 50)]
    assert load_image(tmp_path/'found/valid_dot.png').shape == (3, 480, 480)
    assert load_image(tmp_path/'found/valid_strip.png').shape[2] == 1600


def test_one_picture(world, tmp_path):
    coco = json.loads((world/'shapes/annotations/instances_train.json').read_text())
    one = coco['annotations'][0]['image_id']
    path = altered(world, tmp_path, images=[o for o in coco['images'] if o['id'] == one],
                   annotations=[o for o in coco['annotations'] if o['image_id'] == one])
    train(world, tmp_path/'out', path, epochs=1, bs=8)
    assert json.loads((tmp_path/'out/metrics.json').read_text())['n_train'] == 1


# --------------------------------------------------------------------------------------- detectors and checkpoints

def test_damaged_detector(world, tmp_path, capsys):
    data = str(world/'shapes')
    def feed(text): # of a detector, where the configuration keeps it today
        return json.dumps(json.loads(text) | dict(feed=dict(width=3))).encode()
    for name, spoil in (('model.safetensors', lambda b: b[:5000]), ('model.safetensors', lambda b: b''),
                        ('config.json', lambda b: b[:50]), ('config.json', lambda b: b'{"vocab": null}'),
                        ('config.json', feed)):
        path = Path(shutil.copytree(world/'start', tmp_path/'bad', dirs_exist_ok=True))
        (path/name).write_bytes(spoil((path/name).read_bytes()))
        bad(capsys, str(path), cli.deqdet_eval, str(path), data)
        bad(capsys, str(path), cli.deqdet_train, data, model=str(path), out=str(tmp_path/'out'))


def test_another_class_count(world, tmp_path, capsys):
    two = AdaMixer(n_classes=2, **SMALL).build()
    two.feed, two.recipe = Feed(64, 64), 'tiny'
    save_detector(two, tmp_path/'two')
    bad(capsys, '4 classes', cli.deqdet_eval, str(tmp_path/'two'), str(world/'shapes'))
    train(world, tmp_path/'out', epochs=1, model=str(tmp_path/'two')) # as a start it is welcome
    assert 'start afresh' in capsys.readouterr().out
    shutil.copytree(world/'run', tmp_path/'run')
    config = json.loads((tmp_path/'run/config.json').read_text())
    (tmp_path/'run/config.json').write_text(json.dumps(config | dict(vocab=['disc', 'square'])))
    bad(capsys, 'classes', train, world, tmp_path/'run', resume=True)


def test_damaged_checkpoint(world, tmp_path, capsys):
    run = Path(shutil.copytree(world/'run', tmp_path/'run'))
    whole = (run/'resume.pt').read_bytes()
    for part in (b'', whole[:9999], b'x'*9999):
        (run/'resume.pt').write_bytes(part)
        bad(capsys, str(run/'resume.pt'), train, world, run, resume=True, epochs=3)
    (run/'config.json').write_text('{')
    bad(capsys, str(run/'config.json'), train, world, run, resume=True)


def test_fine_tuning_keeps_weights(world, tmp_path, blank):
    cats = runs.start_detector(str(world/'run'), ['cat', 'dog'])
    old, new = weights(world/'run'), cats.state_dict()
    assert {k for k in old if old[k].shape != new[k].shape} == {f'decoder.{s}.cls.3.{p}' for s in ('init', 'step') for p in ('weight', 'bias')}
    assert all(torch.equal(old[k], new[k]) for k in old if '.cls.3.' not in k)
    assert any(p.requires_grad for p in cats.parameters()) and cats.training


# --------------------------------------------------------------------------------------- places to write to

def test_a_file_in_the_place_of_a_folder(world, tmp_path, capsys):
    taken = tmp_path/'taken'
    taken.write_text('mine')
    start, data, pictures = (str(world/o) for o in ('start', 'shapes', 'shapes/images'))
    for out in (taken, taken/'below'):
        bad(capsys, str(taken), train, world, out)
        bad(capsys, str(taken), cli.deqdet_predict, start, [pictures], str(out))
        bad(capsys, str(taken), demo.deqdet_demo, out=str(out), quick=True)
    bad(capsys, str(taken), cli.deqdet_eval, start, data, out=str(taken/'results.json'), device='cpu')
    assert taken.read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(world, tmp_path, capsys):
    (tmp_path/'locked').mkdir(mode=0o500)
    bad(capsys, str(tmp_path/'locked'), train, world, tmp_path/'locked/out')


@pytest.fixture
def little_disk(tmp_path):
    "A folder on a disk of 4 MB, and how to make it larger"
    disk = tmp_path/'disk'
    disk.mkdir()
    def mount(size, *more): return subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={size}m', *more]), 'tmpfs', disk], capture_output=True)
    try: done = mount(4).returncode == 0
    except OSError: done = False
    if not done: pytest.skip('a tmpfs cannot be mounted here')
    yield disk, lambda: mount(64, 'remount')
    subprocess.run(['umount', disk])


def test_read_only_disk(world, little_disk, tmp_path, capsys):
    "Where even root may not write"
    disk = little_disk[0]
    if subprocess.run(['mount', '-o', 'remount,ro', disk], capture_output=True).returncode: pytest.skip('no remount here')
    start, pictures = str(world/'start'), str(world/'shapes/images')
    assert 'Read-only' in bad(capsys, str(disk), train, world, disk/'out')
    bad(capsys, str(disk), cli.deqdet_predict, start, [pictures], str(disk/'found'))
    bad(capsys, str(disk), demo.deqdet_demo, out=str(disk/'demo'), quick=True)


def test_full_disk(world, little_disk, tmp_path, capsys):
    disk, enlarge = little_disk
    (disk/'ballast').write_bytes(bytes(3*2**20))
    line = bad(capsys, str(disk), train, world, disk/'run')
    assert 'No space left' in line
    assert not [o for o in disk.rglob('*') if o.is_file() and o.stat().st_size == 0 and o.name != 'ballast']
    bad(capsys, str(disk), train, world, disk/'again')
    enlarge()
    train(world, disk/'run', resume=True)
    assert same(disk/'run/last', world/'run/last')


# --------------------------------------------------------------------------------------- being stopped

def child(f):
    "Run `f` in a process of its own; its id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        f()
        status = 0
    except SystemExit as e: status = e.code
    finally: os._exit(status)


def end(pid):
    "Exit status of a child, or minus the signal that killed it"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(file, seconds=60):
    until = time.time() + seconds
    while not file.exists():
        assert time.time() < until, f'{file} did not appear'
        time.sleep(.01)


def test_resume_is_the_same_training(world, tmp_path, blank):
    "SIGTERM somewhere, then SIGKILL somewhere, then to the end: the weights are those of a training in one go"
    run = tmp_path/'run'
    pid = child(lambda: train(world, run))
    wait_for(run/'resume.pt')
    os.kill(pid, signal.SIGTERM)
    assert end(pid) in (143, 0)
    pid = child(lambda: train(world, run, resume=True))
    time.sleep(.3)
    os.kill(pid, signal.SIGKILL)
    end(pid)
    train(world, run, resume=True)
    assert same(run/'last', world/'run/last')
    names = [o.name for o in run.iterdir()]
    assert sorted(names) == sorted(o.name for o in (world/'run').iterdir()), names


@pytest.mark.parametrize('when', ['resume.pt', 'last', 'best', 'log.csv'])
def test_killed_while_saving(world, tmp_path, monkeypatch, when, blank):
    "SIGKILL between the writing of a file and its renaming"
    run = tmp_path/'run'
    def die(target): when in Path(target).parts[-2:] and os.kill(os.getpid(), signal.SIGKILL)
    replace, rename = os.replace, Path.replace
    def patched():
        monkeypatch.setattr(os, 'replace', lambda a, b: (die(b), replace(a, b)))
        monkeypatch.setattr(Path, 'replace', lambda a, b: (die(b), rename(a, b))[1])
        train(world, run)
    assert end(child(patched)) == -signal.SIGKILL
    train(world, run, resume=True)
    assert same(run/'last', world/'run/last') and same(run/'best', world/'run/best')


def test_a_training_is_not_written_over(world, capsys):
    before = (world/'run/resume.pt').read_bytes()
    bad(capsys, '--resume', train, world, 'run')
    bad(capsys, '--bs 4', train, world, 'run', resume=True, bs=4)
    assert (world/'run/resume.pt').read_bytes() == before


def test_what_may_change_on_the_way(world, tmp_path, capsys):
    "Nothing that changes a result, not even if nothing was said about it at the start"
    run = Path(shutil.copytree(world/'run', tmp_path/'run'))
    for k, v in dict(amp='bf16', wd=.3, size='96', augment='none').items():
        bad(capsys, f'--{k} {v}: this training began with', train, world, run, resume=True, **{k: v})
    assert '2 are done' in bad(capsys, '--epochs 1', train, world, run, resume=True, epochs=1)
    train(world, run, resume=True, size='64', skip_bad=True, layout='coco', every=9, workers=1) # the same, and what is free


def test_going_on_says_where(world, tmp_path, capsys, blank):
    "What was trained before is not printed as if it were trained again"
    train(world, tmp_path/'run', epochs=1)
    capsys.readouterr()
    train(world, tmp_path/'run', resume=True, epochs=2)
    out = capsys.readouterr().out
    assert 'going on in epoch 2 of 2, after 0 of 2 batches' in out and 'epoch 1 of 2:' not in out and out.count('epoch 2 of 2:') == 1


def test_ctrl_c_says_how_to_go_on(world, tmp_path):
    script = tmp_path/'script.py'
    script.write_text('from deqdet.cli import deqdet_train\ndeqdet_train()')
    args = [str(world/'shapes'), '--model', str(world/'start'), '--every', '1', '--device', 'cpu', '--bs', '2', '--epochs', '99']
    out = tmp_path/'a run' # of a name that a shell would take for two
    p = subprocess.Popen([sys.executable, script, *args, '--out', out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(out/'resume.pt')
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130, err
    assert re.search(rf'stopped in epoch \d+ of 99; to go on: deqdet_train \S+ --out \'{out}\' --resume\s*$', err), err
    assert 'Traceback' not in err


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes(world, tmp_path, sig):
    "A shell and a queue signal those too that load images"
    out = tmp_path/'run'
    def in_a_session():
        os.setsid()
        sys.stderr = (tmp_path/'err.txt').open('w', buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        train(world, out, epochs=99, workers=2)
    pid = child(in_a_session)
    wait_for(out/'resume.pt')
    os.killpg(pid, sig)
    status = end(pid)
    err = (tmp_path/'err.txt').read_text()
    assert status == 128 + sig and 'to go on: deqdet_train' in err and 'Traceback' not in err, err


# --------------------------------------------------------------------------------------- what comes out

def test_what_a_training_leaves(world):
    run = world/'run'
    assert {o.name for o in run.iterdir()} == {'best', 'config.json', 'curves.png', 'last', 'log.csv', 'metrics.json', 'predictions.png', 'resume.pt'}
    config, m = (json.loads((run/f'{o}.json').read_text()) for o in ('config', 'metrics'))
    assert config['options'].items() >= RUN.items() and config['vocab'] == ['disc', 'triangle', 'square', 'cross']
    assert m['pictures_seen'] == 8 and m['machine']['torch'] == torch.__version__ and m['last']['APl'] is None
    log = (run/'log.csv').read_text().splitlines()
    assert len(log) == 3 and log[0].startswith('epoch,train_loss,valid_loss')


def test_evaluation_agrees_with_training(world, tmp_path, capsys):
    "The numbers of `deqdet_eval` on what was written are those that training logged"
    m = json.loads((world/'run/metrics.json').read_text())
    cli.deqdet_eval(str(world/'run/last'), str(world/'shapes'), device='cpu', out=str(tmp_path/'results.json'))
    out = capsys.readouterr().out
    for k in ('AP', 'AP50', 'AR100'): assert re.search(rf'^{k} +{m["last"][k]:.3f} ', out, re.M), out
    from deqdet.evaluate import coco_ap
    again = coco_ap(tmp_path/'results.json', world/'shapes/annotations/instances_valid.json')
    assert abs(again.AP - m['last']['AP']) < 1e-6


def test_results_are_in_cocos_form(world, tmp_path):
    "Of every image, also with steps and a tolerance of one's own"
    cli.deqdet_eval(str(world/'start'), str(world/'shapes'), 'train', steps=1, tol=1e-3, device='cpu', out=str(tmp_path/'x.json'))
    res = json.loads((tmp_path/'x.json').read_text())
    assert sorted(res[0]) == ['bbox', 'category_id', 'image_id', 'score'] and len({o['image_id'] for o in res}) == 4


def test_predictions_lie_in_the_picture_as_it_is(world, tmp_path):
    "Twice the image, twice the boxes; and images of one name do not write over each other"
    a, b = tmp_path/'a/x.png', tmp_path/'b/x.png'
    for f in (a, b): f.parent.mkdir()
    im = Image.open(sorted((world/'shapes/images').iterdir())[0])
    im.save(a)
    im.resize((128, 128), Image.NEAREST).save(b)
    cli.deqdet_predict(str(world/'start'), [str(tmp_path/'*/*.png')], str(tmp_path/'found'), size='64', min_score=0., device='cpu')
    coco = json.loads((tmp_path/'found/predictions.json').read_text())
    one, two = (torch.tensor([o['bbox'] for o in coco['annotations'] if o['image_id'] == i]) for i in (1, 2))
    assert {o.name for o in (tmp_path/'found').iterdir()} == {'predictions.json', 'x.png', 'x_2.png'}
    assert len(one) == len(two) == 36
    assert (two[:, 2:].max() > 40) and torch.cdist(2*one, two).min(1)[0].median() < 2


def test_nothing_found_says_why(world, tmp_path, capsys):
    for score, said in ((.99, True), (0., False)):
        cli.deqdet_predict(str(world/'start'), [str(world/'shapes/images')], str(tmp_path/'found'), score, json_only=True, device='cpu')
        assert ('no score reaches 0.99; --min_score' in capsys.readouterr().err) == said


def test_convert(tmp_path, capsys):
    from deqdet.convert import to_official
    model = AdaMixer(**SMALL | dict(body='', channels=(8, 8, 8, 8))).build().eval()
    torch.save(dict(state_dict=to_official(model)), tmp_path/'x.pth')
    cli.deqdet_convert(str(tmp_path/'x.pth'), str(tmp_path/'x'))
    again = load_detector(tmp_path/'x', device='cpu')
    assert again.vocab == COCO and again.feed == Feed(800, 1333)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    (tmp_path/'names.txt').write_text('cat\ndog\n')
    bad(capsys, '2 names', cli.deqdet_convert, str(tmp_path/'x.pth'), str(tmp_path/'y'), names=str(tmp_path/'names.txt'))
    (tmp_path/'cut.pth').write_bytes((tmp_path/'x.pth').read_bytes()[:9999])
    torch.save(dict(weight=torch.zeros(3)), tmp_path/'other.pth')
    for o in ('cut.pth', 'names.txt', 'other.pth'):
        assert len(bad(capsys, o, cli.deqdet_convert, str(tmp_path/o), str(tmp_path/'y'))) < 250
    assert not (tmp_path/'y').exists()


def test_minutes(world, tmp_path, capsys):
    "Evaluated and saved when the time is up; what is left of it is what a training that goes on has"
    out = tmp_path/'run'
    begun = time.time()
    train(world, out, epochs=None, minutes=.06)
    text = capsys.readouterr().out
    assert 'of 0.06 minutes: train_loss' in text and 'of training in all' in text and '100000' not in text
    m = json.loads((out/'metrics.json').read_text())
    log = (out/'log.csv').read_text().splitlines()
    assert m['minutes'] == .06 and m['curve'] and m['last']['AP'] is not None and m['pictures_seen'] == 2*m['curve'][-1]['updates']
    assert len(log) == m['epochs'] + 1 and all(o.count(',') == log[0].count(',') for o in log)
    assert {o.name for o in out.iterdir()} == {o.name for o in (world/'run').iterdir()}
    saved = torch.load(out/'resume.pt', weights_only=True)
    assert 0 < saved['cbs']['time_budget']['before'] < time.time() - begun
    train(world, out, resume=True, minutes=.1)
    again = json.loads((out/'metrics.json').read_text())
    assert again['minutes'] == .1 and len(again['curve']) > len(m['curve']) and 'going on after' in capsys.readouterr().out


def test_other_classes_and_queries(world, tmp_path, capsys, blank):
    "In one command, from a folder of ours; it says what it kept"
    train(world, tmp_path/'run', epochs=1, queries=16)
    said = capsys.readouterr().out
    assert '9 queries there, 16 here' in said and 'tensors kept' in said
    assert load_detector(tmp_path/'run', device='cpu').hyper.n_queries == 16


def test_thresholds_are_kept(world, tmp_path):
    "One for each class, beside the best detector; predictions heed them"
    model = load_detector(world/'run', device='cpu')
    assert len(model.thresholds) == 4
    from deqdet.predict import detect
    picture = [sorted((world/'shapes/images').iterdir())[0]]
    model.thresholds = [0., 2., 2., 2.]
    one = next(detect(model, picture, min_score=None))
    assert set(one.dets['labels'].tolist()) <= {0}
    model.thresholds = None
    assert (next(detect(model, picture, min_score=None)).dets['scores'] >= .3).all()


def test_small_sets_needs(world, tmp_path, capsys, blank):
    "Mosaics, rare classes and patience, in one training, which goes on as it began"
    train(world, tmp_path/'run', epochs=9, lr=1e-9, patience=2, mosaic=1., rare=.9)
    said = capsys.readouterr().out
    m = json.loads((tmp_path/'run/metrics.json').read_text())
    assert m['epochs'] == 3 and 'after epoch 1 of 9' in said
    kept = json.loads((tmp_path/'run/config.json').read_text())['options']
    assert [kept[k] for k in ('patience', 'mosaic', 'rare')] == [2, 1., .9]
    bad(capsys, '--mosaic 1.5: a number from 0 to 1', train, world, tmp_path/'no', mosaic=1.5)
    bad(capsys, '--patience 0: a number from 1', train, world, tmp_path/'no', patience=0)


def test_tiny_objects_get_a_warning(world, tmp_path, capsys, blank):
    train(world, tmp_path/'run', epochs=1, size='16')
    err = capsys.readouterr().err
    assert re.search(r'warning: \d+% of the objects are smaller than 4 pixels .*; --size \d+ would do', err), err


def test_two_processes(world, tmp_path):
    "As `accelerate launch` starts them: all train, the first one writes"
    script = tmp_path/'script.py'
    script.write_text('from deqdet.cli import deqdet_train\ndeqdet_train()')
    args = [str(world/'shapes'), '--model', str(world/'start'), '--device', 'cpu', '--bs', '2', '--epochs', '1', '--out', str(tmp_path/'run')]
    code, out = forked(torchrun(script, *args))
    assert code == 0, out
    assert out.count('epoch 1 of 1:') == 1, out
    assert json.loads((tmp_path/'run/metrics.json').read_text())['last']['AP'] is not None


def test_accelerate_launch(world, tmp_path):
    "As `--help` says it: Ctrl-C in a shell goes to all, they save, and say how to go on"
    out = tmp_path/'run'
    def launch(*args):
        cmd = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', '0',
               '--no_python', Path(sys.executable).parent/'deqdet_train', world/'shapes', '--out', out, *args]
        env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', CUDA_VISIBLE_DEVICES='')
        return subprocess.Popen(list(map(str, cmd)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    p = launch('--model', world/'start', '--bs', '1', '--every', '1', '--device', 'cpu', '--epochs', '99')
    wait_for(out/'resume.pt')
    os.killpg(p.pid, signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode and len(re.findall(rf'to go on: in 2 processes again, deqdet_train \S+ --out {out} --resume', err))==1, err
    done = torch.load(out/'resume.pt', weights_only=True)['train_iter']
    script = tmp_path/'on.py'
    script.write_text('from deqdet.cli import deqdet_train\ndeqdet_train()')
    code, said = forked(accelerate(script, world/'shapes', '--out', out, '--resume', '--epochs', str(done//2 + 1))) # no more interpreters
    assert code==0, said
    m = json.loads((out/'metrics.json').read_text())
    assert m['epochs'] == done//2 + 1 and m['pictures_seen'] == 4*m['epochs']

def test_numbers_out_of_range():
    shell.check_numbers(dict(epochs=1, workers=0, lr=None, file='shapes'))
    with pytest.raises(shell.CommandError, match='--valid_pct 150: a number between 0 and 1 was expected'):
        shell.check_numbers(dict(valid_pct=150))
