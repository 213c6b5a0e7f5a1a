"The page on which a detector runs in a browser: its boxes are PyTorch's, and nothing leaves the machine"
import json, os, shutil, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from deqdet.model import residual_trace
import browser, render

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import playground

pytestmark = [
    pytest.mark.skipif(not render.chromium(), reason='Chromium is not here (apt install chromium)'),
    pytest.mark.skipif(not render.pandoc(), reason='pandoc is not here (pip install pypandoc_binary)'),
    pytest.mark.skipif(not browser.websocket(), reason='the browser cannot be driven (pip install websocket-client)'),
    pytest.mark.skipif(torch.__version__ < '2.7', reason='ONNX needs torch 2.7')]

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Folder with the detector's parts, scenes and runtime: what `make playground` left, else made anew"
    made = ROOT/'nbs/playground'
    if playground.is_there(made, [*playground.SCENES, *playground.FILES]) and playground.parts_are_there(made): return made
    folder = tmp_path_factory.mktemp('made')
    try: playground.write_all(folder)
    except playground.Missing as e: pytest.skip(str(e))
    return folder

def page(folder):
    "The page and its scripts, as a site has them"
    folder.mkdir(parents=True, exist_ok=True)
    css = (ROOT/'nbs/styles.css').read_text(encoding='utf-8')
    text = (ROOT/'nbs/playground.qmd').read_text(encoding='utf-8')
    (folder/'playground.html').write_text(render.qmd_as_html(text, css), encoding='utf-8')
    (folder/'playground').mkdir()
    for f in (ROOT/'nbs/playground').glob('*.js'): shutil.copy2(f, folder/'playground')
    return folder

@pytest.fixture(scope='module')
def site(files, tmp_path_factory):
    folder = page(tmp_path_factory.mktemp('site'))
    for name in [*playground.SCENES, *playground.FILES, *playground.PARTS]: shutil.copy2(files/name, folder/'playground')
    return folder

@pytest.fixture(scope='module')
def address(site):
    with browser.served(site) as address: yield address

@pytest.fixture
def window(tmp_path):
    "A browser's page, which prints no error"
    res = browser.Browser(tmp_path/'profile')
    res.look(1280)
    yield res
    res.close()

@pytest.fixture(scope='module')
def model():
    "The detector that the package ships, with its weights as the files have them"
    from deqdet.parts import round_weights
    return round_weights(playground.detector())

RUN = '''(async () => {
  const tools = await import('/playground/detector.js')
  window.detector ??= await tools.openDetector()
  const image = await tools.loadImage(URL_)
  const fed = tools.feed(image.rgba, image.h, image.w, window.detector.side)
  const states = []
  for await (const s of tools.settle(window.detector, fed, MOST, TOL)) states.push(s)
  return {...fed, pixels: [...fed.pixels], states}
})()'''

def in_browser(window, url, most, tol=0):
    code = RUN.replace('URL_', json.dumps(url)).replace('MOST', str(most)).replace('TOL', str(tol))
    return window.js(code)

def fed(model, file):
    "The square (1,3,S,S) that PyTorch is fed, and the size of the image in it"
    from deqdet.sets.augment import feed_tfm
    from deqdet.sets.images import Target, load_image
    image = load_image(file)
    hw = torch.tensor(image.shape[1:])
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), hw, torch.tensor(0))
    small,_ = feed_tfm(model.feed)(image, nothing)
    h,w = small.shape[1:]
    square = torch.zeros(1, 3, model.feed.long, model.feed.long, dtype=torch.uint8)
    square[0, :, :h, :w] = small
    return square, torch.tensor([[h, w]])

def in_pytorch(model, square, size, most):
    "(boxes, scores) after 0..most applications, and the residuals of each"
    path = model.trajectory(square, size, steps=most - 1)
    said = [(p.boxes[0], p.logits[0].sigmoid().max(-1).values) for _,p in path]
    return said, residual_trace(model, (square, size), most - 1).rel[:, 0]

def test_weights_are_small(files):
    assert sum((files/o).stat().st_size for o in playground.PARTS) < 12e6

def test_rounding_costs_little():
    "On a few scenes; `--ap` measures a hundred"
    said = playground.cost_of_rounding(4)
    assert said['floats'] > .2 and abs(said['floats'] - said['rounded']) < .05, said

@pytest.mark.parametrize('args', ([], ['--ap', 'folder']))
def test_a_folder_or_ap(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['playground.py', *args])
    with pytest.raises(SystemExit) as stop: playground.main()
    assert stop.value.code==2 and 'a folder, or --ap' in capsys.readouterr().err

@pytest.mark.parametrize('name', playground.SCENES)
def test_boxes_are_those_of_pytorch(window, address, site, model, name):
    "To a pixel, after each of the first ten steps, on images that are fed as they are, padded, and made smaller"
    most = 10
    window.open(f'{address}/playground.html')
    got = in_browser(window, f'{address}/playground/{name}', most)
    square,size = fed(model, site/'playground'/name)
    pixels = torch.tensor(got['pixels'], dtype=torch.uint8).view(square.shape)
    difference = (pixels.int() - square.int()).abs()
    resized = name=='scene3.png' # there, rounding may differ
    assert difference.max() <= int(resized) and (difference > 0).float().mean() < .02
    path,residuals = in_pytorch(model, pixels, size, most)
    assert len(got['states'])==most + 1
    for n,((boxes,scores),state) in enumerate(zip(path, got['states'])):
        seen = scores >= .3
        theirs = torch.tensor([q['box'] for q in state['found']])
        assert (theirs - boxes)[seen].abs().max() < 1, f'boxes after {n} steps'
        assert (torch.tensor([q['score'] for q in state['found']]) - scores)[seen].abs().max() < .02, f'scores after {n} steps'
        if 1 <= n <= 3: # later, queries that find nothing amplify what rounding differs
            torch.testing.assert_close(torch.tensor(state['residual']), residuals[n-1], rtol=.05, atol=1e-3)
    assert (scores >= .3).sum() >= 3 # there is something to compare
    assert not window.errors, window.errors

def test_tolerance_stops(window, address, model, site):
    window.open(f'{address}/playground.html')
    got = in_browser(window, f'{address}/playground/scene1.png', 20, .4)
    *before,last = [max(s['residual']) for s in got['states'][1:]]
    assert last <= .4 and all(r > .4 for r in before) and len(before) < 19

def test_the_page_works(window, address, model, site, tmp_path):
    "As a reader uses it: the first image, the sliders, an image of one's own"
    window.open(f'{address}/playground.html')
    ready = "document.getElementById('in-browser').dataset.state=='ready'"
    status = lambda: window.js("document.querySelector('[data-part=status]').textContent")
    def move(part, value):
        window.js(f"(() => {{const o = document.querySelector('[data-part={part}]'); o.value = {value}; o.dispatchEvent(new Event('input'))}})()")
        window.until(ready)
    window.until(ready)
    assert status().startswith('After 12 steps')
    path,_ = in_pytorch(model, *fed(model, site/'playground/scene1.png'), 12)
    rows = window.js("document.querySelectorAll('.found tbody tr').length")
    assert rows==(path[-1][1] >= .3).sum()
    assert window.js("document.querySelectorAll('[data-part=curves] circle').length")==24 # two residuals for each step
    move('steps', 3)
    assert status().startswith('After 3 steps')
    move('steps', 15)
    assert status().startswith('After 15 steps')
    move('tol', 3)
    assert not status().startswith('After 15 steps') # it has settled before
    move('score', .95)
    assert window.js("document.querySelectorAll('.found tbody tr').length") < rows
    own = tmp_path/'own.jpg'
    Image.fromarray(np.full((500, 700, 3), 128, np.uint8)).save(own)
    window.give('[data-part=file]', own)
    window.until("document.querySelector('[data-part=canvas]').width==700")
    window.until(ready)
    not_an_image = tmp_path/'own.txt'
    not_an_image.write_text('text')
    window.give('[data-part=file]', not_an_image)
    window.until("document.querySelector('[data-part=status]').textContent.includes('not an image')")
    assert not window.errors, window.errors
    outside = [u for u in window.requests if not u.startswith((address, 'data:', 'blob:', 'about:'))]
    assert not outside, outside

@pytest.mark.parametrize('dark', (False, True), ids=('light','dark'))
def test_it_fits_a_phone(window, address, dark):
    window.look(390, dark=dark)
    window.open(f'{address}/playground.html')
    window.until("document.getElementById('in-browser').dataset.state=='ready'")
    assert window.excess() <= 0
    if folder := os.environ.get('DEQDET_SHOTS'): window.screenshot(Path(folder)/f'playground_390_{dark}.png')

def test_missing_files_are_said(window, tmp_path):
    "A site that was built without `make playground`"
    with browser.served(page(tmp_path/'bare')) as address:
        window.open(f'{address}/playground.html')
        window.until("document.getElementById('in-browser').dataset.state=='failed'")
        assert 'make playground' in window.js("document.querySelector('[data-part=status]').textContent")
