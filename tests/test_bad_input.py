"""What a user gets wrong, as it is typed: one line, exit status 2, and no file changed or left behind

`{det}` is a detector, `{set}` a detection set, `{pic}` an image, `{onnx}` and others are files of the fixture."""
import contextlib, hashlib, io, shlex, shutil, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from deqdet import cli, demo, shell
from deqdet.data import synth_coco

DETECTOR = Path(__file__).parents[1]/'nbs/tutorials/shapes_detector'
BAD = '''
deqdet_check nowhere                                    | nowhere
deqdet_check {set} --layout pascal                      | pascal
deqdet_check {set} --valid nights                       | nights
deqdet_check {notes}                                    | notes.txt
deqdet_split nowhere out                                | nowhere
deqdet_split {whole} out --by "("                           | (
deqdet_split {set} out                                  | divided already
deqdet_split {set} {set}                                | there is a set
deqdet_split {yolo} {yolo}                              | there is a set
deqdet_split {whole} out --layout pascal                | pascal
deqdet_split {set} out --valid-pct 1.5                  | 1.5
deqdet_models yolo9000                                  | yolo9000
deqdet_convert nowhere.pth out                          | nowhere.pth
deqdet_convert {notes} out                              | notes.txt
deqdet_convert {notes} out --size big                   | big
deqdet_train nowhere                                    | nowhere
deqdet_train {set} --model resnet9000                   | resnet9000
deqdet_train {set} --epochs 0                           | epochs
deqdet_train {set} --minutes soon                       | soon
deqdet_train {set} --recipe 9x                          | 9x
deqdet_train {set} --device tpu9                        | tpu9
deqdet_train {set} --track comet                        | comet
deqdet_train {set} --size 0                             | size
deqdet_train {set} --lr nan --epochs 1                  | lr
deqdet_train                                            | data
deqdet_eval {det} {set} --split nights                  | nights
deqdet_eval {det} {set} --max-dets 100000               | 100000
deqdet_eval {det} {set} --bs 0                          | bs
deqdet_eval {det} {set} --tol -1                        | tol
deqdet_eval {notes} {set}                               | notes.txt
deqdet_eval {folder} {set}                              | folder
deqdet_eval {det} {set} --out {folder}                  | folder
deqdet_predict {det} nothing.jpg --out out              | nothing.jpg
deqdet_predict {det} {folder} --out out                 | folder
deqdet_predict {det} {pic} --out out --tiles 64,64      | 64,64
deqdet_predict {det} {pic} --out out --tiles large      | large
deqdet_predict {det} {pic} --out out --nms 2            | nms
deqdet_predict {det} {pic} --out out --min-score 2      | score
deqdet_predict {det} {pic} --out out --layout pascal    | pascal
deqdet_predict {det} {pic} --out {notes}                | notes.txt
deqdet_predict {det} {pic} --out out --steps -1         | steps
deqdet_predict {onnx} {pic} --out out                   | broken.onnx
deqdet_export {det} {folder}                            | folder
deqdet_export nowhere x.onnx                            | nowhere
deqdet_export {det} x.onnx --format tflite              | tflite
deqdet_demo stray                                       | stray
deqdet_demo --minutes 0 --out out                       | minutes
deqdet_demo --n-train -3 --out out                      | n_train
deqdet_demo --out {notes}                               | notes.txt
deqdet_demo --data nowhere --out out                     | nowhere: no such folder
'''.strip().splitlines()


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder with a set, an image, and files that are none"
    root = tmp_path_factory.mktemp('world')
    with contextlib.chdir(root):
        synth_coco(Path('set'), n_train=4, n_valid=2, size=64, seed=0)
        Path('folder').mkdir()
        shutil.copytree('set', 'whole')
        Path('whole/annotations/instances_valid.json').unlink()
        shutil.copytree('set/images', 'yolo/images')
        Path('yolo/data.yaml').write_text('train: images\nnames: [a]')
        Path('notes.txt').write_text('not an image, not a detector')
        Path('broken.onnx').write_bytes(b'\x08\x07nothing')
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save('pic.png')
    return root


def contents(root): return {str(o.relative_to(root)): hashlib.sha1(o.read_bytes()).hexdigest() if o.is_file() else None for o in sorted(root.rglob('*'))}


def typed(line):
    "Exit status and standard error of a command line"
    sys.argv = shlex.split(line)
    f = getattr(cli, sys.argv[0], None) or demo.deqdet_demo
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try: status = f(**shell.read_options(f))
        except SystemExit as e: status = e.code
    return status, err.getvalue()


@pytest.mark.parametrize('line', BAD, ids=lambda o: o.split('|')[0].strip())
def test_one_line_and_nothing_lost(world, monkeypatch, line):
    command, says = (o.strip() for o in line.split('|'))
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    before = contents(world)
    status, err = typed(command.format(det=DETECTOR, set='set', whole='whole', yolo='yolo', pic='pic.png', notes='notes.txt', folder='folder', onnx='broken.onnx'))
    assert status == 2 and err.count('\n') == 1 and says in err, err
    assert contents(world) == before
